"""transformers' stacked experts: watched product by product, computed as before, and left as they were."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.integrations.transformers import NAME, observe_experts
from moegeo_router.observe.fisher import ProductTap
from tests.observe import fisher_oracle
from tests.observe.fisher_oracle import close, traces_by_module, traces_of

transformers = pytest.importorskip("transformers")

WIDTH, EXPERTS, CHOSEN, VOCABULARY = 16, 4, 2, 31
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "head_dim": 8,
    "num_experts_per_tok": CHOSEN,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": EXPERTS},
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 24},
    "GptOss": {"num_local_experts": EXPERTS, "sliding_window": 16, "rope_parameters": {"rope_type": "default"}},
}


@pytest.fixture
def attach() -> Iterator[Callable[..., mg.Geometry]]:
    """Attach, and detach when the test is over: the registry of experts functions outlives it."""
    attached: list[mg.Geometry] = []

    def attach(model: nn.Module, fisher: str, **options: Any) -> mg.Geometry:
        attached.append(fisher_oracle.attach(model, fisher, **options))
        return attached[-1]

    yield attach
    for geometry in attached:
        geometry.detach()
    assert NAME not in registry()


def build(family: str = "Mixtral", implementation: str = "eager", dtype: torch.dtype = torch.float64) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **FAMILIES[family])
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "gate" in name or "router" in name:
                parameter.normal_(std=0.3)
    return model


def experts_of(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__.endswith("Experts")]


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 10), generator=torch.Generator().manual_seed(0))


def step(model: Any) -> list[Tensor]:
    """One forward and backward pass; returns the output and all gradients."""
    model.zero_grad()
    logits = model(input_ids=tokens()).logits
    (logits.square().mean() + logits.sin().mean()).backward()
    return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


class OneBlock(nn.Module):
    """A MoE block of a family and something behind it that mixes the tokens."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.block = build(family).model.layers[1].mlp

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.after(y[0] if isinstance(y, tuple) else y)

    def after(self, y: Tensor) -> Tensor:
        return (y.cumsum(dim=-2).tanh() + y).square().sum()


