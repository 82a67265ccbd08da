"""Windows, labels and splits of text against naive per-token oracles."""

import itertools
import math
from dataclasses import fields

import pytest
import torch

from trainers.data.base import Batch
from trainers.data.documents import Document
from trainers.data.text import TextData, TokenStream, spread_windows

NAMES = [f.name for f in fields(Batch)]


def documents(count=30, domains=("beta", "alpha", "gamma"), prefix=""):
    """Documents of 1 to 24 bytes, domains mixed."""
    return [
        Document(f"{prefix}{i:02d}" * (i % 12 + 1), domains[i % len(domains)], f"{prefix}{i}") for i in range(count)
    ]


def data(**options):
    options = {"length": 16, "batch_size": 4, "seed": 1, "valid_tokens": None} | options
    return TextData("toy", documents(60), documents(14, prefix="v"), **options)


def oracle(corpus, names):
    """(token, domain, document) of every position of a byte-level stream, one by one."""
    return [
        (byte, names.index(document.domain), number)
        for number, document in enumerate(corpus)
        for byte in [*str(document.text).encode(), 0]
    ]


def equal(one, two):
    return all(torch.equal(getattr(one, name), getattr(two, name)) for name in NAMES)


def check_rows(batch, stream):
    """Every unmasked position has its token, its labels and the next token, all at one place of the stream."""
    tokens = [token for token, _, _ in stream]
    for row in range(len(batch.inputs)):
        size = int(batch.mask[row].sum())
        inputs = batch.inputs[row, :size].tolist()
        wanted = list(zip(inputs, batch.domains[row].tolist(), batch.documents[row].tolist(), strict=False))[:size]
        places = [p for p in range(len(stream) - size) if stream[p : p + size] == wanted]
        assert any(tokens[p + 1 : p + 1 + size] == batch.targets[row, :size].tolist() for p in places)


def test_train_batches_against_the_naive_stream():
    made = data()
    stream = oracle(documents(60), ["alpha", "beta", "gamma"])
    assert made.domains == ("alpha", "beta", "gamma")
    for step in range(20):
        batch = made.train_batch(step)
        assert batch.mask.all()
        assert batch.inputs.shape == batch.targets.shape == batch.domains.shape == batch.documents.shape == (4, 16)
        assert {getattr(batch, n).dtype for n in NAMES if n != "mask"} == {torch.int64}
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        check_rows(batch, stream)


def test_every_window_of_train_is_drawn():
    made = TextData("toy", [Document("abcdefg", "d", "0")], documents(6), length=6, batch_size=64)  # 8 tokens
    rows = {bytes([*inputs, targets[-1]]) for step in range(5) for inputs, targets in windows(made.train_batch(step))}
    assert rows == {b"abcdefg", b"bcdefg\0"}


def windows(batch):
    return zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True)


def test_a_batch_is_a_function_of_seed_and_step():
    made, again = data(), data()
    expected = made.train_batch(7)
    for step in (0, 7, 3):
        again.train_batch(step)
    torch.manual_seed(123)
    assert equal(made.train_batch(7), expected)
    assert equal(again.train_batch(7), expected)
    others = [made.train_batch(step).inputs for step in range(20) if step != 7] + [data(seed=2).train_batch(7).inputs]
    assert not any(torch.equal(inputs, expected.inputs) for inputs in others)


def test_the_whole_valid_split_is_shown_once():
    made = data()
    corpus = sorted(documents(14, prefix="v"), key=lambda d: d.domain)
    stream = oracle(corpus, ["alpha", "beta", "gamma"])
    batches = list(made.valid_batches())
    assert {b.inputs.shape for b in batches} == {(4, 16)}
    pairs = [
        (*labels, target)
        for b in batches
        for *labels, target, real in zip(
            *(getattr(b, n).flatten().tolist() for n in ("inputs", "domains", "documents", "targets", "mask")),
            strict=True,
        )
        if real
    ]
    assert pairs == [(*here, after[0]) for here, after in itertools.pairwise(stream)]


def test_padding_is_masked_and_zero():
    made = data(length=15)
    last = list(made.valid_batches())[-1]
    total = sum(len(d.data) + 1 for d in documents(14, prefix="v")) - 1
    assert 0 < int(last.mask.sum()) < 15 + 15
    assert sum(int(b.mask.sum()) for b in made.valid_batches()) == total
    for name in NAMES:
        assert not getattr(last, name)[~last.mask].any()


def test_valid_is_the_same_every_time():
    made = data(valid_tokens=40)
    assert all(
        equal(a, b) for a, b in zip(made.valid_batches(), data(valid_tokens=40, seed=9).valid_batches(), strict=True)
    )
    assert all(equal(a, b) for a, b in zip(made.valid_batches(), made.valid_batches(), strict=True))


def test_a_limited_validation_covers_every_domain_in_proportion():
    corpus = [Document("x" * 6000, "big", "0"), Document("y" * 3000, "mid", "0"), Document("z" * 40, "tiny", "0")]
    made = TextData("toy", corpus, corpus, length=10, batch_size=8, valid_tokens=900)
    count = torch.zeros(3, dtype=torch.long)
    for batch in made.valid_batches():
        count += torch.bincount(batch.domains[batch.mask], minlength=3)
    big, mid, tiny = count.tolist()
    assert 0 < tiny <= 41
    assert big == pytest.approx(2 * mid, rel=0.05)
    assert 800 <= big + mid + tiny <= 900 + 3 * 10


