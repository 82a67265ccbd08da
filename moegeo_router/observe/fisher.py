"""Empirical Fisher traces of the experts, from the backward passes that happen anyway.

``t_e ∝ Σ_{t routed to e} ‖∂L/∂θ_e⁽ᵗ⁾‖²``, θ_e⁽ᵗ⁾ the copy of expert e's parameters used at position t [ours: a
reconstruction of what FI measures, see ``metrics.heterogeneity``]. Three estimators; values of two are never compared:

==============  ==============================================  ===================================================
``parameters``  exact: per row ``‖x‖² ‖δ‖²`` (a bias: + 1),       linear maps only; reads every row's gradient once
                x input, δ gradient of every linear map
``outputs``     ``Σ_t g_te² ‖∂L/∂y_t‖²``, y the block's output   any block; the trace of an output bias alone
``minibatch``   ``‖accumulated gradient of θ_e‖²``              biased: what cancels between tokens is not seen
==============  ==============================================  ===================================================

A factor common to all experts cancels in FHS. One that differs between micro-batches or ranks does not: with
``loss="mean"`` the gradients of a forward over n tokens are taken to carry 1/n, and n² is multiplied back.

Shape legend: T tokens, E experts, K chosen experts, N rows, D and F widths.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from ..routers.experts import Experts
from ..routers.family import GatesScale
from .forward import LayerForward, kept
from .hooks import Failed, Hook
from .taps import LayerTap

Estimator = Literal["parameters", "outputs", "minibatch"]
LossScale = Literal["mean", "sum"]

#: What receives the traces (E,) of one backward pass through one layer.
AddTraces = Callable[[Tensor], None]

#: Puts a tap on a stacked module that knows of no taps: (module, tap) -> what undoes it, None where it cannot.
Observe = Callable[[nn.Module, "ProductTap"], Callable[[], None] | None]


class TraceEstimator(Protocol):
    """What the estimators of one layer have in common."""

    def forward(self, seen: LayerForward) -> None:
        """Take note of a forward pass whose block has just returned."""

    def before_step(self) -> None:
        """Take note of the accumulated gradients, before the optimizer uses them."""

    def remove(self) -> None:
        """Take every hook off."""


class NoTraces:
    """No estimator: the layer has no FHS."""

    def forward(self, seen: LayerForward) -> None:
        """Nothing."""

    def before_step(self) -> None:
        """Nothing."""

    def remove(self) -> None:
        """Nothing."""


class OutputTraces:
    """``outputs``: the trace of a bias on the experts' outputs, ``Σ_t g_te² ‖∂L/∂y_t‖²``.

    Args:
        add: what receives the traces.
        loss: whether the loss is a mean over tokens or a sum.
        gates_scale: what the gates multiply; ``"input"`` (Llama 4) leaves g² out.
        failed: what is done with an error of the hooks.
        lost: called before a step if gradients have reached the logits, but never the output. None: nobody asks.
    """

    def __init__(
        self,
        add: AddTraces,
        loss: LossScale,
        gates_scale: GatesScale,
        failed: Failed,
        lost: Callable[[], None] | None = None,
    ) -> None:
        self._add, self._loss, self._gates_scale, self._failed, self._lost = add, loss, gates_scale, failed, lost
        self._reached_logits = self._reached_output = False

    def forward(self, seen: LayerForward) -> None:
        """Hook the gradient of the block's output; nothing where there is none, or no gates."""
        if seen.output is None or seen.ids is None or seen.gates is None:
            return
        if not seen.size:  # no token: gates (0, -1) have no shape
            return
        if self._lost is not None and not self._reached_output and seen.logits.requires_grad:
            seen.logits.register_hook(Hook(self._reaches_logits, self._failed))
        if not seen.output.requires_grad:
            return
        g_TK = seen.gates.detach().reshape(seen.size, -1).double()
        if self._gates_scale == "input":
            g_TK = torch.ones_like(g_TK)
        gradient = partial(
            self._gradient, seen.ids.reshape(g_TK.shape), g_TK, seen.mask, seen.num_experts, seen.tokens()
        )
        seen.output.register_hook(Hook(gradient, self._failed))

    def before_step(self) -> None:
        """Tell if the output's gradient was waited for in vain."""
        if self._lost is not None and self._reached_logits and not self._reached_output:
            self._lost()

    def remove(self) -> None:
        """Nothing: hooks on tensors go with their graph."""

    def _reaches_logits(self, gradient: Tensor | None) -> None:
        self._reached_logits = True

    def _gradient(
        self,
        ids_TK: Tensor,
        g_TK: Tensor,
        mask_T: Tensor | None,
        num_experts: int,
        tokens: Tensor | int,
        gradient: Tensor | None,
    ) -> None:
        if gradient is None:  # from a function that sends nothing back
            return
        self._reached_output = True
        signal_T = _squared_norms(gradient.reshape(len(ids_TK), -1))
        signal_TK = kept(g_TK.square() * signal_T.unsqueeze(-1), mask_T)
        traces_E = signal_T.new_zeros(num_experts).index_add(0, ids_TK.reshape(-1).long(), signal_TK.reshape(-1))
        self._add(_finite(traces_E * _undo_mean(self._loss, tokens)))


