"""``python -m moegeo_router.check``: true of the models it looks at, and plain about what it cannot look at."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import moegeo_router as mg
from moegeo_router import check
from moegeo_router.observe.taps import tensors_in
from tests.support.tiny_families import FAMILIES, SIZES
from tests.support.tiny_transformers import build

transformers = pytest.importorskip("transformers")

# Every name that the families here have for it.
EIGHT = {"num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8}


def saved(folder: Path, family: str = "Qwen3Moe", change=lambda model: None, **options: object) -> nn.Module:
    model = build(family, **EIGHT | options)
    change(model)
    model.save_pretrained(folder)
    return model


def changed(folder: Path, **options: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | options))


def said(folder: Path, *options: str, capsys) -> str:
    assert check.main([str(folder), "--tokens", "256", *options]) == 0
    printed = capsys.readouterr()
    return printed.out


def refused(*arguments: str, capsys) -> str:
    capsys.readouterr()
    assert check.main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.mark.parametrize(
    ("family", "scores", "gates", "bias"),
    [
        ("Qwen3Moe", "softmax", "output", "none"),
        ("DeepseekV3", "sigmoid", "output", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("Llama4Text", "sigmoid", "input", "none"),
    ],
)
def test_it_says_what_is_there(family, scores, gates, bias, tmp_path, capsys):
    model = saved(tmp_path, family)
    sites = mg.find_routers(model)
    chosen = FAMILIES[family].top_k
    text = said(tmp_path, capsys=capsys)
    assert f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters" in text
    assert f"{len(sites)} router" in text
    assert f"{type(sites[0].module).__name__}, {sites[0].num_experts} experts, 32 inputs" in text
    assert f"scores: {scores}; chosen experts: {chosen} a token; gates multiply the experts' {gates}" in text
    assert f"bias for choosing only: {bias}" in text
    assert ("bias_speed=0.001" in text) == (bias != "none")
    for site in sites:
        assert site.name in text
    norms = torch.cat([site.weight.norm(dim=1) for site in sites])
    assert f"norms of rows {norms.min():.3g} to {norms.max():.3g}" in text


def test_a_token_meets_its_chosen_experts_and_all_that_is_not_an_expert(tmp_path, capsys):
    model = saved(tmp_path)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    active = sum(p.numel() for p in model.parameters()) - experts * 6 // 8
    assert f", {active:,} active for a token" in said(tmp_path, capsys=capsys)


def test_the_memory_is_that_of_an_attached_model(tmp_path, capsys):
    model = saved(tmp_path, hidden_size=128, num_hidden_layers=3).train()
    text = said(tmp_path, capsys=capsys)
    mg.geometrize(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    geometry = mg.attach(model, optimizer, mg.GeometryConfig(inject=True))
    ids = torch.randint(3, 99, (8, 32))
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    held = sum(t.numel() * t.element_size() for t in tensors_in(geometry.state_dict()["routers"]))
    amount, unit = re.search(r"memory: ([\d.]+) (KiB|MiB)", text).groups()
    assert float(amount) * {"KiB": 2**10, "MiB": 2**20}[unit] == pytest.approx(held, rel=0.1)


def test_weights_in_the_folder_that_bode_ill_are_named(tmp_path, capsys):
    def spoil(model: nn.Module) -> None:
        first, second = (site.weight.data for site in mg.find_routers(model))
        first[0] = 0
        first[2] = 3 * first[1]
        second[5, 1] = torch.nan

    saved(tmp_path, change=spoil)
    text = said(tmp_path, capsys=capsys)
    assert "model.layers.0.mlp.gate: 1 rows that are zero" in text
    assert "model.layers.0.mlp.gate: 1 pairs of rows that point the same way" in text
    assert "model.layers.1.mlp.gate: 1 rows that are not finite" in text


def test_a_configuration_alone_is_enough_and_sharded_weights_are_found(tmp_path, capsys):
    model = saved(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert "weights in the folder (2)" in said(tmp_path / "shards", capsys=capsys)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((tmp_path / "whole" / "config.json").read_bytes())
    assert "weights: not looked at" in said(tmp_path / "bare", capsys=capsys)


def test_weights_are_found_under_the_names_that_checkpoints_have(tmp_path, capsys):
    model = saved(tmp_path, "Mixtral")
    norms = torch.cat([site.weight.norm(dim=1) for site in mg.find_routers(model)])
    text = said(tmp_path, capsys=capsys)
    assert f"weights in the folder (2): norms of rows {norms.min():.3g} to {norms.max():.3g}" in text


def test_weights_that_do_not_fit_the_configuration_are_named(tmp_path, capsys):
    saved(tmp_path)
    changed(tmp_path, num_experts=4, num_local_experts=4)
    assert "model.layers.0.mlp.gate: is (8, 32), where the configuration says (4, 32)" in said(tmp_path, capsys=capsys)
    changed(tmp_path, **EIGHT, num_hidden_layers=3)
    text = said(tmp_path, capsys=capsys)
    assert "weights in the folder (2)" in text
    assert "model.layers.2.mlp.gate: not in the folder" in text


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage" * 100),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"{}"),
    ],
)
def test_damaged_weights_are_told_and_the_rest_is_said(file, content, tmp_path, capsys):
    saved(tmp_path)
    (tmp_path / file).write_bytes(content)
    text = said(tmp_path, capsys=capsys)
    assert "  weights: cannot be read, " in text
    assert "would cost" in text


def test_a_number_that_is_not_known_is_no_less_than_what_is_said(tmp_path, capsys):
    saved(tmp_path, "JetMoe")  # its experts are no stack and no list
    assert re.search(r": ([\d,]+) parameters, at most \1 active for a token", said(tmp_path, capsys=capsys))


def test_a_configuration_that_nothing_is_built_from_is_one_line(tmp_path, capsys):
    saved(tmp_path)
    changed(tmp_path, architectures=["MixtralForCausalLM"])
    assert f"builds no model from the configuration of {tmp_path}: AttributeError" in refused(
        str(tmp_path), capsys=capsys
    )
    changed(tmp_path, architectures=["Trainer"], hidden_size="many")
    assert "hidden_size" in refused(str(tmp_path), capsys=capsys)
    changed(tmp_path, hidden_size=32)
    assert "Qwen3MoeForCausalLM: " in said(tmp_path, capsys=capsys)


def test_a_models_own_code_is_not_run_and_nobody_is_asked(tmp_path, capsys, monkeypatch):
    saved(tmp_path)
    changed(tmp_path, model_type="own_moe", auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert "contains custom code" in refused(str(tmp_path), capsys=capsys)


def test_a_quantised_model_is_looked_at_as_it_is(tmp_path, capsys):
    saved(tmp_path)
    changed(tmp_path, quantization_config={"quant_method": "fp8"})
    assert "quantised (fp8): its experts are left alone" in said(tmp_path, capsys=capsys)


def test_mistakes_are_one_line(tmp_path, capsys):
    saved(tmp_path)
    assert "select='no.such.*'" in refused(str(tmp_path), "--select", "no.such.*", capsys=capsys)
    assert "--tokens must be at least 1" in refused(str(tmp_path), "--tokens", "0", capsys=capsys)
    assert "--select must name routers" in refused(str(tmp_path), "--select", "", capsys=capsys)
    saved(tmp_path / "greedy", num_experts_per_tok=9)
    line = refused(str(tmp_path / "greedy"), capsys=capsys)
    assert "router model.layers.0.mlp.gate is to choose 9 of" in line
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(str(tmp_path / "empty"), capsys=capsys)
    dense = transformers.LlamaConfig(**{k: v for k, v in SIZES.items() if "expert" not in k and "moe" not in k})
    dense.save_pretrained(tmp_path / "dense")
    assert "no router found in LlamaForCausalLM" in refused(str(tmp_path / "dense"), capsys=capsys)
    zaya = tmp_path / "deepseek_v4"
    transformers.DeepseekV4Config(num_hidden_layers=2, vocab_size=99).save_pretrained(zaya)
    line = refused(str(zaya), capsys=capsys)
    assert "its scores are sqrtsoftplus" in line
    assert "cannot be served" in line


@pytest.mark.parametrize("start", ["/no", "./no", "../no", "no/such"])
def test_a_folder_that_is_not_there_is_not_taken_for_a_name(start, capsys):
    assert refused(f"{start}/folder", capsys=capsys) == f"error: there is no such folder: {start}/folder\n"


def test_without_transformers_it_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'moegeo-router[transformers]'" in refused(str(tmp_path), capsys=capsys)


def test_a_name_that_is_not_there_is_one_line_without_a_network(tmp_path):
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moegeo_router.check", "nobody/no-such-model"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[1]
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.stderr
