"""Photographs with known faults and the critiques that go with them, made from real photographs and cut-outs.

    python examples/critique/critique_data.py --split train --num-samples 24 --out contact_sheet.png

writes a sheet of samples with their captions, to look at. In a program, `critique_dataset` gives the samples made on
the fly. A sample depends on (seed, split, index) and on nothing else. The photographs and cut-outs come from
`critique_sources.py`.
"""

import argparse
import functools
import hashlib
import io
import math
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from critique_captions import ASPECT_FAULTS, ASPECTS, FAULTS, Truth, compose_caption
from critique_pictures import (
    LUMA,
    MAP_SIZE,
    MIDDLE_LUMA,
    PLACEMENTS,
    SMALLEST_SUBJECT,
    TO_LINEAR,
    USUAL_SPREAD,
    Framing,
    LoadedSources,
    Photo,
    box_placement,
    chroma_level,
    draw_framing,
    largest,
    load_sources,
    place_cutout,
    smallest,
    subject_map,
    to_bytes,
    to_code,
)
from PIL import Image, ImageDraw, ImageFilter, ImageFont


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import words


SCORES = 10
DEPTHS = ASPECT_FAULTS["depth"]
PHOTOMETRIC = tuple(aspect for aspect in ASPECT_FAULTS if aspect not in ("placement", "depth"))

# A fault's strength is a multiple of the least strength that counts as one; beyond these the picture is destroyed.
STRONGEST = {"overexposed": 1.6, "cool_cast": 2.0, "warm_cast": 2.0, "oversaturated": 1.9, "noisy": 2.2,
             "vignetting": 2.2, "underexposed": 2.4, "high_contrast": 2.1}  # fmt: skip
# Faults that hide each other: washed-out highlights leave no contrast to be harsh, grey shows no cast.
HIDING = (("overexposed", "high_contrast"), ("muted", "cool_cast"), ("muted", "warm_cast"))
PENALTIES = {"underexposed": 1.2, "overexposed": 1.3, "low_contrast": 0.9, "high_contrast": 0.9, "cool_cast": 0.9,
             "warm_cast": 0.9, "muted": 0.7, "oversaturated": 0.9, "blurred": 1.6, "noisy": 1.0, "tilted": 0.8,
             "vignetting": 0.6, "subject_centred": 0.1, "subject_left_third": -0.35, "subject_right_third": -0.35,
             "subject_near_edge": 1.3, "background_blurred": -0.45, "subject_blurred": 1.6}  # fmt: skip
BEST_SCORE = 8.3
MAX_DRAWBACKS = 4
MAX_WORDS = 60


# What is wrong with a sample -----------------------------------------------------------------------------------------


def draw_faults(
    rng: np.random.Generator, *, probability: float, strength: tuple[float, float], composite: bool
) -> dict[str, float]:
    """Faults and their strengths, in the order of FAULTS; placement is drawn for composites only, and always."""
    low, high = np.log(strength)
    faults = {}
    for aspect in PHOTOMETRIC:
        drawn, side, power = rng.random(), rng.integers(len(ASPECT_FAULTS[aspect])), math.exp(rng.uniform(low, high))
        if drawn < probability:
            fault = ASPECT_FAULTS[aspect][side]
            faults[fault] = min(power, STRONGEST.get(fault, 2.5))
    if "noisy" in faults and high > low and rng.random() < 0.25:
        faults["noisy"] = rng.uniform(0.5, 1.0)  # noise as it is left when a larger picture was scaled down
    placement, depth, depth_drawn = rng.integers(len(PLACEMENTS)), rng.integers(len(DEPTHS)), rng.random() < 0.45
    if composite:
        faults[PLACEMENTS[placement]] = 1.0
        if depth_drawn:
            faults[DEPTHS[depth]] = min(math.exp(rng.uniform(low, high)), 2.5)
            faults.pop("blurred", None)
    for pair in HIDING:
        if faults.keys() >= set(pair):
            del faults[pair[rng.integers(2)]]
    return faults


