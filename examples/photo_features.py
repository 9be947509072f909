"""What photographs are alike by: pooled features of a model's image encoder, and a perceptual hash."""

import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image


HASH_SIDE, HASH_TERMS = 32, 8  # pixels a side that are looked at; frequencies a side, one bit each


@torch.inference_mode()
def pooled_features(model: Any, processor: Any, image: Image.Image) -> bytes:
    """
    The mean over all image tokens that an ASE model's language model would see: float16, little-endian.

    Raises:
        ValueError: if the base has no method for its image features.
    """
    # one by one: where the processor cuts images into tiles, several images could not be told apart again
    inputs = processor.image_processor(images=[image], return_tensors="pt")
    encode = getattr(model.model.mllm.base_model, "get_image_features", None)
    if encode is None:
        raise ValueError(f"{model.config.mllm_config.model_type} has no image features.")
    known = inspect.signature(encode).parameters
    inputs = {name: value for name, value in inputs.to(model.device, dtype=model.dtype).items() if name in known}
    features = model.get_image_features(**inputs, image_token_budget=1.0).pooler_output
    tokens = torch.cat([one.flatten(0, -2) for one in features]).float()
    return tokens.mean(0).cpu().numpy().clip(-65504, 65504).astype("<f2").tobytes()


def perceptual_hash(image: Image.Image) -> str:
    """
    64 bits in hexadecimal: which of the lowest frequencies of the light are above their median.

    The same picture in another size, format or slightly other light differs in few bits, another picture in about 32.
    """
    light = image.convert("L").resize((HASH_SIDE, HASH_SIDE), Image.Resampling.LANCZOS, reducing_gap=4)
    places, terms = np.arange(HASH_SIDE), np.arange(HASH_TERMS)
    cosines = np.cos(np.pi * (2 * places + 1) * terms[:, None] / (2 * HASH_SIDE))  # DCT-II, (terms, places)
    spectrum = (
        (cosines @ np.asarray(light, np.float64) @ cosines.T).flatten().round(6)
    )  # a flat picture has only zeros
    # NOTE: the mean light is no likeness, it would only move the median
    bits = spectrum > np.median(spectrum[1:])
    bits[0] = False
    return np.packbits(bits).tobytes().hex()


def hash_distance(first: str, second: str) -> int:
    """In how many of 64 bits two perceptual hashes differ."""
    return (int(first, 16) ^ int(second, 16)).bit_count()
