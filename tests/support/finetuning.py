"""Models that are fine-tuned, with PEFT or without: what the tests of it share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import moegeo_router as mg
from tests.support.tiny_transformers import loss_of, run

FAMILIES = {"Mixtral": "gate", "Qwen3Moe": "gate", "DeepseekV3": "gate", "GptOss": "router"}
ALPHA, RANK = 4, 2


def lora(model: nn.Module, **options: Any) -> Any:
    """Wrap a model; the adapters do not begin at 0."""
    import peft

    torch.manual_seed(3)
    options = {"target_modules": ["o_proj"], "init_lora_weights": False} | options
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, **options))


def converted_first(model: nn.Module, **options: Any) -> Any:
    mg.geometrize(model)
    return lora(model, **options)


def converted_last(model: nn.Module, **options: Any) -> Any:
    wrapped = lora(model, **options)
    mg.geometrize(wrapped)
    return wrapped


def base_of(wrapped: Any) -> Any:
    return wrapped.get_base_model()


def adamw(model: nn.Module, trained: bool = True) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad or not trained], lr=1e-2)


def config(**options: Any) -> mg.GeometryConfig:
    usual = {"on_error": "raise", "per_layer": True, "regularizers": mg.Regularizers.none()}
    return mg.GeometryConfig(**usual | options)


def train(model: Any, optimizer: torch.optim.Optimizer, geometry: mg.Geometry | None = None, steps: int = 3) -> None:
    for _ in range(steps):
        loss = loss_of(run(model))
        (loss if geometry is None else loss + geometry.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def layers_of(family: str) -> list[str]:
    numbers = [1] if family == "DeepseekV3" else [0, 1]  # whose first layer is dense
    return [f"model.layers.{number}.mlp.{FAMILIES[family]}" for number in numbers]
