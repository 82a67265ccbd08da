"""Runs README's example as a reader would and compares what it prints with what README says it prints.

``python tests/readme_example.py README.md``: needs nothing but the installed package.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from pathlib import Path

NUMBER = re.compile(r"-?\d+\.\d+")


def example(readme: str) -> tuple[str, str]:
    """Return the first Python block and the text block after it: the example and its output."""
    found = re.search(r"```python\n(.*?)```.*?```text\n(.*?)```", readme, flags=re.DOTALL)
    if found is None:
        raise ValueError("README has no ```python block followed by a ```text block")
    return found[1], found[2]


def run(code: str) -> str:
    """Run the example in a fresh namespace; return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def differences(expected: str, printed: str, tolerance: float = 0.02) -> list[str]:
    """Return how the output differs: text exactly, decimal numbers by more than the tolerance."""
    found = []
    if NUMBER.sub("#", expected.strip()) != NUMBER.sub("#", printed.strip()):
        found.append(f"README shows:\n{expected}\nbut the example prints:\n{printed}")
    for said, seen in zip(NUMBER.findall(expected), NUMBER.findall(printed), strict=False):
        if abs(float(said) - float(seen)) > tolerance:
            found.append(f"README shows {said}, the example prints {seen}")
    return found


if __name__ == "__main__":
    code, expected = example(Path(sys.argv[1]).read_text())
    wrong = differences(expected, run(code))
    print("\n".join(wrong) or "README's example prints what README says")
    sys.exit(bool(wrong))
