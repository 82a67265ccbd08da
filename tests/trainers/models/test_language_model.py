"""The language model: causality, rotary positions, size, initialisation, errors."""

import functools
import math

import pytest
import torch
from torch import nn

from trainers.models import LanguageModel
from trainers.models.moe import MoELayer
from trainers.models.transformer import Attention, Rotary, SwiGLU

torch.set_num_threads(1)

linear = functools.partial(nn.Linear, bias=False)
SMALL = {"dim": 16, "layers": 2, "heads": 2, "num_experts": 4, "top_k": 2, "expert_hidden": 8, "length": 12}


def _model(**options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(17, linear, **{**SMALL, **options})


def _tokens(batch: int = 3, length: int = 12) -> torch.Tensor:
    return torch.randint(0, 17, (batch, length), generator=torch.Generator().manual_seed(1))


def test_shapes_and_routing_of_every_layer_in_order():
    output = _model(layers=3)(_tokens())
    assert output.logits.shape == (3, 12, 17)
    assert list(output.routing) == ["layer0", "layer1", "layer2"]
    for routing in output.routing.values():
        assert routing.logits.shape == (36, 4)
        assert routing.ids.shape == (36, 2)


def test_moe_every_makes_the_other_layers_dense():
    model = _model(layers=5, moe_every=2)
    assert [isinstance(block.ffn, MoELayer) for block in model.trunk.blocks] == [False, True, False, True, False]
    assert model.trunk.blocks[0].ffn.w_gate.out_features == 2 * 8  # the active width of top-2
    assert list(model(_tokens()).routing) == ["layer1", "layer3"]


@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_token_changes_no_logit_before_it_and_its_own(position):
    model, tokens = _model().double(), _tokens()
    changed = tokens.clone()
    changed[:, position] = (changed[:, position] + 1) % 17
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-14)
    assert (after[:, position:] - before[:, position:]).abs().amax(dim=(0, 2)).min() > 1e-7


def test_rows_of_a_batch_do_not_mix():
    model, tokens = _model().double(), _tokens()
    torch.testing.assert_close(model(tokens).logits[1:2], model(tokens[1:2]).logits)


def test_rotary_products_depend_on_the_distance_only():
    rotary = Rotary(10, 16, 2).double()
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    scores = rotary(q.expand(1, 1, 10, 8)).squeeze() @ rotary(k.expand(1, 1, 10, 8)).squeeze().T
    for distance in range(-9, 10):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-5, atol=1e-5)
    assert scores[0].std() > 0.05  # and do depend on it


def test_rotary_angles_by_hand():
    # C = 4: pairs (0, 2) and (1, 3) turn by p and p / 100.
    turned = Rotary(8, 4, 1)(torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(1, 1, 8, 4))[0, 0, 7]
    expected = [math.cos(7), math.cos(0.07), math.sin(7), math.sin(0.07)]
    torch.testing.assert_close(turned, torch.tensor(expected))


def test_dense_layer_is_the_swiglu_formula():
    layer = SwiGLU(6, 10).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    gate, up = x @ layer.w_gate.weight.T, x @ layer.w_up.weight.T
    torch.testing.assert_close(layer(x), (gate / (1 + torch.exp(-gate)) * up) @ layer.w_down.weight.T)


def test_shifting_a_sequence_shifts_causal_attention_of_its_suffix():
    # The same window at two offsets, alone in its context, sees itself alike: positions act by difference only.
    attention = Attention(16, 2, Rotary(12, 16, 2)).double()
    rotary = attention.rotary
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    early = attention(x)
    rotary.cos_LC, rotary.sin_LC = rotary.cos_LC[5:], rotary.sin_LC[5:]
    torch.testing.assert_close(attention(x), early, rtol=1e-5, atol=1e-6)


def test_attention_is_the_softmax_formula():
    attention = Attention(8, 2, None).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    q, k, v = (x @ w.T for w in attention.qkv.weight.split(8))
    heads = []
    for c in (slice(0, 4), slice(4, 8)):
        scores = (q[..., c] @ k[..., c].transpose(1, 2) / math.sqrt(4)).softmax(-1)
        heads.append(scores @ v[..., c])
    torch.testing.assert_close(attention(x), torch.cat(heads, -1) @ attention.out.weight.T)


