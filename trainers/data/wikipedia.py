"""Wikipedia: enwiki-2015 to train on, WikiText-2 to compare with others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Unpack

from trainers.data.base import data_file, require_choice, require_integer
from trainers.data.documents import Document, take
from trainers.data.files import xz_lines
from trainers.data.text import TextData, TextOptions

SPLITS = ("valid", "test")
ARTICLE = re.compile(r'<doc id="([^"]*)"')
HEADING = re.compile(r" = [^=\n].* = \n")


def enwiki(
    *,
    root: str | None = None,
    max_bytes: int | None = 20_000_000,
    split: str = "valid",
    **text: Unpack[TextOptions],
) -> TextData:
    """enwiki-2015: plain English Wikipedia, with the splits it comes in, from enwiki-2015/enwiki2015.*.txt.xz.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        max_bytes: how much of the train split to read, 69 MB in all; None for all.
        split: the held-out split, "valid" or "test".
        **text: the options of ``TextData``.

    Returns:
        The data set "enwiki", of one domain.

    Raises:
        ValueError: if no root is given, a file is damaged, or an option is out of range.
        FileNotFoundError: if a file is missing.
    """
    require_choice("split", split, SPLITS)
    if max_bytes is not None:
        require_integer("max_bytes", max_bytes, 1)
    train, valid = (articles(root, part) for part in ("train", split))
    return TextData("enwiki", take(train, max_bytes), valid, **text)


def articles(root: str | None, split: str) -> Iterator[Document]:
    """The articles of a split of enwiki-2015, ``<doc id="…" …>`` lines to ``</doc>`` lines, without these.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        split: "train", "valid" or "test".

    Yields:
        A document an article, named by its id.

    Raises:
        ValueError: if no root is given, the file is damaged, or an article is not closed.
        FileNotFoundError: if the file is missing.
    """
    path = data_file(root, f"enwiki-2015/enwiki2015.{split}.txt.xz")
    name: str | None = None
    lines: list[str] = []
    for line in xz_lines(path):
        if opening := ARTICLE.match(line):
            if name is not None:
                raise ValueError(f"{path.name}: expected </doc> at the end of article {name}, got article {opening[1]}")
            name, lines = opening[1], []
        elif line.rstrip() == "</doc>" and name is not None:
            yield Document("".join(lines), "wikipedia", name)
            name = None
        else:
            lines.append(line)
    if name is not None:
        raise ValueError(f"{path.name}: expected </doc> at the end of article {name}, got the end of the file")


def wikitext2(
    *,
    root: str | None = None,
    split: str = "valid",
    batch_size: int = 32,
    length: int = 256,
    valid_tokens: int | None = 65536,
    tokenizer: str = "bytes",
) -> TextData:
    """WikiText-2 to evaluate on, from wikitext-2/wiki.*.tokens.xz: the text as it is, ``<unk>`` and `` @-@ `` included.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        split: "valid" or "test".
        batch_size: as in ``TextData``.
        length: as in ``TextData``.
        valid_tokens: as in ``TextData``.
        tokenizer: the trained model's: "bytes" or the path of its JSON.

    Returns:
        The data set "wikitext2", of one domain, without a train split: train_batch and baseline raise.

    Raises:
        ValueError: if no root is given, the file is damaged, or an option is out of range.
        FileNotFoundError: if the file is missing.
    """
    return to_evaluate_on(
        "wikitext2",
        root=root,
        split=split,
        batch_size=batch_size,
        length=length,
        valid_tokens=valid_tokens,
        tokenizer=tokenizer,
    )


def to_evaluate_on(name: str, *, root: str | None, split: str, **text: Unpack[TextOptions]) -> TextData:
    """A held-out split alone.

    Args:
        name: "wikitext2" or "enwiki".
        root: folder of the data sets; None reads MOEGEO_DATA.
        split: "valid" or "test".
        **text: the options of ``TextData``.

    Returns:
        The data set, of one domain, without a train split: train_batch and baseline raise.

    Raises:
        ValueError: if the name is unknown, no root is given, the file is damaged, or an option is out of range.
        FileNotFoundError: if the file is missing.
    """
    require_choice("split", split, SPLITS)
    if name == "enwiki":
        return TextData(name, None, articles(root, split), **text)
    if name != "wikitext2":
        raise ValueError(f"name: expected 'wikitext2' or 'enwiki', got {name!r}")
    lines = xz_lines(data_file(root, f"wikitext-2/wiki.{split}.tokens.xz"))
    return TextData(name, None, wikitext_articles(list(lines)), **text)


def wikitext_articles(lines: list[str]) -> Iterator[Document]:
    """Cut WikiText at the headings of articles: a line `` = Title = `` between blank lines.

    Args:
        lines: the lines of a split.

    Yields:
        A document an article, named by its number; joined they are the text.
    """
    blank = [not line.strip() for line in lines]
    starts = [i for i in range(1, len(lines) - 1) if HEADING.fullmatch(lines[i]) and blank[i - 1] and blank[i + 1]]
    edges = [0, *starts[1:], len(lines)]
    for number, (begin, end) in enumerate(itertools.pairwise(edges)):
        yield Document("".join(lines[begin:end]), "wikipedia", str(number))
