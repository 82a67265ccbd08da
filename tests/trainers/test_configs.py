"""Every file in configs/ composes, names a real constructor and exactly its keywords, and builds."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.utils import get_object
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import moegeo_router as mg
from moegeo_router.loggers import JSONLLogger, TensorBoardLogger, read_jsonl
from tests.support.runs import CONFIGS, configuration
from trainers import build
from trainers.data.planted import PlantedText
from trainers.loop import LoopConfig
from trainers.models import LanguageModel
from trainers.models.routers import CosineRouter, FrozenRouter, HashRouter
from trainers.train import FREE_KEYS

#: Small, so that a test may load them; the sets that must be downloaded are not here.
SMALL = {
    "planted": ("data.documents=40", "data.document_length=65", "data.length=64"),
    "planted_images": ("data.images=96",),
    "digits": (),
    "stdlib": ("data.max_bytes=200000", "data.length=64"),
}
VISION = ("planted_images", "digits", "cifar10", "fashion_mnist")
DOWNLOADED = {"enwiki", "wikitext2", "multidomain", "fashion_mnist", "cifar10"}
#: Not a file of its own choice: what the caller of a partial target gives.
GIVEN = {
    "model": {"vocab_size", "num_classes", "image_shape", "router", "prior"},
    "router": {"in_features", "num_experts", "out_features", "prior", "device", "dtype", "id_counts"},
    "optimizer": {"model"},
    "prior": {"num_experts", "device"},
}


#: Routers on no manifold.
PLAIN = {"linear": nn.Linear, "cosine": CosineRouter, "frozen": FrozenRouter, "hash": HashRouter}


def _choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))


def _model(router: str) -> LanguageModel:
    config = configuration(f"router={router}", "model.dim=16", "model.num_experts=4", "data.length=8")
    return build.build_model(
        config, PlantedText(documents=8, document_length=9, length=8, alphabet=5, valid_fraction=0.4)
    )


def test_the_groups_are_all_covered():
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == {
        *("controller", "data", "experiment", "fault", "geometry", "logger", "model"),
        *("optimizer", "prior", "probes", "router"),
    }
    assert set(_choices("data")) == set(SMALL) | DOWNLOADED | {"folder"}


@pytest.mark.parametrize("group", ["model", "router", "optimizer", "prior"])
def test_keys_are_the_keywords_of_the_target(group):
    for choice in set(_choices(group)) - ({"none"} if group == "prior" else set()):
        node = OmegaConf.load(CONFIGS / group / f"{choice}.yaml")
        keywords = set(inspect.signature(get_object(node._target_)).parameters) - GIVEN[group]
        keys = set(node) - {"_target_", "_partial_"}
        if choice == "linear":
            keywords -= {"manifold"}
        assert keys == keywords, choice


def test_the_loop_has_every_key_and_the_defaults_of_its_class():
    loop = configuration().loop
    assert set(loop) - {"_target_"} == set(LoopConfig.__dataclass_fields__)
    assert build.build(configuration(), "loop") == LoopConfig()


def test_geometry_has_every_key_and_the_defaults_of_its_classes():
    geometry = configuration().geometry
    # What the model shows is not asked again, and what belongs to other loops than ours has no key.
    left_out = {
        "select",
        "hooks",
        "top_k",
        "renormalize",
        "loss",
        "gates",
        "num_domains",
        "accumulation",
        "grad_scaler",
        "signals",
        "interventions",
    }
    assert set(geometry) - {"_target_"} == set(mg.GeometryConfig.__dataclass_fields__) - left_out - {"group"}
    assert set(geometry.regularizers) - {"_target_"} == set(mg.Regularizers.__dataclass_fields__)
    assert set(geometry.natural) - {"_target_"} == set(mg.NaturalConfig.__dataclass_fields__)
    built = build.build(configuration(), "geometry")
    expected = mg.GeometryConfig(controller="act", scores="softmax")
    assert replace(built, regularizers=None, pictures_every=0) == expected
    assert built.control == mg.ControlConfig()
    assert set(geometry.control) - {"_target_", "_convert_"} == set(mg.ControlConfig.__dataclass_fields__)
    assert built.regularizers == mg.Regularizers()
    nothing = build.build(configuration("geometry=none", "optimizer=adamw", "model.scores=sigmoid"), "geometry")
    assert (nothing.regularizers.active, nothing.fisher, nothing.step, nothing.scores) == ((), None, None, "sigmoid")


def test_the_controller_is_configured_in_full_from_the_command_line():
    row = "{metric:margin,failure:brittle specialization,bad:low,warning:0.1,critical:0.05}"
    points = "[{metric:margin,at_least:0.2,moves:dispersion}]"
    changes = ("thresholds={fhs:{warning:1.5}}", "ladders={divergence:[rollback]}", "snapshots=3")
    overrides = (f"more_thresholds=[{row}]", f"setpoints={points}", *changes)
    built = build.build(configuration(*(f"geometry.control.{one}" for one in overrides)), "geometry").control
    assert built == mg.ControlConfig(
        more_thresholds=(
            mg.Threshold(metric="margin", failure="brittle specialization", bad="low", warning=0.1, critical=0.05),
        ),
        setpoints=(mg.SetPoint(metric="margin", at_least=0.2, moves="dispersion"),),
        thresholds={"fhs": {"warning": 1.5}},
        ladders={"divergence": ("rollback",)},
        snapshots=3,
    )
    assert {type(value) for value in (built.setpoints, built.more_thresholds, built.ladders["divergence"])} == {tuple}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("setpoints=[{metric:fsi}]", "set-point of fsi: give at_most or at_least"),
        ("setpoints=[{metric:fsi,at_most:0.3,goal:1}]", "no field goal"),
        ("setpoints=[{at_most:0.3}]", "lacks metric"),
        ("more_thresholds=[{metric:margin,failure:divergence}]", "lacks critical, warning"),
        ("setpoints=[{metric:nothing,at_most:1.0}]", "no metric 'nothing' in the table"),
        ("snapshot_scope=all", "control.snapshot_scope must be"),
    ],
)
def test_mistakes_in_it_are_told(override, message):
    with pytest.raises(InstantiationException) as raised:
        build.build(configuration(f"geometry.control.{override}"), "geometry")
    assert isinstance(raised.value.__cause__, ValueError)
    assert message in str(raised.value.__cause__)


def test_free_keys_are_keys():
    keys = set(
        _flat(build.plain(configuration("data=enwiki")))
        + _flat(build.plain(configuration("data=folder", "data.path=x", "probes=[noise10]")))
    )
    assert all(any(f"{key}.".startswith(f"{free}.") for key in keys) for free in FREE_KEYS)


def _flat(config: dict[str, Any], prefix: str = "") -> list[str]:
    return [
        name
        for key, value in config.items()
        for name in (_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"])
    ]


@pytest.mark.parametrize("router", _choices("router"))
@pytest.mark.parametrize("optimizer", _choices("optimizer"))
def test_every_router_goes_with_every_optimizer_or_says_why_not(router, optimizer):
    model, config = _model(router), configuration(f"router={router}", f"optimizer={optimizer}")
    refused = {("orthonormal", "adamw"): "off their manifold: take optimizer=riemannian"}
    for plain in PLAIN:
        for manifold in ("riemannian", "natural"):
            refused[plain, manifold] = "take router=polar, or optimizer=adamw"
    if (router, optimizer) in refused:
        with pytest.raises(ValueError, match=refused[router, optimizer]):
            build.build_optimizer(config, model)
        return
    held = [p for group in build.build_optimizer(config, model).param_groups for p in group["params"]]
    assert len(held) == len(list(model.parameters()))
    assert model(torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()
    built = model.trunk.blocks[0].ffn.router
    assert type(built) is PLAIN.get(router, mg.GeometricRouter)
    assert getattr(built, "manifold", router) == router


@pytest.mark.parametrize("data", _choices("data"))
@pytest.mark.parametrize("logger", _choices("logger"))
def test_everything_composes_and_resolves_to_plain_values(data, logger):
    model = "vision" if data in VISION else "language"
    extra = ("data.path=somewhere",) if data == "folder" else ()
    plain = build.plain(configuration(f"data={data}", f"model={model}", f"logger={logger}", "name=x", *extra))
    assert plain["directory"] == "runs/x"
    assert plain["data"]["_target_"].startswith("trainers.data.")
    assert plain["logger"]["wandb"] == ("auto" if logger == "wandb" else "disabled")
    assert plain["logger"]["tensorboard"] is (logger == "tensorboard")


@pytest.mark.parametrize("logger", ["jsonl", "tensorboard"])
def test_the_logger_that_is_asked_for_is_built_resumed_and_said(tmp_path, logger):
    config = configuration(f"logger={logger}")
    for resume_step, steps in ((None, (1, 2, 3)), (1, (2,))):  # 2 again, from the checkpoint at 1
        built, how_to_open, run_id = build.build_logger(config, tmp_path, resume_step=resume_step, run_id="kept")
        for step in steps:
            built.log({"train/loss": float(step)}, step)
        built.close()
    assert run_id == "kept"
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2]
    assert how_to_open[0].startswith(f"{tmp_path / 'metrics.jsonl'}: ")
    if logger == "jsonl":
        assert isinstance(built, JSONLLogger)
        assert len(how_to_open) == 1
        assert not (tmp_path / "tensorboard").exists()
        return
    (_, line) = how_to_open
    assert f"tensorboard --logdir {tmp_path / 'tensorboard'}" in line
    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in accumulator.Scalars("train/loss")] == [1, 2]


def test_tensorboard_may_go_with_any_logger_and_is_a_switch(tmp_path):
    config = configuration("logger=wandb", "logger.wandb=disabled", "logger.tensorboard=true")
    built, *_ = build.build_logger(config, tmp_path / "a", resume_step=None, run_id=None)
    built.close()
    assert [type(logger) for logger in built.loggers] == [JSONLLogger, TensorBoardLogger]
    config = configuration("logger=jsonl", "logger.tensorboard=maybe")
    with pytest.raises(ValueError, match=r"^logger\.tensorboard must be bool, got 'maybe'$"):
        build.build_logger(config, tmp_path / "b", resume_step=None, run_id=None)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("data", SMALL)
def test_embedded_data_build_with_a_model_for_them(data):
    model = "vision" if data in VISION else "language"
    config = configuration(f"data={data}", f"model={model}", "model.dim=16", "model.num_experts=4", *SMALL[data])
    built = build.build(config, "data")
    output = build.build_model(config, built)(built.train_batch(0).inputs)
    assert output.logits.isfinite().all()
    assert built.batch_size == config.data.batch_size


@pytest.mark.parametrize("data", sorted(DOWNLOADED))
def test_without_a_data_root_the_error_names_the_option_and_the_variable(data, monkeypatch):
    monkeypatch.delenv("MOEGEO_DATA", raising=False)
    with pytest.raises(InstantiationException) as refused:
        build.build(configuration(f"data={data}", "model=vision" if data in VISION else "model=language"), "data")
    assert isinstance(refused.value.__cause__, ValueError)
    message = str(refused.value.__cause__)
    assert "data.root" in message
    assert "MOEGEO_DATA" in message
    assert "\n" not in message


@pytest.mark.parametrize("experiment", _choices("experiment"))
def test_every_experiment_composes_and_builds(experiment):
    config = configuration(f"experiment={experiment}")
    build.plain(config)
    loop = build.build(config, "loop")
    assert loop.warmup < loop.steps
    model = build.build_model(config, build.build(config, "data"))
    assert build.build_optimizer(config, model)


def test_the_demo_has_a_name_so_that_it_can_be_continued():
    assert configuration("experiment=demo").directory == "runs/demo"


def test_the_seed_of_the_run_is_that_of_the_windows():
    assert build.plain(configuration("seed=7", "name=x"))["data"]["seed"] == 7


@pytest.mark.parametrize("override", ["loop.stepz=5", "nonsense=1", "router=cubic", "model.depth=3", "experiment=none"])
def test_unknown_keys_and_choices_do_not_compose(override):
    with pytest.raises(ConfigCompositionException):
        configuration(override)


def test_evaluate_composes_with_all_data():
    for data in _choices("data"):
        config = configuration(f"data={data}", "run=somewhere", name="evaluate")
        assert config.data._target_.startswith("trainers.data.")


def test_no_file_names_a_place_of_some_machine():
    for path in CONFIGS.rglob("*.yaml"):
        for line in Path(path).read_text().splitlines():
            assert not any(start in line for start in ("/work", "/tmp", "/home", "/root", "/Users")), path
