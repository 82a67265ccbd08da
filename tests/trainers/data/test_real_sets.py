"""Readers of the real sets, on tiny files of the same formats."""

import lzma
import shutil
from functools import partial

import numpy as np
import pytest
import torch

from tests.trainers.data.conftest import ENWIKI, WIKITEXT, sheet, write_idx, write_xz
from trainers.data.documents import Document
from trainers.data.multidomain import multidomain, multidomain_documents
from trainers.data.vision import cifar10, fashion_mnist, read_idx, read_tiles
from trainers.data.wikipedia import articles, enwiki, wikitext2, wikitext_articles

SMALL = {"length": 16, "batch_size": 2, "valid_tokens": None}
READERS = {
    "enwiki": lambda root: enwiki(root=root, **SMALL),
    "wikitext2": lambda root: wikitext2(root=root, **SMALL),
    "multidomain": lambda root: multidomain(root=root, **SMALL),
    "fashion_mnist": lambda root: fashion_mnist(root=root),
    "cifar10": lambda root: cifar10(root=root),
}
FILES = {
    "enwiki": "enwiki-2015/enwiki2015.train.txt.xz",
    "wikitext2": "wikitext-2/wiki.valid.tokens.xz",
    "multidomain": "multidomain/gsm8k/test.jsonl.xz",
    "fashion_mnist": "fashion-mnist/t10k-labels-idx1-ubyte.gz",
    "cifar10": "cifar10/train_00.webp",
}


def stream_text(stream):
    return bytes(stream.tokens.tolist())


def test_enwiki_articles(root):
    for split, expected in ENWIKI.items():
        found = [(d.name, d.domain, d.text) for d in articles(str(root), split)]
        assert found == [(name, "wikipedia", text) for name, _, text in expected]


def test_enwiki_uses_its_own_splits(root):
    data = enwiki(root=str(root), **SMALL)
    texts = {split: b"".join(text.encode() + b"\0" for _, _, text in found) for split, found in ENWIKI.items()}
    assert stream_text(data._train) == texts["train"]
    assert stream_text(data._valid) == texts["valid"]
    assert stream_text(enwiki(root=str(root), split="test", **SMALL)._valid) == texts["test"]


def test_enwiki_reads_no_further_than_it_must(root, tmp_path):
    shutil.copytree(root / "enwiki-2015", tmp_path / "enwiki-2015")
    assert len(enwiki(root=str(tmp_path), max_bytes=10, **SMALL)._train.starts) == 1
    path = tmp_path / FILES["enwiki"]
    text = lzma.decompress(path.read_bytes())
    source = np.random.default_rng(0)
    noise = bytes(source.integers(97, 123, 2_000_000, dtype=np.uint8)) + b"\n"
    damaged = lzma.compress(text + b'<doc id="99">\n' + noise)[:-600_000]  # the end is missing
    path.write_bytes(damaged)
    assert len(enwiki(root=str(tmp_path), max_bytes=10, **SMALL)._train.starts) == 1
    with pytest.raises(ValueError, match=r"enwiki2015.train.txt.xz: expected an xz file of utf-8 text, got a damaged"):
        enwiki(root=str(tmp_path), max_bytes=None, **SMALL)


@pytest.mark.parametrize(
    ("text", "got"),
    [('<doc id="1">\nno end\n', "the end of the file"), ('<doc id="1">\na\n<doc id="2">\n', "article 2")],
)
def test_enwiki_unclosed_article(tmp_path, text, got):
    write_xz(tmp_path / FILES["enwiki"], text)
    with pytest.raises(ValueError, match=f"expected </doc> at the end of article 1, got {got}"):
        list(articles(str(tmp_path), "train"))


def test_wikitext_is_cut_at_article_headings_and_kept_as_it_is(root):
    found = [d.text for d in wikitext_articles(WIKITEXT.splitlines(keepends=True))]
    assert "".join(found) == WIKITEXT
    assert [text.split(" = ")[1] for text in found] == ["First Article", "Second – Article"]
    data = wikitext2(root=str(root), **SMALL)
    assert stream_text(data._valid) == b"".join(text.encode() + b"\0" for text in found)
    with pytest.raises(ValueError, match="train with data=enwiki"):
        data.train_batch(0)


@pytest.mark.parametrize("make", [enwiki, wikitext2])
def test_unknown_split(root, make):
    with pytest.raises(ValueError, match="split: expected 'valid' or 'test', got 'train'"):
        make(root=str(root), split="train")


