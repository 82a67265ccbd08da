"""The configurations of the tiny models, and what is known of each family.

What a family does is not read from the library but said here; the tests hold it against what they measure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

WIDTH, EXPERTS, VOCABULARY = 32, 4, 99

# Every name a family may have for the same number; what it does not know it does not read.
SIZES: dict[str, Any] = {
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
_SECTIONS = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1]}}
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
        blind_4: whether its choices do not show in transformers 4.
        changes_4: what its configuration has instead in transformers 4.
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
    blind_4: bool = False
    changes_4: dict[str, Any] = field(default_factory=dict)


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
        changes_4={"ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": EXPERTS, "moe_top_k": 2}},
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
        {"moe_num_experts": EXPERTS, "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 0},
        in_4=True,
        blind_4=True,
    ),
    "Ernie4_5_VLMoeText": Tiny(
        {
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        model="Ernie4_5_VLMoeTextModel",
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
        in_4=True,
        changes_4={"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 0]}},
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
    "HunYuanMoEV1": Tiny({"moe_topk": 2}, in_4=True, blind_4=True),
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
    "Phimoe": Tiny({"router_jitter_noise": 0.4, "input_jitter_noise": 0.0}, in_4=True, blind_4=True),
    "Qwen2Moe": Tiny({"decoder_sparse_step": 1}, in_4=True),
    "Qwen3Moe": Tiny(in_4=True),
    "Qwen3Next": Tiny(_LINEAR, in_4=True),
    "Qwen3OmniMoeText": Tiny(model="Qwen3OmniMoeThinkerTextModel", in_4=True, changes_4=_SECTIONS, **_TEXT),
    "Qwen3VLMoeText": Tiny(model="Qwen3VLMoeTextModel", in_4=True, changes_4=_SECTIONS, **_TEXT),
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
