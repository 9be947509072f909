"""An image token budget: which tokens of a picture the language model is handed, and prompts without the others.

A prompt holds a placeholder for every image token. Those that are not chosen are taken out of it before the language model
runs, each of the others keeps the position that it had, and what comes out has the full length again. Needs no attention
weights. Greedy determinantal selection is that of Chen et al. (arXiv 1709.05135); that its quality is the saliency map is
this project's choice, and was not measured to beat coverage alone.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import maybe_autocast


RIDGE = 1e-3  # of what no other token has: keeps choosing where there are more tokens than dimensions
QUALITY_POWER = 0.5  # of saliency in a diverse selection: more of it leaves the ground unseen


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are kept
# ---------------------------------------------------------------------------------------------------------------------


def kept_number(tokens: int, budget: float | int) -> int:
    return min(tokens, max(1, round(tokens * budget) if isinstance(budget, float) else budget))


def token_grids(config: PreTrainedConfig, sizes: list[tuple[int, int]], tokens: int) -> list[tuple[int, int]]:
    """
    Rows and columns of the tokens of each image, from the sizes in pixels that the encoder got.

    Tokens stand for equal squares, row by row, in all models where every image has as many as its area says.

    Raises:
        ValueError: where that is not so, so that nothing is known of which token is where.
    """
    area = sum(height * width for height, width in sizes)
    side = isqrt(area // tokens) if tokens else 0
    whole = side and side**2 * tokens == area and all(h % side == 0 and w % side == 0 for h, w in sizes)
    if not whole or "qformer_config" in config.sub_configs:  # whose tokens are queries that look everywhere
        raise ValueError(
            "`image_token_budget` needs image tokens that stand for places of the picture; "
            f"{config.model_type} made {tokens} of {len(sizes)} images of {sorted(set(sizes))} pixels, which are none."
        )
    return [(height // side, width // side) for height, width in sizes]


def pool_map(saliency_map: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """A map `(h, w)` at the rows and columns of tokens, `(rows * columns,)` with mean 1."""
    pooled = F.adaptive_avg_pool2d(saliency_map[None].float(), grid).flatten()
    return pooled / pooled.mean().clamp(min=1e-9)


def choose_tokens(
    features: list[torch.Tensor], quality: list[torch.Tensor], budget: float | int, selection: str
) -> torch.Tensor:
    """
    Which of the image tokens are kept, `(tokens,)`, for all images one after the other.

    Args:
        features: Of each image, `(n, size)`.
        quality: Of each image's tokens, `(n,)` with mean 1: how salient their places are.
    """
    kept: list[torch.Tensor | None] = [None] * len(features)
    lengths = [len(one) for one in features]
    for length in dict.fromkeys(lengths):  # one batch for all images of one length
        chosen = [i for i, one in enumerate(lengths) if one == length]
        batch, weights = (torch.stack([parts[i] for i in chosen]) for parts in (features, quality))
        with maybe_autocast(weights.device.type, enabled=False):  # in bfloat16 likeness is too coarse to choose by
            indices = _SELECT[selection](batch, weights, kept_number(length, budget))
        mask = torch.zeros(weights.shape, dtype=torch.bool, device=weights.device).scatter_(1, indices, True)
        for i, one in zip(chosen, mask):
            kept[i] = one
    return torch.cat(kept)


def _uniform(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    """One token of each of `number` runs in reading order, at another place of its run each time."""
    # NOTE: always its middle would be one column of the picture wherever a run is as long as a row, and so would be steps
    # of one size; squares are in step with no width (Weyl, 1916)
    steps = torch.arange(number, device=quality.device)
    begin, end = steps * quality.shape[1] // number, (steps + 1) * quality.shape[1] // number
    shares = steps.square() * 40503 % 65536  # squares of whole numbers times the golden ratio, without the whole part
    return (begin + (end - begin) * shares // 65536).expand(len(quality), -1)


def _salient(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    return quality.topk(number, dim=1).indices


def _diverse(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    """Greedy maximum of a determinantal point process: features that differ, salient ones rather; `(n, number)`."""
    features = F.normalize(features.detach().float(), dim=-1)
    weight = quality.clamp(min=1e-3) ** QUALITY_POWER
    likeness = features @ features.transpose(1, 2) + RIDGE * torch.eye(features.shape[1], device=features.device)
    kernel = weight[:, :, None] * likeness * weight[:, None]
    gains = kernel.diagonal(dim1=1, dim2=2).clone()
    rows = torch.arange(len(kernel), device=kernel.device)
    spans = kernel.new_zeros(len(kernel), number, kernel.shape[1])  # rows of the kernel's Cholesky factor
    chosen = []
    for step in range(number):
        best = gains.argmax(1)
        chosen.append(best)
        known = spans[:, :step]
        rest = kernel[rows, best] - (known[rows, :, best].unsqueeze(1) @ known).squeeze(1)
        spans[:, step] = rest / gains[rows, best].clamp(min=1e-9).sqrt().unsqueeze(-1)
        gains = gains - spans[:, step].square()
        gains[rows, best] = -torch.inf  # and so it stays
    return torch.stack(chosen, dim=1)


_SELECT: dict[str, Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]] = {
    "diverse": _diverse,
    "uniform": _uniform,
    "saliency": _salient,
}


def cut_features(outputs: BaseModelOutputWithPooling, kept: torch.Tensor) -> BaseModelOutputWithPooling:
    """A base's image features with the kept tokens alone, in the form that they had; those for deeper layers as well."""
    outputs.pooler_output = _cut_tokens(outputs.pooler_output, kept)
    if outputs.get("deepstack_features") is not None:
        outputs.deepstack_features = [_cut_tokens(one, kept) for one in outputs.deepstack_features]
    return outputs


