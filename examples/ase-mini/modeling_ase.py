"""ASE-MLLM: a vision-language model of transformers whose image encoder sees with a saliency module.

After "Aesthetic Image Captioning with Saliency Enhanced MLLMs" (arXiv 2509.04378), which names the parts (IASM, IAS-ViT,
MLLM) and their connection (cross-attention in the image encoder). It publishes no internals: all that is inside the parts
is this project's own design. The zero-initialised tanh gate is Flamingo's (arXiv 2204.14198).
"""

import inspect
import math
import re
import threading
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, make_dataclass
from functools import cache, partial, wraps
from itertools import pairwise
from os import PathLike
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoBackbone,
    AutoModelForImageTextToText,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.image_processing_base import ImageProcessingMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast

from .configuration_ase import ASEConfig, IASMConfig


TARGETS = ("rating_targets", "saliency_targets", "aspect_targets", "caption_weights")
SALIENCY_OUTPUTS = ("saliency_maps", "saliency_map_sizes", "score_logits", "aspect_logits")
LOSS_TERMS = ("caption_loss", "score_loss", "saliency_loss", "aspect_loss")
CACHE_NAMES = ("past_key_values", "cache")  # before transformers 5.24 and since
TILES_HINT = "; where the base's processor cuts images into tiles, each tile is one: let it leave them whole"
SALIENCY_STRIDE = 8  # pixels of the IASM's input per position of the saliency map


@dataclass
class IASMOutput(ModelOutput):
    r"""
    What the image aesthetic saliency module says of `n` images.

    Args:
        loss: Weighted sum of the terms below whose targets were given.
        saliency_tokens: `(n, num_queries, hidden_size)`, what the encoder's patches attend to.
        saliency_maps: `(n, h, w)`, probabilities over positions: each map sums to 1.
        saliency_map_sizes: `(n, 2)`, height and width of each map where they differ, else `None`; the maps are then
            padded with zeros on the right and below.
        score_logits: `(n, 10)`, logits of the ratings 1 to 10.
        aspect_logits: `(n, num_aspects)`, one independent logit an aspect.
        score_loss, saliency_loss, aspect_loss: The unweighted terms.
    """

    loss: torch.Tensor | None = None
    saliency_tokens: torch.Tensor | None = None
    saliency_maps: torch.Tensor | None = None
    saliency_map_sizes: torch.Tensor | None = None
    score_logits: torch.Tensor | None = None
    aspect_logits: torch.Tensor | None = None
    score_loss: torch.Tensor | None = None
    saliency_loss: torch.Tensor | None = None
    aspect_loss: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Photometry: absolute light, colour, detail and line directions, which normalisation layers would throw away
# ---------------------------------------------------------------------------------------------------------------------


def _colour_planes(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """RGB `(n, 3, h, w)` to luma `(n, 1, h, w)` and the colour differences B - Y, R - Y `(n, 2, h, w)`."""
    weights = pixels.new_tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1)
    luma = (pixels * weights).sum(1, keepdim=True)
    return luma, torch.cat([pixels[:, 2:3] - luma, pixels[:, 0:1] - luma], dim=1)


def _detail(plane: torch.Tensor, stride: int) -> torch.Tensor:
    """Log mean absolute difference from the 3x3 mean, per cell of `stride` pixels, about -1 to 1."""
    padded = F.pad(plane, (1, 1, 1, 1), mode="replicate")
    return (F.avg_pool2d((plane - F.avg_pool2d(padded, 3, 1)).abs(), stride) + 1e-4).log() / 3 + 1.5


def photometric_maps(pixels: torch.Tensor) -> torch.Tensor:
    """
    Local photometry of RGB images in 0..1 `(n, 3, h, w)`, `h` and `w` multiples of 32.

    Returns `(n, 10, h / 8, w / 8)`: luma, two colour differences, saturation, spread of luma, luma detail at three
    scales, colour detail, and how fast detail falls from the finest scale to the next.
    """
    luma, chroma = _colour_planes(pixels)
    mean = F.avg_pool2d(luma, SALIENCY_STRIDE)
    spread = (F.avg_pool2d(luma.square(), SALIENCY_STRIDE) - mean.square()).clamp(min=1e-6).sqrt()
    saturation = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)
    half = F.avg_pool2d(luma, 2)
    details = [
        _detail(luma, SALIENCY_STRIDE),
        _detail(half, SALIENCY_STRIDE // 2),
        _detail(F.avg_pool2d(half, 2), SALIENCY_STRIDE // 4),
    ]
    maps = [
        mean * 2 - 1,
        F.avg_pool2d(chroma, SALIENCY_STRIDE) * 4,
        F.avg_pool2d(saturation, SALIENCY_STRIDE) * 2,
        spread * 4,
        *details,
        _detail(chroma, SALIENCY_STRIDE).mean(1, keepdim=True),
        (details[0] - details[1]) * 2,
    ]
    return torch.cat(maps, dim=1)


def contrast_maps(maps: torch.Tensor) -> torch.Tensor:
    """
    How each position differs from the rest of its picture: `photometric_maps` `(n, c, h, w)` to `(n, 8 * c, h, w)`.

    Differences from the surround near and far, from the whole and from the border, in units of the picture's own spread,
    then their sizes. A subject is what differs: a convolution sees only its surround, and learning the rest takes many
    pictures. (Centre and surround are those of Itti, Koch and Niebur, 1998; the sizes are this project's choice.)
    """
    spread = maps.flatten(2).std(2)[..., None, None] + 0.05
    widest = 2 * min(maps.shape[-2:]) - 1
    surrounds = [
        F.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False) for side in (min(5, widest), min(11, widest))
    ]
    border = [maps[:, :, :2], maps[:, :, -2:], maps[:, :, :, :2], maps[:, :, :, -2:]]
    whole, border = (cells.mean(2)[..., None, None] for cells in (maps.flatten(2), _cat_cells(border)))
    differences = torch.cat([(maps - other) / spread for other in (*surrounds, whole, border)], dim=1)
    return torch.cat([differences.abs(), differences], dim=1)


def _cat_cells(maps: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten(2) for part in maps], dim=2)


