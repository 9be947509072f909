"""Photographs of one burst side by side: how sharp each is, how they were exposed, how the camera moved between them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from photo_files import Failure, read_photo
from PIL import ExifTags, Image


SIDE = 1024  # longest side in pixels at which frames are compared: noise counts little there, blur still shows
TILES = 8  # a side; sharpness is looked for in each
SHARPEST = 16  # of all tiles: a subject is sharp somewhere, its background need not be
BRACKET_EV = 0.6  # exposures of a burst differ less, of a bracket more: cameras step by 2/3 and more
SHIFT, SHIFT_STEP = 0.1, 0.04  # shares of a side: of a panorama's frames in all, and from each to the next
SHARPER, ELSEWHERE = 1.5, 0.12  # times as sharp, in this share of the places: focused elsewhere


@dataclass
class Exposure:
    """What EXIF says; `ev` is the light that was let in on a scale of stops, `bracket` what the camera was set to."""

    ev: float | None = None
    bias: float | None = None
    bracket: bool = False


@dataclass
class Look:
    """A photograph's light, `(height, width)` in 0..255, and exposure."""

    light: np.ndarray
    exposure: Exposure


def look_at(path: Path) -> Look | Failure:
    photo = read_photo(path)
    if isinstance(photo, Failure):
        return photo
    image = photo.image.convert("L")
    image.thumbnail((SIDE, SIDE), reducing_gap=3)
    if min(image.size) < 4 * TILES:  # a strip
        image = image.resize(tuple(max(length, 4 * TILES) for length in image.size))
    return Look(np.asarray(image), read_exposure(path))


def read_exposure(path: Path) -> Exposure:
    tags = ExifTags.Base
    try:
        with Image.open(path) as image:  # of raw files those that are TIFF inside, as most are
            exif = image.getexif().get_ifd(ExifTags.IFD.Exif)
    except Exception:  # Pillow raises nearly anything on broken EXIF
        return Exposure()
    seconds, aperture, bias = (
        number_in(exif.get(tag)) for tag in (tags.ExposureTime, tags.FNumber, tags.ExposureBiasValue)
    )
    speed = exif.get(tags.ISOSpeedRatings)
    speed = number_in(speed[0] if isinstance(speed, tuple) and speed else speed)
    ev = None
    if seconds and seconds > 0:
        # what is not told is taken to be the same for all of a burst
        ev = math.log2(seconds * max(speed or 100, 1) / max(aperture or 1, 0.1) ** 2)
    return Exposure(ev, bias, exif.get(tags.ExposureMode) == 2)


