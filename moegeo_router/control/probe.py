"""Looking at the tokens of a layer, while an intervention wants to see them.

Shape legend: T tokens, n kept rows, E experts, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..geometry.simplex import widen
from ..observe.forward import LayerForward, rows
from ..observe.hooks import Failed, Hook, recomputing
from ..observe.taps import tensors_in
from ..routers.find import RouterSite
from ..routers.router import GeometricRouter

#: Makes a context in which nothing is counted (``Geometry.pause``).
Paused = Callable[[], AbstractContextManager[Any]]


@dataclass(kw_only=True)
class Look:
    """Rows of one training forward of a layer, fp32 or better.

    Attributes:
        logits: (n, E).
        x: (n, D) what the logits are linear in, None where not known.
        renormalized: whether all tokens' gates have the same sum; None where they are not seen.
        hurt: (n, E) the gradient of the loss in the logits; None before the backward pass, or where there is none.
        tokens: T, all tokens of that forward.
        mask: (T,) bool, which of them count; None: all.
    """

    logits: Tensor
    x: Tensor | None
    tokens: int
    mask: Tensor | None
    renormalized: bool | None = None
    hurt: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Call:
    """What a block was called with, and under which autocast."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    kind: str
    autocast: torch.dtype | None


class LayerProbe:
    """Keeps, while it is on, rows of the newest training forward of one layer, and what its block was called with.

    Off, as it is at first, it has no hooks and costs nothing. Of several micro-batches the newest is kept.

    Args:
        site: the router.
        block: the module around router and experts (``block_of``); None: it cannot be run again.
        failed: what is done with an error of the hooks.
        limit: the most rows.
    """

    def __init__(self, site: RouterSite, block: nn.Module | None, failed: Failed, limit: int = 512) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self._site, self._block, self._failed, self._limit = site, block, failed, limit
        self._handle: Any = None
        self._on = self._rerunning = False
        self._newest: Look | None = None
        self._begun: _Call | None = None
        self._call: _Call | None = None

    @property
    def look(self) -> Look | None:
        """The rows; None before anything was seen."""
        return self._newest

    def on(self) -> None:
        """Begin to look."""
        if self._on:
            return
        self._on = True
        if self._block is not None:
            hook = Hook(self._begin, self._failed, exclusive=False)
            self._handle = self._block.register_forward_pre_hook(hook, with_kwargs=True)

    def off(self) -> None:
        """Look no longer, and forget what was seen."""
        if self._handle is not None:
            self._handle.remove()
        self._on, self._handle = False, None
        self._newest = self._begun = self._call = None

    def see(self, seen: LayerForward) -> None:
        """Take rows of a training forward; not of one that checkpointing runs again."""
        if not self._on or self._rerunning or seen.recomputed:
            return
        with torch.no_grad():
            positions = self._positions(seen)
            x = None if seen.x is None else _picked(seen.x, positions)
            if x is not None and isinstance(self._site.projection, GeometricRouter):
                x = self._site.projection.linear_input(x)
            look = Look(
                logits=widen(_picked(seen.logits, positions)),
                x=None if x is None else widen(x),
                tokens=seen.size,
                mask=None if seen.mask is None else seen.mask.clone(),
                renormalized=None if seen.gates is None else _constant_sum(_picked(seen.gates, positions)),
            )
        self._newest, self._call = look, self._begun
        if seen.logits.requires_grad:
            seen.logits.register_hook(Hook(lambda gradient: self._backward(look, positions, gradient), self._failed))

    def rerun(self, paused: Paused, seed: int = 0) -> Tensor | None:
        """Run the block again on what it was called with, as its weights are now.

        In the mode it is in, with random numbers of its own that disturb nobody's.

        Args:
            paused: makes a context in which the watch of the model counts nothing.
            seed: of the random numbers.

        Returns:
            (tokens that count, width) fp32 or better, the block's output; None where no call was seen, no output has
            a row for each token, or the block fails (``failed`` is told).
        """
        call, look = self._call, self._newest
        if self._block is None or call is None or look is None:
            return None
        try:
            with ExitStack() as stack:
                stack.enter_context(paused())
                stack.enter_context(torch.no_grad())
                stack.enter_context(_own_random_numbers(seed))
                stack.enter_context(torch.autocast(call.kind, call.autocast, enabled=call.autocast is not None))
                stack.callback(setattr, self, "_rerunning", self._rerunning)
                self._rerunning = True
                # A block that changes its input in place must find the same one the next time.
                output = self._block(*_detached(call.args), **_detached(call.kwargs))
        except Exception as error:
            self._failed(error)
            return None
        found = self._output(output, look)
        return None if found is None else widen(found if look.mask is None else found[look.mask])

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._rerunning or not module.training or recomputing():
            return
        kind = self._site.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self._begun = _Call(args=_detached(args), kwargs=_detached(kwargs), kind=kind, autocast=dtype)

    def _backward(self, look: Look, positions: Tensor, gradient: Tensor) -> None:
        look.hurt = widen(_picked(gradient, positions))

    def _positions(self, seen: LayerForward) -> Tensor:
        """Return which tokens are kept, (n,): of those that count, evenly strided."""
        device = seen.logits.device
        counted = torch.arange(seen.size, device=device) if seen.mask is None else seen.mask.nonzero().squeeze(-1)
        if len(counted) <= self._limit:
            return counted
        return counted[torch.arange(self._limit, device=device) * len(counted) // self._limit]

    def _output(self, output: Any, look: Look) -> Tensor | None:
        fitting = [
            t
            for t in tensors_in(output)
            if t.is_floating_point() and t.ndim > 1 and t.numel() // t.shape[-1] == look.tokens
        ]
        as_wide = [t for t in fitting if t.shape[-1] == self._site.in_features]
        found = next(iter(as_wide or fitting), None)
        return None if found is None else rows(found)


def _picked(values: Tensor, positions: Tensor) -> Tensor:
    # index_select copies: the model may change its tensors in place.
    return rows(values.detach()).index_select(0, positions)


def _constant_sum(gates_NK: Tensor) -> bool:
    sums_N = widen(gates_NK).sum(dim=-1)
    # Gates in half precision add up to 1 within some thousandths.
    return bool(((sums_N - sums_N.mean()).abs() <= 0.02 * sums_N.mean().abs()).all())


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_detached(item) for item in value)
    return value


def _own_random_numbers(seed: int) -> AbstractContextManager[Any]:
    stack = ExitStack()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    stack.enter_context(torch.random.fork_rng(devices=devices))
    torch.manual_seed(seed)
    return stack
