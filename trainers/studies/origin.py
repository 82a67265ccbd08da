"""Where a row comes from: commit, versions, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import moegeo_router as mg

ROOT = Path(__file__).parents[2]

#: What decides the numbers: a change elsewhere (a report, the rows themselves) leaves the commit clean.
CODE = ("moegeo_router", "trainers", "configs")


def origin() -> dict[str, Any]:
    """Return ``commit``, ``versions`` and ``hardware`` of what runs here, plain JSON."""
    return {
        "commit": commit(ROOT),
        "versions": {"python": platform.python_version(), **libraries()},
        "hardware": {"cpu": cpu_model(), "cores": os.cpu_count(), **_accelerator()},
    }


def libraries() -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "geoopt")}
    return versions | {"moegeo_router": mg.__version__}


def _accelerator() -> dict[str, str]:
    return {"accelerator": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def commit(root: Path) -> str:
    """Return the git commit of a working tree, with ``-dirty`` if its code was changed; ``unknown`` outside of git."""
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("-dirty" if _git(root, "status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def cpu_model() -> str:
    """Return the processor's name, as well as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def origin_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return where rows come from: commands, dates, commits, hardware, versions, seeds."""
    machines = _unique(_machine(row["hardware"]) for row in rows)
    dates = sorted({row["started"][:10] for row in rows})
    names = _unique(name for row in rows for name in row["versions"])
    versions = ", ".join(f"{name} {' and '.join(_versions(rows, name))}" for name in names)
    return [
        *(f"- command: `{command}`" for command in _unique(row["command"] for row in rows)),
        f"- date: {dates[0]}{'' if len(dates) == 1 else f' to {dates[-1]}'}",
        f"- commit: {', '.join(_unique(row['commit'] for row in rows))}",
        f"- hardware: {'; '.join(machines)}; one thread a run; {versions}",
        f"- seeds: {len({row['seed'] for row in rows})}; {len(rows)} runs, "
        f"{sum(row['seconds'] for row in rows) / len(rows):.0f} s each",
    ]


def _versions(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    return _unique(row["versions"][name] for row in rows if name in row["versions"])


def _machine(hardware: Mapping[str, Any]) -> str:
    accelerator = f", {hardware['accelerator']}" if "accelerator" in hardware else ""
    return f"{hardware['cpu']}, {hardware['cores']} cores{accelerator}"


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
