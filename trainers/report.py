"""What a person sees at the end of a run: one table."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from trainers.data.base import Baseline
from trainers.evaluation import Evaluation

#: Columns of the table: header, key of a layer's scalars.
COLUMNS = (
    ("FSI", "fsi"),
    ("dispersion", "dispersion"),
    ("information", "routing_information"),
    ("fsi_domain", "fsi_domain"),
    ("its null", "fsi_domain_null"),
    ("max load", "max_load"),
    ("dead", "dead_experts"),
)


def print_report(
    evaluation: Evaluation,
    baseline: Baseline | None,
    *,
    tokens_per_second: float | None,
    how_to_open: list[str],
    heterogeneity: Mapping[str, float] | None = None,
    probes: Sequence[str] = (),
) -> None:
    """Print the final table and where the logs are.

    Args:
        evaluation: of the held-out split.
        baseline: the trivial model's loss there.
        tokens_per_second: median training throughput; None if nothing was trained.
        how_to_open: lines that say where the logs are and how to open them.
        heterogeneity: FHS of each layer in the last training steps (a validation has no gradients).
        probes: a line for each, see ``trainers.probes``.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title="routing on the held-out split", box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column("layer", no_wrap=True)
    for header, _ in COLUMNS:
        table.add_column(header, justify="right", no_wrap=True)
    if heterogeneity:
        table.add_column("FHS", justify="right", no_wrap=True)
    for layer, scalars in evaluation.layers.items():
        last = [f"{heterogeneity.get(layer, math.nan):.2f}"] if heterogeneity else []
        table.add_row(layer, *(_cell(key, scalars[key]) for _, key in COLUMNS), *last)
    console.print(table)
    for line in [*_lines(evaluation, baseline, tokens_per_second), *probes]:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(
        "FSI, dispersion and information are shares of their maximum; fsi_domain is in radians, its null the\n"
        "95% quantile of 200 shuffles of the domain labels by document; max load 1 is balanced; dead: experts\n"
        "under a tenth of 1/E" + ("; FHS: mean of the last training steps" if heterogeneity else ""),
        style="dim",
        soft_wrap=True,
        highlight=False,
    )
    for line in how_to_open:
        console.print(f"log: {line}", highlight=False, soft_wrap=True)


def _lines(evaluation: Evaluation, baseline: Baseline | None, tokens_per_second: float | None) -> list[str]:
    bits = "" if evaluation.bits_per_byte is None else f", {evaluation.bits_per_byte:.3f} bits per byte"
    beaten = ""
    if baseline is not None:
        verdict = "below" if evaluation.loss < baseline.loss else "NOT below"
        beaten = f"; {verdict} the {baseline.loss:.4f} of a {baseline.name} model"
    lines = [
        f"validation loss {evaluation.loss:.4f} nats{bits}, accuracy {evaluation.accuracy:.1%}{beaten}",
        "by domain: " + ", ".join(f"{name} {loss:.3f}" for name, loss in evaluation.domain_loss.items()),
    ]
    if recovered := evaluation.scalars().get("valid/recovery"):
        ami = evaluation.scalars()["valid/recovery_ami"]
        lines.append(
            f"{recovered:.1%} of the tokens at an expert of their source, adjusted mutual information {ami:.3f}"
        )
    if tokens_per_second is not None:
        lines.append(f"training throughput {tokens_per_second:,.0f} tokens/s (median)")
    return lines


def _cell(key: str, value: float) -> str:
    # + 0.0: rounding leaves a minus sign on a zero.
    return f"{value:.0f}" if key == "dead_experts" else f"{round(value, 3) + 0.0:.3f}"
