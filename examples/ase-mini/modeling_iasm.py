"""The image aesthetic saliency module (IASM), what joins it to an encoder, and the losses.

After "Aesthetic Image Captioning with Saliency Enhanced MLLMs" (arXiv 2509.04378), which names the module and publishes
nothing of its inside: all of that is this project's own design. The zero-initialised tanh gate is Flamingo's
(arXiv 2204.14198).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoBackbone, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import maybe_autocast

from .configuration_ase import ASEConfig, IASMConfig
from .photometry import (
    NUM_CONTRASTS,
    NUM_FINE_STATISTICS,
    NUM_GEOMETRY,
    NUM_MAPS,
    NUM_STATISTICS,
    NUM_SUBJECT_STATISTICS,
    contrast_maps,
    fine_statistics,
    inside_and_around,
    map_geometry,
    photometric_maps,
    photometric_statistics,
    position_features,
    subject_statistics,
)


TILES_HINT = "; where the base's processor cuts images into tiles, each tile is one: let it leave them whole"


@dataclass
class IASMOutput(ModelOutput):
    r"""
    What the image aesthetic saliency module says of `n` images.

    Args:
        loss: Weighted sum of the terms below whose targets were given.
        saliency_tokens: `(n, t, hidden_size)`, what the encoder's patches attend to: of the queries, then two of the probe
            and one of the verdict, where the configuration has them.
        saliency_maps: `(n, h, w)`, probabilities over positions: each map sums to 1.
        saliency_map_sizes: `(n, 2)`, height and width of each map where they differ, else `None`; the maps are then
            padded with zeros on the right and below.
        score_logits: `(n, 10)`, logits of the scores 1 to 10.
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
    _auto_class = "AutoModel"  # with it, transformers copies the code beside the weights
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
        self.photometry_projection = nn.Conv2d(num_maps, size, 3, padding=1)
        self.merge = nn.Conv2d(size, size, 3, padding=1, groups=size)
        self.output = nn.Conv2d(size, size, 1)

    def forward(self, feature_maps: list[torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        grid = maps.shape[-2:]
        merged = self.photometry_projection(maps)
        for lateral, features in zip(self.laterals, feature_maps):
            finer = features.shape[-1] > grid[-1]
            features = F.adaptive_avg_pool2d(features, grid) if finer else features
            features = lateral(features)
            if features.shape[-2:] != grid:
                features = F.interpolate(features, size=grid, mode="bilinear", align_corners=False)
            merged = merged + features
        return self.output(F.gelu(self.merge(F.gelu(merged))))


class LinearProbe(nn.Module):
    """Feature maps `(n, width, rows, columns)` of several layers to two tokens, of their mean and of their layout."""

    grid, channels = 6, 32  # places along each side of the layout, and what is kept of each

    def __init__(self, widths: list[int], size: int):
        super().__init__()
        self.mean = nn.Linear(sum(widths), size)
        self.places = nn.Conv2d(sum(widths), self.channels, 1)
        self.layout = nn.Linear(self.channels * self.grid**2, size)

    def forward(self, feature_maps: list[torch.Tensor]) -> torch.Tensor:
        means = torch.cat([features.mean((2, 3)) for features in feature_maps], dim=1)
        places = torch.cat([F.adaptive_avg_pool2d(features, self.grid) for features in feature_maps], dim=1)
        return torch.stack([self.mean(means), self.layout(self.places(places).flatten(1))], dim=1)


class ImageAestheticSaliencyModule(ASEPreTrainedModel):
    """
    IASM: what is salient in a photograph, how it is lit and built, and how it would be rated.

    States of the base's own encoder (or a backbone's feature maps) and photometric maps give two pyramids at stride 8,
    one for the saliency map and one for the tokens, so that supervising the map does not bend the features that judge
    sharpness. What differs from the rest of the picture is measured, for the map alone. Six summary tokens say:
    features pooled under the map, around it and everywhere; the map's place and extent with the photometry of what it
    covers and of the rest; the photometry of the whole (two). Learned queries read them and the picture, and they alone
    are the saliency tokens and what scores and aspects are read from: a cross-attention that does not yet choose
    between tokens would dilute what only one of them knows. With `probe_tokens` two more begin as linear readings of the
    encoder's states.
    """

    config: IASMConfig
    config_class = IASMConfig
    base_model_prefix = "iasm"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = False

    num_summary_tokens, num_probe_tokens = 6, 2

    def __init__(self, config: IASMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.backbone = None if config.backbone_config is None else _build_backbone(config.backbone_config)
        widths = config.encoder_hidden_sizes or []
        self.encoder_norms = nn.ModuleList([nn.LayerNorm(width) for width in widths])
        channels = [*widths, *(self.backbone.channels if self.backbone is not None else [])]
        self.map_pyramid = SaliencyPyramid(channels, NUM_MAPS + NUM_CONTRASTS, size)
        self.map_head = nn.Sequential(
            nn.Conv2d(size + 5, size // 4, 1),
            nn.GELU(),
            nn.Conv2d(size // 4, 1, 3, padding=1, bias=False),  # a bias would not change a softmax over positions
        )
        self.pyramid = SaliencyPyramid(channels, NUM_MAPS, size)
        self.geometry = nn.Sequential(
            nn.Linear(NUM_GEOMETRY + NUM_SUBJECT_STATISTICS, size), nn.GELU(), nn.Linear(size, size)
        )
        num_statistics = NUM_STATISTICS + NUM_FINE_STATISTICS * config.fine_statistics
        self.statistics = nn.Sequential(nn.Linear(num_statistics, 2 * size), nn.GELU(), nn.Linear(2 * size, 2 * size))
        self.queries = nn.Parameter(torch.empty(config.num_queries, size))
        self.positions = nn.Conv2d(5, size, 1)
        self.query_norm = nn.LayerNorm(size)
        self.query_attention = SaliencyAttention(config, size, size, size, config.num_attention_heads)
        if config.probe_tokens and not widths:
            raise ValueError(
                "`probe_tokens` are made of an encoder's states, and `encoder_layers` names none to read."
            )
        self.probe = LinearProbe(widths, size) if config.probe_tokens else None
        num_tokens = config.num_queries + self.num_probe_tokens * config.probe_tokens
        self.token_types = nn.Parameter(torch.empty(self.num_summary_tokens + num_tokens, size))
        self.layers = nn.ModuleList([SaliencyTokenLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(size)
        self.score_head = nn.Linear(num_tokens * size, 10)
        self.aspect_head = nn.Linear(num_tokens * size, config.num_aspects) if config.num_aspects else None
        self.verdict = nn.Linear(config.num_aspects, size) if config.verdict_token else None
        self.post_init()

    def to_rgb(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Undoes the base's normalisation and resizes: `(n, 3, h, w)` in 0..1, sides multiples of 32."""
        if pixel_values.ndim != 4 or pixel_values.shape[1] != 3:
            raise ValueError(f"The IASM takes images (n, 3, height, width), got {tuple(pixel_values.shape)}.")
        device = pixel_values.device
        # without `non_blocking` a GPU would wait for its host in every call
        mean = torch.tensor(self.config.image_mean).view(1, -1, 1, 1).to(device, non_blocking=True)
        std = torch.tensor(self.config.image_std).view(1, -1, 1, 1).to(device, non_blocking=True)
        pixels = pixel_values.float() * std + mean
        height, width = pixels.shape[-2:]
        scale = self.config.image_size / (height * width) ** 0.5
        target = tuple(max(32, 32 * round(side * scale / 32)) for side in (height, width))
        if target != (height, width):
            pixels = F.interpolate(pixels, size=target, mode="bilinear", align_corners=False, antialias=True)
        return pixels.clamp(0, 1)

    def read_features(self, pixels: torch.Tensor, encoder_states: list[torch.Tensor]) -> list[torch.Tensor]:
        """Feature maps of the encoder's states `(n, width, rows, columns)` and of the backbone, at strides of their own."""
        if len(encoder_states) != len(self.encoder_norms):
            raise ValueError(
                f"This saliency module reads {len(self.encoder_norms)} layers of an image encoder (`encoder_layers` "
                f"{self.config.encoder_layers}), got the states of {len(encoder_states)}."
            )
        dtype = self.token_types.dtype
        features = []
        for norm, states in zip(self.encoder_norms, encoder_states):
            states = states if self.config.train_encoder else states.detach()
            features.append(norm(states.to(dtype).movedim(1, -1)).movedim(-1, 1))
        if self.backbone is not None:
            features += self.backbone(((pixels - 0.5) * 4).to(dtype)).feature_maps
        return features

    def predict_map(self, feature_maps: list[torch.Tensor], maps: torch.Tensor) -> torch.Tensor:
        """Saliency as probabilities over positions, `(n, h / 8, w / 8)`, from float32 `photometric_maps`."""
        contrasts = torch.cat([maps, contrast_maps(maps)], dim=1)
        features = self.map_pyramid(feature_maps, contrasts.to(self.token_types.dtype))
        positions = position_features(features).expand(features.shape[0], -1, -1, -1)
        logits = self.map_head(torch.cat([features, positions], dim=1))
        return logits.float().flatten(1).softmax(-1).unflatten(1, logits.shape[-2:])

    def make_summary_tokens(
        self, features: torch.Tensor, saliency_maps: torch.Tensor, maps: torch.Tensor, statistics: torch.Tensor
    ) -> torch.Tensor:
        """What map and photometry say, `(n, 6, hidden_size)`: subject, ground, whole, geometry, statistics (two)."""
        dtype = features.dtype
        inside, around = inside_and_around(saliency_maps)
        whole = torch.full_like(inside, 1 / inside.shape[1])
        pools = torch.stack([inside, around, whole], dim=1).to(dtype)
        subject = [map_geometry(saliency_maps), subject_statistics(saliency_maps, maps.float())]
        return torch.cat(
            [
                pools @ features.flatten(2).transpose(1, 2),  # (n, 3, h * w) by (n, h * w, size)
                self.geometry(torch.cat(subject, dim=1).to(dtype)).unsqueeze(1),
                self.statistics(statistics.to(dtype)).unflatten(1, (2, -1)),
            ],
            dim=1,
        )

    def make_saliency_tokens(
        self, features: torch.Tensor, summary: torch.Tensor, feature_maps: list[torch.Tensor]
    ) -> torch.Tensor:
        """Saliency tokens `(n, t, hidden_size)`: queries that have read the picture and its summary, and the probe's."""
        dtype = features.dtype
        coarse = F.avg_pool2d(features, 2)
        coarse = (coarse + self.positions(position_features(coarse))).flatten(2).transpose(1, 2)
        queries = self.queries.expand(features.shape[0], -1, -1).to(dtype)
        queries = queries + self.query_attention(queries, self.query_norm(coarse))
        tokens = [summary, queries]
        if self.probe is not None:
            tokens.append(self.probe(feature_maps[: len(self.encoder_norms)]))
        tokens = torch.cat(tokens, dim=1) + self.token_types.to(dtype)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.norm(tokens[:, self.num_summary_tokens :])

    def encode(self, pixels: torch.Tensor, encoder_states: list[torch.Tensor]) -> IASMOutput:
        """Tokens, map and scores of images of one size, as `to_rgb` gives them, and of what an encoder makes of them."""
        # light and colour are measured in float32 whatever the model's dtype and outside autocast
        with maybe_autocast(pixels.device.type, enabled=False):
            maps = photometric_maps(pixels)
            statistics = photometric_statistics(pixels, maps)
            if self.config.fine_statistics:
                statistics = torch.cat([statistics, fine_statistics(pixels)], dim=1)
        dtype = self.token_types.dtype
        feature_maps = self.read_features(pixels, encoder_states)
        saliency_maps = self.predict_map(feature_maps, maps)
        features = self.pyramid(feature_maps, maps.to(dtype))
        summary = self.make_summary_tokens(features, saliency_maps, maps, statistics)
        tokens = self.make_saliency_tokens(features, summary, feature_maps)
        aspect_logits = self.aspect_head(tokens.flatten(1)) if self.aspect_head is not None else None
        score_logits = self.score_head(tokens.flatten(1))
        if self.verdict is not None:
            decided = (aspect_logits > 0).to(dtype) * 2 - 1
            tokens = torch.cat([tokens, self.verdict(decided).unsqueeze(1)], dim=1)
        return IASMOutput(
            saliency_tokens=tokens,
            saliency_maps=saliency_maps,
            score_logits=score_logits,
            aspect_logits=aspect_logits,
        )

    def encode_list(self, images: list[torch.Tensor], encoder_states: list[list[torch.Tensor]]) -> IASMOutput:
        """Images `(3, h, w)` of different sizes, with the states of each: one batch for all that have one size."""
        groups, batches = {}, {}
        for i, image in enumerate(images):
            groups.setdefault((image.shape, *(states[i].shape for states in encoder_states)), []).append(i)
        for (_, *grids), indices in groups.items():
            pixels = self.to_rgb(torch.stack([images[i] for i in indices]))
            batches.setdefault((pixels.shape[-2:], *grids), []).append((indices, pixels))
        order, parts = [], []
        for batch in batches.values():
            numbers = [i for indices, _ in batch for i in indices]
            states = [torch.stack([one[i] for i in numbers]) for one in encoder_states]
            parts.append(self.encode(torch.cat([pixels for _, pixels in batch]), states))
            order += numbers
        return join_outputs(parts, order)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | list[torch.Tensor],
        score_targets: torch.Tensor | None = None,
        saliency_targets: torch.Tensor | None = None,
        aspect_targets: torch.Tensor | None = None,
        encoder_states: list[torch.Tensor | list[torch.Tensor]] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> IASMOutput:
        r"""
        Args:
            pixel_values: `(n, 3, h, w)`, or a list of `(3, h, w)` of any sizes; normalised by `config.image_mean` and
                `config.image_std`.
            encoder_states: For each of `config.encoder_layers`, its states at their places: `(n, width, rows, columns)`,
                or a list of `(width, rows, columns)`.
            score_targets: `(n, 10)`, shares of the scores 1 to 10; a row of zeros has no score.
            saliency_targets: `(n, h, w)`, not negative, any scale; a map of zeros has no truth.
            aspect_targets: `(n, num_aspects)` in 0..1; a negative value is unknown.
        """
        encoder_states = encoder_states or []
        if isinstance(pixel_values, list) or any(isinstance(states, list) for states in encoder_states):
            outputs = self.encode_list(list(pixel_values), encoder_states)
        else:
            outputs = self.encode(self.to_rgb(pixel_values), encoder_states)
        for name, term in saliency_losses(
            self.config, outputs, score_targets, saliency_targets, aspect_targets
        ).items():
            outputs[name] = term
        return outputs


def join_outputs(parts: list[IASMOutput], order: list[int] | None = None) -> IASMOutput:
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


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def saliency_losses(
    config: IASMConfig,
    outputs: ModelOutput,
    score_targets: torch.Tensor | None = None,
    saliency_targets: torch.Tensor | None = None,
    aspect_targets: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """
    The terms whose targets are given, means over the images that have truth, and their weighted sum `loss`.

    Shapes as in `ImageAestheticSaliencyModule.forward`. Without any target the dictionary is empty.
    """
    terms = {}
    if score_targets is not None:
        terms["score_loss"] = score_loss(outputs.score_logits, score_targets)
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


def score_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared earth mover's distance of two distributions over scores, `(n, 10)`; rows of zeros are left out."""
    _check_targets("score_targets", targets, logits)
    _check_range("score_targets", targets, 0)
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


__all__ = [
    "ASEPreTrainedModel",
    "IASMOutput",
    "ImageAestheticSaliencyModule",
    "SaliencyCrossAttention",
]
