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


def example(readme: str) -> tuple[list[str], str]:
    """Return the first Python blocks up to a text block, and that: the example in parts and its output."""
    before, fence, after = readme.partition("```text\n")
    blocks = re.findall(r"```python\n(.*?)```", before, flags=re.DOTALL)
    if not fence or not blocks:
        raise ValueError("README has no ```python block followed by a ```text block")
    return blocks, after.partition("```")[0]


def run(code: str, **names: object) -> str:
    """Run code in a fresh namespace, in which these names are known; return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__", **names})
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
    blocks, expected = example(Path(sys.argv[1]).read_text())
    wrong = differences(expected, run("\n".join(blocks)))
    print("\n".join(wrong) or "README's example prints what README says")
    sys.exit(bool(wrong))
