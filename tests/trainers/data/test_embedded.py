"""The standard library as a corpus: its parts against tokenize and ast, its generated lines against arithmetic."""

import ast
import io
import json
import random
import sysconfig
import time
import tokenize
from pathlib import Path

import pytest

from trainers.data.embedded import (
    generate,
    parts_of,
    record,
    separate,
    source_files,
    stdlib,
    stdlib_documents,
    worked_sum,
)

FOLDER = Path(sysconfig.get_path("stdlib"))
SOURCE = '''#!/usr/bin/env python
"""Module é doc.

    Indented.
"""  # after it
import os  # why "quoted"

x = "# no comment" + 'it\\'s # none'
y = """
# inside a string
"""


class C:
    """C doc."""

    async def f(self): "f doc"; return 1  # é one

    def g(self):
        r\'\'\'g doc\'\'\'
        if x:
            def h():
                """h doc"""
        # alone
        return "a string, no docstring"
'''


def test_separate_by_hand():
    code, docstrings, comments = separate(SOURCE)
    assert docstrings == "Module é doc.\n\nIndented.\n\nC doc.\n\nf doc\n\ng doc\n\nh doc"
    assert comments == '#!/usr/bin/env python\n# after it\n# why "quoted"\n# é one\n# alone'
    assert code == (
        'import os\nx = "# no comment" + \'it\\\'s # none\'\ny = """\n# inside a string\n"""\nclass C:\n'
        "    async def f(self): ; return 1\n    def g(self):\n        if x:\n            def h():\n"
        '        return "a string, no docstring"'
    )


def test_comments_are_those_of_tokenize():
    for path in source_files(FOLDER)[:15]:
        with tokenize.open(path) as file:
            source = file.read()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        expected = [token.string.rstrip() for token in tokens if token.type == tokenize.COMMENT]
        assert separate(source)[2] == "\n".join(expected), path


def test_docstrings_are_those_of_ast():
    for path in source_files(FOLDER)[:15]:
        with tokenize.open(path) as file:
            source = file.read()
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
        expected = {ast.get_docstring(node) for node in nodes} - {None}
        _, docstrings, _ = separate(source)
        assert all(text in docstrings for text in expected), path
        assert len(docstrings) >= sum(map(len, expected))


def test_unreadable_files_are_passed_over(tmp_path):
    for name, content in {
        "syntax.py": b"def (:\n",
        "bytes.py": b"x = '\xff'\n",
        "nul.py": b"x = '\0'\n",
        "cookie.py": b"# coding: nonsense\n",
        "old.py": b"print 'two'\n",
    }.items():
        (tmp_path / name).write_bytes(content)
        assert parts_of(tmp_path / name, name) == []
    assert parts_of(tmp_path / "gone.py", "gone.py") == []


def test_old_escapes_are_read_without_warning(tmp_path):
    (tmp_path / "old.py").write_text('x = "\\d"\n')
    assert [(d.domain, d.text) for d in parts_of(tmp_path / "old.py", "old.py")] == [("code", 'x = "\\d"')]


def test_files_left_out():
    names = {path.relative_to(FOLDER).as_posix() for path in source_files(FOLDER)}
    assert {"ast.py", "json/decoder.py", "encodings/cp1252.py", "idlelib/pyshell.py"} <= names
    for part in ("test", "tests", "idle_test", "site-packages"):
        assert not any(part in name.split("/") for name in names)
    assert sum(name.startswith("encodings/") for name in names) <= 10
    assert not any("_sysconfigdata" in name or name == "pydoc_data/topics.py" for name in names)


def test_caps_hold_for_every_domain():
    sizes, largest = {}, {}
    for document in stdlib_documents(FOLDER, 200_000):
        sizes[document.domain] = sizes.get(document.domain, 0) + len(document.data)
        largest[document.domain] = max(largest.get(document.domain, 0), len(document.data))
    shares = {"code": 0.45, "docstrings": 0.15, "comments": 0.08, "topics": 0.1, "arithmetic": 0.11, "json": 0.11}
    assert sizes.keys() == shares.keys()
    for domain, share in shares.items():
        assert share * 200_000 <= sizes[domain] < share * 200_000 + largest[domain]


def test_sums_are_true_and_of_every_kind():
    source = random.Random(0)
    lines = [worked_sum(source) for _ in range(500)]
    for line in lines:
        values = {eval(side, {"__builtins__": {}}) for side in line.split("=")}
        assert len(values) == 1, line
    assert {sign for line in lines for sign in line.split("=")[0].split()[1::2]} == {"+", "-", "*"}


def test_records_are_json_and_add_up():
    source = random.Random(0)
    for _ in range(200):
        order = json.loads(record(source))
        assert order["total"] == pytest.approx(sum(item["count"] * item["price"] for item in order["items"]))


def test_generated_documents_are_always_the_same_and_differ():
    one, again = ([d for d, _ in zip(generate("json", record), range(5), strict=False)] for _ in range(2))
    assert one == again
    assert len({d.text for d in one}) == 5
    assert all(2048 <= len(d.text) < 2048 + 600 for d in one)
    other, _ = (next(generate(domain, record)) for domain in ("x", "json"))
    assert other.text != one[0].text


def test_the_real_corpus():
    start = time.process_time()
    data = stdlib()
    seconds = time.process_time() - start
    assert seconds < 30  # some 3 s on an idle core; a busy one can be several times slower
    assert data.domains == ("arithmetic", "code", "comments", "docstrings", "json", "topics")
    lengths = data._train.starts.diff(append=data._train.starts.new_tensor([len(data._train)]))
    for domain in range(6):
        assert int(lengths[data._train.domains == domain].sum()) > 150_000
    seen = {int(d) for batch in data.valid_batches() for d in batch.domains[batch.mask].unique()}
    assert seen == set(range(6))
    assert 2 < data.baseline().loss < 3.5
    text = bytes(data.train_batch(0).inputs[0].tolist())
    assert len(text) == 256


def test_the_corpus_is_the_same_every_time():
    options = {"max_bytes": 100_000, "length": 64}
    one, again = stdlib(**options), stdlib(**options, seed=1)
    assert one.fingerprint == again.fingerprint != stdlib(max_bytes=80_000, length=64).fingerprint


@pytest.mark.parametrize("max_bytes", [0, -5, 1.5, None])
def test_bad_size(max_bytes):
    with pytest.raises(ValueError, match="max_bytes: expected an integer >= 1, got"):
        stdlib(max_bytes=max_bytes)
