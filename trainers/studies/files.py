"""Reports and pictures on the disk: whole, or those of before."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from pathlib import Path

from trainers.studies.runs import StudyError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file in the place of a former one, which stays if anything goes wrong.

    Args:
        path: of the file.
        content: of the file; text is written as UTF-8.

    Raises:
        StudyError: it cannot be written: a full disk, a folder that is not there.
    """
    unfinished = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")  # another process may write here as well
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(unfinished, path)
    except OSError as error:
        with suppress(OSError):
            unfinished.unlink()
        raise StudyError(
            f"cannot write {path}: {error.strerror}; the rows are whole, --report writes it again"
        ) from None
