"""All that is known of base families: the forms in which their encoders get pixels, and the search for the encoder.

A base that does not fit is refused with what was looked for and what was found. A new form of pixels is a reader and its
line in `_PIXEL_FORMATS`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


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


# ---------------------------------------------------------------------------------------------------------------------
# The forms in which encoders get their pixels. Each reader takes the encoder's arguments and gives the images.
# ---------------------------------------------------------------------------------------------------------------------


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
    indices = rows * (columns.amax(1, keepdim=True) + 1) + columns
    orders = indices.masked_fill(columns < 0, pixel_values.shape[1]).argsort(1)
    kept = [row[order[: width * height]] for row, order, (width, height) in zip(patches, orders, sizes)]
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


# What an encoder takes beside its pixels tells their form.
_PIXEL_FORMATS = {
    "grid_thw": _read_packed_patches,
    "target_sizes": _read_patch_strip,
    "spatial_shapes": _read_padded_patches,
    "pixel_position_ids": _read_positioned_patches,
    "aspect_ratio_ids": _read_tiled_images,
    "image_sizes": _read_sized_images,
    "patch_attention_mask": _read_masked_images,
}
_KNOWN_ARGUMENTS = {*_PIXEL_FORMATS, "merge_sizes", "pixel_attention_mask", "aspect_ratio_mask"}


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
        return _assemble(patches.unflatten(0, (len(grids), -1)), *grids[0])
    return [_assemble(part[None], *grid)[0] for part, grid in zip(patches.split(lengths), grids)]


def _assemble(patches: torch.Tensor, rows: int, columns: int, block: int) -> torch.Tensor:
    """`(n, rows * columns, 3, h, w)` to `(n, 3, rows * h, columns * w)`."""
    blocks = patches.unflatten(1, (rows // block, columns // block, block, block))
    ordered = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7)
    return ordered.reshape(len(patches), 3, rows * patches.shape[-2], columns * patches.shape[-1])


# ---------------------------------------------------------------------------------------------------------------------
# The search for the encoder
# ---------------------------------------------------------------------------------------------------------------------


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
    reader = next((reader for name, reader in _PIXEL_FORMATS.items() if name in arguments), _read_images)
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