def limit_drawbacks(faults: dict[str, float], rng: np.random.Generator) -> None:
    """Takes faults out until a short text can speak of all that are left; placement and tilt are settled by then."""
    drawbacks = [fault for fault in faults if PENALTIES[fault] >= 0.5]
    optional = [fault for fault in drawbacks if fault not in (*PLACEMENTS, "tilted")]
    for fault in rng.permutation(optional)[: max(0, len(drawbacks) - MAX_DRAWBACKS)]:
        del faults[str(fault)]


def score_distribution(faults: dict[str, float], unsure: int, rng: np.random.Generator) -> list[float]:
    """Shares of the scores 1..10: a normal distribution whose mean falls with the faults and their strength."""
    mean = BEST_SCORE - 0.3 * unsure
    for fault, strength in faults.items():
        penalty = PENALTIES[fault]
        mean -= penalty * (0.4 + 0.6 * strength) if penalty > 0.2 else penalty
    mean, spread = min(max(mean, 1.3), 9.3), rng.uniform(1.1, 1.4)
    weights = np.exp(-0.5 * ((np.arange(1, SCORES + 1) - mean) / spread) ** 2)
    return (weights / weights.sum()).tolist()


# Measuring and developing --------------------------------------------------------------------------------------------


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


def measure(canvas: Image.Image) -> Measures:
    coarse = np.asarray(canvas)[::4, ::4].astype(np.float32) / 255
    luma = coarse @ LUMA
    rows = np.asarray(canvas.convert("L"))[::2].astype(np.int16)
    steps = np.abs(rows[:, 1:] - rows[:, :-1])
    height, width = steps.shape[0] // 8 * 8, steps.shape[1] // 16 * 16
    blocks = steps[:height, :width].reshape(height // 8, 8, width // 16, 16).mean((1, 3)) / 255
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
        sharp_share=float((blocks > 0.016).mean()),
        floor=float(np.percentile(blocks, 8)),
        hue=_leading_hue(coarse),
        brightest=_brightest(luma),
    )


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


@dataclass(frozen=True)
class Edits:
    """The photometric edits of one picture: exposure in EV, contrast and saturation as factors, warmth as half the EV
    between red and blue, vignette as EV lost in the corners, noise as standard deviation (share of full range)."""

    exposure: float
    contrast: float
    warmth: float
    tint: float
    saturation: float
    vignette: float
    vignette_power: float
    noise: float


def draw_edits(faults: dict[str, float], measures: Measures, rng: np.random.Generator) -> Edits:
    """The faults at their strengths; where there is none, the ordinary variation that nobody would call a fault."""
    exposure = faults.get("overexposed", 0) - faults.get("underexposed", 0) or rng.uniform(-0.2, 0.2)
    contrast = 1.6 ** faults.get("high_contrast", 0) * 0.6 ** faults.get("low_contrast", 0)
    warmth = 0.5 * (faults.get("warm_cast", 0) - faults.get("cool_cast", 0)) or rng.uniform(-0.1, 0.1)
    saturation = 2 ** faults.get("oversaturated", 0) * 0.4 ** faults.get("muted", 0)
    # A crop of a normalised photograph is not quite at the normal level: part of the way back.
    exposure += float(np.clip(1.3 * math.log2(MIDDLE_LUMA / max(measures.luma, 0.05)), -0.6, 0.6))
    level = float(np.clip((USUAL_SPREAD / max(measures.spread, 0.05)) ** 0.5, 0.85, 1.25))
    return Edits(
        exposure=exposure,
        contrast=level * (contrast if contrast != 1 else rng.uniform(0.92, 1.12)),
        warmth=warmth,
        tint=rng.uniform(-0.04, 0.04),
        saturation=saturation if saturation != 1 else rng.uniform(0.8, 1.3),
        vignette=faults.get("vignetting", 0) or rng.uniform(0, 0.2),
        vignette_power=rng.uniform(2.0, 4.0),
        noise=min(0.06 * faults.get("noisy", 0), 0.13) or max(0, rng.uniform(-0.008, 0.008)),
    )