def number_in(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    return number if math.isfinite(number) else None  # cameras write 0/0 where they do not know


# Comparing -----------------------------------------------------------------------------------------------------------


def same_size(looks: list[Look]) -> list[np.ndarray]:
    """The light of all, at the size of the smallest: `(height, width)` in 0..255."""
    height, width = (min(look.light.shape[axis] for look in looks) for axis in (0, 1))
    images = [Image.fromarray(look.light).resize((width, height), Image.Resampling.LANCZOS) for look in looks]
    return [np.asarray(image, np.float32) for image in images]


def detail_of(light: np.ndarray) -> np.ndarray:
    """How strong the finest detail is, in each of `(TILES, TILES)` parts, over the contrast of the whole."""
    centre = light[1:-1, 1:-1]
    edges = 4 * centre - light[:-2, 1:-1] - light[2:, 1:-1] - light[1:-1, :-2] - light[1:-1, 2:]
    rows, columns = (size // TILES for size in edges.shape)
    parts = edges[: rows * TILES, : columns * TILES].reshape(TILES, rows, TILES, columns)
    return np.sqrt((parts**2).mean((1, 3))) / max(coarse(light).std(), 1)


def coarse(light: np.ndarray) -> np.ndarray:
    """`(4 * TILES, 4 * TILES)`: what is where, without detail."""
    return np.asarray(Image.fromarray(light).resize((4 * TILES, 4 * TILES), Image.Resampling.BOX))


def sharpness_of(lights: list[np.ndarray]) -> list[float]:
    """Of each frame, where it is sharpest; 1 is the sharpest of all."""
    strengths = [float(np.sort(detail_of(light).ravel())[-SHARPEST:].mean()) for light in lights]
    return [strength / max(*strengths, 1e-6) for strength in strengths]


def shift_between(first: np.ndarray, second: np.ndarray) -> tuple[float, float] | None:
    """How far the picture moved to the right and down, in shares of width and height; nothing if it cannot be told."""
    side = 256
    window = np.outer(np.hanning(side), np.hanning(side))
    small = [np.asarray(Image.fromarray(one).resize((side, side), Image.Resampling.BOX)) for one in (first, second)]
    spectra = [np.fft.rfft2((one - one.mean()) * window) for one in small]
    cross = spectra[1] * spectra[0].conj()
    peaks = np.fft.irfft2(cross / np.abs(cross).clip(1e-6), (side, side))
    place = np.unravel_index(peaks.argmax(), peaks.shape)
    if peaks[place] < 8 * peaks.std():  # no place stands out
        return None
    down, right = ((int(one) + side // 2) % side - side // 2 for one in place)
    # a subject that moved takes its own pixels along, a camera takes all
    shared = tuple(slice(max(0, -move), side - max(0, move)) for move in (down, right))
    back = np.roll(small[1], (-down, -right), (0, 1))
    if np.abs(back - small[0])[shared].mean() > np.abs(small[1] - small[0])[shared].mean():
        return None
    return right / side, down / side


# Sets that belong together -------------------------------------------------------------------------------------------


def why_whole(looks: list[Look], before_and_after: Callable[[], list[Look | None]]) -> str | None:
    """
    Why frames in the order of time are no burst of which one would do, as far as pictures and EXIF can tell.

    `before_and_after` are the photographs taken next to them, asked for only where they matter: of a panorama some
    frames look alike, and some do not.
    """
    lights = same_size(looks)
    why = exposed_apart(looks) or moved_sideways(lights) or focused_elsewhere(lights)
    if why is None and one_way(lights):
        before, after = before_and_after()
        for more in ([before, *looks], [*looks, after]):
            if None not in more:
                why = why or moved_sideways(same_size(more))
    return why


def exposed_apart(looks: list[Look]) -> str | None:
    exposures = [look.exposure for look in looks]
    if any(one.bracket for one in exposures):
        return "the camera was set to a bracket of exposures"
    for name, label in (("bias", "exposure corrections"), ("ev", "exposures")):
        values = [getattr(one, name) for one in exposures]
        told = [value for value in values if value is not None]
        if told and max(told) - min(told) >= BRACKET_EV:
            return f"{label} {max(told) - min(told):.1f} EV apart: a bracket, or light that changed"
    if all(one.ev is not None for one in exposures):
        return None
    means = [float(((look.light / 255.0) ** 2.2).mean()) for look in looks]
    apart = math.log2(max(max(means), 1e-4) / max(min(means), 1e-4))
    return f"brightness {apart:.1f} EV apart and no exposure in EXIF: perhaps a bracket" if apart >= 1 else None


def moved_sideways(lights: list[np.ndarray]) -> str | None:
    way = max(one_way(lights), default=0)
    return f"the view moves on by {way:.0%}: a panorama, or a camera that followed something" if way >= SHIFT else None


def one_way(lights: list[np.ndarray]) -> list[float]:
    """How far the view moved from the first to the last frame along an axis, in shares of it, if it always moved on."""
    steps = [shift_between(*pair) for pair in pairwise(lights)]
    if None in steps:
        return []
    moves = np.array(steps).T  # (2, n - 1)
    return [abs(float(one.sum())) for one in moves if (one >= SHIFT_STEP).all() or (one <= -SHIFT_STEP).all()]


def focused_elsewhere(lights: list[np.ndarray]) -> str | None:
    aligned = [lights[0]]
    for light in lights[1:]:
        right, down = shift_between(lights[0], light) or (0.0, 0.0)
        moved = (-round(down * light.shape[0]), -round(right * light.shape[1]))
        aligned.append(np.roll(light, moved, (0, 1)))
    details = np.stack([detail_of(light) for light in aligned])  # (n, TILES, TILES)
    places = np.stack([coarse(light) for light in aligned])
    apart = (places.max(0) - places.min(0)).reshape(TILES, 4, TILES, 4).mean((1, 3))
    # what moved is elsewhere, not out of focus; and where nothing has detail there is no focus
    told = (apart < 0.35 * places.std((1, 2)).mean()) & (details.max(0) > 0.15 * details.max())
    told[[0, -1]] = told[:, [0, -1]] = False  # what the frames do not share was rolled in there
    details = details[:, told]
    if details.shape[1] < TILES:
        return None
    for number, first in enumerate(details):
        for second in details[number + 1 :]:
            if min((first > SHARPER * second).mean(), (second > SHARPER * first).mean()) >= ELSEWHERE:
                return "sharp in different places: a focus stack, or focus that hunted"
    return None
