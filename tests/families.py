"""One row a family of vision-language models: a tiny configuration, and inputs as the family's processor makes them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoConfig, PreTrainedConfig


PAD, BOS, EOS, IMAGE = 0, 1, 2, 4  # token ids of every tiny model; text tokens are 20..98 of a vocabulary of 99
SIDE, PATCH = 32, 8  # pixels of a tile and of a patch, where the family has them

Inputs = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """
    Args:
        config: Builds the base's tiny configuration.
        inputs: Normalised images `(3, h, w)`, one a sample, to the base's inputs as its processor would make them.
        sizes: `(height, width)` of the two images of the tests' batch; different ones where the family allows.
    """

    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[list[torch.Tensor]], Inputs]
    sizes: tuple[tuple[int, int], tuple[int, int]]


SQUARE = ((SIDE, SIDE), (SIDE, SIDE))
UNEQUAL = ((SIDE, 2 * SIDE), (48, SIDE))
TILES = ((SIDE, 2 * SIDE), (3 * SIDE, SIDE))  # different numbers of tiles, so that the smaller sample is padded

TEXT = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 99,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
CLIP = {"model_type": "clip_vision_model", **VISION}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
GRID_VISION = {**VISION, "depth": 3, "embed_dim": 32, "out_hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]}
# other special tokens of the families with grids and of gemma, out of the way of the text
SPECIAL = {"video_token_id": 5, "vision_start_token_id": 6, "vision_end_token_id": 7, "video_start_token_id": 8}
SPECIAL |= {"video_end_token_id": 9, "image_start_token_id": 10, "image_end_token_id": 11}


def config(family: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    return lambda: AutoConfig.for_model(family, **settings)


# Inputs ---------------------------------------------------------------------------------------------------------------


def text_inputs(image_tokens: list[list[int]]) -> Inputs:
    """A sample each: begin, the tokens that stand for its image, four words; padded on the left as for generation."""
    rows = [[BOS, *tokens, 20, 21, 22, 23] for tokens in image_tokens]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def cut(image: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """`(3, h, w)` to its tiles row by row, `(tiles, 3, side, side)`."""
    rows, columns = image.shape[1] // side, image.shape[2] // side
    return image.unflatten(2, (columns, side)).unflatten(1, (rows, side)).permute(1, 3, 0, 2, 4).flatten(0, 1)


def overview(image: torch.Tensor) -> torch.Tensor:
    """The whole image in one tile, `(1, 3, side, side)`."""
    return F.interpolate(image[None], size=(SIDE, SIDE), mode="bilinear", antialias=True)


def pad_images(images: list[torch.Tensor]) -> torch.Tensor:
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    return torch.stack([F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1])) for image in images])


def dense_inputs(tokens: int) -> Callable[[list[torch.Tensor]], Inputs]:
    """Images of one size, each standing for a number of tokens."""
    return lambda images: {**text_inputs([[IMAGE] * tokens] * len(images)), "pixel_values": torch.stack(images)}


def typed_inputs(images: list[torch.Tensor]) -> Inputs:
    """Dense images whose tokens see each other: they are marked by their type."""
    inputs = dense_inputs(4)(images)
    return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}


def prefix_inputs(images: list[torch.Tensor]) -> Inputs:
    """PaliGemma: image and prompt are of type 0, whose tokens all see each other; what is generated is of type 1."""
    inputs = dense_inputs(16)(images)
    return {**inputs, "token_type_ids": torch.zeros_like(inputs["input_ids"])}


def anyres_inputs(images: list[torch.Tensor]) -> Inputs:
    """LLaVA-NeXT: an overview and tiles; a token a patch and one at the end of each row of the whole."""
    tiles = [torch.cat([overview(image), cut(image)]) for image in images]
    count = max(map(len, tiles))
    patches = [(image.shape[1] // PATCH, image.shape[2] // PATCH) for image in images]
    return {
        **text_inputs([[IMAGE] * ((SIDE // PATCH) ** 2 + rows * (columns + 1)) for rows, columns in patches]),
        "pixel_values": torch.stack([F.pad(tile, (0, 0, 0, 0, 0, 0, 0, count - len(tile))) for tile in tiles]),
        "image_sizes": torch.tensor([image.shape[1:] for image in images]),
    }


def onevision_inputs(images: list[torch.Tensor]) -> Inputs:
    """LLaVA-OneVision: as LLaVA-NeXT, and how many images each sample has; only a single one is cut into tiles."""
    return {**anyres_inputs(images), "batch_num_images": torch.ones(len(images), dtype=torch.long)}


def tile_inputs(images: list[torch.Tensor]) -> Inputs:
    """InternVL and Aya Vision: tiles and then an overview, all samples' in one row; four tokens a tile."""
    tiles = [torch.cat([cut(image), overview(image)]) for image in images]
    return {**text_inputs([[IMAGE] * 4 * len(tile) for tile in tiles]), "pixel_values": torch.cat(tiles)}


