"""PEFT: routers behind its wrappers. Its classes are told by their names, so nothing is imported."""

from __future__ import annotations

from typing import Any

from torch import nn


def is_at_rest(model: nn.Module, name: str) -> bool:
    """Return whether a module is, or is inside of, a copy that PEFT keeps beside the one in use.

    ``modules_to_save`` copies a module for every adapter; the original and the copies of other adapters rest.

    Args:
        model: the model.
        name: qualified name of the module.
    """
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part not in ("original_module", "modules_to_save"):
            continue
        wrapper: Any = model.get_submodule(".".join(parts[:place]))
        if not _is_a(wrapper, "AuxiliaryTrainingWrapper") or not hasattr(wrapper, "modules_to_save"):
            continue
        used = [adapter for adapter in wrapper.active_adapters if adapter in wrapper.modules_to_save]
        if part == "original_module":
            return bool(used)
        return place + 1 < len(parts) and parts[place + 1] not in used
    return False


def adapter_of(model: nn.Module, name: str) -> nn.Module | None:
    """Return PEFT's layer (LoRA and the like) that a module is, or that it is the base of; None if there is none.

    Args:
        model: the model.
        name: qualified name of the module.
    """
    while True:
        module = model.get_submodule(name)
        if _is_a(module, "BaseTunerLayer"):
            return module
        if name.rpartition(".")[2] != "base_layer":
            return None
        name = name.rpartition(".")[0]


def trains(adapter: nn.Module) -> bool:
    """Return whether an adapter's own parameters, not those of its base, are trained."""
    return any(
        parameter.requires_grad
        for name, parameter in adapter.named_parameters()
        if "base_layer" not in name.split(".") and "parametrizations" not in name.split(".")
    )


def base_linear(module: nn.Module) -> nn.Linear | None:
    """Return the ``nn.Linear`` inside of PEFT's layer, None where the module is something else."""
    base = getattr(module, "base_layer", None) if _is_a(module, "BaseTunerLayer") else None
    return base if isinstance(base, nn.Linear) else None


def _is_a(module: nn.Module, name: str) -> bool:
    return any(base.__name__ == name for base in type(module).__mro__)
