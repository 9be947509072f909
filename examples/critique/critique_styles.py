"""What a photographer means and what is no fault: pictures in black and white, high and low key, silhouettes, fog.

Each style looks like a fault (monochrome like muted colours, low key like underexposure), so `APART` says for each
which faults it is not, and which could not be told in it.
"""

from collections.abc import Collection

import numpy as np
from critique_pictures import LUMA, TO_LINEAR, to_bytes, to_code
from PIL import Image, ImageFilter


# Of each style: the faults that it is not, and those that nobody could tell there.
APART: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "monochrome": (("muted", "oversaturated"), ("cool_cast", "warm_cast")),
    "high_key": (("underexposed", "overexposed", "low_contrast", "high_contrast"), ("muted", "vignetting")),
    "low_key": (("underexposed", "overexposed", "low_contrast"), ("high_contrast", "muted", "vignetting")),
    "silhouette": (
        ("underexposed", "overexposed", "low_contrast", "high_contrast"),
        ("muted", "oversaturated", "cool_cast", "warm_cast", "subject_blurred"),
    ),
    "foggy": (
        ("underexposed", "overexposed", "low_contrast", "high_contrast"),
        ("muted", "oversaturated", "cool_cast", "background_blurred", "subject_blurred"),
    ),
}
CHANCES = {"monochrome": 0.26, "high_key": 0.2, "low_key": 0.2, "silhouette": 0.18, "foggy": 0.16}
# Red, green, yellow and no filter before black-and-white film.
_FILTERS = ((0.299, 0.587, 0.114), (0.75, 0.2, 0.05), (0.15, 0.75, 0.1), (0.4, 0.55, 0.05))
_TONES = {"sepia": (0.07, 0.01, -0.09), "selenium": (0.03, -0.015, 0.02), "blue": (-0.05, 0.0, 0.07)}


def draw_styles(rng: np.random.Generator, *, cutout: bool, subject: bool) -> tuple[str, ...]:
    """One style, now and then in black and white as well. A silhouette needs the outline of a cut-out, and a high key
    a subject that keeps its tones."""
    possible = {style: chance for style, chance in CHANCES.items() if style != "silhouette" or cutout}
    if not subject:
        possible.pop("high_key")
    chances = np.array(list(possible.values()))
    style = str(rng.choice(list(possible), p=chances / chances.sum()))
    return (style, "monochrome") if style != "monochrome" and rng.random() < 0.15 else (style,)


def apply_light(style: str, canvas: Image.Image, coverage: np.ndarray | None, rng: np.random.Generator) -> Image.Image:
    """The canvas in the light of a style other than monochrome; `coverage` (canvas size, 0..1) is its subject."""
    codes = np.asarray(canvas).astype(np.float32) / 255
    subject = np.zeros(codes.shape[:2], np.float32) if coverage is None else coverage
    if style == "high_key":
        return Image.fromarray(to_bytes(_high_key(codes, subject, rng)))
    if style == "low_key":
        lit = coverage is not None and rng.random() < 0.75
        return Image.fromarray(to_bytes(_low_key(codes, subject, rng) if lit else _night(codes, subject, rng)))
    if style == "silhouette":
        return Image.fromarray(to_bytes(_silhouette(codes, subject, rng)))
    return Image.fromarray(to_bytes(_fog(TO_LINEAR[np.asarray(canvas)], subject, rng)))


def monochrome(canvas: Image.Image, toned: bool, rng: np.random.Generator) -> Image.Image:
    """Black and white through one of four filters, or toned: most in the middle tones."""
    grey = np.asarray(canvas).astype(np.float32) @ np.array(_FILTERS[rng.integers(len(_FILTERS))], np.float32) / 255
    tone = np.array(_TONES[str(rng.choice(list(_TONES)))] if toned else (0, 0, 0), np.float32) * rng.uniform(0.6, 1.3)
    return Image.fromarray(to_bytes(grey[..., None] + (4 * grey * (1 - grey))[..., None] * tone.astype(np.float32)))


def style_labels(
    labels: dict[str, float], styles: Collection[str], looks_like: Collection[str], toned: bool
) -> dict[str, float]:
    """Labels of all styles: 1 for those made, unknown where the picture looks like one; of a styled picture `labels` (of
    its faults) is changed where `APART` says so."""
    for style in styles:
        apart, unsure = APART[style]
        labels.update(dict.fromkeys(unsure if style != "monochrome" or toned else (), -1.0))
        labels.update(dict.fromkeys(apart if style != "monochrome" or toned else (*apart, *unsure), 0.0))
    # One light can pass for another, but neither for black and white.
    unsure = {*looks_like, *(set(APART) - {"monochrome"} if set(styles) - {"monochrome"} else ())}
    return {style: 1.0 if style in styles else -1.0 if style in unsure else 0.0 for style in APART}


def looks_like(canvas: Image.Image, subject: np.ndarray | None) -> set[str]:
    """Styles that a photograph may be said to have by nature."""
    few = np.asarray(canvas)[::4, ::4].astype(np.float32) / 255
    luma = few @ LUMA
    dark, bright = float((luma < 0.12).mean()), float((luma > 0.75).mean())
    darks, lights = np.percentile(luma, (5, 95))
    likely = {
        "monochrome": float((few.max(-1) - few.min(-1)).mean()) < 0.05,
        "high_key": bright > 0.55 or float(luma.mean()) > 0.68,
        "low_key": dark > 0.35 or float(luma.mean()) < 0.27,
        "silhouette": dark > 0.12 and bright > 0.15,
        "foggy": darks > 0.32 or lights - darks < 0.38,
    }
    if subject is not None and subject.max() > 0.5:
        covered = subject[::4, ::4][: luma.shape[0], : luma.shape[1]]
        inside, outside = (float((luma * part).sum() / (part.sum() + 1e-3)) for part in (covered, 1 - covered))
        likely["silhouette"] |= inside < 0.2 and outside > 0.45
    return {style for style, so in likely.items() if so}


