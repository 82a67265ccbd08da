"""What the tests of transformers' families share."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg

from . import tiny_transformers as tiny
from .tiny_families import FAMILIES
from .tiny_transformers import backward, gradients
from .witness import Call, logits_of, p_of, router_names

LR = 0.01
_BLIND = r"layer .* shows logits, not the experts chosen: .*GeometryConfig\(top_k=\.\.\.\) takes the k largest"
families = pytest.mark.parametrize("family", tiny.available())


@dataclass(frozen=True)
class Stock:
    """A family as it is without us; its model is never touched, only copied."""

    model: Any
    output: Tensor
    gradients: dict[str, Tensor]

    def copy(self) -> Any:
        return copy.deepcopy(self.model)


def stocks() -> Callable[[str], Stock]:
    """Return what builds each family once."""
    built: dict[str, Stock] = {}

    def get(family: str) -> Stock:
        if family not in built:
            model = tiny.build(family)
            trained = copy.deepcopy(model)
            output = backward(trained)
            built[family] = Stock(model, output, gradients(trained))
        return built[family]

    return get


def four() -> bool:
    return tiny.installed().startswith("4.")


def blind(family: str) -> bool:
    """Whether what the routers choose does not show: the choices of transformers 4 do not always follow from logits."""
    return FAMILIES[family].blind_4 and four()


@contextmanager
def known_warnings(family: str) -> Iterator[None]:
    """Let pass what the library is known to say of a family."""
    with warnings.catch_warnings():
        for message in (*FAMILIES[family].warns, *((_BLIND,) if blind(family) else ())):
            warnings.filterwarnings("ignore", message)
        if four() and family == "GptOss":
            warnings.filterwarnings("ignore", "layer .* shows the experts chosen, not their gates: no FHS by outputs")
        yield


def attach(model: nn.Module, optimizer: Any = None, **options: Any) -> mg.Geometry:
    options = {"regularizers": mg.Regularizers.none(), "on_error": "raise", "controller": None} | options
    return mg.attach(model, optimizer, mg.GeometryConfig(**options))


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(torch.equal(ours[name], value) for name, value in theirs.items())


def close(found: dict[str, float], expected: dict[str, float], rel: float = 1e-4) -> None:
    assert found == pytest.approx(expected, rel=rel, abs=1e-6)


def routing(model: nn.Module, name: str, call: Call, family: str) -> Tensor:
    """Return p (T, E) of the router as it is now, for what it was called with."""
    return p_of(logits_of(model, name, call, FAMILIES[family]), FAMILIES[family].scores)


def names_of(model: nn.Module, found: dict[str, float]) -> dict[str, str]:
    """Return each layer's name in the metrics: the only one whose parts are all in the router's name, in order."""
    shorts = list(dict.fromkeys(key.split("/")[1] for key in found if key.endswith("/p/0")))
    names = list(router_names(model))
    if len(shorts) < len(names):
        names = [name for name in names if "vision" not in name]
    assert len(set(shorts)) == len(names)
    return dict(zip(names, shorts, strict=True))


def router_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: g for name, g in gradients(model).items() if name in router_names(model).values()}