def _cut_tokens(tokens: torch.Tensor | list[torch.Tensor] | tuple[torch.Tensor, ...], kept: torch.Tensor):
    """Of `(images, n, size)`, as many of each image, or of one `(n, size)` an image or sample."""
    if isinstance(tokens, torch.Tensor):
        return tokens.flatten(0, -2)[kept].unflatten(0, (len(tokens), -1))
    return type(tokens)(one[mask] for one, mask in zip(tokens, kept.split([len(one) for one in tokens])))


# ---------------------------------------------------------------------------------------------------------------------
# Bases that put the tiles of a photograph together, with an end for each row (LLaVA-NeXT and its kin)
# ---------------------------------------------------------------------------------------------------------------------

_listening = threading.local()


@dataclass
class Packing:
    """What a base packed in one call: its own method, and the arguments that it got."""

    pack: Callable[..., Any]
    tiles: list[torch.Tensor]
    arguments: tuple
    options: dict[str, Any]

    def pack_quality(self, saliency_maps: list[torch.Tensor]) -> list[torch.Tensor]:
        """The maps of all tiles on the way that their features went, `(n,)` a photograph; ends of rows count 1."""
        maps, quality = iter(saliency_maps), []
        for tiles in self.tiles:
            side = isqrt(tiles.shape[1])
            if side**2 != tiles.shape[1]:
                raise ValueError(
                    f"`image_token_budget` needs tiles whose tokens stand for places, got {tiles.shape[1]} a tile."
                )
            rows = [pool_map(next(maps), (side, side)).unsqueeze(-1) for _ in tiles]
            quality.append(torch.stack(rows))
        options = {**self.options, "image_newline": quality[0].new_ones(1)}
        return [one.squeeze(-1) for one in self.pack(quality, *self.arguments, **options)[0]]


def _pack_and_tell(pack: Callable[..., Any], image_features: list[torch.Tensor], *arguments, **options) -> Any:
    if (heard := getattr(_listening, "packings", None)) is not None:
        heard.append(Packing(pack, image_features, arguments, options))
    return pack(image_features, *arguments, **options)


