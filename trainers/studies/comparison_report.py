"""The report of a comparison: one table a setting, from its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trainers.studies.comparison import Comparison
from trainers.studies.files import write_whole
from trainers.studies.intervals import mean_interval, paired_difference, with_half_width, with_pairs
from trainers.studies.origin import origin_lines
from trainers.studies.rows import Row, by_seed, reasons


def write_comparison(study: Comparison, rows: Sequence[Row], path: Path) -> Path:
    """Write the report of a comparison and return its path.

    Args:
        study: names the arms and their order.
        rows: one or more.
        path: of the Markdown file.
    """
    lines = [f"# {study.title}", "", study.question, "", *origin_lines(rows), "", *_legend(study)]
    for setting in dict.fromkeys(row["labels"]["setting"] for row in rows):
        lines += ["", f"## {setting}", "", *_table(study, [row for row in rows if row["labels"]["setting"] == setting])]
    write_whole(path, "\n".join([*lines, *reasons(rows)]) + "\n")
    return path


def _legend(study: Comparison) -> Iterator[str]:
    yield (
        f"Validation loss in nats a token, and its difference to that of the same seed with {study.reference}, below 0 "
        "is better; means over seeds ± the half-width of Student's 95% interval, not corrected for the number of arms. "
        "Max violation is the busiest expert's load over the fair one, less 1, on the validation split (mean over "
        "layers); dead is the share of experts under a tenth of their fair share in the last 20 training steps."
    )


def _table(study: Comparison, rows: Sequence[Row]) -> Iterator[str]:
    found = {arm: [row for row in rows if row["labels"]["arm"] == arm] for arm in study.arms}
    reference = by_seed(found[study.reference], "valid/loss")
    yield "| arm | loss | difference (pairs) | max violation | dead |"
    yield "|---|---|---|---|---|"
    for arm, own in found.items():
        losses = by_seed(own, "valid/loss")
        lost = len(own) - len(losses)
        note = f", {lost} without a result" if lost else ""
        if not losses:
            yield f"| {arm} | -{note} | - | - | - |"
            continue
        difference = None if arm == study.reference else paired_difference(losses, reference)
        violation = mean_interval([value - 1 for value in _max_loads(own)])
        dead = by_seed(own, "train/dead_share")
        share = f"{mean_interval([*dead.values()]).mean:.1%}" if dead else "-"
        loss = with_half_width(mean_interval([*losses.values()]))
        yield f"| {arm} | {loss}{note} | {with_pairs(difference)} | {with_half_width(violation)} | {share} |"


def _max_loads(rows: Sequence[Row]) -> list[float]:
    """Return of each finished run the busiest expert's load over the fair one, the mean over its layers."""
    found = []
    for row in rows:
        results = row["results"] if row["status"] == "done" else {}
        layers = [name for name in results if name.startswith("valid/geometry/layer") and name.endswith("/max_load")]
        if layers:
            found.append(sum(float(results[name]) for name in layers) / len(layers))
    return found
