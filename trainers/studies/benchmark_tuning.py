"""What the tuning runs of the benchmark come to: a setting for each arm, and the linear baseline to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainers.studies.benchmark import ARMS, Setting, tuning_runs
from trainers.studies.benchmark_tasks import Tier
from trainers.studies.rows import Row


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The best of an arm's tuning runs.

    Attributes:
        setting: its tuned keys.
        loss: its validation loss.
        tried: validation loss by setting, in the order of the grid; None: the run has no result.
    """

    setting: Setting
    loss: float
    tried: Sequence[tuple[Setting, float | None]]


def choices(tier: Tier, task: str, rows: Sequence[Row]) -> dict[str, Choice]:
    """Return the setting of least validation loss of each arm whose tuning runs all have rows, and one a result.

    The first of equals is taken: the same rows always give the same choices.

    Args:
        tier: the tier.
        task: one of its tasks.
        rows: of the task.
    """
    by_key = {row["key"]: row for row in rows}
    found = {}
    for arm in ARMS:
        runs = tuning_runs(tier, task, arm)
        if any(run.key not in by_key for run in runs):
            continue
        tried = [(run.labels["setting"], _loss(by_key[run.key])) for run in runs]
        losses = [(loss, index) for index, (_, loss) in enumerate(tried) if loss is not None]
        if losses:
            loss, index = min(losses)
            found[arm] = Choice(setting=tried[index][0], loss=loss, tried=tried)
    return found


def unchosen(rows: Sequence[Row], found: Mapping[str, Choice]) -> dict[str, str]:
    """Return the arms with runs of another setting than what tuning chose, and of each what differs in one of them.

    A tuning run that failed and is run again may change the choice.

    Args:
        rows: of a task.
        found: as from ``choices``, of the same rows.
    """
    wrong = dict[str, str]()
    for row in rows:
        arm, phase, setting = (row["labels"][name] for name in ("arm", "phase", "setting"))
        for key, value in found[arm].setting.items() if phase != "tuning" and arm in found else ():
            if setting.get(key) != value:
                wrong.setdefault(arm, f"{row['key']} has {key} {setting.get(key)}, and tuning chose {value}")
    return wrong


def _loss(row: Row) -> float | None:
    return row["results"].get("valid/loss") if row["status"] == "done" else None


def reference(found: Mapping[str, Choice]) -> str | None:
    """Return the linear baseline that tuned best, None where none is tuned.

    The choice is of the tuning runs, so that it does not favour the baseline in the runs that are judged.

    Args:
        found: as from ``choices``.
    """
    linear = [arm for arm in found if ARMS[arm].linear]
    return min(linear, key=lambda arm: found[arm].loss, default=None)
