"""All that is known of base families: the forms in which their encoders get pixels, and the search for the encoder.

A base that does not fit is refused with what was looked for and what was found. A new form of pixels is a reader, a maker
and their line in `_PIXEL_FORMATS`.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_ase import ASEConfig


logger = logging.get_logger(__name__)

PROBE_GRID = (12, 18)  # patches of the picture that `probe_places` shows; more than one window each way


@dataclass
class EncoderImages:
    """
    What one call of an image encoder is about.

    Args:
        pixels: `(n, 3, h, w)`, or a list of `(3, h, w)` where sizes differ.
        lengths: Patches of each image where the encoder's layers see all images as one row; `None` where each image has
            a row of its own.
        indices: `(n, rows, columns)`, or a list of `(rows, columns)`: which of an image's states belongs to which place,
            counted from the first that has one; `None` where that is not known.
    """

    pixels: torch.Tensor | list[torch.Tensor]
    lengths: list[int] | None = None
    indices: torch.Tensor | list[torch.Tensor] | None = None

    def __post_init__(self):
        for shape in {tuple(one.shape) for one in self.pixels}:
            if len(shape) != 3 or shape[0] != 3:
                raise ValueError(
                    f"The saliency module takes images (3, height, width) of an encoder, got {len(self.pixels)} of "
                    f"{', '.join(map(str, shape))}."
                )

    def split(self, hidden_states: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """A layer's states to a row an image, `(n, p, hidden_size)`; rows of unequal images are padded."""
        if self.lengths is None:
            self._check_states(hidden_states, hidden_size)
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

    def merge(self, rows: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undoes `split`, to the shape of `hidden_states`."""
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

    def locate(self, hidden_states: torch.Tensor, hidden_size: int, prefix: int) -> torch.Tensor | list[torch.Tensor]:
        """A layer's states at their places, `(n, hidden_size, rows, columns)` or a list; `prefix` states have none."""
        rows = self.split(hidden_states, hidden_size)[:, prefix:]
        if isinstance(self.indices, torch.Tensor):
            shape = self.indices.shape[1:]
            order = self.indices.flatten(1).unsqueeze(-1).expand(-1, -1, hidden_size)
            return rows.gather(1, order).transpose(1, 2).unflatten(2, shape)
        return [row[order.flatten()].T.unflatten(1, order.shape) for row, order in zip(rows, self.indices)]

    def _check_states(self, hidden_states: torch.Tensor, hidden_size: int):
        images = len(self.pixels)
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


# ---------------------------------------------------------------------------------------------------------------------
# The forms in which encoders get their pixels. Each reader takes the encoder's arguments and gives the images; each maker
# gives the arguments for one image of noise, by which `probe_places` finds out which state belongs to which place.
# ---------------------------------------------------------------------------------------------------------------------


def _read_images(encoder: nn.Module, pixel_values: torch.Tensor, **kwargs: Any) -> EncoderImages:
    """Dense images or tiles `(n, 3, h, w)`, a row each."""
    if pixel_values.ndim != 4 or not hasattr(encoder.config, "patch_size"):
        return EncoderImages(pixel_values)
    patch, (height, width) = _patch_size(encoder), pixel_values.shape[-2:]
    indices = _raster(height // patch, width // patch, pixel_values).expand(len(pixel_values), -1, -1)
    return EncoderImages(pixel_values, indices=indices)


def _make_images(encoder: nn.Module) -> dict[str, torch.Tensor]:
    size = encoder.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return {"pixel_values": torch.randn(1, 3, height, width)}


def _read_masked_images(
    encoder: nn.Module, pixel_values: torch.Tensor, patch_attention_mask: torch.Tensor | None = None, **kwargs: Any
) -> EncoderImages:
    """Images `(n, 3, h, w)` padded on the right and below; `patch_attention_mask` `(n, h / p, w / p)` is true inside."""
    if patch_attention_mask is None:
        return _read_images(encoder, pixel_values)
    patch = pixel_values.shape[-1] // patch_attention_mask.shape[-1]
    grids = torch.stack([patch_attention_mask.any(2).sum(1), patch_attention_mask.any(1).sum(1)], dim=1).tolist()
    pixels = _crop(pixel_values, [(rows * patch, columns * patch) for rows, columns in grids])
    whole = _raster(*patch_attention_mask.shape[1:], pixel_values)
    if isinstance(pixels, torch.Tensor):
        return EncoderImages(pixels, indices=whole.expand(len(pixels), -1, -1))
    return EncoderImages(pixels, indices=[whole[:rows, :columns] for rows, columns in grids])


def _read_sized_images(
    encoder: nn.Module, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs: Any
) -> EncoderImages:
    """Images `(n, 3, h, w)` padded to one size, of `image_sizes` `(n, 2)` in pixels; the layers see one row."""
    patch = _patch_size(encoder)
    whole = [pixel_values.shape[-2:]] * len(pixel_values)
    sizes = whole if image_sizes is None else torch.as_tensor(image_sizes).tolist()
    grids = [(height // patch, width // patch) for height, width in sizes]
    pixels = _crop(pixel_values, [(height * patch, width * patch) for height, width in grids])
    return EncoderImages(pixels, *_packed_rasters(grids, pixel_values))


def _make_sized_images(encoder: nn.Module) -> dict[str, torch.Tensor]:
    height, width = (side * _patch_size(encoder) for side in PROBE_GRID)
    return {"pixel_values": torch.randn(1, 3, height, width), "image_sizes": torch.tensor([[height, width]])}


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
    lengths = [height * width for height, width, _ in grids]
    order = torch.cat([torch.arange(length, device=patches.device) for length in lengths])
    indices = _join_patches(order.view(-1, 1, 1, 1), grids)
    indices = indices[:, 0] if isinstance(indices, torch.Tensor) else [one[0] for one in indices]
    return EncoderImages(_join_patches(patches, grids), lengths, indices)


def _make_packed_patches(encoder: nn.Module) -> dict[str, torch.Tensor]:
    rows, columns = PROBE_GRID
    embedding = next(
        one for one in encoder.modules() if isinstance(one, (nn.Conv2d, nn.Conv3d)) and one.in_channels == 3
    )
    numbers = embedding.in_channels * math.prod(embedding.kernel_size)
    made = {"pixel_values": torch.randn(rows * columns, numbers), "grid_thw": torch.tensor([[1, rows, columns]])}
    if isinstance(embedding, nn.Conv2d) and "merge_sizes" not in _argument_names(encoder):  # patches that are pictures
        made["pixel_values"] = made["pixel_values"].view(1, -1, 3, *embedding.kernel_size)
    return {**made, "merge_sizes": torch.tensor([2])}


def _read_patch_strip(
    encoder: nn.Module, pixel_values: torch.Tensor, target_sizes: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Patches of all images side by side in one picture `(1, 3, side, p * side)`, their grids `target_sizes` `(n, 2)`."""
    side = pixel_values.shape[2]
    patches = pixel_values[0].unflatten(2, (-1, side)).permute(2, 0, 1, 3)
    grids = target_sizes.tolist()
    pixels = _join_patches(patches, [(height, width, 1) for height, width in grids])
    return EncoderImages(pixels, *_packed_rasters(grids, pixel_values))


def _make_patch_strip(encoder: nn.Module) -> dict[str, torch.Tensor]:
    side, (rows, columns) = _patch_size(encoder), PROBE_GRID
    strip = torch.randn(1, 3, side, rows * columns * side)
    return {"pixel_values": strip, "target_sizes": torch.tensor([[rows, columns]])}


def _read_padded_patches(
    encoder: nn.Module, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Flat patches `(n, p, side * side * 3)`, colours last, padded behind; their grids `spatial_shapes` `(n, 2)`."""
    side = _patch_size(encoder)
    patches = pixel_values.unflatten(2, (side, side, 3)).permute(0, 1, 4, 2, 3)
    grids = [(height, width) for height, width in spatial_shapes.tolist()]
    kept = torch.cat([row[: height * width] for row, (height, width) in zip(patches, grids)])
    pixels = _join_patches(kept, [(height, width, 1) for height, width in grids])
    return EncoderImages(pixels, indices=[_raster(*grid, pixel_values) for grid in grids])


def _make_padded_patches(encoder: nn.Module) -> dict[str, torch.Tensor]:
    rows, columns = PROBE_GRID
    return {
        "pixel_values": torch.randn(1, rows * columns, 3 * _patch_size(encoder) ** 2),
        "spatial_shapes": torch.tensor([[rows, columns]]),
        "pixel_attention_mask": torch.ones(1, rows * columns, dtype=torch.long),
    }


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
    orders = [order[: width * height] for order, (width, height) in zip(orders, sizes)]
    kept = torch.cat([row[order] for row, order in zip(patches, orders)])
    pixels = _join_patches(kept, [(height, width, 1) for width, height in sizes])
    return EncoderImages(pixels, indices=[order.view(h, w) for order, (w, h) in zip(orders, sizes)])


def _make_positioned_patches(encoder: nn.Module) -> dict[str, torch.Tensor]:
    rows, columns = PROBE_GRID
    positions = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)[None]
    pixels = torch.randn(1, rows * columns, 3 * _patch_size(encoder) ** 2)
    return {"pixel_values": pixels, "pixel_position_ids": positions}


def _read_tiled_images(
    encoder: nn.Module, pixel_values: torch.Tensor, aspect_ratio_ids: torch.Tensor, **kwargs: Any
) -> EncoderImages:
    """Tiles `(batch, images, tiles, 3, h, w)`; `aspect_ratio_ids` `(batch, images)` say how they were cut, 0 no image."""
    layouts = [[1, 1], *encoder.config.supported_aspect_ratios]  # rows and columns
    layouts = [layouts[i] for i in aspect_ratio_ids.flatten().tolist()]
    # tiles are to images what patches are to tiles
    tiles = torch.cat([tiles[: rows * columns] for tiles, (rows, columns) in zip(pixel_values.flatten(0, 1), layouts)])
    return EncoderImages(_join_patches(tiles, [(rows, columns, 1) for rows, columns in layouts]))


@dataclass(frozen=True)
class PixelFormat:
    """How an encoder gets pixels: what reads its arguments, and what makes them for one image, if that can be."""

    read: Callable[..., EncoderImages]
    make: Callable[[nn.Module], dict[str, torch.Tensor]] | None


# What an encoder takes beside its pixels tells their form. A tile of a picture in tiles has states of its own between
# those of other tiles, and padding: which belong where is not known.
_PIXEL_FORMATS = {
    "grid_thw": PixelFormat(_read_packed_patches, _make_packed_patches),
    "target_sizes": PixelFormat(_read_patch_strip, _make_patch_strip),
    "spatial_shapes": PixelFormat(_read_padded_patches, _make_padded_patches),
    "pixel_position_ids": PixelFormat(_read_positioned_patches, _make_positioned_patches),
    "aspect_ratio_ids": PixelFormat(_read_tiled_images, None),
    "image_sizes": PixelFormat(_read_sized_images, _make_sized_images),
    "patch_attention_mask": PixelFormat(_read_masked_images, _make_images),
}
_IMAGES = PixelFormat(_read_images, _make_images)
_KNOWN_ARGUMENTS = {*_PIXEL_FORMATS, "merge_sizes", "pixel_attention_mask", "aspect_ratio_mask"}


def _patch_size(encoder: nn.Module) -> int:
    """Side of the square patches in pixels; some configs say it for both directions."""
    size = encoder.config.patch_size
    return size if isinstance(size, int) else size[0]


def _raster(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Numbers of places row by row, `(rows, columns)`."""
    return torch.arange(rows * columns, device=like.device).view(rows, columns)


def _packed_rasters(grids: list[tuple[int, int]], like: torch.Tensor) -> tuple[list[int], torch.Tensor | list]:
    """Lengths and indices of images that stand row by row, one after the other."""
    rasters = [_raster(*grid, like) for grid in grids]
    equal = len({tuple(grid) for grid in grids}) == 1
    return [rows * columns for rows, columns in grids], torch.stack(rasters) if equal else rasters


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
    """`(n, rows * columns, c, h, w)` to `(n, c, rows * h, columns * w)`."""
    blocks = patches.unflatten(1, (rows // block, columns // block, block, block))
    ordered = blocks.permute(0, 5, 1, 3, 6, 2, 4, 7)
    return ordered.reshape(len(patches), -1, rows * patches.shape[-2], columns * patches.shape[-1])


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
        pixels: The form of its pixels.
        layers: Its layers, and `hidden_sizes` their widths.
        last_layer: Index of the last layer whose output reaches the language model.
    """

    module: nn.Module
    arguments: list[str]
    pixels: PixelFormat
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
    if encoder is not mllm and _argument_names(encoder)[0] == "input_ids":
        # it reads texts and holds the one of images
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
    pixels = next((pixels for name, pixels in _PIXEL_FORMATS.items() if name in arguments), _IMAGES)
    _check_patch_embedding(encoder, pixels, found)
    layers = _encoder_layers(encoder, found)
    return ImageEncoder(
        module=encoder,
        arguments=arguments,
        pixels=pixels,
        layers=layers,
        hidden_sizes=[_hidden_size(layer, found) for layer in layers],
        last_layer=_last_visible_layer(mllm.config, len(layers)),
    )


def _argument_names(module: nn.Module) -> list[str]:
    return [name for name in inspect.signature(module.forward).parameters if name != "kwargs"]


def _check_patch_embedding(encoder: nn.Module, pixels: PixelFormat, found: str):
    """Only a convolution (or unfolding) over colours says in which order the numbers of a patch stand."""
    if pixels.read in (_read_padded_patches, _read_positioned_patches):
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


# ---------------------------------------------------------------------------------------------------------------------
# Which of a layer's states belongs to which place
# ---------------------------------------------------------------------------------------------------------------------


class _Probed(Exception):
    """Ends an encoder's call once it has shown what was asked."""


@torch.no_grad()
def probe_places(encoder: ImageEncoder, layer: int) -> tuple[int | None, str]:
    """
    How many states stand before those that belong to places of the picture, in the output of `layer`.

    A picture of noise is changed in one patch at a time, and the state that moves most before the first layer must be the
    one that `EncoderImages.indices` names. So windows and other orders are found out, whatever the family.

    Returns:
        That number, or `None` where places cannot be told, and why.
    """
    if encoder.pixels.make is None:
        return None, "its pixels come in tiles with padding"
    training = encoder.module.training
    encoder.module.eval()
    try:
        return _probe(encoder, layer)
    except Exception as error:  # whatever an unknown encoder says of a picture that it was not made for
        return None, f"it takes no picture of noise ({type(error).__name__}: {error})"
    finally:
        encoder.module.train(training)


def _probe(encoder: ImageEncoder, layer: int) -> tuple[int | None, str]:
    weight = next(parameter for parameter in encoder.module.parameters() if parameter.is_floating_point())
    device = torch.device("cpu") if weight.is_meta else weight.device  # offloaded weights come when they are called
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        made = encoder.pixels.make(encoder.module)
    made = {
        name: value.to(device, weight.dtype) if value.is_floating_point() else value.to(device)
        for name, value in made.items()
    }
    pixels = made.pop("pixel_values")
    made = {name: value for name, value in made.items() if name in encoder.arguments}
    images = encoder.pixels.read(encoder.module, pixels, **made)
    numbers = torch.arange(pixels.numel(), device=device).view_as(pixels)
    where = encoder.pixels.read(encoder.module, numbers, **made).pixels[0]  # (3, h, w): which number each colour is
    indices = images.indices[0]
    patch = where.shape[1] // indices.shape[0]

    def states(pixels: torch.Tensor, at: nn.Module, hidden_size: int, before: bool) -> torch.Tensor:
        return images.split(_states(encoder, pixels, made, at, before), hidden_size)[0].float()

    first = states(pixels, encoder.layers[0], encoder.hidden_sizes[0], before=True)
    read = states(pixels, encoder.layers[layer], encoder.hidden_sizes[layer], before=False)
    if len(read) != len(first):
        return (
            None,
            f"{len(first)} states before its first layer and {len(read)} after layer {layer} are not the same places",
        )
    prefixes = set()
    for row, column in (
        (0, 1),
        (indices.shape[0] - 1, 0),
        (indices.shape[0] // 2, indices.shape[1] - 1),
        (-2, -2),
        (1, indices.shape[1] // 3),
    ):
        row, column = row % indices.shape[0], column % indices.shape[1]
        changed = pixels.clone()
        cell = where[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        changed.view(-1)[cell.flatten()] += 4
        moved = (states(changed, encoder.layers[0], encoder.hidden_sizes[0], before=True) - first).abs().sum(-1)
        prefixes.add(int(moved.argmax() - indices[row, column]))
    if len(prefixes) > 1 or min(prefixes) < 0 or max(prefixes) + indices.numel() > len(first):
        return None, f"its states are not in the order of its patches (they lie {sorted(prefixes)} from it)"
    return prefixes.pop(), ""


def _states(
    encoder: ImageEncoder, pixels: torch.Tensor, others: dict[str, torch.Tensor], at: nn.Module, before: bool
) -> torch.Tensor:
    """What goes into the layer `at`, or comes out of it; the call ends there."""
    found = []

    def keep(states: Any):
        found.append(states[0] if isinstance(states, tuple) else states)
        raise _Probed

    if before:
        hook = at.register_forward_pre_hook(
            lambda module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        hook = at.register_forward_hook(lambda module, args, output: keep(output))
    try:
        encoder.module(pixels, **others)
    except _Probed:
        return found[0]
    finally:
        hook.remove()
    raise ValueError("it does not call its layers")


# ---------------------------------------------------------------------------------------------------------------------
# The layers that are read and fused
# ---------------------------------------------------------------------------------------------------------------------


def resolve_encoder_layers(ase_config: ASEConfig, encoder: ImageEncoder):
    """Decides which layers the saliency module reads, unless the configuration says it, and where their states stand."""
    config = ase_config.iasm_config
    layers = config.encoder_layers
    if layers is None:
        last = min(ase_config.fusion_layers or [encoder.last_layer])
        layers = [min(max((encoder.last_layer + 1) // 2, 1) - 1, last)]
    elif not layers or config.encoder_hidden_sizes is not None:
        return
    if max(layers) > encoder.last_layer:
        raise ValueError(
            f"`encoder_layers` {layers} reaches beyond layer {encoder.last_layer}, the last one that is seen."
        )
    prefix, reason = probe_places(encoder, max(layers))
    name = type(encoder.module).__name__
    if prefix is None and config.encoder_layers is not None:
        raise ValueError(f"The saliency module cannot read {name}'s `encoder_layers` {layers}: {reason}.")
    if prefix is None:
        logger.warning(f"The saliency module does not read {name} but judges by photometry alone: {reason}.")
        layers, prefix = [], 0
    config.encoder_layers, config.encoder_prefix_length = layers, prefix
    config.encoder_hidden_sizes = [encoder.hidden_sizes[layer] for layer in layers]


def resolve_fusion_layers(config: ASEConfig, encoder: ImageEncoder) -> list[int]:
    first = max(config.iasm_config.encoder_layers, default=0)  # the tokens are not there before
    count = encoder.last_layer + 1 - first
    if config.fusion_layers is None:
        if count < 1:
            raise ValueError(
                f"`encoder_layers` {config.iasm_config.encoder_layers} leave no layer to fuse: the language model sees none "
                f"after layer {encoder.last_layer}."
            )
        return sorted({first + round((i + 1) * count / 4) - 1 for i in range(4)} - {first - 1})
    if max(config.fusion_layers) > encoder.last_layer:
        raise ValueError(
            f"`fusion_layers` {config.fusion_layers} reaches beyond layer {encoder.last_layer}: the encoder has "
            f"{len(encoder.layers)} layers and the language model sees none after that one."
        )
    if min(config.fusion_layers) < first:
        raise ValueError(
            f"`fusion_layers` {config.fusion_layers} begins before layer {first}, which the saliency module reads first."
        )
    return config.fusion_layers