def test_multidomain_documents(root):
    found = {(d.domain, d.name): d.text for d in multidomain_documents(str(root))}
    assert found["ruby", "cloze/maxmin-2"] == "Return ruby\ndef f 2"
    assert found["java", "cloze/maxmin-0"] == "Return java\ndef f 0"
    assert found["java", "java-cs/train/0"] == "public void train() {}\n"
    assert found["csharp", "java-cs/valid/0"] == "public void Valid() {}\n"
    assert found["maths", "gsm8k/test/2"] == "What is 2 + 1?\n#### 3"
    assert found["biomedical", "pubmedqa/1"] == "Context: 1\nAnswer: No"
    assert found["speeches", "1945-Truman"] == "Mr. Speaker ¡"
    whole = {
        name: "".join(text for (domain, n), text in found.items() if domain == name and n.startswith(part))
        for name, part in (("french", "french"), ("swedish", "swedish"), ("english", "english-web"))
    }
    assert whole["french"] == "Dieu créa les cieux\n" * 1000
    assert whole["swedish"] == "jorden var öde\n" * 1000
    assert whole["english"] == "In the — beginning\n" * 1000


def test_multidomain_covers_every_domain(root):
    data = multidomain(root=str(root), valid_fraction=0.3, **SMALL | {"valid_tokens": 4000})
    expected = "biomedical csharp english french go java javascript maths php python ruby speeches swedish"
    # A text of one part cannot be on both sides: it is trained on.
    assert data.domains == tuple(expected.split())
    seen = {data.domains[int(d)] for b in data.valid_batches() for d in b.domains[b.mask].unique()}
    assert seen >= set(data.domains) - {"french", "swedish", "english"}
    trained = {data.domains[int(d)] for d in data._train.domains}
    assert trained == set(data.domains)


def test_multidomain_has_documents_to_choose_settings_by(root, monkeypatch):
    documents = [Document(f"{domain} {i}", domain, f"{i}") for domain in ("a", "b") for i in range(200)]
    monkeypatch.setattr("trainers.data.multidomain.multidomain_documents", lambda root: iter(documents))
    make = partial(multidomain, root=str(root), valid_fraction=0.1, **SMALL)
    sides = {split: make(split=split) for split in ("test", "valid")}
    test, valid, train = (
        set(stream_text(stream).split(b"\0")) - {b""}
        for stream in (sides["test"]._valid, sides["valid"]._valid, sides["valid"]._train)
    )
    assert test | valid | train == {document.data for document in documents}
    assert len(test) + len(valid) + len(train) == len(documents)
    assert min(len(test), len(valid)) > 20
    assert max(len(test), len(valid)) < 60
    assert set(stream_text(sides["test"]._train).split(b"\0")) - {b""} == valid | train
    with pytest.raises(ValueError, match="split: expected 'test' or 'valid', got 'train'"):
        make(split="train")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json}\n", r"gsm8k/test.jsonl.xz: expected JSON, got '\{not json\}"),
        ('{"question": "a"}\n', "gsm8k/test.jsonl.xz: expected rows with the field 'answer', got"),
        ("[1]\n", "gsm8k/test.jsonl.xz: expected rows with the field 'question', got"),
    ],
)
def test_multidomain_damaged_rows(root, tmp_path, text, message):
    shutil.copytree(root / "multidomain", tmp_path / "multidomain")
    write_xz(tmp_path / FILES["multidomain"], text)
    with pytest.raises(ValueError, match=message):
        multidomain(root=str(tmp_path), **SMALL)


