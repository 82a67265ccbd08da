"""What a kind of router does that its module does not show by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from ..checks import check_choice
from .gating import ScoreFunction

GatesScale = Literal["output", "input"]


class Routing(NamedTuple):
    """How the routers of a model route.

    Attributes:
        scores: the score function, which makes p of the logits.
        gates: what the gates multiply, the experts' ``"output"`` or their ``"input"``.
        top_k: experts chosen per token, where the layers show logits only.
        renormalize: for the same layers, whether the gates of a token's chosen experts sum to 1.
    """

    scores: ScoreFunction = "softmax"
    gates: GatesScale = "output"
    top_k: int | None = None
    renormalize: bool = True


@dataclass(frozen=True, kw_only=True)
class RouterFamily:
    """A kind of router. Families of transformers are known; one of your own is a ``select`` of every function here.

    What a module shows needs no word: the logits, the chosen experts and their gates are told apart among its outputs
    (``observe.taps``). The defaults are what most families do.

    Attributes:
        router: the class of the router module, or its name.
        projection: path of the linear layer inside of the router, where it is not its only one.
        scores: the score function, or what tells it from the router module.
        gates: what the gates multiply, the experts' ``"output"`` or their ``"input"``.
        top_k: experts chosen per token, or the attribute of the router that says it (dots are followed): for routers
            that show logits only, whose choices are then taken to be the k largest.
        renormalize: for the same routers, whether the gates of a token's chosen experts sum to 1, or the attribute.
        block: the class of the module around the router, or its name, for routers that are plain layers: it tells them
            from others, and has the attributes.
        refused: why such routers cannot be served; None if they can.

    Raises:
        ValueError: an option that is unknown.

    Example:
        >>> mine = mg.RouterFamily(router="MyGate", projection="score.out", scores="sigmoid")
        >>> mg.geometrize(model, select=mine)
        >>> geometry = mg.attach(model, optimizer, mg.GeometryConfig(select=mine))
    """

    router: type[nn.Module] | str
    projection: str | None = None
    scores: ScoreFunction | Callable[[nn.Module], ScoreFunction] = "softmax"
    gates: GatesScale = "output"
    top_k: int | str | None = None
    renormalize: bool | str = True
    block: type[nn.Module] | str | None = None
    refused: str | None = None

    def __post_init__(self) -> None:
        for name, given in (("router", self.router), ("block", self.block)):
            if not isinstance(given, str | type) and (name == "router" or given is not None):
                raise ValueError(f"{name} must be a module class or its name, got {given!r:.80}")
        if not callable(self.scores):
            check_choice("scores", self.scores, get_args(ScoreFunction))
        check_choice("gates", self.gates, get_args(GatesScale))

    def matches(self, module: nn.Module, around: nn.Module | None = None) -> bool:
        """Return whether a module is a router of this family.

        Args:
            module: it.
            around: the module that it is a child of.
        """
        return _is_a(module, self.router) and (self.block is None or _is_a(around, self.block))

    def routing(self, module: nn.Module, around: nn.Module | None = None) -> Routing:
        """Return how a router of this family routes.

        Args:
            module: it.
            around: the module that it is a child of.

        Raises:
            ValueError: such routers cannot be served, score by another function, or have no such attribute.
        """
        if self.refused is not None:
            raise ValueError(self.refused)
        scores = self.scores if isinstance(self.scores, str) else self.scores(module)
        if scores not in get_args(ScoreFunction):
            raise ValueError(f"its scores are {scores}, neither softmax nor sigmoid")
        holder = module if self.block is None else around
        top_k = _said_by(holder, "top_k", self.top_k, int, "whole number")
        renormalize = _said_by(holder, "renormalize", self.renormalize, bool, "flag")
        return Routing(scores, self.gates, top_k, renormalize)


def _is_a(module: nn.Module | None, kind: type[nn.Module] | str) -> bool:
    if isinstance(kind, str):
        return any(base.__name__ == kind for base in type(module).__mro__)
    return isinstance(module, kind)


def _said_by(holder: nn.Module | None, name: str, value: Any, kind: type, called: str) -> Any:
    """Return a value, or that of the attribute that it names."""
    if not isinstance(value, str):
        return value
    try:
        found = attrgetter(value)(holder)
    except AttributeError:
        found = None
    if not isinstance(found, kind):
        raise ValueError(f"it has no {called} {value!r} for {name}")
    return found


def common_routing(routings: Sequence[tuple[str, Routing]]) -> Routing:
    """Return how all routers of a model route.

    Args:
        routings: the name of each router, and how it routes; at least one.

    Raises:
        ValueError: they differ in what a ``GeometryConfig`` says once for all.
    """
    first_name, first = routings[0]
    for name, other in routings:
        for field in Routing._fields:
            ours, theirs = getattr(first, field), getattr(other, field)
            if ours != theirs:
                raise ValueError(
                    f"router {first_name} has {field}={ours!r}, router {name} {field}={theirs!r}: select routers of "
                    f"one kind (GeometryConfig(select=...)), or say GeometryConfig({field}=...) for all of them"
                )
    return first
