"""The photometric edits of the critique generator: what a picture is like, and the many ways a fault comes about.

The same fault is made in several ways, as cameras and editors make it. Each is brought to the same visible change as
the plainest one, on the picture itself: the same mean luma after a change of exposure, the same spread after one of
contrast, the same mean shift of colour after a cast, the same mean chroma after one of saturation, the same mean
deviation of noise, the same light lost in the corners, and the same variance of the spot of a blur.
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from critique_pictures import (
    LUMA,
    MIDDLE_LUMA,
    TO_LINEAR,
    USUAL_SPREAD,
    chroma_level,
    largest,
    smallest,
    to_bytes,
    to_code,
)
from PIL import Image, ImageFilter
from scipy import fft


# What a canvas is like -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """Figures of a canvas before faults are added, in codes 0..1.

    `corners` is the brightness of the brightest corner over that of the middle, `detail` the mean step between
    neighbouring pixels, and `sharp_share` the share of the picture that has such steps: low in fog, in the sky and in
    a background out of focus. `floor` is the step in the smoothest parts, where it is grain.
    """

    luma: float
    spread: float
    chroma: float
    warmth: float
    corners: float
    detail: float
    sharp_share: float
    floor: float
    hue: str
    brightest: str


SHARP_STEP = 0.016  # mean step between neighbouring pixels of a block that is in focus


def measure(canvas: Image.Image) -> Measures:
    coarse = np.asarray(canvas)[::4, ::4].astype(np.float32) / 255
    luma = coarse @ LUMA
    blocks = step_blocks(canvas)
    height, width = luma.shape
    ends_y, ends_x = (slice(height // 8), slice(-height // 8, None)), (slice(width // 8), slice(-width // 8, None))
    brightest_corner = max(float(luma[y, x].mean()) for y in ends_y for x in ends_x)
    middle = luma[height // 4 : -height // 4, width // 4 : -width // 4]
    means = coarse.mean((0, 1))
    return Measures(
        luma=float(luma.mean()),
        spread=float(luma.std()),
        chroma=chroma_level(coarse),
        warmth=float(means[0] - means[2]),
        corners=brightest_corner / (float(middle.mean()) + 1e-3),
        detail=float(blocks.mean()),
        sharp_share=float((blocks > SHARP_STEP).mean()),
        floor=float(np.percentile(blocks, 8)),
        hue=_leading_hue(coarse),
        brightest=_brightest(luma),
    )


def step_blocks(canvas: Image.Image) -> np.ndarray:
    """Mean step (0..1) between neighbours in a row, in blocks of 16x16 pixels, `(rows, columns)`."""
    rows = np.asarray(canvas.convert("L"))[::2].astype(np.int16)
    steps = np.abs(rows[:, 1:] - rows[:, :-1])
    height, width = steps.shape[0] // 8 * 8, steps.shape[1] // 16 * 16
    return steps[:height, :width].reshape(height // 8, 8, width // 16, 16).mean((1, 3)) / 255


def sharp_shares(canvas: Image.Image, coverage: np.ndarray) -> tuple[float, float]:
    """The shares in focus of the ground and of the subject that `coverage` (canvas size, 0..1) shows; 0 without any."""
    blocks = step_blocks(canvas)
    size = (blocks.shape[1], blocks.shape[0])
    covered = np.asarray(Image.fromarray(coverage).resize(size, Image.Resampling.BOX))
    sharp, shares = blocks > SHARP_STEP, []
    for part in (covered < 0.1, covered > 0.7):
        shares.append(float(sharp[part].mean()) if part.sum() >= 4 else 0.0)
    return shares[0], shares[1]


def _leading_hue(codes: np.ndarray) -> str:
    """The family of hues that covers most of the picture, "" when none covers a good part of it."""
    coloured = largest(codes) - smallest(codes) > 0.1
    if coloured.mean() < 0.3:
        return ""
    red, green, blue = np.moveaxis(codes[coloured], -1, 0)
    angle = np.degrees(np.arctan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)) % 360
    names = ("reds", "browns", "greens", "blues", "purples")
    counts = np.bincount(np.searchsorted((18, 62, 165, 262, 335), angle) % 5, minlength=5)
    first = int(counts.argmax())
    return names[first] if counts[first] > 0.3 * coloured.size and counts[first] > 0.55 * counts.sum() else ""


def _brightest(luma: np.ndarray) -> str:
    """Which part of the picture is clearly brighter than the rest, "" when none is."""
    height, width = luma.shape[0] // 3, luma.shape[1] // 3
    parts = {"top": luma[:height], "bottom": luma[-height:], "left": luma[:, :width], "right": luma[:, -width:]}
    parts["middle"] = luma[height:-height, width:-width]
    name, part = max(parts.items(), key=lambda item: item[1].mean())
    others = (luma.sum() - part.sum()) / max(1, luma.size - part.size)
    return name if part.mean() - others > 0.13 else ""


def unsure_faults(measures: Measures) -> set[str]:
    """Faults that an unedited picture may be said to have by nature: neither present nor absent."""
    extremes = {
        "underexposed": measures.luma < 0.33,
        "overexposed": measures.luma > 0.62,
        "low_contrast": measures.spread < 0.14,
        "high_contrast": measures.spread > 0.30,
        "cool_cast": measures.warmth < -0.13,
        "warm_cast": measures.warmth > 0.16,
        "muted": measures.chroma < 0.07,
        "oversaturated": measures.chroma > 0.38,
        "blurred": measures.sharp_share < 0.2,
        "noisy": measures.floor > 0.025,
        "vignetting": measures.corners < 0.5,
    }
    return {fault for fault, extreme in extremes.items() if extreme}


# Drawing edits -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Falloff:
    """How light falls off from `middle` (-1..1 across and down): by the distance under a norm (2 for circles, more
    for a rounded frame) to a power from `start` on (a share of the distance to the corner), or as cos^4."""

    middle: tuple[float, float] = (0.0, 0.0)
    norm: float = 2.0
    power: float = 3.0
    start: float = 0.0
    cos4: bool = False


@dataclass(frozen=True)
class Edits:
    """The photometric edits of one picture: exposure in EV, contrast and saturation as factors, warmth as half the EV
    between red and blue, vignette as EV lost in the corners, noise as standard deviation (share of full range); and
    the way that each is made in, the plainest one unless named."""

    exposure: float
    contrast: float
    warmth: float
    tint: float
    saturation: float
    vignette: float
    noise: float
    exposure_way: str = "gain"
    contrast_way: str = "linear"
    cast_way: str = "gains"
    saturation_way: str = "luma"
    noise_way: str = "white"
    falloff: Falloff = Falloff()


def draw_edits(
    faults: dict[str, float], measures: Measures, rng: np.random.Generator, styles: Collection[str] = ()
) -> Edits:
    """The faults at their strengths; where there is none, the ordinary variation that nobody would call a fault.

    A picture with a style keeps its light, and a monochrome one its tone.
    """
    exposure = faults.get("overexposed", 0) - faults.get("underexposed", 0) or rng.uniform(-0.2, 0.2)
    contrast = 1.6 ** faults.get("high_contrast", 0) * 0.6 ** faults.get("low_contrast", 0)
    warmth = 0.5 * (faults.get("warm_cast", 0) - faults.get("cool_cast", 0)) or rng.uniform(-0.1, 0.1)
    saturation = 2 ** faults.get("oversaturated", 0) * 0.4 ** faults.get("muted", 0)
    contrast = contrast if contrast != 1 else rng.uniform(0.92, 1.12)
    # Green and magenta are no faults here: now and then the balance leans to one of them, as under lamps and leaves.
    tint = rng.uniform(-0.15, 0.15) if rng.random() < 0.25 else rng.uniform(-0.04, 0.04)
    if set(styles) - {"monochrome"}:
        exposure, contrast = 0.3 * exposure, contrast**0.3
    else:
        # A crop of a normalised photograph is not quite at the normal level: part of the way back.
        exposure += float(np.clip(1.3 * math.log2(MIDDLE_LUMA / max(measures.luma, 0.05)), -0.6, 0.6))
        contrast *= float(np.clip((USUAL_SPREAD / max(measures.spread, 0.05)) ** 0.5, 0.85, 1.25))
    return Edits(
        exposure=exposure,
        contrast=contrast,
        warmth=warmth,
        tint=tint,
        saturation=saturation if saturation != 1 else rng.uniform(0.8, 1.3),
        vignette=faults.get("vignetting", 0) or rng.uniform(0, 0.2),
        noise=min(0.06 * faults.get("noisy", 0), 0.13) or max(0, rng.uniform(-0.008, 0.008)),
        exposure_way=str(rng.choice(("gain", "gamma", "film"), p=(0.5, 0.25, 0.25))),
        contrast_way=str(rng.choice(("linear", "sigmoid"))),
        cast_way=str(rng.choice(("gains", "opponent", "filter"), p=(0.5, 0.25, 0.25))),
        saturation_way=str(rng.choice(("luma", "hsv", "opponent"), p=(0.5, 0.25, 0.25))),
        noise_way=str(rng.choice(("white", "photon", "chroma", "coarse"), p=(0.35, 0.35, 0.15, 0.15))),
        falloff=_draw_falloff(rng),
    )


def _draw_falloff(rng: np.random.Generator) -> Falloff:
    return Falloff(
        middle=tuple(rng.normal(0, 0.06, 2)),
        norm=float(rng.choice((2.0, 2.0, 3.0, 5.0))),
        power=rng.uniform(2.0, 4.0),
        start=float(rng.choice((0.0, 0.0, rng.uniform(0.1, 0.45)))),
        cos4=bool(rng.random() < 0.25),
    )


# Developing ----------------------------------------------------------------------------------------------------------


def develop(canvas: Image.Image, edits: Edits, rng: np.random.Generator) -> Image.Image:
    """Light falloff, exposure and white balance in linear light, then contrast, saturation and noise in codes."""
    linear = TO_LINEAR[np.asarray(canvas)]
    height, width = linear.shape[:2]
    if edits.vignette > 0:
        linear *= falloff_factors(edits.falloff, edits.vignette, (width, height))[..., None]
    gains = np.exp2([edits.warmth, edits.tint, -edits.warmth]).astype(np.float32)
    few = linear[::4, ::4]
    means = few.mean((0, 1))
    gains *= (means @ LUMA) / (gains * means @ LUMA + 1e-6)  # a cast alone leaves the brightness as it is
    stops, cast = np.float32(2**edits.exposure), edits.cast_way == "gains"
    few_plain, few_balanced = to_code(few), to_code(few * gains)
    few_exposed = to_code(few * stops * (gains if cast else 1))
    linear *= (gains if cast else np.float32(1)) * (stops if edits.exposure_way == "gain" else np.float32(1))
    codes = to_code(linear)
    if edits.exposure_way != "gain":
        codes = _exposed(codes, float((few_exposed @ LUMA).mean()), edits.exposure_way)
    if not cast:
        codes = _balanced(codes, few_plain, few_balanced, edits.cast_way)
    codes = _with_contrast(codes, edits)
    if edits.noise > 0:
        codes += grain(codes, edits.noise, edits.noise_way, rng)
    return Image.fromarray(to_bytes(codes))


def with_grain(image: Image.Image, edits: Edits, rng: np.random.Generator, *, grey: bool) -> Image.Image:
    """A developed picture with the noise of `edits`, the same in all channels where it is `grey`."""
    if edits.noise <= 0:
        return image
    codes = np.asarray(image).astype(np.float32) / 255
    noise = grain(codes, edits.noise, edits.noise_way, rng)
    return Image.fromarray(to_bytes(codes + (noise[..., :1] if grey else noise)))


def falloff_factors(falloff: Falloff, stops: float, size: tuple[int, int]) -> np.ndarray:
    """Factors of linear light, float32 `(height, width)`, that lose as much in the corners as `stops` would by the
    plain law (circles, power 3, no start)."""
    plain, shaped = (_loss(each, (40, 40)) for each in (Falloff(), falloff))
    corners = (slice(0, 5), slice(-5, None))
    lost = [np.mean([loss[y, x].mean() for y in corners for x in corners]) for loss in (plain, shaped)]
    smooth = _loss(falloff, (max(size[0] // 4, 8), max(size[1] // 4, 8))) * np.float32(stops * lost[0] / lost[1])
    return np.exp2(-np.asarray(Image.fromarray(smooth).resize(size, Image.Resampling.BICUBIC)))


def _loss(falloff: Falloff, size: tuple[int, int]) -> np.ndarray:
    """Stops lost, 1 in a corner of a centred falloff."""
    x, y = (np.linspace(-1, 1, count, dtype=np.float32) - middle for count, middle in zip(size, falloff.middle))
    norm = falloff.norm
    away = ((np.abs(x[None]) ** norm + np.abs(y[:, None]) ** norm) / 2) ** (1 / norm)
    if falloff.cos4:
        return np.log2(1 + away**2)  # cos^4 of an angle of 45 degrees in the corners loses two stops: all are scaled
    return (np.maximum(away - falloff.start, 0) / (1 - falloff.start)) ** falloff.power


_STEPS = np.arange(1024, dtype=np.float32) / 1023


def _through(curve: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Codes through a curve of 1024 steps."""
    return curve[(np.clip(codes, 0, 1) * np.float32(1023) + np.float32(0.5)).astype(np.uint16)]


