"""The baseline against dictionaries, and against the entropy of sources known in closed form."""

import itertools
import math
import random
from collections import Counter

import pytest
import torch

from trainers.data import bigram
from trainers.data.bigram import ALPHAS, bigram_loss, pair_counts
from trainers.data.planted import PlantedText


def naive(train, inputs, targets, vocab):
    pairs, singles = Counter(itertools.pairwise(train)), Counter(train[:-1])
    scores = {}
    for alpha in ALPHAS:
        scores[alpha] = 0.0
        for a, b in itertools.pairwise(train):
            scores[alpha] += math.log((pairs[a, b] - 1 + alpha) / (singles[a] - 1 + alpha * vocab))
    alpha = max(ALPHAS, key=lambda alpha: scores[alpha])
    losses = [
        -math.log((pairs[a, b] + alpha) / (singles[a] + alpha * vocab)) for a, b in zip(inputs, targets, strict=True)
    ]
    return sum(losses) / len(losses), alpha


@pytest.mark.parametrize("dense_cells", [2**24, 0])
@pytest.mark.parametrize(("vocab", "size"), [(3, 500), (20, 300), (50, 60)])
def test_against_dictionaries(monkeypatch, dense_cells, vocab, size):
    monkeypatch.setattr(bigram, "DENSE_CELLS", dense_cells)
    source = random.Random(vocab)
    train = [min(source.randrange(vocab), source.randrange(vocab)) for _ in range(size)]
    inputs, targets = ([source.randrange(vocab) for _ in range(80)] for _ in range(2))  # unseen pairs included
    expected = naive(train, inputs, targets, vocab)
    loss, alpha = bigram_loss(torch.tensor(train).byte(), torch.tensor(inputs), torch.tensor(targets), vocab)
    assert alpha == expected[1]
    assert loss == pytest.approx(expected[0], rel=1e-12)


def test_alpha_is_the_leave_one_out_choice():
    """A text on which forgetting to leave the pair out of its row's total picks another α."""
    train = [0, 0, 0, 0, 1, 0, 3, 0, 0, 0, 0, 1]
    assert naive(train, [0], [0], 5)[1] == 0.3
    assert bigram_loss(torch.tensor(train), torch.tensor([0]), torch.tensor([0]), 5)[1] == 0.3


def test_pairs_by_hand():
    pairs, counts = pair_counts(torch.tensor([0, 1, 0, 1, 2], dtype=torch.uint8), 3)
    assert dict(zip(pairs.tolist(), counts.tolist(), strict=True)) == {0 * 3 + 1: 2, 1 * 3 + 0: 1, 1 * 3 + 2: 1}


def test_bytes_do_not_wrap_around():
    pairs, _ = pair_counts(torch.tensor([200, 255], dtype=torch.uint8), 256)
    assert pairs.tolist() == [200 * 256 + 255]


def test_reaches_the_entropy_rate_of_one_markov_source():
    data = PlantedText(
        sources=1,
        alphabet=8,
        concentration=0.5,
        documents=200,
        document_length=4000,
        valid_fraction=0.2,
        valid_tokens=None,
    )
    # What is not a symbol after a symbol: one end and one first symbol in 4,000 tokens.
    assert data.baseline().loss == pytest.approx(data.entropy(), abs=0.01)


def test_the_pooled_bigram_stays_above_the_entropy_rate_of_many_sources():
    data = PlantedText(sources=4, documents=400, concentration=0.1)
    assert data.entropy() + 0.3 < data.baseline().loss < math.log(32)