def _soft(values: np.ndarray, sigma: float) -> np.ndarray:
    image = Image.fromarray((np.clip(values, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(np.float32) / 255


def _grid(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows (height, 1) and columns (1, width) as 0..1."""
    return np.linspace(0, 1, shape[0], dtype=np.float32)[:, None], np.linspace(0, 1, shape[1], dtype=np.float32)[None]


def _lifted(codes: np.ndarray, power: np.ndarray | float) -> np.ndarray:
    """Brightened with a soft shoulder: nothing clips."""
    return 1 - (1 - codes) ** power


def _high_key(codes: np.ndarray, subject: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The ground near white and pale, the subject bright with its darks kept."""
    near = np.maximum(subject, 0.4 * _soft(subject, 0.03 * max(subject.shape)))[..., None]
    ground = _lifted(codes, rng.uniform(2.4, 3.4))
    ground = ground.mean(-1, keepdims=True) * 0.4 + ground * 0.6
    lift = rng.uniform(0.15, 0.4)
    ground = lift + (1 - lift) * ground
    return near * _lifted(codes, rng.uniform(1.2, 1.6)) + (1 - near) * np.minimum(ground, 0.985)


def _low_key(codes: np.ndarray, subject: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The surround in the dark, light on the subject from one side."""
    lit = np.maximum(subject, 0.5 * _soft(subject, rng.uniform(0.05, 0.15) * max(subject.shape)))
    angle = rng.uniform(0, 2 * np.pi)
    y, x = _grid(subject.shape)
    weight = subject.sum() + 1e-3
    middle = float((subject * x).sum() / weight), float((subject * y).sum() / weight)
    side = np.cos(angle) * (x - middle[0]) + np.sin(angle) * (y - middle[1])
    stops = -(1 - lit) * rng.uniform(2.8, 4.5) + np.clip(3 * side, -1.3, 0.4) * lit
    return to_code(_light(codes) * np.exp2(stops)[..., None])


def _night(codes: np.ndarray, subject: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Dark all over but for the lights, and bluish."""
    luma = codes @ LUMA
    low, high = np.percentile(luma[::4, ::4], (rng.uniform(75, 90), 98.5))
    lights = np.clip((luma - low) / max(high - low, 0.03), 0, 1) ** 1.5
    stops = -(1 - np.maximum(lights, 0.5 * subject)) * rng.uniform(3.0, 4.2)
    cold = np.exp2(np.array([-0.25, -0.05, 0.3], np.float32) * rng.uniform(0, 1)).astype(np.float32)
    dark = to_code(_light(codes) * np.exp2(stops)[..., None])
    return dark * (1 - lights[..., None]) * cold + dark * lights[..., None]


def _silhouette(codes: np.ndarray, subject: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The subject all but black against the light."""
    y, x = _grid(subject.shape)
    weight = subject.sum() + 1e-3
    sun_x = float((subject * x).sum() / weight) + rng.uniform(-0.35, 0.35)
    sun_y = float((subject * y).sum() / weight) - rng.uniform(0, 0.35)
    glow = np.exp(-((x - sun_x) ** 2 + (y - sun_y) ** 2) / rng.uniform(0.05, 0.3))[..., None]
    warm = np.array([1.0, 0.9, 0.75], np.float32) if rng.random() < 0.5 else np.ones(3, np.float32)
    ground = _lifted(codes, rng.uniform(1.7, 2.6))
    ground = ground + (warm - ground) * glow * rng.uniform(0.4, 0.85)
    veil = rng.uniform(0.1, 0.4)
    ground = veil * ground.mean((0, 1)) + (1 - veil) * ground
    dark = to_code(_light(codes) * np.float32(2 ** -rng.uniform(3.8, 6.0)))
    return subject[..., None] * dark + (1 - subject[..., None]) * ground


def _fog(light: np.ndarray, subject: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A veil of light that grows toward the top, where things are farther away, and away from the subject."""
    y, _ = _grid(subject.shape)
    drift = Image.fromarray(rng.uniform(-1, 1, (4, 5)).astype(np.float32)).resize(
        light.shape[1::-1], Image.Resampling.BICUBIC
    )
    away = np.clip(1.05 - rng.uniform(0.6, 0.95) * y + 0.15 * np.asarray(drift), 0.05, 1.2)
    away *= 1 - (1 - rng.uniform(0.2, 0.45)) * subject
    passed = np.exp(-rng.uniform(1.4, 2.8) * away)[..., None]
    air = np.array([1.0, 1.0, 1.0], np.float32) + rng.uniform(0, 0.06) * np.array([-1, 0, 1], np.float32)
    return to_code(light * passed + (1 - passed) * air.astype(np.float32) * np.float32(rng.uniform(0.42, 0.72)))


def _light(codes: np.ndarray) -> np.ndarray:
    return TO_LINEAR[to_bytes(codes)]