def _matched(figure: Callable[[float], float], target: float, low: float, high: float) -> float:
    """The parameter in low..high where a rising figure meets its target, or the end that comes nearest."""
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if figure(middle) < target else (low, middle)
    return (low + high) / 2


def _gamma(p: float) -> np.ndarray:
    return _STEPS ** np.float32(2**-p)


def _film(p: float) -> np.ndarray:
    """A shoulder for p > 0, a toe for p < 0."""
    return _STEPS if abs(p) < 1e-3 else np.float32(1 / (1 - math.exp(-p))) * (1 - np.exp(np.float32(-p) * _STEPS))


def _sigmoid(p: float) -> np.ndarray:
    """Steep in the middle for p > 0, flat there for p < 0 (its inverse)."""
    if abs(p) < 1e-2:
        return _STEPS
    around = 2 * _STEPS - 1
    if p > 0:
        return (0.5 + 0.5 * np.tanh(p * around) / math.tanh(p)).astype(np.float32)
    return (0.5 + 0.5 * np.arctanh(around * math.tanh(-p)) / -p).astype(np.float32)


def _exposed(codes: np.ndarray, target: float, way: str) -> np.ndarray:
    """Brightened or darkened by a curve to a mean luma."""
    curve, few = {"gamma": _gamma, "film": _film}[way], codes[::4, ::4] @ LUMA
    limit = 3.0 if way == "gamma" else 8.0
    return _through(curve(_matched(lambda p: float(_through(curve(p), few).mean()), target, -limit, limit)), codes)


