"""Before a task of the benchmark is trained: whether all that its runs need is there, and is what its rows had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

from trainers import build
from trainers.probes import build_probes
from trainers.studies.benchmark_results import mixed
from trainers.studies.origin import libraries
from trainers.studies.rows import Row
from trainers.studies.runs import Run, StudyError, configurations, content

#: What data sets say of the option ``data.root``, which the benchmark does not have.
_WITHOUT_ROOT = {
    "root: ": "",
    "as the option data.root or in the environment variable MOEGEO_DATA; got neither": "in $MOEGEO_DATA; it is not set",
    "option data.root or MOEGEO_DATA": "$MOEGEO_DATA",
}


def check_ready(runs: Sequence[Run], rows: Sequence[Row]) -> None:
    """Build the device, the data and the probes of runs, and compare them with rows.

    Args:
        runs: one of each kind that a task has.
        rows: those of the task that stay.

    Raises:
        StudyError: something is not there, or the rows are of other settings, data or libraries.
    """
    planned = [_planned(run, config) for run, config in zip(runs, configurations(runs), strict=True)]
    if difference := mixed([*rows, *planned]):
        raise StudyError(
            f"its rows cannot be compared with what is trained now ({difference}): "
            "take another --out, or --fresh to begin anew"
        )


def _planned(run: Run, config: Mapping[str, Any]) -> Row:
    """Return the row that a run is going to have, without what comes of it."""
    # What is judged need not have the setting that its arm is going to have.
    phase = "tuning" if run.labels["phase"] == "tuning" else "planned"
    return {
        "key": run.key,
        "labels": {**run.labels, "phase": phase},
        "seed": config["seed"],
        "configuration": config,
        "data": _data(OmegaConf.create(dict(config))),
        "versions": libraries(),
    }


def _data(config: DictConfig) -> str:
    torch.set_num_threads(config.threads)  # as in the run: more can be much slower beside other work
    try:
        build.build_device(config.device)
        data = build.build(config, "data")
        build_probes(config, data)
    except (ValueError, OSError, InstantiationException) as error:
        text = str(error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error)
        for theirs, ours in _WITHOUT_ROOT.items():
            text = text.replace(theirs, ours)
        raise StudyError(text) from None
    return content(data)