def test_limited_windows_are_spread_evenly_without_overlap():
    stream = TokenStream.of([torch.zeros(999, dtype=torch.uint8)], [0], 0)
    first = spread_windows(stream, 10, 100)
    assert first.tolist() == [0, 100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert spread_windows(stream, 10, 999).tolist() == list(range(0, 999, 10))
    assert spread_windows(stream, 10, None).tolist() == list(range(0, 999, 10))


def test_windows_at_the_end_of_a_stream_by_hand():
    stream = TokenStream.of([torch.tensor([5, 6]), torch.tensor([7])], [1, 0], 9)  # 5 6 9 7 9
    batch = stream.windows(torch.tensor([2, 4]), 3)
    assert batch.inputs.tolist() == [[9, 7, 0], [0, 0, 0]]
    assert batch.targets.tolist() == [[7, 9, 0], [0, 0, 0]]
    assert batch.mask.tolist() == [[True, True, False], [False] * 3]
    assert batch.domains.tolist() == [[1, 0, 0], [0, 0, 0]]
    assert batch.documents.tolist() == [[0, 1, 0], [0, 0, 0]]


def test_the_baseline_is_on_the_targets_shown():
    """Against a loop over the batches with a dictionary."""
    made = data(valid_tokens=64)
    baseline = made.baseline()
    alpha = float(baseline.name.removeprefix("bigram, add-"))
    stream = [token for token, _, _ in oracle(documents(60), ["alpha", "beta", "gamma"])]
    pairs = list(itertools.pairwise(stream))
    losses = [
        -math.log((pairs.count((a, b)) + alpha) / (stream[:-1].count(a) + alpha * 256))
        for batch in made.valid_batches()
        for a, b in zip(batch.inputs[batch.mask].tolist(), batch.targets[batch.mask].tolist(), strict=True)
    ]
    assert baseline.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)


def test_the_fingerprint_changes_with_content_only():
    base = data().fingerprint
    assert len(base) == 64
    assert {data(seed=5).fingerprint, data(batch_size=2, length=8, valid_tokens=32).fingerprint} == {base}
    train, valid = documents(60), documents(14, prefix="v")
    changed = [Document("x" + str(train[0].text)[1:], train[0].domain, train[0].name), *train[1:]]
    moved = [Document(train[0].text, train[1].domain, "0 moved"), *train[1:]]
    merged = [Document(f"{train[0].text}{train[1].text}", train[0].domain, "m"), *train[2:]]
    others = [
        TextData("toy", t, v, length=16)
        for t, v in ((changed, valid), (moved, valid), (merged, valid), (train, valid[1:]))
    ]
    assert len({base, *(other.fingerprint for other in others)}) == 5


def test_data_without_train():
    made = TextData("wikitext2", None, documents(14), length=16)
    message = (
        "wikitext2 has no train split: train with data=enwiki, then "
        "`python -m trainers.evaluate run=RUN data=wikitext2`"
    )
    for call in (lambda: made.train_batch(0), made.baseline):
        with pytest.raises(ValueError, match="no train split") as error:
            call()
        assert str(error.value) == message
    assert "no train split" in made.describe()
    assert next(made.valid_batches()).mask.any()


def test_describe_is_one_line_with_the_sizes():
    line = data().describe()
    total = sum(len(d.data) + 1 for d in documents(60))
    assert line.startswith(f"toy: {total:,} tokens train, ")
    assert "3 domains" in line
    assert "\n" not in line


def test_to_moves_every_field():
    moved = data().train_batch(0).to("meta")
    assert {getattr(moved, name).device.type for name in NAMES} == {"meta"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"batch_size": 2.0}, r"batch_size: expected an integer >= 1, got 2\.0"),
        ({"batch_size": True}, "batch_size: expected an integer >= 1, got True"),
        ({"length": 0}, "length: expected an integer >= 1, got 0"),
        ({"length": -3}, "length: expected an integer >= 1, got -3"),
        ({"seed": -1}, "seed: expected an integer >= 0, got -1"),
        ({"valid_tokens": 0}, "valid_tokens: expected an integer >= 1, got 0"),
        ({"valid_tokens": 15}, "valid_tokens: expected at least one window of length 16, got 15"),
        ({"length": 5000}, "length: expected less than the 840 tokens of toy's train split, got 5000"),
        ({"length": 500}, r"length: expected less than the \d+ tokens of toy's valid split, got 500"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        data(**options)


def test_bad_documents_and_steps():
    with pytest.raises(ValueError, match="got byte 0 in 'n' of domain 'd'"):
        TextData("toy", [Document("a\0b", "d", "n")], documents())
    with pytest.raises(ValueError, match="length: expected less than the 0 tokens of toy's train split"):
        TextData("toy", [], documents())
    for step in (-1, 1.5):
        with pytest.raises(ValueError, match="step: expected an integer >= 0"):
            data().train_batch(step)
