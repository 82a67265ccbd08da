"""A prior over experts: a point of the Fisher-Rao simplex beside the router, and the rules that move it.

``ExpertPrior`` holds a distribution π over the experts, ``SignBias`` the additive bias of DeepSeek's loss-free
balancing, to compare with. Either is one tensor (E,) in fp32, whatever the model is cast to, and a buffer: it is in the
state dict, and no optimizer finds it in ``model.parameters()`` to step it off the simplex.

Shape legend: E experts; any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Self, TypedDict, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import check_choice
from ..geometry import simplex
from ..geometry.simplex import widen

Where = Literal["selection", "logits"]
Rule = Literal["balance", "natural"]
Transport = Literal["exponential", "isometric"]

#: No expert's log-prior moves by more than this in one step (to first order). An expert that has been pushed low has
#: little room left on the sphere: without this bound one large step would carry it to the floor.
MAX_NATS = 1.0

#: The least ``floor``: with ten thousand experts it is still above ``simplex.FLOOR``.
MIN_FLOOR = 1e-8


class Selection(TypedDict, total=False):
    """Keywords for ``topk_gating`` with which a prior takes part in the choice of experts."""

    log_prior: Tensor
    selection_bias: Tensor


class _FullPrecision(nn.Module):
    """A module whose buffers are never cast below fp32 and stay leaves; ``.double()`` widens them."""

    def reset_parameters(self) -> None:
        """Start anew."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is None or new is None or new is old:
                continue
            # Widening what was cast to half precision would not bring its digits back: the old values are moved.
            kept = widen(new) if old.is_meta or new.dtype in (torch.float32, torch.float64) else old.to(new.device)
            self._buffers[name] = kept.detach().requires_grad_(old.requires_grad)
            if old.is_meta and not new.is_meta:
                self.reset_parameters()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        before = dict(self._buffers)
        super()._load_from_state_dict(*args, **kwargs)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new is not old:  # load_state_dict(assign=True)
                self._buffers[name] = widen(new.detach()).requires_grad_(old.requires_grad)


