"""Finding the experts that belong to a router: a list of modules, or one module with stacked weights."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

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

    @property
    def stacked(self) -> bool:
        """Whether the experts are one module with weights (E, …)."""
        return not self.modules


def block_of(model: nn.Module, site: RouterSite) -> tuple[str, nn.Module] | None:
    """Return the name and the module of the MoE block a router is in, the nearest ancestor that has a forward.

    None where there is no such module: the router is the model, or is called from outside.
    """
    name = site.name
    while name:
        name = name.rpartition(".")[0]
        module = model.get_submodule(name)
        if not isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            return name, module
    return None


def find_experts(model: nn.Module, site: RouterSite) -> Experts | None:
    """Return the experts beside a router, None where none are found.

    They are the first of these in its block: a list (or dict) of E modules in a child whose name contains ``expert``,
    such a child with parameters (E, …) of at least two dimensions, the block itself with 3-D parameters (E, …).
    Shared experts are left out.

    Args:
        model: the model the site was found in.
        site: the router.
    """
    block = block_of(model, site)
    if block is None:
        return None
    name, module = block
    prefix = f"{name}." if name else ""
    for child_name, child in module.named_children():
        if "expert" not in child_name.lower() or "shared" in child_name.lower() or child is site.module:
            continue
        found = _experts(f"{prefix}{child_name}", child, site.num_experts)
        if found is not None:
            return found
    own = [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] == site.num_experts]
    return Experts(name=name, container=module) if own else None


def _experts(name: str, child: nn.Module, num_experts: int) -> Experts | None:
    for inner_name, inner in ((name, child), *((f"{name}.{n}", m) for n, m in child.named_children())):
        if isinstance(inner, nn.ModuleList | nn.ModuleDict) and len(inner) == num_experts:
            return Experts(name=inner_name, container=inner, modules=tuple(inner.children()))
    if any(p.ndim >= 2 and p.shape[0] == num_experts for p in child.parameters(recurse=False)):
        return Experts(name=name, container=child)
    return None