def develop(canvas: Image.Image, edits: Edits, rng: np.random.Generator) -> Image.Image:
    """Light falloff, exposure and white balance in linear light, then contrast, saturation and noise in codes."""
    linear = TO_LINEAR[np.asarray(canvas)]
    height, width = linear.shape[:2]
    if edits.vignette > 0:
        x, y = (np.linspace(-1, 1, count, dtype=np.float32) ** 2 / 2 for count in (width, height))
        falloff = np.exp2(-edits.vignette * (x[None] + y[:, None]) ** (edits.vignette_power / 2))
        linear *= falloff[..., None]
    gains = np.exp2([edits.warmth, edits.tint, -edits.warmth])
    means = linear[::4, ::4].mean((0, 1))
    gains *= (means @ LUMA) / (gains * means @ LUMA + 1e-6)  # a cast alone leaves the brightness as it is
    linear *= (gains * 2**edits.exposure).astype(np.float32)
    codes = to_code(linear)
    luma = codes @ LUMA
    mean = float(luma.mean())
    codes -= luma[..., None]
    # A flatter curve takes some colour with it and a steeper one adds some, but little: saturation is another fault.
    codes *= edits.saturation * edits.contrast**0.3
    luma = mean + (luma - mean) * edits.contrast
    codes += luma[..., None]
    if edits.noise > 0:
        codes += _grain(height, width, edits.noise, rng)
    return Image.fromarray(to_bytes(codes))


def _grain(height: int, width: int, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Noise of one or of three channels; some is coarser than a pixel, as a camera's own processing leaves it."""
    channels = 1 if rng.random() < 0.5 or sigma < 0.01 else 3
    grain = rng.standard_normal((height, width, channels), dtype=np.float32)
    if sigma > 0.02 and rng.random() < 0.35:
        grain[1:] += 0.6 * grain[:-1]
        grain[:, 1:] += 0.6 * grain[:, :-1]
        grain /= 1.36
    grain *= sigma
    return grain


# Samples -------------------------------------------------------------------------------------------------------------


def make_sample(
    index: int,
    split: str,
    seed: int,
    sources: LoadedSources,
    *,
    long_side: int = 320,
    fault_probability: float = 0.22,
    strength: tuple[float, float] = (1.0, 2.5),
    composite_share: float = 0.5,
    natural_share: float = 0.15,
) -> dict[str, Any]:
    """One sample, the same for the same (seed, split, index): a picture and what is true of it.

    image: PIL RGB. caption, references: text, and five phrasings of the same truth (the caption is the first).
    aspect_labels: 18 floats in the order of FAULTS, 1 present, 0 absent, -1 unknown or not applicable.
    score: shares of the scores 1..10. saliency: float32 (32, 32), the subject's coverage of the whole picture,
    squashed to a square, all zeros where there is no truth. composite, source, cutout: how it was made.
    strengths: fault -> strength as a multiple of the least that counts as a fault.

    long_side: of the picture, in pixels. fault_probability: of a fault in each photometric aspect. strength: least and
    greatest multiple of the least fault. composite_share: of samples with a cut-out as their subject. natural_share:
    of samples that are photographs as they were taken, without any edit.
    """
    rng = np.random.default_rng([seed, index, int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "big")])
    kind = rng.random()
    composite, natural = kind < composite_share, kind >= 1 - natural_share
    faults = draw_faults(rng, probability=0 if natural else fault_probability, strength=strength, composite=composite)
    pool = sources.backgrounds if composite else sources.photos
    photo = pool[int(rng.integers(len(pool)))]
    framing = draw_framing(photo, _draw_tilt(faults, natural, rng), long_side, rng)
    canvas = framing.render(photo.raw if natural else photo.normal)
    if composite:
        scene = _pasted(canvas, framing, faults, sources, rng)
    else:
        scene = _plain(canvas, photo, framing, faults, rng)
    unsure = unsure_faults(scene.measures)
    _drop_hidden(faults, unsure)
    canvas = scene.canvas
    if not natural:
        sigma = min(canvas.size) * (0.01 * faults["blurred"] if "blurred" in faults else rng.uniform(0, 0.0025))
        canvas = canvas.filter(ImageFilter.GaussianBlur(sigma)) if sigma > 0.3 else canvas
        canvas = develop(canvas, draw_edits(faults, scene.measures, rng), rng)
    labels = aspect_labels(faults, unsure, subject=scene.placement_known, depth=scene.depth_known)
    truth = _truth(faults, labels, scene)
    references = _phrasings(truth, rng)
    return {
        "image": _as_jpeg(canvas, rng),
        "caption": references[0],
        "references": references,
        "aspect_labels": labels,
        "aspects": labels + [-1.0] * (len(ASPECTS) - len(FAULTS)),
        "degrees": float("nan"),
        "score": score_distribution(faults, len(unsure - faults.keys()), rng),
        "saliency": scene.saliency.astype(np.float32),
        "composite": bool(composite),
        "source": photo.id,
        "cutout": scene.cutout,
        "strengths": truth.faults,
    }


