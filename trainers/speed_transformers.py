"""What watching a transformers model costs: rows of ``python -m trainers.speed``."""

import copy
import importlib.util
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import moegeo_router as mg
from trainers.pairs import Comparison

BATCH, LENGTH, VOCABULARY = 8, 256, 512


def rows(device: torch.device) -> Iterator[Comparison]:
    """Yield the rows: a training step of a Qwen3-MoE, watched, with everything, and watched by moewatch, vs alone."""
    sides: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
        "watched, default metrics": _watched,
        "everything (steps, regularizers, controller, all scalars)": _everything,
    }
    if importlib.util.find_spec("moewatch") is not None:
        sides["moewatch 0.1.0, every step"] = _moewatch(sample_every=1)
        sides["moewatch 0.1.0, its defaults"] = _moewatch(sample_every=10)
    for name, side in sides.items():
        model = _qwen3(device)
        alone = copy.deepcopy(model)
        goal = 1 / 1.02 if side is _watched else None
        yield Comparison(name=f"Qwen3-MoE step: {name} vs alone", ours=side(model), theirs=_alone(alone), goal=goal)


def _qwen3(device: torch.device) -> nn.Module:
    """Four layers of 16 experts, top-4: 13 million parameters, 2,048 tokens a step."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,  # type: ignore[call-arg]
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=192,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model: nn.Module = transformers.Qwen3MoeForCausalLM(config)
    return model.to(device).train()


def _backward(model: nn.Module, ids: Tensor) -> None:
    model(input_ids=ids, labels=ids).loss.backward()


def _prepared(model: nn.Module) -> tuple[torch.optim.Optimizer, Tensor]:
    device = next(model.parameters()).device
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True), ids


def _alone(model: nn.Module) -> Callable[[], object]:
    optimizer, ids = _prepared(model)

    def step() -> None:
        _backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _watched(model: nn.Module) -> Callable[[], object]:
    optimizer, ids = _prepared(model)
    geometry = mg.attach(model)

    def step() -> dict[str, float]:
        _backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
        return geometry.metrics()

    return step


def _everything(model: nn.Module) -> Callable[[], object]:
    optimizer, ids = _prepared(model)
    mg.geometrize(model)
    config = mg.GeometryConfig(
        inject=True, controller="act", per_layer=True, per_expert=True, regularizers=mg.Regularizers(balance=0.01)
    )
    geometry = mg.attach(model, optimizer, config)

    def step() -> dict[str, float]:
        _backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
        return geometry.metrics()

    return step


def _moewatch(sample_every: int) -> Callable[[nn.Module], Callable[[], object]]:
    def side(model: nn.Module) -> Callable[[], object]:
        import moewatch

        optimizer, ids = _prepared(model)
        watch = moewatch.MoEWatch(model, moewatch.WatchConfig(output="silent", sample_every=sample_every)).start()
        count = iter(range(1 << 30))

        def step() -> object:
            _backward(model, ids)
            optimizer.step()
            optimizer.zero_grad()
            return watch.step(next(count))

        return step

    return side
