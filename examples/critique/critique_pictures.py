"""The photographs and cut-outs of the critique generator: reading them, framing a view, pasting a subject into it."""

import collections
import functools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from critique_captions import ASPECT_FAULTS
from PIL import Image, ImageFilter
from scipy.ndimage import gaussian_filter, map_coordinates


LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CODES = np.arange(256, dtype=np.float32) / 255
TO_LINEAR = np.where(_CODES <= 0.04045, _CODES / 12.92, ((_CODES + 0.055) / 1.055) ** 2.4).astype(np.float32)
# 16 k steps of linear light: sRGB is steep in the darks, fewer steps would show there as bands.
_LIGHT = np.arange(16384, dtype=np.float64) / 16383
TO_CODE = np.where(_LIGHT <= 0.0031308, _LIGHT * 12.92, 1.055 * _LIGHT ** (1 / 2.4) - 0.055).astype(np.float32)


MAP_SIZE = 32
MASK_SIZE, MASK_COLUMNS = 64, 16  # of the grid that `focus_masks.py` writes
PLACEMENTS = ASPECT_FAULTS["placement"]
# The least area of a subject as a share of the picture's.
SMALLEST_SUBJECT = 0.02
# Where the middle of a subject lies, as a share of the picture's width.
PLACES = {"subject_left_third": 1 / 3, "subject_right_third": 2 / 3, "subject_centred": 0.5}
# Points spread evenly over the unit disc.
_DISC = np.sqrt(np.arange(0.5, 200) / 200) * np.array(
    [np.cos(np.arange(200) * 2.39996), np.sin(np.arange(200) * 2.39996)]
)  # fmt: skip

MIDDLE_LUMA, USUAL_SPREAD, USUAL_CHROMA = 0.46, 0.21, 0.17


# Sources -------------------------------------------------------------------------------------------------------------


@dataclass
class Photo:
    """One photograph: `raw` as taken and `normal` with its light and colour brought to a common level (uint8 RGB).

    `box` is the subject's box in the photograph, in fractions of its width and height, when it is known, and `mask` what
    it covers, `(MASK_SIZE, MASK_SIZE)` in 0..1, of a photograph with a subject.
    `luma` and `detail` are 1/8-size maps of brightness and of fine gradient, by which crops are chosen cheaply.
    `kind` is one of KINDS, "" where that is unsure, and `level` whether a tilt of the photograph could be told.
    `axis` is where, as a fraction of the width, it mirrors itself fairly well, NaN where nowhere.
    """

    id: str
    subject: bool
    box: tuple[float, float, float, float] | None
    mask: np.ndarray | None
    raw: Image.Image
    normal: Image.Image
    luma: np.ndarray
    detail: np.ndarray
    kind: str = ""
    level: bool = False
    axis: float = math.nan


@dataclass
class LoadedSources:
    """The decoded photographs and cut-outs of one split. Pickles as its arguments: workers load their own."""

    directory: Path
    listing: Path
    split: str
    photos: list[Photo] = field(default_factory=list, repr=False)
    cutouts: list[tuple[str, Image.Image]] = field(default_factory=list, repr=False)
    cutout_kinds: dict[str, str] = field(default_factory=dict, repr=False)

    @functools.cached_property
    def backgrounds(self) -> list[Photo]:
        """Photographs without a subject of their own."""
        return [photo for photo in self.photos if not photo.subject]

    def draw_photo(self, composite: bool, rng: np.random.Generator) -> Photo:
        """A photograph, or a background for a cut-out; those of a rare kind come more often than their share."""
        pool = self.backgrounds if composite else self.photos
        return pool[rng.choice(len(pool), p=_chances([photo.kind for photo in pool]))]

    def draw_cutout(self, rng: np.random.Generator) -> tuple[str, Image.Image]:
        return self.cutouts[
            rng.choice(len(self.cutouts), p=_chances([self.cutout_kinds[id] for id, _ in self.cutouts]))
        ]

    def __reduce__(self):
        return load_sources, (self.split, self.directory, self.listing)


