"""The routers' step, taken over from the user's optimizers.

Geometry lives in the step. Around every ``optimizer.step()`` a pre-hook withholds the gradients of the routers'
weights, so that the user's optimizer passes them by, and a post-hook moves the weights along their manifolds with the
learning rate of the group they sit in. Schedulers, groups, clipping and gradient scaling keep working: they act on the
optimizer and on the gradients, which are the user's own.

Routers that are alike are stepped as one (``stack``), by the rule that ``step`` names (``riemannian``, ``natural``).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..observe.forward import LayerForward
from ..routers.find import RouterSite
from ..routers.tag import manifold_of
from .natural import Movement, NaturalRule
from .point import TiedRouters
from .riemannian import RiemannianAdamRule
from .rows import NotLinearError
from .rules import NaturalRules
from .stack import RouterStack, group_alike

# Of the function that torch puts around every ``step``.
_HOOKED_STEP = Optimizer.profile_hook_step(lambda: None).__code__


class RouterSteps:
    """Steps the routers whenever the user's optimizers step, by Riemannian Adam or by natural gradients.

    Half-precision weights keep an fp32 master. The optimizers' weight decay is not applied: where a step is relative to
    the length of a row, it would not hold back the direction, which routes, but only shrink the scale of the logits.

    Args:
        sites: routers whose weights are on a manifold of this library; one that is frozen stays where it is while it
            is.
        optimizers: those that hold the weights.
        natural: makes natural steps (``NaturalRule``), of weights and biases; None: Riemannian Adam, of the weights.
            Routers that show no tokens, or whose logits are not ``x Wᵀ + b``, have Riemannian Adam all the same.
        scale: factor on the learning rate.
        before: called before a step of the last of the optimizers, with all gradients in place.
        after: called after it.

    Attributes:
        skipped: whether a gradient scaler had the last step skipped inside of a fused optimizer.

    Raises:
        ValueError: a weight that is on no manifold or in no optimizer, or an optimizer that is taken over already.
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        optimizers: Sequence[Optimizer],
        *,
        natural: NaturalRules | None = None,
        scale: float = 1.0,
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        self._before, self._after = before, after
        self._optimizers, self._natural = list(optimizers), natural
        self._unfit: dict[str, str] = {}
        self.skipped = False
        for optimizer in self._optimizers:
            _refuse_second(optimizer)
        self._scale = scale
        self._rule = self._riemannian if natural is None else partial(natural.rule, scale=scale)
        self._stacks = self._collect(sites)
        self._handles = [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._withhold),
                optimizer.register_step_post_hook(self._step),
            )
        ]

    def remove(self) -> None:
        """Give the step back to the user's optimizers."""
        for handle in self._handles:
            handle.remove()

    def observe(self, seen: LayerForward) -> None:
        """Take what natural steps need of a training forward; a router whose logits are not ``x Wᵀ + b`` has none."""
        if self._natural is None:
            return
        try:
            self._natural.observe(seen)
        except NotLinearError as error:
            self._unfit[seen.layer] = str(error)

    def takes(self, name: str) -> bool:
        """Whether the tokens of a router are of any use: always where no step needs them."""
        return self._natural is None or self._natural.takes(name)

    @property
    def natural(self) -> list[str]:
        """The names of the routers that are stepped naturally."""
        return [name for stack in self._stacks if isinstance(stack.rule, NaturalRule) for name in stack.names]

    def leave_natural_steps(self) -> None:
        """Step all routers by Riemannian Adam from here on."""
        for stack in self._stacks:
            if isinstance(stack.rule, NaturalRule):
                self._fall_back(stack)

    def limit_speed(self, limits: Mapping[str, float | None]) -> None:
        """Set the speed limits of natural steps by router, radians a step; None: no limit.

        Raises:
            ValueError: a router that is not stepped naturally, or a limit that is not above 0.
        """
        known = self.natural
        for name, limit in limits.items():
            if name not in known:
                raise ValueError(
                    f"router {name!r} is not stepped naturally; those that are: {', '.join(known) or 'none'}"
                )
            if limit is not None and not 0 < limit < float("inf"):
                raise ValueError(f"the speed limit of router {name} must be above 0 (radians) or None, got {limit}")
        if self._natural is not None:
            self._natural.set_limits(limits)

    def forget(self, name: str, experts: Sequence[int]) -> None:
        """Let go of what is known of the last steps of a router's rows: they are others from here on.

        Raises:
            ValueError: a router that is not stepped here.
        """
        for stack in self._stacks:
            if (index := stack.index_of(name)) is not None:
                stack.rule.forget(index, experts)
                return
        raise ValueError(f"router {name!r} is not stepped here; those that are: {', '.join(self.names) or 'none'}")

    def is_natural(self, name: str) -> bool:
        """Whether a router is stepped naturally."""
        return name in self.natural

    @property
    def speed_limits(self) -> dict[str, float | None]:
        """The speed limits of the routers that are stepped naturally, radians a step; None: no limit."""
        limits: dict[str, float | None] = {}
        for stack in self._stacks:
            if isinstance(stack.rule, NaturalRule):
                limits |= dict(zip(stack.names, stack.rule.limits, strict=True))
        return limits

    @property
    def names(self) -> list[str]:
        """The routers' names, in the order of ``movement``."""
        return [name for stack in self._stacks for name in stack.names]

    @property
    def movement(self) -> Movement | None:
        """What the last natural steps did, in the order of ``names``; None where there are none."""
        return None if self._natural is None or not self._stacks else self._natural.movement

    def state_dict(self) -> dict[str, Any]:
        """Return the state of every router's step, by name."""
        return {name: state for stack in self._stacks for name, state in stack.state_dict().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``, bit for bit.

        Raises:
            ValueError: the state is of other routers.
        """
        if sorted(self.names) != sorted(state):
            raise ValueError(f"the state is of routers {', '.join(state)}, these are {', '.join(self.names)}")
        for stack in self._stacks:
            if state[stack.names[0]].get("fell_back") and isinstance(stack.rule, NaturalRule):
                self._fall_back(stack)
            stack.load_state_dict(state)

    def _collect(self, sites: Sequence[RouterSite]) -> list[RouterStack]:
        """Put routers together that can be stepped as one: the same optimizer, group, manifold and shape."""
        held = []
        if adapted := [site.name for site in sites if site.adapted]:
            warnings.warn(
                f"the routers {', '.join(adapted)} are trained by adapters (LoRA), which your optimizer steps: only "
                "their weights could be stepped along a manifold, and these are frozen",
                stacklevel=4,
            )
        for site in sites:
            manifold, place = manifold_of(site.weight), self._place(site.weight)
            if site.adapted or (not site.weight.requires_grad and (manifold is None or place is None)):
                continue  # frozen, and not held by any optimizer that could step it later
            if place is None:
                raise ValueError(f"the weight of router {site.name} is in no optimizer given to attach")
            if manifold is None:
                raise ValueError(
                    f"router {site.name} is on no manifold: call geometrize(model) before attach(model, optimizer), "
                    "or leave its step to the optimizer with GeometryConfig(step=None)"
                )
            held.append(site)
        self._left = [site for site in sites if not site.weight.requires_grad and site not in held]
        alike = group_alike(held, self._place, self._together)
        places: dict[Any, tuple[int, int]] = {key: key[0] for key in alike}
        return [
            RouterStack(together, self._optimizers[places[key][0]], places[key][1], self._rule)
            for key, together in alike.items()
        ]

    def _riemannian(
        self, like: Tensor, manifold: Any, routers: Sequence[TiedRouters], group: Mapping[str, Any]
    ) -> RiemannianAdamRule:
        return RiemannianAdamRule(like, manifold, self._scale)

    def _together(self, weight: nn.Parameter, bias: nn.Parameter) -> bool:
        """Whether a router's bias is stepped with its weight: by natural steps, where one optimizer holds both."""
        places = [self._place(parameter) for parameter in (weight, bias)]
        return self._natural is not None and None not in places and places[0][0] == places[1][0]  # type: ignore[index]

    def _place(self, weight: Tensor) -> tuple[int, int] | None:
        """Return which optimizer and which of its groups holds a router's weight, None if none does."""
        for number, optimizer in enumerate(self._optimizers):
            for index, group in enumerate(optimizer.param_groups):
                if any(parameter is weight for parameter in group["params"]):
                    return number, index
        return None

    def _withhold(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Take the routers' gradients away before ``optimizer`` steps; with a closure, whenever that has made them."""
        if _is_inner(optimizer):
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._take(optimizer)
            return None

        def withholding() -> Any:
            self._give_back(optimizer)  # the closure's own zero_grad must find them
            loss = closure()
            self._take(optimizer)
            return loss

        if "closure" in kwargs:
            return args, kwargs | {"closure": withholding}
        return (args[0], withholding, *args[2:]), kwargs

    def _take(self, optimizer: Optimizer) -> None:
        if optimizer is self._optimizers[-1]:
            self._before()
        self._tell_of_late()
        for stack in self._stacks:
            if stack.optimizer is optimizer:
                self._check_tokens(stack)
                stack.withhold()

    def _tell_of_late(self) -> None:
        """Say it, once, when a router is trained that was frozen and that nobody was going to step."""
        late = [site.name for site in self._left if site.weight.grad is not None]
        if late:
            self._left = []
            warnings.warn(
                f"the routers {', '.join(late)} were frozen when their steps were taken over, and have gradients now: "
                "they are stepped along no manifold; detach() and attach again",
                stacklevel=2,
            )

    def _check_tokens(self, stack: RouterStack) -> None:
        """Have Riemannian Adam step a stack, from now on, that lacks what natural steps need."""
        if not isinstance(stack.rule, NaturalRule) or all(parameter.grad is None for parameter in stack.parameters):
            return
        reasons = [self._unfit[name] for name in stack.names if name in self._unfit]
        # A router without a gradient stays where it is: that of the images in a step of text needs no tokens.
        each = zip(stack.names, stack.rule.ready(), stack.parameters, strict=False)
        missing = [name for name, known, weight in each if not known and weight.grad is not None]
        if missing:
            seen = "were seen in training mode (record takes them as x=...)"
            reasons.append(f"no tokens of {', '.join(missing)} {seen}, which natural steps need")
        if reasons:
            self._fall_back(stack)
            names = ", ".join(stack.names)
            warnings.warn(f"{reasons[0]}: Riemannian Adam steps {names} instead", stacklevel=2)

    def _fall_back(self, stack: RouterStack) -> None:
        assert self._natural is not None
        self._natural.forget(stack.names)
        stack.fall_back(self._riemannian)

    def _give_back(self, optimizer: Optimizer) -> None:
        for stack in self._stacks:
            if stack.optimizer is optimizer:
                stack.give_back()

    def _step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_inner(optimizer):
            return
        skipped: Tensor | None = getattr(optimizer, "found_inf", None)  # of a gradient scaler, around fused optimizers
        self.skipped = skipped is not None and bool(skipped)
        if not self.skipped:
            for stack in self._stacks:
                if stack.optimizer is optimizer:
                    stack.step(getattr(optimizer, "grad_scale", None))
        self._give_back(optimizer)
        if optimizer is self._optimizers[-1]:
            self._after()


def _is_inner(optimizer: Optimizer) -> bool:
    """Return whether a hook was called by a step inside of another step of the same optimizer.

    torch wraps ``step`` of every class that an optimizer was made of: where a subclass calls ``super().step()``, the
    hooks run for both. Read from the stack, because a step that raises runs no hook that could reset a flag.
    """
    frame, steps = sys._getframe(1).f_back, 0
    while frame is not None and steps < 2:
        steps += frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return steps > 1


def _refuse_second(optimizer: Optimizer) -> None:
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), RouterSteps) for hook in hooks):
        raise ValueError("the optimizer's router step is taken over already: detach() the other attach first")
