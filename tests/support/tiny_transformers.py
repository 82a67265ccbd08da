"""Tiny random models of the families of transformers that have a router: built in a tenth of a second, seeded.

What a family does is not read from the library but said here, or measured by the tests.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

WIDTH, EXPERTS, VOCABULARY = 32, 4, 99
BATCH, LENGTH, PADDED = 2, 12, 4

# Every name a family may have for the same number; what it does not know it does not read.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "max_position_embeddings": 64,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPS = {"n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_LATENT_GROUPS = _LATENT | _GROUPS
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_DELTA = {"linear_head_dim": 8, "linear_num_heads": 4}
_SPARSE_SECOND = {"mlp_layer_types": ["dense", "sparse"]}
_SEQUENCE = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "num_experts": EXPERTS,
    "expert_capacity": 64,
    "router_jitter_noise": 0.0,
    "dropout_rate": 0.0,
}


@dataclass(frozen=True)
class Tiny:
    """One family.

    Attributes:
        config: what its configuration needs beside the sizes; with ``alone`` instead of them.
        model: class of the model; by default the family's with ``ForCausalLM``.
        scores: the score function of its routers.
        alone: whether ``config`` is all of the configuration.
        in_4: whether transformers 4.57 has it.
        generates: whether the model class generates text.
        top_k: experts of a token.
        scale: the attribute of its routers by which ``x Wᵀ + b`` is multiplied.
        warns: what the library says of it, as regular expressions.
    """

    config: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    scores: str = "softmax"
    alone: bool = False
    in_4: bool = False
    generates: bool = True
    top_k: int = 2
    scale: str = ""
    warns: tuple[str, ...] = ()


def _sigmoid(config: dict[str, Any] | None = None, **options: Any) -> Tiny:
    return Tiny(config or {}, scores="sigmoid", **options)


_TEXT = {"generates": False}

FAMILIES: dict[str, Tiny] = {
    "AXK1": _sigmoid(_LATENT_GROUPS),
    "AXK2": _sigmoid(_LATENT_GROUPS),
    "Afmoe": _sigmoid({"num_shared_experts": 1, "num_dense_layers": 1}),
    "AriaText": Tiny({"moe_num_experts": EXPERTS, "moe_topk": 2, "moe_num_shared_experts": 1}, in_4=True),
    "BailingHybrid": _sigmoid(_LATENT_GROUPS | {"layer_types": ["linear_attention", "full_attention"]}),
    "Beam": _sigmoid(_GROUPS | _SPARSE_SECOND),
    "Cohere2Moe": _sigmoid({"expert_selection_fn": "sigmoid"}),
    "Dbrx": Tiny(
        {
            "d_model": WIDTH,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "ffn_config": {"hidden_size": WIDTH, "ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        alone=True,
        in_4=True,
    ),
    "DeepseekOcr2Text": Tiny(_GROUPS | _SPARSE_SECOND, model="DeepseekOcr2TextModel", **_TEXT),
    "DeepseekV2": Tiny(_LATENT_GROUPS | {"topk_method": "group_limited_greedy"}, in_4=True),
    "DeepseekV3": _sigmoid(_LATENT_GROUPS, in_4=True),
    "DeepseekV32": _sigmoid(_LATENT_GROUPS | {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}),
    "DiffusionGemmaText": Tiny(
        {"top_k_experts": 2, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 8},
        model="DiffusionGemmaEncoderTextModel",
        **_TEXT,
    ),
    "Dots1": _sigmoid(_GROUPS, in_4=True),
    "Dots3NoteText": _sigmoid(_LATENT_GROUPS, model="Dots3NoteForCausalLM"),
    "Ernie4_5_Moe": Tiny(
        {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0}, in_4=True
    ),
    "Ernie4_5_VLMoeText": Tiny(
        {
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        model="Ernie4_5_VLMoeTextModel",
        warns=("layer .*text_moe.gate has no block whose output", "no tokens of .*vision_moe.gate were seen"),
        **_TEXT,
    ),
    "ExaoneMoe": _sigmoid(_GROUPS),
    "FlexOlmo": Tiny(in_4=True),
    "Flint": _sigmoid({"mlp_only_layers": [0]}),
    "Gemma4Text": Tiny(
        {
            "enable_moe_block": True,
            "top_k_experts": 2,
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": VOCABULARY,
            "layer_types": ["sliding_attention", "full_attention"],
            "global_head_dim": 8,
        },
        model="Gemma4ForCausalLM",
    ),
    "Glm4Moe": _sigmoid(_GROUPS, in_4=True),
    "Glm4MoeLite": _sigmoid(_LATENT_GROUPS),
    "Glm4vMoeText": _sigmoid(
        _GROUPS
        | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "partial_rotary_factor": 1.0}},
        model="Glm4vMoeTextModel",
        **_TEXT,
    ),
    "Glm5NextText": _sigmoid(
        _LATENT_GROUPS
        | _DELTA
        | _SPARSE_SECOND
        | {
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "indexed_attention"],
            "index_topk": 4,
            "index_kpool": 2,
            "index_head_dim": 8,
            "index_n_heads": 2,
        },
        model="Glm5NextTextModel",
        **_TEXT,
    ),
    "GlmMoeDsa": _sigmoid(_LATENT_GROUPS),
    "GptOss": Tiny({"rope_parameters": {"rope_type": "default"}}, in_4=True),
    "GraniteMoe": Tiny(in_4=True),
    "GraniteMoeHybrid": Tiny(
        {
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "shared_intermediate_size": 16,
        },
        in_4=True,
    ),
    "GraniteMoeSWA": Tiny(),
    "GraniteMoeShared": Tiny({"shared_intermediate_size": 16}, in_4=True),
    "HYV3": _sigmoid({"first_k_dense_replace": 1}),
    "HYV4": _sigmoid(_LATENT_GROUPS),
    "HunYuanMoEV1": Tiny({"moe_topk": 2}, in_4=True),
    "Inkling2Text": _sigmoid({"scoring_func": "sigmoid"}, model="Inkling2ForCausalLM"),
    "Jamba": Tiny(
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
        in_4=True,
    ),
    "JetMoe": Tiny(
        {"kv_channels": 8}, in_4=True, warns=(r".*self_attention\.experts\.router has no block whose output",)
    ),
    "KimiLinear": _sigmoid(_LATENT_GROUPS | _DELTA | {"layer_types": ["linear_attention", "full_attention"]}),
    "Kolibri1": _sigmoid({"vocab_size": VOCABULARY}),
    "Laguna": _sigmoid(),
    "Lfm2Moe": _sigmoid({"num_dense_layers": 1, "layer_types": ["conv", "full_attention"]}),
    "Llama4Text": _sigmoid(
        {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 1},
        model="Llama4ForCausalLM",
        in_4=True,
        top_k=1,
    ),
    "LongcatFlash": Tiny(
        _LATENT
        | {
            "num_layers": 2,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "zero_expert_num": 2,
        },
        in_4=True,
    ),
    "Mellum": Tiny(),
    "MiMoV2Flash": _sigmoid(_GROUPS),
    "MiniMax": Tiny(in_4=True),
    "MiniMaxM2": _sigmoid(),
    "MiniMaxM3VLText": _sigmoid(model="MiniMaxM3VLForCausalLM"),
    "Mistral4": Tiny(
        _LATENT_GROUPS
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 64,
            }
        }
    ),
    "MistralLarge4Text": Tiny(_LATENT_GROUPS, model="MistralLarge4TextModel", **_TEXT),
    "Mixtral": Tiny(in_4=True),
    "MuseSparkText": _sigmoid(
        model="MuseSparkTextModel", scale="output_multiplier", warns=("the logits of router .* are not x Wᵀ",), **_TEXT
    ),
    "NemotronH": _sigmoid(
        _GROUPS
        | {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8, "chunk_size": 8}
        | {"use_mamba_kernels": False}
    ),
    "NllbMoe": Tiny(
        {
            "vocab_size": VOCABULARY,
            "d_model": WIDTH,
            "num_experts": EXPERTS,
            "expert_capacity": 64,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "encoder_sparse_step": 1,
            "decoder_sparse_step": 1,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
            "moe_token_dropout": 0.0,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
        },
        model="NllbMoeForConditionalGeneration",
        alone=True,
        in_4=True,
    ),
    "Olmoe": Tiny(in_4=True),
    "OpenAIPrivacyFilter": Tiny(
        {"rope_parameters": {"rope_type": "default"}}, model="OpenAIPrivacyFilterForTokenClassification", **_TEXT
    ),
    "Phimoe": Tiny({"router_jitter_noise": 0.4, "input_jitter_noise": 0.0}, in_4=True),
    "Qwen2Moe": Tiny({"decoder_sparse_step": 1}, in_4=True),
    "Qwen3Moe": Tiny(in_4=True),
    "Qwen3Next": Tiny(_LINEAR, in_4=True),
    "Qwen3OmniMoeText": Tiny(model="Qwen3OmniMoeThinkerTextModel", **_TEXT),
    "Qwen3VLMoeText": Tiny(model="Qwen3VLMoeTextModel", in_4=True, **_TEXT),
    "Qwen3_5MoeText": Tiny(_LINEAR, model="Qwen3_5MoeForCausalLM"),
    "Qwen4ExpText": Tiny(
        _LINEAR
        | {
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        },
        model="Qwen4ExpForCausalLM",
    ),
    "SolarOpen": _sigmoid(_GROUPS),
    "Step3p7Text": _sigmoid(_SPARSE_SECOND, model="Step3p7TextModel", **_TEXT),
    "SwitchTransformers": Tiny(
        _SEQUENCE
        | {
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_sparse_encoder_layers": 1,
            "num_decoder_layers": 2,
            "num_sparse_decoder_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        model="SwitchTransformersForConditionalGeneration",
        alone=True,
        in_4=True,
        top_k=1,
    ),
    "UnlimitedOcrText": Tiny(_GROUPS, model="UnlimitedOcrTextModel", **_TEXT),
}

# Their routers cannot be served.
REFUSED: dict[str, Tiny] = {
    "DeepseekV4": Tiny(),
    "Doge": Tiny({"is_moe": True, "num_experts": 16}),
    "InklingText": Tiny(model="InklingForCausalLM"),
    "Zaya": Tiny({"num_experts_per_tok": 1}),
}

_SELECTION = ("e_score_correction_bias", "expert_bias")


def build(family: str, **changes: Any) -> Any:
    """Return a seeded fp32 model of a family in training mode, its routers decided, its selection biases not 0."""
    tiny = FAMILIES.get(family) or REFUSED[family]
    config = find_class(f"{family}Config")(**({} if tiny.alone else _SIZES) | tiny.config | changes)
    torch.manual_seed(0)
    model = find_class(tiny.model or f"{family}ForCausalLM")(config).float().train()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(_SELECTION):
                tensor.normal_(std=0.1)
            elif tensor.shape[-1:] == (WIDTH,) and tensor.ndim == 2 and _in_router(name):
                tensor.normal_(std=0.3)
    return model


def available() -> list[str]:
    """Return the families that the installed version has."""
    major = int(installed().partition(".")[0])
    return [name for name, tiny in FAMILIES.items() if major > 4 or tiny.in_4]


def installed() -> str:
    """Return the version of transformers."""
    return importlib.metadata.version("transformers")


def _in_router(name: str) -> bool:
    *parents, leaf = name.split(".")
    return leaf == "weight" and bool({"gate", "router", "wg"} & set(parents)) and "experts" not in parents


def find_class(name: str) -> Any:
    """Return a class of transformers, whether its main module exports it or not."""
    import transformers

    if hasattr(transformers, name):
        return getattr(transformers, name)
    for module in pkgutil.iter_modules(transformers.models.__path__):
        if name.lower().startswith(module.name.replace("_", "")):
            for kind in ("modeling", "configuration"):
                found = importlib.import_module(f"transformers.models.{module.name}.{kind}_{module.name}")
                if hasattr(found, name):
                    return getattr(found, name)
    raise LookupError(f"transformers has no {name}")


def batch(model: Any, masked: bool = True) -> dict[str, Tensor]:
    """Return what a model is called with: two sequences, the second one's end padded."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    if masked:
        mask[1, -PADDED:] = 0
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "attention_mask": mask}
    decoder_ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH - 3), generator=generator)
    decoder_mask = torch.ones_like(decoder_ids)
    if masked:
        decoder_mask[0, -2:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_mask,
    }


def run(model: nn.Module, masked: bool = True, **arguments: Any) -> Tensor:
    """Return the newest hidden states or logits of a forward pass, whose random numbers are always the same."""
    torch.manual_seed(2)
    found = model(**batch(model, masked), **arguments)
    output = getattr(found, "logits", None)
    return found.last_hidden_state if output is None else output


def loss_of(output: Tensor) -> Tensor:
    """Return a loss that reaches every output, of the same size whatever theirs is."""
    output = output.float() / output.detach().float().std()
    return 10 * (output.square() + output.sin()).mean()


def backward(model: nn.Module, masked: bool = True, **arguments: Any) -> Tensor:
    """Run a forward and a backward pass from gradients of 0; return the output."""
    model.zero_grad()
    output = run(model, masked, **arguments)
    loss_of(output).backward()
    return output.detach()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of all gradients."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