def photometric_statistics(pixels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """
    Photometry of whole images: RGB in 0..1 `(n, 3, h, w)` and their `photometric_maps`, to `(n, 115)`.

    In order: quantiles and clipping of luma, mean and spread of all maps, quantiles of colour, saturation and detail,
    colour by tone, brightness from the centre to the corners, and the directions of edges.
    """
    luma, chroma = _colour_planes(pixels[:, :, ::2, ::2])
    tones = luma.flatten(1).sort(dim=1).values
    ranks = [0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995]
    tones_at = tones[:, [int(rank * (tones.shape[1] - 1)) for rank in ranks]]
    clipped = torch.cat([(luma > 0.98).float().flatten(2).mean(2), (luma < 0.02).float().flatten(2).mean(2)], dim=1)

    cells = maps.flatten(2)
    levels = cells[:, 1:].sort(dim=2).values  # without luma, whose tones are finer
    levels_at = levels[:, :, [int(rank * (levels.shape[2] - 1)) for rank in (0.02, 0.1, 0.5, 0.9, 0.98)]].flatten(1)

    # colour where the picture is dark, middling and bright: a cast tints all tones, an object only its own
    tone_weights = torch.cat([(0.35 - luma), 0.3 - (luma - 0.5).abs(), (luma - 0.65)], dim=1).clamp(min=0) + 1e-4
    colour_by_tone = torch.einsum("nthw,nchw->ntc", tone_weights, chroma) / tone_weights.sum((2, 3)).unsqueeze(-1)
    neutral = (0.15 - chroma.abs().amax(1, keepdim=True)).clamp(min=0) + 1e-4
    neutral_colour = (neutral * chroma).sum((2, 3)) / neutral.sum((2, 3))

    return torch.cat(
        [
            tones_at * 2 - 1,
            clipped * 4,
            cells.mean(2),
            cells.std(2),
            levels_at,
            colour_by_tone.flatten(1) * 4,
            neutral_colour * 8,
            _falloff(maps[:, 0]),
            _edge_directions(luma),
        ],
        dim=1,
    )


def _falloff(luma: torch.Tensor) -> torch.Tensor:
    """Brightness of five rings and four corners against the whole, `(n, h, w)` in -1..1 to `(n, 9)`."""
    height, width = luma.shape[1:]
    y = torch.linspace(-1, 1, height, device=luma.device).view(-1, 1)
    x = torch.linspace(-1, 1, width, device=luma.device).view(1, -1)
    radius = ((x.square() + y.square()) / 2).sqrt()
    edges = (0.0, 0.3, 0.5, 0.65, 0.8, 1.01)
    regions = [(radius >= low) & (radius < high) for low, high in pairwise(edges)]
    regions += [(radius >= 0.8) & (x * sx > 0) & (y * sy > 0) for sx in (-1, 1) for sy in (-1, 1)]
    regions = torch.stack(regions).flatten(1)
    regions = (regions | ~regions.any(1, keepdim=True)).float()  # a ring between few cells is as bright as the whole
    light = ((luma + 1) / 2).flatten(1)
    means = light @ (regions / regions.sum(1, keepdim=True)).T
    return (means + 0.02).log() - (light.mean(1, keepdim=True) + 0.02).log()


def _edge_directions(luma: torch.Tensor) -> torch.Tensor:
    """Circular moments of gradient directions, `(n, 1, h, w)` to `(n, 20)`; a tilt turns their phase."""
    dx = F.pad(luma, (1, 1, 1, 1), mode="replicate")
    dy = dx[..., 2:, 1:-1] - dx[..., :-2, 1:-1]
    dx = dx[..., 1:-1, 2:] - dx[..., 1:-1, :-2]
    size = (dx.square() + dy.square()).flatten(1)
    angle = torch.atan2(dy, dx).flatten(1)
    moments = []
    for order in (2, 4, 8, 12, 16, 20, 24, 28, 32, 36):
        moments += [(size * (order * angle).cos()).sum(1), (size * (order * angle).sin()).sum(1)]
    return torch.stack(moments, dim=1) / (size.sum(1, keepdim=True) + 1e-4) * 3


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SaliencyAttention(nn.Module):
    """Multi-head attention of one sequence over another, `(n, p, query_size)` over `(n, t, context_size)`."""

    is_causal = False

    def __init__(
        self, config: ASEConfig | IASMConfig, query_size: int, context_size: int, hidden_size: int, num_heads: int
    ):
        super().__init__()
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(query_size, hidden_size)
        self.k_proj = nn.Linear(context_size, hidden_size)
        self.v_proj = nn.Linear(context_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, query_size)

    def forward(self, hidden_states: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (self.q_proj(hidden_states), self.k_proj(context), self.v_proj(context))
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, _ = attention_interface(self, query, key, value, attention_mask=None, scaling=self.scaling)
        return self.o_proj(output.flatten(2))


class SaliencyCrossAttention(nn.Module):
    """
    Lets an encoder's patches attend to the saliency tokens of their own image, behind a gate that starts shut.

    Saliency is added, never a mask: aesthetics needs the background too.
    """

    def __init__(self, config: ASEConfig, hidden_size: int):
        super().__init__()
        tokens_size = config.iasm_config.hidden_size
        self.norm = nn.LayerNorm(hidden_size)
        self.tokens_norm = nn.LayerNorm(tokens_size)
        self.attention = SaliencyAttention(
            config, hidden_size, tokens_size, config.fusion_hidden_size, config.fusion_num_attention_heads
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, saliency_tokens: torch.Tensor) -> torch.Tensor:
        """Patches `(n, p, hidden_size)` and tokens `(n, t, tokens_size)` to patches; gate 0 returns them as they are."""
        dtype = self.norm.weight.dtype
        attended = self.attention(self.norm(hidden_states.to(dtype)), self.tokens_norm(saliency_tokens.to(dtype)))
        return hidden_states + (self.gate.tanh() * attended).to(hidden_states.dtype)


class SaliencyFusions(nn.Module):
    """The cross-attentions of all fusion layers, by the index of the encoder layer that they follow."""

    # NOTE: not a ModuleList: PEFT's `modules_to_save` copies whole modules and refuses lists
    def __init__(self, config: ASEConfig, hidden_sizes: dict[int, int]):
        super().__init__()
        for layer, hidden_size in hidden_sizes.items():
            self.add_module(str(layer), SaliencyCrossAttention(config, hidden_size))

    def hidden_size(self, layer: int) -> int:
        return self.get_submodule(str(layer)).norm.normalized_shape[0]

    def forward(self, layer: int, hidden_states: torch.Tensor, saliency_tokens: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(str(layer))(hidden_states, saliency_tokens)


class SaliencyTokenLayer(nn.Module):
    """Pre-norm transformer layer over the saliency tokens of one image, `(n, t, hidden_size)`."""

    def __init__(self, config: IASMConfig):
        super().__init__()
        size = config.hidden_size
        self.attention_norm = nn.LayerNorm(size)
        self.attention = SaliencyAttention(config, size, size, size, config.num_attention_heads)
        self.mlp_norm = nn.LayerNorm(size)
        self.mlp = nn.Sequential(nn.Linear(size, 2 * size), nn.GELU(), nn.Linear(2 * size, size))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed)
        return tokens + self.mlp(self.mlp_norm(tokens))


# ---------------------------------------------------------------------------------------------------------------------
# The image aesthetic saliency module
# ---------------------------------------------------------------------------------------------------------------------


class ASEPreTrainedModel(PreTrainedModel):
    """Initialisation and capabilities shared by the saliency module and the whole model."""

    config: ASEConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @classmethod
    def is_custom_code(cls) -> bool:
        # transformers skips `_init_weights` of parameterless modules of custom code, native sub-models included, and
        # the weights that such a module initialises for its children would stay empty. Ours only uses `init.*`, so the
        # precaution is not needed.
        return False

    def save_pretrained(self, save_directory: str | PathLike, *args, save_original_format: bool = False, **kwargs):
        # Some bases have other names in their files than in memory. The `Trainer` resumes by `load_state_dict()`, which
        # would skip those without an error, so the names in memory are saved; `from_pretrained` reads both.
        super().save_pretrained(save_directory, *args, save_original_format=save_original_format, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike | None,
        *args,
        output_loading_info: bool = False,
        **kwargs,
    ) -> "ASEPreTrainedModel | tuple[ASEPreTrainedModel, dict[str, Any]]":
        """
        As of every model.

        Raises:
            ValueError: if a file of weights cannot be read, or the checkpoint holds the base without the saliency branch,
                whose scores and maps would be random.
        """
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        except SafetensorError as error:
            files = _unreadable_weights(Path(pretrained_model_name_or_path, kwargs.get("subfolder", "")))
            raise ValueError(
                f"Weights of {pretrained_model_name_or_path} cannot be read: {error}. Cut short, or a pointer of Git LFS: "
                f"{files or 'one of its files'}."
            ) from error
        model, report = loaded
        names = {name for name, _ in model.named_parameters()}
        added = {name for name in names if re.match(r"(model\.)?(iasm|fusions)\.", name)}
        missing = names & set(report["missing_keys"])
        if added and added <= missing and missing != names:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds weights of the base model but none of the saliency branch. To give "
                "a base model a fresh one, load it with `ASEForConditionalGeneration.from_mllm_pretrained`."
            )
        return loaded if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SaliencyCrossAttention):
            init.zeros_(module.gate)
        elif isinstance(module, ImageAestheticSaliencyModule):
            init.normal_(module.queries, std=self.config.initializer_range)
            init.normal_(module.token_types, std=self.config.initializer_range)


def _unreadable_weights(folder: Path) -> list[str]:
    """Files of weights in a folder that are none."""
    unreadable = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            safe_open(path, framework="pt")
        except SafetensorError:
            unreadable.append(str(path))
    return unreadable


class SaliencyPyramid(nn.Module):
    """Merges a backbone's feature maps and the photometric maps at stride 8: `(n, size, h / 8, w / 8)`."""

    def __init__(self, channels: list[int], num_maps: int, size: int):
        super().__init__()
        self.laterals = nn.ModuleList([nn.Conv2d(width, size, 1) for width in channels])
        self.photometry = nn.Conv2d(num_maps, size, 3, padding=1)
        self.merge = nn.Conv2d(size, size, 3, padding=1, groups=size)
        self.output = nn.Conv2d(size, size, 1)

    def forward(self, feature_maps: tuple[torch.Tensor, ...], maps: torch.Tensor) -> torch.Tensor:
        grid = maps.shape[-2:]
        merged = self.photometry(maps)
        for lateral, features in zip(self.laterals, feature_maps):
            finer = features.shape[-1] > grid[-1]
            features = F.adaptive_avg_pool2d(features, grid) if finer else features
            features = lateral(features)
            if features.shape[-2:] != grid:
                features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
            merged = merged + features
        return self.output(F.gelu(self.merge(F.gelu(merged))))


