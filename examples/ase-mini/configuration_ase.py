"""Configuration of ASE-MLLM (arXiv 2509.04378): a vision-language model, a saliency module and where they meet.

The paper publishes no sizes; every default below is this project's own choice.
"""

import math
from os import PathLike
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers.utils.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils.type_validators import interval


IMAGE_TOKEN_SELECTIONS = ("diverse", "uniform", "saliency")

# What importing changes in transformers, all of it: registering with an Auto class leaves these tables as they are, and
# servers and pipelines find models by name in them. NOTE: here, because of a folder's own code only this file and the
# processor's have run when `transformers serve` looks.
MODEL_MAPPING_NAMES.update({"ase": "ASEModel", "ase_iasm": "ImageAestheticSaliencyModule"})
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["ase"] = "ASEForConditionalGeneration"
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["ase"] = "ASEForConditionalGeneration"


class _SavedWithCode(PreTrainedConfig):
    """A configuration whose folder also loads where this package is not installed, with `trust_remote_code=True`."""

    _auto_class = "AutoConfig"  # with it, transformers copies this file, and the model's with the model's own

    def save_pretrained(self, save_directory: str | PathLike, push_to_hub: bool = False, **kwargs):
        self.auto_map = dict(self._auto_map)  # all names each time: one that came from the Hub would still point there
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        # each part as it would save itself: without its defaults and the path that it was loaded from
        parts = {
            name: getattr(self, name).to_diff_dict() for name in self.sub_configs if getattr(self, name) is not None
        }
        for part in parts.values():
            part.pop("transformers_version", None)
            _drop_paths(part)
        return {**super().to_diff_dict(), **parts}


@strict
class IASMConfig(_SavedWithCode):
    r"""
    Configuration of the image aesthetic saliency module (IASM).

    Args:
        encoder_layers:
            Indices (from 0) of the vision encoder's layers whose states the module reads, before any fusion. `None` is the
            layer at half of the depth that the language model sees, or none where there is a backbone; where the states' places are not known, none (the
            model says why). The model writes the choice back.
        encoder_hidden_sizes, encoder_prefix_length:
            Widths of those states, and how many of them (class token, registers) stand before those that have a place.
            The model finds both out and writes them back.
        train_encoder:
            Whether the module's losses reach the encoder through what is read.
        backbone_config:
            Any backbone that `AutoBackbone` knows, beside the encoder or instead of it; its feature maps are merged at
            stride 8. With neither the module judges by photometry alone.
        image_size:
            Side in pixels of the square whose area the image is resized to (its aspect ratio is kept); a multiple of 32.
        image_mean, image_std:
            The normalisation that the base's image processor applied, three numbers each or one for all colours. The
            module undoes it, because exposure and colour casts can only be judged on absolute values.
        hidden_size:
            Width of the saliency tokens.
        num_queries:
            Learned aspect queries (colour, light, composition, ...), one saliency token each.
        num_hidden_layers, num_attention_heads:
            Transformer layers in which the queries read what map and photometry say.
        num_aspects, aspect_names:
            Size and names of the multi-label aspect head; 0 leaves it out.
        verdict_token:
            Adds a saliency token of what the aspect head decided, each aspect yes or no, so that the text can say what the
            labels say: near the threshold it could not tell from the other tokens. Needs aspects.
        fine_statistics:
            Also measures light falloff and the directions of edges finely, for vignettes and tilts.
        probe_tokens:
            Adds two saliency tokens that begin as linear readings of the encoder's states, as of a linear probe: of their mean
            and of their coarse layout. The layers then let them and the queries read each other. Needs an encoder whose
            states have known places.
        score_loss_weight, saliency_loss_weight, aspect_loss_weight:
            Weights of the squared earth mover's distance of the scores, of KL - CC of the map, and of the binary
            cross-entropy of the aspects. Each term only counts where its targets are given.
        initializer_range:
            Standard deviation of the learned queries and token types at the start.
    """

    model_type = "ase_iasm"
    base_config_key = "iasm_config"
    sub_configs = {"backbone_config": AutoConfig}
    _auto_map = {
        "AutoConfig": "configuration_ase.IASMConfig",
        "AutoModel": "modeling_iasm.ImageAestheticSaliencyModule",
    }

    encoder_layers: list[int] | None = None
    encoder_hidden_sizes: list[int] | None = None
    encoder_prefix_length: int = interval(min=0)(default=0)
    train_encoder: bool = True
    backbone_config: dict | PreTrainedConfig | None = None
    image_size: int = 192
    # whole numbers too: published processors have [0, 0, 0] and [1, 1, 1]
    image_mean: float | int | list[float | int] | tuple[float | int, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: float | int | list[float | int] | tuple[float | int, ...] = tuple(OPENAI_CLIP_STD)
    hidden_size: int = interval(min=4)(default=128)
    num_queries: int = interval(min=1)(default=8)
    num_hidden_layers: int = interval(min=1)(default=2)
    num_attention_heads: int = interval(min=1)(default=4)
    num_aspects: int = interval(min=0)(default=0)
    aspect_names: list[str] | tuple[str, ...] | None = None
    verdict_token: bool = False
    fine_statistics: bool = False
    probe_tokens: bool = False
    score_loss_weight: float | int = interval(min=0, exclude_max=True)(default=1.0)
    saliency_loss_weight: float | int = interval(min=0, exclude_max=True)(default=1.0)
    aspect_loss_weight: float | int = interval(min=0, exclude_max=True)(default=1.0)
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        if self.backbone_config is not None:
            self.backbone_config = _part_config("backbone_config", self.backbone_config)
            self.encoder_layers = self.encoder_layers or []
        if self.encoder_layers is not None:
            self.encoder_layers = sorted(self.encoder_layers)
        super().__post_init__(**kwargs)
        if self.aspect_names is not None and self.num_aspects == 0:
            self.num_aspects = len(self.aspect_names)

    def validate_architecture(self):
        """Part of `@strict`: refuses sizes that do not fit each other."""
        layers = self.encoder_layers or []
        if (layers and min(layers) < 0) or len(set(layers)) != len(layers):
            raise ValueError(f"`encoder_layers` must be different indices counted from 0, got {layers}.")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"`image_size` must be a positive multiple of 32, got {self.image_size}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})."
            )
        mean, std = (one if isinstance(one, (list, tuple)) else [one] * 3 for one in (self.image_mean, self.image_std))
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(
                "`image_mean` and `image_std` take three numbers each, or one for all colours, all finite and the "
                f"standard deviations above 0; got {self.image_mean} and {self.image_std}."
            )
        if self.aspect_names is not None and len(self.aspect_names) != self.num_aspects:
            raise ValueError(
                f"`aspect_names` has {len(self.aspect_names)} names for `num_aspects={self.num_aspects}`."
            )
        if self.verdict_token and not (self.num_aspects or self.aspect_names):
            raise ValueError("`verdict_token` needs an aspect head: `num_aspects` is 0.")


