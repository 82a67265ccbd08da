import pytest

from trainers.data.folder import folder

OPTIONS = {"length": 8, "batch_size": 2, "valid_tokens": None}


@pytest.fixture
def texts(tmp_path):
    for domain in ("poems", "essays/deep"):
        (tmp_path / domain).mkdir(parents=True)
        for i in range(6):
            (tmp_path / domain / f"{i}.txt").write_text(f"{domain} text {i}, é\r\n" * 3, encoding="utf-8", newline="")
    (tmp_path / "big.md").write_text("a line of a big file\n" * 3000)
    (tmp_path / "poems/data.bin").write_bytes(b"not wanted")
    (tmp_path / "poems/empty.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/x.txt").write_text("hidden")
    return tmp_path


def text_of(data):
    return bytes(data._train.tokens.tolist()) + bytes(data._valid.tokens.tolist())


def test_domains_and_content(texts):
    data = folder(path=str(texts), **OPTIONS)
    assert data.domains == (".", "essays", "poems")
    parts = text_of(data).split(b"\0")
    for i in range(6):
        assert parts.count(f"poems text {i}, é\r\n".encode() * 3) == 1
    assert sum(part.count(b"a line of a big file\n") for part in parts) == 3000
    assert b"hidden" not in text_of(data)
    assert b"not wanted" not in text_of(data)
    assert "skipped" not in data.describe()
    assert {int(d) for b in data.valid_batches() for d in b.domains[b.mask].unique()} == {0, 1, 2}


def test_one_big_file_is_enough(tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be\n" * 3000)
    data = folder(path=str(tmp_path), **OPTIONS)
    assert len(data._valid) > 10_000
    assert data.domains == (".",)


def test_files_that_are_not_text_are_counted(texts):
    (texts / "poems/latin.txt").write_bytes(b"caf\xe9")
    (texts / "poems/nul.txt").write_bytes(b"a\0b")
    data = folder(path=str(texts), **OPTIONS)
    assert data.describe().endswith("; 2 files skipped, not utf-8 text")
    assert b"caf" not in text_of(data)


def test_extensions(texts):
    data = folder(path=str(texts), extensions=[".bin", ".txt"], **OPTIONS)
    assert data.domains == ("essays", "poems")
    assert b"not wanted" in text_of(data)


@pytest.mark.parametrize("extensions", ["txt", ".txt", ["txt"]])
def test_bad_extensions(texts, extensions):
    with pytest.raises(ValueError, match="extensions: expected a list of endings with their dots"):
        folder(path=str(texts), extensions=extensions)


def test_missing_and_empty_folders(texts):
    with pytest.raises(FileNotFoundError, match=r"path: no folder .*gone"):
        folder(path=str(texts / "gone"))
    with pytest.raises(FileNotFoundError, match=r"path: no folder .*big\.md"):
        folder(path=str(texts / "big.md"))
    (texts / "void").mkdir()
    with pytest.raises(ValueError, match=r"path: expected text files ending in \.txt, .* got none"):
        folder(path=str(texts / "void"))
