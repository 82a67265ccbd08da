"""Stress studies of the routers: ``python -m trainers.stress region`` trains the grid and writes its report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainers.command import Parser, how_to_resume, one_line_mistakes
from trainers.studies.comparison import COMPARISONS, comparison
from trainers.studies.comparison_report import write_comparison
from trainers.studies.faults import Faults
from trainers.studies.faults_report import write_faults
from trainers.studies.healthy import Healthy
from trainers.studies.healthy_report import write_healthy
from trainers.studies.region import ARMS, BALANCES, MULTIPLIERS, Region
from trainers.studies.region_report import write_report
from trainers.studies.rows import Row, read_rows
from trainers.studies.runner import Study, run_study
from trainers.studies.runs import Run, StudyError

PROGRAM = "python -m trainers.stress"

#: What ``--smoke`` runs.
SMOKE: dict[str, Any] = {
    "seeds": 1,
    "tokens": 16 * 1024,
    "arms": ("linear_adamw", "polar_riemannian"),
    "multipliers": (1.0, 64.0),
}
SMOKE_PAIRS: dict[str, Any] = {"seeds": 1, "tokens": 16 * 1024}


def main(arguments: list[str] | None = None) -> None:
    """Run a study and write its report.

    Args:
        arguments: the command line; None for the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    run = {"region": region, "faults": faults, "healthy": healthy}.get(options.study, compare)
    with one_line_mistakes():
        run(options, shlex.join([*PROGRAM.split(), *arguments]))


def region(options: argparse.Namespace, command: str) -> None:
    """Run the stable-region study, or only write its report.

    Raises:
        StudyError: as from ``run_study``, or no rows to report.
    """
    out = _folder(options)
    rows = _rows(options, command, [] if options.report else Region(**_grid(options, SMOKE)).runs())
    for written in write_report(rows, out):
        print(written)


def faults(options: argparse.Namespace, command: str) -> None:
    """Run the fault study, or only write its report.

    Raises:
        StudyError: as from ``run_study``, or no rows to report.
    """
    runs = Faults(**_grid(options, SMOKE_PAIRS)).runs()
    print(write_faults(_rows(options, command, runs), _folder(options)))


def healthy(options: argparse.Namespace, command: str) -> None:
    """Run the study of healthy runs, or only write its report.

    Raises:
        StudyError: as from ``run_study``, or no rows to report.
    """
    runs = Healthy(**_grid(options, SMOKE_PAIRS)).runs()
    print(write_healthy(_rows(options, command, runs), _folder(options)))


def compare(options: argparse.Namespace, command: str) -> None:
    """Run a comparison, or only write its report.

    Raises:
        StudyError: as from ``run_study``, or no rows to report.
    """
    study = comparison(options.study, seeds=options.seeds, smoke=options.smoke)
    rows = _rows(options, command, study.runs())
    print(write_comparison(study, rows, _folder(options) / f"{options.study}.md"))


def _folder(options: argparse.Namespace) -> Path:
    name = options.study
    return options.out or Path(f"runs/{name}-smoke" if options.smoke else f"docs/results/{name}")


def _rows(options: argparse.Namespace, command: str, runs: Sequence[Run]) -> Sequence[Row]:
    """Make the rows that are missing; return all."""
    path, unnamed = _folder(options) / "rows.jsonl", options.smoke and options.out is None
    if options.report:
        rows: Sequence[Row] = read_rows(path)
    else:
        study = Study(
            name=options.study,
            runs=runs,
            path=path,
            command=command,
            resume=how_to_resume(fresh=options.fresh, out=path.parent if unnamed else None),
            processes=options.processes,
            fresh=options.fresh or unnamed,
            retry_failed=options.retry_failed,
        )
        rows = run_study(study)
    if not rows:
        raise StudyError(f"there are no rows in {path}; without --report they are made")
    return rows


def _grid(options: argparse.Namespace, smoke: dict[str, Any]) -> dict[str, Any]:
    """Return the options that say what is run: those that the study has and that were given."""
    names = ("seeds", "tokens", "arms", "multipliers", "balances", "data")
    given = {name: value for name in names if (value := getattr(options, name, None)) is not None}
    return (smoke | {"smoke": True} if options.smoke else {}) | given


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=PROGRAM, description="Stress studies of the routers.")
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    grid = studies.add_parser(
        "region",
        help="the stable region",
        description="Push the routers' learning rate until experts die.",
        allow_abbrev=False,
    )
    floats: dict[str, Any] = {"nargs": "+", "type": float}
    _common(grid, "region", 4)
    grid.add_argument("--tokens", type=int, help="of one training (400000)")
    grid.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    grid.add_argument("--multipliers", **floats, help=f"of the learning rate ({_listed(MULTIPLIERS)})")
    grid.add_argument("--balances", **floats, help=f"weights of the load-balance loss ({_listed(BALANCES)})")
    grid.add_argument("--data", help="a language data set of configs/data (stdlib)")
    broken = studies.add_parser(
        "faults",
        help="faults and the controller",
        description="Break trainings, with and without the controller.",
        allow_abbrev=False,
    )
    _common(broken, "faults", 3)
    broken.add_argument("--tokens", type=int, help="of one training (300000)")
    calm = studies.add_parser(
        "healthy",
        help="healthy runs and the controller",
        description="Train what needs no repair, with and without the controller.",
        allow_abbrev=False,
    )
    _common(calm, "healthy", 28)
    calm.add_argument("--tokens", type=int, help="of one training (370000)")
    for name, study in COMPARISONS.items():
        own = studies.add_parser(name, help=study.title.lower(), description=study.question, allow_abbrev=False)
        _common(own, name, study.seeds)
    return parser


def _common(study: argparse.ArgumentParser, name: str, seeds: int) -> None:
    study.add_argument("--out", type=Path, help=f"folder of rows and report (docs/results/{name})")
    study.add_argument("--seeds", type=int, help=f"number of seeds ({seeds})")
    study.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each (2)")
    study.add_argument("--smoke", action="store_true", help="a toy grid in seconds, to see that it runs")
    study.add_argument("--report", action="store_true", help="only write the report of the rows that are there")
    study.add_argument("--fresh", action="store_true", help="begin anew; the rows that were are kept beside")
    study.add_argument("--retry-failed", action="store_true", help="run failed runs again")


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    main()
