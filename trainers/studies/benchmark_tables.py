"""The tables of a task below its verdicts: further results, domains, routing and speed, the controller, tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from trainers.studies.benchmark import ARMS
from trainers.studies.benchmark_results import DIGITS, TARGET, WINDOW, Results
from trainers.studies.benchmark_tasks import rises
from trainers.studies.benchmark_tuning import Choice
from trainers.studies.events import decisions, orders
from trainers.studies.intervals import with_ends, with_half_width, with_pairs
from trainers.studies.rows import Row, by_seed
from trainers.studies.runs import CURVE_POINTS
from trainers.studies.setpoints import largest_of_all

_ROUTING = {
    "max_violation": "max violation",
    "valid/geometry/dead_experts": "dead experts",
    "valid/geometry/dispersion": "dispersion",
    "valid/geometry/fsi": "FSI",
}
#: A domain with fewer targets says little.
_FEW_TARGETS = 2000


def write_tables(results: Results) -> Iterator[str]:
    """Yield the lines of a task's tables.

    Args:
        results: of the task.
    """
    metrics = {key: title for key, title in results.task.metrics.items() if key != results.task.primary}
    if any(results.values(arm, key) for key in metrics for arm in ARMS):
        yield from ("", "Further results; in brackets the difference to the baseline and what it shows:", "")
        yield from _further(results, metrics)
    if domains := _domains(results):
        yield from ("", "Loss by domain, nats a token, means over seeds; a star: fewer than 2,000 held-out tokens.", "")
        yield from _by_domain(results, domains)
    yield from ("", "Routing on the held-out data, and speed:", "", *_routing(results))
    yield from _controller(results)
    yield from ("", f"{_tuned_how(results)} The chosen one is bold:", "", *_tuning(results))


def _further(results: Results, metrics: Mapping[str, str]) -> Iterator[str]:
    yield f"| arm | {' | '.join(metrics.values())} |"
    yield f"|---|{'---|' * len(metrics)}"
    for arm in ARMS:
        cells = []
        for key in metrics:
            found = results.compared(arm, key)
            note = ""
            if found is not None:
                note = f" ({with_half_width(found.difference, '+', DIGITS)}, {found.verdict(rises(key))})"
            cells.append(f"{with_half_width(results.mean(arm, key), digits=DIGITS)}{note}")
        yield f"| {ARMS[arm].title} | {' | '.join(cells)} |"


def _domains(results: Results) -> dict[str, int | None]:
    """Return the domains whose loss is of interest, and how many targets each has, where rows tell."""
    if not results.task.domains:
        return {}
    found = {
        name: value
        for row in results.judged
        for name, value in row["results"].items()
        if name.startswith("valid/domain/")
    }
    return {name: found.get(name.removesuffix("loss") + "targets") for name in found if name.endswith("/loss")}


def _by_domain(results: Results, domains: Mapping[str, int | None]) -> Iterator[str]:
    shown = [arm for arm in ARMS if results.main(arm)]
    yield f"| domain | tokens | {' | '.join(ARMS[arm].title for arm in shown)} |"
    yield f"|---|---|{'---|' * len(shown)}"
    for domain, targets in domains.items():
        means = [results.mean(arm, domain) for arm in shown]
        cells = ["-" if mean is None else f"{mean.mean:.3f}" for mean in means]
        count = "-" if targets is None else f"{targets:,}{'*' if targets < _FEW_TARGETS else ''}"
        yield f"| {domain.split('/')[2]} | {count} | {' | '.join(cells)} |"


def _routing(results: Results) -> Iterator[str]:
    columns = {**_ROUTING, **results.task.observed}
    yield f"| arm | {' | '.join(columns.values())} | tokens/s | step time | tokens to target |"
    yield f"|---|{'---|' * (len(columns) + 3)}"
    for arm in ARMS:
        digits = {key: 1 if key.endswith("/dead_experts") else DIGITS for key in columns}
        cells = [with_half_width(results.mean(arm, key), digits=digits[key]) for key in columns]
        speed = results.mean(arm, "train/tokens_per_second")
        cells += ["-" if speed is None else f"{speed.mean:,.0f}", with_ends(results.step_ratio(arm))]
        ratio, lost = results.tokens_ratio(arm)
        cells.append(f"not reached in {lost} of {lost + (ratio.n if ratio else 0)}" if lost else with_ends(ratio))
        yield f"| {ARMS[arm].title} | {' | '.join(cells)} |"
    yield ""
    yield (
        "Max violation: load of the busiest expert over the fair one, less 1, mean over layers. Dead experts: those "
        "with less than a tenth of their share, in all layers. Step time and tokens to target are multiples of the "
        "baseline's, geometric means over pairs with 95% intervals, step time over those that began within an hour of "
        f"each other; the target is the baseline's training loss after {TARGET:.0%} of its tokens, in each pair, on "
        f"curves of {CURVE_POINTS} points averaged over {WINDOW}."
    )


def _controller(results: Results) -> Iterator[str]:
    """What a controller did, and what that changed."""
    for arm in ARMS:
        rows = [row for row in results.main(arm) if _acts(row)]
        if not rows:
            continue
        found = [orders(row) for row in rows]
        acted = sum(bool(one) for one in found)
        kinds = sorted({str(order.get("name")) for one in found for order in one})
        text = f"{ARMS[arm].title}: the controller gave orders in {acted} of {len(rows)} runs"
        done = sum(len(decisions(row, "apply")) for row in rows)
        text += f" ({sum(map(len, found))} orders, {done} of them carried out: {', '.join(kinds)})" if acted else ""
        text += f"; its set-points were at work in {_steered(rows)}"
        if (effect := results.effect(arm, results.task.primary)) is not None:
            verdict = effect.verdict(rises(results.task.primary))
            text += f"; against the same runs without it {with_pairs(effect.difference, DIGITS)}, {verdict}, "
            text += f"{_same(results, arm)} of them the very same numbers"
        yield from ("", f"{text}.")


def _acts(row: Mapping[str, object]) -> bool:
    configuration = row["configuration"]
    assert isinstance(configuration, Mapping)
    return (configuration.get("geometry") or {}).get("controller") == "act"


def _steered(rows: Sequence[Row]) -> str:
    """In how many runs set-points gave a weight, and the largest of each."""
    count = sum(any(largest_of_all([row]).values()) for row in rows)
    given = [f"{name} {weight:.2g}" for name, weight in sorted(largest_of_all(rows).items()) if weight]
    return f"{count} of {len(rows)}" + (f" (largest weights: {', '.join(given)})" if given else "")


def _same(results: Results, arm: str) -> int:
    theirs = by_seed(results.without(arm), "valid/loss")
    return sum(theirs.get(seed) == loss for seed, loss in results.values(arm, "valid/loss").items())


def _tuned_how(results: Results) -> str:
    task, candidates = results.task, max((len(found.tried) for found in results.choices.values()), default=0)
    return (
        f"Tuning: {candidates} runs an arm, {task.share:g} of the length, on a seed of their own; validation loss is "
        f"of {task.tuned_on}."
    )


def _tuning(results: Results) -> Iterator[str]:
    """A table for each kind of grid: learning rate by balance, and learning rate alone."""
    grids: dict[tuple[str, ...], list[str]] = {}
    for arm, found in results.choices.items():
        grids.setdefault(tuple(_place(setting) for setting, _ in found.tried), []).append(arm)
    for number, (places, arms) in enumerate(grids.items()):
        yield from [""] * bool(number)
        yield f"| arm | {' | '.join(places)} | |"
        yield f"|---|{'---|' * len(places)}---|"
        for arm in arms:
            found = results.choices[arm]
            cells = [_tried(found, setting, loss) for setting, loss in found.tried]
            yield f"| {ARMS[arm].title} | {' | '.join(cells)} | {_at_the_edge(found)} |"
    if absent := [ARMS[arm].title for arm in ARMS if arm not in results.choices]:
        yield from ("", f"Not tuned: {'; '.join(absent)}.")


def _place(setting: Mapping[str, float]) -> str:
    return ", ".join(f"{key.rsplit('.', 1)[1]} {value:g}" for key, value in setting.items())


def _tried(found: Choice, setting: Mapping[str, float], loss: float | None) -> str:
    if loss is None:
        return "no result"
    return f"**{loss:.3f}**" if setting == found.setting else f"{loss:.3f}"


def _at_the_edge(found: Choice) -> str:
    rates: Sequence[float] = sorted({setting["optimizer.lr"] for setting, _ in found.tried})
    edge = found.setting["optimizer.lr"] in (rates[0], rates[-1])
    return "at the edge of the rates" if edge else ""