class ProductTap(Hook):
    """What stacked experts call after every product of rows with their weights; a copy of the module has no tap.

    Args:
        call: takes the rows x (..., D), the products y (..., F) on the graph, the expert of each row (a number, or
            integers that broadcast against x's leading dimensions), and whether a bias was added.
        failed: what is done with its errors.
    """

    @torch.compiler.disable
    def __call__(self, x: Tensor, y: Tensor, experts: int | Tensor, bias: bool = False) -> None:
        """Run."""
        super().__call__(x, y, experts, bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:  # type: ignore[override]
        """Return None, what ``fisher_tap`` is where nobody watches."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:  # type: ignore[override]
        """Pickle as None."""
        return type(None), ()


def put_tap(module: nn.Module, tap: ProductTap) -> Callable[[], None]:
    """Set the ``fisher_tap`` of a module; returns what takes it off again without a trace.

    Raises:
        ValueError: there is a tap already.
    """
    if getattr(module, "fisher_tap", None) is not None:
        raise ValueError(
            f"the experts {type(module).__name__} are watched by fisher='parameters' already: detach() the other attach"
        )
    before = {name: value for name, value in vars(module).items() if name == "fisher_tap"}
    module.fisher_tap = tap  # type: ignore[assignment]

    def undo() -> None:
        vars(module).pop("fisher_tap", None)
        vars(module).update(before)

    return undo


@dataclass(eq=False, frozen=True)
class _Forward:
    """One forward pass through one layer, and the number of tokens that its loss is a mean over."""

    tokens: Tensor | int


class ParameterTraces:
    """``parameters``: the exact trace over the experts' linear maps, ``Σ ‖x‖² ‖δ‖²`` over their rows.

    Experts that are modules may hold parameters in ``nn.Linear`` layers only, each used once a row. One module with
    stacked weights takes part by an attribute ``fisher_tap``, None by default: where it is set, the module calls
    ``fisher_tap(x, y, experts, bias=False)`` after every product, see ``ProductTap``. Other stacked modules take part
    where ``observe`` knows how. Padding tokens need no mask: no loss looks at them, so their δ is 0. Parameters that
    are frozen count like others.

    Args:
        experts: the experts of the layer.
        num_experts: E.
        tap: the layer's tap; nothing is done while no training forward runs through it.
        add: what receives the traces.
        loss: whether the loss is a mean over tokens or a sum.
        failed: what is done with an error of the hooks.
        observe: puts a tap on stacked experts that have no ``fisher_tap``.

    Raises:
        ValueError: experts whose parameters are not all in linear maps that can be observed, or are observed already.
    """

    def __init__(
        self,
        experts: Experts,
        num_experts: int,
        tap: LayerTap,
        add: AddTraces,
        loss: LossScale,
        failed: Failed,
        observe: Observe | None = None,
    ) -> None:
        self._num_experts, self._tap, self._add, self._loss, self._failed = num_experts, tap, add, loss, failed
        self._called = self._told = False
        self._current: tuple[dict[str, Any], _Forward] | None = None
        self._rows: tuple[Tensor, int, Tensor] | None = None
        self._filling: _Forward | None = None
        self._traces_E = torch.zeros(0)
        self._undo: list[Callable[[], None]] = []
        if experts.stacked:
            self._undo.append(_watch(experts, ProductTap(self._product, failed), observe))
            return
        # All are looked at before the first is hooked: experts that are refused keep no hook.
        for index, linears in enumerate([_linear_maps(expert, experts.name) for expert in experts.modules]):
            hook = Hook(partial(self._linear, index), failed)
            self._undo += [linear.register_forward_hook(hook).remove for linear in linears]

    def forward(self, seen: LayerForward) -> None:
        """Forget the forward pass that has ended; say so if its experts have not been seen while they ran."""
        self._current = self._rows = None
        if not (self._called or self._told or seen.output is None or not seen.size):
            self._told = True
            warnings.warn(
                f"the experts of layer {seen.layer} ran without their linear layers being called (a fused kernel?): no "
                "FHS by parameters: take fisher='outputs'",
                stacklevel=4,
            )

    def before_step(self) -> None:
        """Hand over the traces of the last backward pass."""
        self._flush()

    def remove(self) -> None:
        """Take every hook off."""
        undo, self._undo = self._undo, []
        for call in undo:
            call()

    def _linear(self, expert: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._product(inputs[0], output, expert, module.bias is not None)

    def _product(self, x: Tensor, y: Tensor, experts: int | Tensor, bias: bool) -> None:
        current = self._tap.current
        if current is None:
            return
        self._called = True
        if y.requires_grad:
            # ‖x‖² is kept per row until the backward pass: the rows themselves may be large.
            call = partial(self._gradient, self._forward_of(current), self._row_norms(x) + float(bias), experts)
            y.register_hook(Hook(call, self._failed))

    def _forward_of(self, current: dict[str, Any]) -> _Forward:
        if self._current is None or self._current[0] is not current:
            mask = current.get("mask")
            tokens = current["logits"].numel() // self._num_experts if mask is None else mask.sum()
            self._current = current, _Forward(tokens)
        return self._current[1]

    def _row_norms(self, x: Tensor) -> Tensor:
        """``‖x‖²``, computed once where several weights meet the same rows."""
        if self._rows is None or self._rows[0] is not x or self._rows[1] != x._version:
            self._rows = x, x._version, _squared_norms(x)
        return self._rows[2]

    def _gradient(self, forward: _Forward, x_N: Tensor, experts: int | Tensor, gradient: Tensor | None) -> None:
        if gradient is None:  # from a function that sends nothing back
            return
        if forward is not self._filling:
            self._flush()
            self._filling, self._traces_E = forward, x_N.new_zeros(self._num_experts)
        delta_N = _squared_norms(gradient)
        if isinstance(experts, int):
            self._traces_E[experts].add_(torch.dot(x_N.reshape(-1), delta_N.reshape(-1)))
        else:
            ids_N = experts.expand(x_N.shape).reshape(-1).long()
            self._traces_E.index_add_(0, ids_N, (x_N * delta_N).reshape(-1))

    def _flush(self) -> None:
        # A whole backward pass at a time: where one expert's share of it is not finite, the others' is worth nothing.
        if self._filling is not None:
            self._add(_finite(self._traces_E * _undo_mean(self._loss, self._filling.tokens)))
        self._filling = None


class MinibatchTraces:
    """``minibatch``: the squared norm of each expert's accumulated gradient.

    Of stacked experts the module's own parameters (E, …) of at least two dimensions count.

    Args:
        experts: the experts of the layer.
        num_experts: E.
        add: what receives the traces.
        failed: what is done with an error.
    """

    def __init__(self, experts: Experts, num_experts: int, add: AddTraces, failed: Failed) -> None:
        self._experts, self._num_experts, self._add = experts, num_experts, add
        self._read = Hook(self._gradients, failed)

    def forward(self, seen: LayerForward) -> None:
        """Nothing: only the accumulated gradients are looked at."""

    def before_step(self) -> None:
        """Read the gradients."""
        self._read()

    def remove(self) -> None:
        """Nothing: there are no hooks."""

    @torch.no_grad()
    def _gradients(self) -> None:
        if self._experts.stacked:
            # Not those of its children: where the block itself holds the weights, its router is one of them.
            own = self._experts.container.parameters(recurse=False)
            stacks = [p for p in own if p.ndim > 1 and len(p) == self._num_experts]
            traces = [_squared_norms(p.grad.flatten(1)) for p in stacks if p.grad is not None]
            if traces:
                self._add(_finite(torch.stack(traces).sum(dim=0)))
            return
        each = [[p.grad for p in e.parameters() if p.grad is not None] for e in self._experts.modules]
        device = next((g.device for gradients in each for g in gradients), None)
        if device is not None:
            zero = torch.zeros((), dtype=torch.float64, device=device)
            self._add(_finite(torch.stack([sum((_squared_norms(g.flatten()) for g in gs), zero) for gs in each])))


def _watch(experts: Experts, tap: ProductTap, observe: Observe | None) -> Callable[[], None]:
    """Put a tap on stacked experts; returns what takes it off."""
    kind = f"the stacked experts {experts.name} ({type(experts.container).__name__})"
    try:
        undo = None if observe is None else observe(experts.container, tap)
    except ValueError as error:
        raise ValueError(f"fisher='parameters' cannot see inside {kind}: {error}: take fisher='outputs'") from None
    if undo is None and not hasattr(experts.container, "fisher_tap"):
        raise ValueError(
            f"fisher='parameters' cannot see inside {kind}, which have no fisher_tap: take fisher='outputs'"
        )
    return put_tap(experts.container, tap) if undo is None else undo


def _linear_maps(expert: nn.Module, name: str) -> list[nn.Linear]:
    linears = [m for m in expert.modules() if isinstance(m, nn.Linear)]
    seen = {id(p) for linear in linears for p in linear.parameters(recurse=False)}
    other = [n for n, p in expert.named_parameters() if id(p) not in seen]
    if other or not linears:
        raise ValueError(
            f"fisher='parameters' needs experts whose parameters are all in nn.Linear layers; those of {name} "
            f"have {', '.join(other) or 'none'}: take fisher='outputs'"
        )
    return linears


def _squared_norms(rows: Tensor) -> Tensor:
    """Return ‖row‖² over the last dimension, float64; the sum itself is taken in fp32 or better."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows.detach(), dim=-1, dtype=wide).double().square()


def _undo_mean(loss: LossScale, tokens: Tensor | int) -> Tensor | int:
    return tokens * tokens if loss == "mean" else 1


def _finite(traces_E: Tensor) -> Tensor:
    # An overflow under a gradient scaler is a step that will be skipped: it must not spoil the sums of the next one.
    return torch.where(traces_E.isfinite().all(), traces_E, torch.zeros_like(traces_E))
