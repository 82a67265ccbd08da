"""``MoEGeometryCallback`` with a router of one's own, and what is left of a run that could not begin."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import moegeo_router as mg

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tests.support.trainer import AtStep, as_found, build, gates, lines, with_geometry

D, E = 16, 4


class Score(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(D, E)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x)


class OwnGate(nn.Module):
    """Its only linear child is not what scores the experts."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.score = nn.Linear(D, D), Score()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.score(self.norm(x))
        return logits, *logits.softmax(-1).topk(2)


class OwnModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = OwnGate(), nn.ModuleList(nn.Linear(D, D) for _ in range(E))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        _, gates, ids = self.gate(x)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)
        y = (gates[..., None] * outputs.gather(1, ids[..., None].expand(*ids.shape, D))).sum(1)
        return {"loss": (y - labels).square().mean(), "logits": y}


def test_the_layer_that_a_family_names_is_put_on_the_manifold(tmp_path):
    data = [{"x": x, "labels": x.roll(1)} for x in torch.randn(32, D)]
    config = mg.GeometryConfig(select=mg.RouterFamily(router="OwnGate", projection="score.out"))
    run, _ = with_geometry(tmp_path, OwnModel(), data=data, config=config)
    on_manifold: list[str] = []

    def look(_: object) -> None:
        on_manifold.extend(name for name, p in run.model.named_parameters() if hasattr(p, "manifold"))

    run.add_callback(AtStep(2, look))
    run.train()
    assert on_manifold == ["gate.score.out.weight"]
    assert lines(run)[-1]["geometry/movement"] > 0
    as_found(run)


def no_control(*args: object, **options: object) -> None:
    raise RuntimeError("no control")


def no_log(step: int | None) -> mg.loggers.Logger:
    raise OSError("no log")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"config": mg.GeometryConfig(top_k=99)}, ValueError, "top_k=99"),
        ({}, RuntimeError, "no control"),
        ({}, UserWarning, "1 of 4 rows are zero"),
        ({"logger": no_log}, OSError, "no log"),
    ],
)
def test_a_run_that_cannot_begin_leaves_the_model_as_it_was(tmp_path, monkeypatch, options, error, message):
    model = build()
    if error is RuntimeError:
        monkeypatch.setattr(sys.modules["moegeo_router.attach"], "control_loop", no_control)
    if error is UserWarning:  # which is an error here, raised in between
        next(iter(gates(model).values())).data[1] = 0
    run, callback = with_geometry(tmp_path, model, **options)
    with pytest.raises(error, match=message):
        run.train()
    as_found(run)
    assert callback.geometry is None
