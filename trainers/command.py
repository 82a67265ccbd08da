"""What the commands with plain arguments have in common: a mistake is one line, and Ctrl-C is no error."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        self.exit(2, f"error: {message}; --help shows the options\n")


def how_to_resume(*, fresh: bool, out: Path | None) -> str:
    """Return how a command goes on that was stopped, ``"the same command without --fresh continues"``.

    Args:
        fresh: whether --fresh was given.
        out: the folder, of a command that begins anew unless it is named; None: no such command.
    """
    changes = [*([] if out is None else [f"with --out {out}"]), *(["without --fresh"] if fresh else [])]
    return " ".join(["the same command", *([" and ".join(changes)] if changes else []), "continues"])


@contextmanager
def one_line_mistakes() -> Iterator[None]:
    """Turn what a user can cause inside into one line on stderr and status 2, and Ctrl-C into status 130.

    ``MOEGEO_TRACEBACK=1`` shows where a mistake comes from.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)  # what to do now has been said
    except (ValueError, OSError) as error:
        if os.environ.get("MOEGEO_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
