"""``NaturalGradient``: the natural-gradient step of routers as an optimizer of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import GeometryConfig, NaturalConfig
from ..observe.build import unwrapped
from ..observe.forward import LayerForward
from ..observe.hooks import Pausable
from ..observe.taps import LayerTap
from ..observe.tokens import TokenTap
from ..routers.experts import refuse_sharded
from ..routers.find import RouterSite, Select, find_routers
from ..routers.gating import ScoreFunction
from .natural import OPTIONS, Movement, in_a_row
from .rules import NaturalRules
from .stack import RouterStack, group_alike


class NaturalGradient(Pausable, Optimizer):
    """Steps the routers of a model, weights and biases, by natural gradients within a geodesic speed limit.

    The Fisher information of the routing distribution in the router's weight is kept as ``F ≈ G ⊗ A`` (K-FAC's form,
    ``G = mean G_t`` in the logits, ``A = mean x xᵀ``), from the tokens that the routers see in training mode. A step is
    ``W ← exp_W(-η Δ)``, ``Δ = (G + λ_G)⁻¹ ∇W (A + λ_A)⁻¹``, on the manifold the weight is on (``geometrize``; a plain
    weight is Euclidean); ``η ≤ lr`` is the largest for which the exact mean KL divergence of the routing before the
    step from that after it is at most ``limit²/2``. [ours; natural gradient and K-FAC are standard]

    The model's other parameters need an optimizer of their own, which must not hold the routers' (``parameters``).
    Inside ``attach`` the same step is ``GeometryConfig(step="natural")``.

    Args:
        model: the model, or a data-parallel or compiled wrapper of it (compile it after).
        select: which routers, see ``find_routers``.
        groups: parameter groups, dictionaries with ``select`` and whatever of the following differs; None: one for all.
        lr: of the unlimited step; 1 is the natural scale.
        weight_decay: decoupled, towards 0 at the rate ``lr · weight_decay`` a step, inside the limit; polar and
            Euclidean rows only.
        maximize: ascend.
        scores: the routers' score function; None: what is known of their family, for others softmax.
        process_group: the data-parallel process group.
        options: fields of ``NaturalConfig``: ``limit``, ``momentum``, ``second_moment``, ``damping`` …. All but
            ``rows`` and ``block`` may change in a group while it runs.

    Raises:
        ValueError: no router; a router in two groups; a value out of range; an unknown option.

    Example:
        >>> routers = mg.NaturalGradient(model, limit=0.01)
        >>> own = {id(p) for p in routers.parameters}
        >>> rest = torch.optim.AdamW(p for p in model.parameters() if id(p) not in own)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        select: Select = None,
        groups: Sequence[Mapping[str, Any]] | None = None,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        maximize: bool = False,
        scores: ScoreFunction | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        model = unwrapped(model)
        _check_names(options, OPTIONS)
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize} | asdict(NaturalConfig(**options))
        chosen = _sites_of_groups(model, groups, select, defaults)
        self._built = False
        super().__init__(
            [{"params": _parameters(sites)} | own for sites, own in chosen],
            defaults,
        )
        self._built = True
        self._rules: list[NaturalRules] = []
        self._stacks: list[RouterStack] = []
        routers = [site for sites, _ in chosen for site in sites]
        routing = GeometryConfig(scores=scores).for_routers(routers).routing
        for index, (sites, _) in enumerate(chosen):
            self._add_stacks(index, sites, routing.scores, process_group)
        self._taps = self._tap(model, routers)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is stepped."""
        return [parameter for stack in self._stacks for parameter in stack.parameters]

    @property
    def names(self) -> list[str]:
        """The routers' names, of those that share a weight the first."""
        return [name for stack in self._stacks for name in stack.names]

    @property
    def movement(self) -> Movement:
        """What the last step did, in the order of ``names``; NaN for routers that were not stepped."""
        return in_a_row([rules.movement for rules in self._rules])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every router that has a gradient.

        Args:
            closure: computes the loss again and returns it.

        Raises:
            RuntimeError: no forward pass in training mode was ever seen, or a router's weight was replaced.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for stack in self._stacks:
            ready = stack.rule.ready()
            unseen = [name for name, known in zip(stack.names, ready, strict=True) if not known]
            if unseen and any(parameter.grad is not None for parameter in stack.parameters):
                names = ", ".join(unseen)
                raise RuntimeError(f"no tokens of {names} were seen: natural steps need a forward in training mode")
            stack.withhold()
            try:
                stack.step()
            finally:
                stack.give_back()
        return loss

    def observe(self, seen: LayerForward) -> None:
        """Take what a step needs of one forward pass of a router; its hooks do that by themselves.

        Raises:
            ValueError: the logits are not ``x Wᵀ + b``.
        """
        for rules in self._rules:
            rules.observe(seen)

    @contextmanager
    def tokens(self, mask: Tensor) -> Iterator[None]:
        """Say which tokens of the forward passes inside count, for models that have no ``attention_mask``.

        Args:
            mask: (B, L), or (B,) for whole sequences; True (or more than 0) where a token counts.
        """
        with self._tokens.given(mask=mask > 0):
            yield

    def __deepcopy__(self, memo: dict[int, Any]) -> NaturalGradient:
        """Refuse: a copy would step the same routers and see none of their tokens."""
        raise TypeError("NaturalGradient cannot be copied: make another one of the copied model, and load its state")

    def remove(self) -> None:
        """Take the hooks off the model."""
        for tap in self._taps:
            tap.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse: groups are given at the beginning, because they are of routers, not of parameters."""
        if self._built:
            raise ValueError("NaturalGradient takes its groups at the beginning: groups=[{'select': …, 'lr': …}, …]")
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups' options and the state of every router, by name."""
        return {
            "state": {name: state for stack in self._stacks for name, state in stack.state_dict().items()},
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: the state is of other routers or groups.
        """
        names, saved = self.names, list(state_dict["state"])
        if sorted(names) != sorted(saved) or len(state_dict["param_groups"]) != len(self.param_groups):
            raise ValueError(f"the state is of routers {', '.join(saved)}, these are {', '.join(names)}")
        for group, options in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(options)
        for stack in self._stacks:
            stack.load_state_dict(dict(state_dict["state"]))

    def _add_stacks(self, index: int, sites: Sequence[RouterSite], scores: ScoreFunction, process_group: Any) -> None:
        group = self.param_groups[index]
        config = NaturalConfig(**{name: group[name] for name in OPTIONS})
        rules = NaturalRules(config, scores, process_group)
        self._rules.append(rules)
        own = [
            RouterStack(alike, self, index, lambda *stacked: rules.rule(*stacked, scale=None))
            for alike in group_alike(sites, bias=lambda weight, bias: True).values()
        ]
        self._stacks += own
        for stack in own:
            if group["weight_decay"] and stack.fixed_norm:
                raise ValueError(f"weight_decay has no meaning for rows of fixed norm: router {stack.names[0]}")

    def _tap(self, model: nn.Module, sites: Sequence[RouterSite]) -> list[LayerTap | TokenTap]:
        names = {site.name for site in sites}
        self._tokens = TokenTap(model, names, lambda _: None, _raise, active=self._is_active)
        taps = (
            LayerTap(site, None, None, self._tokens, self.observe, _raise, self._counts, exclusive=False)
            for site in sites
        )
        return [self._tokens, *taps]

    def _counts(self, trained: bool) -> bool:
        return trained and self._is_active()


def _sites_of_groups(
    model: nn.Module, groups: Sequence[Mapping[str, Any]] | None, select: Select, defaults: Mapping[str, Any]
) -> list[tuple[list[RouterSite], dict[str, Any]]]:
    """Return the routers of each group and its own options, checked."""
    found: list[tuple[list[RouterSite], dict[str, Any]]] = []
    taken: set[int] = set()
    for group in [{}] if groups is None else groups:
        own = {name: value for name, value in group.items() if name != "select"}
        _check_names(own, tuple(defaults))
        options = {**defaults, **own}
        NaturalConfig(**{name: options[name] for name in OPTIONS})
        for name in ("lr", "weight_decay"):
            if not 0 <= options[name] < float("inf"):
                raise ValueError(f"{name} must be at least 0, got {options[name]}")
        sites = find_routers(model, group.get("select", select))
        refuse_sharded(model, sites)
        weights = {id(site.weight) for site in sites}
        if weights & taken:
            twice = next(site.name for site in sites if id(site.weight) in taken)
            raise ValueError(f"router {twice} is in two groups")
        taken |= weights
        found.append((sites, own))
    return found


def _parameters(sites: Sequence[RouterSite]) -> list[nn.Parameter]:
    tied = [routers for alike in group_alike(sites, bias=lambda weight, bias: True).values() for routers in alike]
    return [p for routers in tied for p in (routers.weight, routers.bias) if p is not None]


def _check_names(options: Mapping[str, Any], known: Sequence[str]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; known are {', '.join(known)}")


def _raise(error: Exception) -> None:
    raise error
