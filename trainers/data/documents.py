"""Documents: what the text sources yield, and how a corpus of them is split and cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from trainers.data.base import held_out


@dataclass(frozen=True)
class Document:
    """One document of a corpus.

    Args:
        text: str, or utf-8 bytes; without byte 0.
        domain: the label of all its tokens.
        name: unique within its domain; its hash decides the split.
    """

    text: bytes | str
    domain: str
    name: str

    @property
    def data(self) -> bytes:
        """The text as utf-8 bytes."""
        return self.text.encode() if isinstance(self.text, str) else self.text


def split_documents(documents: Iterable[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split a corpus by document, in every domain alike (see ``held_out``).

    Args:
        documents: the corpus.
        fraction: the share of documents held out, in (0, 1).

    Returns:
        (train, valid), each in the corpus's order.

    Raises:
        ValueError: if the fraction is out of range, or a name occurs twice in a domain.
    """
    corpus = list(documents)
    sides = list(zip(corpus, held_out([(d.domain, d.name) for d in corpus], fraction), strict=True))
    return [document for document, held in sides if not held], [document for document, held in sides if held]


def cut(text: str, domain: str, name: str, size: int = 16384) -> Iterator[Document]:
    """Cut a long text into documents at line ends, so that it can be split at all.

    Args:
        text: the text.
        domain: the documents' domain.
        name: the text's name; parts are called name#0, name#1, …
        size: characters from which a part ends at the next line end.

    Yields:
        The parts; joined they are the text.
    """
    lines: list[str] = []
    length = part = 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= size:
            yield Document("".join(lines), domain, f"{name}#{part}")
            lines, length, part = [], 0, part + 1
    if lines:
        yield Document("".join(lines), domain, f"{name}#{part}")


def take(documents: Iterable[Document], size: int | None) -> Iterator[Document]:
    """The first documents, until they hold ``size`` bytes.

    Args:
        documents: any number of documents, also without end.
        size: bytes at which to stop, the document that reaches it being the last; None for all.

    Yields:
        The documents.
    """
    for document in documents:
        if size is not None:
            if size <= 0:
                return
            size -= len(document.data)
        yield document
