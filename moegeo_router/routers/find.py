"""Finding the routers of a model, whatever code base it comes from.

A router is a module with a weight (E, D) whose forward yields logits: an ``nn.Linear``, a module that holds the weight
itself, or one that holds an ``nn.Linear``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..integrations import peft
from ..integrations.families import known_block, known_family
from .family import RouterFamily, Routing

#: What selects routers: a pattern of qualified names, a module type, a module, a predicate, a family, or several.
Selector = str | type[nn.Module] | nn.Module | RouterFamily | Callable[[str, nn.Module], bool]
Select = Selector | Sequence[Selector] | None

# Habits of the field: how code bases call the router.
_CLASS_ENDINGS = ("MoEGate", "MoEV1Gate", "TopKGate", "TopKGating")
_LINEAR_NAMES = ("gate", "router", "wg")


@dataclass(frozen=True, kw_only=True)
class RouterSite:
    """One router in a model.

    Attributes:
        name: qualified name of the router module, in PEFT models the one it has without PEFT.
        module: the module whose forward yields the router's logits.
        projection: the module that holds the weight: the router itself, or its ``nn.Linear``.
        routing: how it routes, as far as its family is known.
        adapter: PEFT's layer (LoRA) that adds to the weight, None if there is none.
    """

    name: str
    module: nn.Module
    projection: nn.Module
    routing: Routing = field(default_factory=Routing)
    adapter: nn.Module | None = None

    @property
    def weight(self) -> nn.Parameter:
        """The (E, D) weight."""
        return self.projection.weight  # type: ignore[return-value]

    @property
    def adapted(self) -> bool:
        """Whether its weight rests, and an adapter that adds to it is trained."""
        return not self.weight.requires_grad and self.adapter is not None and peft.trains(self.adapter)

    @property
    def frozen(self) -> bool:
        """Whether nothing of it is trained."""
        return not self.weight.requires_grad and not self.adapted

    @property
    def num_experts(self) -> int:
        """E, the rows of the weight."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """D, the columns of the weight."""
        return self.weight.shape[1]


def find_routers(model: nn.Module, select: Select = None) -> list[RouterSite]:
    """Return the routers of ``model`` in the order of its modules.

    Without ``select`` a module counts as a router if its class is called ``*Router*`` (or ``*MoEGate``, ``*TopKGate``,
    …) and holds a 2-D weight or a linear layer (of several: the one as wide as the experts beside), or if it is an
    ``nn.Linear`` called ``router`` or ``wg``, or one called ``gate`` beside as many experts as it has outputs (a gate
    without experts beside it may be a gated MLP's).

    Args:
        model: any module.
        select: instead of the rules above: a pattern of qualified names (``"layers.*.mlp.gate"``; a star matches dots,
            too), a module type, a module, a predicate ``(name, module) -> bool``, a ``RouterFamily``, or a sequence of
            these.

    Raises:
        ValueError: no router found, a selector that selects nothing, a selected module without an (E, D) weight, a
            router of a family that cannot be served, or one on the meta device.
        TypeError: a selector of another type.
    """
    sites = sites_of(model, select)
    for site in sites:
        if site.weight.device == torch.device("meta"):
            raise ValueError(
                f"the weight of router {site.name} is on the meta device: materialise the model first (load its "
                "weights, or model.to_empty(device=...) and initialise them)"
            )
    return sites


def sites_of(model: nn.Module, select: Select = None) -> list[RouterSite]:
    """Return what ``find_routers`` does, also of a model that is not there yet: one on the meta device."""
    chosen: list[tuple[str, nn.Module]] = []
    for name, module in peft.modules_in_use(model):
        inside_chosen = any(name.startswith(f"{outer}." if outer else "") for outer, _ in chosen)
        if not inside_chosen and (
            _looks_like_router(model, name, module) if select is None else _selected(model, select, name, module)
        ):
            chosen.append((name, module))
    if not chosen:
        raise ValueError(_nothing_found(model, select))
    _check_every_selector(model, select, chosen)
    families = [selector for selector in _selectors(select) if isinstance(selector, RouterFamily)]
    return [_site(model, name, module, families) for name, module in chosen]


def _selectors(select: Select) -> Iterator[Selector]:
    if isinstance(select, Sequence) and not isinstance(select, str):
        yield from select
    elif select is not None:
        yield select


def _selected(model: nn.Module, select: Select, name: str, module: nn.Module) -> bool:
    return any(_matches(model, selector, name, module) for selector in _selectors(select))


def _matches(model: nn.Module, selector: Selector, name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    if isinstance(selector, type):
        return isinstance(module, selector)
    if isinstance(selector, nn.Module):
        return module is peft.in_use(selector)
    if isinstance(selector, RouterFamily):
        return selector.matches(module, _around(model, name))
    if callable(selector):
        return bool(selector(name, module))
    raise TypeError(f"select takes name patterns, module types, modules, predicates or families, got {selector!r}")


def _around(model: nn.Module, name: str) -> nn.Module | None:
    return peft.submodule(model, name.rpartition(".")[0]) if name else None


def _check_every_selector(model: nn.Module, select: Select, chosen: list[tuple[str, nn.Module]]) -> None:
    for selector in _selectors(select):
        if not any(_matches(model, selector, name, module) for name, module in chosen):
            raise ValueError(f"select={selector!r} selects no router of this model")


def _looks_like_router(model: nn.Module, name: str, module: nn.Module) -> bool:
    if known_family(module) is not None:
        return True
    if _is_called_router(module):
        return _projection(model, name, module) is not None
    parent_name, _, leaf = name.rpartition(".")
    if not isinstance(module, nn.Linear) or leaf not in _LINEAR_NAMES or (not parent_name and module is model):
        return False
    beside = module.out_features in _expert_counts(peft.submodule(model, parent_name))
    return beside or (leaf != "gate" and module.out_features > 1)


def _is_called_router(module: nn.Module) -> bool:
    class_name = type(module).__name__
    return "Router" in class_name or class_name.endswith(_CLASS_ENDINGS)


def _expert_counts(parent: nn.Module) -> set[int]:
    """Return how many experts the children of a block suggest: lengths of lists, leading dimensions of stacks."""
    counts: set[int] = set()
    for name, child in peft.children_in_use(parent):
        if "expert" not in name.lower():
            continue
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            counts.add(len(child))
        counts.update(p.shape[0] for p in child.parameters(recurse=False) if p.ndim == 3)
        counts.update(len(inner) for inner in child.children() if isinstance(inner, nn.ModuleList))
    counts.update(p.shape[0] for p in parent.parameters(recurse=False) if p.ndim == 3)
    return counts


def _projection(model: nn.Module, name: str, module: nn.Module) -> nn.Module | None:
    """Return what holds a router's weight: itself, its only linear layer, or the one as wide as the experts beside."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter) and weight.ndim == 2:
        return module
    linears = list(_linears(module).values())
    if len(linears) > 1:
        counts = _expert_counts(peft.submodule(model, name.rpartition(".")[0]))
        linears = [child for child in linears if child.out_features in counts]
    return linears[0] if len(linears) == 1 else None


def _linears(module: nn.Module) -> dict[str, nn.Linear]:
    return {name: child for name, child in peft.children_in_use(module) if isinstance(child, nn.Linear)}


def _site(model: nn.Module, name: str, module: nn.Module, families: Sequence[RouterFamily]) -> RouterSite:
    around = _around(model, name)
    family = next((family for family in families if family.matches(module, around)), known_family(module))
    if family is None and around is not None:
        counts = _expert_counts(around)  # a gate of shared experts is no router
        family = known_block(module, around) if not counts or getattr(module, "out_features", 0) in counts else None
    try:
        routing = Routing() if family is None else family.routing(module, around)
    except ValueError as error:
        raise ValueError(f"router {name} ({type(module).__name__}) cannot be served: {error}") from None
    projection = _named_projection(name, module, family) or _projection(model, name, module)
    if projection is None:
        raise ValueError(
            f"router {name} ({type(module).__name__}) has no (E, D) weight, nor one linear layer that must be its own "
            f"(found: {', '.join(_linears(module)) or 'none'}); select the layer itself, or say which it is with "
            "RouterFamily(router=..., projection=...)"
        )
    weight: object = projection.weight
    if isinstance(weight, Tensor) and weight.dtype != torch.bool and weight.element_size() == 1:
        raise ValueError(
            f"the weight of router {name} must be a floating point (E, D) tensor, and is quantised "
            f"({type(weight).__name__}, {weight.dtype}): have whoever quantises the model leave its routers out"
        )
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.ndim != 2:
        raise ValueError(f"the weight of router {name} must be a floating point (E, D) tensor, got {weight!r:.80}")
    if 0 in weight.shape:
        raise ValueError(f"the weight of router {name} must have experts and inputs, got {tuple(weight.shape)}")
    adapter = peft.adapter_of(model, name, projection)
    if adapter is not None and projection is module and peft.adds_to_output(adapter):
        module = adapter
    return RouterSite(name=name, module=module, projection=projection, routing=routing, adapter=adapter)


def _named_projection(name: str, module: nn.Module, family: RouterFamily | None) -> nn.Module | None:
    if family is None or family.projection is None:
        return None
    try:
        return peft.submodule(module, family.projection)
    except AttributeError:
        raise ValueError(f"router {name} ({type(module).__name__}) has no layer {family.projection!r}") from None


def _nothing_found(model: nn.Module, select: Select) -> str:
    linears = [
        f"{name} ({m.in_features} -> {m.out_features})" for name, m in model.named_modules() if isinstance(m, nn.Linear)
    ]
    seen = ", ".join(linears[:8]) + (f" and {len(linears) - 8} more" if len(linears) > 8 else "")
    looked_for = (
        f"select={select!r}"
        if select is not None
        else "classes called *Router*, *MoEGate, *TopKGate; nn.Linear called router or wg, "
        "or called gate beside as many experts"
    )
    return (
        f"no router found in {type(model).__name__}; looked for {looked_for}. Its linear layers: {seen or 'none'}. "
        'Name the routers with select="layers.*.my_gate"' + "".join(f". {hint}" for hint in _hints(model))
    )


def _hints(model: nn.Module) -> Iterator[str]:
    """Yield how to help a router that is there, but not as a layer that the rules take; the first of each kind."""
    several = [(n, m) for n, m in peft.modules_in_use(model) if _is_called_router(m) and len(_linears(m)) > 1]
    for name, router in several[:1]:
        kind, linears = type(router).__name__, list(_linears(router))
        yield (
            f"{name} ({kind}) has several linear layers ({', '.join(linears)}): say which makes the logits, "
            f"select=mg.RouterFamily(router={kind!r}, projection={linears[0]!r}) or another"
        )
    bare = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and _is_bare(model, n, p)]
    for name, parameter in bare[:1]:
        shown = f"{name} {tuple(parameter.shape)}"
        yield f"{shown} is a bare parameter: if it is a router, put mg.GeometricRouter(in_features, num_experts) there"


def _is_bare(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter may be a router that the module around it multiplies by hand."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    named = any(word in leaf.lower() for word in _LINEAR_NAMES)
    return _is_called_router(owner) or (named and not _expert_counts(owner).isdisjoint(parameter.shape))
