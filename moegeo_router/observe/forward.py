"""What one forward pass of one MoE layer decided.

Shape legend: T tokens, E experts, K chosen experts, D width; ``...`` are leading dimensions whose product is T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Joint:
    """Where gradients are left that shall join those of a router's logits and gates in the backward pass.

    A hook on the logits would do where the model uses them; but a model that uses only what was made of them (and is
    compiled) gives them no gradient to join. So the gates are passed on through an identity that also depends on the
    logits.
    """

    def __init__(self) -> None:
        self.logits: Tensor | None = None
        self.gates: Tensor | None = None
        self.reached: Callable[[], None] = _do_nothing

    def on(self, gates: Tensor, logits: Tensor) -> Tensor:
        """Return the gates, to be used in place of those given."""
        return _Join.apply(gates, logits, self)


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates: Tensor, logits: Tensor, joint: Joint) -> Tensor:
        ctx.joint = joint
        return gates.clone()  # not a view: the model may change it in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (gradient,) = gradients
        joint: Joint = ctx.joint
        joint.reached()
        return gradient if joint.gates is None else gradient + joint.gates.to(gradient), joint.logits, None


def _do_nothing() -> None: ...


@dataclass(frozen=True, kw_only=True)
class LayerForward:
    """One forward pass of one layer; floating point tensors are the very ones the model uses, on its graph.

    Attributes:
        layer: its name.
        logits: (..., E) as the router emitted them.
        ids: (..., K) chosen experts, None where not known.
        gates: (..., K) their weights, None where not known.
        output: (..., D) the block's output, None where not known.
        x: (..., D) what the logits are linear in, None where not known.
        mask: (T,) bool, True where a token counts; None: all do.
        domains: (T,) domain of each token.
        sequences: (T,) a number for each token's sequence.
        recomputed: whether activation checkpointing runs this forward again, inside the backward pass.
        joint: where gradients for logits and gates can be left; None: as hooks on the tensors.

    Raises:
        ValueError: shapes that do not fit.
    """

    layer: str
    logits: Tensor
    ids: Tensor | None = None
    gates: Tensor | None = None
    output: Tensor | None = None
    x: Tensor | None = None
    mask: Tensor | None = None
    domains: Tensor | None = None
    sequences: Tensor | None = None
    recomputed: bool = False
    joint: Joint | None = None

    def __post_init__(self) -> None:
        if self.logits.ndim == 0 or not self.logits.is_floating_point():
            found = f"{self.logits.dtype} {tuple(self.logits.shape)}"
            raise ValueError(f"layer {self.layer}: logits must be floating point (..., E), got {found}")
        for name in ("ids", "gates", "output", "x"):
            self._check(name, getattr(self, name), per_token=True)
        for name in ("mask", "domains", "sequences"):
            self._check(name, getattr(self, name), per_token=False)
        if self.gates is not None and (self.ids is None or self.ids.numel() != self.gates.numel()):
            raise ValueError(f"layer {self.layer}: gates need ids of their shape, got {tuple(self.gates.shape)}")

    @property
    def num_experts(self) -> int:
        """E."""
        return self.logits.shape[-1]

    @property
    def size(self) -> int:
        """T, the masked tokens included."""
        return self.logits.numel() // self.num_experts

    def tokens(self) -> Tensor | int:
        """Return the number of tokens that count."""
        return self.size if self.mask is None else self.mask.sum()

    def _check(self, name: str, values: Tensor | None, per_token: bool) -> None:
        if values is None:
            return
        width = values.shape[-1] if per_token and values.ndim else 1
        if values.numel() != self.size * width or (name == "ids" and (values.is_floating_point() or values.ndim == 0)):
            expected = f"one row for each of the {self.size} tokens" if per_token else f"({self.size},)"
            expected += ", whole numbers" if name == "ids" else ""
            raise ValueError(f"layer {self.layer}: {name} must be {expected}, got {values.dtype} {tuple(values.shape)}")


def flat_tokens(values: Tensor | None, tokens: int, name: str) -> Tensor | None:
    """Return one value for each of ``tokens`` tokens; values (B,), one a sequence, stand for all of its tokens.

    Raises:
        ValueError: values that do not fit.
    """
    if values is None:
        return None
    flat = values.reshape(-1)
    if len(flat) != tokens and (values.ndim != 1 or not len(flat) or tokens % len(flat)):
        raise ValueError(f"{name} {tuple(values.shape)} does not fit the {tokens} tokens a router saw")
    return flat if len(flat) == tokens else flat.repeat_interleave(tokens // len(flat))


def rows(values: Tensor) -> Tensor:
    """Return values (..., n) as (T, n)."""
    return values.reshape(-1, values.shape[-1])


def at_least_1(count: Tensor | int) -> Tensor | int:
    """Return a number of tokens to divide by."""
    return count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1)


def kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return values (T,) or (T, n) with 0 for masked tokens, whatever they hold (NaN included)."""
    if mask is None:
        return values
    return torch.where(mask.reshape(-1, *(1,) * (values.ndim - 1)), values, 0)
