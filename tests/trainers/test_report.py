"""The final table."""

import pytest

from trainers.data.base import Baseline
from trainers.evaluation import Evaluation
from trainers.report import print_report

SCALARS = {
    "fsi": 0.111,
    "dispersion": 0.222,
    "routing_information": 0.333,
    "fsi_domain": 0.444,
    "fsi_domain_null": 0.055,
    "max_load": 1.666,
    "dead_experts": 2.0,
    "fsi_token": 0.9,
    "fsi_load": 0.8,
}
EVALUATION = Evaluation(
    loss=1.23456,
    bits_per_byte=1.5,
    accuracy=0.4321,
    domain_loss={"code": 1.0, "json": 0.25},
    layers={"layer0": SCALARS, "layer11": SCALARS | {"dead_experts": 0.0}},
)


@pytest.fixture(params=["80", "200"])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", request.param)


def _printed(capsys, baseline: Baseline | None, speed: float | None = 12345.6, **options: object) -> list[str]:
    how_to_open = ["runs/x/metrics.jsonl: " + "long " * 30]
    print_report(EVALUATION, baseline, tokens_per_second=speed, how_to_open=how_to_open, **options)
    return capsys.readouterr().out.splitlines()


def test_every_number_is_in_its_column_and_nothing_is_cut(width, capsys):
    lines = _printed(capsys, None)
    header = next(line for line in lines if "layer" in line)
    row = next(line for line in lines if line.strip().startswith("layer0"))
    cells = {"FSI": "0.111", "dispersion": "0.222", "information": "0.333", "fsi_domain": "0.444", "its null": "0.055"}
    for title, number in {**cells, "max load": "1.666", "dead": "2"}.items():
        end = header.index(title) + len(title)
        assert row[:end].endswith(f" {number}"), title
    assert any(line.strip().startswith("layer11") for line in lines)
    assert not any("…" in line for line in lines)


def test_heterogeneity_has_a_column_where_it_is_known(width, capsys):
    assert not any("FHS" in line for line in _printed(capsys, None))
    lines = _printed(capsys, None, heterogeneity={"layer0": 1.375, "layer11": 0.5})
    assert [line.split()[-1] for line in lines if line.strip().startswith("layer")] == ["FHS", "1.38", "0.50"]
    assert not any("…" in line for line in lines)
    assert any("FHS: mean of the last training steps" in line for line in lines)


def test_loss_domains_speed_and_log_are_whole_lines(width, capsys):
    lines = _printed(capsys, Baseline("bigram, add-0.1", 1.3))
    assert (
        "validation loss 1.2346 nats, 1.500 bits per byte, accuracy 43.2%; below the 1.3000 of a bigram, add-0.1 model"
        in lines
    )
    assert "by domain: code 1.000, json 0.250" in lines
    assert "training throughput 12,346 tokens/s (median)" in lines
    assert any(line.startswith("log: runs/x/metrics.jsonl: long") and line.endswith("long ") for line in lines)


def test_a_baseline_that_was_not_beaten_is_said_so(capsys):
    assert any("NOT below the 1.2000 of a bigram model" in line for line in _printed(capsys, Baseline("bigram", 1.2)))


def test_what_is_not_known_is_not_printed(capsys):
    text = "\n".join(_printed(capsys, None, None))
    assert "throughput" not in text
    assert "below" not in text
