"""Any folder of text files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from trainers.data.documents import Document, cut, split_documents
from trainers.data.text import TextData, TextOptions


def folder(
    *,
    path: str,
    extensions: Sequence[str] = (".txt", ".md", ".rst", ".py"),
    valid_fraction: float = 0.05,
    **text: Unpack[TextOptions],
) -> TextData:
    """The text files under a folder; the top-level subfolder is the domain, "." for files at the root.

    Long files are cut at line ends into documents of some 16,000 characters, so that a single large file can
    be split. Files that are not utf-8 text are left out; ``describe`` says how many. Empty ones and hidden ones
    are left out too.

    Args:
        path: the folder.
        extensions: the endings of the files to read, with their dots.
        valid_fraction: share of each domain's documents held out.
        **text: the options of ``TextData``.

    Returns:
        The data set "folder".

    Raises:
        ValueError: if the folder has no such text, or an option is out of range.
        FileNotFoundError: if there is no such folder.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"path: no folder {path}")
    if isinstance(extensions, str) or not all(extension.startswith(".") for extension in extensions):
        raise ValueError(f"extensions: expected a list of endings with their dots, like ['.txt'], got {extensions!r}")
    documents: list[Document] = []
    skipped = 0
    for file in text_files(root, tuple(extensions)):
        relative = file.relative_to(root)
        try:
            content = file.read_bytes().decode()
        except UnicodeDecodeError:
            content = "\0"
        if "\0" in content:
            skipped += 1
            continue
        documents += cut(content, relative.parts[0] if len(relative.parts) > 1 else ".", relative.as_posix())
    if not documents:
        raise ValueError(f"path: expected text files ending in {', '.join(extensions)} under {path}, got none")
    train, valid = split_documents(documents, valid_fraction)
    return TextData("folder", train, valid, note=f"{skipped} files skipped, not utf-8 text" if skipped else "", **text)


def text_files(root: Path, extensions: tuple[str, ...]) -> list[Path]:
    """The files to read.

    Args:
        root: the folder.
        extensions: the endings wanted.

    Returns:
        Paths in order of their names, without hidden files and folders.
    """
    found = (path for path in root.rglob("*") if path.suffix in extensions and path.is_file())
    return sorted(path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
