"""README's table of the benchmark, copied from its report: ``python -m tests.support.benchmark_table``."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
README, REPORT = ROOT / "README.md", ROOT / "docs/results/benchmark-cpu/benchmark.md"
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"


def table() -> str:
    """Return the report's table of all tasks, and what it says below it."""
    head = REPORT.read_text("utf-8").partition("\n![")[0]
    return head[head.index("\n| ") :].strip()


def written() -> str:
    """Return the table that README has."""
    return README.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Write README's table anew."""
    before, _, rest = README.read_text("utf-8").partition(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", "utf-8")


if __name__ == "__main__":
    main()
