"""The report of the stable-region study: tables and one figure, from its rows alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from trainers.studies.files import write_whole
from trainers.studies.intervals import mean_interval, paired_difference, with_half_width, with_pairs
from trainers.studies.origin import origin_lines
from trainers.studies.region import REFERENCE
from trainers.studies.region_figure import write_figure
from trainers.studies.region_grid import Grid, grid_of
from trainers.studies.rows import Row, reasons


def write_report(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write ``region.md`` and ``region.png``.

    Args:
        rows: one or more.
        folder: an existing folder.

    Returns:
        The paths written.

    Raises:
        StudyError: as in ``grid_of``.
    """
    grid = grid_of(rows)
    text, picture = folder / "region.md", folder / "region.png"
    write_whole(text, "\n".join([*_head(rows, grid), *_tables(grid), *reasons(rows)]) + "\n")
    write_figure(grid, picture)
    return [text, picture]


def _head(rows: Sequence[Row], grid: Grid) -> Iterator[str]:
    config = rows[0]["configuration"]
    model, data, steps = config["model"], config["data"], config["loop"]["steps"]
    tokens = steps * data["batch_size"] * data["length"]
    yield from (
        "# Stable region",
        "",
        "How far the learning rate of the routers can be raised, with each way of stepping them, before experts die.",
        "",
        "![validation loss and dead experts by multiplier](region.png)",
        "",
        *origin_lines(rows),
        f"- size: {tokens:,} tokens a run ({steps} steps)",
        f"- model: {model['layers']} layers, width {model['dim']}, {model['num_experts']} experts, "
        f"top-{model['top_k']}; data {rows[0]['data'] or data['_target_']}",
        "",
        "A multiplier is that of the routers' learning rate; all else stays. A cell is the mean validation loss (nats "
        "a token) over seeds ± the half-width of Student's 95% interval, and in brackets the share of dead experts "
        "(under a tenth of the fair share of a step's load) over all layers and the last 20 training steps. Runs that "
        "diverged (NaN or inf) are counted and not in the mean; - is a cell without runs. "
        "The figure's loss axis is cut where arms fail.",
    )


def _tables(grid: Grid) -> Iterator[str]:
    for balance in grid.balances:
        yield from ("", f"## Balance weight {balance:g}", "")
        yield from _losses(grid, balance)
        yield from ("", *_differences(grid, balance))


def _losses(grid: Grid, balance: float) -> Iterator[str]:
    return _table(grid, lambda arm, multiplier: grid.cell(balance, arm, multiplier).text(grid.seeds))


def _differences(grid: Grid, balance: float) -> Iterator[str]:
    best = grid.best(balance, REFERENCE)
    if best is None:
        yield f"No run of {REFERENCE} to compare with."
        return
    reference = grid.cell(balance, REFERENCE, best).loss
    yield from (
        f"Validation loss less that of {REFERENCE} at its best multiplier here, ×{best:g} "
        f"({with_half_width(mean_interval([*reference.values()]))}), paired over seeds, with the 95% interval and "
        "the number of pairs; below 0 is better. The best multiplier was chosen on these same runs, which favours "
        f"{REFERENCE}; the intervals are of single cells, not corrected for their number.",
        "",
    )
    yield from _table(grid, lambda arm, multiplier: _difference(grid.cell(balance, arm, multiplier).loss, reference))


def _table(grid: Grid, text: Callable[[str, float], str]) -> Iterator[str]:
    yield f"| arm | {' | '.join(f'×{multiplier:g}' for multiplier in grid.multipliers)} |"
    yield f"|---|{'---|' * len(grid.multipliers)}"
    for arm in grid.arms:
        yield f"| {arm} | {' | '.join(text(arm, multiplier) for multiplier in grid.multipliers)} |"


def _difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> str:
    return "0" if ours == theirs else with_pairs(paired_difference(ours, theirs))
