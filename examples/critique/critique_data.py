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
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from critique_captions import (
    ASPECT_FAULTS,
    ASPECTS,
    FAULTS,
    KINDS,
    QUALITIES,
    Truth,
    compose_caption,
    compose_verdict,
)
from critique_edits import (
    BLURS,
    Measures,
    blurred,
    develop,
    draw_edits,
    measure,
    sharp_shares,
    unsure_faults,
    with_grain,
)
from critique_pictures import (
    MAP_SIZE,
    PLACEMENTS,
    SMALLEST_SUBJECT,
    Framing,
    LoadedSources,
    Photo,
    box_placement,
    defocused,
    draw_framing,
    load_sources,
    place_cutout,
    subject_coverage,
    subject_map,
)
from critique_qualities import measure_qualities
from critique_styles import APART, apply_light, draw_styles, looks_like, monochrome, style_labels
from PIL import Image, ImageDraw, ImageFont


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
MERITS = {"stands_out_by_light": 0.2, "stands_out_by_colour": 0.25, "calm_background": 0.2, "busy_background": -0.3,
          "complementary_colours": 0.2, "analogous_colours": 0.2, "symmetric": 0.2}  # fmt: skip
BEST_SCORE = 8.0  # of a picture without a fault or a merit
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
        # Most photographs do not show what is level, so that a tilt is often dropped.
        if drawn < probability * (1.8 if aspect == "level" else 1):
            fault = ASPECT_FAULTS[aspect][side]
            faults[fault] = min(power, STRONGEST.get(fault, 2.5))
    if "noisy" in faults and high > low >= 0 and rng.random() < 0.25:
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


def score_distribution(
    faults: dict[str, float], unsure: int, rng: np.random.Generator, qualities: Collection[str] = ()
) -> list[float]:
    """Shares of the scores 1..10: a normal distribution whose mean falls with the faults and their strength, and rises
    a little with the qualities."""
    mean = BEST_SCORE - 0.3 * unsure + min(sum(MERITS.get(quality, 0) for quality in qualities), 0.7)
    for fault, strength in faults.items():
        penalty = PENALTIES[fault]
        mean -= penalty * (0.4 + 0.6 * strength) if penalty > 0.2 else penalty
    mean, spread = min(max(mean, 1.3), 9.3), rng.uniform(1.1, 1.4)
    weights = np.exp(-0.5 * ((np.arange(1, SCORES + 1) - mean) / spread) ** 2)
    return (weights / weights.sum()).tolist()


# Samples -------------------------------------------------------------------------------------------------------------


