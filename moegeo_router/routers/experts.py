"""Finding the experts that belong to a router: a list of modules, or one module with stacked weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from ..integrations import peft
from .find import RouterSite


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The E experts of one router.

    Attributes:
        name: qualified name of the list or of the stacked module.
        container: the list, or the module that holds weights (E, …).
        modules: one module an expert; empty for stacked weights.
    """

    name: str
    container: nn.Module
    modules: tuple[nn.Module, ...] = ()

    def own_parameters(self) -> list[nn.Parameter]:
        """The container's own parameters, without those of its children."""
        return list(self.container.parameters(recurse=False))

    @property
    def stacked(self) -> bool:
        """Whether the experts are one module with weights (E, …)."""
        return not self.modules


def block_of(model: nn.Module, site: RouterSite) -> tuple[str, nn.Module] | None:
    """Return the name and the module of the MoE block a router is in.

    The nearest ancestor that is called and has experts beside the router; where none has, the nearest that is called.
    None where there is no such module: the router is the model, or is called from outside.
    """
    called = list(_called_ancestors(model, site))
    return next((block for block in called if _experts_in(*block, site) is not None), next(iter(called), None))


def find_experts(model: nn.Module, site: RouterSite) -> Experts | None:
    """Return the experts beside a router, None where none are found.

    They are the first of these in its block: a list (or dict) of E modules in a child whose name contains ``expert``,
    such a child with parameters (E, …) of at least two dimensions, such a child with any parameters, the block itself
    with 3-D parameters (E, …). Shared experts are left out.

    Args:
        model: the model the site was found in.
        site: the router.
    """
    block = block_of(model, site)
    return None if block is None else _experts_in(*block, site)


def refuse_sharded(model: nn.Module, sites: Iterable[RouterSite]) -> None:
    """Raise a ValueError if a router's weight, or its experts, are sharded: a rank sees a part of the routing only."""
    for site in sites:
        experts = find_experts(model, site)
        tensors = [(f"the weight of router {site.name}", site.weight)]
        tensors += (
            [] if experts is None else [(f"a weight of {experts.name}", p) for p in experts.container.parameters()]
        )
        for what, tensor in tensors:
            if type(tensor.data).__name__ == "DTensor":
                raise ValueError(
                    f"{what} is a DTensor: sharded, expert- and tensor-parallel models are not supported; load the "
                    "model without a plan (tp_plan, expert parallelism) and train it data-parallel"
                )
        if experts is not None and getattr(experts.container, "_is_expert_parallel", False):
            raise ValueError(
                f"{experts.name} is expert-parallel: load the model without a plan and train it data-parallel"
            )


def _called_ancestors(model: nn.Module, site: RouterSite) -> Iterator[tuple[str, nn.Module]]:
    name = site.name
    while name:
        name = name.rpartition(".")[0]
        module = peft.submodule(model, name)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            yield name, module


def _experts_in(name: str, module: nn.Module, site: RouterSite) -> Experts | None:
    prefix = f"{name}." if name else ""
    opaque = None
    for child_name, child in peft.children_in_use(module):
        if "expert" not in child_name.lower() or "shared" in child_name.lower():
            continue
        if child is site.module or site.name.startswith(f"{prefix}{child_name}."):
            continue
        found = _experts(f"{prefix}{child_name}", child, site.num_experts)
        if found is not None:
            return found
        # Their weights are laid out in a way of their own; what they are called with can be seen.
        if (
            opaque is None
            and not isinstance(child, nn.ModuleList | nn.ModuleDict)
            and any(True for _ in child.parameters())
        ):
            opaque = Experts(name=f"{prefix}{child_name}", container=child)
    if opaque is not None:
        return opaque
    own = [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] == site.num_experts]
    return Experts(name=name, container=module) if own else None


def _experts(name: str, child: nn.Module, num_experts: int) -> Experts | None:
    for inner_name, inner in ((name, child), *((f"{name}.{n}", m) for n, m in peft.children_in_use(child))):
        if not isinstance(inner, nn.ModuleList | nn.ModuleDict):
            continue
        every = tuple(inner.children())
        weighted = tuple(module for module in every if any(True for _ in module.parameters()))
        for modules in (every, weighted):  # NLLB's dict has a dropout beside its experts
            if len(modules) == num_experts:
                return Experts(name=inner_name, container=inner, modules=modules)
    if any(p.ndim >= 2 and p.shape[0] == num_experts for p in child.parameters(recurse=False)):
        return Experts(name=name, container=child)
    return None
