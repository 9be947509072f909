"""Aesthetic image captioning for any vision-language model of transformers; importing registers the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_ase import ASEConfig, IASMConfig
from .modeling_ase import ASEForConditionalGeneration, ASEModel
from .modeling_iasm import ASEPreTrainedModel, ImageAestheticSaliencyModule, SaliencyCrossAttention
from .processing_ase import ASEDataCollator, ASEProcessor, read_photograph


AutoConfig.register("ase", ASEConfig)
AutoConfig.register("ase_iasm", IASMConfig)
AutoModel.register(ASEConfig, ASEModel)
AutoModel.register(IASMConfig, ImageAestheticSaliencyModule)
AutoModelForImageTextToText.register(ASEConfig, ASEForConditionalGeneration)
AutoModelForMultimodalLM.register(ASEConfig, ASEForConditionalGeneration)
AutoProcessor.register(ASEConfig, ASEProcessor)

__all__ = [
    "ASEConfig",
    "ASEDataCollator",
    "ASEForConditionalGeneration",
    "ASEModel",
    "ASEPreTrainedModel",
    "ASEProcessor",
    "IASMConfig",
    "ImageAestheticSaliencyModule",
    "SaliencyCrossAttention",
    "read_photograph",
]