def _chances(kinds: list[str]) -> np.ndarray:
    """Chances by which a kind comes in proportion to the root of how often it is there."""
    counts = collections.Counter(kinds)
    chances = np.array([counts[kind] ** -0.5 for kind in kinds])
    return chances / chances.sum()


def load_sources(split: str, directory: Path | str | None = None, listing: Path | str | None = None) -> LoadedSources:
    """Decode and normalise one split's pictures.

    `directory` holds photos/<id>.jpg and cutouts/<id>.png, `listing` is the JSON file that says which belong to the
    split; both default to those of `critique_sources.py`. One process loads the same pictures once.
    """
    if directory is None or listing is None:
        import critique_sources

        directory = directory or critique_sources.sources_dir()
        listing = listing or critique_sources.MANIFEST
    return _load_sources(split, Path(directory), Path(listing))


@functools.lru_cache(maxsize=4)
def _load_sources(split: str, directory: Path, listing: Path) -> LoadedSources:
    if not (directory / "photos").is_dir():
        raise FileNotFoundError(
            f"{directory} has no photos/: run `python examples/critique/critique_sources.py` first"
        )
    entries = json.loads(listing.read_text(encoding="utf-8"))
    masks = read_masks(listing.with_name("critique_masks.png"), entries["photos"])
    sources = LoadedSources(directory, listing, split)
    for entry in entries["photos"]:
        if entry["split"] == split:
            photo = _load_photo(entry, directory / "photos" / f"{entry['id']}.jpg", masks.get(entry["id"]))
            if photo is not None:
                sources.photos.append(photo)
    for entry in entries["cutouts"]:
        if entry["split"] == split:
            with Image.open(directory / "cutouts" / f"{entry['id']}.png") as image:
                sources.cutouts.append((entry["id"], image.convert("RGBA")))
            sources.cutout_kinds[entry["id"]] = entry.get("kind", "")
    if not sources.backgrounds or not sources.cutouts:
        raise ValueError(
            f"split {split!r} of {listing} has {len(sources.backgrounds)} usable backgrounds and "
            f"{len(sources.cutouts)} cut-outs; it needs at least one of each"
        )
    return sources


def read_masks(path: Path, photos: list[dict]) -> dict[str, np.ndarray]:
    """What the subjects of the listed photographs cover, by id, each `(MASK_SIZE, MASK_SIZE)` in 0..1."""
    ids = [entry["id"] for entry in photos if entry.get("subject")]
    if not ids:
        return {}
    with Image.open(path) as image:
        grid = np.asarray(image.convert("L"), np.float32) / 255
    rows = grid.reshape(-1, MASK_SIZE, MASK_COLUMNS, MASK_SIZE).swapaxes(1, 2).reshape(-1, MASK_SIZE, MASK_SIZE)
    if len(rows) < len(ids):
        raise ValueError(f"{path} has {len(rows)} masks for {len(ids)} photographs: run `focus_masks.py` again.")
    return dict(zip(ids, rows))


def _load_photo(entry: dict, path: Path, mask: np.ndarray | None, softest: float = 0.45) -> Photo | None:
    """The photograph, or None where it is too soft to show that a blur was added."""
    with Image.open(path) as image:
        raw = image.convert("RGB")
    pixels = np.asarray(raw)
    normal = normalise(pixels)
    reduced = Image.fromarray(normal)
    reduced.thumbnail((400, 400))
    if acutance(np.asarray(reduced)) < softest:
        return None
    box = entry.get("box")
    if box is not None:
        box = tuple(np.divide(box, [*raw.size, *raw.size])) if max(box) > 1 else tuple(box)
    luma = normal.astype(np.float32) @ LUMA / 255
    detail = np.abs(luma[1:, 1:] - luma[:-1, 1:]) + np.abs(luma[1:, 1:] - luma[1:, :-1])
    normal, kind = Image.fromarray(normal), entry.get("kind", "")
    luma, detail, subject = _eighth(luma), _eighth(detail), bool(entry.get("subject"))
    level, axis = has_level(raw, kind), mirror_axis(luma)
    return Photo(entry["id"], subject, box, mask, raw, normal, luma, detail, kind, level, axis)


