"""What a model's routers decide, seen from outside: by hooks and mathematics of the tests' own.

Shape legend: T tokens, E experts, K chosen experts, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .tiny_families import WIDTH, Tiny

_LEAVES = {"gate", "router", "wg"}


@dataclass
class Call:
    """One forward pass of one router.

    Attributes:
        x: (T, D) what its linear map was given.
        ids: (T, K) the choices that its experts were called with; None where they are called otherwise.
        gates: (T, K) their weights.
        counts: (E,) how many tokens each expert was called with.
        outputs: the tensors that the router returned.
        block: the output of the module around router and experts.
        mix: (T, D) the output of the module that was called with choices and gates.
    """

    x: Tensor
    outputs: list[Tensor]
    ids: Tensor | None = None
    gates: Tensor | None = None
    counts: Tensor | None = None
    block: Tensor | None = None
    mix: Tensor | None = None


def router_names(model: nn.Module) -> dict[str, str]:
    """Return for each router's name that of its (E, D) weight, by the names of parameters alone."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")[:-1]
        places = [i for i, part in enumerate(parts) if part in _LEAVES]
        if places and name.endswith(".weight") and parameter.ndim == 2 and parameter.shape[1] == WIDTH:
            found[".".join(parts[: places[0] + 1])] = name
    return found


@contextmanager
def witness(model: nn.Module) -> Iterator[dict[str, Call]]:
    """Record the forward passes inside, by the names of the routers."""
    calls: dict[str, Call] = {}
    handles: list[Any] = []
    for name, weight in router_names(model).items():
        handles += _watch(model, name, weight, calls)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _watch(model: nn.Module, name: str, weight: str, calls: dict[str, Call]) -> list[Any]:
    router, block = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    linear = model.get_submodule(weight.rpartition(".")[0])
    experts = model.get_parameter(weight).shape[0]
    inputs: list[Tensor] = []
    mixers: list[nn.Module] = []

    def routed(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x = inputs.pop() if inputs else args[0]
        outputs = [output] if isinstance(output, Tensor) else [t for t in output if isinstance(t, Tensor)]
        calls[name] = Call(x.detach().reshape(-1, WIDTH).clone(), [t.detach().clone() for t in outputs])

    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = calls.get(name)
        if call is not None and call.ids is None and call.counts is None:
            _read(call, [*args, *kwargs.values()], experts)
            mixers.extend([module] if call.gates is not None else [])

    def mixed(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if module in mixers and output.requires_grad:
            output.retain_grad()
            calls[name].mix = output

    def counted(expert: int) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...]) -> None:
            call = calls[name]
            call.counts = torch.zeros(experts) if call.counts is None else call.counts
            call.counts[expert] += args[0].numel() // args[0].shape[-1]

        return count

    def left(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = calls.get(name)
        if call is None:
            return
        call.block = output[0] if isinstance(output, tuple) else output
        if call.counts is None:
            _read_weights(call, experts)

    handles = [router.register_forward_hook(routed), block.register_forward_hook(left)]
    if linear is not router:
        handles.append(linear.register_forward_pre_hook(lambda module, args: inputs.append(args[0])))
    for inner_name, inner in block.named_modules(prefix=name.rpartition(".")[0]):
        if inner is block or f"{inner_name}.".startswith(f"{name}.") or "shared" in inner_name:
            continue
        handles.append(inner.register_forward_pre_hook(called, with_kwargs=True))
        handles.append(inner.register_forward_hook(mixed))
        if isinstance(inner, nn.ModuleList | nn.ModuleDict) and len(inner) == experts:
            for index, expert in enumerate(inner.children()):
                handles.append(expert.register_forward_pre_hook(counted(index)))
    return handles


def _read(call: Call, values: list[Any], experts: int) -> None:
    """Take note of what experts are called with, in whichever of three ways that is."""
    tokens = len(call.x)
    for value in values:
        if isinstance(value, list) and len(value) == experts and all(isinstance(n, int) for n in value):
            call.counts = torch.tensor(value).float()
        if not isinstance(value, Tensor):
            continue
        if not value.is_floating_point() and value.ndim == 1 and len(value) == experts:
            call.counts = value.float()
        elif not value.is_floating_point() and value.ndim == 2 and len(value) == tokens and value.shape[1] < experts:
            call.ids = value.clone()
        elif value.is_floating_point() and value.shape == (experts * tokens, WIDTH):
            # Every token for every expert, as zeros where it is not chosen (Llama 4).
            call.counts = value.view(experts, tokens, WIDTH).any(dim=-1).sum(dim=-1).float()
    if call.ids is not None:
        call.counts = torch.bincount(call.ids.flatten(), minlength=experts).float()
        gates = [v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.shape == call.ids.shape]
        call.gates = gates[0].detach().clone() if gates else None


def _read_weights(call: Call, experts: int) -> None:
    """Count the choices by the weights (T, E) that a router returns, which are 0 elsewhere (NLLB)."""
    weights = [t for t in call.outputs if t.is_floating_point() and t.shape == (len(call.x), experts) and not t.all()]
    if weights:
        call.counts = (weights[0] > 0).sum(dim=0).float()


def logits_of(model: nn.Module, name: str, call: Call, tiny: Tiny) -> Tensor:
    """Return (T, E) ``x Wᵀ + b`` in fp64, times the router's own factor if it has one."""
    weight = router_names(model)[name]
    bias = getattr(model.get_submodule(weight.rpartition(".")[0]), "bias", None)
    z = call.x.double() @ model.get_parameter(weight).detach().double().T
    z = z if bias is None else z + bias.detach().double()
    return z * getattr(model.get_submodule(name), tiny.scale) if tiny.scale else z


def p_of(z: Tensor, scores: str) -> Tensor:
    """Return (T, E) the scores over their sum."""
    return z.softmax(dim=-1) if scores == "softmax" else z.sigmoid() / z.sigmoid().sum(dim=-1, keepdim=True)


def traces_of(call: Call, kept: Tensor) -> Tensor | None:
    """Return (E,) ``Σ_t g_te² ‖∂L/∂y_t‖²`` of a call after its backward pass; None if that cannot be seen."""
    if call.mix is None or call.ids is None or call.gates is None or call.counts is None:
        return None
    assert call.mix.grad is not None
    signal = call.mix.grad.reshape(len(call.x), -1).double().square().sum(dim=-1) * kept
    signal_TK = call.gates.double().square() * signal.unsqueeze(-1)
    return torch.zeros(len(call.counts)).double().index_add(0, call.ids.flatten(), signal_TK.flatten())


def fsi_of(p: Tensor) -> float:
    """Return the distance of a distribution (E,) from uniform, over that of one-hot."""
    experts = len(p)
    return math.acos(min(1.0, float((p / experts).sqrt().sum()))) / math.acos(1 / math.sqrt(experts))


def mask_of(arguments: dict[str, Tensor], name: str) -> Tensor:
    """Return (T,) True where a token counts, of the encoder or the decoder."""
    decoder = "decoder" in name.split(".") and "decoder_attention_mask" in arguments
    return arguments["decoder_attention_mask" if decoder else "attention_mask"].reshape(-1) > 0


def hooks_of(model: nn.Module) -> list[tuple[str, str, int]]:
    """Return every hook dictionary that is not empty: module, kind, size."""
    kinds = [kind for kind in vars(nn.Module()) if kind.endswith("_hooks")]
    return [
        (name, kind, len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in kinds
        if getattr(module, kind)
    ]
