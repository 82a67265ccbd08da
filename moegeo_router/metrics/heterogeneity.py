"""The Fisher Heterogeneity Score: how unevenly the learning signal is spread over the experts.

Every function takes the experts' empirical Fisher traces t (..., E), ``t_e ∝ Σ_{t routed to e} ‖∂L/∂θ_e⁽ᵗ⁾‖²``: the
last dimension holds experts, the leading ones a batch (layers, steps), and the result is (...). fp64 stays, all else is
computed in fp32. A factor common to all experts (the scale of the loss) cancels, whatever its size.

**A reconstruction [ours].** FI (arXiv 2604.14500, its abstract) reports that FHS > 1 at 10% of training predicts
failure; how its score is computed is known at second hand only. Ours is the coefficient of variation of the traces, so
``FHS² = E/PR - 1`` and **FHS > 1 ⇔ the signal lives in fewer than E/2 effective experts**. That is no alarm by itself:
in the first 10% of short runs healthy routers are above 1, too. A threshold needs warm-up, smoothing and calibration on
runs of its own kind, and noise in the traces biases FHS up. Never compare values of two estimators of t.

Where there is no signal (Σt = 0) every function is NaN: 0 would read as perfect health. NaN traces give NaN. The
gradient is finite wherever Σt > 0. Values are checked on the CPU only: reading them back would make an accelerator
wait.

Shape legend: E experts. All results are pure numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..geometry.simplex import readable, widen
from .load import amounts

#: An expert with at least this part of the fair load 1/E is chosen; with less than that of the signal it is starved.
CHOSEN, STARVED = 0.5, 0.1


def fhs(traces: Tensor) -> Tensor:
    """Return the Fisher Heterogeneity Score ``std_e(t) / mean_e(t)`` of the population [ours, a reconstruction].

    k equal survivors of E read √(E/k - 1). As a regularizer use ``fhs_squared``: the score itself has a kink at equal
    traces (the gradient there is 0, the subgradient of least norm).

    Args:
        traces: (..., E) Fisher traces, not negative.

    Returns:
        (...) values in [0, √(E-1)]: 0 for equal traces, above 1 where fewer than E/2 effective experts learn; NaN at
        Σt = 0.

    Raises:
        ValueError: no experts, traces that are not floating point or (checked on the CPU) negative.
    """
    return _fhs(_traces(traces))


def fhs_squared(traces: Tensor) -> Tensor:
    """Return ``FHS² = E Σt² / (Σt)² - 1`` [ours, a reconstruction], smooth wherever Σt > 0: the regularizer's form.

    Computed as ``mean_e (t_e / mean(t) - 1)²``, which neither cancels near 0 nor squares a trace (1e-25² is 0 in fp32).

    Args:
        traces: (..., E) Fisher traces, not negative.

    Returns:
        (...) values in [0, E - 1]; NaN at Σt = 0.

    Raises:
        ValueError: see ``fhs``.
    """
    return _excess(_traces(traces)).square().mean(dim=-1)


def participation_ratio(traces: Tensor) -> Tensor:
    """Return ``PR = (Σt)² / Σt²``, the effective number of experts that learn; ``PR = E / (1 + FHS²)``.

    Args:
        traces: (..., E) Fisher traces, not negative.

    Returns:
        (...) values in [1, E]: k for k equal survivors; NaN at Σt = 0.

    Raises:
        ValueError: see ``fhs``.
    """
    t = _traces(traces)
    share_E = t / t.sum(dim=-1, keepdim=True)
    return 1 / share_E.square().sum(dim=-1)


def fhs_per_token(traces: Tensor, tokens: Tensor, rare: float = 1) -> Tensor:
    """Return ``std_e(r) / mean_e(r)`` of ``r_e = t_e / (n_e / Σn)``: the signal's strength per token, not its exposure.

    A reconstruction [ours], like ``fhs``. Rare experts are omitted, as r_e of a handful of tokens is noise; std and
    mean run over the K experts that remain. So it is **blind to collapse**: where one expert takes all the tokens it
    is alone, and reads 0. Read it beside ``fhs`` and the load, never instead.

    Args:
        traces: (..., E) Fisher traces, not negative.
        tokens: (..., E) tokens n that each trace is a sum over.
        rare: experts with fewer tokens than this are omitted; positive.

    Returns:
        (...) values in [0, √(K-1)], K the experts that remain; NaN where none does or their traces are all 0. The
        gradient with respect to the traces of omitted experts is 0.

    Raises:
        ValueError: ``tokens`` not of the shape of ``traces`` or (checked on the CPU) negative or not finite, ``rare``
            not positive; see also ``fhs``.
    """
    if tokens.shape != traces.shape:
        raise ValueError(f"tokens must be {tuple(traces.shape)}, got {tuple(tokens.shape)}")
    if not rare > 0:
        raise ValueError(f"rare must be positive, got {rare}")
    return _fhs_per_token(_traces(traces), amounts("tokens", tokens), rare)


def starved_fraction(traces: Tensor, counts: Tensor) -> Tensor:
    """Return the share of experts that are chosen, ``n_e/Σn ≥ 0.5/E``, but starved, ``t_e/Σt < 0.1/E`` [ours].

    They take their tokens and learn nothing from them: neither the load nor ``fhs`` alone tells them from experts that
    nobody chooses. Not differentiable.

    Args:
        traces: (..., E) Fisher traces, not negative.
        counts: (..., E) tokens n an expert was chosen for.

    Returns:
        (...) values in [0, 1 - 1/E]; 0 at Σn = 0, NaN at Σt = 0.

    Raises:
        ValueError: ``counts`` not of the shape of ``traces`` or (checked on the CPU) negative or not finite; see also
            ``fhs``.
    """
    if counts.shape != traces.shape:
        raise ValueError(f"counts must be {tuple(traces.shape)}, got {tuple(counts.shape)}")
    return _starved(_traces(traces), amounts("counts", counts))


def signal_metrics(traces: Tensor, counts: Tensor) -> dict[str, Tensor]:
    """Return what is logged of the traces (...), by the names of the log; traces and counts are checked only once.

    Raises:
        ValueError: see ``starved_fraction``.
    """
    t, n = _traces(traces), amounts("counts", counts)
    return {"fhs": _fhs(t), "fhs_per_token": _fhs_per_token(t, n), "starved_fraction": _starved(t, n)}


def _fhs(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(_excess(t), dim=-1) / math.sqrt(t.shape[-1])


def _fhs_per_token(t: Tensor, n: Tensor, rare: float = 1) -> Tensor:
    kept = n >= rare
    # Both sides of the quotient are masked: an omitted 0/0 would still put NaN in the gradient.
    share_E = torch.where(kept, n / n.sum(dim=-1, keepdim=True), 1).to(t.dtype)
    strength_E = torch.where(kept, t, 0) / share_E
    count = kept.sum(dim=-1, keepdim=True, dtype=t.dtype)
    mean = strength_E.sum(dim=-1, keepdim=True) / count
    excess_E = torch.where(kept, (strength_E - mean) / mean, 0)
    return torch.linalg.vector_norm(excess_E, dim=-1) / count.squeeze(dim=-1).sqrt()


def _starved(t: Tensor, n: Tensor) -> Tensor:
    fair, total, tokens = 1 / t.shape[-1], t.sum(dim=-1, keepdim=True), n.sum(dim=-1, keepdim=True)
    starved = (n > 0) & (n >= CHOSEN * fair * tokens) & (t < STARVED * fair * total)
    return torch.where(total.squeeze(dim=-1) > 0, starved.to(t.dtype).mean(dim=-1), torch.nan)


def _excess(t: Tensor) -> Tensor:
    mean = t.mean(dim=-1, keepdim=True)
    return (t - mean) / mean


def _traces(traces: Tensor) -> Tensor:
    if traces.ndim == 0 or traces.shape[-1] == 0:
        raise ValueError(f"traces must be (..., E) with at least one expert, got {tuple(traces.shape)}")
    if not traces.is_floating_point():
        raise ValueError(f"traces must be floating point, got {traces.dtype}")
    if readable(traces) and bool((traces < 0).any()):
        raise ValueError(f"traces must not be negative, got {traces[traces < 0][0]:g}")
    return widen(traces)
