"""PEFT: the model behind its wrappers. Its classes are told by their names, so nothing is imported.

PEFT puts modules of its own in the place of others: a copy to train beside the original (``modules_to_save``), a layer
that adds to the output of the original (LoRA of ``nn.Linear``), one that adds to a parameter while the original runs
(``target_parameters``). Here every place has the module that computes there, under the name that it has without PEFT.

After ``set_adapter`` another copy computes: attach again.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside of a ``PeftModel``, and any other as it is."""
    return model.get_base_model() if _is_a(model, "PeftModel") else model  # type: ignore[operator]


def in_use(module: nn.Module) -> nn.Module:
    """Return the module that computes where PEFT's wrapper is; any other as it is."""
    while True:
        if _is_a(module, "AuxiliaryTrainingWrapper") and hasattr(module, "modules_to_save"):
            copies: dict[str, nn.Module] = dict(module.modules_to_save.named_children())  # type: ignore[union-attr]
            used = [copies[adapter] for adapter in module.active_adapters if adapter in copies]  # type: ignore[union-attr]
            module = used[0] if used else module.original_module  # type: ignore[assignment]
        elif _is_a(module, "BaseTunerLayer") and isinstance(base := getattr(module, "base_layer", None), nn.Module):
            module = base
        else:
            return module


def children_in_use(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_children`` does, of every child the module that computes."""
    for name, child in module.named_children():
        yield name, in_use(child)


def modules_in_use(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``named_modules`` does of the model without PEFT: names, order, every module once."""
    seen: set[int] = set()

    def walk(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if id(module) in seen:
            return
        seen.add(id(module))
        yield name, module
        for child_name, child in children_in_use(module):
            yield from walk(f"{name}.{child_name}" if name else child_name, child)

    yield from walk("", in_use(base_model(model)))


def submodule(model: nn.Module, name: str) -> nn.Module:
    """Return the module of a name that ``modules_in_use`` gave."""
    return in_use(_at(model, name))


def adapter_of(model: nn.Module, name: str, projection: nn.Module) -> nn.Module | None:
    """Return PEFT's layer (LoRA and the like) that adds to a router's weight; None if there is none.

    Args:
        model: the model.
        name: of the router.
        projection: what holds its weight: the router, or a layer inside of it.
    """
    place = _at(model, name)
    layers = [place, *(layer for layer in in_use(place).modules() if layer is not projection)]
    return next((layer for layer in layers if _is_a(layer, "BaseTunerLayer") and in_use(layer) is projection), None)


def adds_to_output(adapter: nn.Module) -> bool:
    """Return whether an adapter changes what its base returns, and not a parameter while the base runs."""
    return not _is_a(adapter, "ParamWrapper")


def trains(adapter: nn.Module) -> bool:
    """Return whether an adapter's own parameters, not those of its base, are trained."""
    base = {id(parameter) for parameter in in_use(adapter).parameters()}
    return any(parameter.requires_grad and id(parameter) not in base for parameter in adapter.parameters())


def _at(model: nn.Module, name: str) -> nn.Module:
    """Return what is at a place, wrapper or not."""
    module = base_model(model)
    for part in name.split(".") if name else ():
        inside = in_use(module)
        if part not in inside._modules:
            raise AttributeError(f"{type(inside).__name__} has no module {part!r} (of {name!r})")
        module = inside._modules[part]  # type: ignore[assignment]
    return module


def _is_a(module: nn.Module, name: str) -> bool:
    return any(base.__name__ == name for base in type(module).__mro__)
