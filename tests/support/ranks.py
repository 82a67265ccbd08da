"""Two real processes in a gloo process group."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PRELOADED = ["torch", "geoopt", "moegeo_router", "pytest"]


def on_two_ranks(function: Callable[..., None], folder: Path, *arguments: object) -> None:
    """Run ``function(rank, *arguments)``, importable by name, on two ranks; an error on either is raised here."""
    # Forked from a process that has done no more than import what takes seconds, once for all tests.
    multiprocessing.set_forkserver_preload(PRELOADED)
    mp.start_processes(
        _in_a_group, args=(str(folder / "store"), function, arguments), nprocs=2, start_method="forkserver"
    )


def _in_a_group(rank: int, store: str, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    # What the function made (a data-parallel model holds the group) is gone when the group is destroyed: the other
    # order now and then waits for ever for a thread of gloo's.
    function(rank, *arguments)
    dist.barrier()
    dist.destroy_process_group()
