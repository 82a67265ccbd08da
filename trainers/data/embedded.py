"""The embedded default: text that every Python has, as six labelled domains."""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Unpack

from trainers.data.base import require_integer
from trainers.data.documents import Document, split_documents, take
from trainers.data.text import TextData, TextOptions

# Shares of max_bytes. The first three come from the same files, in about the proportion those have.
SHARES = {"code": 0.45, "docstrings": 0.15, "comments": 0.08, "topics": 0.1, "arithmetic": 0.11, "json": 0.11}
# Tests, what others installed, and the topics' own file; below, what this machine's build wrote.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
SKIPPED_PREFIX = "_sysconfigdata"
# Some 100 of the codecs are near copies of one table: a handful stands for them.
KEPT_ENCODINGS = {"__init__", "aliases", "ascii", "cp1252", "idna", "latin_1", "punycode", "utf_8", "utf_16"}
# Exact for Python up to 3.11, where no string holds its own quotes, and eight times as fast as `tokenize`.
STRING_OR_COMMENT = re.compile(
    rb"""\#[^\n]*
    | \"{3} (?: [^"\\]++ | \\. | "(?!"") )*+ \"{3}
    | '{3} (?: [^'\\]++ | \\. | '(?!'') )*+ '{3}
    | " (?: [^"\\\n]++ | \\. )*+ "
    | ' (?: [^'\\\n]++ | \\. )*+ '""",
    re.DOTALL | re.VERBOSE,
)
GENERATED_DOCUMENT_BYTES = 2048
NAMES = ("Ada", "Ben", "Chloe", "Dmitri", "Elif", "Farid", "Grace", "Hugo", "Ines", "Jun", "Kofi", "Lena")
CITIES = ("Accra", "Bergen", "Cairo", "Delhi", "Essen", "Fez", "Graz", "Hanoi", "Izmir", "Jena")
ARTICLES = ("apple", "book", "candle", "drum", "easel", "flute", "globe", "hammer", "ink", "jar", "lamp")


def stdlib(*, max_bytes: int = 6_000_000, valid_fraction: float = 0.05, **text: Unpack[TextOptions]) -> TextData:
    """Python's own text: code, docstrings, comments, documentation topics, generated arithmetic and JSON.

    The code, docstrings and comments of one file have one name, so they fall on the same side of the split.

    Args:
        max_bytes: size of the corpus; every domain is cut at its share of it (``SHARES``).
        valid_fraction: share of the documents held out, in each domain.
        **text: the options of ``TextData``.

    Returns:
        The data set "stdlib".

    Raises:
        ValueError: if an option is out of range.
    """
    require_integer("max_bytes", max_bytes, 1)
    train, valid = split_documents(stdlib_documents(Path(sysconfig.get_path("stdlib")), max_bytes), valid_fraction)
    return TextData("stdlib", train, valid, **text)


def stdlib_documents(folder: Path, max_bytes: int) -> Iterator[Document]:
    """The corpus of ``stdlib``: the same for the same folder.

    Args:
        folder: the standard library's folder.
        max_bytes: size of the corpus.

    Yields:
        Documents of the six domains.
    """
    from pydoc_data.topics import topics

    room = {domain: int(share * max_bytes) for domain, share in SHARES.items()}
    sources = {"code", "docstrings", "comments"}
    for path in source_files(folder):
        name = path.relative_to(folder).as_posix()
        for document in parts_of(path, name):
            if room[document.domain] > 0:
                room[document.domain] -= len(document.data)
                yield document
        if all(room[domain] <= 0 for domain in sources):
            break
    generated = {
        "topics": (Document(text, "topics", name) for name, text in sorted(topics.items())),
        "arithmetic": generate("arithmetic", worked_sum),
        "json": generate("json", record),
    }
    for domain, documents in generated.items():
        yield from take(documents, room[domain])


def source_files(folder: Path) -> list[Path]:
    """The source files to read, ordered by the hash of their names, so that a cap takes of all packages.

    Args:
        folder: the standard library's folder.

    Returns:
        Paths under it.
    """

    def wanted(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        copy = parts[0] == "encodings" and path.stem not in KEPT_ENCODINGS
        return not (SKIPPED_FOLDERS.intersection(parts) or copy or path.stem.startswith(SKIPPED_PREFIX))

    def order(path: Path) -> bytes:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).digest()

    return sorted(filter(wanted, folder.rglob("*.py")), key=order)


