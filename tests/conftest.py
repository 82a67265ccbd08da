"""What every test runs under: one thread (two busy threads on two cores can slow tenfold) and a fixed seed."""

from __future__ import annotations

import socket

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def port():
    """A port of this machine on which nobody answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session", autouse=True)
def _isolated_wandb(tmp_path_factory, port):
    """Nobody is logged in and no server of the outside world is asked; wandb reads this once in a process."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        patch.setenv("NETRC", str(home / "netrc"))
        patch.setenv("WANDB_CONFIG_DIR", str(home))
        patch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        patch.setenv("WANDB_ERROR_REPORTING", "false")
        yield