def _balanced(codes: np.ndarray, plain: np.ndarray, balanced: np.ndarray, way: str) -> np.ndarray:
    """With the mean shift of colour between `plain` and `balanced`, by an opponent shift or a filter before the lens."""
    if way == "opponent":
        lab = to_opponent(codes)
        lab += (to_opponent(balanced) - to_opponent(plain)).mean((0, 1)) * np.array([0, 1, 1], np.float32)
        return from_opponent(lab)
    luma = codes @ LUMA
    shift = (balanced - plain).mean((0, 1))
    shift -= shift @ LUMA
    size = float(np.abs(shift).max())
    filtered = shift * np.float32(0.35 / max(size, 1e-4))  # the chroma that a full filter would leave
    chroma = codes - luma[..., None]
    share = np.float32(min(size / 0.35, 0.7))
    return luma[..., None] + (1 - share) * chroma + share * filtered + share * chroma.mean((0, 1))


def _with_contrast(codes: np.ndarray, edits: Edits) -> np.ndarray:
    """Contrast of the luma, and saturation."""
    luma = codes @ LUMA
    mean = float(luma.mean())
    # A flatter curve takes some colour with it and a steeper one adds some, but little: saturation is another fault.
    factor = np.float32(edits.saturation * edits.contrast**0.3)
    if edits.contrast_way == "linear":
        toned = mean + (luma - mean) * np.float32(edits.contrast)
    else:
        few = luma[::4, ::4]
        target = float(np.clip(few.mean() + (few - few.mean()) * edits.contrast, 0, 1).std())
        p = _matched(lambda p: float(_through(_sigmoid(p), few).std()), target, -4.0, 4.0)
        toned = _through(_sigmoid(p), luma)
        toned += np.float32(mean) - toned.mean() if edits.contrast < 1 else np.float32(0)
    codes += (toned - luma)[..., None]
    return _saturated(codes, toned, factor, edits.saturation_way)


