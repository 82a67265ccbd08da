"""Load metrics: how evenly the experts are used, from how often each was chosen.

Every function but ``drop_rate`` takes counts n (..., E): the last dimension holds experts, the leading ones a batch
(layers, steps), and the result is (...). fp32 and fp64 stay what they are, half precision becomes fp32, integers fp64.
**Sums first**: add the counts over micro-batches and ranks, then call these. **All K choices count**
(``expert_counts(ids)`` with ids (..., K)): the first choices of a top-2 router alone can read a ``max_load`` of E where
E/2 is the maximum.

Where nothing was routed (Σn = 0) nothing is NaN: shares and measures of imbalance are 0, and so is
``utilization_entropy``, while ``dead_fraction`` and ``never_used_fraction`` are 1. A ``max_load`` of 0 can only mean
that. Gradients are finite there and at perfect balance, too. Values are checked on the CPU only: reading them back
would make an accelerator wait.

Shape legend: E experts, K (in formulas k) distinct experts chosen per token. All results are shares or ratios.

The formulas are standard; ``max_violation`` is the MaxVio of loss-free balancing (arXiv 2408.15664).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry.simplex import entropy, readable, widen


def load_share(counts: Tensor) -> Tensor:
    """Return the load shares ``f = n / Σn``.

    Args:
        counts: (..., E) tokens an expert was chosen for.

    Returns:
        (..., E) shares that sum to 1, each at most 1/k; all 0 at Σn = 0.

    Raises:
        ValueError: no experts, counts that are no real numbers or (checked on the CPU) negative or not finite.
    """
    return _share(_counts(counts))


def max_load(counts: Tensor) -> Tensor:
    """Return ``max(n) / mean(n)``: the busiest expert's load over the fair one.

    Args:
        counts: (..., E) tokens an expert was chosen for.

    Returns:
        (...) ratios in [1, E/k], 1 at perfect balance; 0 at Σn = 0.

    Raises:
        ValueError: see ``load_share``.
    """
    n = _counts(counts)
    return n.amax(dim=-1) / _divisor(n.mean(dim=-1))


def max_violation(counts: Tensor) -> Tensor:
    """Return ``max(n) / mean(n) - 1``: by how much the busiest expert exceeds the fair load.

    Args:
        counts: (..., E) tokens an expert was chosen for.

    Returns:
        (...) ratios in [0, E/k - 1], 0 at perfect balance and at Σn = 0.

    Raises:
        ValueError: see ``load_share``.
    """
    return _excess(_counts(counts)).amax(dim=-1)


def coefficient_of_variation(counts: Tensor) -> Tensor:
    """Return ``std(n) / mean(n)``, the population's standard deviation.

    It has a kink at perfect balance; the gradient there is 0 (the subgradient of least norm), not NaN.

    Args:
        counts: (..., E) tokens an expert was chosen for.

    Returns:
        (...) ratios in [0, √(E/k - 1)], 0 at perfect balance and at Σn = 0.

    Raises:
        ValueError: see ``load_share``.
    """
    return _spread(_excess(_counts(counts)))


def gini(counts: Tensor) -> Tensor:
    """Return the Gini coefficient ``Σ_ij |n_i - n_j| / (2 E Σn)`` of the loads.

    Computed as ``Σ_i i (E - i) (n_(i+1) - n_(i)) / (E Σn)`` over the sorted counts: O(E log E), never negative.

    Args:
        counts: (..., E) tokens an expert was chosen for.

    Returns:
        (...) values in [0, 1 - k/E], 0 at perfect balance and at Σn = 0.

    Raises:
        ValueError: see ``load_share``.
    """
    return _gini(load_share(counts))


def utilization_entropy(counts: Tensor) -> Tensor:
    """Return ``H(f) / log E``, the entropy of the load shares over its maximum.

    Args:
        counts: (..., E) tokens an expert was chosen for.

    Returns:
        (...) values in [log k / log E, 1], 1 at perfect balance and so for E = 1, where nothing can be out of balance;
        0 at Σn = 0.

    Raises:
        ValueError: see ``load_share``.
    """
    return _relative_entropy(load_share(counts))


def dead_fraction(counts: Tensor, below: float = 0.1) -> Tensor:
    """Return the share of experts whose load share is less than ``below / E`` (not differentiable).

    Args:
        counts: (..., E) tokens an expert was chosen for.
        below: the part of the fair share 1/E that counts as alive, in (0, 1].

    Returns:
        (...) values in [0, 1 - 1/E]; 1 at Σn = 0.

    Raises:
        ValueError: ``below`` is not in (0, 1]; see also ``load_share``.
    """
    if not 0 < below <= 1:
        raise ValueError(f"below must be in (0, 1], got {below}")
    return _dead(load_share(counts), below)


def never_used_fraction(counts: Tensor) -> Tensor:
    """Return the share of experts with ``n = 0`` (not differentiable).

    Says something only of counts summed over a window of steps: a small batch leaves healthy experts unused.

    Args:
        counts: (..., E) tokens an expert was chosen for in the window.

    Returns:
        (...) values in [0, 1 - k/E]; 1 at Σn = 0.

    Raises:
        ValueError: see ``load_share``.
    """
    n = _counts(counts)
    return (n == 0).to(n.dtype).mean(dim=-1)


def drop_rate(dropped: Tensor, total: Tensor) -> Tensor:
    """Return ``dropped / total``: the share of (token, choice) pairs that found no room under the experts' capacity.

    Args:
        dropped: (...) pairs that were dropped.
        total: (...) pairs that were routed, the dropped ones included.

    Returns:
        (...) values in [0, 1]; 0 where nothing was routed.

    Raises:
        ValueError: two shapes, values that are no real numbers or (checked on the CPU) negative or not finite, or more
            dropped than routed.
    """
    if dropped.shape != total.shape:
        raise ValueError(f"dropped and total must have one shape, got {tuple(dropped.shape)} and {tuple(total.shape)}")
    lost, routed = amounts("dropped", dropped), amounts("total", total)
    over = lost > routed
    if readable(lost) and bool(over.any()):
        raise ValueError(f"dropped must be at most total, got {lost[over][0]:g} of {routed[over][0]:g}")
    return lost / _divisor(routed)


def load_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Return what is logged of the load (...), by the names of the log; counts (..., E) are checked only once.

    Raises:
        ValueError: see ``load_share``.
    """
    n = _counts(counts)
    share_E, excess_E = _share(n), _excess(n)
    return {
        "max_violation": excess_E.amax(dim=-1),
        "load_cv": _spread(excess_E),
        "load_gini": _gini(share_E),
        "load_entropy": _relative_entropy(share_E),
        "dead_fraction": _dead(share_E),
    }