@dataclass(frozen=True)
class Scene:
    """A picture before its photometric faults and what is known of its subject; `share` is the subject's long side as
    a share of the picture's (0 for unknown)."""

    canvas: Image.Image
    measures: Measures
    saliency: np.ndarray
    placement_known: bool
    depth_known: bool = False
    cutout: str = ""
    share: float = 0.0


def _plain(
    canvas: Image.Image, photo: Photo, framing: Framing, faults: dict[str, float], rng: np.random.Generator
) -> Scene:
    """A photograph as it is, with its own subject where that is known."""
    placement, saliency = "", np.zeros((MAP_SIZE, MAP_SIZE), np.float32)
    if photo.box is not None:
        placement, _ = box_placement(photo, framing)
    if photo.mask is not None:
        covered = subject_map(photo, framing)
        saliency = covered if covered.mean() > SMALLEST_SUBJECT / 2 else saliency
    if placement:
        faults[placement] = 1.0
    limit_drawbacks(faults, rng)
    return Scene(canvas, measure(canvas), saliency, placement_known=bool(placement))


def _pasted(
    canvas: Image.Image, framing: Framing, faults: dict[str, float], sources: LoadedSources, rng: np.random.Generator
) -> Scene:
    """A photograph with a cut-out as its subject."""
    limit_drawbacks(faults, rng)
    behind = measure(canvas)
    # A background that is out of focus by nature has no depth that could be told.
    depth_known = behind.sharp_share > 0.35
    if not depth_known:
        for fault in DEPTHS:
            faults.pop(fault, None)
    name, picture = sources.cutouts[int(rng.integers(len(sources.cutouts)))]
    canvas, coverage, share = place_cutout(canvas, picture, faults, framing.degrees, rng)
    # What blurs the background for depth must not count as a want of detail.
    measures = replace(measure(canvas), detail=behind.detail, sharp_share=behind.sharp_share, floor=behind.floor)
    saliency = np.asarray(Image.fromarray(coverage).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BOX))
    return Scene(canvas, measures, saliency, True, depth_known, name, share)


def _draw_tilt(faults: dict[str, float], natural: bool, rng: np.random.Generator) -> float:
    """Degrees to turn the picture by: at least 5 for a fault, at most one else."""
    side, jitter = rng.choice((-1.0, 1.0)), rng.uniform(-1, 1)
    if "tilted" in faults:
        return side * min(5 * faults["tilted"], 14)
    return 0.0 if natural else side * max(0.0, jitter)


def _drop_hidden(faults: dict[str, float], unsure: set[str]) -> None:
    """Takes out faults that this picture would not show, or whose opposite it has by nature."""
    for aspect in ("exposure", "contrast", "white_balance"):
        one, other = ASPECT_FAULTS[aspect]
        if one in unsure:
            faults.pop(other, None)
        if other in unsure:
            faults.pop(one, None)
    if "muted" in unsure:
        faults.pop("oversaturated", None)
    if {"muted", "oversaturated"} & unsure:
        faults.pop("muted", None)
    for fault in {"blurred", "vignetting"} & unsure:
        faults.pop(fault, None)


