"""Which tokens count: masks of every kind, encoder and decoder, packed sequences, domains, whole sequences."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.observe.forward import flat_tokens
from moegeo_router.observe.tokens import Tokens
from tests.support.moe import L, TopKRouter, batch, build, padding, token_loss


def watch(model: nn.Module, **options: object) -> mg.Geometry:
    return mg.attach(model, config=mg.GeometryConfig(**{"fisher": None, "on_error": "raise"} | options))


def fsi_of(model: nn.Module, geometry: mg.Geometry, x: Tensor, keep: Tensor) -> float:
    """Mean FSI of the layers on the kept tokens, by plain forwards."""
    found = []
    with torch.no_grad(), geometry.pause():
        for block in model.blocks:
            found.append(float(mg.fsi(block.router(x)[0].softmax(-1)[keep.reshape(-1).bool()], normalized=True)))
            x = block(x)
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "mask",
    [padding("right"), padding("left").bool(), padding("left").double(), 7 * padding("right")],
    ids=["int", "bool", "float", "packed numbers"],
)
def test_attention_masks_of_every_type(mask):
    model = build()
    geometry = watch(model)
    model(batch(), attention_mask=mask)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(fsi_of(model, geometry, batch(), mask > 0), abs=1e-9)


def test_a_mask_that_says_who_sees_whom_is_no_padding_mask():
    model = build()
    geometry = watch(model)
    model(batch(), attention_mask=torch.zeros(8, 1, L, L))
    everything = torch.ones(8, L)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(fsi_of(model, geometry, batch(), everything), abs=1e-9)


@pytest.mark.parametrize("mask", [padding("right").bool(), torch.tensor([True, False] * 4)], ids=["tokens", "rows"])
def test_masks_that_are_given(mask):
    model = build()
    geometry = watch(model)
    with geometry.tokens(mask):
        model(batch())
    keep = mask if mask.ndim == 2 else mask[:, None].expand(8, L)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(fsi_of(model, geometry, batch(), keep), abs=1e-9)
    model(batch())  # outside, every token counts again
    everything = torch.ones(8, L)
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(fsi_of(model, geometry, batch(), everything), abs=1e-9)


class EncoderDecoder(nn.Module):
    """Two sides of different lengths, each with a router."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"router": TopKRouter()})
        self.decoder = nn.ModuleDict({"router": TopKRouter()})

    def forward(self, x: Tensor, y: Tensor, attention_mask: Tensor, decoder_attention_mask: Tensor) -> None:
        self.encoder["router"](x)
        self.decoder["router"](y)


def test_encoder_and_decoder_have_masks_of_their_own():
    model = EncoderDecoder().double()
    geometry = watch(model, per_layer=True)
    x, y = batch(), batch(seed=2)[:, :3]
    masks = padding("right"), torch.ones(8, 3).index_fill(1, torch.tensor([2]), 0)
    model(x, y, attention_mask=masks[0], decoder_attention_mask=masks[1])
    found = geometry.metrics()
    with torch.no_grad(), geometry.pause():
        for side, tokens, mask in (("encoder", x, masks[0]), ("decoder", y, masks[1])):
            p = getattr(model, side)["router"](tokens)[0].softmax(-1)[mask.flatten().bool()]
            assert found[f"geometry/{side}/fsi"] == pytest.approx(float(mg.fsi(p, normalized=True)), abs=1e-9)


def test_domains_by_token_and_by_row():
    model = build()
    geometry = watch(model, num_domains=3, per_layer=True)
    rows = torch.tensor([0, 0, 1, 1, 1, 2, 2, 0])
    by_row, by_token = [], []
    for found, domains in ((by_row, rows), (by_token, rows[:, None].expand(8, L))):
        with geometry.tokens(domains=domains):
            model(batch(), attention_mask=padding("left"))
        found.append(geometry.metrics()["geometry/layer0/fsi_domain"])
    assert by_row == by_token
    with torch.no_grad(), geometry.pause():
        p = model.blocks[0].router(batch())[0].softmax(-1)
    keep = padding("left").flatten().bool()
    labels = rows.repeat_interleave(L)
    assert by_row[0] == pytest.approx(float(mg.fsi_domain(p[keep], labels[keep], 3)), rel=1e-9)
    with geometry.tokens(domains=rows + 1), pytest.raises(ValueError, match=r"domains must be in 0\.\.2, got 1\.\.3"):
        model(batch())


def test_numbers_of_sequences():
    segments = torch.tensor([[1, 1, 2], [1, 2, 2]])
    found = Tokens(segments=segments, shape=(2, 3)).of_encoder(6)
    assert found["mask"].tolist() == [True] * 6
    assert len(found["sequences"].unique()) == 4
    assert Tokens(shape=(2, 3)).of_encoder(6)["sequences"].tolist() == [0, 0, 0, 1, 1, 1]
    assert Tokens(shape=(2, 4)).of_encoder(6)["sequences"] is None  # an image's channels, say