def make_sample(
    index: int,
    split: str,
    seed: int,
    sources: LoadedSources,
    *,
    long_side: int = 320,
    fault_probability: float = 0.28,
    strength: tuple[float, float] = (1.0, 2.5),
    composite_share: float = 0.5,
    natural_share: float = 0.25,
    light_share: float = 0.1,
    style_share: float = 0.2,
    bar_share: float = 0.05,
    raw_share: float = 0.0,
) -> dict[str, Any]:
    """One sample, the same for the same (seed, split, index): a picture and what is true of it.

    image: PIL RGB. caption, references: text, and five phrasings of the same truth (the caption is the first).
    aspects: floats in the order of ASPECTS, 1 present, 0 absent, -1 unknown or not applicable. aspect_labels: the
    first 18 of them, of FAULTS. degrees: how far what was level runs down toward the right, NaN where the picture does
    not show what is level. score: shares of the scores 1..10. saliency: float32 (32, 32), the subject's coverage of the
    whole picture, squashed to a square, all zeros where there is no truth. composite, source, cutout: how it was made.
    strengths: fault -> strength as a multiple of the least that counts as a fault.

    long_side: of the picture, in pixels; some are smaller. fault_probability: of a fault in each photometric aspect.
    strength: least and greatest multiple of the least fault. Shares of all samples: composite_share, with a cut-out as
    their subject; natural_share, photographs as they were taken, without any edit; light_share, edited by less than half
    the least fault, so that nothing is wrong with them; style_share, with a style, which is no fault;
    bar_share, between black or white bars or in a frame. raw_share: of the edited ones, whose photograph keeps a part, from
    nothing to all, of the light and colour that it was taken with before anything is done to it.
    """
    rng = np.random.default_rng([seed, index, int.from_bytes(hashlib.sha256(split.encode()).digest()[:4], "big")])
    composite, manner = _draw_manner(rng, composite_share, natural_share, light_share, style_share)
    probability = 0 if manner in ("natural", "light") else fault_probability
    faults = draw_faults(rng, probability=probability, strength=strength, composite=composite)
    photo = sources.draw_photo(composite, rng)
    tilt = _draw_tilt(faults, photo.level, manner, rng)
    long_side = round(long_side * rng.uniform(0.7, 1)) if rng.random() < 0.3 else long_side
    framing = draw_framing(photo, tilt, long_side, rng)
    canvas = framing.render(_base_picture(photo, manner, raw_share, rng))
    if composite:
        scene = _pasted(canvas, framing, faults, sources, rng)
    else:
        scene = _plain(canvas, photo, framing, faults, manner, rng)
    unsure, likely = unsure_faults(scene.measures), looks_like(scene.canvas, scene.coverage)
    _drop_hidden(faults, unsure)
    styles, toned = (), False
    if manner == "style":
        styles = draw_styles(rng, cutout=composite, subject=scene.coverage is not None)
        toned = bool("monochrome" in styles and rng.random() < 0.4)
        for style in styles:
            for fault in {fault for names in APART[style] for fault in names}:
                faults.pop(fault, None)
    canvas, clean = (scene.canvas,) * 2 if manner == "natural" else _edited(scene, faults, styles, toned, manner, rng)
    known = dict(zip(FAULTS, aspect_labels(faults, unsure, subject=scene.placement_known, depth=scene.depth_known)))
    if not photo.level or ("tilted" not in faults and abs(tilt) > 2.4):
        known["tilted"] = -1.0  # not to be told, or neither level nor clearly tilted
    likely |= looks_like(clean, scene.coverage) if styles else _lookalikes(faults)
    known |= style_labels(known, styles, likely, toned)
    known |= measure_qualities(clean, scene.coverage) | _kind_labels(scene.kind)
    if "monochrome" in styles:  # a tone is no choice of colours
        known |= dict.fromkeys(("stands_out_by_colour", "complementary_colours", "analogous_colours"), 0.0)
    labels = [known[aspect] for aspect in ASPECTS]
    truth = _truth(faults, labels[: len(FAULTS)], scene, styles)
    references = _phrasings(truth, rng)
    qualities = [quality for quality in QUALITIES if known[quality] == 1]
    image, saliency = _with_bars(canvas, scene.saliency, rng) if rng.random() < bar_share else (canvas, scene.saliency)
    return {
        "image": _as_jpeg(image, rng),
        "caption": references[0],
        "references": references,
        "aspect_labels": labels[: len(FAULTS)],
        "aspects": labels,
        "degrees": framing.slope if photo.level else math.nan,
        "score": score_distribution(faults, len(unsure - faults.keys()) if not styles else 0, rng, qualities),
        "saliency": saliency.astype(np.float32),
        "composite": bool(composite),
        "source": photo.id,
        "cutout": scene.cutout,
        "strengths": truth.faults,
    }


def _draw_manner(
    rng: np.random.Generator, composite: float, natural: float, light: float, style: float
) -> tuple[bool, str]:
    """Whether there is a cut-out, and how the picture is treated: "natural" (never with a cut-out), "light", "style"
    or "faults"."""
    drawn, other = rng.random(), rng.random()
    if drawn >= 1 - natural and drawn >= composite:
        return False, "natural"
    edited = max(1 - natural, 1e-6)
    manner = "light" if other < light / edited else "style" if other < (light + style) / edited else "faults"
    return bool(drawn < composite), manner


def _base_picture(photo: Photo, manner: str, raw_share: float, rng: np.random.Generator) -> Image.Image:
    """The photograph before any edit."""
    if manner == "natural":
        return photo.raw
    if raw_share and rng.random() < raw_share:
        return Image.blend(photo.normal, photo.raw, rng.random())
    return photo.normal