def _eighth(values: np.ndarray) -> np.ndarray:
    height, width = values.shape[0] // 8, values.shape[1] // 8
    return values[: height * 8, : width * 8].reshape(height, 8, width, 8).mean((1, 3))


LEVEL_KINDS = ("building", "landscape", "vehicle")


def has_level(photo: Image.Image, kind: str) -> bool:
    """Whether an upright photograph shows by what it is level: a horizon or walls. Other kinds of subject have none."""
    return kind in (*LEVEL_KINDS, "") and level_edges(photo) > (1.7 if kind else 3.0)


def level_edges(photo: Image.Image) -> float:
    """How much of the clear straight edges lies within 4 degrees of level or plumb: 1 for as much as by chance."""
    small = photo.convert("L")
    small.thumbnail((400, 400))
    luma = gaussian_filter(np.asarray(small).astype(np.float32) / 255, 1.0)
    down, across = np.gradient(luma)
    xx, yy, xy = (gaussian_filter(values, 2.0) for values in (across**2, down**2, across * down))
    coherence = np.hypot(xx - yy, 2 * xy) / (xx + yy + 1e-5)
    degrees = np.degrees(np.arctan2(2 * xy, xx - yy)) / 2
    weights = np.sqrt(xx + yy) * (coherence > 0.8)
    off = np.abs((degrees + 45) % 90 - 45)
    return float(weights[off < 4].sum() / (weights.sum() + 1e-6) / (4 / 45))


def mirror_likeness(luma: np.ndarray) -> float:
    """Correlation (-1..1) of a picture's brightness with its mirror image; 0 for one without contrast."""
    values = np.asarray(Image.fromarray(luma.astype(np.float32)).resize((24, 24), Image.Resampling.BOX))
    values = values - values.mean(1, keepdims=True)  # a bright sky alone is no symmetry
    power = float((values**2).mean())
    return float((values * values[:, ::-1]).mean()) / power if power > 0.02**2 else 0.0


def mirror_axis(luma: np.ndarray) -> float:
    """Where, as a fraction of its width, a photograph mirrors itself best; NaN where that is not well."""
    best, width = (0.5, math.nan), luma.shape[1]
    for axis in np.linspace(0.35, 0.65, 13):
        half = int(min(axis, 1 - axis) * width)
        middle = round(float(axis) * width)
        best = max(best, (mirror_likeness(luma[:, max(0, middle - half) : middle + half]), float(axis)))
    return best[1]


def normalise(pixels: np.ndarray) -> np.ndarray:
    """A photograph (uint8 RGB) at medium brightness, contrast, balance and chroma: without a fault yet."""
    linear = TO_LINEAR[pixels]
    # Part of the way to grey only, so that a sunset stays warm; less between green and magenta, where no cast is
    # ever added and where a meadow would turn everything else pink.
    red, green, blue = np.log2(linear[::4, ::4].mean((0, 1)) + 1e-3)
    warmth = float(np.clip(0.7 * (blue - red) / 2, -0.8, 0.8))
    tint = float(np.clip(0.2 * ((red + blue) / 2 - green), -0.3, 0.3))
    codes = to_code(linear * np.exp2(np.array([warmth, tint, -warmth], np.float32)))
    luma = codes @ LUMA
    chroma = codes - luma[..., None]
    low, high = np.percentile(luma[::2, ::2], (0.3, 99.7))
    toned = np.clip((luma - low) / max(high - low, 0.3), 0, 1) * 0.94 + 0.03
    for _ in range(3):  # repeated: the mean of a power is not the power of the mean
        toned **= np.float32(np.clip(math.log(MIDDLE_LUMA) / math.log(float(toned.mean())), 0.5, 2.0))
    mean, spread = float(toned.mean()), float(toned.std())
    toned = _contrast(toned, mean, float(np.clip(USUAL_SPREAD / max(spread, 0.02), 0.75, 1.6)))
    chroma *= ((toned + 0.05) / (luma + 0.05))[..., None] ** 0.6
    level = float(chroma_level(chroma))
    chroma *= float(np.clip((USUAL_CHROMA / max(level, 1e-3)) ** 0.8, 0.5, 1.8))
    return to_bytes(toned[..., None] + chroma * _gamut_room(toned, chroma)[..., None])


