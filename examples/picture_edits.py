"""Corrections of photographs, as tables of tones or a turn, and crops around what is salient."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image


CODES = np.arange(256) / 255
LINEAR = np.where(CODES <= 0.04045, CODES / 12.92, ((CODES + 0.055) / 1.055) ** 2.4)  # of each 8-bit sRGB code


def with_tones(image: Image.Image, *channels: np.ndarray) -> Image.Image:
    """RGB by a table of 256 sRGB values in 0..1 for each channel."""
    return image.point((255 * np.concatenate(channels)).round().clip(0, 255).astype(int).tolist())


def encode(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def expose(image: Image.Image, stops: float) -> Image.Image:
    """As much more light, in EV; less if negative. What was clipped has no detail to come back: it turns grey."""
    return with_tones(image, *[encode(LINEAR * 2**stops)] * 3)


def warm(image: Image.Image, stops: float) -> Image.Image:
    """More red and as much less blue, in EV; cooler if negative."""
    return with_tones(image, encode(LINEAR * 2**stops), encode(LINEAR), encode(LINEAR * 2**-stops))


def contrast(image: Image.Image, factor: float) -> Image.Image:
    """Tones farther from their mean by a factor; nearer below 1."""
    middle = np.asarray(image.convert("L")).mean() / 255
    return with_tones(image, *[middle + (CODES - middle) * factor] * 3)


def turn(image: Image.Image, degrees: float) -> Image.Image:
    """Turned to the left, in its old proportions, without the empty corners."""
    width, height = image.size
    angle = math.radians(abs(degrees))
    scale = 1 / (math.cos(angle) + max(width / height, height / width) * math.sin(angle))
    turned = image.rotate(degrees, Image.Resampling.BICUBIC)
    left, top = math.ceil(width * (1 - scale) / 2), math.ceil(height * (1 - scale) / 2)
    return turned.crop((left, top, width - left, height - top))


# Each kind of correction with the strengths that are tried
CORRECTIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], list[float]]] = {
    "exposure_ev": (expose, [-1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0]),
    "warmth_ev": (warm, [-0.45, -0.3, -0.15, 0.15, 0.3, 0.45]),
    "contrast": (contrast, [0.7, 0.85, 1.2, 1.4, 1.7]),
    "straighten_degrees": (turn, [-5.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 5.0]),
}


def corrected(image: Image.Image, kind: str, strength: float) -> Image.Image:
    correct, _ = CORRECTIONS[kind]
    return correct(image, strength)


# Crops ---------------------------------------------------------------------------------------------------------------

# Of 255, between places a 32nd of the picture apart: grain and vignettes stay below, photographs at -5 EV do not
FEATURELESS_STEP = 8


@dataclass
class Crop:
    """
    The largest crop of some proportions that keeps most of what is salient.

    `box` is left, top, right, bottom in shares of width and height; `inside` and `centred` are the shares of the saliency
    map's mass in it and in the crop from the middle.
    """

    box: tuple[float, float, float, float]
    inside: float
    centred: float


def is_featureless(image: Image.Image) -> bool:
    """A bare wall, an empty sky, a lens cap: tones are even, or drift slowly."""
    coarse = np.asarray(image.convert("RGB").resize((32, 32), Image.Resampling.BOX), np.float32)  # without its grain
    steps = [np.abs(np.diff(coarse, axis=axis)).max(axis=2).ravel() for axis in (0, 1)]
    return float(np.percentile(np.concatenate(steps), 99)) < FEATURELESS_STEP


def salient_crop(heat: np.ndarray, ratio: float) -> Crop | None:
    """
    Args:
        heat: Saliency `(height, width)` of the photograph, at its proportions, at least 0.
        ratio: Width by height. Nothing is returned where the photograph has it already.
    """
    height, width = heat.shape
    inner = (min(height, round(width / ratio)), min(width, round(height * ratio)))
    axis = 0 if inner[0] < height else 1
    length, side = heat.shape[axis], inner[axis]
    if length == side:
        return None
    mass = heat.sum(1 - axis, dtype=np.float64)
    if mass.sum() == 0:
        mass = np.ones(length)
    sums = np.concatenate([[0], np.cumsum(mass / mass.sum())])
    inside = sums[side:] - sums[:-side]  # (length - side + 1,), by where the crop begins
    centre = (length - side) // 2
    # of equally good ones that nearest to the middle
    start = min(np.flatnonzero(inside >= inside.max() - 1e-9), key=lambda place: abs(place - centre))
    box = [0.0, 0.0, 1.0, 1.0]
    box[1 - axis], box[3 - axis] = start / length, (start + side) / length
    return Crop(tuple(map(float, box)), float(inside[start]), float(inside[centre]))


def cut(image: Image.Image, box: tuple[float, float, float, float]) -> Image.Image:
    """The part of an image in a box of shares, as `Crop` has it."""
    scales = (image.width, image.height, image.width, image.height)
    return image.crop(tuple(round(share * scale) for share, scale in zip(box, scales)))