def aspect_labels(faults: dict[str, float], unsure: set[str], *, subject: bool, depth: bool) -> list[float]:
    """1 present, 0 absent, -1 unknown, in the order of FAULTS; without a subject its placement is unknown, and without
    a cut-out of known focus the depth."""
    labels = []
    for aspect, names in ASPECT_FAULTS.items():
        known = {"placement": subject, "depth": depth}.get(aspect, True)
        corrected = any(name in faults for name in names)
        for name in names:
            unknown = not known or (name in unsure and not corrected)
            labels.append(1.0 if name in faults else -1.0 if unknown else 0.0)
    return labels


def _truth(faults: dict[str, float], labels: list[float], scene: Scene) -> Truth:
    known, measures, share = dict(zip(FAULTS, labels)), scene.measures, scene.share
    fine = {aspect for aspect in PHOTOMETRIC if all(known[fault] == 0 for fault in ASPECT_FAULTS[aspect])}
    size = "" if not share else "small" if share < 0.32 else "large" if share > 0.48 else ""
    texture = "busy" if measures.detail > 0.042 else "calm" if measures.detail < 0.016 else ""
    return Truth(
        faults={fault: faults[fault] for fault in FAULTS if fault in faults},
        fine=frozenset(fine),
        hue=measures.hue,
        brightest="" if measures.brightest == "middle" and "vignetting" not in fine else measures.brightest,
        texture="" if "background_blurred" in faults else texture,
        size=size,
    )


def _phrasings(truth: Truth, rng: np.random.Generator, count: int = 5) -> list[str]:
    texts: list[str] = []
    tries = 0
    while len(texts) < count:
        text, tries = compose_caption(truth, rng), tries + 1
        if text not in texts and (len(words(text)) <= MAX_WORDS or tries > 50):
            texts.append(text)
    return texts


def _as_jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """With the traces that saving leaves."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(80, 98)), subsampling=int(rng.choice((0, 2))))
    return Image.open(buffer).convert("RGB")


def critique_dataset(
    split: str, num_samples: int, seed: int = 0, sources: LoadedSources | None = None, **options: Any
) -> datasets.Dataset:
    """The samples 0..num_samples-1 of a split, each made when it is read; `options` are those of `make_sample`."""
    make = functools.partial(_make_rows, split=split, seed=seed, sources=sources or load_sources(split), **options)
    return datasets.Dataset.from_dict({"index": list(range(num_samples))}).with_transform(make)


def _make_rows(batch: dict[str, list], **arguments: Any) -> dict[str, list]:
    rows = [make_sample(index, **arguments) for index in batch["index"]]
    return {name: [row[name] for row in rows] for name in rows[0]}


# Looking at it -------------------------------------------------------------------------------------------------------


def contact_sheet(samples: list[dict[str, Any]], columns: int = 4) -> Image.Image:
    """Samples with their captions, labels and subject outlines on one picture."""
    width, height = 340, 490
    sheet = Image.new("RGB", (columns * width, math.ceil(len(samples) / columns) * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, sample in enumerate(samples):
        left, top = number % columns * width, number // columns * height
        sheet.paste(sample["image"], (left + 10, top + 5))
        mean = sum(share * score for score, share in enumerate(sample["score"], 1))
        strengths = ", ".join(f"{fault} {strength:.1f}" for fault, strength in sample["strengths"].items())
        lines = textwrap.wrap(f"[{mean:.1f}] {strengths or 'no fault'}", 54) + textwrap.wrap(sample["caption"], 50)
        draw.multiline_text((left + 10, top + 330), "\n".join(lines), "black", font)
        if sample["saliency"].any():
            seen = Image.fromarray((sample["saliency"] * 255).astype(np.uint8))
            sheet.paste(seen.resize((48, 48)), (left + width - 58, top + 278))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="train", choices=("train", "test"))
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", type=Path, help="folder with photos/ and cutouts/")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"))
    args = parser.parse_args()
    sources = load_sources(args.split, args.sources)
    samples = [make_sample(i, args.split, args.seed, sources) for i in range(args.num_samples)]
    contact_sheet(samples).save(args.out)


if __name__ == "__main__":
    main()
