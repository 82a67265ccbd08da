"""Stress studies of the routers: ``python -m trainers.stress region`` trains the grid and writes its report."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import Any, NoReturn

from trainers.studies.region import ARMS, BALANCES, MULTIPLIERS, Region
from trainers.studies.region_report import write_report
from trainers.studies.rows import read_rows
from trainers.studies.runner import Study, run_study
from trainers.studies.runs import StudyError

PROGRAM = "python -m trainers.stress"

#: What ``--smoke`` runs.
SMOKE: dict[str, Any] = {
    "seeds": 1,
    "tokens": 16 * 1024,
    "arms": ("linear_adamw", "polar_riemannian"),
    "multipliers": (1.0, 64.0),
}


class _Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"error: {message}; --help shows the options\n")


def main(arguments: list[str] | None = None) -> None:
    """Run a study and write its report.

    Args:
        arguments: the command line; None for the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    try:
        region(options, shlex.join([*PROGRAM.split(), *arguments]))
    except KeyboardInterrupt:
        sys.exit(130)  # what to do now has been said
    except (ValueError, OSError) as error:
        if os.environ.get("MOEGEO_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def region(options: argparse.Namespace, command: str) -> None:
    """Run the stable-region study, or only write its report.

    Raises:
        StudyError: as from ``run_study``, or no rows to report.
    """
    out = options.out or Path("runs/region-smoke" if options.smoke else "docs/results/region")
    path = out / "rows.jsonl"
    if options.report:
        rows = read_rows(path)
    else:
        grid = Region(**_grid(options))
        study = Study(
            name="region",
            runs=grid.runs(),
            path=path,
            command=command,
            processes=options.processes,
            fresh=options.fresh or (options.smoke and options.out is None),
            retry_failed=options.retry_failed,
        )
        rows = run_study(study)
    if not rows:
        raise StudyError(f"there are no rows in {path}; without --report they are made")
    for written in write_report(rows, out):
        print(written)


def _grid(options: argparse.Namespace) -> dict[str, Any]:
    names = ("seeds", "tokens", "arms", "multipliers", "balances", "data")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return (SMOKE | {"smoke": True} if options.smoke else {}) | given


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=PROGRAM, description="Stress studies of the routers.")
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    grid = studies.add_parser(
        "region",
        help="the stable region",
        description="Push the routers' learning rate until experts die.",
        allow_abbrev=False,
    )
    floats: dict[str, Any] = {"nargs": "+", "type": float}
    grid.add_argument("--out", type=Path, help="folder of rows and report (docs/results/region)")
    grid.add_argument("--seeds", type=int, help="number of seeds (4)")
    grid.add_argument("--tokens", type=int, help="of one training (400000)")
    grid.add_argument("--arms", nargs="+", metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    grid.add_argument("--multipliers", **floats, help=f"of the learning rate ({_listed(MULTIPLIERS)})")
    grid.add_argument("--balances", **floats, help=f"weights of the load-balance loss ({_listed(BALANCES)})")
    grid.add_argument("--data", help="a language data set of configs/data (stdlib)")
    grid.add_argument("--processes", type=int, default=2, help="runs side by side, one thread each (2)")
    grid.add_argument("--smoke", action="store_true", help="a toy grid in seconds, to see that it runs")
    grid.add_argument("--report", action="store_true", help="only write table and figure of the rows that are there")
    grid.add_argument("--fresh", action="store_true", help="begin anew; the former rows become rows.old.jsonl")
    grid.add_argument("--retry-failed", action="store_true", help="run failed runs again")
    return parser


def _listed(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    main()
