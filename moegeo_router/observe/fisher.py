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

from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from ..routers.experts import Experts
from .forward import LayerForward, kept
from .hooks import Failed, Hook
from .taps import LayerTap

Estimator = Literal["parameters", "outputs", "minibatch"]
LossScale = Literal["mean", "sum"]
GatesScale = Literal["output", "input"]

#: What receives the traces (E,) of one backward pass through one layer.
AddTraces = Callable[[Tensor], None]


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
    """

    def __init__(self, add: AddTraces, loss: LossScale, gates_scale: GatesScale) -> None:
        self._add, self._loss, self._gates_scale = add, loss, gates_scale

    def forward(self, seen: LayerForward) -> None:
        """Hook the gradient of the block's output; nothing where there is none, or no gates."""
        if seen.output is None or not seen.output.requires_grad or seen.ids is None or seen.gates is None:
            return
        g_TK = seen.gates.detach().reshape(seen.size, -1).double()
        if self._gates_scale == "input":
            g_TK = torch.ones_like(g_TK)
        seen.output.register_hook(
            partial(self._gradient, seen.ids.reshape(g_TK.shape), g_TK, seen.mask, seen.num_experts, seen.tokens())
        )

    def before_step(self) -> None:
        """Nothing: the backward pass has shown everything."""

    def remove(self) -> None:
        """Nothing: hooks on tensors go with their graph."""

    def _gradient(
        self,
        ids_TK: Tensor,
        g_TK: Tensor,
        mask_T: Tensor | None,
        num_experts: int,
        tokens: Tensor | int,
        gradient: Tensor,
    ) -> None:
        signal_T = _squared_norms(gradient.reshape(len(ids_TK), -1))
        signal_TK = kept(g_TK.square() * signal_T.unsqueeze(-1), mask_T)
        traces_E = signal_T.new_zeros(num_experts).index_add(0, ids_TK.reshape(-1).long(), signal_TK.reshape(-1))
        self._add(_finite(traces_E * _undo_mean(self._loss, tokens)))


class ParameterTraces:
    """``parameters``: the exact trace over the experts' linear maps, ``Σ ‖x‖² ‖δ‖²`` over their rows.

    Experts that are modules may hold parameters in ``nn.Linear`` layers only. One module with stacked weights takes
    part by an attribute ``fisher_tap``, None by default: where it is set, the module calls
    ``fisher_tap(x, y, experts, bias=False)`` after every product, with the rows x (..., D), the products y (..., F) on
    the graph, the expert of each row (a number, or integers that broadcast against x's leading dimensions), and
    whether a bias was added. Padding tokens need no mask: no loss looks at them, so their δ is 0.

    Args:
        experts: the experts of the layer.
        num_experts: E.
        tap: the layer's tap; nothing is done while no training forward runs through it.
        add: what receives the traces.
        loss: whether the loss is a mean over tokens or a sum.
        failed: what is done with an error of the hooks.

    Raises:
        ValueError: experts whose parameters are not all in linear maps that can be observed.
    """

    def __init__(
        self, experts: Experts, num_experts: int, tap: LayerTap, add: AddTraces, loss: LossScale, failed: Failed
    ) -> None:
        self._num_experts, self._tap, self._add, self._loss = num_experts, tap, add, loss
        self._stacked: nn.Module | None = None
        self._handles = []
        if experts.stacked:
            if not hasattr(experts.container, "fisher_tap"):
                raise ValueError(
                    f"fisher='parameters' cannot see inside the stacked experts {experts.name} "
                    f"({type(experts.container).__name__}), which have no fisher_tap: take fisher='outputs'"
                )
            self._stacked = experts.container
            self._stacked.fisher_tap = self.product
            return
        for index, expert in enumerate(experts.modules):
            for linear in _linear_maps(expert, experts.name):
                hook = Hook(partial(self._linear, index), failed)
                self._handles.append(linear.register_forward_hook(hook))

    def forward(self, seen: LayerForward) -> None:
        """Nothing: the experts were seen while they ran."""

    def before_step(self) -> None:
        """Nothing: the backward pass has shown everything."""

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        if self._stacked is not None:
            self._stacked.fisher_tap = None  # type: ignore[assignment]

    @torch.compiler.disable
    def product(self, x: Tensor, y: Tensor, experts: int | Tensor, bias: bool = False) -> None:
        """Take note of one product of rows with the experts' weights; see the class."""
        current = self._tap.current
        if current is None or not y.requires_grad:
            return
        tokens = current["logits"].numel() // self._num_experts
        counted = tokens if current.get("mask") is None else current["mask"].sum()
        # Kept per row until the backward pass: the rows themselves may be large.
        y.register_hook(partial(self._gradient, _squared_norms(x) + float(bias), experts, counted))

    def _linear(self, expert: int, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.product(inputs[0], output, expert, bias=module.bias is not None)

    def _gradient(self, x_N: Tensor, experts: int | Tensor, tokens: Tensor | int, gradient: Tensor) -> None:
        rows_N = x_N * _squared_norms(gradient)
        if isinstance(experts, int):
            traces_E = rows_N.new_zeros(self._num_experts)
            traces_E[experts] = rows_N.sum()
        else:
            flat = experts.expand(rows_N.shape).reshape(-1).long()
            traces_E = rows_N.new_zeros(self._num_experts).index_add(0, flat, rows_N.reshape(-1))
        self._add(_finite(traces_E * _undo_mean(self._loss, tokens)))


class MinibatchTraces:
    """``minibatch``: the squared norm of each expert's accumulated gradient.

    Args:
        experts: the experts of the layer.
        num_experts: E.
        add: what receives the traces.
    """

    def __init__(self, experts: Experts, num_experts: int, add: AddTraces) -> None:
        self._experts, self._num_experts, self._add = experts, num_experts, add

    def forward(self, seen: LayerForward) -> None:
        """Nothing: only the accumulated gradients are looked at."""

    @torch.no_grad()
    def before_step(self) -> None:
        """Read the gradients."""
        if self._experts.stacked:
            parameters = self._experts.container.parameters()
            gradients = [p.grad for p in parameters if p.grad is not None and p.shape[:1] == (self._num_experts,)]
            if gradients:
                self._add(_finite(torch.stack([_squared_norms(g.flatten(1)) for g in gradients]).sum(dim=0)))
            return
        each = [[p.grad for p in e.parameters() if p.grad is not None] for e in self._experts.modules]
        device = next((g.device for gradients in each for g in gradients), None)
        if device is not None:
            zero = torch.zeros((), dtype=torch.float64, device=device)
            self._add(_finite(torch.stack([sum((_squared_norms(g.flatten()) for g in gs), zero) for gs in each])))

    def remove(self) -> None:
        """Nothing: there are no hooks."""


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
