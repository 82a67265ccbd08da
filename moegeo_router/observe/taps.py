"""Taps: hooks on a model's routers that hand over what a forward pass decided, without changing it.

Shape legend: T tokens (any leading dimensions), E experts, K chosen experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routers.find import RouterSite

#: What receives a forward pass: (layer, logits (..., E), ids (..., K) or None).
Sink = Callable[[str, Tensor, Tensor | None], None]


class RouterTap:
    """A forward hook on one router: every training forward is seen once.

    Not seen: eval mode, and the recomputation of activation checkpointing (which runs inside a backward pass). Outputs
    are told apart by shape and type, never by position, because code bases and their versions order them differently:
    floating point (..., E) are the logits, integers (..., K) with K < E the chosen experts. Where several outputs could
    be the logits, the one nearest to ``x Wᵀ + b`` is taken, found once.

    Args:
        site: the router.
        sink: what receives each forward pass.
    """

    def __init__(self, site: RouterSite, sink: Sink) -> None:
        self.site, self._sink = site, sink
        self._which: int | None = None
        self._handle = site.module.register_forward_hook(self._hook)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _hook(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if module.training and not recomputing():
            tensors = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
            logits = self._logits(tensors, inputs)
            self._sink(self.site.name, logits.detach(), self._ids(tensors, logits))

    def _logits(self, tensors: Sequence[Tensor], inputs: tuple[Any, ...]) -> Tensor:
        experts = self.site.num_experts
        found = [t for t in tensors if t.is_floating_point() and t.ndim and t.shape[-1] == experts]
        if not found:
            shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in tensors) or "no tensor"
            raise ValueError(f"router {self.site.name} returned no logits (..., {experts}): {shapes}")
        if len(found) > 1 and self._which is None:
            self._which = self._nearest(found, inputs)
        return found[self._which or 0]

    @torch.no_grad()
    def _nearest(self, found: Sequence[Tensor], inputs: tuple[Any, ...]) -> int:
        bias = getattr(self.site.projection, "bias", None)
        x = inputs[0].detach().float().reshape(-1, self.site.in_features)
        z = F.linear(x, self.site.weight.float(), None if bias is None else bias.float())
        return min(range(len(found)), key=lambda i: float((found[i].float().reshape(z.shape) - z).abs().mean()))

    def _ids(self, tensors: Sequence[Tensor], logits: Tensor) -> Tensor | None:
        for tensor in tensors:
            integers = not tensor.is_floating_point() and tensor.dtype != torch.bool
            if integers and tensor.shape[:-1] == logits.shape[:-1] and tensor.shape[-1] < logits.shape[-1]:
                return tensor
        return None


class MaskTap:
    """Holds the attention mask of the model's forward while it runs: True where a token is real.

    Args:
        model: a module that may be called with ``attention_mask=`` (B, L).
    """

    def __init__(self, model: nn.Module) -> None:
        self.mask: Tensor | None = None
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def for_tokens(self, logits: Tensor) -> Tensor | None:
        """Return the mask in the shape of the tokens of ``logits`` (..., E), None without a mask.

        Raises:
            ValueError: the mask is for another number of tokens.
        """
        if self.mask is None:
            return None
        tokens = logits.shape[:-1]
        if self.mask.numel() != tokens.numel():
            raise ValueError(
                f"attention_mask {tuple(self.mask.shape)} does not fit the {tokens.numel()} tokens a router saw: "
                "pass the mask with record(mask=...)"
            )
        return self.mask.reshape(tokens)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        # Only a padding mask (B, L) says which tokens are real; (B, H, L, L) says who sees whom.
        self.mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.mask = None


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass: activation checkpointing computing again what was counted."""
    # The autograd engine's task id is the only sign both kinds of checkpointing give; the compiler cannot trace it, and
    # traces a checkpointed region once, so there it is not needed.
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
