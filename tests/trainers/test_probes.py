"""Probes: chosen on the command line, evaluated after the training, in the report and in the row of a study."""

import math
from pathlib import Path

import pytest
import torch

from moegeo_router.loggers import read_jsonl
from tests.support.runs import CONFIGS, TINY, configuration, tiny, tiny_overrides
from tests.trainers.data.conftest import write_wikipedia
from trainers import build
from trainers.data.planted import PlantedImages, PlantedText
from trainers.data.wikipedia import to_evaluate_on
from trainers.evaluation import evaluate
from trainers.probes import build_probes, evaluate_probes, probe_lines, probe_scalars
from trainers.studies.rows import changed_settings
from trainers.studies.runs import DataCache, Run, configurations, train_run
from trainers.train import train

torch.set_num_threads(1)
CPU = torch.device("cpu")
LANGUAGE = ("wikitext2_valid", "wikitext2_test", "enwiki_valid")
VISION = ("noise10", "noise20", "blur", "contrast", "rotation")
FOLDER = (
    *("model.dim=16", "model.layers=1", "model.heads=2", "model.num_experts=4", "model.expert_hidden=16"),
    *("data=enwiki", "data.length=16", "data.batch_size=4", "loop.steps=4", "loop.warmup=1"),
)


@pytest.fixture
def root(tmp_path) -> Path:
    write_wikipedia(tmp_path / "sets")
    return tmp_path / "sets"


def test_every_probe_is_a_file_that_has_its_own_name():
    assert {path.stem for path in (CONFIGS / "probes").glob("*.yaml")} == {*LANGUAGE, *VISION}
    for names, data in ((LANGUAGE, ("data=enwiki",)), (VISION, ("data=fashion_mnist", "model=vision"))):
        config = configuration(*data, f"probes=[{','.join(names)}]")
        assert list(config.probes) == list(names)
    assert configuration().get("probes") is None
    plain = build.plain(configuration("data=enwiki", "data.root=here", "probes=[enwiki_valid,wikitext2_test]"))
    assert [probe["root"] for probe in plain["probes"].values()] == ["here", "here"]
    assert [probe["split"] for probe in plain["probes"].values()] == ["valid", "test"]


def test_text_is_read_in_the_tokens_and_windows_of_the_run(root):
    for tokenizer in ("bytes", "bpe"):
        config = configuration(
            *FOLDER,
            f"data.root={root}",
            f"data.tokenizer={tokenizer}",
            *(["data.vocab_size=262"] if tokenizer == "bpe" else []),
            "probes=[wikitext2_valid,enwiki_valid]",
            "probes.enwiki_valid.valid_tokens=64",
        )
        data = build.build(config, "data")
        probes = build_probes(config, data)
        for probe in probes.values():
            assert (probe.vocab_size, probe.length, probe.batch_size) == (data.vocab_size, 16, 4)
            assert probe.tokenizer_json == data.tokenizer_json
            assert probe.token_counts().tolist() == [1] * data.vocab_size
            with pytest.raises(ValueError, match="no train split"):
                probe.train_batch(0)
        assert sum(int(b.mask.sum()) for b in probes["enwiki_valid"].valid_batches()) == 64
        # The whole of the validation split is that of the data set itself.
        config.probes.enwiki_valid.valid_tokens = None
        whole = build_probes(config, data)["enwiki_valid"]
        assert torch.equal(whole._valid.tokens, data._valid.tokens)


def test_an_unknown_text_is_named(root):
    with pytest.raises(ValueError, match="name: expected 'wikitext2' or 'enwiki', got 'pile'"):
        to_evaluate_on("pile", root=str(root), split="valid")
    with pytest.raises(ValueError, match="split: expected 'valid' or 'test', got 'train'"):
        to_evaluate_on("enwiki", root=str(root), split="train")