@pytest.mark.parametrize("family", FAMILIES)
def test_traces_are_the_gradients_of_copies_per_position(attach, family):
    model = OneBlock(family)
    x = torch.randn(1, 12, WIDTH, dtype=torch.float64)
    calls: list[tuple[Tensor, ...]] = []
    experts = model.block.experts
    experts.register_forward_hook(lambda module, inputs, output: calls.append(inputs))
    geometry = attach(model, "parameters")
    model(x).backward()
    found = traces_of(geometry)
    geometry.detach()  # from here on it is the module's own eager forward
    (inputs,) = calls
    each = [tuple(value[t : t + 1].detach() for value in inputs) for t in range(12)]
    assert {len(ids.flatten()) for _, ids, _ in each} == {CHOSEN}
    close(found, [traces_by_module(experts, each, lambda y: model.after(y.unsqueeze(0)))])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traces_of_the_grouped_computation_are_the_same(attach, family):
    found = []
    for implementation in ("eager", "grouped_mm"):
        model = build(family, implementation, torch.float32)
        geometry = attach(model, "parameters", loss="mean", per_expert=True)
        step(model)
        found.append(geometry.metrics())
    assert found[0]["geometry/layer1/trace/0"] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_watching_changes_no_bit_of_the_grouped_computation_and_little_of_others(attach, family):
    model = build(family, "grouped_mm", torch.float32)
    before = step(model)
    geometry = attach(model, "parameters")
    assert same(step(model), before)
    geometry.detach()
    assert same(step(model), before)
    for implementation in ("eager", "batched_mm"):
        model = build(family, implementation)
        before = step(model)
        attach(model, "parameters")
        for ours, theirs in zip(step(model), before, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_autocast_rounds_as_before(attach, implementation):
    model = build("GptOss", implementation, torch.float32)

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(input_ids=tokens()).logits.detach().float()

    before = run()
    attach(model, "parameters")
    assert (run() - before).norm() <= (0 if implementation == "grouped_mm" else 0.01) * before.norm()


def traits(model: Any) -> list[Any]:
    return [model.config._experts_implementation, *(sorted(vars(module)) for module in model.modules())]


def registry() -> Any:
    return sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_detach_leaves_nothing(attach, implementation):
    model = build(implementation=implementation)
    before, names = traits(model), sorted(registry())
    geometry = attach(model, "parameters")
    assert model.config._experts_implementation == NAME
    assert NAME in registry()
    geometry.detach()
    geometry.detach()
    assert traits(model) == before
    assert type(model.config._experts_implementation) is str
    assert sorted(registry()) == names


def test_layers_that_share_a_config_are_undone_in_any_order():
    model = build()
    first, second = experts_of(model)
    undo_first = observe_experts(first, tap(lambda *_: None))
    calls: list[Any] = []
    undo_second = observe_experts(second, tap(lambda *call: calls.append(call)))
    undo_first()
    step(model)
    assert len(calls) == 2
    undo_second()
    assert model.config._experts_implementation == "eager"
    assert NAME not in registry()


def tap(call: Callable[..., None]) -> ProductTap:
    def failed(error: Exception) -> None:
        raise error

    return ProductTap(call, failed)


def test_a_model_that_shares_the_config_and_is_not_watched_computes_as_before(attach):
    model = build(dtype=torch.float32, implementation="batched_mm")
    other = type(model)(model.config).float().train()
    before = step(other)
    geometry = attach(model, "parameters")
    assert other.config._experts_implementation == NAME
    assert same(step(other), before)
    assert geometry.metrics() == {}


def test_eval_mode_computes_as_before(attach):
    model = build(dtype=torch.float32, implementation="batched_mm").eval()
    before = model(input_ids=tokens()).logits
    geometry = attach(model, "parameters")
    assert torch.equal(model(input_ids=tokens()).logits, before)
    assert geometry.metrics() == {}


def test_what_the_user_chooses_meanwhile_stays(attach):
    model = build()
    geometry = attach(model, "parameters")
    model.set_experts_implementation("batched_mm")
    geometry.detach()
    assert model.config._experts_implementation == "batched_mm"
    assert NAME not in registry()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_watched(attach, copied):
    model = build()
    before = step(model)
    geometry = attach(model, "parameters")
    other = copied(model)
    assert type(other.config._experts_implementation) is str
    assert other.config._experts_implementation == "eager"
    assert same(step(other), before)
    assert geometry.metrics() == {}
    geometry.detach()
    again = attach(other, "parameters")
    step(other)
    assert again.metrics()["geometry/fhs"] > 0


def test_the_saved_config_knows_of_nothing(attach):
    model = build()
    before = model.config.to_json_string()
    attach(model, "parameters")
    assert model.config.to_json_string() == before


@pytest.mark.parametrize(
    ("why", "message"),
    [
        ("norm", "they have a norm of their own"),
        ("quantised", r"down_proj is a quantised or sharded weight \(Tensor, torch\.float8_e4m3fn\)"),
        ("parameter", r"their parameters are gate_up_proj, down_proj, scale, not down_proj, gate_up_proj"),
    ],
)
def test_experts_that_cannot_be_watched_are_named(attach, why, message):
    model = build()
    experts = experts_of(model)[1]
    if why == "norm":
        experts.has_post_expert_norm = True
    elif why == "quantised":
        experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    else:
        experts.scale = nn.Parameter(torch.ones(EXPERTS))
    before = traits(model)
    name = r"cannot see inside the stacked experts model\.layers\.1\.mlp\.experts \(MixtralExperts\)"
    with pytest.raises(ValueError, match=f"{name}: {message}: take fisher='outputs'"):
        attach(model, "parameters")
    assert traits(model) == before
    assert NAME not in registry()


def test_other_modules_are_not_ours():
    assert observe_experts(nn.Linear(2, 2), tap(lambda *_: None)) is None


# The compiler itself reads .grad of intermediate tensors where it breaks the graph at a hook.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_give_the_same_numbers(attach):
    model = build(dtype=torch.float32, implementation="grouped_mm")
    geometry = attach(model, "parameters")
    step(model)
    found = geometry.metrics()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(input_ids=tokens()).logits.square().mean().backward()
    geometry.metrics()
    step(compiled)
    assert geometry.metrics()["geometry/fhs"] == pytest.approx(found["geometry/fhs"], rel=1e-5)


def test_transformers_is_not_imported():
    program = "import sys, moegeo_router; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_gradient_checkpointing_counts_once(attach):
    found = []
    for reentrant in (None, False, True):
        model = build()
        if reentrant is not None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        geometry = attach(model, "parameters", per_expert=True)
        step(model)
        found.append(geometry.metrics())
    assert found[1] == pytest.approx(found[0], rel=1e-9)
    assert found[2] == pytest.approx(found[0], rel=1e-9)
