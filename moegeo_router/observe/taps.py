"""Taps: hooks on a model's MoE layers that hand over what a forward pass decided, without changing it.

Shape legend: T tokens (any leading dimensions), E experts, K chosen experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..routers.experts import Experts
from ..routers.find import RouterSite
from .forward import Joint, LayerForward
from .hooks import Failed, Hook, recomputing
from .tokens import TokenTap

#: What receives a forward pass; ``ids`` and ``gates`` are still missing where no output or input showed them.
Sink = Callable[[LayerForward], None]


class LayerTap:
    """Forward hooks on one MoE layer: every training forward is handed over once, when its block returns.

    Tensors are told apart by shape and type, never by position, because code bases and their versions order them
    differently. Of the router's outputs, floating point (..., E) are the logits (where several could be, the one
    nearest to ``x Wᵀ + b``, found once), integers (..., K) with K < E the chosen experts, floating point of their shape
    the gates. What the router does not return is looked for in the inputs of the experts. Eval mode is not seen. A
    forward that activation checkpointing runs again is seen only where the first one left no graph (reentrant
    checkpointing), marked as ``recomputed``.

    Args:
        site: the router.
        block: the module around router and experts; None: a forward is handed over when the router returns.
        experts: the experts, if known.
        tokens: says which tokens count.
        sink: what receives each forward pass.
        failed: what is done with an error of the hooks.
        active: whether anything is to be seen now.
        join: gates that the router returns are passed on so that gradients can join them (``Joint``).
    """

    def __init__(
        self,
        site: RouterSite,
        block: nn.Module | None,
        experts: Experts | None,
        tokens: TokenTap,
        sink: Sink,
        failed: Failed,
        active: Callable[[], bool],
        join: bool = False,
    ) -> None:
        self.site, self.experts = site, experts
        self._tokens, self._sink, self._active, self._join = tokens, sink, active, join
        self._which: int | None = None
        self._inside = False
        self._had_graph = False
        self._seen: dict[str, Any] | None = None
        self._handles = [site.module.register_forward_hook(Hook(self._router, failed))]
        if block is not None:
            self._handles.append(block.register_forward_pre_hook(Hook(self._open, failed)))
            self._handles.append(block.register_forward_hook(Hook(self._close, failed)))
        if experts is not None and _is_called(experts.container) and experts.container is not block:
            hook = Hook(self._experts, failed)
            self._handles.append(experts.container.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    @property
    def current(self) -> dict[str, Any] | None:
        """What the forward pass that is running has shown so far, None outside of one."""
        return self._seen

    def _open(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._inside, self._seen = True, None

    def _router(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        if not module.training or not self._active():
            return None
        self._flush(None)  # a block that calls its router in chunks
        tensors = list(_tensors(output))
        logits = self._logits(tensors, inputs)
        again = recomputing()
        if again and self._had_graph:
            return None  # the hooks of the first forward see this backward pass
        if not again:
            self._had_graph = logits.requires_grad
        tokens = logits.numel() // self.site.num_experts
        known = self._tokens.of_layer(self.site.name, tokens, again)
        self._seen = {"logits": logits, "recomputed": again} | known | self._choices(tensors, tokens)
        output = self._joined(output)
        if not self._inside:
            self._flush(None)
        return output

    def _joined(self, output: Any) -> Any:
        """Pass the gates on through a ``Joint`` and return the output with them, None where there is nothing to do."""
        seen = self._seen or {}
        gates = seen.get("gates")
        if not self._join or gates is None or not seen["logits"].requires_grad or not isinstance(output, tuple | list):
            return None
        joint = Joint()
        seen |= {"gates": joint.on(gates, seen["logits"]), "joint": joint}
        items = [seen["gates"] if item is gates else item for item in output]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)

    def _experts(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._seen is not None and self._seen.get("ids") is None:
            tokens = self._seen["logits"].numel() // self.site.num_experts
            self._seen |= self._choices(list(_tensors((*args, *kwargs.values()))), tokens)

    def _close(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._inside = False
        self._flush(output)

    def _flush(self, output: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is not None:
            tokens = seen["logits"].numel() // self.site.num_experts
            fitting = (t for t in _tensors(output) if t.is_floating_point() and t.numel() == tokens * t.shape[-1])
            self._sink(LayerForward(layer=self.site.name, output=next(fitting, None), **seen))

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

    def _choices(self, tensors: Sequence[Tensor], tokens: int) -> dict[str, Tensor]:
        experts = self.site.num_experts
        for ids in tensors:
            integers = not ids.is_floating_point() and ids.dtype != torch.bool and ids.ndim
            if integers and ids.shape[-1] < experts and ids.numel() == tokens * ids.shape[-1]:
                gates = next((t for t in tensors if t.is_floating_point() and t.shape == ids.shape), None)
                return {"ids": ids} if gates is None else {"ids": ids, "gates": gates}
        return {}


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList) and type(module).forward is not nn.Module.forward


def _tensors(value: Any) -> Iterable[Tensor]:
    """Yield the tensors of a module's output: one, or those in a tuple, a list, a mapping or a dataclass."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