@pytest.mark.parametrize("values", [torch.zeros(2, 3), torch.zeros(4), torch.zeros(0)])
def test_values_that_do_not_fit(values):
    with pytest.raises(ValueError, match=r"domains .* does not fit the 5 tokens"):
        flat_tokens(values, 5, "domains")


@pytest.mark.parametrize(
    ("given", "called_with", "message"),
    [
        ({"mask": torch.ones(3, L)}, {}, r"^geometry\.tokens\(mask=\.\.\.\) \(3, .* a router saw$"),
        ({"segments": torch.ones(3, L)}, {}, r"^geometry\.tokens\(segments=\.\.\.\) \(3, .* a router saw$"),
        (
            {},
            {"attention_mask": torch.ones(3, L)},
            r"^attention_mask \(3, .* with geometry\.tokens\(mask=",
        ),
    ],
)
def test_what_does_not_fit_is_called_by_who_gave_it(given, called_with, message):
    model = build()
    geometry = watch(model)
    with geometry.tokens(**given), pytest.raises(ValueError, match=message):
        model(batch(), **called_with)


def test_a_mask_that_is_given_outranks_an_attention_mask_of_whole_numbers():
    """It may be that of the text alone, where the routers also see an image's tokens."""
    model, mask = build(), padding("left").bool()
    geometry = watch(model)
    with geometry.tokens(mask):
        model(batch(), attention_mask=torch.ones(8, L - 1, dtype=torch.long))
    assert geometry.metrics()["geometry/fsi"] == pytest.approx(fsi_of(model, geometry, batch(), mask), abs=1e-9)


def test_a_copy_of_a_watched_model_is_not_watched():
    """Averages of weights and saved models must not drag the watching along, nor be counted."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = mg.GeometryConfig(step=None, on_error="raise", inject=True, regularizers=mg.Regularizers(z=1.0))
    geometry = mg.attach(model, optimizer, config)
    loss = token_loss(model(batch()))  # there is a graph, which cannot be copied
    average = copy.deepcopy(model)
    restored = pickle.loads(pickle.dumps(model))
    loss.backward()
    before = geometry.state_dict()["sums"]
    for twin in (average, restored):
        torch.testing.assert_close(twin(batch()), model.eval()(batch()))
        token_loss(twin(batch())).backward()
    model.train()
    assert before is None
    optimizer.step()
    assert int(geometry.state_dict()["sums"][0]) == 8 * L


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_ctrl_c_broke_off_leaves_nothing(training):
    """torch runs no forward hook for it, not even those that are always called."""
    model, untouched = build(), build()
    geometry, expected = watch(model), watch(untouched)
    bell = [True]

    def ring(*_):
        if bell:
            bell.clear()
            raise KeyboardInterrupt

    model.blocks[1].experts.register_forward_pre_hook(ring)
    model.train(training)
    with pytest.raises(KeyboardInterrupt), torch.set_grad_enabled(training), geometry.pause():
        model(batch(), padding("left"))
    model.train()
    for one in (model, untouched):
        one(batch(seed=3))
    assert geometry.metrics() == expected.metrics()
    assert geometry._watch._tokens._running == []


def test_a_model_that_calls_itself_keeps_the_masks_apart():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = build().blocks

        def forward(self, x, attention_mask=None):
            if attention_mask is not None:
                self(x, None)
            for block in self.blocks:
                x = block(x)
            return x

    model = Twice().double()
    geometry = watch(model)
    model(batch(), padding("right"))
    # Without a mask of its own, the inner forward has the outer one's; each sees 8 rows less two tokens in four.
    sums = geometry._watch.window._sums["blocks.0.router"]
    assert int(sums.tokens) == 2 * (8 * L - 4 * 2)


def test_pausing_within_pausing():
    model = build()
    geometry = watch(model)
    with geometry.pause():
        with geometry.pause():
            model(batch())
        model(batch())
    assert geometry.metrics() == {}
    model(batch())
    assert geometry.metrics()["geometry/fsi"] > 0


@pytest.mark.parametrize("rows", [1, 0])
def test_one_row_and_an_empty_batch(rows):
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = mg.GeometryConfig(step=None, on_error="raise", regularizers=mg.Regularizers(fsi=1.0, balance=1.0, z=1.0))
    geometry = mg.attach(model, optimizer, config)
    for _ in range(2):
        output = model(batch(rows))
        (output.square().sum() + geometry.loss()).backward()
        optimizer.step()
        found = geometry.metrics()
    assert bool(found) == bool(rows)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
