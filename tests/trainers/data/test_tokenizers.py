import pytest
import torch

from trainers.data.documents import Document
from trainers.data.text import TextData
from trainers.data.tokenizers import BPETokenizer, ByteTokenizer, build_tokenizer, train_bpe

TEXTS = [b"the cat sat on the mat", "the dog ate the hät\n".encode(), b"<|endoftext|> is text here"] * 20


def test_bytes_are_bytes():
    tokens = ByteTokenizer().encode("aé".encode())
    assert tokens.dtype == torch.uint8
    assert tokens.tolist() == [97, 0xC3, 0xA9]
    assert ByteTokenizer().encode(b"").shape == (0,)


def test_bpe_is_lossless_and_shorter():
    bpe = train_bpe(TEXTS, 280)
    assert bpe.vocab_size == 280
    for text in (*TEXTS, "unseen: ∀ 日本 \t\r\n".encode()):
        ids = bpe.encode(text)
        assert bpe._bpe.decode(ids.tolist()).encode() == text
        assert int(ids.min()) >= 0
        assert int(ids.max()) < bpe.end_of_document == 279
    assert len(bpe.encode(TEXTS[0])) < len(TEXTS[0]) / 2


def test_bpe_is_deterministic_and_survives_saving(tmp_path):
    bpe, again = train_bpe(TEXTS, 280), train_bpe(list(TEXTS), 280)
    assert bpe.json == again.json
    path = tmp_path / "tokenizer.json"
    path.write_text(bpe.json, encoding="utf-8")
    for vocab_size in (None, 280):
        loaded = build_tokenizer(str(path), vocab_size, None)
        assert loaded.vocab_size == 280
        assert torch.equal(loaded.encode(TEXTS[1]), bpe.encode(TEXTS[1]))


def documents(n=40):
    return [Document(TEXTS[i % 3], "a", str(i)) for i in range(n)]


def test_data_with_bpe(tmp_path):
    data = TextData("x", documents(), documents(9), tokenizer="bpe", vocab_size=280, length=8, batch_size=2)
    bpe = train_bpe((d.data for d in documents()), 280)
    expected = sum(len(d.data) + 1 for d in documents(9)) / sum(len(bpe.encode(d.data)) + 1 for d in documents(9))
    assert data.vocab_size == 280
    assert data.bytes_per_token == pytest.approx(expected)
    assert data.bytes_per_token > 2
    assert data.tokenizer_json == bpe.json
    path = tmp_path / "tokenizer.json"
    path.write_text(data.tokenizer_json, encoding="utf-8")
    again = TextData("x", documents(), documents(9), tokenizer=str(path), length=8, batch_size=2)
    assert again.fingerprint == data.fingerprint
    assert torch.equal(again.train_batch(3).inputs, data.train_batch(3).inputs)


def test_data_with_bytes_has_one_byte_a_token():
    data = TextData("x", documents(), documents(9), length=8)
    assert (data.bytes_per_token, data.vocab_size, data.tokenizer_json) == (1.0, 256, None)


@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "message"),
    [
        ("words", None, "tokenizer: expected 'bytes', 'bpe' or the path of a saved .json, got 'words'"),
        ("bytes", 280, "vocab_size: expected None, or 256 as bytes has, got 280"),
        ("bpe", None, "vocab_size: tokenizer 'bpe' needs one"),
        ("bpe", 256, "vocab_size: expected at least 257"),
        ("bpe", 5000, r"vocab_size: the train split has merges for \d+ tokens, got 5000"),
    ],
)
def test_bad_options(tokenizer, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(tokenizer, vocab_size, TEXTS)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer: no file .*gone\.json"):
        build_tokenizer(str(tmp_path / "gone.json"), None, TEXTS)
    with pytest.raises(ValueError, match=r"expected the JSON of a tokenizer, got '\{"):
        BPETokenizer('{"a": 1}')
    with pytest.raises(ValueError, match="'bpe' is fitted on a train split"):
        build_tokenizer("bpe", 280, None)
