"""The benchmark: ``python -m trainers.benchmark cpu`` trains ours and the baselines and writes what came of it."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from trainers.command import Parser, how_to_resume, one_line_mistakes
from trainers.studies.benchmark import ARMS
from trainers.studies.benchmark_report import write_benchmark
from trainers.studies.benchmark_stages import Benchmark
from trainers.studies.benchmark_tasks import TIERS, TOY, Tier
from trainers.studies.runs import StudyError

PROGRAM = "python -m trainers.benchmark"


def main(arguments: list[str] | None = None) -> None:
    """Run a tier of the benchmark and write its report.

    Args:
        arguments: the command line; None for the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    with one_line_mistakes():
        benchmark = _benchmark(options, shlex.join([*PROGRAM.split(), *arguments]))
        if options.commands:
            print("\n".join(commands(benchmark)))
            return
        if not options.report:
            benchmark.run()
        for written in write_benchmark(benchmark):
            print(written)
    if benchmark.broken or benchmark.missing:
        sys.exit(2)  # why has been said


def commands(benchmark: Benchmark) -> Iterator[str]:
    """Yield the command line of ``trainers.train`` of each run that is judged, with what tuning has chosen.

    Raises:
        StudyError: nothing is tuned yet.
    """
    found = [run for task in benchmark.tasks for run in benchmark.main_runs(task)]
    if not found:
        raise StudyError(f"nothing in {benchmark.out} is tuned yet")
    for run in found:
        name = run.key.replace("/", "-")
        common = ("device=cpu", "threads=1", "logger=jsonl", f"name={name}")
        yield shlex.join(["python", "-m", "trainers.train", *common, *run.overrides])


def _benchmark(options: argparse.Namespace, command: str) -> Benchmark:
    tier = _tier(options)
    minutes = tier.minutes if options.slice is None else options.slice
    out = options.out or Path("runs" if _is_toy(tier) else "docs/results") / f"benchmark-{tier.name}"
    anew = _is_toy(tier) and options.out is None and not (options.report or options.commands)
    arms = options.arms or tuple(ARMS)
    return Benchmark(
        tier=tier,
        out=out,
        command=command,
        resume=how_to_resume(fresh=options.fresh, out=out if anew else None),
        tasks=options.tasks or (),
        arms=arms,
        seeds=options.seeds,
        processes=options.processes,
        fresh=tuple(ARMS) if anew else arms if options.fresh else (),
        retry_failed=options.retry_failed,
        until=None if minutes is None else time.monotonic() + 60 * minutes,
    )


def _tier(options: argparse.Namespace) -> Tier:
    if options.toy and options.tier != "gpu":
        raise StudyError("--toy is the gpu tier at toy size: take smoke, or gpu --toy")
    return TOY if options.toy else TIERS[options.tier]


def _is_toy(tier: Tier) -> bool:
    return tier.name in ("smoke", TOY.name)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM, description="Ours against what people use, each tuned on the same budget.", allow_abbrev=False
    )
    parser.add_argument("tier", choices=[*TIERS], metavar="TIER", help=f"{', '.join(TIERS)}")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="of the tier (all); of cpu: " + _tasks("cpu"))
    parser.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    parser.add_argument("--seeds", type=int, help="of ours and the linear baselines (10; smoke 1); others 5 at most")
    parser.add_argument(
        "--slice", type=float, metavar="MINUTES", help="begin no run after so many minutes (gpu: 20; else no limit)"
    )
    parser.add_argument("--processes", type=int, help="runs side by side, one thread each (2; gpu 1)")
    parser.add_argument("--out", type=Path, help="folder of rows and report (docs/results/benchmark-TIER)")
    parser.add_argument("--report", action="store_true", help="only write the report of the rows that are there")
    parser.add_argument("--commands", action="store_true", help="print how each run is trained alone; train nothing")
    parser.add_argument("--fresh", action="store_true", help="begin the arms anew; the rows that were are kept beside")
    parser.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    parser.add_argument("--toy", action="store_true", help="gpu: at toy size on the CPU, to see that it runs")
    return parser


def _tasks(tier: str) -> str:
    return ", ".join(TIERS[tier].tasks)


if __name__ == "__main__":
    main()