def test_multidomain_damaged_zip(root, tmp_path):
    shutil.copytree(root / "multidomain", tmp_path / "multidomain")
    (tmp_path / "multidomain/nltk/genesis.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"genesis.zip: expected a zip file, got a damaged one"):
        multidomain(root=str(tmp_path), **SMALL)


def test_fashion_mnist(root):
    data = fashion_mnist(root=str(root), batch_size=8)
    assert (data.image_shape, data.num_classes, data.domains[9]) == ((1, 28, 28), 10, "ankle boot")
    assert (len(data._train), len(data._valid)) == (40, 20)
    expected = np.arange(40 * 28 * 28).reshape(40, 1, 28, 28) % 251
    assert np.array_equal(data._train.pixels.numpy(), expected)
    assert data._valid.classes.tolist() == [i % 10 for i in range(20)]
    assert torch.equal(data._valid.domains, data._valid.classes)


def test_idx_files_that_are_not(tmp_path):
    write_idx(tmp_path / "a.gz", np.zeros((3, 2, 2)))
    assert read_idx(tmp_path / "a.gz", 3).shape == (3, 2, 2)
    with pytest.raises(ValueError, match=r"a.gz: expected an idx file of 1-dimensional bytes, got 28 bytes"):
        read_idx(tmp_path / "a.gz", 1)
    whole = (tmp_path / "a.gz").read_bytes()
    for name, content in {
        "short.gz": whole[:-9],
        "flipped.gz": whole[:12] + b"\xff" + whole[13:],
        "text.gz": b"text",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}: expected a gzip file, got a damaged one"):
            read_idx(tmp_path / name, 3)


def test_more_images_than_labels(root, tmp_path):
    shutil.copytree(root / "fashion-mnist", tmp_path / "fashion-mnist")
    write_idx(tmp_path / FILES["fashion_mnist"], np.arange(7))
    with pytest.raises(ValueError, match="labels: expected one for each of 20 images, got 7"):
        fashion_mnist(root=str(tmp_path))


def test_cifar10_tiles_are_in_the_official_order(root):
    data = cifar10(root=str(root), batch_size=16, valid_images=100)
    assert (data.image_shape, data.num_classes, data.domains[2]) == ((3, 32, 32), 10, "bird")
    assert (len(data._train), len(data._valid)) == (25_000, 10_000)
    for split, numbers in ((data._train, (0, 49, 50, 999, 1000, 24_999)), (data._valid, (0, 51, 9_999))):
        for number in numbers:
            row, column, sheet_number = number % 1000 // 50, number % 50, number // 1000
            expected = torch.tensor([row, column, sheet_number], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)
            assert torch.equal(split.pixels[number], expected)
    assert data._train.classes[[0, 13, 24_999]].tolist() == [0, 3, 9]
    assert data._valid.classes[[6, 7, 9_999]].tolist() == [0, 1, 9_999 // 7 % 10]
    assert sum(int(b.mask.sum()) for b in data.valid_batches()) == 100
    assert "first half of train" in data.describe()


def test_settings_are_chosen_by_train_images_that_are_not_trained_on(root):
    whole, choosing = (cifar10(root=str(root), split=split) for split in ("test", "valid"))
    assert (len(choosing._train), len(choosing._valid)) == (20_000, 5_000)
    assert torch.equal(torch.cat([choosing._train.pixels, choosing._valid.pixels]), whole._train.pixels)
    assert torch.equal(torch.cat([choosing._train.classes, choosing._valid.classes]), whole._train.classes)
    assert torch.equal(choosing._valid.domains, choosing._valid.classes)
    assert choosing.fingerprint != whole.fingerprint
    with pytest.raises(ValueError, match="split: expected 'test' or 'valid', got 'train'"):
        cifar10(root=str(root), split="train")
    with pytest.raises(ValueError, match="split: expected more than 5000 train images for 'valid', got 40"):
        fashion_mnist(root=str(root), split="valid")


def test_tiles_are_not_transposed(tmp_path):
    """Within a tile the order of rows and columns is kept."""
    from PIL import Image

    image = sheet(0)
    image[5, 32 + 9] = (200, 201, 202)  # row 5, column 9 of the second tile
    Image.fromarray(image).save(tmp_path / "a.webp", lossless=True)
    assert read_tiles(tmp_path / "a.webp")[1, :, 5, 9].tolist() == [200, 201, 202]


def test_images_that_are_not(tmp_path):
    from PIL import Image

    (tmp_path / "text.webp").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"text.webp: expected an image, got a damaged file"):
        read_tiles(tmp_path / "text.webp")
    Image.fromarray(sheet(0)[:64]).save(tmp_path / "small.webp", lossless=True)
    with pytest.raises(
        ValueError, match=r"small.webp: expected an image of shape \(640, 1600, 3\), got \(64, 1600, 3\)"
    ):
        read_tiles(tmp_path / "small.webp")


def test_cifar10_labels_that_are_not(tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    np.savez(folder / "labels.npz", other=np.arange(3))
    with pytest.raises(ValueError, match=r"labels.npz: expected arrays train_labels and test_labels"):
        cifar10(root=str(tmp_path))
    (folder / "labels.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"labels.npz: expected arrays train_labels and test_labels"):
        cifar10(root=str(tmp_path))


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"cifar10"}))
def test_the_root_may_come_from_the_environment(name, root, monkeypatch):
    monkeypatch.setenv("MOEGEO_DATA", str(root))
    assert READERS[name](None).fingerprint == READERS[name](str(root)).fingerprint


@pytest.mark.parametrize("name", READERS)
def test_a_missing_root_or_file_is_named(name, root, tmp_path):
    with pytest.raises(ValueError, match=r"root: expected .* option data.root .* MOEGEO_DATA; got neither"):
        READERS[name](None)
    with pytest.raises(FileNotFoundError, match=r"root: no file .* \(option data.root or MOEGEO_DATA\)"):
        READERS[name](str(tmp_path / "gone"))
    folder = FILES[name].split("/")[0]
    shutil.copytree(root / folder, tmp_path / folder)
    (tmp_path / FILES[name]).unlink()
    with pytest.raises(FileNotFoundError, match=f"root: no file {FILES[name]}"):
        READERS[name](str(tmp_path))