@strict
class ASEConfig(_SavedWithCode):
    r"""
    Configuration of ASE-MLLM: any image-text-to-text model with an image aesthetic saliency module.

    Args:
        mllm_config:
            Configuration of the base vision-language model. The base model keeps this very object.
        iasm_config:
            An `IASMConfig` or its fields.
        fusion_layers:
            Indices (from 0) of the vision encoder's layers after which the patches attend to the saliency tokens.
            `None` spreads up to four over the layers whose output the language model can see, from the one on that the
            saliency module reads; the model writes the choice back, so that a saved config always names them.
        fusion_hidden_size, fusion_num_attention_heads:
            Inner width and heads of that cross-attention.
        image_token_budget:
            How many tokens of each image of the encoder the language model is handed: a share (a float up to 1.0), a
            number (an int), or `None` for all, as the base does.
        image_token_selection:
            Which: `"diverse"` (features that differ, salient ones rather), `"uniform"` (evenly over the picture), or
            `"saliency"` (the most salient). Measured, they hardly differ.
    """

    model_type = "ase"
    sub_configs = {"mllm_config": AutoConfig, "iasm_config": IASMConfig}
    _auto_map = {
        "AutoConfig": "configuration_ase.ASEConfig",
        "AutoModel": "modeling_ase.ASEModel",
        "AutoModelForImageTextToText": "modeling_ase.ASEForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_ase.ASEForConditionalGeneration",
        "AutoProcessor": "processing_ase.ASEProcessor",
    }

    mllm_config: dict | PreTrainedConfig | None = None
    iasm_config: dict | PreTrainedConfig | None = None
    fusion_layers: list[int] | None = None
    fusion_hidden_size: int = interval(min=1)(default=256)
    fusion_num_attention_heads: int = interval(min=1)(default=8)
    image_token_budget: float | int | None = None
    image_token_selection: str = "diverse"

    def __post_init__(self, **kwargs):
        # NOTE: building a composite sets the attention of all its parts to None. A live base would then run with another
        # mask, so its choices are kept unless the caller names one.
        kwargs.pop("text_config", None)  # see `to_dict`
        live = isinstance(self.mllm_config, PreTrainedConfig) and kwargs.get("attn_implementation") is None
        kept = [(config, _implementations(config)) for config in _tree(self.mllm_config)] if live else []
        self.mllm_config = _part_config("mllm_config", self.mllm_config or {"model_type": "llava"})
        if not isinstance(self.iasm_config, PreTrainedConfig):
            self.iasm_config = IASMConfig(**(self.iasm_config or {}))
        super().__post_init__(**kwargs)
        for config, implementations in kept:
            config.__dict__.update(implementations)
        # The tying is the base's; saying it here too makes every outside reader see the same. Some leave it to the text.
        texts = (self.mllm_config, self.mllm_config.get_text_config())
        self.tie_word_embeddings = next(
            (c.tie_word_embeddings for c in texts if "tie_word_embeddings" in vars(c)), False
        )

    def validate_architecture(self):
        """Part of `@strict`: refuses sizes and layers that cannot be."""
        if self.fusion_hidden_size % self.fusion_num_attention_heads:
            raise ValueError(
                f"`fusion_hidden_size` ({self.fusion_hidden_size}) must be a multiple of "
                f"`fusion_num_attention_heads` ({self.fusion_num_attention_heads})."
            )
        if self.fusion_layers is not None:
            if not self.fusion_layers:
                raise ValueError("`fusion_layers` is empty: name at least one encoder layer, or leave it `None`.")
            if min(self.fusion_layers) < 0 or len(set(self.fusion_layers)) != len(self.fusion_layers):
                raise ValueError(
                    f"`fusion_layers` must be different indices counted from 0, got {self.fusion_layers}."
                )
        check_image_token_budget(self.image_token_budget)
        if self.image_token_selection not in IMAGE_TOKEN_SELECTIONS:
            raise ValueError(
                f"`image_token_selection` is one of {IMAGE_TOKEN_SELECTIONS}, got {self.image_token_selection!r}."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "ASEConfig":
        """As of every configuration; that of another model is refused, because its weights would find no place."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(
                f"This is the configuration of a `{model_type}` model, not of an `{cls.model_type}` model. To give a base "
                "model the saliency branch, load it with `ASEForConditionalGeneration.from_mllm_pretrained`."
            )
        if not config_dict.get("mllm_config"):
            raise ValueError("This configuration names no base model: its `mllm_config` is missing or empty.")
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        # PEFT takes sizes for prompts and prefixes from a `text_config` here; in files the base's is enough
        return {**super().to_dict(), "text_config": self.text_config.to_dict()}

    def to_diff_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_diff_dict().items() if name != "text_config"}

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """What evaluation does not gather over batches: the base's names, and what has other sizes in each."""
        own = [
            "past_key_values",
            "cache",
            "image_hidden_states",
            "image_outputs",
            "saliency_maps",
            "saliency_map_sizes",
        ]
        return list(dict.fromkeys([*getattr(self.mllm_config, "keys_to_ignore_at_inference", ()), *own]))

    def get_text_config(self, *args, **kwargs) -> PreTrainedConfig:
        return self.mllm_config.get_text_config(*args, **kwargs)

    @property
    def text_config(self) -> PreTrainedConfig:
        return self.mllm_config.get_text_config()

    @property
    def vision_config(self) -> PreTrainedConfig:
        return self.mllm_config.vision_config

    @property
    def image_token_id(self) -> int:
        return self.mllm_config.image_token_id

    @property
    def image_token_index(self) -> int:
        return self.mllm_config.image_token_index

    @property
    def video_token_id(self) -> int:
        return self.mllm_config.video_token_id


def check_image_token_budget(budget: float | int | None):
    """
    Raises:
        ValueError: unless the budget is a share in 0..1, a number of tokens from 1 on, or `None`.
    """
    is_share = isinstance(budget, float) and 0 < budget <= 1
    is_number = isinstance(budget, int) and not isinstance(budget, bool) and budget >= 1
    if budget is not None and not is_share and not is_number:
        raise ValueError(
            "`image_token_budget` is a share above 0.0 and up to 1.0, or a whole number of tokens an image; got "
            f"{budget!r}."
        )


def _part_config(name: str, config: dict | PreTrainedConfig) -> PreTrainedConfig:
    """The configuration of a part of any type, from its fields."""
    if isinstance(config, PreTrainedConfig):
        return config
    if "model_type" not in config:
        raise ValueError(f"`{name}` has no `model_type` that says which model it is of; it names {sorted(config)}.")
    return AutoConfig.for_model(**config)


def _drop_paths(fields: dict[str, Any]):
    """Takes out where parts of parts were loaded from: a folder of somebody's machine."""
    fields.pop("_name_or_path", None)
    for value in fields.values():
        if isinstance(value, dict):
            _drop_paths(value)


def _tree(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The config and all configs inside it."""
    parts = [getattr(config, name, None) for name in config.sub_configs]
    return [config, *(inner for part in parts if part is not None for inner in _tree(part))]


def _implementations(config: PreTrainedConfig) -> dict[str, Any]:
    names = ("_attn_implementation_internal", "_experts_implementation_internal")
    return {name: config.__dict__.get(name) for name in names}


__all__ = ["ASEConfig", "IASMConfig"]
