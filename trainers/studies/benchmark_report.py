"""The report of the benchmark, from its rows alone: verdicts, metrics, routing, speed, tuning; and what is missing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trainers.studies.benchmark import ARMS
from trainers.studies.benchmark_figure import write_curves, write_differences
from trainers.studies.benchmark_results import MARGIN, TARGET, Results, results_of
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.benchmark_tuning import Choice
from trainers.studies.intervals import Equivalence, Interval
from trainers.studies.origin import origin_lines
from trainers.studies.rows import Row, reasons
from trainers.studies.runs import StudyError

#: Seeds that a verdict on ours wants.
LEAST_SEEDS = 10

_ROUTING = {
    "max_violation": "max violation",
    "valid/geometry/dead_experts": "dead experts",
    "valid/geometry/dispersion": "dispersion",
    "valid/geometry/fsi": "FSI",
}


def write_benchmark(benchmark: Benchmark) -> list[Path]:
    """Write ``benchmark.md`` and its figures.

    Args:
        benchmark: whose rows.

    Returns:
        The paths written.

    Raises:
        StudyError: there are no rows, or rows of another tier.
    """
    tier, rows = benchmark.tier, dict[str, list[Row]]()
    for task in benchmark.tier.tasks:
        if found := [] if task in benchmark.broken else benchmark.rows(task):
            if other := next((row["study"] for row in found if row["study"] != tier.study), None):
                raise StudyError(f"{benchmark.path(task)} holds rows of {other}, not of {tier.study}")
            rows[task] = found
    if not rows:
        raise StudyError(f"there are no rows in {benchmark.out}; without --report they are made")
    results = {task: results_of(tier, task, found, benchmark.seeds) for task, found in rows.items()}
    text, differences, curves = (benchmark.out / name for name in ("benchmark.md", "differences.png", "curves.png"))
    pictures = [
        *([differences] if write_differences(results, differences) else []),
        *([curves] if write_curves(results, curves) else []),
    ]
    lines = [*_head([row for found in rows.values() for row in found], pictures)]
    for one in results.values():
        lines += ["", f"## {one.task.title}", "", *_task(one)]
    lines += _absent(benchmark, rows)
    text.write_text("\n".join(lines) + "\n")
    return [text, *pictures]


def _head(rows: Sequence[Row], pictures: Sequence[Path]) -> Iterator[str]:
    yield from ("# Benchmark", "", "Is geometric routing better than what people use, as good, or worse?", "")
    for picture in pictures:
        yield from (f"![{picture.stem}]({picture.name})", "")
    yield from (
        *origin_lines(rows),
        "",
        "Every arm was tuned in every task with the same number of short runs, on a seed of its own: three learning "
        "rates (of everything) by two weights of its balance (two speeds of the loss-free bias), or six learning rates "
        "where there is nothing to balance; the least validation loss decided. Ours are compared with the linear "
        "baseline (with Switch loss, with z-loss as well, or with loss-free bias) that tuned best. All arms run in one "
        "training loop that watches the routing, so that speeds compare with each other, not with a plain loop.",
        "",
        "Difference: to that baseline, paired over seeds, with Student's 95% interval and the number of pairs. Equal "
        f"is a difference within {MARGIN:.1%} of the baseline's mean; p is that of two one-sided t-tests. Verdict: "
        "equivalent if p < 0.05; else better or worse if the interval does not hold 0; else inconclusive, which is no "
        "equality. Intervals and tests are of single cells, not corrected for their number. "
        f"A verdict on ours wants {LEAST_SEEDS} pairs.",
    )


def _task(results: Results) -> Iterator[str]:
    yield from _verdicts(results)
    metrics = {key: title for key, title in results.task.metrics.items() if key != results.task.primary}
    if any(results.values(arm, key) for key in metrics for arm in ARMS):
        yield from ("", "Further results; in brackets the difference to the baseline:", "", *_further(results, metrics))
    if domains := _domains(results):
        yield from ("", "Loss by domain, nats a token, means over seeds:", "", *_by_domain(results, domains))
    yield from ("", "Routing on the held-out split (dead experts: in all layers), and speed:", "", *_routing(results))
    yield from ("", "Tuning, validation loss:", "", *_tuning(results))
    lost = [line.replace("## ", "### ") for line in reasons(results.rows)]
    yield from lost


def _verdicts(results: Results) -> Iterator[str]:
    primary = results.task.primary
    if results.reference is None:
        yield from ("No linear baseline is tuned yet: there is nothing to compare with.", "")
    else:
        yield from (f"The baseline is {ARMS[results.reference].title}.{_best_in_hindsight(results)}", "")
    yield f"| arm | runs | {results.task.metrics[primary]} | difference (pairs) | in % | p | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for arm in ARMS:
        found = results.compared(arm, primary)
        mean = _interval(results.mean(arm, primary))
        cells = (_runs(results, arm), mean, *_difference(found), _verdict(results, arm, found))
        yield f"| {ARMS[arm].title} | {' | '.join(cells)} |"


def _best_in_hindsight(results: Results) -> str:
    means = {
        arm: found.mean
        for arm in ARMS
        if ARMS[arm].linear and (found := results.mean(arm, results.task.primary)) is not None
    }
    if len(means) < 2:
        return ""
    best = (max if results.task.rising else min)(means, key=means.__getitem__)
    return "" if best == results.reference else f" (In the runs below {ARMS[best].title} has the better mean.)"


def _runs(results: Results, arm: str) -> str:
    done, wanted = len(results.values(arm, results.task.primary)), results.expected[arm]
    if done >= wanted:
        return str(done)
    lost = sum(row["status"] != "done" for row in results.main(arm))
    missing = max(0, wanted - done - lost)
    parts = [*([f"{lost} without a result"] if lost else []), *([f"{missing} missing"] if missing else [])]
    return f"{done} of {wanted} ({', '.join(parts)})"


def _difference(found: Equivalence | None) -> tuple[str, str, str]:
    if found is None:
        return "-", "-", "-"
    base = found.margin / MARGIN
    percent = f"{100 * found.difference.mean / base:+.2f}" if base else "-"
    p = "-" if math.isnan(found.p) else f"{found.p:.3f}" if found.p >= 0.001 else "<0.001"
    return f"{_interval(found.difference, '+')} ({found.difference.n})", percent, p


def _verdict(results: Results, arm: str, found: Equivalence | None) -> str:
    if arm == results.reference:
        return "the baseline"
    if found is None:
        return "missing"
    few = ARMS[arm].ours and found.difference.n < LEAST_SEEDS
    return found.verdict(results.task.rising) + (" (too few pairs)" if few else "")


def _further(results: Results, metrics: Mapping[str, str]) -> Iterator[str]:
    yield f"| arm | {' | '.join(metrics.values())} |"
    yield f"|---|{'---|' * len(metrics)}"
    for arm in ARMS:
        cells = []
        for key in metrics:
            found = results.compared(arm, key)
            note = "" if found is None else f" ({_interval(found.difference, '+')})"
            cells.append(f"{_interval(results.mean(arm, key))}{note}")
        yield f"| {ARMS[arm].title} | {' | '.join(cells)} |"


def _domains(results: Results) -> list[str]:
    names = [name for row in results.rows for name in row["results"] if name.startswith("valid/domain/")]
    found = list(dict.fromkeys(names))
    return found if len(found) > 1 and not results.task.rising else []


def _by_domain(results: Results, domains: Sequence[str]) -> Iterator[str]:
    yield f"| domain | {' | '.join(arm for arm in ARMS)} |"
    yield f"|---|{'---|' * len(ARMS)}"
    for domain in domains:
        means = [results.mean(arm, domain) for arm in ARMS]
        cells = ["-" if mean is None else f"{mean.mean:.3f}" for mean in means]
        yield f"| {domain.split('/')[2]} | {' | '.join(cells)} |"


def _routing(results: Results) -> Iterator[str]:
    columns = {**_ROUTING, **results.task.observed}
    yield f"| arm | {' | '.join(columns.values())} | tokens/s | step time | tokens to target |"
    yield f"|---|{'---|' * (len(columns) + 3)}"
    for arm in ARMS:
        cells = [_interval(results.mean(arm, key)) for key in columns]
        speed = results.mean(arm, "train/tokens_per_second")
        cells += ["-" if speed is None else f"{speed.mean:,.0f}", _times(results.step_ratio(arm))]
        ratio, lost = results.tokens_ratio(arm)
        cells.append(_times(ratio) + (f", {lost} never" if lost else ""))
        yield f"| {ARMS[arm].title} | {' | '.join(cells)} |"
    yield ""
    yield (
        "Step time and tokens to target are multiples of the baseline's, means over pairs ± the half-width of the 95% "
        f"interval; the target is the baseline's training loss after {TARGET:.0%} of its tokens, in each pair."
    )


def _tuning(results: Results) -> Iterator[str]:
    yield "| arm | chosen | loss | tried |"
    yield "|---|---|---|---|"
    for arm in ARMS:
        found = results.choices.get(arm)
        yield f"| {ARMS[arm].title} | {_chosen(found)} |"


def _chosen(found: Choice | None) -> str:
    if found is None:
        return "missing | - | -"
    tried = (f"{_setting(one)}: {'no result' if loss is None else f'{loss:.3f}'}" for one, loss in found.tried)
    return f"{_setting(found.setting)} | {found.loss:.3f} | {'; '.join(tried)}"


def _setting(setting: Mapping[str, float]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[1]} {value:g}" for key, value in setting.items())


def _absent(benchmark: Benchmark, rows: Mapping[str, object]) -> Iterator[str]:
    if absent := [task for task in benchmark.tier.tasks if task not in rows]:
        yield from ("", "## Missing", "", f"Tasks without rows: {', '.join(absent)}.")


def _interval(found: Interval | None, sign: str = "") -> str:
    if found is None:
        return "-"
    mean = f"{found.mean:{sign}.4f}"
    return mean if math.isnan(found.half_width) else f"{mean} ± {found.half_width:.4f}"


def _times(found: Interval | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.2f}" if math.isnan(found.half_width) else f"{found.mean:.2f} ± {found.half_width:.2f}"