class ExpertPrior(_FullPrecision):
    """A distribution π over E experts, uniform at the start, on the open Fisher-Rao simplex.

    **Where** it acts, always as ``log(E π)``, 0 where π is uniform:

    - ``"selection"``: added to the log scores for choosing only, ``topk_gating(logits, k, **prior.selection())``. Gates
      and p are those of the logits: loss-free.
    - ``"logits"``: ``prior(logits)`` are the logits; gates and p move too. ``GeometricRouter(prior=…)`` has it inside.

    **Rule** by which it moves, once an optimizer step:

    - ``"balance"``: ``update(counts)``, a step towards balanced load. ``s = -E log_u(f)`` says for every expert how far
      the load f is from the uniform u (``‖log_u f‖ = d(u, f)``, the load's FSI in radians; f may have zeros); the
      step is ``π ← exp_π(speed · v)`` with ``v = π ⊙ (s - Σ π_i s_i)``: s along the exponential connection. At π = u
      its length is ``speed · d(u, f)``. With ``transport="isometric"`` v is ``-log_u f`` transported along the geodesic
      from u to π, of the length ``speed · d(u, f)`` everywhere; but an expert at π_i = u/c then reacts √c times as
      strongly, and oscillates where routers are far from balance unless ``speed`` is small (0.01 and below).
    - ``"natural"``: ``step(lr)``, the natural gradient of the loss, ``π ← exp_π(-lr · π ⊙ (g - Σ π_i g_i))``; only with
      ``where="logits"``, because a choice has no gradient. π then has ``requires_grad``, but is still no parameter.

    Every step is at most ``limit`` radians long and moves no log-prior by more than 1 nat to first order (none falls to
    less than a seventh), so it stays inside of the simplex. No expert's prior falls below ``floor / E``: none can be
    banned for ever, and one that starves comes back from the floor within about ``log(1 / floor) / speed`` steps,
    however long it had been pushed down. (A bound on d(u, π) would not do: one expert alone can reach 0 within
    ``2 arcsin √(1/E)`` of u.)

    Args:
        num_experts: E.
        where: ``"selection"`` or ``"logits"``.
        rule: ``"balance"`` or ``"natural"``.
        speed: share of d(u, f) that a step of ``"balance"`` covers; the default of lr for ``"natural"``. Loads react to
            π the more strongly the less a router's logits spread and the more experts there are: with 64 experts the
            default is stable where the logits' standard deviation over tokens is above about 0.1. Half of it is safe
            at half the spread, and takes twice the steps.
        limit: radians, the longest step.
        floor: the least prior, as a share of the uniform one, in [1e-8, 1). Logits that are apart by more than
            ``log(E / floor)`` nats throughout cannot be balanced.
        transport: ``"exponential"`` or ``"isometric"``; for ``"balance"``.
        device: of π.

    Raises:
        ValueError: an option that is unknown or out of range, or ``rule="natural"`` with ``where="selection"``.

    Sources: the rules are [ours]; ``p ⊙ (g - Σ p_i g_i)`` and the connections are standard information geometry.

    Example:
        >>> prior = ExpertPrior(8)
        >>> weights, ids, probs = topk_gating(router(x), 2, **prior.selection())
        >>> optimizer.step()
        >>> prior.update(torch.bincount(ids.flatten(), minlength=8))
    """

    pi: Tensor

    def __init__(
        self,
        num_experts: int,
        *,
        where: Where = "selection",
        rule: Rule = "balance",
        speed: float = 0.05,
        limit: float = 0.3,
        floor: float = 1e-6,
        transport: Transport = "exponential",
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_choice("where", where, get_args(Where))
        check_choice("rule", rule, get_args(Rule))
        check_choice("transport", transport, get_args(Transport))
        _check_positive(speed=speed, limit=limit)
        if not MIN_FLOOR <= floor < 1:
            raise ValueError(f"floor must lie in [{MIN_FLOOR}, 1), got {floor}")
        if rule == "natural" and where == "selection":
            raise ValueError(
                "rule='natural' needs where='logits': with where='selection' the prior only chooses experts, "
                "and a choice has no gradient"
            )
        self.where, self.rule, self.transport = where, rule, transport
        self.speed, self.limit, self.floor = speed, limit, floor
        self.register_buffer("pi", _per_expert(num_experts, device))
        self.reset_parameters()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.pi.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make π uniform."""
        self.pi.fill_(1 / self.num_experts).requires_grad_(self.rule == "natural")

    def log_prior(self) -> Tensor:
        """Return ``log(E π)``, (E,): 0 for a uniform π, in [log floor, log E]."""
        # Divided by a tensor: E · (1 / E) is not 1 for every E, and a fresh prior must change no bit.
        return (self.pi / torch.full_like(self.pi, 1 / self.num_experts)).log()

    def selection(self) -> Selection:
        """Return what ``topk_gating`` must know: the log-prior with ``where="selection"``, else nothing."""
        return {"log_prior": self.log_prior()} if self.where == "selection" else {}

    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits (..., E) with the prior inside, in their dtype; as they are with ``where="selection"``.

        Raises:
            ValueError: the last dimension is not E.
        """
        _check_experts("logits", logits, self.num_experts)
        return (widen(logits) + self.log_prior()).to(logits.dtype) if self.where == "logits" else logits

    @torch.no_grad()
    def update(self, counts_E: Tensor, *, group: Any = None) -> None:
        """Take the step of ``rule="balance"`` for the load of one *optimizer* step, all its micro-batches together.

        Counts that are all zero, negative or not finite move nothing.

        Args:
            counts_E: how many tokens chose each expert.
            group: given, the counts are those of this rank, and are summed over the ranks of this process group
                (``torch.distributed.group.WORLD``: all) by one all-reduce; without it all ranks must pass the same.

        Raises:
            ValueError: another rule, or counts that are not (E,).
        """
        if self.rule != "balance":
            raise ValueError("rule='natural' follows the gradient of the loss: call step(lr), not update(counts)")
        load_E = _load(counts_E, self.pi, group)
        v_E = -simplex.log_map(simplex.uniform(self.num_experts, dtype=load_E.dtype, device=load_E.device), load_E)
        self._move(self.speed * self._transported(v_E))

    @torch.no_grad()
    def step(self, lr: float | None = None, *, group: Any = None) -> None:
        """Take the step of ``rule="natural"`` against the gradient that backward passes have left, and clear that.

        Nothing moves where there is no gradient or it is not finite. It has to be the loss's own: with a ``GradScaler``
        divide ``pi.grad`` by its scale first.

        Args:
            lr: the learning rate; ``speed`` where not given.
            group: given, the mean gradient over the ranks of this process group is taken, by one all-reduce
                (a buffer's gradient is not among those that ``DistributedDataParallel`` averages).

        Raises:
            ValueError: another rule, or a negative lr.
        """
        if self.rule != "natural":
            raise ValueError("rule='balance' follows the load: call update(counts), not step(lr)")
        lr = self.speed if lr is None else lr
        if not lr >= 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        gradient = torch.zeros_like(self.pi) if self.pi.grad is None else self.pi.grad
        self.pi.grad = None
        if group is not None:
            dist.all_reduce(gradient, group=group)
            gradient /= dist.get_world_size(group)
        self._move(-lr * simplex.riemannian_gradient(self.pi.double(), gradient.double()))

    def extra_repr(self) -> str:
        """Show what is not a default of every prior."""
        return f"num_experts={self.num_experts}, where={self.where!r}, rule={self.rule!r}, speed={self.speed}"

    def _transported(self, v_E: Tensor) -> Tensor:
        """Carry the tangent vector v at the uniform distribution to π."""
        pi_E = self.pi.double()
        if self.transport == "isometric":
            return simplex.transport(torch.full_like(pi_E, 1 / self.num_experts), pi_E, v_E)
        return simplex.riemannian_gradient(pi_E, self.num_experts * v_E)

    def _move(self, v_E: Tensor) -> None:
        """Follow the geodesic of v, within the limits and above the floor; rest, bit for bit, if v is 0 or NaN.

        In float64 and rounded once; on tensors throughout, because reading one back would make an accelerator wait.
        """
        pi_E = self.pi.double()
        length, nats = simplex.inner(pi_E, v_E, v_E).sqrt(), (v_E / pi_E).abs().amax()
        scale = torch.stack([torch.ones_like(nats), self.limit / length, MAX_NATS / nats]).amin()
        # floor / E again once the sum is back at 1: clamping adds at most E times the bound.
        bound = self.floor / (1 - self.floor) / self.num_experts
        moved_E = simplex.exp_map(pi_E, scale * v_E).clamp_min(bound)
        # NaN is not above 0 either.
        self.pi.copy_(torch.where(length > 0, moved_E / moved_E.sum(), pi_E))


class SignBias(_FullPrecision):
    """The bias of loss-free balancing, ``b ← b + speed · sign(mean n - n)``: the baseline of ``ExpertPrior``.

    Added to the scores for choosing only, ``topk_gating(logits, k, **bias.selection())``.

    Args:
        num_experts: E.
        speed: u of the paper, 0.001 there, in units of the scores.
        device: of the bias.

    Raises:
        ValueError: no experts, or a speed that is not positive.

    Source: Wang et al., "Auxiliary-Loss-Free Load Balancing", arXiv 2408.15664; DeepSeek-V3.
    """

    bias: Tensor
    where: Where = "selection"

    def __init__(self, num_experts: int, *, speed: float = 1e-3, device: torch.device | str | None = None) -> None:
        super().__init__()
        _check_positive(speed=speed)
        self.speed = speed
        self.register_buffer("bias", _per_expert(num_experts, device))

    @property
    def num_experts(self) -> int:
        """E."""
        return self.bias.shape[0]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Make the bias 0."""
        self.bias.zero_()

    def selection(self) -> Selection:
        """Return what ``topk_gating`` must know."""
        return {"selection_bias": self.bias}

    def forward(self, logits: Tensor) -> Tensor:
        """Return the logits as they are: the bias only chooses.

        Raises:
            ValueError: the last dimension is not E.
        """
        _check_experts("logits", logits, self.num_experts)
        return logits

    @torch.no_grad()
    def update(self, counts_E: Tensor, *, group: Any = None) -> None:
        """Move the bias by one step; arguments, rests and errors as in ``ExpertPrior.update``."""
        self.bias.add_(sign_step(counts_E, self.bias, self.speed, group))

    def extra_repr(self) -> str:
        """Show the size and the speed."""
        return f"num_experts={self.num_experts}, speed={self.speed}"


def sign_step(counts_E: Tensor, like_E: Tensor, speed: float, group: Any = None) -> Tensor:
    """Return the step of loss-free balancing, ``speed · sign(mean n - n)``; 0 for counts that say nothing.

    Args:
        counts_E: how many tokens chose each expert.
        like_E: the bias (E,) that is to move.
        speed: u.
        group: as in ``SignBias.update``.
    """
    step_E = speed * torch.sign(1 / len(like_E) - _load(counts_E, like_E, group))
    return torch.where(step_E.isfinite(), step_E, 0).to(like_E)


def _per_expert(num_experts: int, device: torch.device | str | None) -> Tensor:
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    return torch.zeros(num_experts, dtype=torch.float32, device=device)


def _load(counts_E: Tensor, like_E: Tensor, group: Any) -> Tensor:
    """Return the load f = n / Σn in float64, on the device of ``like``; all NaN where the counts say nothing."""
    if counts_E.shape != like_E.shape:
        raise ValueError(f"counts must be ({len(like_E)},), got {tuple(counts_E.shape)}")
    counts_E = counts_E.detach().to(device=like_E.device, dtype=torch.float64, copy=True)
    if group is not None:
        dist.all_reduce(counts_E, group=group)
    load_E = counts_E / counts_E.sum()
    return torch.where(load_E.isfinite().all() & (counts_E >= 0).all(), load_E, torch.nan)


def _check_experts(name: str, tensor: Tensor, num_experts: int) -> None:
    if tensor.ndim == 0 or tensor.shape[-1] != num_experts:
        raise ValueError(f"{name} must be (..., {num_experts}), got {tuple(tensor.shape)}")


def _check_positive(**options: float) -> None:
    for name, value in options.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {value}")
