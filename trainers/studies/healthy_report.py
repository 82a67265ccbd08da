"""The report of the study of healthy runs: what the controller did, what it cost, two verdicts; from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from trainers.studies.events import alerts, orders
from trainers.studies.files import write_whole
from trainers.studies.healthy import SAME
from trainers.studies.intervals import mean_interval, with_half_width
from trainers.studies.origin import origin_lines
from trainers.studies.rows import Row, reasons
from trainers.studies.setpoints import largest_of_all

#: What the claims ask for: steps with the controller, pairs, and a loss that is higher by less than this, in percent.
LEAST_STEPS, LEAST_PAIRS, MARGIN = 30_000, 80, 0.2

#: The results in which two equal runs differ.
CLOCK = frozenset({"train/tokens_per_second", "train/step_ms"})

Pair = tuple[Row, Row]

_LEGEND = (
    "Pairs of runs that differ in the controller alone: off, and on (it acts). No run has a fault, so that every alert "
    "is a false one and every intervention a mistake. As in the fault study: its healthy runs, load-balance loss 0.01; "
    "other kinds have one thing changed. All: whatever setting and kind, each pair counting once."
)
_LEGEND_OF_DEEDS = (
    "Runs with the controller. Actions: interventions that were ordered, those included that were found impossible. "
    "Drifts are told and not acted on; false alarms: warnings and critical alerts per 1,000 steps. Set-points: the "
    "largest weight in any layer and step (speed: the limit of natural steps is divided by exp of it; without natural "
    "steps it does nothing). They are no actions, but move the loss all the same."
)
_LEGEND_OF_COSTS = (
    "Difference: validation loss on less off, in percent of off; means over pairs ± the half-width of Student's "
    "two-sided 95% interval. Upper bound: one-sided, 95%. Worst: the pair with the largest difference. Equal: pairs "
    "that agree in every number that rows keep (seven digits), but the speed. Their difference is exactly 0: where all "
    "pairs are equal the interval has no width because nothing was changed, which says nothing of runs in which "
    "something would be."
)


def write_healthy(rows: Sequence[Row], folder: Path) -> Path:
    """Write ``healthy.md`` and return its path.

    Args:
        rows: one or more.
        folder: an existing folder.
    """
    seeds = [row["seed"] for row in rows]
    groups = _groups(rows)
    lines = ["# Healthy runs", "", "Does the controller leave alone what needs no repair?", "", *origin_lines(rows)]
    lines += [
        f"- numbers of the seeds: {min(seeds)} … {max(seeds)}; the controller was tuned on 0 … 2",
        "",
        _LEGEND,
        "",
    ]
    lines += [*_verdicts(groups), "", "## What it did", "", _LEGEND_OF_DEEDS, "", *_deeds(groups)]
    lines += ["", "## What it cost", "", _LEGEND_OF_COSTS, "", *_costs(groups)]
    path = folder / "healthy.md"
    write_whole(path, "\n".join([*lines, *reasons(rows)]) + "\n")
    return path


def _groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of every setting, arm and kind, of all that are as in the fault study, and of all."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(", ".join(row["labels"][name] for name in ("setting", "arm", "kind")), []).append(row)
    same = [row for row in rows if row["labels"]["kind"] == SAME]
    return groups | {name: own for name, own in ((f"all {SAME}", same), ("all", list(rows))) if own}


def pairs_of(rows: Sequence[Row]) -> list[Pair]:
    """Return the pairs of runs, without and with the controller, that both have a loss."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "done":
            labels = row["labels"]
            place = (labels["setting"], labels["arm"], labels["kind"], str(row["seed"]))
            found.setdefault(place, {})[labels["controller"]] = row
    return [(pair["off"], pair["on"]) for pair in found.values() if pair.keys() >= {"off", "on"}]


def difference(pair: Pair) -> float:
    """Return the difference in validation loss that the controller made, in percent of that without it."""
    off, on = (float(row["results"]["valid/loss"]) for row in pair)
    return 100 * (on - off) / off


