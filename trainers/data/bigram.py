"""The bigram model: the baseline a language model must beat."""

from __future__ import annotations

import torch
from torch import Tensor

# Up to this many cells a table of all pairs is smaller and faster than sorting the pairs (128 MB of int64).
DENSE_CELLS = 2**24
ALPHAS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def pair_counts(tokens: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Count the pairs of neighbouring tokens.

    Args:
        tokens: (N,) ids below ``vocab_size``.
        vocab_size: V.

    Returns:
        (P,) int64 the pairs (a, b) that occur, as a * V + b, ascending; (P,) int64 how often.
    """
    pairs = tokens[:-1].long() * vocab_size + tokens[1:]
    if vocab_size**2 > DENSE_CELLS:
        unique, counts = torch.unique(pairs, return_counts=True)
        return unique, counts
    table = torch.bincount(pairs)
    unique = table.nonzero().squeeze(1)
    return unique, table[unique]


def bigram_loss(train: Tensor, inputs: Tensor, targets: Tensor, vocab_size: int) -> tuple[float, float]:
    """Held-out cross-entropy of the add-α bigram model fitted on ``train``.

    p(b | a) = (c(a, b) + α) / (c(a) + α V), with c(a) = Σ_b c(a, b). α is the one of ``ALPHAS`` with the best
    leave-one-out likelihood on the train pairs, Σ c(a, b) log((c(a, b) - 1 + α) / (c(a) - 1 + α V)): nothing
    held out is looked at.

    Args:
        train: (N,) the train split's tokens.
        inputs: (M,) int64 held-out tokens.
        targets: (M,) int64 the tokens that follow them.
        vocab_size: V.

    Returns:
        (mean loss in nats a target, α).
    """
    pairs, counts = pair_counts(train, vocab_size)
    counts = counts.double()
    totals = torch.zeros(vocab_size, dtype=torch.double).index_add_(0, pairs // vocab_size, counts)
    row_totals = totals[pairs // vocab_size]

    def leave_one_out(alpha: float) -> float:
        kept = (counts - 1 + alpha) / (row_totals - 1 + alpha * vocab_size)
        return float((counts * kept.log()).sum())

    alpha = max(ALPHAS, key=leave_one_out)
    wanted = inputs * vocab_size + targets
    place = torch.searchsorted(pairs, wanted).clamp(max=len(pairs) - 1)
    seen = torch.where(pairs[place] == wanted, counts[place], 0.0)
    probability = (seen + alpha) / (totals[inputs] + alpha * vocab_size)
    return float(-probability.log().mean()), alpha
