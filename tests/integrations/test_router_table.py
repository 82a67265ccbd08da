"""The table of ``docs/transformers.md`` is what transformers ships and what was measured, and its notes hold."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.control.selection_bias import selection_bias
from moegeo_router.integrations.families import FAMILIES as KNOWN
from tests.support import router_table, tiny_transformers
from tests.support.router_table import NOT_ROUTERS, NOTES, SAID, shipped, written
from tests.support.tiny_families import FAMILIES
from tests.support.tiny_transformers import backward, batch, build, installed, loss_of, run
from tests.support.witness import router_names, witness

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(installed().startswith("4."), reason="the table is of transformers 5")

HOW = "python -m tests.support.router_table writes docs/transformers.md anew"


def rows() -> dict[str, str]:
    return {line.split(" | ")[0].removeprefix("| "): line for line in written().splitlines()[2:]}


def test_every_router_that_transformers_ships_is_in_the_table():
    theirs, ours = shipped(), rows()
    missing = {name: family for name, family in theirs.items() if name not in ours}
    assert not missing, (
        f"transformers {installed()} ships routers that docs/transformers.md does not name: {missing}. Give each a "
        f"tiny model (tests/support/tiny_families.py), or a row (SAID, NOT_ROUTERS in tests/support/router_table.py), "
        f"and if it needs one an entry in moegeo_router/integrations/families.py; then {HOW}"
    )
    gone = [name for name in ours if name not in theirs and name != "DogeCDMoE"]  # no router by its name
    assert not gone, f"transformers {installed()} has no {gone}: {HOW}"
    assert all(name in ours for name in NOTES)


def test_what_the_library_says_of_a_router_is_in_the_table():
    for family in KNOWN:
        of_four = str(family.router).startswith("GraniteMoe")  # in transformers 5 they are called TopKRouter
        assert of_four or family.router in rows(), family.router
    for row in SAID:
        known = next((family.scores for family in KNOWN if family.router == row.router), "softmax")
        assert row.tested == "refusal" or known == row.scores


def test_classes_that_are_no_routers_are_not_taken_for_routers():
    for name in NOT_ROUTERS:
        assert name not in rows()
    found = tiny_transformers.find_class("GraniteDoclingForConditionalGeneration")
    router = inspect.getmodule(found).GraniteDoclingDensityRouter
    config = type("", (), {"vision_config": type("", (), {"hidden_size": 8}), "density_router_hidden_size": 4})
    with pytest.raises(ValueError, match="no router found"):
        mg.find_routers(nn.ModuleDict({"density_router": router(config)}))


def test_the_table_is_what_is_measured():
    assert written() == router_table.table(), f"docs/transformers.md is not what was measured: {HOW}"


@pytest.mark.parametrize("row", [row for row in SAID if row.tested == "refusal"], ids=lambda row: row.router)
def test_refused_routers_have_a_reason_of_the_library(row):
    assert f"| refused: {'its scores' if row.family == 'deepseek_v4' else ''}" in rows()[row.router]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_library_finds_the_selection_biases_of_the_table(family):
    model = build(family)
    for site in mg.find_routers(model):
        found = selection_bias(model, site)
        column = rows()[type(site.module).__name__].split(" | ")[4].strip()
        assert (found is not None) == bool(column)
        if found is not None:
            kind = "parameter" if isinstance(found[1], nn.Parameter) else "buffer"
            assert column.startswith(kind)


def stepped(model: nn.Module, **arguments: object) -> tuple[mg.Geometry, list[str]]:
    """Take a natural step; return what says how it was, and what was said."""
    mg.geometrize(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    config = mg.GeometryConfig(regularizers=mg.Regularizers.none(), per_layer=True, controller=None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        geometry = mg.attach(model, optimizer, config)
        loss_of(model(**arguments).last_hidden_state if arguments else run(model)).backward()
        optimizer.step()
    return geometry, [str(warning.message) for warning in said]


@pytest.mark.parametrize(("softcap", "natural"), [(30.0, True), (1.5, False)])
def test_a_softcap_that_bends_the_logits_ends_natural_steps(softcap, natural):
    geometry, said = stepped(build("Laguna", moe_router_logit_softcapping=softcap))
    assert ("geometry/movement" in geometry.metrics()) == natural
    assert any("are not x Wᵀ + b" in message for message in said) == (not natural)


@pytest.mark.parametrize("masked", [False, True])
def test_images_come_without_a_mask(masked):
    model = build("Ernie4_5_VLMoeText")
    images = torch.zeros(2, 12, dtype=torch.int)
    images[:, 3:8] = 1
    arguments = batch(model) if masked else {"input_ids": batch(model)["input_ids"]}
    geometry, said = stepped(model, **arguments, moe_mm_token_type_ids=images)
    seen = [key for key in geometry.metrics() if key.endswith("_moe/movement")]
    assert len(seen) == (0 if masked else 2)
    assert any("attention_mask (2, 12) does not fit" in message for message in said) == masked


def test_nllb_calls_two_experts_whatever_is_chosen():
    """The note of the table: if this fails, transformers has mended it, and the note is to go."""
    model = build("NllbMoe")
    called = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("expert_"):
            module.register_forward_pre_hook(lambda module, args, name=name: called.append(name))
    with witness(model) as calls:
        backward(copy.deepcopy(model))
        run(model)
    assert {name.rpartition("_")[2] for name in called} == {"0", "1"}
    assert any(bool(call.counts is not None and call.counts[2:].sum()) for call in calls.values())
    assert list(calls) == list(router_names(model))