def _verdicts(groups: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    for name in (f"all {SAME}", "all"):
        if name in groups:
            yield f"- No discrete action, {name}: {_on_actions(groups[name])}."
            yield f"- Loss higher by less than {MARGIN:g}%, {name}: {_on_losses(groups[name])}."


def _on_actions(rows: Sequence[Row]) -> str:
    acting = _acting(rows)
    actions, steps = sum(len(orders(row)) for row in acting), _steps(acting)
    doubts = [*([f"{LEAST_STEPS:,} steps needed"] if steps < LEAST_STEPS else []), *_lost(acting)]
    return _verdict(actions == 0 and not doubts, [f"{actions} in {steps:,} steps of {len(acting)} runs", *doubts])


def _on_losses(rows: Sequence[Row]) -> str:
    found = [difference(pair) for pair in pairs_of(rows)]
    bound = _upper_bound(found)
    doubts = [*([f"{LEAST_PAIRS} pairs needed"] if len(found) < LEAST_PAIRS else []), *_lost(rows)]
    holds = bound is not None and bound < MARGIN and not doubts
    return _verdict(holds, [f"upper bound {_signed(bound)}% over {len(found)} pairs", *doubts])


def _lost(rows: Sequence[Row]) -> list[str]:
    lost = sum(row["status"] != "done" for row in rows)
    return [f"{lost} without a result"] if lost else []


def _verdict(holds: bool, why: Sequence[str]) -> str:
    return f"**{'holds' if holds else 'does not hold'}** ({'; '.join(why)})"


def _deeds(groups: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    yield "| runs | n | steps | actions | drifts | warnings | critical | false alarms | set-points |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, rows in groups.items():
        acting = _acting(rows)
        steps, actions = _steps(acting), sum(len(orders(row)) for row in acting)
        drifts, warnings, critical = (_alerts(acting, severity) for severity in ("drift", "warning", "critical"))
        rate = f"{1000 * (warnings + critical) / steps:.2f}" if steps else "-"
        cells = (len(acting), f"{steps:,}", actions, drifts, warnings, critical, rate, _setpoints(acting))
        yield f"| {name} | {' | '.join(map(str, cells))} |"


def _costs(groups: Mapping[str, Sequence[Row]]) -> Iterator[str]:
    yield "| runs | pairs | equal | loss off | difference, % | upper bound, % | worst, % |"
    yield "|---|---|---|---|---|---|---|"
    for name, rows in groups.items():
        pairs = pairs_of(rows)
        found = [difference(pair) for pair in pairs]
        one = len({row["labels"]["setting"] for row in rows}) == 1  # losses of several do not add up
        loss = f"{fmean(off['results']['valid/loss'] for off, _ in pairs):.3f}" if pairs and one else "-"
        mean = with_half_width(mean_interval(found), "+") if found else "-"
        worst = _signed(max(found, default=None))
        equal = sum(map(_are_equal, pairs))
        yield f"| {name} | {len(pairs)} | {equal} | {loss} | {mean} | {_signed(_upper_bound(found))} | {worst} |"


def _acting(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["labels"]["controller"] == "on"]


def _steps(rows: Sequence[Row]) -> int:
    return sum(int(row["results"].get("train/steps", 0)) for row in rows)


def _alerts(rows: Sequence[Row], severity: str) -> int:
    return sum(event.get("severity") == severity for row in rows for event in alerts(row))


def _setpoints(rows: Sequence[Row]) -> str:
    return ", ".join(f"{name} {weight:.2g}" for name, weight in sorted(largest_of_all(rows).items())) or "-"


def _upper_bound(values: Sequence[float]) -> float | None:
    """Return the one-sided 95% bound of the mean, which is the upper end of the two-sided 90% interval."""
    return mean_interval(values, confidence=0.9).high if len(values) > 1 else None


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def _are_equal(pair: Pair) -> bool:
    off, on = (row["results"] for row in pair)
    return all(off[name] == on[name] for name in off.keys() & on.keys() - CLOCK)