def split_inputs(images: list[torch.Tensor]) -> Inputs:
    """Idefics 3: tiles and then an overview, samples padded with black tiles, and a mask of pixels."""
    tiles = [torch.cat([cut(image), overview(image)]) for image in images]
    count = max(map(len, tiles))
    pixel_values = torch.stack([F.pad(tile, (0, 0, 0, 0, 0, 0, 0, count - len(tile))) for tile in tiles])
    mask = torch.zeros(len(images), count, SIDE, SIDE, dtype=torch.long)
    for row, tile in zip(mask, tiles):
        row[: len(tile)] = 1
    tokens = [[IMAGE] * 4 * len(tile) for tile in tiles]
    return {**text_inputs(tokens), "pixel_values": pixel_values, "pixel_attention_mask": mask}


def strip_inputs(images: list[torch.Tensor]) -> Inputs:
    """MiniCPM-V: patches of all images side by side in one picture, and their grids; a token for 4 x 4 patches."""
    grids = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in images]
    patches = torch.cat([cut(image, PATCH) for image in images])
    return {
        **text_inputs([[IMAGE] * (rows * columns // 16) for rows, columns in grids]),
        "pixel_values": patches.permute(1, 2, 0, 3).flatten(2).unsqueeze(0),
        "target_sizes": torch.tensor(grids, dtype=torch.int32),
    }


def placed_inputs(images: list[torch.Tensor]) -> Inputs:
    """Gemma 4: rows of flat patches, colours last, padded to one length, and their columns and rows, -1 in padding."""
    inputs = flat_patch_inputs(images)
    shapes, mask = inputs.pop("spatial_shapes"), inputs.pop("pixel_attention_mask")
    places = torch.full((*mask.shape, 2), -1)
    for row, (height, width) in zip(places, shapes.tolist()):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        row[: height * width] = torch.stack([x, y], dim=-1).flatten(0, 1)
    types = (inputs["input_ids"] == IMAGE).long()
    return {**inputs, "image_position_ids": places, "mm_token_type_ids": types}


def merge_inputs(images: list[torch.Tensor]) -> Inputs:
    """VideoLLaMA 3: as Qwen2-VL with patches of one frame, and how far each image's patches are merged."""
    inputs = grid_inputs(images)
    del inputs["mm_token_type_ids"]
    pixel_values = inputs["pixel_values"].unflatten(1, (3, 2, PATCH, PATCH))[:, :, 0].flatten(1)
    return {**inputs, "pixel_values": pixel_values, "image_merge_sizes": torch.full((len(images),), 2)}


def row_major_inputs(images: list[torch.Tensor]) -> Inputs:
    """PaddleOCR-VL: square patches of all images row by row."""
    return {**grid_inputs(images), "pixel_values": torch.cat([cut(image, PATCH) for image in images])}


def decoder_inputs(images: list[torch.Tensor]) -> Inputs:
    """Florence-2: an encoder reads image and prompt, a decoder writes."""
    inputs = dense_inputs(17)(images)
    return {**inputs, "decoder_input_ids": torch.tensor([[EOS, 20, 21, 22, 23]] * len(images))}


def tiled_inputs(images: list[torch.Tensor]) -> Inputs:
    """Mllama: tiles of each image padded to four, the number of the way in which it was cut, and which text sees it."""
    layouts = [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]]
    tiles = [cut(image) for image in images]
    text = text_inputs([[IMAGE]] * len(images))
    mask = torch.tensor([[1] * len(tile) + [0] * (4 - len(tile)) for tile in tiles])
    numbers = [[layouts.index([image.shape[1] // SIDE, image.shape[2] // SIDE]) + 1] for image in images]
    seen = torch.zeros(*text["input_ids"].shape, 1, 4, dtype=torch.long)
    seen[:, 1:, 0] = mask.unsqueeze(1)  # all from the image token on
    return {
        **text,
        "pixel_values": torch.stack([F.pad(tile, (0, 0, 0, 0, 0, 0, 0, 4 - len(tile))) for tile in tiles]).unsqueeze(
            1
        ),
        "aspect_ratio_ids": torch.tensor(numbers),
        "aspect_ratio_mask": mask.unsqueeze(1),
        "cross_attention_mask": seen,
    }


def grid_inputs(images: list[torch.Tensor]) -> Inputs:
    """Qwen2-VL: patches of all images in one row, blocks of 2 x 2 together, each patch twice as for two frames."""
    patches, grids = [], []
    for image in images:
        rows, columns = image.shape[1] // PATCH, image.shape[2] // PATCH
        blocks = cut(image, PATCH).unflatten(0, (rows // 2, 2, columns // 2, 2)).transpose(1, 2).flatten(0, 3)
        patches.append(blocks.unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1))
        grids.append([1, rows, columns])
    text = text_inputs([[IMAGE] * (rows * columns // 4) for _, rows, columns in grids])
    return {
        **text,
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (text["input_ids"] == IMAGE).long(),
    }


def sized_inputs(images: list[torch.Tensor]) -> Inputs:
    """Pixtral: images padded to one size, and their sizes; a token for 2 x 2 patches."""
    return {
        **text_inputs([[IMAGE] * (image.shape[1] * image.shape[2] // (2 * PATCH) ** 2) for image in images]),
        "pixel_values": pad_images(images),
        "image_sizes": torch.tensor([image.shape[1:] for image in images]),
    }


def flat_patch_inputs(images: list[torch.Tensor]) -> Inputs:
    """NaFlex: rows of flat patches, colours last, padded to one length; a token for 2 x 2 patches."""
    rows = [cut(image, PATCH).permute(0, 2, 3, 1).flatten(1) for image in images]
    length = max(map(len, rows))
    shapes = [[image.shape[1] // PATCH, image.shape[2] // PATCH] for image in images]
    return {
        **text_inputs([[IMAGE] * (height * width // 4) for height, width in shapes]),
        "pixel_values": torch.stack([F.pad(row, (0, 0, 0, length - len(row))) for row in rows]),
        "pixel_attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows]),
        "spatial_shapes": torch.tensor(shapes),
    }


# Families -------------------------------------------------------------------------------------------------------------

LLAVA = {"vision_config": CLIP, "text_config": TEXT, "image_token_index": IMAGE}
PINPOINTS = {"image_grid_pinpoints": [[SIDE, 2 * SIDE], [3 * SIDE, SIDE]]}
GRID = {**SPECIAL, "image_token_id": IMAGE}
MROPE_TEXT = {name: value for name, value in TEXT.items() if name != "model_type"} | {"rope_parameters": MROPE}
GATED_DELTA = {
    **MROPE_TEXT,
    "rope_parameters": {**MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
QFORMER = {**VISION, "encoder_hidden_size": 32, "cross_attention_frequency": 1, "vocab_size": 99}

FAMILIES = {
    # dense images
    "llava": Family(config("llava", **LLAVA), dense_inputs(16), SQUARE),
    "vipllava": Family(config("vipllava", **LLAVA, vision_feature_layer=[-2, -3]), dense_inputs(16), SQUARE),
    "gemma3": Family(
        config(
            "gemma3",
            vision_config=SIGLIP,
            text_config={**TEXT, "model_type": "gemma3_text"},
            image_token_index=IMAGE,
            boi_token_index=10,
            eoi_token_index=11,
            mm_tokens_per_image=4,
        ),
        typed_inputs,
        SQUARE,
    ),
    "paligemma": Family(
        config(
            "paligemma",
            vision_config={**SIGLIP, "projection_dim": 32},
            text_config={**TEXT, "model_type": "gemma"},
            image_token_index=IMAGE,
            projection_dim=32,
        ),
        prefix_inputs,
        SQUARE,
    ),
    "blip-2": Family(
        config(
            "blip-2",
            vision_config=VISION,
            qformer_config=QFORMER,
            text_config={
                "model_type": "opt",
                "hidden_size": 32,
                "word_embed_proj_dim": 32,
                "ffn_dim": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "vocab_size": 99,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
            },
            num_query_tokens=4,
            image_token_index=IMAGE,
        ),
        dense_inputs(4),
        SQUARE,
    ),
    # tiles
    "llava_next": Family(config("llava_next", **LLAVA, **PINPOINTS), anyres_inputs, TILES),
    "llava_onevision": Family(
        config(
            "llava_onevision",
            vision_config=SIGLIP,
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_index=IMAGE,
            video_token_index=5,
            **PINPOINTS,
        ),
        onevision_inputs,
        TILES,
    ),
    "internvl": Family(
        config(
            "internvl",
            vision_config={**VISION, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]},
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_id=IMAGE,
        ),
        tile_inputs,
        TILES,
    ),
    "aya_vision": Family(
        config(
            "aya_vision", vision_config=SIGLIP, text_config={**TEXT, "model_type": "cohere2"}, image_token_index=IMAGE
        ),
        tile_inputs,
        TILES,
    ),
    "mllama": Family(
        config(
            "mllama",
            vision_config={
                **VISION,
                "num_global_layers": 2,
                "attention_heads": 2,
                "intermediate_layers_indices": [1, 2],
                "vision_output_dim": 96,
                "max_num_tiles": 4,
            },
            text_config={**TEXT, "model_type": "mllama_text_model", "cross_attention_layers": [1]},
            image_token_index=IMAGE,
        ),
        tiled_inputs,
        TILES,
    ),
    # images with a mask
    "idefics3": Family(
        config("idefics3", vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, scale_factor=2),
        split_inputs,
        TILES,
    ),
    "smolvlm": Family(
        config("smolvlm", vision_config=VISION, text_config=TEXT, image_token_id=IMAGE, scale_factor=2),
        split_inputs,
        TILES,
    ),
    # flat patches, padded
    "lfm2_vl": Family(
        config(
            "lfm2_vl",
            vision_config={
                "model_type": "siglip2_vision_model",
                **VISION,
                "num_patches": 64,
                "vision_use_head": False,
            },
            text_config={**TEXT, "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            image_token_id=IMAGE,
        ),
        flat_patch_inputs,
        UNEQUAL,
    ),
    # patches of all images in one row
    "qwen2_vl": Family(
        config("qwen2_vl", vision_config=GRID_VISION, text_config=MROPE_TEXT, **GRID), grid_inputs, UNEQUAL
    ),
    "qwen2_5_vl": Family(
        config(
            "qwen2_5_vl",
            vision_config={**GRID_VISION, "window_size": 32, "fullatt_block_indexes": [2]},
            text_config=MROPE_TEXT,
            **GRID,
        ),
        grid_inputs,
        ((80, 64), (48, 80)),  # several windows an image, cut at its edges
    ),
    "qwen3_vl": Family(
        config(
            "qwen3_vl",
            vision_config={**GRID_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            text_config=MROPE_TEXT,
            **GRID,
        ),
        grid_inputs,
        UNEQUAL,
    ),
    "qwen3_vl_moe": Family(
        config(
            "qwen3_vl_moe",
            vision_config={**GRID_VISION, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
            text_config={**MROPE_TEXT, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
            **GRID,
        ),
        grid_inputs,
        UNEQUAL,
    ),
    "qwen3_5": Family(
        config(
            "qwen3_5",
            vision_config={**GRID_VISION, "num_position_embeddings": 16},
            text_config=GATED_DELTA,
            **GRID,
        ),
        grid_inputs,
        UNEQUAL,
    ),
    "glm4v": Family(
        config(
            "glm4v",
            vision_config=GRID_VISION,
            text_config={**MROPE_TEXT, "rope_parameters": {**MROPE, "partial_rotary_factor": 1.0}},
            **GRID,
        ),
        grid_inputs,
        UNEQUAL,
    ),
    "mistral3": Family(
        config(
            "mistral3",
            vision_config={"model_type": "pixtral", **VISION, "image_size": 64},
            text_config={**TEXT, "model_type": "mistral"},
            image_token_index=IMAGE,
            spatial_merge_size=2,
            vision_feature_layer=-1,
        ),
        sized_inputs,
        ((32, 64), (48, 32)),
    ),
    "video_llama_3": Family(
        config(
            "video_llama_3",
            vision_config={name: value for name, value in VISION.items() if name != "image_size"},
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_id=IMAGE,
            video_token_id=5,
        ),
        merge_inputs,
        UNEQUAL,
    ),
    "paddleocr_vl": Family(
        config("paddleocr_vl", vision_config=VISION, text_config=MROPE_TEXT, **GRID), row_major_inputs, UNEQUAL
    ),
    # patches of all images in one strip, of which the encoder keeps every fourth
    "minicpmv4_6": Family(
        config(
            "minicpmv4_6",
            vision_config=VISION,
            text_config={
                **GATED_DELTA,
                "model_type": "qwen3_5_text",
            },
            image_token_id=IMAGE,
            video_token_id=5,
            insert_layer_id=1,
        ),
        strip_inputs,
        ((SIDE, 2 * SIDE), (SIDE, SIDE)),
    ),
    # patches with their places
    "gemma4": Family(
        config(
            "gemma4",
            vision_config={
                **VISION,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "pooling_kernel_size": 2,
                "position_embedding_size": 32,
            },
            text_config={
                **TEXT,
                "model_type": "gemma4_text",
                "layer_types": ["sliding_attention", "full_attention"],
                "global_head_dim": 16,
                "vocab_size_per_layer_input": 99,
                "hidden_size_per_layer_input": 8,
            },
            audio_config=None,
            image_token_id=IMAGE,
            video_token_id=5,
            boi_token_id=10,
            eoi_token_id=11,
            boa_token_id=12,
            eoa_token_index=13,
            audio_token_id=14,
        ),
        placed_inputs,
        UNEQUAL,
    ),
    # states in two dimensions
    "got_ocr2": Family(
        config(
            "got_ocr2",
            vision_config={
                **VISION,
                "image_size": 64,
                "mlp_dim": 64,
                "output_channels": 16,
                "window_size": 4,
                "global_attn_indexes": [1],
            },
            text_config={**TEXT, "model_type": "qwen2"},
            image_token_index=IMAGE,
        ),
        dense_inputs(4),
        ((64, 64), (64, 64)),
    ),
    # stages of different widths, and an encoder of text too
    "florence2": Family(
        config(
            "florence2",
            vision_config={
                "depths": [1, 3],
                "patch_size": [7, 3],
                "patch_stride": [4, 2],
                "patch_padding": [3, 1],
                "patch_prenorm": [False, True],
                "embed_dim": [16, 32],
                "num_heads": [2, 2],
                "num_groups": [2, 2],
                "window_size": 4,
                "projection_dim": 32,
            },
            text_config={
                "model_type": "bart",
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_attention_heads": 2,
                "decoder_attention_heads": 2,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 64,
                "max_position_embeddings": 64,
                "vocab_size": 99,
                "pad_token_id": PAD,
                "bos_token_id": BOS,
                "eos_token_id": EOS,
                "decoder_start_token_id": EOS,
                "forced_eos_token_id": None,
            },
            image_token_id=IMAGE,
        ),
        decoder_inputs,
        SQUARE,
    ),
}
