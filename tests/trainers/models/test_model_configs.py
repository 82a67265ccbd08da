"""Every model YAML names a constructor and exactly its keyword-only arguments, and builds."""

import functools
import inspect
from pathlib import Path

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import nn

torch.set_num_threads(1)

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "model").glob("*.yaml"))
FIRST_ARGUMENTS = {"language": (256,), "vision": (10, (1, 8, 8))}
INPUTS = {"language": torch.zeros(1, 32, dtype=torch.long), "vision": torch.zeros(1, 1, 8, 8)}


def test_the_configs_are_found():
    assert [path.stem for path in CONFIGS] == ["language", "vision"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_keys_are_the_keyword_arguments_and_the_model_runs(path):
    config = OmegaConf.create({"data": {"length": 32}, "model": OmegaConf.load(path)}).model
    parameters = inspect.signature(get_class(config._target_)).parameters.values()
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert set(config) - {"_target_", "_partial_"} == keywords
    model = instantiate(config)(*FIRST_ARGUMENTS[path.stem], functools.partial(nn.Linear, bias=False))
    assert model(INPUTS[path.stem]).logits.isfinite().all()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_values_are_the_defaults_of_the_constructor(path):
    config = OmegaConf.create({"data": {"length": 256}, "model": OmegaConf.load(path)}).model
    for parameter in inspect.signature(get_class(config._target_)).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            assert config[parameter.name] == parameter.default, parameter.name
