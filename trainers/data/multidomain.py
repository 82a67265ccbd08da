"""Text of many domains: programming, mathematics, biomedicine, Genesis in several languages, speeches."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from typing import Any, Unpack

from trainers.data.base import data_file, require_choice
from trainers.data.documents import Document, cut, split_documents
from trainers.data.files import xz_lines
from trainers.data.text import TextData, TextOptions

CLOZE = ("go", "java", "javascript", "php", "python", "ruby")
PARALLEL = {"java": "java", "cs": "csharp"}
# As nltk declares them. Genesis: these three, Swedish, the others utf-8; the speeches are not of one encoding.
LATIN_1 = {"finnish", "french", "german"}


def multidomain(
    *, root: str | None = None, valid_fraction: float = 0.05, split: str = "test", **text: Unpack[TextOptions]
) -> TextData:
    """CodeXGLUE, GSM8K, PubMedQA and nltk's Genesis and State of the Union, from the files under multidomain/.

    A domain is a programming language, "maths", "biomedical", a language of Genesis, or "speeches".

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        valid_fraction: share of each domain's documents held out; the sets' own splits are not used.
        split: what is held out: "test"; or "valid", other documents, about as many, which are then not trained on, to
            choose settings without a look at those of "test".
        **text: the options of ``TextData``.

    Returns:
        The data set "multidomain".

    Raises:
        ValueError: if no root is given, a file is damaged, or an option is out of range.
        FileNotFoundError: if a file is missing.
    """
    require_choice("split", split, ("test", "valid"))
    train, held = split_documents(multidomain_documents(root), valid_fraction)
    if split == "valid":  # of the rest, those whose names hash below twice the fraction
        train, held = split_documents(train, 2 * valid_fraction)
    return TextData("multidomain", train, held, **text)


def multidomain_documents(root: str | None) -> Iterator[Document]:
    """The corpus of ``multidomain``.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.

    Yields:
        The documents of all sets.

    Raises:
        ValueError: if no root is given or a file is damaged.
        FileNotFoundError: if a file is missing.
    """
    yield from code(root)
    yield from questions(root)
    yield from genesis(root)
    for name, data in zip_texts(root, "state_union"):
        yield Document(data.decode("latin-1"), "speeches", name)


def code(root: str | None) -> Iterator[Document]:
    """CodeXGLUE: functions of six languages as tokens, and Java functions with their C# translations.

    A translation has its original's name, so both fall on the same side of the split.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.

    Yields:
        A document a function: its description and its tokens, or its text.
    """
    for language in CLOZE:
        relative = f"codexglue/cloze-maxmin.{language}.json.xz"
        for row in parse(relative, "".join(set_lines(root, relative))):
            parts = [" ".join(field(relative, row, key)) for key in ("nl_tokens", "pl_tokens")]
            yield Document("\n".join(parts), language, f"cloze/{field(relative, row, 'idx')}")
    for ending, language in PARALLEL.items():
        for part in ("train", "valid", "test"):
            for number, line in enumerate(set_lines(root, f"codexglue/java-cs.{part}.{ending}.xz")):
                yield Document(line, language, f"java-cs/{part}/{number}")


def questions(root: str | None) -> Iterator[Document]:
    """GSM8K's problems with their solutions, and PubMedQA's abstracts with question and answer.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.

    Yields:
        A document a problem or abstract.
    """
    for part in ("train", "test"):
        relative = f"gsm8k/{part}.jsonl.xz"
        for number, line in enumerate(set_lines(root, relative)):
            row = parse(relative, line)
            text = "\n".join(field(relative, row, key) for key in ("question", "answer"))
            yield Document(text, "maths", f"gsm8k/{part}/{number}")
    relative = "pubmedqa/pqal_test.jsonl.xz"
    for number, line in enumerate(set_lines(root, relative)):
        row = parse(relative, line)
        answer = field(relative, row, "choices")[int(field(relative, row, "gold"))]
        yield Document(f"{field(relative, row, 'query')} {answer}", "biomedical", f"pubmedqa/{number}")


def genesis(root: str | None) -> Iterator[Document]:
    """The book of Genesis, cut into parts; a language is a domain ("english-kjv" and "english-web" are one).

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.

    Yields:
        The parts of each text.
    """
    for name, data in zip_texts(root, "genesis"):
        language = name.split("-")[0]
        encoding = "latin-1" if language in LATIN_1 else "cp865" if language == "swedish" else "utf-8"
        yield from cut(data.decode(encoding), language, name)


def set_lines(root: str | None, relative: str) -> Iterator[str]:
    """The lines of a file under multidomain/.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        relative: the file's place.

    Yields:
        Lines with their ends.
    """
    yield from xz_lines(data_file(root, f"multidomain/{relative}"))


def zip_texts(root: str | None, name: str) -> Iterator[tuple[str, bytes]]:
    """The .txt files of one of nltk's archives, in the order of their names.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        name: the archive's name.

    Yields:
        (file name without ending, bytes).

    Raises:
        ValueError: if the archive is damaged.
    """
    path = data_file(root, f"multidomain/nltk/{name}.zip")
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in sorted(archive.namelist()):
                if entry.endswith(".txt"):
                    yield entry.rsplit("/", 1)[-1].removesuffix(".txt"), archive.read(entry)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path.name}: expected a zip file, got a damaged one ({error})") from error


def parse(relative: str, text: str) -> Any:
    """Parse JSON of a file.

    Args:
        relative: the file's place, for the message.
        text: the JSON.

    Returns:
        What it says.

    Raises:
        ValueError: if it is not JSON.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{relative}: expected JSON, got {text[:40]!r} ({error})") from error


def field(relative: str, row: Any, key: str) -> Any:
    """A field of a row of a file.

    Args:
        relative: the file's place, for the message.
        row: the parsed row.
        key: the field.

    Returns:
        Its value.

    Raises:
        ValueError: if the row has no such field.
    """
    if not isinstance(row, dict) or key not in row:
        raise ValueError(f"{relative}: expected rows with the field {key!r}, got {str(row)[:40]!r}")
    return row[key]
