"""What ``MoEGeometryCallback`` refuses, and what it says then."""

from __future__ import annotations

import sys

import pytest

import moegeo_router as mg

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support.trainer import STRONG, VOCABULARY, trainer, with_geometry  # noqa: E402

CONFIG = mg.GeometryConfig(regularizers=STRONG)


def test_routers_are_found_or_the_model_is_named(tmp_path):
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    run, _ = with_geometry(tmp_path, transformers.LlamaForCausalLM(config))
    with pytest.raises(ValueError, match="LlamaForCausalLM"):
        run.train()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda run: mg.MoEGeometryCallback(),
            TypeError,
            r"trainer\.add_callback\(mg\.MoEGeometryCallback\(trainer\)\)",
        ),
        (lambda run: mg.MoEGeometryCallback(run.model), TypeError, "got Qwen3MoeForCausalLM"),
        (lambda run: mg.MoEGeometryCallback(run, {"top_k": 2}), TypeError, "GeometryConfig, got dict"),
        (
            lambda run: mg.MoEGeometryCallback(run, manifold="sphere"),
            ValueError,
            "'polar' or 'euclidean', got 'sphere'",
        ),
        (lambda run: mg.MoEGeometryCallback(run, mg.GeometryConfig(hooks=False)), ValueError, "hooks=False"),
        (lambda run: mg.MoEGeometryCallback(run, CONFIG, watch=True), ValueError, "watch=True changes nothing"),
        (
            lambda run: mg.MoEGeometryCallback(run, mg.GeometryConfig(bias_speed=0.001), watch=True),
            ValueError,
            "no bias_speed",
        ),
        (lambda run: mg.MoEGeometryCallback(run, mg.GeometryConfig(pictures_every=9)), ValueError, "needs a logger"),
    ],
)
def test_mistakes(tmp_path, make, error, message):
    run = trainer(tmp_path)
    with pytest.raises(error, match=message):
        make(run)
    assert "train" not in vars(run)


def test_in_the_list_of_callbacks_it_has_no_trainer(tmp_path):
    with pytest.raises(TypeError, match=r"takes the trainer that it is added to: trainer = Trainer"):
        trainer(tmp_path, callbacks=[mg.MoEGeometryCallback])


def test_of_another_trainer(tmp_path):
    run = trainer(tmp_path)
    run.add_callback(mg.MoEGeometryCallback(trainer(tmp_path)))
    with pytest.raises(TypeError, match="made for another trainer"):
        run.train()


@pytest.mark.parametrize("flag", ["is_fsdp_enabled", "is_deepspeed_enabled", "is_distributed_loading_by_transformers"])
def test_sharded_models_are_refused(tmp_path, flag):
    run = trainer(tmp_path)
    setattr(run, flag, True)
    with pytest.raises(ValueError, match=r"does not support .*: data-parallel models only"):
        mg.MoEGeometryCallback(run)


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise"])
def test_optimizers_that_step_inside_of_the_backward_pass_are_refused(tmp_path, optim):
    run = trainer(tmp_path)
    run.args.optim = transformers.training_args.OptimizerNames(optim)
    with pytest.raises(ValueError, match=f"optim='{optim}' steps inside of the backward pass"):
        mg.MoEGeometryCallback(run)


@pytest.mark.parametrize("which", ["get_tp_size", "get_cp_size", "get_sp_size"])
def test_models_that_are_split_over_ranks_are_refused(tmp_path, monkeypatch, which):
    run = trainer(tmp_path)
    monkeypatch.setattr(run, which, lambda: 2)
    with pytest.raises(ValueError, match="parallelism: data-parallel models only"):
        mg.MoEGeometryCallback(run)


def test_several_devices_in_one_process_are_refused(tmp_path):
    run = trainer(tmp_path)
    run.args._n_gpu = 2
    with pytest.raises(ValueError, match="torchrun"):
        mg.MoEGeometryCallback(run)


@pytest.mark.parametrize("missing", ["transformers", "accelerate.optimizer"])
def test_what_it_needs_is_said(monkeypatch, missing):
    assert "MoEGeometryCallback" in mg.__all__
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "moegeo_router.integrations.trainer")
    with pytest.raises(ImportError, match=r"pip install 'moegeo-router\[transformers\]'"):
        mg.MoEGeometryCallback