def _contrast(luma: np.ndarray, mean: float, factor: float) -> np.ndarray:
    """Contrast about the mean with shoulders in place of clipping."""
    room = np.where(luma > mean, np.float32(1 - mean), np.float32(mean))
    return mean + room * np.tanh((luma - mean) * factor / room)


def _gamut_room(luma: np.ndarray, chroma: np.ndarray) -> np.ndarray:
    """The largest share (0..1) of each pixel's chroma that stays inside the range of codes."""
    above = (1 - luma) / np.maximum(largest(chroma), 1e-4)
    below = luma / np.maximum(-smallest(chroma), 1e-4)
    return np.clip(np.minimum(above, below), 0, 1)


def chroma_level(values: np.ndarray) -> float:
    """Mean distance between the largest and the smallest channel: 0 for grey, about 0.2 for an ordinary photograph."""
    return float((largest(values) - smallest(values)).mean())


def largest(values: np.ndarray) -> np.ndarray:
    """Over the channels. NumPy's own reduction over a last axis of three is ten times slower."""
    return np.maximum(np.maximum(values[..., 0], values[..., 1]), values[..., 2])


def smallest(values: np.ndarray) -> np.ndarray:
    return np.minimum(np.minimum(values[..., 0], values[..., 1]), values[..., 2])


def to_code(linear: np.ndarray) -> np.ndarray:
    """Linear light, clipped to 0..1, as sRGB codes 0..1."""
    steps = np.clip(linear, 0, 1)
    steps *= 16383
    return TO_CODE[steps.astype(np.uint16)]


def to_bytes(codes: np.ndarray) -> np.ndarray:
    return (np.clip(codes, 0, 1) * 255 + 0.5).astype(np.uint8)


