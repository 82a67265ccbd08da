"""The report of the fault study: what each fault did with and without the controller, from its rows alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from trainers.studies.events import CRITICAL, WARNING, decisions, failures, first_alert
from trainers.studies.faults import HEALTHY
from trainers.studies.files import write_whole
from trainers.studies.intervals import mean_interval, paired_difference, with_half_width, with_pairs
from trainers.studies.origin import origin_lines
from trainers.studies.recovery import LEGEND, Repair, repair, together
from trainers.studies.rows import Row, by_seed, reasons

#: How an intervention, or the controller's patience with a layer, can end, by the kind of the decision.
ENDINGS = {"keep": "helped", "undo": "undone", "release": "released", "give up": "gave up"}

#: Is judged by data of the new kind, as the healthy run is not.
DOMAIN_SHIFT = "domain_shift"

_LEGEND = (
    "Each fault is the healthy setting (load-balance loss 0.01) with one thing changed; configs/fault says what. Off "
    "is without the controller, on with it. Validation loss in nats a target, of the runs that did not diverge: means "
    "over seeds ± the half-width of Student's 95% interval. Harm is off less the healthy run's off, on - off what the "
    "controller changed (below 0: for the better), both paired over seeds, not corrected for the number of faults. "
    "Domain shift: the loss is that on data of the new kind, in which the training ends, so most of its harm is that "
    "these are new. Dead: the share of experts under a tenth of their fair share in the last 20 training steps. "
    "Diverged: ended with NaN or inf."
)
_LEGEND_OF_ALERTS = (
    "With the controller: steps from the beginning of the fault to the first alert (median over the runs that had one, "
    "and how many had), earlier alerts left out; failure modes it named (runs); interventions (in all runs) and how "
    "they ended."
)


def write_faults(rows: Sequence[Row], folder: Path) -> Path:
    """Write ``faults.md`` and return its path.

    Args:
        rows: one or more.
        folder: an existing folder.
    """
    title = "What goes wrong in a training, who notices, and what the controller makes of it."
    lines = ["# Faults", "", title, "", *origin_lines(rows), "", _LEGEND, "", LEGEND, "", _LEGEND_OF_ALERTS]
    every: list[Repair] = []
    for setting, arm in dict.fromkeys((row["labels"]["setting"], row["labels"]["arm"]) for row in rows):
        own = [row for row in rows if (row["labels"]["setting"], row["labels"]["arm"]) == (setting, arm)]
        lines += ["", f"## {setting}, {arm}", "", _size(own[0]), "", *_losses(own)]
        if any(row["labels"]["controller"] == "on" for row in own):
            repairs = _repairs(own)
            every += repairs
            lines += ["", f"Together: {together(repairs)}", "", *_alerts(own)]
    if every:
        lines += ["", "## All settings", "", f"Together: {together(every)}"]
    path = folder / "faults.md"
    write_whole(path, "\n".join([*lines, *reasons(rows)]) + "\n")
    return path


def _size(row: Row) -> str:
    config = row["configuration"]
    model, steps = config["model"], config["loop"]["steps"]
    sizes = f"{model['layers']} layers, width {model['dim']}, {model['num_experts']} experts, top-{model['top_k']}"
    return f"{sizes}; data {row['data'] or config['data']['_target_']}; {steps} steps."


def _losses(rows: Sequence[Row]) -> Iterator[str]:
    healthy = by_seed(_of(rows, HEALTHY, "off"), "valid/loss")
    names = ("fault", "loss off", "harm", "loss on", "on - off", "repaired")
    yield f"| {' | '.join(names)} | dead off | dead on | diverged off | diverged on |"
    yield f"|{'---|' * (len(names) + 4)}"
    for fault in _faults(rows):
        off, on = _of(rows, fault, "off"), _of(rows, fault, "on")
        losses, acted = by_seed(off, "valid/loss"), by_seed(on, "valid/loss")
        harm, change = (with_pairs(paired_difference(*pair)) for pair in ((losses, healthy), (acted, losses)))
        harm, repaired = ("-", "-") if fault == HEALTHY else (harm, str(_repair(rows, fault)))
        cells = [fault, _mean(losses), harm, _mean(acted), change, repaired]
        yield f"| {' | '.join([*cells, _dead(off), _dead(on), _diverged(off), _diverged(on)])} |"


def _repair(rows: Sequence[Row], fault: str) -> Repair:
    return repair(_of(rows, fault, "off"), _of(rows, fault, "on"), _of(rows, HEALTHY, "off"))


def _repairs(rows: Sequence[Row]) -> list[Repair]:
    """Return what became of the faults whose harm is damage."""
    return [_repair(rows, fault) for fault in _faults(rows) if fault not in (HEALTHY, DOMAIN_SHIFT)]


def _alerts(rows: Sequence[Row]) -> Iterator[str]:
    yield "| fault | first warning | first critical | failure modes | interventions | endings |"
    yield "|---|---|---|---|---|---|"
    for fault in _faults(rows):
        on = _of(rows, fault, "on")
        cells = [
            fault,
            _first(on, WARNING),
            _first(on, CRITICAL),
            _counted(mode for row in on for mode in failures(row)),
            _counted(str(event.get("name")) for row in on for event in decisions(row, "apply")),
            _counted(ENDINGS[kind] for row in on for kind in ENDINGS for _ in decisions(row, kind)),
        ]
        yield f"| {' | '.join(cells)} |"


def _first(rows: Sequence[Row], levels: Sequence[str]) -> str:
    delays = [delay for row in rows if (delay := first_alert(row, levels)) is not None]
    return f"{median(delays):g} ({len(delays)}/{len(rows)})" if delays else f"none (0/{len(rows)})"


def _counted(names: Iterable[str]) -> str:
    counts = Counter(names)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "none"


def _faults(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["labels"]["fault"] for row in rows))


def _of(rows: Sequence[Row], fault: str, controller: str) -> list[Row]:
    wanted = {"fault": fault, "controller": controller}
    return [row for row in rows if row["labels"] | wanted == row["labels"]]


def _mean(values: Mapping[int, float]) -> str:
    return with_half_width(mean_interval([*values.values()])) if values else "-"


def _dead(rows: Sequence[Row]) -> str:
    shares = by_seed(rows, "train/dead_share")
    return f"{mean_interval([*shares.values()]).mean:.1%}" if shares else "-"


def _diverged(rows: Sequence[Row]) -> str:
    return f"{sum(row['status'] == 'diverged' for row in rows)}/{len(rows)}" if rows else "-"