@contextmanager
def listen_to_packing(base: nn.Module) -> Iterator[list[Packing]]:
    """What the base packs in this thread meanwhile; most have nothing to pack."""
    pack = getattr(base, "pack_image_features", None)
    if pack is not None and not isinstance(pack, partial):
        # NOTE: a partial of a bound method, which deepcopy follows to the copied model
        base.pack_image_features = partial(_pack_and_tell, pack)
    _listening.packings = []
    try:
        yield _listening.packings
    finally:
        _listening.packings = None


# ---------------------------------------------------------------------------------------------------------------------
# The prompt without the others
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class PromptCut:
    """
    A batch of prompts without some of their tokens.

    Args:
        mask: `(batch, sequence)`, what is kept of the whole.
        places: `(batch, shorter)`, where each place of the shorter rows is found in the whole.
        is_padding: `(batch, shorter)`, places that were added for rows to have one length.
        grids: `(images, 2)`, rows and columns of the tokens of each image of the encoder.
    """

    mask: torch.Tensor
    places: torch.Tensor
    is_padding: torch.Tensor
    grids: torch.Tensor | None = None

    def fields(self) -> dict[str, torch.Tensor | None]:
        """What outputs say of the cut."""
        return {"image_token_mask": self.mask, "image_token_grids": self.grids}

    def gather(self, values: torch.Tensor, padding: int) -> torch.Tensor:
        """`(..., batch, sequence)` to the shorter sequence; one row stands for all of a batch."""
        places = self.places.expand(*values.shape[:-2], *self.places.shape)
        return values.expand(*places.shape[:-1], -1).gather(-1, places).masked_fill(self.is_padding, padding)

    def restore(self, values: torch.Tensor) -> torch.Tensor:
        """
        `(batch, shorter, size)` to the whole sequence; what was taken out gets what stood before it.

        So the first token after a picture is still told by the place before it.
        """
        before = (self.mask.cumsum(1) - 1).clamp(min=0)
        first = self.is_padding.long().cumprod(1).sum(1, keepdim=True)  # padding on the left
        index = (before + first).clamp(max=values.shape[1] - 1)
        return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def cut_prompt(mask: torch.Tensor, pad_left: torch.Tensor | bool) -> PromptCut:
    """Rows `(batch, sequence)` with `mask` of what is kept; shorter ones are padded on the left, or on the right."""
    counts = mask.sum(1, keepdim=True)
    longest = int(counts.max())
    # kept places first, in their order
    order = (~mask).to(torch.int8).argsort(dim=1, stable=True)[:, :longest]
    slots = torch.arange(longest, device=mask.device)
    shift = torch.where(torch.as_tensor(pad_left, device=mask.device), longest - counts, 0)
    source = slots - shift
    is_padding = (source < 0) | (source >= counts)
    return PromptCut(mask, order.gather(1, source.clamp(0, longest - 1)), is_padding)


def pads_left(attention_mask: torch.Tensor) -> torch.Tensor:
    """Whether any row of a batch is padded on its left, as prompts for generation are."""
    return (attention_mask[:, 0] == 0).any()


def cut_inputs(inputs: dict[str, Any], cut: PromptCut, padding: int) -> dict[str, Any]:
    """All inputs of the shape of the prompt, without what is taken out."""
    shape = cut.mask.shape
    fills = {"input_ids": padding, "labels": -100, "shift_labels": -100}
    return {
        name: cut.gather(value, fills.get(name, 0))
        if isinstance(value, torch.Tensor) and value.shape == shape
        else value
        for name, value in inputs.items()
    }


def shorter_limits(config: GenerationConfig, kwargs: dict[str, Any], less: int) -> dict[str, int]:
    """Limits that count the prompt too, for one that is shorter by so many tokens."""
    limits = {name: kwargs.get(name, getattr(config, name)) for name in ("max_length", "min_length")}
    return {name: limit - less for name, limit in limits.items() if limit}