def _edited(
    scene: "Scene",
    faults: dict[str, float],
    styles: tuple[str, ...],
    toned: bool,
    manner: str,
    rng: np.random.Generator,
) -> tuple[Image.Image, Image.Image]:
    """The scene with its style, its blur and its photometric edits, with its noise and without."""
    canvas = scene.canvas
    for style in styles:
        canvas = canvas if style == "monochrome" else apply_light(style, canvas, scene.coverage, rng)
    if manner == "light":
        faults = draw_faults(rng, probability=0.35, strength=(0.15, 0.45), composite=False)
    # The least blur is what anybody sees who has the picture at full size: of other people's blurs most are this slight.
    blur = 0.006 * faults["blurred"] ** 1.5 if "blurred" in faults else rng.uniform(0, 0.0025)
    way = str(rng.choice(BLURS, p=(0.4, 0.25, 0.2, 0.15)))
    if blur * min(canvas.size) > 0.3:
        canvas = blurred(canvas, blur * min(canvas.size), way, rng)
    edits = draw_edits(faults, scene.measures, rng, styles)
    clean = develop(canvas, replace(edits, noise=0), rng)
    if "monochrome" in styles:
        clean = monochrome(clean, toned, rng)
    return with_grain(clean, edits, rng, grey="monochrome" in styles), clean


def _lookalikes(faults: dict[str, float]) -> set[str]:
    """Styles that a picture with these faults could be taken for."""
    likely = {"monochrome"} if faults.get("muted", 0) > 1.6 else set()
    return likely | ({"foggy", "high_key"} if {"low_contrast", "overexposed"} <= faults.keys() else set())


def _kind_labels(kind: str) -> dict[str, float]:
    return {other: float(other == kind) if kind else -1.0 for other in KINDS}


@dataclass(frozen=True)
class Scene:
    """A picture before its photometric faults and what is known of its subject: `coverage` (canvas size, 0..1) is where
    it is, None if unknown, `share` its long side as a share of the picture's (0 for unknown)."""

    canvas: Image.Image
    measures: Measures
    saliency: np.ndarray
    placement_known: bool
    depth_known: bool = False
    cutout: str = ""
    share: float = 0.0
    kind: str = ""
    coverage: np.ndarray | None = None