def test_the_bits_are_those_of_a_plain_evaluation(root):
    config = configuration(*FOLDER, f"data.root={root}", "probes=[enwiki_valid]", "data.valid_tokens=null")
    data = build.build(config, "data")
    model = build.build_model(config, data)
    found = evaluate_probes(model, build_probes(config, data), CPU)
    wanted = evaluate(model, data, CPU)
    assert probe_scalars(found) == {
        "probe/enwiki_valid/loss": wanted.loss,
        "probe/enwiki_valid/bits_per_byte": pytest.approx(wanted.loss / math.log(2)),
    }
    assert found["enwiki_valid"].layers == {}
    assert probe_lines(found) == [
        f"probe enwiki_valid: loss {wanted.loss:.4f} nats, {wanted.bits_per_byte:.3f} bits per byte"
    ]


def test_a_run_of_a_study_has_them_in_its_results(root, tmp_path):
    text = Run("a", [*FOLDER, f"data.root={root}", f"probes=[{','.join(LANGUAGE)}]"], {})
    images = Run("b", [*TINY["vision"], "loop.steps=4", "loop.warmup=1", f"probes=[{','.join(VISION)}]"], {})
    for run, names, unit in ((text, LANGUAGE, "bits_per_byte"), (images, VISION, "accuracy")):
        found = train_run(configurations([run])[0], tmp_path / run.key, DataCache())
        assert (found["status"], found["reason"]) == ("done", None)
        probed = {name: value for name, value in found["results"].items() if name.startswith("probe/")}
        assert set(probed) == {f"probe/{name}/{what}" for name in names for what in ("loss", unit)}
        assert all(math.isfinite(value) for value in probed.values())
        assert len(set(probed.values())) >= len(probed) - 2  # both splits of the toy WikiText are alike


def test_a_row_without_a_probe_that_is_asked_for_is_another_one():
    runs = [Run(names, [*TINY["vision"], f"probes={names}"], {}) for names in ("[blur]", "[blur,noise10]")]
    old, new = configurations(runs)
    row = {"configuration": old, "overrides": ["probes=[blur]"]}
    assert any("noise10" in line for line in changed_settings(new, ["probes=[blur,noise10]"], row))
    assert changed_settings(old, ["probes=[blur]"], row) == []


def test_a_run_prints_and_logs_them_and_a_finished_one_can_be_asked_for_more(tmp_path, capsys):
    directory = tmp_path / "run"
    train(tiny(directory, "probes=[blur]", task="vision"))
    assert "probe blur: loss" in capsys.readouterr().out
    rows = read_jsonl(directory / "metrics.jsonl")
    assert {"probe/blur/loss", "probe/blur/accuracy"} < rows[-1].keys()
    train(tiny(directory, "probes=[blur,rotation]", task="vision"))
    out = capsys.readouterr().out
    assert "probe blur: loss" in out
    assert "probe rotation: loss" in out
    assert read_jsonl(directory / "metrics.jsonl") == rows


def test_a_model_is_the_same_after_its_probes(tmp_path):
    states = []
    for probes in ("[]", "[noise20,rotation]"):
        config = configuration(*tiny_overrides(tmp_path / "run", f"probes={probes}", task="vision"))
        data = build.build(config, "data")
        torch.manual_seed(0)
        model = build.build_model(config, data)
        evaluate_probes(model, build_probes(config, data), CPU)
        states.append((model.training, torch.rand(3).tolist(), evaluate(model, data, CPU).loss))
    assert states[0] == states[1]


def test_what_a_model_cannot_see_is_told_before_it_is_trained(tmp_path, monkeypatch):
    images = configuration(*TINY["vision"], "probes=[wikitext2_valid]")
    with pytest.raises(ValueError, match="probes=wikitext2_valid: wikitext2 is text, and planted_images is none"):
        build_probes(images, PlantedImages(images=100))
    text = configuration(*TINY["language"], "probes=[blur]")
    with pytest.raises(ValueError, match="probes=blur: blur shifts images, and planted has none"):
        build_probes(text, PlantedText(documents=40, length=32))
    with pytest.raises(ValueError, match="probes=enwiki_valid: enwiki is text, and planted is none"):
        train(tiny(tmp_path / "run", "probes=[enwiki_valid]"))
    assert not (tmp_path / "run").exists()
