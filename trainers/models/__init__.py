"""The models of the trainers: a language model and a vision transformer with mixture-of-experts blocks."""

from trainers.models.language import LanguageModel
from trainers.models.moe import ModelOutput, MoELayer, RouterFactory, Routing
from trainers.models.vision import VisionModel

__all__ = ["LanguageModel", "MoELayer", "ModelOutput", "RouterFactory", "Routing", "VisionModel"]
