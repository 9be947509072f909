"""
Pictures whose faults were made by other means than the generator's: what is learned there should hold here too.

    python examples/critique/foreign_edits.py --num-samples 24 --out contact_sheet.png

Photographs and cut-outs are those of a split, as they were taken; of the generator only the words for faults, and the
rule by which an unedited picture has a fault of its own by nature, are used. Edits are Pillow's: gamma curves,
`ImageEnhance`, casts in YCbCr, boxes, motion and lost resolution as blur, shot noise, a radial gradient, JPEG.
"""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np
from critique_captions import ASPECT_FAULTS, FAULTS
from critique_data import contact_sheet, measure, unsure_faults
from critique_pictures import MAP_SIZE, LoadedSources, load_sources
from PIL import Image, ImageEnhance, ImageFilter


PLACES = {
    "subject_left_third": 1 / 3,
    "subject_centred": 1 / 2,
    "subject_right_third": 2 / 3,
}
HIDDEN_BY = {
    "overexposed": ("contrast",),
    "muted": ("white_balance",),
}  # aspects that such a picture would not show


def make_foreign_sample(index: int, split: str, seed: int, sources: LoadedSources) -> dict[str, Any]:
    """As `critique_data.make_sample`, without captions and scores. Every other one has a cut-out as its subject."""
    rng = np.random.default_rng([seed, index, 7])
    composite = bool(index % 2)
    pool = sources.backgrounds if composite else sources.photos
    image = _crop(pool[rng.integers(len(pool))].raw, rng)
    drawn = {aspect: str(rng.choice(names)) for aspect, names in ASPECT_FAULTS.items() if rng.random() < 0.25}
    unsure = unsure_faults(measure(image))
    known = set(ASPECT_FAULTS) - {"placement", "depth"}
    saliency = np.zeros((MAP_SIZE, MAP_SIZE), np.float32)
    if composite:
        drawn.pop("level", None)  # the subject would be turned out of its place
        drawn["placement"] = str(rng.choice(ASPECT_FAULTS["placement"]))
        known |= {"placement"} | ({"depth"} if "blurred" not in unsure else set())
        if "depth" in drawn:
            drawn.pop("sharpness", None)
        cutout = sources.cutouts[rng.integers(len(sources.cutouts))][1]
        image, saliency = _paste(image, cutout, drawn["placement"], drawn.get("depth", ""), rng)
    # What the picture has by nature is not added to, or taken away again by its opposite.
    drawn = {a: fault for a, fault in drawn.items() if a in known and not unsure & set(ASPECT_FAULTS[a])}
    for fault, aspects in HIDDEN_BY.items():
        if fault in drawn.values():
            drawn = {aspect: one for aspect, one in drawn.items() if aspect not in aspects}
            known -= set(aspects)
    for aspect in (
        "level",
        "sharpness",
        "exposure",
        "contrast",
        "white_balance",
        "saturation",
        "vignette",
        "noise",
    ):
        if aspect in drawn:
            image = _EDITS[drawn[aspect]](image, rng)
    labels = []
    for aspect, names in ASPECT_FAULTS.items():
        unknown = aspect not in known or (aspect not in drawn and bool(unsure & set(names)))
        labels += [1.0 if drawn.get(aspect) == name else -1.0 if unknown else 0.0 for name in names]
    return {
        "image": as_jpeg(image, int(rng.integers(70, 95))),
        "caption": "",
        "aspect_labels": labels,
        "score": [0.0] * 10,
        "saliency": saliency,
        "composite": composite,
        "strengths": dict.fromkeys(drawn.values(), 1.0),
    }


def _crop(photo: Image.Image, rng: np.random.Generator, size: tuple[int, int] = (360, 270)) -> Image.Image:
    """A part of the photograph in the ratio 4 : 3, upright or not."""
    width, height = size if rng.random() < 0.7 else size[::-1]
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.75, 1.0)
    box = round(width * scale), round(height * scale)
    left, top = (
        rng.integers(photo.width - box[0] + 1),
        rng.integers(photo.height - box[1] + 1),
    )
    return photo.crop((left, top, left + box[0], top + box[1])).resize((width, height), Image.Resampling.LANCZOS)


