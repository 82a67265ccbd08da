"""Tiny sets in the formats of the real ones."""

import gzip
import io
import json
import lzma
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

WIKITEXT = (
    " \n = First Article = \n \n Some text , with <unk> words . \n \n = = Section = = \n \n More @-@ text \n"
    " = 1 <unk> and <unk> C = \n \n = Second – Article = \n \n The end . \n"
)
ENWIKI = {
    "train": [("12", "Ants", "Ants\n\nAnts are insects.\n" * 30), ("13", "Bees", "Bees\n\nBées fly.\n" * 30)],
    "valid": [("14", "Cats", "Cats\n\nCats purr.\n" * 10)],
    "test": [("15", "Dogs", "Dogs\n\nDogs bark.\n" * 10)],
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.delenv("MOEGEO_DATA", raising=False)


def write_xz(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(text.encode()))


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_wikipedia(root: Path) -> None:
    for split, articles in ENWIKI.items():
        text = "".join(
            f'<doc id="{i}" url="http://x?curid={i}" title="{title}">\n{text}</doc>\n' for i, title, text in articles
        )
        write_xz(root / f"enwiki-2015/enwiki2015.{split}.txt.xz", text)
    for split in ("valid", "test"):
        write_xz(root / f"wikitext-2/wiki.{split}.tokens.xz", WIKITEXT)


def write_fashion(root: Path) -> None:
    for split, count in (("train", 40), ("t10k", 20)):
        pixels = np.arange(count * 28 * 28).reshape(count, 28, 28) % 251
        write_idx(root / f"fashion-mnist/{split}-images-idx3-ubyte.gz", pixels)
        write_idx(root / f"fashion-mnist/{split}-labels-idx1-ubyte.gz", np.arange(count) % 10)


def sheet(number: int) -> np.ndarray:
    """A sheet whose tile in row r, column c is of the one colour (r, c, number)."""
    colours = np.stack(np.meshgrid(np.arange(20), np.arange(50), [number], indexing="ij"), -1).reshape(20, 50, 3)
    return colours.repeat(32, 0).repeat(32, 1).astype(np.uint8)


def write_cifar10(root: Path) -> None:
    from PIL import Image

    folder = root / "cifar10"
    folder.mkdir(parents=True)
    encoded = {}
    for number in (0, 1, 9, 24):  # encoding is slow: the sheets between are copies of sheet 1
        buffer = io.BytesIO()
        Image.fromarray(sheet(number)).save(buffer, "webp", lossless=True, quality=0, method=0)
        encoded[number] = buffer.getvalue()
    for split, count in (("train", 25), ("test", 10)):
        for number in range(count):
            (folder / f"{split}_{number:02d}.webp").write_bytes(encoded.get(number, encoded[1]))
    labels = {"train_labels": np.arange(50_000) % 10, "test_labels": np.arange(10_000) // 7 % 10}
    np.savez(folder / "labels.npz", **labels)


def write_multidomain(root: Path) -> None:
    folder = root / "multidomain"
    for language in ("go", "java", "javascript", "php", "python", "ruby"):
        rows = [
            {"idx": f"maxmin-{i}", "nl_tokens": ["Return", language], "pl_tokens": ["def", "f", str(i)]}
            for i in range(3)
        ]
        write_xz(folder / f"codexglue/cloze-maxmin.{language}.json.xz", json.dumps(rows, indent=1))
    for part in ("train", "valid", "test"):
        write_xz(folder / f"codexglue/java-cs.{part}.java.xz", f"public void {part}() {{}}\nint b;\n")
        write_xz(folder / f"codexglue/java-cs.{part}.cs.xz", f"public void {part.title()}() {{}}\nint B;\n")
    for part in ("train", "test"):
        rows = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(3)]
        write_xz(folder / f"gsm8k/{part}.jsonl.xz", "".join(json.dumps(row) + "\n" for row in rows))
    rows = [{"query": f"Context: {i}\nAnswer:", "choices": ["Yes", "No", "Maybe"], "gold": str(i)} for i in range(3)]
    write_xz(folder / "pubmedqa/pqal_test.jsonl.xz", "".join(json.dumps(row) + "\n" for row in rows))
    write_nltk(folder / "nltk")


def write_nltk(folder: Path) -> None:
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "genesis.zip", "w") as archive:
        archive.writestr("genesis/README", b"not text \xff")
        archive.writestr("genesis/french.txt", "Dieu créa les cieux\n".encode("latin-1") * 1000)
        archive.writestr("genesis/swedish.txt", "jorden var öde\n".encode("cp865") * 1000)
        archive.writestr("genesis/english-kjv.txt", "In the beginning\n" * 1000)
        archive.writestr("genesis/english-web.txt", "In the — beginning\n" * 1000)
    with zipfile.ZipFile(folder / "state_union.zip", "w") as archive:
        for year in (1945, 1946):
            archive.writestr(f"state_union/{year}-Truman.txt", b"Mr. Speaker \xa1")


@pytest.fixture(scope="session")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for write in (write_wikipedia, write_fashion, write_cifar10, write_multidomain):
        write(folder)
    return folder