def _saturated(codes: np.ndarray, luma: np.ndarray, factor: float, way: str) -> np.ndarray:
    """Chroma times a factor: about the luma, below the largest channel (as HSV has it), or in an opponent space."""
    if way == "luma":
        codes -= luma[..., None]
        codes *= factor
        codes += luma[..., None]
        return codes
    change = _below_the_top if way == "hsv" else _opponent_chroma
    codes = np.clip(codes, 0, 1)
    few, wanted = codes[::4, ::4], np.clip(luma[..., None] + (codes - luma[..., None]) * factor, 0, 1)[::4, ::4]
    target = chroma_level(wanted)
    return change(codes, _matched(lambda f: chroma_level(np.clip(change(few, f), 0, 1)), target, 0.0, 8.0))


def _below_the_top(codes: np.ndarray, factor: float) -> np.ndarray:
    top = largest(codes)[..., None]
    return top - (top - codes) * np.float32(factor)


def _opponent_chroma(codes: np.ndarray, factor: float) -> np.ndarray:
    lab = to_opponent(codes)
    lab[..., 1:] *= np.float32(factor)
    return from_opponent(lab)


# Linear red, green and blue to cones, and the cones' cube roots to lightness and two opponent colours: the numbers of
# Oklab (B. Ottosson, 2020), in which chroma at a hue looks even.
_CONES = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]], np.float32)
_OPPONENTS = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]], np.float32)
_FROM_CONES = np.linalg.inv(_CONES.astype(np.float64)).astype(np.float32)
_FROM_OPPONENTS = np.linalg.inv(_OPPONENTS.astype(np.float64)).astype(np.float32)
_CODE_TO_LIGHT = np.where(_STEPS <= 0.04045, _STEPS / 12.92, ((_STEPS + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_opponent(codes: np.ndarray) -> np.ndarray:
    """Codes 0..1 as lightness, green-red and blue-yellow, `(..., 3)`."""
    return np.cbrt(_through(_CODE_TO_LIGHT, codes) @ _CONES.T) @ _OPPONENTS.T


def from_opponent(lab: np.ndarray) -> np.ndarray:
    return to_code(((lab @ _FROM_OPPONENTS.T) ** 3) @ _FROM_CONES.T)


def grain(codes: np.ndarray, sigma: float, way: str, rng: np.random.Generator) -> np.ndarray:
    """Noise of a standard deviation, on average over the picture: the same everywhere; as photons and read-out leave
    it, more in the darks; of colour mainly; or coarse, as demosaicing and noise reduction leave it."""
    height, width = codes.shape[:2]
    if way == "coarse":
        size = (width // 2 + 1, height // 2 + 1)
        layers = [Image.fromarray(rng.standard_normal(size[::-1], dtype=np.float32)) for _ in range(3)]
        noise = np.stack(
            [np.asarray(layer.resize((width, height), Image.Resampling.BILINEAR)) for layer in layers], -1
        )
        noise = noise + np.float32(0.4) * rng.standard_normal((height, width, 1), dtype=np.float32)
    else:
        channels = 3 if way == "chroma" or (way == "photon" and sigma > 0.01) or rng.random() < 0.5 else 1
        noise = rng.standard_normal((height, width, channels), dtype=np.float32)
    if way == "chroma":
        noise -= np.float32(0.8) * (noise @ LUMA)[..., None]
        noise[1:] += np.float32(0.6) * noise[:-1]
        noise[:, 1:] += np.float32(0.6) * noise[:, :-1]
    noise *= np.float32(sigma) / noise[::3, ::3].std()
    if way == "photon":
        spread = _through(_photon_spread(), codes @ LUMA)
        noise *= (spread / spread.mean())[..., None]
    return noise


def _photon_spread() -> np.ndarray:
    """Relative deviation of codes whose light has the noise of its photons and a little of the read-out."""
    slope = np.gradient(_STEPS, _CODE_TO_LIGHT)
    return np.clip(np.sqrt(_CODE_TO_LIGHT + 0.004) * slope, 0, 2).astype(np.float32)


# Blur ----------------------------------------------------------------------------------------------------------------

BLURS = ("gaussian", "disc", "motion", "scaling")


def blurred(canvas: Image.Image, sigma: float, way: str, rng: np.random.Generator) -> Image.Image:
    """Blurred by a spot of the variance of a Gaussian of `sigma` pixels: of a motion, of both directions together and
    half as much again, as edges along it stay."""
    if way == "gaussian" or sigma < 0.9:
        return canvas.filter(ImageFilter.GaussianBlur(sigma))
    if way == "scaling":
        small = (max(4, round(canvas.width / (2 * sigma))), max(4, round(canvas.height / (2 * sigma))))
        return canvas.resize(small, Image.Resampling.BILINEAR).resize(canvas.size, Image.Resampling.BICUBIC)
    spot = _disc(2 * sigma) if way == "disc" else _line(6 * sigma, rng.uniform(0, math.pi))
    light = TO_LINEAR[np.asarray(canvas)] if way == "disc" else np.asarray(canvas).astype(np.float32) / 255
    light = _convolved(light, spot)
    return Image.fromarray(to_bytes(to_code(light) if way == "disc" else light))


def _disc(radius: float) -> np.ndarray:
    reach = math.ceil(radius)
    steps = np.arange(-reach, reach + 1, dtype=np.float32)
    return np.clip(radius + 0.5 - np.hypot(steps[None], steps[:, None]), 0, 1)


def _line(length: float, angle: float) -> np.ndarray:
    reach = math.ceil(length / 2)
    steps = np.arange(-reach, reach + 1, dtype=np.float32)
    along = math.cos(angle) * steps[None] + math.sin(angle) * steps[:, None]
    across = math.cos(angle) * steps[:, None] - math.sin(angle) * steps[None]
    return np.clip(length / 2 + 0.5 - np.abs(along), 0, 1) * np.clip(1 - np.abs(across), 0, 1)


def _convolved(values: np.ndarray, spot: np.ndarray) -> np.ndarray:
    """`(height, width, 3)` under an odd square spot, mirrored at the borders."""
    reach = spot.shape[0] // 2
    height, width = values.shape[:2]
    padded = np.pad(values, ((reach, reach), (reach, reach), (0, 0)), mode="reflect")
    size = tuple(fft.next_fast_len(count, real=True) for count in padded.shape[:2])
    spot = fft.rfft2((spot / spot.sum()).astype(np.float32), size)
    result = fft.irfft2(fft.rfft2(padded, size, axes=(0, 1)) * spot[..., None], size, axes=(0, 1))
    return result[2 * reach : 2 * reach + height, 2 * reach : 2 * reach + width]
