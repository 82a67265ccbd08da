"""The report of the benchmark, from its rows alone: where they come from, verdicts, tables; and what is missing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.studies.benchmark import ARMS
from trainers.studies.benchmark_figure import write_curves, write_differences
from trainers.studies.benchmark_results import DIGITS, MARGIN, NO_CHOICE, Results, mixed, results_of
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.benchmark_tables import write_tables
from trainers.studies.benchmark_tasks import rises
from trainers.studies.files import write_whole
from trainers.studies.intervals import Equivalence, with_half_width, with_pairs
from trainers.studies.origin import origin_lines
from trainers.studies.rows import reasons
from trainers.studies.runs import StudyError

#: Seeds that a verdict on ours wants.
LEAST_SEEDS = 10

_NO_ROWS = "no rows"


def write_benchmark(benchmark: Benchmark) -> list[Path]:
    """Write ``benchmark.md`` and its figures.

    Args:
        benchmark: whose rows.

    Returns:
        The paths written.

    Raises:
        StudyError: no task has rows that can be reported.
    """
    results, absent = _collected(benchmark)
    wrong = {task: why for task, why in absent.items() if why != _NO_ROWS}
    if not results:
        raise StudyError("; ".join(wrong.values()) or f"there are no rows in {benchmark.out}, and nothing to report")
    for task, why in wrong.items():
        benchmark.leave_out(task, why)
    for task, found in results.items():
        for arm, why in found.unchosen.items():
            benchmark.leave_out(task, why, arm)
    text, differences, curves = (benchmark.out / name for name in ("benchmark.md", "differences.png", "curves.png"))
    pictures = [
        *([differences] if write_differences(results, differences) else []),
        *([curves] if write_curves(results, curves) else []),
    ]
    lines = [*_head(results, pictures)]
    for task, found in results.items():
        lines += ["", f"## {found.task.title}", "", *_task(found, benchmark.broken.get(task))]
    lines += _notes(benchmark)
    if absent:
        lines += ["", "## Missing", "", *(f"- {task}: {why}" for task, why in absent.items())]
    write_whole(text, "\n".join(lines) + "\n")
    return [text, *pictures]


def _collected(benchmark: Benchmark) -> tuple[dict[str, Results], dict[str, str]]:
    """Return the results of each task, and why others have none."""
    found, absent = dict[str, Results](), dict[str, str]()
    for task in benchmark.tier.tasks:
        try:
            found[task] = _results(benchmark, task)
        except StudyError as error:
            absent[task] = str(error)
    return found, absent


def _results(benchmark: Benchmark, task: str) -> Results:
    tier, path, rows = benchmark.tier, benchmark.path(task), benchmark.rows(task)
    if not rows:
        raise StudyError(_NO_ROWS)
    if difference := mixed(rows):
        raise StudyError(f"{path} holds rows of different settings ({difference})")
    return results_of(tier, task, rows, benchmark.seeds)


_METHOD = (
    "Every arm was tuned in every task by as many runs: learning rates by two weights of its balance (two speeds of "
    "the loss-free bias and prior), or as many learning rates where there is nothing to balance; the least validation "
    "loss decided. A better weight may lie beyond the two. The learning rate is that of everything but natural "
    "gradients, which have its schedule and a speed limit of their own; that limit, the prior's speeds and the "
    "controller's thresholds were found in earlier studies of small models (region, limits, priors, faults), which no "
    "baseline had, but for the bias's speeds. AdamW's weight decay of 0.1 is on linear and cosine routers as on the "
    "rest, and not on polar ones. The loss-free bias is added to softmax scores. Where tuning gave the arm with the "
    "controller another setting than the one without, more runs without it, at the same setting, show what the "
    "controller does by itself.",
    "",
    "Ours are compared with the linear baseline (with Switch loss, with z-loss as well, or with loss-free bias) that "
    "tuned best, and with the one that came out best, if it is another. Difference: paired over seeds, with "
    "Student's 95% interval and the number of pairs; runs of one seed begin with the same weights, but for the routers "
    "and the whole of the dense model. The mean of an arm with fewer runs is of fewer seeds than the baseline's: seeds "
    "may differ by more than arms do, only differences compare. Equal is a difference within "
    f"{MARGIN:.1%} of the baseline's mean; p is that of two one-sided t-tests. Verdict: equivalent if p < 0.05, and "
    "equivalent (better or worse) if the interval does not hold 0 as well; else better or worse if it does not; else "
    "inconclusive, which is no equality. Intervals and tests are "
    "of single cells, not corrected for their number, and over seeds: the held-out data are the same for all. A "
    f"verdict on ours wants {LEAST_SEEDS} pairs.",
    "",
    "All arms run in one training loop that watches the routing, so that speeds compare with each other, not with a "
    "plain loop; the dense model is one expert of that loop, dispatch included. Where runs are side by side on one "
    "processor, or beside other work, step times are rough.",
)


def summary(results: Mapping[str, Results]) -> Iterator[str]:
    """Yield one table of all tasks: each arm's gain over the baseline and what it shows.

    Args:
        results: by task.
    """
    yield f"| | {' | '.join(found.task.data for found in results.values())} |"
    yield f"|---|{'---|' * len(results)}"
    for arm in ARMS:
        yield f"| {ARMS[arm].title} | {' | '.join(_gain(found, arm) for found in results.values())} |"
    yield ""
    yield (
        "Gain over the best-tuned linear baseline in % of its bits per byte, accuracy or nats, more is better; 95% "
        f"interval, pairs, verdict (equivalent: within {MARGIN:.1%})."
    )


def _gain(results: Results, arm: str) -> str:
    found = results.gain(arm)
    if found is None or found.n < 2:  # one pair is no result
        mean = results.mean(arm, results.task.primary)
        return f"{mean.mean:.4g}: the baseline" if mean and arm == results.reference else f"-{_lost(results, arm)}"
    verdict = _verdict(results, arm, results.compared(arm, results.task.primary))
    return f"{with_pairs(found, digits=2)}, {verdict}"


def _head(results: Mapping[str, Results], pictures: Sequence[Path]) -> Iterator[str]:
    yield from ("# Benchmark", "", "Is geometric routing better than what people use, as good, or worse?", "")
    yield from (*summary(results), "")
    for picture in pictures:
        yield from (f"![{picture.stem}]({picture.name})", "")
    rows = [row for found in results.values() for row in found.rows]
    judged = [row for row in rows if row["labels"]["phase"] != "tuning"]
    yield from origin_lines(judged or rows)
    if judged:
        yield f"- besides: {len(rows) - len(judged)} tuning runs"
    yield from ("", *_METHOD)


def _notes(benchmark: Benchmark) -> Iterator[str]:
    """What the rows do not say, where somebody has written it beside them."""
    path = benchmark.out / "notes.md"
    if path.exists():
        yield from ("", "## On the way", "", *path.read_text().splitlines())


def _task(results: Results, broken: str | None) -> Iterator[str]:
    if broken is not None:
        yield from (f"Not finished: {broken}", "")
    if size := _size(results):
        yield from (size, "")
    yield from _verdicts(results)
    yield from write_tables(results)
    yield from (line.replace("## ", "### ") for line in reasons(results.rows))


def _size(results: Results) -> str | None:
    """Return what was trained on what, of the mixtures that choose their experts."""
    rows = [row for row in results.judged if row["labels"]["arm"] not in NO_CHOICE]
    if not rows:
        return None
    config: Mapping[str, Any] = rows[0]["configuration"]
    model, data = config["model"], config["data"]
    length = f" of {data['length']} tokens" if "length" in data else " images"
    text = f"{model['layers']} layers of width {model['dim']}, {model['num_experts']} experts, top-{model['top_k']}"
    if "expert_hidden" in model:
        text += f", each {model['expert_hidden']} wide"
    text += (
        f"; {config['loop']['steps']:,} steps of {data['batch_size']}{' windows' if 'length' in data else ''}{length}"
    )
    return f"{text}; {_held_out(results, config)}."


def _held_out(results: Results, config: Mapping[str, Any]) -> str:
    """Return how much held-out data judges, and how much the routing is of, if that is not the same."""
    data, probe = config["data"], re.match(r"probe/(\w+)/", results.task.primary)
    of_run = data.get("valid_tokens", data.get("valid_images"))
    judging = config["probes"][probe[1]]["valid_tokens"] if probe else of_run
    routing = "" if judging == of_run else f"; loads and metrics of the routing are of {_count(of_run)}"
    return f"judged on {_count(judging)} held-out {'tokens' if 'length' in data else 'images'}{routing}"


def _count(limit: int | None) -> str:
    return "all" if limit is None else f"{limit:,}"


def _verdicts(results: Results) -> Iterator[str]:
    primary, reference, best = results.task.primary, results.reference, results.best_linear()
    if reference is None:
        yield from ("No linear baseline is tuned yet: there is nothing to compare with.", "")
    else:
        tuned = [arm for arm in ARMS if ARMS[arm].linear and arm in results.choices]
        alone = "" if len(tuned) == 3 else f", of {len(tuned)} that are tuned"
        yield from (f"The baseline is {ARMS[reference].title}{alone}.", "")
    yield f"| arm | runs | {results.task.metrics[primary]} | difference (pairs) | in % | p | verdict |"
    yield "|---|---|---|---|---|---|---|"
    for arm in ARMS:
        found = results.compared(arm, primary)
        mean = with_half_width(results.mean(arm, primary), digits=DIGITS)
        cells = (_runs(results, arm), mean, *_difference(found), _verdict(results, arm, found))
        yield f"| {ARMS[arm].title} | {' | '.join(cells)} |"
    if best is not None and best != reference and reference is not None:
        yield from ("", f"In these runs {ARMS[best].title} is the best linear baseline. Compared with it:", "")
        yield "| arm | difference (pairs) | in % | p | verdict |"
        yield "|---|---|---|---|---|"
        for arm in ARMS:
            if ARMS[arm].ours and (found := results.compared(arm, primary, best)) is not None:
                verdict = _verdict(results, arm, found, best)
                yield f"| {ARMS[arm].title} | {' | '.join((*_difference(found), verdict))} |"


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
    return with_pairs(found.difference, DIGITS), percent, p


def _verdict(results: Results, arm: str, found: Equivalence | None, to: str | None = None) -> str:
    if arm in results.unchosen:
        return f"missing: {results.unchosen[arm]}"
    if arm == results.reference:
        return "the baseline"
    if found is None:
        return f"missing{_lost(results, arm, to)}"
    few = " (too few pairs)" if ARMS[arm].ours and found.difference.n < LEAST_SEEDS else ""
    return f"{found.verdict(rises(results.task.primary))}{few}{_lost(results, arm, to)}"


def _lost(results: Results, arm: str, to: str | None = None) -> str:
    lost = results.lost(arm, to)
    return f" ({lost} without a result)" if lost else ""