def _share(n: Tensor) -> Tensor:
    return n / _divisor(n.sum(dim=-1, keepdim=True))


def _spread(excess_E: Tensor) -> Tensor:
    return torch.linalg.vector_norm(excess_E, dim=-1) / math.sqrt(excess_E.shape[-1])


def _gini(share_E: Tensor) -> Tensor:
    num_experts = share_E.shape[-1]
    below = torch.arange(1, num_experts, dtype=share_E.dtype, device=share_E.device)
    gaps = share_E.sort(dim=-1).values.diff(dim=-1)
    return (below * (num_experts - below) * gaps).sum(dim=-1) / num_experts


def _relative_entropy(share_E: Tensor) -> Tensor:
    if share_E.shape[-1] == 1:
        return share_E.squeeze(dim=-1)
    return entropy(share_E) / math.log(share_E.shape[-1])


def _dead(share_E: Tensor, below: float = 0.1) -> Tensor:
    return (share_E < below / share_E.shape[-1]).to(share_E.dtype).mean(dim=-1)


def _excess(n: Tensor) -> Tensor:
    """Return ``(n - mean) / mean`` (..., E): unlike ``n / mean - 1`` it is 0 where nothing was routed."""
    mean = n.mean(dim=-1, keepdim=True)
    return (n - mean) / _divisor(mean)


def _divisor(x: Tensor) -> Tensor:
    """Return x with 1 for 0: the dividend is 0 there, and so is the quotient."""
    return torch.where(x == 0, 1, x)


def _counts(x: Tensor) -> Tensor:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"counts must be (..., E) with at least one expert, got {tuple(x.shape)}")
    return amounts("counts", x)


def amounts(name: str, x: Tensor) -> Tensor:
    """Return x in a floating point that holds it, checked as far as that does not make an accelerator wait."""
    if x.dtype == torch.bool or x.is_complex():
        raise ValueError(f"{name} must be real numbers, got {x.dtype}")
    if readable(x) and x.numel():
        least, most = x.detach().aminmax()  # NaN is both
        if not 0 <= float(least) <= float(most) < math.inf:
            wrong = x[~(x.isfinite() & (x >= 0))]
            raise ValueError(f"{name} must be finite and not negative, got {wrong[0]:g}")
    # fp32 holds integers up to 2^24 only: fewer than the tokens of many windows.
    return widen(x) if x.is_floating_point() else x.double()