def _plain(
    canvas: Image.Image,
    photo: Photo,
    framing: Framing,
    faults: dict[str, float],
    manner: str,
    rng: np.random.Generator,
) -> Scene:
    """A photograph as it is, with its own subject where that is known."""
    placement, saliency, coverage = "", np.zeros((MAP_SIZE, MAP_SIZE), np.float32), None
    if photo.box is not None:
        placement, _ = box_placement(photo, framing)
    if photo.mask is not None:
        covered = subject_map(photo, framing)
        if covered.mean() > SMALLEST_SUBJECT / 2 and covered.max() > 0.5:
            saliency, coverage = covered, subject_coverage(photo, framing)
    if placement:
        faults[placement] = 1.0
    # A subject that is all but out of the frame is not what the picture shows.
    kind = photo.kind if photo.mask is None or coverage is not None else ""
    if coverage is None and manner != "natural" and abs(framing.degrees) < 1 and rng.random() < 0.25:
        half = canvas.crop((0, 0, canvas.width // 2, canvas.height))  # a symmetrical view: they are rare
        canvas = canvas.copy()
        canvas.paste(half.transpose(Image.Transpose.FLIP_LEFT_RIGHT), (canvas.width - half.width, 0))
    measures = measure(canvas)
    depth_known, drawn, side, power = False, rng.random(), rng.integers(2), rng.uniform(1, 2.5)
    if coverage is not None and 0.03 < coverage.mean() < 0.6:
        ground, subject = sharp_shares(canvas, coverage)
        depth_known = ground > 0.45 and subject > 0.6
    if depth_known and manner in ("faults", "style") and drawn < 0.5:
        faults[DEPTHS[side]] = power
        faults.pop("blurred", None)
        canvas = defocused(canvas, coverage, DEPTHS[side], power)
    limit_drawbacks(faults, rng)
    return Scene(canvas, measures, saliency, bool(placement), depth_known, kind=kind, coverage=coverage)


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
    name, picture = sources.draw_cutout(rng)
    canvas, coverage, share = place_cutout(canvas, picture, faults, framing.degrees, rng)
    # What blurs the background for depth must not count as a want of detail.
    measures = replace(measure(canvas), detail=behind.detail, sharp_share=behind.sharp_share, floor=behind.floor)
    saliency = np.asarray(Image.fromarray(coverage).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BOX))
    kind = sources.cutout_kinds[name]
    return Scene(canvas, measures, saliency, True, depth_known, name, share, kind, coverage)


def _draw_tilt(faults: dict[str, float], level: bool, manner: str, rng: np.random.Generator) -> float:
    """Degrees to turn the picture by: at least 5 for a fault, at most one else; now and then between the two, which is
    neither. Where nothing shows what is level a turn is no fault: it is taken out of `faults`."""
    side, jitter, between = rng.choice((-1.0, 1.0)), rng.uniform(-1, 1), rng.random() < 0.08
    if manner == "natural":
        return 0.0
    if "tilted" in faults and level:
        return side * min(5 * faults["tilted"], 14)
    if faults.pop("tilted", None) or between:
        return side * (3.75 + 1.25 * jitter)
    return side * 2.25 * abs(jitter) if manner == "light" else side * max(0.0, jitter)


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


def _truth(faults: dict[str, float], labels: list[float], scene: Scene, styles: tuple[str, ...]) -> Truth:
    known, measures, share = dict(zip(FAULTS, labels)), scene.measures, scene.share
    fine = {aspect for aspect in PHOTOMETRIC if all(known[fault] == 0 for fault in ASPECT_FAULTS[aspect])}
    if styles:  # what a style does to light and colour is not for praise of their being ordinary
        fine -= {"exposure", "contrast", "white_balance", "saturation"}
    size = "" if not share else "small" if share < 0.32 else "large" if share > 0.48 else ""
    texture = "busy" if measures.detail > 0.042 else "calm" if measures.detail < 0.016 else ""
    return Truth(
        faults={fault: faults[fault] for fault in FAULTS if fault in faults},
        fine=frozenset(fine),
        hue="" if styles else measures.hue,
        brightest=""
        if styles or (measures.brightest == "middle" and "vignetting" not in fine)
        else measures.brightest,
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


def _with_bars(canvas: Image.Image, saliency: np.ndarray, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """The picture between bars or in a frame, black or white; they are no fault and no subject."""
    form, shade = str(rng.choice(("letterbox", "pillarbox", "frame"))), int(rng.choice((0, 0, 255)))
    wide, thin = rng.uniform(0.06, 0.2), rng.uniform(0.02, 0.06)
    across = {"pillarbox": wide, "frame": thin}.get(form, 0.0)
    down = {"letterbox": wide, "frame": thin * canvas.width / canvas.height}.get(form, 0.0)

    def framed(image: Image.Image, fill: Any) -> Image.Image:
        left, top = round(across * image.width), round(down * image.height)
        whole = Image.new(image.mode, (image.width + 2 * left, image.height + 2 * top), fill)
        whole.paste(image, (left, top))
        return whole

    picture = framed(canvas, (shade,) * 3)
    picture.thumbnail((max(canvas.size),) * 2, Image.Resampling.BICUBIC)
    seen = framed(Image.fromarray(saliency.astype(np.float32)).resize((320, 320), Image.Resampling.BILINEAR), 0.0)
    return picture, np.asarray(seen.resize(saliency.shape, Image.Resampling.BOX))


def _as_jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """With the traces that saving leaves."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(rng.integers(50, 99)), subsampling=int(rng.choice((0, 2))))
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
        named = [aspect for aspect, label in zip(ASPECTS, sample["aspects"]) if label == 1]
        verdict = compose_verdict(named, np.random.default_rng(number), sample["strengths"])
        strengths = ", ".join(
            f"{aspect} {sample['strengths'][aspect]:.1f}" if aspect in sample["strengths"] else aspect
            for aspect in named
        )
        lines = textwrap.wrap(f"[{mean:.1f}] {strengths or 'nothing'}", 54) + textwrap.wrap(verdict, 50)
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
