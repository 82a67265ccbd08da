"""A version of transformers that was not tested is named, once; and nothing is imported to find out."""

from __future__ import annotations

import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router.integrations.versions import TESTED
from tests.support.tiny_transformers import build, installed

pytest.importorskip("transformers")


def said(call) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    return [warning for warning in found if "routers were tested" in str(warning.message)]


@pytest.mark.parametrize("version", ["5.24.0", "5.2.0", "4.56.2", "6.0.0", "5.230.1", "4.57"])
def test_other_versions_get_one_warning_with_the_range(monkeypatch, version):
    model, other = build("Mixtral"), build("Mixtral")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    (warning,) = said(lambda: mg.geometrize(model))
    assert str(warning.message).startswith(f"transformers {version} is not a version whose routers were tested (5.23.x")
    assert "4.57.x" in str(warning.message)
    assert warning.filename == __file__
    assert not said(lambda: mg.geometrize(model))
    assert not said(lambda: mg.attach(model, torch.optim.AdamW(model.parameters())).detach())
    (warning,) = said(lambda: mg.attach(other))
    assert warning.filename == __file__


def test_a_model_inside_of_ones_own_is_one_of_transformers(monkeypatch):
    model = nn.ModuleDict({"inner": build("Mixtral")})
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.1.0")
    assert len(said(lambda: mg.geometrize(model))) == 1


@pytest.mark.parametrize("version", ["5.23.0", "5.23.9", "4.57.6"])
def test_tested_versions_get_none(monkeypatch, version):
    model = build("Mixtral")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)
    assert not said(lambda: mg.attach(model))


def test_this_version_is_tested():
    assert installed().startswith(tuple(f"{tested}." for tested in TESTED))


def test_other_models_get_none(monkeypatch):
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "1.0.0")
    model = nn.ModuleDict({"router": nn.Linear(8, 4)})
    assert not said(lambda: mg.geometrize(model))
    assert not said(lambda: mg.attach(nn.ModuleDict({"router": nn.Linear(8, 4)})))


def test_nothing_is_imported():
    program = "import sys, moegeo_router as mg; from torch import nn; model = nn.Sequential(nn.Linear(8, 4)); "
    program += "mg.geometrize(model, select='0'); sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