class ImageAestheticSaliencyModule(ASEPreTrainedModel):
    """
    IASM: what is salient in a photograph, how it is lit and built, and how it would be rated.

    A multi-scale backbone and photometric maps give two pyramids at stride 8, one for the saliency map and one for the
    tokens, so that supervising the map does not bend the features that judge sharpness. What differs from the rest of
    the picture is measured, for the map alone. The evidence is: features pooled under the map, around it and everywhere;
    the map's place and extent with the photometry of what it covers and of the rest; the photometry of the whole. Learned
    queries read it and the picture, and they alone are the saliency tokens and what scores and aspects are read from: a
    cross-attention that does not yet choose between tokens would dilute what only one of them knows.
    """

    config: IASMConfig
    config_class = IASMConfig
    base_model_prefix = "iasm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False

    num_maps = 10
    num_contrasts = 80
    num_statistics = 115
    num_geometry = 24
    num_subject_statistics = 50
    num_evidence = 6

    def __init__(self, config: IASMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.backbone = _build_backbone(config.backbone_config)
        self.map_pyramid = SaliencyPyramid(self.backbone.channels, self.num_maps + self.num_contrasts, size)
        self.map_head = nn.Sequential(
            nn.Conv2d(size + 5, size // 4, 1),
            nn.GELU(),
            nn.Conv2d(size // 4, 1, 3, padding=1, bias=False),  # a bias would not change a softmax over positions
        )
        self.pyramid = SaliencyPyramid(self.backbone.channels, self.num_maps, size)
        self.geometry = nn.Sequential(
            nn.Linear(self.num_geometry + self.num_subject_statistics, size), nn.GELU(), nn.Linear(size, size)
        )
        self.photometry = nn.Sequential(
            nn.Linear(self.num_statistics, 2 * size), nn.GELU(), nn.Linear(2 * size, 2 * size)
        )
        self.queries = nn.Parameter(torch.empty(config.num_queries, size))
        self.places = nn.Conv2d(5, size, 1)
        self.query_norm = nn.LayerNorm(size)
        self.query_attention = SaliencyAttention(config, size, size, size, config.num_attention_heads)
        self.token_types = nn.Parameter(torch.empty(self.num_evidence + config.num_queries, size))
        self.layers = nn.ModuleList([SaliencyTokenLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(size)
        self.score_head = nn.Linear(config.num_queries * size, 10)
        self.aspect_head = nn.Linear(config.num_queries * size, config.num_aspects) if config.num_aspects else None
        self.post_init()

    def to_rgb(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Undoes the base's normalisation and resizes: `(n, 3, h, w)` in 0..1, sides multiples of 32."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"The IASM takes images (n, 3, height, width), got {tuple(pixel_values.shape)}.")
        mean = torch.tensor(self.config.image_mean, device=pixel_values.device).view(1, -1, 1, 1)
        std = torch.tensor(self.config.image_std, device=pixel_values.device).view(1, -1, 1, 1)
        pixels = pixel_values.float() * std + mean
        height, width = pixels.shape[-2:]
        scale = self.config.image_size / (height * width) ** 0.5
        target = tuple(max(32, 32 * round(side * scale / 32)) for side in (height, width))
        if target != (height, width):
            pixels = F.interpolate(pixels, size=target, mode="bilinear", align_corners=False, antialias=True)
        return pixels.clamp(0, 1)

    def predict_map(self, feature_maps: tuple[torch.Tensor, ...], maps: torch.Tensor) -> torch.Tensor:
        """Saliency as probabilities over positions, `(n, h / 8, w / 8)`, from float32 `photometric_maps`."""
        contrasts = torch.cat([maps, contrast_maps(maps)], dim=1)
        features = self.map_pyramid(feature_maps, contrasts.to(feature_maps[0].dtype))
        places = _places(features).expand(features.shape[0], -1, -1, -1)
        logits = self.map_head(torch.cat([features, places], dim=1))
        return logits.float().flatten(1).softmax(-1).unflatten(1, logits.shape[-2:])

    def gather_evidence(
        self, features: torch.Tensor, saliency_maps: torch.Tensor, maps: torch.Tensor, statistics: torch.Tensor
    ) -> torch.Tensor:
        """What the map and photometry say, `(n, 6, hidden_size)`: subject, ground, whole, geometry, photometry (two)."""
        dtype = features.dtype
        inside, around = _inside_and_around(saliency_maps)
        whole = torch.full_like(inside, 1 / inside.shape[1])
        pools = torch.stack([inside, around, whole], dim=1).to(dtype)
        subject = [_map_geometry(saliency_maps), subject_statistics(saliency_maps, maps.float())]
        return torch.cat(
            [
                pools @ features.flatten(2).transpose(1, 2),  # (n, 3, h * w) by (n, h * w, size)
                self.geometry(torch.cat(subject, dim=1).to(dtype)).unsqueeze(1),
                self.photometry(statistics.to(dtype)).unflatten(1, (2, -1)),
            ],
            dim=1,
        )

    def make_tokens(self, features: torch.Tensor, evidence: torch.Tensor) -> torch.Tensor:
        """Saliency tokens `(n, num_queries, hidden_size)`: queries that have read the picture and the evidence."""
        dtype = features.dtype
        coarse = F.avg_pool2d(features, 2)
        coarse = (coarse + self.places(_places(coarse))).flatten(2).transpose(1, 2)
        queries = self.queries.expand(features.shape[0], -1, -1).to(dtype)
        queries = queries + self.query_attention(queries, self.query_norm(coarse))
        tokens = torch.cat([evidence, queries], dim=1) + self.token_types.to(dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens[:, self.num_evidence :])

    def analyse(self, pixels: torch.Tensor) -> IASMOutput:
        """Tokens, map and scores of images of one size, as `to_rgb` gives them."""
        # light and colour are measured in float32 whatever the model's dtype and outside autocast
        with maybe_autocast(pixels.device.type, enabled=False):
            maps = photometric_maps(pixels)
            statistics = photometric_statistics(pixels, maps)
        dtype = self.token_types.dtype
        feature_maps = self.backbone(((pixels - 0.5) * 4).to(dtype)).feature_maps
        saliency_maps = self.predict_map(feature_maps, maps)
        features = self.pyramid(feature_maps, maps.to(dtype))
        tokens = self.make_tokens(features, self.gather_evidence(features, saliency_maps, maps, statistics))
        return IASMOutput(
            saliency_tokens=tokens,
            saliency_maps=saliency_maps,
            score_logits=self.score_head(tokens.flatten(1)),
            aspect_logits=self.aspect_head(tokens.flatten(1)) if self.aspect_head is not None else None,
        )

    def analyse_sizes(self, images: list[torch.Tensor]) -> IASMOutput:
        """Images `(3, h, w)` of different sizes: one batch for all that have one size once they are resized."""
        batches = {}
        for indices in _equal([image.shape for image in images]):
            pixels = self.to_rgb(torch.stack([images[i] for i in indices]))
            batches.setdefault(pixels.shape[-2:], []).append((indices, pixels))
        order = [i for batch in batches.values() for indices, _ in batch for i in indices]
        parts = [self.analyse(torch.cat([pixels for _, pixels in batch])) for batch in batches.values()]
        return _join_outputs(parts, order)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        rating_targets: torch.Tensor | None = None,
        saliency_targets: torch.Tensor | None = None,
        aspect_targets: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> IASMOutput:
        r"""
        Args:
            pixel_values: `(n, 3, h, w)`, or a list of `(3, h, w)` of any sizes; normalised by `config.image_mean` and
                `config.image_std`.
            rating_targets: `(n, 10)`, shares of the ratings 1 to 10; a row of zeros has no rating.
            saliency_targets: `(n, h, w)`, not negative, any scale; a map of zeros has no truth.
            aspect_targets: `(n, num_aspects)` in 0..1; a negative value is unknown.
        """
        if isinstance(pixel_values, list):
            outputs = self.analyse_sizes(pixel_values)
        else:
            outputs = self.analyse(self.to_rgb(pixel_values))
        _set_fields(outputs, saliency_losses(self.config, outputs, rating_targets, saliency_targets, aspect_targets))
        return outputs


def _equal(values: list[Any]) -> list[list[int]]:
    """The indices of equal values together, in order of first appearance."""
    groups = {}
    for i, value in enumerate(values):
        groups.setdefault(value, []).append(i)
    return list(groups.values())


def _join_outputs(parts: list[IASMOutput], order: list[int] | None = None) -> IASMOutput:
    """Puts the images of several outputs into one; `order` gives the number of each. Smaller maps are padded."""
    if len(parts) == 1 and order is None:
        return parts[0]
    device = parts[0].saliency_maps.device
    sizes = [part.saliency_maps.shape[-2:] for part in parts]
    height, width = (max(sides) for sides in zip(*sizes))
    padded = [
        F.pad(part.saliency_maps, (0, width - part.saliency_maps.shape[2], 0, height - part.saliency_maps.shape[1]))
        for part in parts
    ]
    joined = {
        "saliency_tokens": torch.cat([part.saliency_tokens for part in parts]),
        "saliency_maps": torch.cat(padded),
        "score_logits": torch.cat([part.score_logits for part in parts]),
    }
    if len(set(sizes)) > 1:
        rows = [size for part, size in zip(parts, sizes) for _ in range(len(part.saliency_maps))]
        joined["saliency_map_sizes"] = torch.tensor(rows, device=device)
    if parts[0].aspect_logits is not None:
        joined["aspect_logits"] = torch.cat([part.aspect_logits for part in parts])
    if order is not None:
        back = torch.tensor(order, device=device).argsort()
        joined = {name: values[back] for name, values in joined.items()}
    return IASMOutput(**joined)


def _build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    if MODEL_FOR_BACKBONE_MAPPING[type(config)].has_attentions:
        return AutoBackbone.from_config(config)
    # NOTE: convolutions refuse every attention but "eager", and `attn_implementation="sdpa"` for the whole model with it
    config._attn_implementation_internal = None
    backbone = AutoBackbone.from_config(config)
    backbone._supports_sdpa = backbone._supports_flash_attn = backbone._supports_flex_attn = True
    return backbone


def _positions(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates x and y of a map's positions, -1..1, each `(h, w)`."""
    height, width = features.shape[-2:]
    x = (torch.arange(width, device=features.device) + 0.5) / width * 2 - 1
    y = (torch.arange(height, device=features.device) + 0.5) / height * 2 - 1
    return x.expand(height, width), y.unsqueeze(1).expand(height, width)


def _places(features: torch.Tensor) -> torch.Tensor:
    """Coordinates and their products up to second order, `(1, 5, h, w)`: what a head needs to know the middle."""
    x, y = _positions(features)
    return torch.stack([x, y, x.square(), y.square(), x * y]).unsqueeze(0).to(features.dtype)


def _inside_and_around(saliency_maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The map as weights of the subject's positions and of all others, each `(n, h * w)` with sum 1."""
    inside = saliency_maps.flatten(1)
    around = 1 - inside / inside.amax(1, keepdim=True)
    return inside, around / around.sum(1, keepdim=True).clamp(min=1e-6)


def subject_statistics(saliency_maps: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """
    Photometry under the map and around it, `(n, h, w)` and `photometric_maps` to `(n, 50)`.

    In order: means of the subject, of the rest, their differences, spreads of the subject and of the rest. Whether the
    subject or what lies behind it is in focus is such a difference.
    """
    weights = torch.stack(_inside_and_around(saliency_maps), dim=1)
    cells = maps.flatten(2).transpose(1, 2)
    means = weights @ cells  # (n, 2, 10)
    spreads = (weights @ cells.square() - means.square()).clamp(min=1e-6).sqrt()
    return torch.cat([means.flatten(1), means[:, 0] - means[:, 1], spreads.flatten(1)], dim=1)


def _map_geometry(saliency_maps: torch.Tensor) -> torch.Tensor:
    """Where the map lies and how far it reaches, `(n, h, w)` to `(n, 24)`: eight columns, eight rows, eight moments."""
    x, y = _positions(saliency_maps)
    columns = F.adaptive_avg_pool2d(saliency_maps.sum(1, keepdim=True).unsqueeze(1), (1, 8)).flatten(1)
    rows = F.adaptive_avg_pool2d(saliency_maps.sum(2, keepdim=True).unsqueeze(1), (8, 1)).flatten(1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return (saliency_maps * values).sum((1, 2))

    mean_x, mean_y = mean(x), mean(y)
    positions = saliency_maps[0].numel()
    moments = [
        mean_x * 2,
        mean_y * 2,
        (mean(x.square()) - mean_x.square()).clamp(min=1e-6).sqrt(),
        (mean(y.square()) - mean_y.square()).clamp(min=1e-6).sqrt(),
        mean((saliency_maps * positions + 1e-4).log()) / 4,
        (saliency_maps.amax((1, 2)) * positions + 1e-4).log() / 4,
        mean(((x.abs() > 0.8) | (y.abs() > 0.8)).float()) * 2,
        mean(((x.abs() < 0.2) & (y.abs() < 0.5)).float()) * 2,
    ]
    sizes = columns * saliency_maps.shape[2], rows * saliency_maps.shape[1]
    return torch.cat([*sizes, torch.stack(moments, dim=1)], dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def saliency_losses(
    config: IASMConfig,
    outputs: ModelOutput,
    rating_targets: torch.Tensor | None = None,
    saliency_targets: torch.Tensor | None = None,
    aspect_targets: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The terms whose targets are given, means over the images that have truth, and their weighted sum `loss`.

    Shapes as in `ImageAestheticSaliencyModule.forward`. Without any target the dictionary is empty.
    """
    terms = {}
    if rating_targets is not None:
        terms["score_loss"] = rating_loss(outputs.score_logits, rating_targets)
    if saliency_targets is not None:
        sizes = outputs.get("saliency_map_sizes")
        terms["saliency_loss"] = saliency_map_loss(outputs.saliency_maps, saliency_targets, sizes)
    if aspect_targets is not None:
        if outputs.aspect_logits is None:
            raise ValueError(
                "`aspect_targets` are given, but the model has no aspect head: `iasm_config.num_aspects=0`."
            )
        terms["aspect_loss"] = aspect_loss(outputs.aspect_logits, aspect_targets)
    if terms:
        terms["loss"] = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
    return terms


def rating_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared earth mover's distance of two distributions over ratings, `(n, 10)`; rows of zeros are left out."""
    _check_targets("rating_targets", targets, logits)
    _check_range("rating_targets", targets, 0)
    targets = targets.float()
    given = targets.sum(1) > 0
    targets = targets / targets.sum(1, keepdim=True).clamp(min=1e-6)
    distances = (logits.float().softmax(-1).cumsum(-1) - targets.cumsum(-1)).square().mean(-1)
    return (distances * given).sum() / given.sum().clamp(min=1)


def saliency_map_loss(maps: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
    """
    KL divergence minus linear correlation of probability maps `(n, h, w)`; targets of zeros are left out.

    `sizes` `(n, 2)` are the heights and widths of maps padded to one size.
    """
    if len(targets) != len(maps):
        raise ValueError(f"`saliency_targets` has {len(targets)} maps for {len(maps)} images{TILES_HINT}.")
    _check_range("saliency_targets", targets, 0)
    given = targets.flatten(1).sum(1) > 0
    if sizes is None:
        losses = _map_losses(maps, targets)
    else:
        cut = [one[None, :height, :width] for one, (height, width) in zip(maps, sizes.tolist())]
        losses = torch.cat([_map_losses(one, target[None]) for one, target in zip(cut, targets)])
    return (losses * given).sum() / given.sum().clamp(min=1)


def _map_losses(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    targets = F.adaptive_avg_pool2d(targets.float().unsqueeze(1), maps.shape[-2:]).flatten(1)
    targets = targets / targets.sum(1, keepdim=True).clamp(min=1e-6)
    maps = maps.flatten(1)
    divergence = (targets * ((targets + 1e-8).log() - (maps + 1e-8).log())).sum(1)
    a, b = maps - maps.mean(1, keepdim=True), targets - targets.mean(1, keepdim=True)
    correlation = (a * b).sum(1) / (a.square().sum(1) * b.square().sum(1) + 1e-16).sqrt()
    return divergence - correlation


def aspect_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of independent aspects `(n, num_aspects)`; negative targets are unknown and left out."""
    _check_targets("aspect_targets", targets, logits)
    _check_range("aspect_targets", targets, -math.inf, 1)
    known = targets >= 0
    losses = F.binary_cross_entropy_with_logits(logits.float(), targets.float().clamp(0, 1), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def _check_targets(name: str, targets: torch.Tensor, logits: torch.Tensor):
    if len(targets) != len(logits):
        raise ValueError(f"`{name}` has {len(targets)} rows for {len(logits)} images{TILES_HINT}.")
    if targets.shape != logits.shape:
        raise ValueError(f"`{name}` has shape {tuple(targets.shape)}, the model predicts {tuple(logits.shape)}.")


def _check_range(name: str, values: torch.Tensor, low: float, high: float = math.inf):
    # NOTE: on the CPU alone, where looking is free; the collator has looked before its batches go anywhere else
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return
    least, most = values.amin().item(), values.amax().item()
    if not values.isfinite().all() or least < low or most > high:
        allowed = (
            f"from {low:g} to {high:g}"
            if math.isfinite(low + high)
            else f"from {low:g}"
            if low == 0
            else f"up to {high:g}"
        )
        raise ValueError(f"`{name}` takes finite numbers {allowed}, got {least:g} to {most:g}.")


# ---------------------------------------------------------------------------------------------------------------------
# IAS-ViT: the base's own encoder, fused by hooks. All that is known of base families stands in this section.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class EncoderImages:
    """
    What one call of an image encoder is about.

    Args:
        pixels: `(n, 3, h, w)`, or a list of `(3, h, w)` where sizes differ.
        lengths: Patches of each image where the encoder's layers see all images as one row; `None` where each image has
            a row of its own.
    """

    pixels: torch.Tensor | list[torch.Tensor]
    lengths: list[int] | None = None


# The forms in which encoders get their pixels. Each reader takes the encoder's arguments and gives the images.


def _read_images(encoder: nn.Module, pixel_values: torch.Tensor, **kwargs: Any) -> EncoderImages:
    """Dense images or tiles `(n, 3, h, w)`, a row each."""
    return EncoderImages(pixel_values)


def _read_masked_images(
    encoder: nn.Module, pixel_values: torch.Tensor, patch_attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> EncoderImages:
    """Images `(n, 3, h, w)` padded on the right and below; `patch_attention_mask` `(n, h / p, w / p)` is true inside."""
    if patch_attention_mask is None:
        return EncoderImages(pixel_values)
    patch = pixel_values.shape[-1] // patch_attention_mask.shape[-1]
    sides = torch.stack([patch_attention_mask.any(2).sum(1), patch_attention_mask.any(1).sum(1)], dim=1) * patch
    return EncoderImages(_crop(pixel_values, sides.tolist()))


def _read_sized_images(
    encoder: nn.Module, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs: Any
) -> EncoderImages:
    """Images `(n, 3, h, w)` padded to one size, of `image_sizes` `(n, 2)` in pixels; the layers see one row."""
    patch = _patch_size(encoder)
    whole = [pixel_values.shape[-2:]] * len(pixel_values)
    sizes = whole if image_sizes is None else torch.as_tensor(image_sizes).tolist()
    grids = [(height // patch, width // patch) for height, width in sizes]
    pixels = _crop(pixel_values, [(height * patch, width * patch) for height, width in grids])
    return EncoderImages(pixels, [height * width for height, width in grids])


def _read_packed_patches(
    encoder: nn.Module,
    pixel_values: torch.Tensor,
    grid_thw: torch.Tensor,
    merge_sizes: torch.Tensor | None = None,
    **kwargs: Any,
) -> EncoderImages:
    """
    Patches of all images in one row, `(p, 3 * frames * side * side)` or `(p, 3, side, side)`, and their grids
    `grid_thw` `(n, 3)`.

    Patches of one merge block stand together. Each frame of a video is an image; of the frames that one patch holds,
    the first is taken.
    """
    if pixel_values.ndim >= 4:
        patches = pixel_values.flatten(0, -4)
    else:
        side = _patch_size(encoder)
        patches = pixel_values.reshape(-1, 3, pixel_values.shape[-1] // (3 * side**2), side, side)[:, :, 0]
    # encoders keep here the block in which they count their positions, 1 where they merge without blocks
    blocks = [getattr(encoder, "spatial_merge_size", 1)] * len(grid_thw)
    blocks = blocks if merge_sizes is None else merge_sizes.tolist()
    grids = [(h, w, block) for (t, h, w), block in zip(grid_thw.tolist(), blocks) for _ in range(t)]
    return EncoderImages(_join_patches(patches, grids), [height * width for height, width, _ in grids])


def _read_patch_strip(
    encoder: nn.Module, pixel_values: torch.Tensor, target_sizes: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Patches of all images side by side in one picture `(1, 3, side, p * side)`, their grids `target_sizes` `(n, 2)`."""
    side = pixel_values.shape[2]
    patches = pixel_values[0].unflatten(2, (-1, side)).permute(2, 0, 1, 3)
    grids = [(height, width, 1) for height, width in target_sizes.tolist()]
    return EncoderImages(_join_patches(patches, grids), [height * width for height, width, _ in grids])


def _read_padded_patches(
    encoder: nn.Module, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Flat patches `(n, p, side * side * 3)`, colours last, padded behind; their grids `spatial_shapes` `(n, 2)`."""
    side = _patch_size(encoder)
    patches = pixel_values.unflatten(2, (side, side, 3)).permute(0, 1, 4, 2, 3)
    grids = [(height, width) for height, width in spatial_shapes.tolist()]
    kept = torch.cat([row[: height * width] for row, (height, width) in zip(patches, grids)])
    return EncoderImages(_join_patches(kept, [(height, width, 1) for height, width in grids]))


def _read_positioned_patches(
    encoder: nn.Module, pixel_values: torch.Tensor, pixel_position_ids: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Flat patches `(n, p, side * side * 3)`, colours last; their columns and rows `(n, p, 2)`, negative in padding."""
    side = _patch_size(encoder)
    patches = pixel_values.unflatten(2, (side, side, 3)).permute(0, 1, 4, 2, 3)
    columns, rows = pixel_position_ids.unbind(-1)
    sizes = (pixel_position_ids.amax(1) + 1).tolist()
    places = rows * (columns.amax(1, keepdim=True) + 1) + columns
    places = places.masked_fill(columns < 0, pixel_values.shape[1]).argsort(1)
    kept = [row[order[: width * height]] for row, order, (width, height) in zip(patches, places, sizes)]
    return EncoderImages(_join_patches(torch.cat(kept), [(height, width, 1) for width, height in sizes]))


def _read_tiled_images(
    encoder: nn.Module, pixel_values: torch.Tensor, aspect_ratio_ids: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Tiles `(batch, images, tiles, 3, h, w)`; `aspect_ratio_ids` `(batch, images)` say how they were cut, 0 no image."""
    layouts = [[1, 1], *encoder.config.supported_aspect_ratios]  # rows and columns
    layouts = [layouts[i] for i in aspect_ratio_ids.flatten().tolist()]
    # tiles are to images what patches are to tiles
    tiles = torch.cat([tiles[: rows * columns] for tiles, (rows, columns) in zip(pixel_values.flatten(0, 1), layouts)])
    return EncoderImages(_join_patches(tiles, [(rows, columns, 1) for rows, columns in layouts]))


def _patch_size(encoder: nn.Module) -> int:
    """Side of the square patches in pixels; some configs say it for both directions."""
    size = encoder.config.patch_size
    return size if isinstance(size, int) else size[0]


def _crop(pixel_values: torch.Tensor, sizes: list[tuple[int, int]]) -> torch.Tensor | list[torch.Tensor]:
    if all(tuple(size) == tuple(pixel_values.shape[-2:]) for size in sizes):
        return pixel_values
    return [image[:, :height, :width] for image, (height, width) in zip(pixel_values, sizes)]


def _join_patches(patches: torch.Tensor, grids: list[tuple[int, int, int]]) -> torch.Tensor | list[torch.Tensor]:
    """
    Puts patches `(p, 3, h, w)` of all images back together.

    `grids` gives each image's rows and columns of patches, and the edge of the blocks in which they are ordered: 1 is
    row by row.
    """
    lengths = [rows * columns for rows, columns, _ in grids]
    if sum(lengths) != len(patches):
        raise ValueError(f"The encoder got {len(patches)} patches for grids of {sum(lengths)}: {grids}.")
    if len(set(grids)) == 1:
        return _join_equal(patches.unflatten(0, (len(grids), -1)), *grids[0])
    return [_join_equal(part[None], *grid)[0] for part, grid in zip(patches.split(lengths), grids)]


def _join_equal(patches: torch.Tensor, rows: int, columns: int, block: int) -> torch.Tensor:
    """`(n, rows * columns, 3, h, w)` to `(n, 3, rows * h, columns * w)`."""
    blocks = patches.unflatten(1, (rows // block, columns // block, block, block))
    ordered = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7)
    return ordered.reshape(len(patches), 3, rows * patches.shape[-2], columns * patches.shape[-1])


# What an encoder takes beside its pixels tells their form.
_READERS = {
    "grid_thw": _read_packed_patches,
    "target_sizes": _read_patch_strip,
    "spatial_shapes": _read_padded_patches,
    "pixel_position_ids": _read_positioned_patches,
    "aspect_ratio_ids": _read_tiled_images,
    "image_sizes": _read_sized_images,
    "patch_attention_mask": _read_masked_images,
}
_KNOWN_ARGUMENTS = {*_READERS, "merge_sizes", "pixel_attention_mask", "aspect_ratio_mask"}


@dataclass
class ImageEncoder:
    """
    A base's image encoder.

    Args:
        module: The module that gets the pixels.
        arguments: Names of its arguments, the pixels first.
        reader: Gives the images of a call, see `EncoderImages`.
        layers: Its layers, and `hidden_sizes` their widths.
        last_layer: Index of the last layer whose output reaches the language model.
    """

    module: nn.Module
    arguments: list[str]
    reader: Callable[..., EncoderImages]
    layers: list[nn.Module]
    hidden_sizes: list[int]
    last_layer: int


def find_image_encoder(mllm: PreTrainedModel) -> ImageEncoder:
    """
    Finds in the base `mllm` the encoder that turns pixels of a known form into patches.

    Raises:
        ValueError: naming what was looked for and what was found.
    """
    encoder = mllm.get_encoder(modality="image")
    if (
        encoder is not mllm and _argument_names(encoder)[0] == "input_ids"
    ):  # it reads texts and holds the one of images
        encoder = encoder.get_encoder(modality="image")
    if encoder is mllm or encoder is mllm.base_model:
        raise ValueError(
            f"{type(mllm).__name__} has no image encoder that `get_encoder('image')` finds; its parts are "
            f"{[name for name, _ in mllm.base_model.named_children()]}."
        )
    found = f"{type(mllm).__name__}'s image encoder {type(encoder).__name__}"
    parameters = inspect.signature(encoder.forward).parameters
    arguments = _argument_names(encoder)
    required = [name for name in arguments[1:] if parameters[name].default is inspect.Parameter.empty]
    if unknown := sorted(set(required) - _KNOWN_ARGUMENTS):
        raise ValueError(f"{found} needs {unknown} beside its pixels; known are {sorted(_KNOWN_ARGUMENTS)}.")
    reader = next((reader for name, reader in _READERS.items() if name in arguments), _read_images)
    _check_patch_embedding(encoder, reader, found)
    layers = _encoder_layers(encoder, found)
    return ImageEncoder(
        module=encoder,
        arguments=arguments,
        reader=reader,
        layers=layers,
        hidden_sizes=[_hidden_size(layer, found) for layer in layers],
        last_layer=_last_visible_layer(mllm.config, len(layers)),
    )


def _argument_names(module: nn.Module) -> list[str]:
    return [name for name in inspect.signature(module.forward).parameters if name != "kwargs"]


def _check_patch_embedding(encoder: nn.Module, reader: Callable, found: str):
    """Only a convolution (or unfolding) over colours says in which order the numbers of a patch stand."""
    if reader in (_read_padded_patches, _read_positioned_patches):
        return  # these forms are defined with colours last
    embeddings = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.Unfold) or (isinstance(module, (nn.Conv2d, nn.Conv3d)) and module.in_channels == 3)
    ]
    if not embeddings:
        raise ValueError(
            f"{found} has no convolution over three colours, so the order of its pixels is not known; its parts are "
            f"{[f'{name}: {type(module).__name__}' for name, module in encoder.named_children()]}."
        )


def _encoder_layers(encoder: nn.Module, found: str) -> list[nn.Module]:
    """The longest list of equal modules; a list of stages that are lists counts as one."""
    lists = [_flatten(module) for module in encoder.modules() if isinstance(module, nn.ModuleList)]
    stacks = [layers for layers in lists if len({type(layer) for layer in layers}) == 1]
    if not stacks:
        raise ValueError(f"{found} has no list of equal layers; looked for an `nn.ModuleList`.")
    # of two equally long ones (what embeds each stage, and the stages), the layers are the heavier
    return max(
        stacks, key=lambda layers: (len(layers), sum(_shape(p).numel() for m in layers for p in m.parameters()))
    )


def _flatten(modules: nn.ModuleList) -> list[nn.Module]:
    return [one for m in modules for one in (_flatten(m) if isinstance(m, nn.ModuleList) else [m])]


def _hidden_size(layer: nn.Module, found: str) -> int:
    """Width of a layer's states, read from the layer: names of widths in configs mean different things."""
    # its own norms first: those of the attention may be of one head
    for module in (*layer.children(), *layer.modules()):
        weight = getattr(module, "weight", None)
        if "Norm" in type(module).__name__ and weight is not None and len(_shape(weight)) == 1:
            return _shape(weight)[0]
    raise ValueError(f"{found} has layers {type(layer).__name__} without a norm to read their width from.")


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole parameter: under DeepSpeed's ZeRO-3 what is left in its place is empty from the start."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _last_visible_layer(config: PreTrainedConfig, num_layers: int) -> int:
    """Index of the last encoder layer whose output reaches the language model; later ones get no gradient."""
    selected = getattr(config, "vision_feature_layer", None)
    if selected is None:
        return num_layers - 1
    selected = [selected] if isinstance(selected, int) else selected
    # hidden state 0 is the embeddings, so hidden state k is the output of layer k - 1
    return max(state if state >= 0 else num_layers + 1 + state for state in selected) - 1


def _resolve_fusion_layers(fusion_layers: list[int] | None, encoder: ImageEncoder) -> list[int]:
    count = encoder.last_layer + 1
    if fusion_layers is None:
        return sorted({round((i + 1) * count / 4) - 1 for i in range(4)} - {-1})
    if max(fusion_layers) > encoder.last_layer:
        raise ValueError(
            f"`fusion_layers` {fusion_layers} reaches beyond layer {encoder.last_layer}: the encoder has "
            f"{len(encoder.layers)} layers and the language model sees none after that one."
        )
    return fusion_layers


class _EncoderCall:
    """What one call of the image encoder passes from its pixels to its fusing layers."""

    def __init__(self, encoder: nn.Module, outputs: IASMOutput, lengths: list[int] | None):
        self.encoder = encoder
        self.outputs = outputs
        self.lengths = lengths
        self.outer = getattr(_running, "encoder_call", None)

    def to_rows(self, hidden_states: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """A layer's states to a row an image, `(n, p, hidden_size)`; rows of unequal images are padded."""
        if self.lengths is None:
            self._check_images(hidden_states, hidden_size)
            if hidden_states.ndim == 3:
                return hidden_states
            if hidden_states.shape[-1] == hidden_size:  # (n, h, w, hidden_size)
                return hidden_states.flatten(1, 2)
            return hidden_states.flatten(2).transpose(1, 2)  # (n, hidden_size, h, w)
        flat = hidden_states.flatten(0, -2)
        lengths = self._lengths_of(len(flat))
        if len(set(lengths)) == 1:
            return flat.unflatten(0, (len(lengths), -1))
        return nn.utils.rnn.pad_sequence(flat.split(lengths), batch_first=True)

    def from_rows(self, rows: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undoes `to_rows`, to the shape of `hidden_states`."""
        if self.lengths is None:
            if rows.ndim == hidden_states.ndim:
                return rows
            if hidden_states.shape[-1] == rows.shape[-1]:
                return rows.view_as(hidden_states)
            return rows.transpose(1, 2).reshape(hidden_states.shape)
        lengths = self._lengths_of(hidden_states.shape[:-1].numel())
        if len(set(lengths)) > 1:
            rows = torch.cat([row[:length] for row, length in zip(rows, lengths)])
        return rows.reshape(hidden_states.shape)

    def _check_images(self, hidden_states: torch.Tensor, hidden_size: int):
        images = len(self.outputs.saliency_tokens)
        shape = tuple(hidden_states.shape)
        if len(shape) not in (3, 4) or shape[0] != images or hidden_size not in (shape[1], shape[-1]):
            raise ValueError(
                f"A layer of the image encoder gives states of shape {shape} for {images} images; expected a row for "
                f"each, of width {hidden_size}."
            )
        if len(shape) == 4 and shape[1] == shape[-1]:
            raise ValueError(
                f"A layer of the image encoder gives states of shape {shape}: width and height cannot be told from the "
                f"{hidden_size} channels. Images of another size can be."
            )

    def _lengths_of(self, positions: int) -> list[int]:
        """Each image's part of `positions`: encoders may merge patches between their layers."""
        merged, rest = divmod(sum(self.lengths), positions)
        if rest or any(length % merged for length in self.lengths):
            raise ValueError(
                f"A layer of the image encoder has {positions} states for images of {self.lengths} patches."
            )
        return [length // merged for length in self.lengths]


# What runs in this thread, so that two threads never see each other's images: the `encoder_call`, and the
# `collectors` of whoever wants to know what the IASM says. NOTE: `torch.compile` traces this and no `ContextVar`,
# and of a subclass with defaults it would read the defaults.
_running = threading.local()


class ASEModel(ASEPreTrainedModel):
    """
    A vision-language model whose image encoder is an IAS-ViT, without the language model's head.

    `mllm` is the whole base model. Hooks on its encoder run the IASM on the encoder's own pixels and fuse the saliency
    tokens after `config.fusion_layers`; nothing of the base is renamed, wrapped or copied.
    """

    # what computes on one device; a device map may only cut between these
    _no_split_modules = ["ImageAestheticSaliencyModule", "SaliencyCrossAttention"]
    # Quantisers leave these out too, so that a quantised base can be trained with them. The patterns hold with and
    # without the generating class around.
    _keep_in_fp32_modules = [r"(?:model\.)?iasm", r"(?:model\.)?fusions"]

    def __init__(self, config: ASEConfig, mllm: PreTrainedModel | None = None):
        super().__init__(config)
        if mllm is None:
            if "tie_word_embeddings" in vars(config.mllm_config):  # whoever unties or ties sets it on the outer config
                config.mllm_config.tie_word_embeddings = config.tie_word_embeddings
            mllm = AutoModelForImageTextToText.from_config(config.mllm_config)
        # attention is switched on the config object that the modules hold, so it must be the same one
        config.mllm_config = mllm.config
        self.mllm = mllm
        self.input_modalities = mllm.input_modalities
        self.forward = _signed_as(self.forward, mllm.base_model.forward)
        for name in ("get_rope_index", "get_video_features"):  # servers that hold the body alone look for these
            if hasattr(mllm.base_model, name):
                setattr(self, name, getattr(mllm.base_model, name))
        encoder = find_image_encoder(mllm)
        config.fusion_layers = _resolve_fusion_layers(config.fusion_layers, encoder)
        self.iasm = ImageAestheticSaliencyModule(config.iasm_config)
        self.fusions = SaliencyFusions(config, {layer: encoder.hidden_sizes[layer] for layer in config.fusion_layers})
        self._hook_encoder(encoder)
        self.post_init()

    def _hook_encoder(self, encoder: ImageEncoder):
        hooks = [getattr(hook, "func", None) for hook in encoder.module._forward_pre_hooks.values()]
        if any(getattr(hook, "__name__", None) == self._start_encoder_call.__name__ for hook in hooks):
            raise ValueError(
                f"This {type(self.mllm).__name__} has the saliency branch already: use the ASE model that holds it, or "
                "load the base again."
            )
        # NOTE: partials of bound methods, because deepcopy follows those to the copied model and closures to the old
        start = partial(self._start_encoder_call, encoder.arguments, encoder.reader)
        encoder.module.register_forward_pre_hook(start, with_kwargs=True)
        encoder.module.register_forward_hook(self._end_encoder_call, always_call=True)
        for layer in self.config.fusion_layers:
            # before the hooks that record hidden states: LLaVA reads its features from the recorded ones
            encoder.layers[layer].register_forward_hook(partial(self._fuse, layer), prepend=True)

    def _start_encoder_call(
        self,
        arguments: list[str],
        reader: Callable[..., EncoderImages],
        encoder: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
    ):
        given = {**dict(zip(arguments, args)), **kwargs}
        images = reader(encoder, given.pop(arguments[0]), **given)
        call = _EncoderCall(encoder, self.iasm(images.pixels), images.lengths)
        _running.encoder_call = call
        for model, collected in getattr(_running, "collectors", ()):
            if model is self:  # and not the assistant that writes a draft meanwhile
                collected.append(call.outputs)

    def _end_encoder_call(self, encoder: nn.Module, args: tuple, output: Any):
        call = getattr(_running, "encoder_call", None)
        # after an error before `_start_encoder_call` there is no call of this encoder to end
        if call is not None and call.encoder is encoder:
            _running.encoder_call = call.outer

    def _fuse(self, layer: int, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        call = getattr(_running, "encoder_call", None)
        if call is None:
            raise RuntimeError(
                f"Encoder layer {layer} ran outside a call of its image encoder, so there are no saliency tokens."
            )
        hidden_states = output[0] if isinstance(output, tuple) else output
        rows = call.to_rows(hidden_states, self.fusions.hidden_size(layer))
        fused = self.fusions(layer, rows, call.outputs.saliency_tokens)
        fused = call.from_rows(fused, hidden_states)
        return (fused, *output[1:]) if isinstance(output, tuple) else fused

    @property
    def language_model(self) -> nn.Module:
        return self.mllm.get_decoder()

    @property
    def vision_tower(self) -> nn.Module:
        return self.mllm.get_encoder(modality="image")

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        encoder = self.mllm.get_encoder(modality=modality)
        return self if encoder is self.mllm else encoder  # a model stands for the encoder that it has not

    def set_encoder(self, encoder: nn.Module, modality: str | None = None):
        self.mllm.set_encoder(encoder, modality=modality)
        if modality == "image":
            self._hook_encoder(find_image_encoder(self.mllm))

    def get_decoder(self) -> nn.Module:
        return self.mllm.get_decoder()

    def set_decoder(self, decoder: nn.Module):
        self.mllm.set_decoder(decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.mllm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.mllm.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = self.mllm.resize_token_embeddings(*args, **kwargs)  # new rows get the base's own initialisation
        self.vocab_size = self.mllm.vocab_size
        return embeddings

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images once: the base's output, with `saliency_maps`, `score_logits` and `aspect_logits` beside.

        `kwargs` are the arguments of the base's own method (grids, sizes, masks). Pass the output on as
        `generate(..., mm_encoder_outputs={"image": features})`.
        """
        features, saliency = self._call_with_saliency(
            self.mllm.base_model.get_image_features, pixel_values=pixel_values, **{**kwargs, "return_dict": True}
        )
        return _add_fields(features, saliency)

    def _call_with_saliency(
        self, function: Callable, *args: Any, **kwargs: Any
    ) -> tuple[ModelOutput, dict[str, torch.Tensor]]:
        """Calls the base and returns its output with what the IASM said meanwhile, or before if features are given."""
        collected = []
        outer, call = getattr(_running, "collectors", ()), getattr(_running, "encoder_call", None)
        _running.collectors = (*outer, (self, collected))
        try:
            outputs = function(*args, **kwargs)
        finally:
            # torch ends an encoder's call on errors, but not on an interrupt (a `BaseException`)
            _running.collectors, _running.encoder_call = outer, call
        if collected:
            return outputs, _saliency_outputs(_join_outputs(collected))
        return outputs, _saliency_outputs((kwargs.get("mm_encoder_outputs") or {}).get("image"))

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """Arguments and outputs are the base's own, and `SALIENCY_OUTPUTS` beside; what is `None` is not passed on."""
        # a base would swallow them, and whoever computes the loss outside would never know
        if targets := sorted(_given(**{name: kwargs.get(name) for name in TARGETS})):
            raise ValueError(f"{targets} need `ASEForConditionalGeneration.forward`: the body computes no loss.")
        given = _given(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        given |= {**kwargs, "return_dict": True}
        outputs, saliency = self._call_with_saliency(self.mllm.base_model, **given)
        return _add_fields(outputs, saliency)


def _given(**kwargs: Any) -> dict[str, Any]:
    """Without the `None`s: some bases treat an explicit `None` otherwise than a missing argument."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _saliency_outputs(outputs: ModelOutput | None) -> dict[str, torch.Tensor | None]:
    return {name: None if outputs is None else outputs.get(name) for name in SALIENCY_OUTPUTS}


def _signed_as(method: MethodType, base: Callable) -> MethodType:
    """
    The method with the signature of the base's: clients keep only the inputs that they find there (grids, sizes, masks).

    It takes arguments by position in the base's order, and a cache under either of its names.
    """
    function = method.__func__
    own, theirs = inspect.signature(function).parameters, inspect.signature(base).parameters
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    shared = [parameter for parameter in theirs.values() if parameter.kind not in kinds]
    names = [parameter.name for parameter in shared]
    name, other = next((pair for pair in (CACHE_NAMES, CACHE_NAMES[::-1]) if pair[0] in names), CACHE_NAMES)
    self, *mine = [parameter for name, parameter in own.items() if name not in names and parameter.kind not in kinds]
    mine = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in mine]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)

    # NOTE: without `__wrapped__`, by which accelerate would take the function for one of its own wrappings
    @wraps(function, updated=())
    def signed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # NOTE: a new dict, because torch.compile does not trace signatures once a caller's dict was changed
        given = {**kwargs, **dict(zip(names, args))}
        if name in names and other in given:
            cache = given.pop(other)
            if name not in given and name == "cache" and not torch.compiler.is_compiling():
                warnings.warn(f"`{other}` is deprecated: transformers calls it `{name}`.", FutureWarning, stacklevel=2)
            # NOTE: PEFT 0.21 puts its prefix beside the still empty cache, each under one of the names
            if given.get(name) is None or not given[name].get_seq_length():
                given[name] = cache
        return function(self, **given)

    del signed.__wrapped__
    signed.__signature__ = inspect.Signature([self, *shared, *mine, rest])
    return MethodType(signed, method.__self__)


def _add_fields(outputs: ModelOutput, fields: dict[str, torch.Tensor | None]) -> ModelOutput:
    """A base's output with what the IASM said, and the terms of the loss, beside its own fields."""
    return _output_class(type(outputs), tuple(fields))(**outputs, **fields)


@torch.compiler.assume_constant_result  # a compiled forward takes the class as it is, and does not trace its making
def _output_class(base: type[ModelOutput], added: tuple[str, ...]) -> type[ModelOutput]:
    return _make_output_class(base, added)


@cache
def _make_output_class(base: type[ModelOutput], added: tuple[str, ...]) -> type[ModelOutput]:
    """A base's output class with fields of ours: what takes outputs apart (pytrees) makes them again from fields alone."""

    def reduce(self: ModelOutput) -> tuple:  # pickle finds no class that was made here
        values = dict(self)
        fields = {name: values.pop(name, None) for name in added}
        return _add_fields, (base(**values), fields)

    namespace = {"__reduce__": reduce}
    if "past_key_values" in base.__dataclass_fields__:  # the name that lasts, where transformers has not got it yet
        namespace["cache"] = property(lambda self: self.past_key_values)
    if "image_hidden_states" in base.__dataclass_fields__:
        namespace["image_outputs"] = property(_image_outputs)
    fields = [(name, torch.Tensor | None, None) for name in added]
    return make_dataclass(f"ASE{base.__name__}", fields, bases=(base,), namespace=namespace)


def _image_outputs(outputs: ModelOutput) -> BaseModelOutputWithPooling | None:
    features = outputs.image_hidden_states
    return None if features is None else BaseModelOutputWithPooling(pooler_output=features)


def _set_fields(outputs: ModelOutput, fields: dict[str, torch.Tensor]):
    for name, value in fields.items():
        outputs[name] = value


class ASEForConditionalGeneration(ASEPreTrainedModel, GenerationMixin):
    """Writes aesthetic critiques: the base vision-language model with the saliency branch in its image encoder."""

    def __init__(self, config: ASEConfig, mllm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = ASEModel(config, mllm)
        self.input_modalities = self.model.input_modalities
        mllm = self.model.mllm
        self.forward = _signed_as(self.forward, mllm.forward)
        self.prepare_inputs_for_generation = _signed_as(
            self.prepare_inputs_for_generation, mllm.prepare_inputs_for_generation
        )
        self._is_stateful = mllm._is_stateful  # such caches cannot be cut back, as assisted decoding does
        self.post_init()

    @classmethod
    def from_mllm_pretrained(
        cls,
        pretrained_model_name_or_path_or_model: str | PreTrainedModel,
        iasm_config: dict | IASMConfig | None = None,
        fusion_layers: list[int] | None = None,
        fusion_hidden_size: int | None = None,
        fusion_num_attention_heads: int | None = None,
        **kwargs: Any,
    ) -> "ASEForConditionalGeneration":
        """
        Gives a saved or live image-text-to-text model the saliency branch. Fresh gates are shut: it answers as before.

        Args:
            pretrained_model_name_or_path_or_model: A folder, a Hub id, or the model itself, which becomes a part of
                the new one and keeps its weights, dtype, device and attention.
            iasm_config, fusion_layers, fusion_hidden_size, fusion_num_attention_heads: See `ASEConfig`. The image
                normalisation is read from the folder's image processor unless `iasm_config` names it.
            kwargs: Passed to `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            ValueError: if the base has no image encoder of a known form.
        """
        mllm = pretrained_model_name_or_path_or_model
        iasm_config = iasm_config if iasm_config is not None else {}
        if not isinstance(mllm, PreTrainedModel):
            if isinstance(iasm_config, dict):
                iasm_config = {**_image_normalisation(mllm, **kwargs), **iasm_config}
            mllm = AutoModelForImageTextToText.from_pretrained(mllm, **kwargs)
        elif kwargs:
            raise ValueError(f"A live model takes no loading arguments, got {sorted(kwargs)}.")
        given = _given(
            fusion_layers=fusion_layers,
            fusion_hidden_size=fusion_hidden_size,
            fusion_num_attention_heads=fusion_num_attention_heads,
        )
        config = ASEConfig.from_mllm_config(mllm.config, iasm_config=iasm_config, **given)
        # the base's weights and attention are its own: `post_init` must not touch the one, nor the defaults the other
        for module in mllm.modules():
            module._is_hf_initialized = True
        attention = mllm.config._attn_implementation
        config._attn_implementation_internal = attention
        config.iasm_config._attn_implementation_internal = attention
        config.dtype = mllm.dtype
        model = cls(config, mllm)
        device = model._inherit_devices(mllm)
        model.model.iasm.to(dtype=mllm.dtype, device=device)
        model.model.fusions.to(dtype=mllm.dtype, device=device)
        model._inherit_quantisation(mllm)
        model.generation_config = mllm.generation_config
        return model.train(mllm.training)

    def _inherit_devices(self, mllm: PreTrainedModel) -> torch.device | int | str:
        """Extends the device map of a base that has one; returns where the added modules belong."""
        device_map = vars(mllm).get("hf_device_map")
        if device_map is None:
            return mllm.device
        # accelerate computes what is offloaded on the first device that is not an offload
        device = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
        inherited = {f"model.mllm.{name}" if name else "model.mllm": place for name, place in device_map.items()}
        self.hf_device_map = {**inherited, "model.iasm": device, "model.fusions": device}
        return device

    def _inherit_quantisation(self, mllm: PreTrainedModel):
        """Loading marks the model that it quantised; saving, `Trainer` and PEFT look for the marks on the outer one."""
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if name in vars(mllm):
                setattr(self, name, vars(mllm)[name])
        if "quantization_config" not in vars(mllm.config):
            return
        settings = copy(vars(mllm.config).pop("quantization_config"))
        # the names of what stays as it is count from the base; its own patterns may also be ends of names
        skipped = vars(mllm.hf_quantizer).get("modules_to_not_convert", [])
        field = "llm_int8_skip_modules" if "llm_int8_skip_modules" in vars(settings) else "modules_to_not_convert"
        setattr(settings, field, [*skipped, *(f"model.mllm.{name}" for name in skipped)])
        self.config.quantization_config = settings

    @property
    def lm_head(self) -> nn.Module:
        return self.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.model.mllm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.model.mllm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = self.model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.model.vocab_size
        return embeddings

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        encoder = self.model.get_encoder(modality=modality)
        return self if encoder is self.model else encoder

    def set_encoder(self, encoder: nn.Module, modality: str | None = None):
        self.model.set_encoder(encoder, modality=modality)

    def get_decoder(self) -> nn.Module:
        return self.model.get_decoder()

    def set_decoder(self, decoder: nn.Module):
        self.model.set_decoder(decoder)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `ASEModel.get_image_features`."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        rating_targets: torch.Tensor | None = None,
        saliency_targets: torch.Tensor | None = None,
        aspect_targets: torch.Tensor | None = None,
        caption_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        r"""
        Arguments are the base's own (those left `None` are not passed on) and the targets of the saliency terms.

        Returns the base's own output with `saliency_maps`, `saliency_map_sizes`, `score_logits` and `aspect_logits` beside
        (see `IASMOutput`; `None` without an image), and the unweighted terms of `loss`: `caption_loss`, `score_loss`,
        `saliency_loss`, `aspect_loss`.

        Args:
            labels: `(batch, sequence)`, token ids, -100 where nothing is learned.
            rating_targets, saliency_targets, aspect_targets: One row an image; see `ImageAestheticSaliencyModule`.
            caption_weights: `(batch,)`, how much each sample's caption counts (its aesthetic relevance), 1 by default.
            num_items_in_batch: Target tokens in all micro-batches of a training step, as the `Trainer` counts them.
        """
        given = _given(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            labels=labels if caption_weights is None else None,
            num_items_in_batch=num_items_in_batch if labels is not None else None,
            logits_to_keep=logits_to_keep,
        )
        if unknown := [name for name in kwargs if name.endswith(("_target", "_targets")) or name == "caption_weight"]:
            raise TypeError(f"{sorted(unknown)} are no targets of this model, which takes {sorted(TARGETS)}.")
        given |= {**kwargs, "return_dict": True}
        outputs, saliency = self.model._call_with_saliency(self.model.mllm, **given)
        result = _add_fields(outputs, {**saliency, **dict.fromkeys(LOSS_TERMS)})
        if labels is not None:
            if caption_weights is not None:
                shift_labels = kwargs.get("shift_labels")
                result.loss = weighted_caption_loss(
                    outputs.logits, labels, caption_weights, num_items_in_batch, shift_labels
                )
            result.caption_loss = result.loss
        self._add_saliency_losses(result, rating_targets, saliency_targets, aspect_targets, labels, num_items_in_batch)
        return result

    def _add_saliency_losses(
        self,
        result: ModelOutput,
        rating_targets: torch.Tensor | None,
        saliency_targets: torch.Tensor | None,
        aspect_targets: torch.Tensor | None,
        labels: torch.LongTensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ):
        """Adds the terms to `result`. A micro-batch counts by its share of the step's target tokens, as captions do."""
        targets = _given(
            rating_targets=rating_targets, saliency_targets=saliency_targets, aspect_targets=aspect_targets
        )
        if not targets:
            return
        if result.saliency_maps is None:
            raise ValueError(f"{sorted(targets)} are given, but no image was: there is nothing to compare them with.")
        terms = saliency_losses(self.config.iasm_config, result, **targets)
        added = terms.pop("loss")
        if num_items_in_batch is not None and labels is not None:
            added = added * (labels[:, 1:] != -100).sum() / num_items_in_batch
        _set_fields(result, terms)
        result.loss = added if result.loss is None else result.loss + added

    # Generation is the base's: its own hooks prepare positions, masks and caches. ------------------------------------

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """
        See `GenerationMixin.generate`. A base with another way to generate does it by itself.

        With `return_dict_in_generate=True` the output has `saliency_maps`, `saliency_map_sizes`, `score_logits` and
        `aspect_logits` too, one row an image whatever the number of beams or returned sequences.
        """
        if (features := kwargs.get("mm_encoder_outputs")) is not None:
            # transformers repeats the features for beams in the very object that it is given
            kwargs["mm_encoder_outputs"] = {name: copy(value) for name, value in features.items()}
        mllm = self.model.mllm
        # a method of its own (BLIP-2 and its kin), or an encoder for the text too (Florence-2)
        if type(mllm).generate is not GenerationMixin.generate or mllm.config.is_encoder_decoder:
            mllm.generation_config = self.generation_config
            generate, kwargs = mllm.generate, {**kwargs, **_given(inputs=inputs, generation_config=generation_config)}
        else:
            generate, kwargs = super().generate, {**kwargs, "inputs": inputs, "generation_config": generation_config}
        outputs, saliency = self.model._call_with_saliency(generate, **kwargs)
        if not isinstance(outputs, ModelOutput):
            return outputs
        if generate != mllm.generate and not self._supports_mm_encoder_outputs():
            # the base (Mllama) encodes the photographs once for each beam: one row of each is kept
            settings = {**(generation_config or self.generation_config).to_dict(), **kwargs}
            times = max(settings[name] or 1 for name in ("num_beams", "num_return_sequences"))
            prompts = _given(**{name: kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")})
            rows = (len(next(iter(prompts.values()))), times, -1)
            saliency = {
                name: None if values is None else values.unflatten(0, rows)[:, 0].flatten(0, 1)
                for name, values in saliency.items()
            }
        return _add_fields(outputs, saliency)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        # the base knows the names of its encoder's arguments; what it returns are the `model_kwargs` of generation
        prepared, saliency = self.model._call_with_saliency(
            self.model.mllm._maybe_prepare_encoder_kwargs_for_generation, *args, **kwargs
        )
        features = (prepared.get("mm_encoder_outputs") or {}).get("image")  # not there for videos alone
        if features is not None and "saliency_maps" not in features:
            prepared["mm_encoder_outputs"]["image"] = _add_fields(features, saliency)
        return prepared

    def _prepare_model_inputs(self, *args, **kwargs) -> tuple[torch.Tensor, str | None, dict[str, torch.Tensor]]:
        # whether it starts from `inputs_embeds` is read from the signature of its own `prepare_inputs_for_generation`
        return self.model.mllm._prepare_model_inputs(*args, **kwargs)

    def prepare_inputs_for_generation(self, **kwargs) -> dict[str, Any]:
        # evaluation hands a whole training batch over; as transformers drops `labels` here, so go the other targets
        kwargs = {name: value for name, value in kwargs.items() if name not in TARGETS}
        return self.model.mllm.prepare_inputs_for_generation(**kwargs)

    def _prepare_position_ids_for_generation(self, *args, **kwargs) -> torch.Tensor:
        return self.model.mllm._prepare_position_ids_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, *args, **kwargs) -> tuple[torch.Tensor, dict[str, Any]]:
        return self.model.mllm._expand_inputs_for_generation(*args, **kwargs)

    def _update_model_kwargs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        return self.model.mllm._update_model_kwargs_for_generation(*args, **kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]):
        known = {name: value for name, value in model_kwargs.items() if name not in TARGETS}
        self.model.mllm._validate_model_kwargs(known)

    def _prepare_static_cache(self, *args, **kwargs) -> Cache:
        return self.model.mllm._prepare_static_cache(*args, **kwargs)

    def _prepare_cache_for_generation(self, *args, **kwargs) -> bool:
        return self.model.mllm._prepare_cache_for_generation(*args, **kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        return self.model.mllm._supports_mm_encoder_outputs()

    def _supports_logits_to_keep(self) -> bool:
        return self.model.mllm._supports_logits_to_keep()


def weighted_caption_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    caption_weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.LongTensor | None = None,
) -> torch.Tensor:
    """
    Next-token cross-entropy with a weight per sample; weights of 1 give the plain loss.

    Args:
        logits, labels: `(batch, sequence, vocab_size)` and `(batch, sequence)`, -100 where nothing is learned.
        caption_weights: `(batch,)`.
        num_items_in_batch: Divides the sum of the losses; by default the number of target tokens here.
        shift_labels: `(batch, sequence)`, labels already aligned with the logits, instead of `labels`: where a sequence
            is cut over devices, the shift must be made before.
    """
    if caption_weights.shape != labels.shape[:1]:
        raise ValueError(f"`caption_weights` has shape {tuple(caption_weights.shape)} for {len(labels)} samples.")
    _check_range("caption_weights", caption_weights, 0)
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:] if shift_labels is None else shift_labels
    targets = targets.to(logits.device)
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    count = num_items_in_batch if num_items_in_batch is not None else (targets != -100).sum().clamp(min=1)
    return (losses * caption_weights.to(losses).unsqueeze(1)).sum() / count


def _image_normalisation(name_or_path: str, **kwargs: Any) -> dict[str, list[float]]:
    """Mean and standard deviation of a checkpoint's image processor, or nothing where it has none."""
    hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(
            name_or_path, **{name: kwargs[name] for name in hub if name in kwargs}
        )
    except OSError:
        return {}
    if settings.get("do_normalize") is False:
        return {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    return {name: settings[name] for name in ("image_mean", "image_std") if settings.get(name) is not None}


__all__ = [
    "ASEForConditionalGeneration",
    "ASEModel",
    "ASEPreTrainedModel",
    "ImageAestheticSaliencyModule",
    "SaliencyCrossAttention",
]
