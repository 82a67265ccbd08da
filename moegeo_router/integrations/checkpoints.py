"""What lies in the folder of a model of transformers: weights of some of its modules, without loading the rest."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor


def weights_in(folder: Path, model: Any, names: Iterable[str]) -> dict[str, Tensor]:
    """Return those of a model's parameters that its folder has as safetensors, by name.

    Args:
        folder: with ``model.safetensors``, or an index and its shards.
        model: the model, which may be on the meta device.
        names: of the parameters.

    Raises:
        Exception: of a file that is damaged, whatever reading it raises.
    """
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.is_file() and not file.is_file():
        return {}
    from safetensors import safe_open

    if index.is_file():
        files: dict[str, str] = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(file, framework="pt") as tensors:
            files = dict.fromkeys(tensors.keys(), file.name)
    in_model = _key_in_model(model)
    keys = {in_model(key): key for key in files} | {key: key for key in files}
    found = {}
    for name in names:
        key = keys.get(name)
        if key is not None and (folder / files[key]).is_file():
            with safe_open(folder / files[key], framework="pt") as tensors:
                found[name] = tensors.get_tensor(key)
    return found


def _key_in_model(model: Any) -> Callable[[str], str]:
    """Return what makes a name in a checkpoint the model's own: transformers 5 renames some (Mixtral's)."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        return str
    renamings = [found for found in get_model_conversion_mapping(model) if isinstance(found, WeightRenaming)]
    prefix, own = model.base_model_prefix, dict(model.named_parameters())
    return lambda key: rename_source_key(key, renamings, [], prefix, own)[0]
