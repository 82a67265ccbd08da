"""Reading the compressed text files of the real data sets."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path


def xz_lines(path: Path) -> Iterator[str]:
    """The lines of an xz-compressed utf-8 file, decompressed only as far as they are taken.

    Args:
        path: the file.

    Yields:
        Lines with their ends.

    Raises:
        ValueError: if the file is damaged or not utf-8.
    """
    try:
        with lzma.open(path, "rt", encoding="utf-8", newline="\n") as file:
            yield from file
    except (lzma.LZMAError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name}: expected an xz file of utf-8 text, got a damaged one ({error})") from error
