"""The table of ``docs/transformers.md``: what the routers of transformers do, and what of that is served.

    python -m tests.support.router_table

writes it anew: the rows of families that can be built tiny are measured, the others are said here.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import moegeo_router as mg
from moegeo_router.integrations.families import FAMILIES as KNOWN

from . import tiny_transformers as tiny
from .tiny_families import FAMILIES, Tiny
from .witness import Call, logits_of, witness

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
HEADER = (
    "router class",
    "family",
    "path from the decoder layer",
    "scores",
    "selection bias",
    "groups",
    "logits, gates in bf16",
    "support",
    "tested",
)

#: Classes whose names look like a router's, and what they are.
NOT_ROUTERS = {
    "BailingHybridForgetGate": "of linear attention",
    "DFineGate": "of a detector's layers",
    "Deimv2Gate": "of a detector's layers",
    "Glm5NextTextForgetGate": "of linear attention",
    "GraniteDoclingDensityRouter": "chooses between two image paths, for whole samples",
    "KimiLinearForgetGate": "of linear attention",
    "KyutaiSpeechToTextGatingMLP": "a gated MLP",
    "MoshiGatingMLP": "a gated MLP",
    "MuseSparkResidualGate": "of the residual stream",
    "ZayaRouterMLP": "part of ZayaRouter",
}

_SERVED = "served"
_UNTRIED = "found by its name; not tried"
_NOT_FOUND_OUT = "-"


@dataclass(frozen=True)
class Row:
    """One router class, in the order of the columns."""

    router: str
    family: str
    path: str
    scores: str
    bias: str = ""
    groups: str = ""
    dtypes: str = _NOT_FOUND_OUT
    support: str = _SERVED
    tested: str = "not run"

    def __str__(self) -> str:
        return f"| {' | '.join(astuple(self))} |"


def refusal(router: str) -> str:
    """Return why a class is refused, in the words of the table of families."""
    reason = next(family.refused for family in KNOWN if family.router == router)
    return f"refused: {reason}"


#: What cannot be built tiny, or is refused.
SAID = (
    Row("DeepseekV4HashRouter", "deepseek_v4", "mlp.gate", "sqrtsoftplus", "", "", support="", tested="refusal"),
    Row("DeepseekV4TopKRouter", "deepseek_v4", "mlp.gate", "sqrtsoftplus", "buffer", "", support="", tested="refusal"),
    Row("DogeCDMoE", "doge", "mlp", "softmax", "", "", support="", tested="refusal"),
    Row("Dots3NoteVisionTopKRouter", "dots3_note", "mlp.gate", "sigmoid", "buffer of the block", support=_UNTRIED),
    Row("InklingTopkRouter", "inkling", "mlp.gate", "sigmoid", "buffer", "", support="", tested="refusal"),
    Row("Qwen3OmniMoeTalkerTextTopKRouter", "qwen3_omni_moe", "mlp.gate", "softmax", support=_UNTRIED),
    Row("Qwen3OmniMoeTextTopKRouter", "qwen3_omni_moe", "no model uses it", "softmax", support=_UNTRIED),
    Row("ZayaRouter", "zaya", "mlp.gate", "softmax", "buffer", "", support="", tested="refusal"),
)

#: What is to be said of a class beside the rest.
NOTES = {
    "DbrxRouter": "its block hands the choices to the experts",
    "Ernie4_5_VLMoeMoeTopKRouter": "one for text, one for images: a step with images must come without "
    "`attention_mask`, whose tokens are neither one's",
    "Gemma4TextRouter": "returns probabilities: the logits are taken from its `proj`",
    "DiffusionGemmaTextRouter": "returns probabilities: the logits are taken from its `proj`",
    "Inkling2TopKRouter": "as long as `scoring_func` is sigmoid",
    "JetMoeTopKGating": "also in the attention, whose router has no FHS by outputs",
    "LagunaTopKRouter": "where `moe_router_logit_softcapping` bends the logits by over a tenth, natural steps fall "
    "back to Riemannian Adam",
    "Llama4Router": "gates on the experts' input",
    "MuseSparkTopkRouter": "natural steps fall back to Riemannian Adam: its logits are `output_multiplier · x Wᵀ`",
    "NllbMoeTop2Router": "the load is of the router's choices: transformers 5.23 sends every token to experts 0 and 1",
    "PhimoeTopKRouter": "p is the softmax of all logits, its gates come from sparsemixer",
}


def shipped() -> dict[str, str]:
    """Return the classes of the installed transformers that are called like routers, each with its family."""
    import transformers

    found = {}
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", path.read_text("utf-8"), re.MULTILINE):
            if ("Router" in name or "Gating" in name or name.endswith("Gate")) and name not in NOT_ROUTERS:
                found[name] = path.parent.name
    return found


def said() -> list[Row]:
    """Return the rows that are not measured, those of refused routers with the reason."""
    rows = []
    for row in SAID:
        values = list(astuple(row))
        if not row.support:
            by_scores = row.router.startswith("DeepseekV4")
            values[7] = "refused: its scores are neither softmax nor sigmoid" if by_scores else refusal(row.router)
        rows.append(Row(*values))
    return rows


def measured(family: str) -> list[Row]:
    """Return a row for each router class of a family, measured."""
    one = FAMILIES[family]
    model = tiny.build(family)
    sites = mg.find_routers(model)
    scores = mg.GeometryConfig().for_routers(sites).scores
    with witness(model) as calls:
        tiny.run(model, masked=False)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        half = type(model).from_pretrained(folder, dtype=torch.bfloat16).train()
    with witness(half) as half_calls:
        tiny.run(half, masked=False)
    places: dict[str, list[str]] = {}
    for site in sites:
        places.setdefault(type(site.module).__name__, []).append(site.name)
    rows = []
    for router, names in places.items():
        first = next(name for name in names if name in calls)
        rows.append(
            Row(
                router,
                type(model.get_submodule(first)).__module__.split(".")[-2],
                ", ".join(dict.fromkeys(_path(name) for name in names)),
                str(scores),
                _bias(model, first),
                "yes" if _grouped(calls[first]) else "",
                _dtypes(half, first, half_calls[first], one),
                _SERVED + (f"; {NOTES[router]}" if router in NOTES else ""),
                "run",
            )
        )
    return rows


def _path(name: str) -> str:
    return re.split(r"(?:^|\.)(?:layers|blocks|block)\.\d+\.", name, maxsplit=1)[-1]


def _bias(model: nn.Module, name: str) -> str:
    """Return what is added to the scores for choosing only, and where it is kept."""
    block = name.rpartition(".")[0]
    for place, prefix in (("", f"{name}."), (" of the block", f"{block}.")):
        for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
            for key, _ in tensors:
                if key.startswith(prefix) and key.endswith(tiny.SELECTION):
                    inner = key.removeprefix(prefix).rpartition(".")[0]
                    return f"{kind}{f' of `{inner}`' if inner else place}"
    return ""


def _grouped(call: Call) -> bool:
    """Whether all choices of every token are in one half of the experts: of two groups, one was eligible."""
    return call.ids is not None and bool((call.ids // 2 == call.ids[:, :1] // 2).all())


def _dtypes(model: nn.Module, name: str, call: Call, one: Tiny) -> str:
    z = logits_of(model, name, call, one)

    def off(t: Tensor) -> float:
        return float((t.double().reshape(z.shape) - z).abs().max()) if t.numel() == z.numel() else float("inf")

    logits = min((t for t in call.outputs if t.is_floating_point()), key=off, default=None)
    shown = logits is not None and off(logits) < 0.2
    return f"{_short(logits) if shown else 'not returned'}, {_short(call.gates)}"


def _short(t: Any) -> str:
    return "-" if t is None else str(t.dtype).removeprefix("torch.").replace("float", "fp").replace("bfp16", "bf16")


def rows() -> Iterator[Row]:
    """Yield all rows, by the routers' names."""
    found = {row.router: row for family in FAMILIES for row in measured(family)}
    found |= {row.router: row for row in said()}
    yield from (found[name] for name in sorted(found, key=str.lower))


def table() -> str:
    """Return the table as Markdown."""
    return "\n".join([f"| {' | '.join(HEADER)} |", f"|{'---|' * len(HEADER)}", *(str(row) for row in rows())])


def written() -> str:
    """Return the table that the page has."""
    return PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0].strip()


def main() -> None:
    """Write the table anew."""
    page = PAGE.read_text("utf-8")
    PAGE.write_text(page.replace(f"{BEGIN}\n{written()}\n{END}", f"{BEGIN}\n{table()}\n{END}"), "utf-8")


if __name__ == "__main__":
    main()
