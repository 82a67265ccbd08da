"""Router families of transformers (5.23, 4.57) that need a word beyond what their modules show.

Families that are not here are like most: softmax scores, gates on the experts' output, and a router that returns its
logits, the chosen experts and their gates. The whole table, these included, is in ``docs/transformers.md``.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..routers.family import RouterFamily

# Like DeepSeek-V3's: sigmoid scores, a bias that only selects, mostly groups of experts.
_SIGMOID = (
    "AXK1TopkRouter",
    "AXK2TopkRouter",
    "AfmoeTokenChoiceRouter",
    "BailingHybridTopkRouter",
    "BeamTopKRouter",
    "DeepseekV3TopkRouter",
    "DeepseekV32TopkRouter",
    "Dots1TopkRouter",
    "Dots3NoteTextTopkRouter",
    "Dots3NoteVisionTopKRouter",
    "ExaoneMoeTopkRouter",
    "FlintTopKRouter",
    "Glm4MoeTopkRouter",
    "Glm4MoeLiteTopkRouter",
    "Glm4vMoeTextTopkRouter",
    "Glm5NextTextTopkRouter",
    "GlmMoeDsaTopkRouter",
    "HYV3TopKRouter",
    "HYV4TopkRouter",
    "KimiLinearTopkRouter",
    "Kolibri1TopKRouter",
    "LagunaTopKRouter",
    "Lfm2MoeTopKRouter",
    "MiMoV2FlashTopkRouter",
    "MiniMaxM2TopKRouter",
    "MiniMaxM3VLTopKRouter",
    "MuseSparkTopkRouter",
    "NemotronHTopkRouter",
    "SolarOpenTopkRouter",
    "Step3p7TopKRouter",
)

# Their configuration names the activation that makes the scores.
_CONFIGURED = ("DeepseekV4TopKRouter", "DeepseekV4HashRouter", "Inkling2TopKRouter")


def _named(router: Any) -> Any:
    return router.expert_selection_fn


def _activation(router: Any) -> Any:
    return type(router.score_fn).__name__.lower().removesuffix("activation")


#: By class name of the router; the first that a class is, or is derived from.
FAMILIES = (
    *(RouterFamily(router=name, scores="sigmoid") for name in _SIGMOID),
    RouterFamily(router="Cohere2MoeTopKRouter", scores=_named),
    *(RouterFamily(router=name, scores=_activation) for name in _CONFIGURED),
    # They show logits only; DBRX's block hands the choices to its experts.
    RouterFamily(router="Llama4Router", scores="sigmoid", gates="input", top_k="top_k", renormalize=False),
    *(
        RouterFamily(router=f"{name}TopKGating", projection="layer", top_k="top_k")
        for name in ("JetMoe", "GraniteMoe", "GraniteMoeHybrid", "GraniteMoeShared")
    ),
    RouterFamily(router="SwitchTransformersTop1Router", projection="classifier", top_k=1, renormalize=False),
    RouterFamily(router="NllbMoeTop2Router", projection="classifier", top_k=2),
    RouterFamily(
        router="InklingTopkRouter", refused="its weight has rows for shared experts, too, which take all tokens"
    ),
    RouterFamily(
        router="ZayaRouter",
        refused="it is an MLP that hands a state from layer to layer, and one of its classes is no expert",
    ),
    RouterFamily(router="DogeCDMoE", refused="it looks experts up by product keys and mixes the logits of tokens"),
)

# transformers 4: gates that are plain layers, in blocks that take the k largest. Not those of Ernie 4.5, which choose
# with a bias, and of Phi-MoE, which draw: what they choose does not follow from the logits.
_RENORMALIZED = ("MiniMaxSparseMoeBlock", "MixtralSparseMoeBlock", "Qwen3VLMoeTextSparseMoeBlock")
_CONFIGURED_SUM = (
    "FlexOlmoSparseMoeBlock",
    "OlmoeSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
    "Qwen3NextSparseMoeBlock",
    "Qwen3OmniMoeTalkerTextSparseMoeBlock",
    "Qwen3OmniMoeThinkerTextSparseMoeBlock",
)
BLOCKS = (
    *(RouterFamily(router="Linear", block=name, top_k="top_k") for name in _RENORMALIZED),
    *(
        RouterFamily(router="Linear", block=name, top_k="top_k", renormalize="norm_topk_prob")
        for name in _CONFIGURED_SUM
    ),
    RouterFamily(router="Linear", block="JambaSparseMoeBlock", top_k="top_k", renormalize=False),
    RouterFamily(router="Linear", block="AriaTextMoELayer", top_k="config.moe_topk"),
)

_BY_NAME = {family.router: family for family in FAMILIES}


def known_family(module: nn.Module) -> RouterFamily | None:
    """Return the family of a router of transformers, None where it is not in the table."""
    return next((_BY_NAME[base.__name__] for base in type(module).__mro__ if base.__name__ in _BY_NAME), None)


def known_block(module: nn.Module, around: nn.Module) -> RouterFamily | None:
    """Return the family of a plain layer by the block that it is the gate of, None where that is not in the table."""
    return next((family for family in BLOCKS if family.matches(module, around)), None)