def acutance(pixels: np.ndarray) -> float:
    """How steep the steepest edges are: the step over one pixel as a share of the step over four (0..1)."""
    luma = pixels.astype(np.float32) @ LUMA
    near = np.abs(luma[:, 1:] - luma[:, :-1])
    far = np.abs(luma[:, 4:] - luma[:, :-4])
    top = max(8, near.size // 200)
    return float(np.partition(near, -top, None)[-top:].mean() / (np.partition(far, -top, None)[-top:].mean() + 1e-3))


# Geometry ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Framing:
    """Which part of a photograph a canvas shows: `crop` (left, top, right, bottom in pixels of the photograph),
    turned by `degrees` about its middle, mirrored, at `size` (width, height) pixels cut from `inner` ones, scaled by
    the filter `resample`."""

    crop: tuple[float, float, float, float]
    size: tuple[int, int]
    inner: tuple[int, int]
    degrees: float
    mirrored: bool
    resample: Image.Resampling = Image.Resampling.BICUBIC

    @property
    def slope(self) -> float:
        """Degrees by which what was level runs down toward the right of the canvas."""
        return -self.degrees if self.mirrored else self.degrees

    def render(self, image: Image.Image) -> Image.Image:
        canvas = image.resize(self.inner, self.resample, box=self.crop, reducing_gap=3.0)
        if self.degrees:
            canvas = turned(canvas, self.degrees, self.size)
        return canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.mirrored else canvas

    def to_photo(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions on the canvas (fractions of its sides) as positions in the photograph (pixels)."""
        x = (0.5 - x if self.mirrored else x - 0.5) * self.size[0]
        y = (y - 0.5) * self.size[1]
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        left, top, right, bottom = self.crop
        scale = (right - left) / self.inner[0]
        return (left + right) / 2 + (cos * x + sin * y) * scale, (top + bottom) / 2 + (cos * y - sin * x) * scale

    def to_canvas(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The inverse of `to_photo`."""
        left, top, right, bottom = self.crop
        scale = self.inner[0] / (right - left)
        x, y = (x - (left + right) / 2) * scale, (y - (top + bottom) / 2) * scale
        cos, sin = math.cos(math.radians(self.degrees)), math.sin(math.radians(self.degrees))
        x, y = (cos * x - sin * y) / self.size[0], (sin * x + cos * y) / self.size[1]
        return (0.5 - x if self.mirrored else x + 0.5), y + 0.5


def turned(image: Image.Image, degrees: float, size: tuple[int, int]) -> Image.Image:
    """The picture turned about its middle, cut or filled (with zeros) to `size`."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = size[0] / 2, size[1] / 2
    start = (image.width / 2 - cos * x - sin * y, image.height / 2 + sin * x - cos * y)
    matrix = (cos, sin, start[0], -sin, cos, start[1])
    return image.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


def draw_framing(photo: Photo, degrees: float, long_side: int, rng: np.random.Generator) -> Framing:
    """A crop of 60-100 % that shows enough detail and medium brightness and, of a photograph whose subject is known,
    one drawn placement, if a few tries find such a crop; one that mirrors itself now and then about its axis.

    The photograph is never enlarged where that can be helped: enlarging would look like a blur.
    """
    wanted = PLACEMENTS[rng.choice(len(PLACEMENTS), p=(0.2, 0.3, 0.3, 0.2))] if photo.box is not None else ""
    axis = photo.axis if rng.random() < 0.35 else math.nan
    wanted = wanted if math.isnan(axis) else ""
    best, best_cost = None, math.inf
    for _ in range(16 if wanted else 6):
        framing = _draw_framing(photo, degrees, long_side, axis, rng)
        cost = _framing_cost(photo, framing)
        if wanted:
            cost += {wanted: 0.0, "": 0.1}.get(box_placement(photo, framing)[0], 0.15)
        if cost < best_cost:
            best, best_cost = framing, cost
        if cost == 0:
            break
    return best


def _draw_framing(photo: Photo, degrees: float, long_side: int, axis: float, rng: np.random.Generator) -> Framing:
    ratio = math.exp(rng.uniform(0, math.log(1.5)))
    wide = photo.raw.width >= photo.raw.height
    if rng.random() < 0.25:
        wide = not wide
    size = (long_side, round(long_side / ratio)) if wide else (round(long_side / ratio), long_side)
    cos, sin = math.cos(math.radians(degrees)), abs(math.sin(math.radians(degrees)))
    inner = (math.ceil(size[0] * cos + size[1] * sin), math.ceil(size[0] * sin + size[1] * cos))
    widest = min(photo.raw.width / inner[0], photo.raw.height / inner[1])  # pixels of the photograph per canvas pixel
    scale = max(widest * rng.uniform(0.6, 1.0), min(widest, 1.0))
    width, height = inner[0] * scale, inner[1] * scale
    left = rng.uniform(0, 1) * max(0, photo.raw.width - width)
    if not math.isnan(axis):
        left = min(max(axis * photo.raw.width - width / 2, 0), max(0, photo.raw.width - width))
    top = rng.uniform(0, 1) * max(0, photo.raw.height - height)
    crop = (left, top, min(left + width, photo.raw.width), min(top + height, photo.raw.height))
    mirrored, resample = bool(rng.random() < 0.5), _FILTERS[rng.choice(4, p=(0.2, 0.4, 0.3, 0.1))]
    return Framing(crop, size, inner, degrees, mirrored, resample)


_FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS, Image.Resampling.HAMMING)


def _framing_cost(photo: Photo, framing: Framing) -> float:
    """0 for a crop that will do: neither enlarged nor empty nor all dark or bright."""
    left, top, right, bottom = (int(edge / 8) for edge in framing.crop)
    luma, detail = (values[top : bottom + 1, left : right + 1] for values in (photo.luma, photo.detail))
    enlarged = framing.inner[0] / (framing.crop[2] - framing.crop[0])
    off_middle = abs(float(luma.mean()) - MIDDLE_LUMA)
    return max(0, enlarged - 1.05) + max(0, off_middle - 0.08) + 20 * max(0, 0.03 - float(detail.mean()))


def box_placement(photo: Photo, framing: Framing) -> tuple[str, float]:
    """Placement of a photograph's own subject ("" where it is unclear) and the share of it that is in the frame."""
    left, top, right, bottom = photo.box
    x, y = framing.to_canvas(
        ((left + right) / 2 + _DISC[0] * (right - left) / 2) * photo.raw.width,
        ((top + bottom) / 2 + _DISC[1] * (bottom - top) / 2) * photo.raw.height,
    )
    seen = float(((x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)).mean())
    middle, height = float(x.mean()), float(y.mean())
    if min(photo.box) < 0.01 or max(photo.box) > 0.99:
        return "", seen  # the photograph itself may cut the subject off
    if 0.55 <= seen <= 0.85 and min(middle, 1 - middle, 1 - height) < 0.25:
        return "subject_near_edge", seen
    if seen > 0.98:
        for placement, place in PLACES.items():
            if abs(middle - place) < 0.06:
                return placement, seen
    return "", seen


def subject_map(photo: Photo, framing: Framing) -> np.ndarray:
    """What a photograph's own subject covers of the canvas, as float32 `(MAP_SIZE, MAP_SIZE)` in 0..1."""
    steps = (np.arange(4 * MAP_SIZE, dtype=np.float32) + 0.5) / (4 * MAP_SIZE)
    x, y = framing.to_photo(*np.meshgrid(steps, steps))
    columns, rows = x / photo.raw.width * MASK_SIZE - 0.5, y / photo.raw.height * MASK_SIZE - 0.5
    inside = (np.minimum(columns, rows) > -1) & (np.maximum(columns, rows) < MASK_SIZE)
    seen = map_coordinates(photo.mask, (rows, columns), order=1, mode="nearest") * inside
    return seen.reshape(MAP_SIZE, 4, MAP_SIZE, 4).mean((1, 3)).astype(np.float32)


def subject_coverage(photo: Photo, framing: Framing) -> np.ndarray:
    """What a photograph's own subject covers of the canvas, as float32 `(height, width)` in 0..1 with a soft edge."""
    width, height = framing.size
    across = (np.arange(0, width, 4, dtype=np.float32) + 2) / width
    down = (np.arange(0, height, 4, dtype=np.float32) + 2) / height
    x, y = framing.to_photo(*np.meshgrid(across, down))
    columns, rows = x / photo.raw.width * MASK_SIZE - 0.5, y / photo.raw.height * MASK_SIZE - 0.5
    inside = (np.minimum(columns, rows) > -1) & (np.maximum(columns, rows) < MASK_SIZE)
    seen = map_coordinates(photo.mask, (rows, columns), order=1, mode="nearest") * inside
    seen = np.clip((seen.astype(np.float32) - 0.25) / 0.5, 0, 1)  # the mask's own edge is wide
    return np.asarray(Image.fromarray(seen).resize(framing.size, Image.Resampling.BILINEAR))


def defocused(canvas: Image.Image, coverage: np.ndarray, fault: str, strength: float) -> Image.Image:
    """A photograph whose ground ("background_blurred") or subject is put out of focus, as `place_cutout` does it."""
    short_side, pixels = min(canvas.size), np.asarray(canvas).astype(np.float32) / 255
    if fault == "background_blurred":
        layer, sigma = 1 - coverage, min(0.015 * strength, 0.035) * short_side
    else:
        layer, sigma = coverage, min(0.012 * strength, 0.03) * short_side
    # Each layer is blurred by itself, so that the sharp one leaves no halo in the other.
    premultiplied = np.concatenate([pixels * layer[..., None], layer[..., None]], -1)
    soft = np.asarray(Image.fromarray(to_bytes(premultiplied), "RGBA").filter(ImageFilter.GaussianBlur(sigma)))
    soft = soft.astype(np.float32) / 255
    colour, spread = soft[..., :3] / np.maximum(soft[..., 3:], 1 / 64), soft[..., 3:]
    share = layer[..., None] if fault == "background_blurred" else np.maximum(spread, layer[..., None] * 0.9)
    return Image.fromarray(to_bytes(share * colour + (1 - share) * pixels))


# Composites ----------------------------------------------------------------------------------------------------------


def place_cutout(
    canvas: Image.Image, cutout: Image.Image, faults: dict[str, float], degrees: float, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray, float]:
    """The canvas with the cut-out in it as `faults` say; returns the picture, the coverage (float32, 0..1, the
    canvas's height and width) and the subject's long side as a share of the canvas's."""
    placement = next(fault for fault in faults if fault in PLACEMENTS)
    subject = _sized(cutout, canvas.size, placement, degrees + rng.uniform(-2, 2), rng)
    share = max(subject.size) / max(canvas.size)
    colour, alpha = _matched(subject, canvas)
    short_side = min(canvas.size)
    if "background_blurred" in faults:
        sigma = min(0.015 * faults["background_blurred"], 0.035) * short_side
        canvas = canvas.filter(ImageFilter.GaussianBlur(sigma))
    layer = np.concatenate([colour * alpha[..., None], alpha[..., None]], -1)
    if "subject_blurred" in faults:
        sigma = min(0.012 * faults["subject_blurred"], 0.03) * short_side
        layer = _blurred_layer(layer, sigma)
    left, top = _position(layer[..., 3], canvas.size, placement, rng)
    pixels = np.asarray(canvas).astype(np.float32) / 255
    if rng.random() < 0.4:
        pixels *= _contact_shadow(layer[..., 3], left, top, canvas.size, rng.uniform(0.25, 0.5))[..., None]
    window, coverage = _window(layer, left, top, canvas.size), np.zeros(pixels.shape[:2], np.float32)
    rows, columns = slice(max(top, 0), top + layer.shape[0]), slice(max(left, 0), left + layer.shape[1])
    coverage[rows, columns] = window[..., 3]
    pixels[rows, columns] *= 1 - window[..., 3:]
    pixels[rows, columns] += window[..., :3]
    return Image.fromarray(to_bytes(pixels)), coverage, share


def _sized(
    cutout: Image.Image, size: tuple[int, int], placement: str, degrees: float, rng: np.random.Generator
) -> Image.Image:
    """The cut-out at 22-60 % of the canvas's long side, or more where it is so thin that it would hardly be seen, never
    enlarged by more than 1.3; mirrored and turned."""
    scale = rng.uniform(0.22, 0.6) * max(size) / max(cutout.size)
    area = np.asarray(cutout.getchannel("A"))[::4, ::4].mean() / 255 * cutout.width * cutout.height
    scale = max(scale, math.sqrt(SMALLEST_SUBJECT * size[0] * size[1] / max(area, 1)))
    widest = 0.56 if "third" in placement else 0.8
    scale = min(scale, 1.3, widest * size[0] / cutout.width, 0.82 * size[1] / cutout.height)
    width, height = max(8, round(cutout.width * scale)), max(8, round(cutout.height * scale))
    subject = cutout.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3.0)
    if rng.random() < 0.5:
        subject = subject.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cos, sin = math.cos(math.radians(degrees)), abs(math.sin(math.radians(degrees)))
    bounds = (math.ceil(width * cos + height * sin) + 4, math.ceil(width * sin + height * cos) + 4)
    return turned(subject, degrees, bounds)


def _matched(subject: Image.Image, canvas: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Colour (0..1) and soft-edged alpha of a cut-out whose light is moved toward the background's."""
    colour = np.asarray(subject)[..., :3].astype(np.float32) / 255
    alpha = np.asarray(subject.getchannel("A").filter(ImageFilter.GaussianBlur(1.0))).astype(np.float32) / 255
    alpha = np.clip((alpha - 0.3) / 0.65, 0, 1)
    inside, around = colour[alpha > 0.5], np.asarray(canvas)[::3, ::3].astype(np.float32) / 255
    if not len(inside):
        return colour, alpha
    luma, luma_inside, luma_around = colour @ LUMA, inside @ LUMA, around @ LUMA
    mean, mean_around = float(luma_inside.mean()), float(luma_around.mean())
    factor = (float(luma_around.std()) + 0.02) / (float(luma_inside.std()) + 0.02)
    toned = _contrast(luma, mean, float(np.clip(factor**0.5, 0.7, 1.4))) + 0.5 * (mean_around - mean)
    chroma = colour - luma[..., None]
    level = (chroma_level(around) + 0.02) / (chroma_level(inside) + 0.02)
    chroma *= float(np.clip(level**0.4, 0.6, 1.5))
    tint = (around - luma_around[..., None]).mean((0, 1)) - (inside - luma_inside[:, None]).mean(0)
    chroma += 0.25 * tint
    return np.clip(toned[..., None] + chroma, 0, 1), alpha


def _blurred_layer(layer: np.ndarray, sigma: float) -> np.ndarray:
    """A premultiplied layer out of focus, with room for its edges to spread."""
    margin = math.ceil(2.5 * sigma)
    padded = np.pad(layer, ((margin, margin), (margin, margin), (0, 0)))
    # NOTE RGBA here is only four channels to Pillow's filter, which blurs each alone: right for premultiplied colour.
    image = Image.fromarray(to_bytes(padded), "RGBA").filter(ImageFilter.GaussianBlur(sigma))
    return np.asarray(image).astype(np.float32) / 255


def _position(alpha: np.ndarray, size: tuple[int, int], placement: str, rng: np.random.Generator) -> tuple[int, int]:
    """Left and top of a layer on a canvas, by the middle of its visible part."""
    columns, rows = alpha.max(0) > 0.3, alpha.max(1) > 0.3
    first_x, last_x = int(columns.argmax()), len(columns) - int(columns[::-1].argmax())
    first_y, last_y = int(rows.argmax()), len(rows) - int(rows[::-1].argmax())
    weights = alpha.sum(0)
    middle_x = float(weights @ np.arange(len(weights)) / weights.sum()) if "edge" not in placement else first_x
    width, height = last_x - first_x, last_y - first_y
    top = rng.uniform(0.42, 0.65) * size[1] - (first_y + last_y) / 2
    top = min(max(top, 0.03 * size[1] - first_y), 0.98 * size[1] - last_y)
    if placement == "subject_near_edge":
        edge, outside = rng.choice(("left", "right", "bottom")), rng.uniform(0.15, 0.4)
        if edge == "bottom":
            left = rng.uniform(0.25, 0.75) * size[0] - (first_x + last_x) / 2
            return round(min(max(left, -first_x), size[0] - last_x)), round(size[1] - (1 - outside) * height - first_y)
        left = -outside * width if edge == "left" else size[0] - (1 - outside) * width
        return round(left - first_x), round(top)
    left = (PLACES[placement] + rng.uniform(-0.045, 0.045)) * size[0] - middle_x
    return round(min(max(left, 2 - first_x), size[0] - 2 - last_x)), round(top)


def _contact_shadow(alpha: np.ndarray, left: int, top: int, size: tuple[int, int], depth: float) -> np.ndarray:
    """Factors (canvas height, width) that darken a soft ellipse under the layer's lower end."""
    rows, columns = np.flatnonzero(alpha.max(1) > 0.3), np.flatnonzero(alpha.max(0) > 0.3)
    if not len(rows):  # a thin cut-out, blurred away
        return np.ones((size[1], size[0]), np.float32)
    half = 0.5 * (columns[-1] - columns[0] + 1)
    x = (np.arange(size[0], dtype=np.float32) - left - columns[0] - half) / (1.15 * half)
    y = (np.arange(size[1], dtype=np.float32) - top - rows[-1]) / (0.2 * half + 3)
    return 1 - depth * np.exp(-2 * x[None] ** 2 - 2 * y[:, None] ** 2)


def _window(layer: np.ndarray, left: int, top: int, size: tuple[int, int]) -> np.ndarray:
    """The part of the layer that lies on the canvas."""
    return layer[max(0, -top) : size[1] - top, max(0, -left) : size[0] - left]