def parts_of(path: Path, name: str) -> list[Document]:
    """One source file as up to three documents: code without docstrings and comments, docstrings, comments.

    Args:
        path: the file.
        name: the documents' name.

    Returns:
        The documents that are not empty; none if the file cannot be read or parsed.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, on old escapes; as errors they would change the corpus
            texts = dict(zip(("code", "docstrings", "comments"), separate(source), strict=True))
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []  # a distribution may ship files that are broken on purpose
    return [Document(text, domain, name) for domain, text in texts.items() if text and "\0" not in text]


def separate(source: str) -> tuple[str, str, str]:
    """Separate a source into its code, its docstrings and its comments.

    Args:
        source: Python source that parses.

    Returns:
        The code without docstrings, comments and the lines they leave blank; the docstrings, dedented, a
        blank line between two; the comments, one a line, without indentation.

    Raises:
        SyntaxError: if it does not parse.
    """
    data = source.encode()  # ast counts columns in bytes
    line_starts = [0, *itertools.accumulate(map(len, data.splitlines(keepends=True)))]
    docstrings, erased = [], []
    for statement, text in docstrings_of(ast.parse(source)):
        docstrings.append(inspect.cleandoc(text))
        end_line = statement.end_lineno or statement.lineno
        end = line_starts[end_line - 1] + (statement.end_col_offset or 0)
        erased.append((line_starts[statement.lineno - 1] + statement.col_offset, end))
    comments = [found for found in STRING_OR_COMMENT.finditer(data) if found[0].startswith(b"#")]
    erased = sorted(erased + [found.span() for found in comments])
    ends, begins = [0, *(end for _, end in erased)], [*(begin for begin, _ in erased), len(data)]
    code = b"".join(data[end:begin] for end, begin in zip(ends, begins, strict=True))
    lines = [line.rstrip() for line in code.splitlines() if line.strip()]
    joined = (b"\n".join(lines), b"\n".join(found[0].rstrip() for found in comments))
    return joined[0].decode(), "\n\n".join(docstrings), joined[1].decode()


def docstrings_of(node: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """The docstrings of a module, class or function and of all within, in the order of the source.

    Args:
        node: a node of a syntax tree.

    Yields:
        The statement and its string.
    """
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        match node.body:
            case [ast.Expr(ast.Constant(str(text))) as statement, *_]:
                yield statement, text
    for child in ast.iter_child_nodes(node):
        # Expressions, most of a tree, hold no docstrings.
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from docstrings_of(child)


def generate(domain: str, line: Callable[[random.Random], str]) -> Iterator[Document]:
    """Documents of generated lines, without end, always the same.

    Args:
        domain: the documents' domain; each document's numbers follow from the domain and its place.
        line: draws one line.

    Yields:
        Documents of about ``GENERATED_DOCUMENT_BYTES``.
    """
    for index in itertools.count():
        source = random.Random(f"{domain} {index}")
        lines: list[str] = []
        while sum(map(len, lines)) < GENERATED_DOCUMENT_BYTES:
            lines.append(line(source))
        yield Document("\n".join(lines), domain, str(index))


def worked_sum(source: random.Random) -> str:
    """One worked line of arithmetic.

    Args:
        source: of the numbers.

    Returns:
        An addition, a subtraction, or a product worked out by tens and units; true.
    """
    a, b = source.randint(1, 999), source.randint(1, 999)
    kind = source.choice(("sum", "difference", "product"))
    if kind == "sum":
        return f"{a} + {b} = {a + b}"
    if kind == "difference":
        return f"{a + b} - {a} = {b}"
    a, b = a % 90 + 10, b % 90 + 10
    tens, units = b // 10 * 10, b % 10
    return f"{a} * {b} = {a} * {tens} + {a} * {units} = {a * tens} + {a * units} = {a * b}"


def record(source: random.Random) -> str:
    """One line of JSON.

    Args:
        source: of the fields.

    Returns:
        An object: an order with its customer and items.
    """
    counts = [source.randint(1, 12) for _ in range(source.randint(1, 3))]
    prices = [source.randint(50, 9999) for _ in counts]  # in cents, so that the total is exact
    items = [
        {"article": source.choice(ARTICLES), "count": count, "price": price / 100}
        for count, price in zip(counts, prices, strict=True)
    ]
    total = sum(count * price for count, price in zip(counts, prices, strict=True)) / 100
    return json.dumps(
        {
            "id": source.randint(10_000, 99_999),
            "customer": {
                "name": source.choice(NAMES),
                "city": source.choice(CITIES),
                "member": source.random() < 0.5,
            },
            "items": items,
            "total": total,
            "note": source.choice((None, "gift", "express", "call first")),
        }
    )
