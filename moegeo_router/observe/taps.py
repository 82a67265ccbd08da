"""Taps: hooks on a model's MoE layers that hand over what a forward pass decided, without changing it.

Shape legend: T tokens (any leading dimensions), E experts, K chosen experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from ..routers.experts import Experts
from ..routers.find import RouterSite
from .choices import ChoicesFinder
from .forward import Joint, LayerForward
from .hooks import Failed, Hook, recomputing
from .logits import LogitsFinder
from .tokens import TokenTap

#: What receives a forward pass; ``ids`` and ``gates`` are still missing where no output or input showed them.
Sink = Callable[[LayerForward], None]


class LayerTap:
    """Forward hooks on one MoE layer: every training forward is handed over once, when its block returns.

    Tensors are told apart by shape and value, never by position, because code bases and their versions order them
    differently. Of the router's outputs, floating point (..., E) are the logits: of several the one nearest to
    ``x Wᵀ + b``, and where all are scores instead (in [0, 1], unlike ``x Wᵀ + b``) the logits are computed; this is
    found out once. Integers (..., K) are the chosen experts, floating point of their shape the gates, see
    ``ChoicesFinder``. What the router does not return is looked for in the inputs of the experts. The output is what
    the gates weigh: that of stacked experts that are called with them, else that of the block (which may be a whole
    decoder layer, norms included). Not seen: eval mode and forwards under ``no_grad``. A forward that activation
    checkpointing runs again is seen only where the first one left no graph (reentrant checkpointing), marked as
    ``recomputed``.

    Args:
        site: the router.
        block: the module around router and experts; None: a forward is handed over when the router returns.
        experts: the experts, if known.
        tokens: says which tokens count.
        sink: what receives each forward pass.
        failed: what is done with an error of the hooks.
        counts: whether a forward is to be seen now; asked with whether it is one of training.
        join: gates that the router returns are passed on so that gradients can join them (``Joint``).
        exclusive: whether another watch of the router is to be refused.
    """

    def __init__(
        self,
        site: RouterSite,
        block: nn.Module | None,
        experts: Experts | None,
        tokens: TokenTap,
        sink: Sink,
        failed: Failed,
        counts: Callable[[bool], bool],
        join: bool = False,
        exclusive: bool = True,
    ) -> None:
        self.site, self.experts = site, experts
        self._tokens, self._sink, self._counts, self._join = tokens, sink, counts, join
        self._finder = LogitsFinder(site)
        self._returned, self._passed = ChoicesFinder(site), ChoicesFinder(site)  # by the router; to the experts
        self._inside = False
        self._had_graph = False
        self._experts_mix = False  # the experts return the sum that the gates weigh
        self._seen: dict[str, Any] | None = None
        hook = Hook(self._router, failed, exclusive)
        self._handles = [site.module.register_forward_hook(hook, with_kwargs=True)]
        linear = site.adapter or site.projection  # what an adapter adds is part of the logits
        if site.module not in (linear, site.projection):
            self._handles.append(linear.register_forward_hook(Hook(self._projected, failed)))
        if block is not None:
            self._handles.append(block.register_forward_pre_hook(Hook(self._open, failed)))
            self._handles.append(block.register_forward_hook(Hook(self._close, failed)))
        if experts is not None and _is_called(experts.container) and experts.container is not block:
            hook = Hook(self._experts, failed)
            self._handles.append(experts.container.register_forward_pre_hook(hook, with_kwargs=True))
            self._handles.append(experts.container.register_forward_hook(Hook(self._experts_left, failed)))

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

    def _projected(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor) and inputs and isinstance(inputs[0], Tensor):
            self._finder.projected = inputs[0], output

    def _router(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        again = recomputing()
        if not self._counts(module.training and (again or self._tokens.trained)):
            self._finder.projected = None
            return None
        self._flush(None)  # a block that calls its router in chunks
        tensors, inputs = list(tensors_in(output)), (*args, *kwargs.values())
        logits, x = self._finder.find(tensors, inputs), self._finder.input(inputs)
        self._finder.projected = None
        if again and self._had_graph:
            return None  # the hooks of the first forward see this backward pass
        if not again:
            self._had_graph = logits.requires_grad
        tokens = logits.numel() // self.site.num_experts
        known = self._tokens.of_layer(self.site.name, tokens, again)
        x = x if x is not None and x.numel() == tokens * x.shape[-1] else None
        self._seen = {"logits": logits, "x": x, "recomputed": again} | known | self._returned.find(tensors, logits)
        output = self._joined(output)
        # A checkpointed layer that is the block itself does not close when it runs again: its experts do.
        if not self._inside and not (again and self._experts_mix):
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
            self._seen |= self._passed.find(list(tensors_in((*args, *kwargs.values()))), self._seen["logits"])

    def _experts_left(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if self._seen is None:
            return
        if self._seen.get("gates") is not None:
            self._seen["output"] = self._output(list(tensors_in(output)), self._seen["logits"])
            self._experts_mix = self._seen["output"] is not None
        if not self._inside:
            self._flush(None)

    def _close(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._inside = False
        self._flush(output)

    def _flush(self, output: Any) -> None:
        seen, self._seen = self._seen, None
        if seen is not None:
            if seen.get("output") is None:
                seen["output"] = self._output(list(tensors_in(output)), seen["logits"])
            self._sink(LayerForward(layer=self.site.name, **seen))

    def _output(self, tensors: Sequence[Tensor], logits: Tensor) -> Tensor | None:
        """Return the block's output among the tensors it returned: a row for each token, of the input's width."""
        tokens, width = logits.numel() // self.site.num_experts, self.site.in_features
        fitting = [
            t
            for t in tensors
            if t.is_floating_point() and t.ndim > 1 and t.numel() == tokens * t.shape[-1] and t is not logits
        ]
        as_wide = [t for t in fitting if t.shape[-1] == width]
        others = [t for t in fitting if t.shape[-1] not in (1, self.site.num_experts)]
        return next(iter(as_wide or others), None)


def _is_called(module: nn.Module) -> bool:
    return not isinstance(module, nn.ModuleList) and type(module).forward is not nn.Module.forward


def tensors_in(value: Any) -> Iterable[Tensor]:
    """Yield the tensors of a module's output: one, or those in a tuple, a list, a mapping or a dataclass."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))