def _paste(
    image: Image.Image,
    cutout: Image.Image,
    placement: str,
    depth: str,
    rng: np.random.Generator,
) -> tuple[Image.Image, np.ndarray]:
    """The picture with a subject in it, and how much of each place that covers."""
    cutout = cutout.crop(cutout.getbbox())
    widest = 0.5 if placement in PLACES else 0.6
    scale = min(widest * image.width / cutout.width, 0.7 * image.height / cutout.height) * rng.uniform(0.7, 1.0)
    subject = cutout.resize((max(8, round(cutout.width * scale)), max(8, round(cutout.height * scale))))
    if depth == "background_blurred":
        image = image.filter(ImageFilter.BoxBlur(rng.uniform(0.02, 0.04) * min(image.size)))
    if depth == "subject_blurred":
        padded = Image.new("RGBA", (subject.width + 24, subject.height + 24))
        padded.paste(subject, (12, 12))
        subject = padded.filter(ImageFilter.BoxBlur(rng.uniform(0.014, 0.026) * min(image.size)))
    top = round(rng.uniform(0.35, 0.8) * (image.height - subject.height))
    if placement in PLACES:
        left = round(PLACES[placement] * image.width - subject.width / 2)
    else:
        outside = rng.uniform(0.2, 0.4) * subject.width
        left = round(-outside if rng.random() < 0.5 else image.width - subject.width + outside)
    image, coverage = image.copy(), Image.new("L", image.size)
    image.paste(subject, (left, top), subject.getchannel("A"))
    coverage.paste(subject.getchannel("A"), (left, top))
    return image, np.asarray(coverage.resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BOX), np.float32) / 255


# Edits ---------------------------------------------------------------------------------------------------------------


def _gamma(low: float, high: float):
    def edit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        gamma = rng.uniform(low, high)
        return image.point([round(255 * (code / 255) ** gamma) for code in range(256)] * 3)

    return edit


def _enhance(kind: type, low: float, high: float):
    return lambda image, rng: kind(image).enhance(rng.uniform(low, high))


def _cast(sign: int):
    def edit(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        luma, blue, red = image.convert("YCbCr").split()
        shift = sign * rng.uniform(12, 22)
        planes = (
            luma,
            blue.point(lambda code: code + shift),
            red.point(lambda code: code - 0.8 * shift),
        )
        return Image.merge("YCbCr", planes).convert("RGB")

    return edit


def _blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    kind = rng.integers(3)
    if kind == 0:
        return image.filter(ImageFilter.BoxBlur(rng.uniform(2.5, 5)))
    if kind == 1:  # a movement to the side
        kernel = [1 if row == 2 else 0 for row in range(5) for _ in range(5)]
        for _ in range(3):
            image = image.filter(ImageFilter.Kernel((5, 5), kernel))
        return image
    small = image.resize((round(image.width / 4), round(image.height / 4)), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BICUBIC)


def _shot_noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    photons = rng.uniform(40, 110)  # of a white pixel
    light = np.asarray(image, np.float64) / 255
    return Image.fromarray((np.clip(rng.poisson(light * photons) / photons, 0, 1) * 255).astype(np.uint8))


def _tilt(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    turned = image.rotate(rng.choice((-1, 1)) * rng.uniform(5, 11), Image.Resampling.BICUBIC)
    width, height = image.width * 0.72, image.height * 0.72
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return turned.resize(
        image.size,
        Image.Resampling.BICUBIC,
        box=(left, top, left + width, top + height),
    )


def _vignette(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    strength = rng.uniform(0.6, 0.9)
    gradient = Image.radial_gradient("L").resize(image.size, Image.Resampling.BILINEAR)  # 0 in the middle
    mask = gradient.point([round(255 * strength * (code / 255) ** 2) for code in range(256)])
    return Image.composite(Image.new("RGB", image.size), image, mask)


_EDITS = {
    "underexposed": _gamma(1.8, 2.6),
    "overexposed": _gamma(0.35, 0.5),
    "low_contrast": _enhance(ImageEnhance.Contrast, 0.3, 0.55),
    "high_contrast": _enhance(ImageEnhance.Contrast, 1.7, 2.4),
    "cool_cast": _cast(1),
    "warm_cast": _cast(-1),
    "muted": _enhance(ImageEnhance.Color, 0.05, 0.35),
    "oversaturated": _enhance(ImageEnhance.Color, 2.0, 3.2),
    "blurred": _blur,
    "noisy": _shot_noise,
    "tilted": _tilt,
    "vignetting": _vignette,
}


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="test", choices=("train", "test"))
    parser.add_argument("--num-samples", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", type=Path, help="folder with photos/ and cutouts/")
    parser.add_argument("--out", type=Path, default=Path("contact_sheet.png"))
    args = parser.parse_args()
    sources = load_sources(args.split, args.sources)
    samples = [make_foreign_sample(i, args.split, args.seed, sources) for i in range(args.num_samples)]
    for sample in samples:
        sample["caption"], sample["score"] = (
            ", ".join(f for f, v in zip(FAULTS, sample["aspect_labels"]) if v < 0),
            [0],
        )
    contact_sheet(samples).save(args.out)


if __name__ == "__main__":
    main()