@pytest.mark.parametrize("tied", [True, False])
def test_parameter_count(tied):
    model = _model(tied=tied, layers=3, moe_every=2)
    attention, norms, router, expert = 4 * 16 * 16, 2 * 16, 4 * 16, 3 * 16 * 8
    moe, dense = router + 4 * expert, 2 * expert
    blocks = 3 * (attention + norms) + moe + 2 * dense
    assert sum(p.numel() for p in model.parameters()) == (1 if tied else 2) * 17 * 16 + blocks + 16


def test_the_tied_head_is_the_embedding():
    model = _model()
    model(_tokens()).logits.sum().backward()
    used = torch.zeros(17, dtype=torch.bool)
    used[_tokens().unique()] = True
    assert model.embedding.weight.grad[~used].abs().sum() > 0  # unused tokens get a gradient from the head only
    untied = _model(tied=False)
    untied(_tokens()).logits.sum().backward()
    assert not untied.embedding.weight.grad[~used].any()


def test_gradients_reach_every_parameter():
    model = _model()
    output = model(torch.randint(0, 17, (20, 12)))
    nn.functional.cross_entropy(output.logits.flatten(0, 1), torch.randint(0, 17, (240,))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.norm() > 0, name


def test_initial_loss_is_near_uniform_and_writers_are_scaled_down():
    model = _model(dim=64, layers=8, expert_hidden=32)
    other = torch.randint(0, 17, (36,), generator=torch.Generator().manual_seed(2))
    loss = nn.functional.cross_entropy(model(_tokens()).logits.flatten(0, 1), other)
    assert loss.item() == pytest.approx(math.log(17), abs=0.4)
    std, block = 0.02 * math.sqrt(12), model.trunk.blocks[3]  # 768 / 64 = 12
    wide = (model.embedding.weight, block.attention.qkv.weight, block.ffn.experts.w_gate, block.ffn.experts.w_up)
    for weight in wide:
        assert weight.std().item() == pytest.approx(std, rel=0.05)
    for weight in (block.attention.out.weight, block.ffn.experts.w_down):
        assert weight.std().item() == pytest.approx(std / 4, rel=0.05)  # √(2 · 8 layers)


def test_dense_layers_and_an_untied_head_are_initialised_alike():
    model = _model(dim=64, layers=2, moe_every=2, expert_hidden=32, tied=False)
    std, dense = 0.02 * math.sqrt(12), model.trunk.blocks[0].ffn
    for weight in (dense.w_gate.weight, dense.w_up.weight, model.head.weight):
        assert weight.std().item() == pytest.approx(std, rel=0.06)
    assert dense.w_down.weight.std().item() == pytest.approx(std / 2, rel=0.05)


def test_router_keeps_the_initialisation_of_its_factory():
    def ones(dim: int, num_experts: int) -> nn.Module:
        router = nn.Linear(dim, num_experts, bias=False)
        nn.init.ones_(router.weight)
        return router

    model = LanguageModel(17, ones, **SMALL)
    assert all((block.ffn.router.weight == 1).all() for block in model.trunk.blocks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "dim must be an even multiple of heads = 3.*got 16"),
        ({"heads": 0}, "dim must be an even multiple of heads = 0.*got 16"),
        ({"heads": 16}, "dim must be an even multiple of heads = 16.*got 16"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"layers": 0}, r"moe_every must lie in \[1, layers = 0\], got 1"),
        ({"moe_every": 3}, r"moe_every must lie in \[1, layers = 2\], got 3"),
        ({"moe_every": 0}, r"moe_every must lie in \[1, layers = 2\], got 0"),
        ({"top_k": 5}, r"top_k must lie in \[1, num_experts = 4\], got 5"),
        ({"expert_hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_bad_sizes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        _model(**options)


def test_bad_vocabulary_and_tokens_are_named():
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        LanguageModel(0, linear, **SMALL)
    with pytest.raises(ValueError, match=r"tokens must be .*12.*, got \(3, 13\)"):
        _model()(_tokens(length=13))
    with pytest.raises(ValueError, match=r"tokens must be .*, got \(12,\)"):
        _model()(_tokens()[0])
