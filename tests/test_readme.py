"""README is true: its example prints what it says, and is as short as it claims."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moegeo_router as mg
from tests.readme_example import differences, example, run
from tests.support import benchmark_table
from trainers.data.base import Batch
from trainers.data.planted import PlantedText
from trainers.models.language import LanguageModel
from trainers.studies.benchmark import ARMS

README = Path(__file__).parents[1] / "README.md"


def test_example_prints_what_readme_shows():
    blocks, expected = example(README.read_text())
    assert differences(expected, run("\n".join(blocks))) == []
    assert len([line for line in blocks[-1].splitlines() if line.strip()]) <= 15


def demo_model() -> tuple[nn.Module, list[Batch], Callable[[nn.Module, Batch], Tensor]]:
    data = PlantedText(alphabet=16, documents=200, batch_size=4, length=32)
    model = LanguageModel(data.vocab_size, partial(nn.Linear, bias=False), dim=32, layers=2, length=32)

    def loss_of(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch.inputs).logits.flatten(0, 1), batch.targets.flatten())

    return model, [data.train_batch(step) for step in range(101)], loss_of


def mixtral() -> tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, **sizes)
    model = MixtralForCausalLM(config)
    # Each token is the one before plus 1 or 2: something to learn.
    batches = (torch.randint(64, (101, 4, 1)) + torch.randint(1, 3, (101, 4, 16)).cumsum(-1)) % 64
    return model, batches, lambda model, batch: model(input_ids=batch, labels=batch).loss


@pytest.mark.parametrize("build", [demo_model, mixtral])
def test_the_same_lines_run_on_other_models(build):
    *_, lines = example(README.read_text())[0]
    torch.manual_seed(0)
    model, batches, loss_of = build()
    names = list(model.state_dict())
    routers = {site.name: site.weight.detach().clone() for site in mg.find_routers(model)}
    before = float(loss_of(model, batches[0]).detach())
    printed = run(lines, torch=torch, model=model, batches=batches, loss_of=loss_of)
    assert re.findall(r"step (\d+): loss \d+\.\d+, FSI 0\.\d+, FHS \d\.\d+", printed) == ["0", "50", "100"]
    assert float(loss_of(model, batches[0]).detach()) < before - 0.5
    assert list(model.state_dict()) == names
    for site in mg.find_routers(model):
        cosine = torch.cosine_similarity(site.weight.detach(), routers[site.name], dim=-1)
        assert bool((cosine < 0.999).all())
    # As if we had never been there.
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def own_layer(way: str) -> dict[str, Any]:
    """README's layer, with what "A layer of your own" puts in the place of its gate."""
    text = README.read_text()
    layer, section = example(text)[0][0], text.partition("## A layer of your own\n")[2].partition("\n## ")[0]
    router, record = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    imports, layer = layer.split("\n\n\n", maxsplit=1)
    if way != "linear":
        gate, call = "self.gate = BiasedRouter(dim, experts)", "_, weights, ids = self.gate(x)"
        assert {gate, call} <= set(re.findall("`(.*?)`", section))
        layer = layer.replace("self.gate = nn.Linear(dim, experts)", gate)
        layer = layer.replace("weights, ids = self.gate(x).softmax(-1).topk(2)", call)
    if way == "recorded":
        layer = layer.replace("_, weights", "logits, weights").replace("return x +", "y = x +")
        layer = layer.replace(".sum(1)\n", f".sum(1)\n        {record}        return y\n")
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(f"{imports}\n{router}\n{layer}", "README.md", "exec"), names)
    return names


@pytest.mark.parametrize("way", ["linear", "returned", "recorded"])
def test_a_layer_of_ones_own_has_the_load_of_what_it_chooses(way):
    names = own_layer(way)
    model, x = nn.Sequential(names["MoE"]()), names["batches"][0]
    gate, options = model[0].gate, {"scores": "sigmoid", "hooks": way != "recorded"}
    if way == "linear":
        options = {"top_k": 2, "renormalize": False}
        ids = gate(x).topk(2).indices
    else:
        gate.bias.copy_(torch.tensor([0.0, 0.6, 0.3, 0.0]))
        ids = (gate.linear(x).sigmoid() + gate.bias).topk(2).indices
        assert not torch.equal(ids, gate.linear(x).topk(2).indices)
    geometry = names["geometry"] = mg.attach(model, config=mg.GeometryConfig(on_error="raise", **options))
    names["loss_of"](model, x).backward()
    found = geometry.metrics()
    counts = torch.bincount(ids.flatten(), minlength=4)
    assert geometry.layers == ("0.gate",)
    assert found["geometry/fsi_load"] == pytest.approx(float(mg.fsi_load(counts, 2, normalized=True)), rel=1e-6)
    assert found["geometry/fhs"] > 0


PAGES = [README, *sorted((README.parent / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose)
    assert links or page != README
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_the_benchmarks_table_is_the_reports():
    assert benchmark_table.table().count("\n| ") == len(ARMS)
    assert benchmark_table.written() == benchmark_table.table(), "python -m tests.support.benchmark_table copies it"


def test_differences_are_seen():
    assert differences("FSI 0.10", "FSI 0.11") == []
    assert differences("FSI 0.10", "FSI 0.13") != []
    assert differences("FSI 0.10", "fsi 0.10") != []
    assert differences("a 0.1\nb 0.2", "a 0.1") != []
