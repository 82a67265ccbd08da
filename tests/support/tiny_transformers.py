"""Tiny random models of the families of transformers that have a router: built in a tenth of a second, seeded."""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from typing import Any

import torch
from torch import Tensor, nn

from .tiny_families import FAMILIES, REFUSED, SIZES, VOCABULARY, WIDTH

BATCH, LENGTH, PADDED = 2, 12, 4

# Biases that choose experts and do nothing else.
SELECTION = ("e_score_correction_bias", "expert_bias")


def build(family: str, **changes: Any) -> Any:
    """Return a seeded fp32 model of a family in training mode, its routers decided, its selection biases not 0."""
    tiny = FAMILIES.get(family) or REFUSED[family]
    older = tiny.changes_4 if installed().startswith("4.") else {}
    config = find_class(f"{family}Config")(**({} if tiny.alone else SIZES) | tiny.config | older | changes)
    torch.manual_seed(0)
    model = find_class(tiny.model or f"{family}ForCausalLM")(config).float().train()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(SELECTION):
                tensor.normal_(std=0.1)
            elif tensor.shape[-1:] == (WIDTH,) and tensor.ndim == 2 and _in_router(name):
                tensor.normal_(std=0.3)
    return model


def available() -> list[str]:
    """Return the families that the installed version has."""
    major = int(installed().partition(".")[0])
    return [name for name, tiny in FAMILIES.items() if major > 4 or tiny.in_4]


def installed() -> str:
    """Return the version of transformers, 0 where there is none."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return "0"


def _in_router(name: str) -> bool:
    *parents, leaf = name.split(".")
    return leaf == "weight" and bool({"gate", "router", "wg"} & set(parents)) and "experts" not in parents


def find_class(name: str) -> Any:
    """Return a class of transformers, whether its main module exports it or not."""
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    for module in pkgutil.iter_modules(transformers.models.__path__):
        if name.lower().startswith(module.name.replace("_", "")):
            for kind in ("modeling", "configuration"):
                found = importlib.import_module(f"transformers.models.{module.name}.{kind}_{module.name}")
                if hasattr(found, name):
                    return getattr(found, name)
    raise LookupError(f"transformers has no {name}")


def batch(model: Any, masked: bool = True) -> dict[str, Tensor]:
    """Return what a model is called with: two sequences, the second one's end padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if masked:
        mask[1, -PADDED:] = 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    decoder_ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH - 3), generator=generator)
    decoder_mask = torch.ones_like(decoder_ids)
    if masked:
        decoder_mask[0, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


def run(model: nn.Module, masked: bool = True, **arguments: Any) -> Tensor:
    """Return the newest hidden states or logits of a forward pass, whose random numbers are always the same."""
    torch.manual_seed(2)
    found = model(**batch(model, masked), **arguments)
    output = getattr(found, "logits", None)
    return found.last_hidden_state if output is None else output


def loss_of(output: Tensor) -> Tensor:
    """Return a loss that reaches every output, of the same size whatever theirs is."""
    output = output.float() / output.detach().float().std()
    return 10 * (output.square() + output.sin()).mean()


def backward(model: nn.Module, masked: bool = True, **arguments: Any) -> Tensor:
    """Run a forward and a backward pass from gradients of 0; return the output."""
    model.zero_grad()
    output = run(model, masked, **arguments)
    loss_of(output).backward()
    return output.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
