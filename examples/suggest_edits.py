"""
Suggests edits of photographs: the correction that the model scores higher by a margin, and crops around the subject.

    python examples/suggest_edits.py PHOTOS... --out suggestions

Exposure in stops, white balance and contrast are tried at several strengths, straightening only with `--straighten`. A
correction is suggested when the model's own score rises by `--margin` or more, then one of another kind on top of it when
that gains as much again. Nothing is tried that would add to a fault which the model's critique or its aspects name: what
is said to be underexposed is not darkened. Most good photographs stay as they are. Crops of 1:1, 4:5 and 16:9 are made
where they keep at least 5 points more of the saliency map inside than the crop from the middle would. A bare wall or a
lens cap stays as it is.

Written to DIR, of each photograph that something is suggested for:
    NAME-corrected.jpg      the corrected copy, at full size where the file can be read so (raw files at their preview's)
    NAME-before-after.jpg   the photograph on the left, the corrected copy on the right
    NAME-crop-1x1.jpg       the crop, of the corrected copy if there is one; the same for 4x5 and 16x9
and of each photograph
    NAME.json               all that was tried, with its scores

A score is one model's taste: a night that is meant to be dark may be brightened. Copies are sRGB JPEGs without EXIF.
Originals are only ever read, and nothing that is there is overwritten: what has its NAME.json in DIR is left as it is.

Exit status: 0 all were looked at, 1 some files failed (named on stderr), 2 nothing could be started.
"""

import argparse
import json
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from caption_photos import CannotStart, add_model_arguments, reduced, start_model
from common import critique
from library_file import CERTAIN
from photo_files import RAW_SUFFIXES, Failure, Photo, find_photos, read_photo
from photo_library import written_beside
from picture_edits import CORRECTIONS, corrected, cut, is_featureless, salient_crop
from PIL import Image
from transformers.utils import logging

from ase_mllm import read_photograph


JUDGED_SIDE, SHOWN_SIDE = 768, 1000  # longest sides: that is judged, of each half of before and after
ASKED = "straighten_degrees"  # only tried if asked for
RATIOS = {"1:1": 1.0, "4:5": 4 / 5, "16:9": 16 / 9}
CROP_GAIN = 0.05  # of the saliency map's mass
BATCH = 8  # images that are judged at a time
CRITIQUE_TOKENS = 160  # longest critique
# What an edit would add to, by how critiques and aspects name it: edits to less, and to more, of each kind
WORSE = {
    "exposure_ev": (r"under-?expos|too dark", r"over-?expos|too bright"),
    "warmth_ev": (r"\b(cool|cold|blue|bluish) cast", r"\b(warm|orange|yellow|yellowish) cast"),
    "contrast": (r"\bflat\b|low[ -]contrast", r"\bharsh\b|contrasty|high[ -]contrast"),
}


# Corrections ---------------------------------------------------------------------------------------------------------


class Judge:
    """A model as one who scores photographs, and writes no more about them than is asked for."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor = model, processor

    def look(self, images: list[Image.Image], tokens: int = 1) -> Iterator[dict[str, Any]]:
        for start in range(0, len(images), BATCH):
            some = images[start : start + BATCH]
            sizes = [image.size[::-1] for image in some]
            yield from critique(self.model, self.processor, some, sizes, max_new_tokens=tokens)

    def scores(self, images: list[Image.Image]) -> list[float]:
        return [answer["score"]["mean"] for answer in self.look(images)]


def possible_edits(answer: dict[str, Any], straighten: bool) -> list[tuple[str, float]]:
    """All kinds and strengths but those that would add to a fault which the model names."""
    aspects = [name.replace("_", " ") for name, share in answer["aspects"].items() if share >= CERTAIN]
    named = "\n".join([answer["caption"], *aspects]).lower()
    edits = []
    for kind, (_, strengths) in CORRECTIONS.items():
        less, more = (bool(re.search(words, named)) for words in WORSE.get(kind, ("(?!)", "(?!)")))
        nothing = 1 if kind == "contrast" else 0  # the strength that leaves all as it is
        if kind != ASKED or straighten:
            edits += [(kind, one) for one in strengths if not (less if one < nothing else more)]
    return edits


def suggest_correction(
    judge: Judge, image: Image.Image, score: float, edits: list[tuple[str, float]], margin: float
) -> dict[str, Any]:
    """
    What to do to an image of this score, one kind of edit after another, each worth `margin` of the score by itself.

    Returns `score`, `corrected_score`, `steps` (kind, strength) in their order, and `tried` with the scores of all.
    """
    before, steps, tried = score, [], []
    while options := [(kind, strength) for kind, strength in edits if kind not in dict(steps)]:
        images = [corrected(image, *option) for option in options]
        scores = judge.scores(images)
        tried += [{"after": list(steps), "step": list(one), "score": round(s, 3)} for one, s in zip(options, scores)]
        best = int(np.argmax(scores))
        if not scores[best] - score >= margin:
            break
        score, image = scores[best], images[best]
        steps.append(list(options[best]))
    return {"score": round(before, 3), "corrected_score": round(score, 3), "steps": steps, "tried": tried}


# Output --------------------------------------------------------------------------------------------------------------


def full_size(photo: Photo) -> Image.Image:
    """The photograph as large as it can be read as people see it; its borders are cut where they were for judging."""
    if photo.note is not None or photo.path.suffix.lower() in RAW_SUFFIXES:
        return photo.image
    try:
        return read_photograph(photo.path)
    except OSError:  # a raw file by another name
        return photo.image


def side_by_side(before: Image.Image, after: Image.Image) -> Image.Image:
    halves = [reduced(image, SHOWN_SIDE) for image in (before, after)]
    gap = SHOWN_SIDE // 50
    size = (sum(half.width for half in halves) + gap, max(half.height for half in halves))
    picture = Image.new("RGB", size, "white")
    picture.paste(halves[0], (0, 0))
    picture.paste(halves[1], (halves[0].width + gap, 0))
    return picture


def name_of(photo: Photo) -> str:
    """Like the photograph's, told from others of its name."""
    stem = photo.path.stem.encode(errors="replace")[:80].decode(errors="ignore")
    return f"{stem}-{photo.stamp.sha256[:10]}"


def suggest(judge: Judge, photo: Photo, args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Image.Image]]:
    """What is written to NAME.json, and the pictures by the ends of their names."""
    small = reduced(photo.image, JUDGED_SIDE)
    (answer,) = judge.look([small], CRITIQUE_TOKENS)
    featureless = is_featureless(photo.image)  # what is scored higher then, and where the map is high, means nothing
    edits = [] if featureless else possible_edits(answer, args.straighten)
    said = suggest_correction(judge, small, answer["score"]["mean"], edits, args.margin)
    whole = original = full_size(photo)
    for kind, strength in said["steps"]:
        small, whole = corrected(small, kind, strength), corrected(whole, kind, strength)
    pictures = {}
    if said["steps"]:
        pictures = {"corrected": whole, "before-after": side_by_side(original, whole)}
    (after,) = judge.look([small])
    heat, crops = after["heat"].float().cpu().numpy(), {}
    for name, ratio in () if featureless else RATIOS.items():
        crop = salient_crop(heat, ratio)
        if crop is None:
            continue
        suggested = crop.inside - crop.centred >= CROP_GAIN
        crops[name] = {"suggested": suggested, "box": crop.box, "inside": crop.inside, "centred": crop.centred}
        if suggested:
            pictures[f"crop-{name.replace(':', 'x')}"] = cut(whole, crop.box)
    record = {"path": str(photo.path), "model": args.model, "caption": answer["caption"], "margin": args.margin}
    record |= {**said, "crops": crops}
    return record, pictures


def write(photo: Photo, record: dict[str, Any], pictures: dict[str, Image.Image], out: Path):
    name = name_of(photo)
    files = {end: out / f"{name}-{end}.jpg" for end in pictures}
    for path in files.values():
        if os.path.lexists(path):
            raise FileExistsError(f"{path} is there already: move it away, or choose another --out")
    for end, path in files.items():
        with written_beside(path) as beside:
            pictures[end].save(beside, "JPEG", quality=92, optimize=True)
    with written_beside(out / f"{name}.json") as beside:  # last: where it is, all is
        beside.write_text(json.dumps({**record, "files": [path.name for path in files.values()]}, indent=1) + "\n")


def in_words(kind: str, strength: float) -> str:
    """An edit as a photographer would say it."""
    if kind == "exposure_ev":
        return f"exposure {strength:+g} EV"
    if kind == "warmth_ev":
        return f"{'warmer' if strength > 0 else 'cooler'} by {abs(strength):g} EV"
    if kind == "contrast":
        return f"contrast {100 * (strength - 1):+.0f} %"
    degrees = f"{abs(strength):g} degree{'' if abs(strength) == 1 else 's'}"
    return f"straighten by {degrees} to the {'left' if strength > 0 else 'right'}"


def line_of(record: dict[str, Any]) -> str:
    steps = ", ".join(in_words(kind, strength) for kind, strength in record["steps"])
    crops = ", ".join(name for name, crop in record["crops"].items() if crop["suggested"])
    scores = f"{record['score']:.1f}" + (f" → {record['corrected_score']:.1f}" if steps else "")
    return f"{record['path']}: {scores}  {steps or 'as it is'}" + (f"; crops {crops}" if crops else "")


# Run -----------------------------------------------------------------------------------------------------------------


def run(files: list[Path], args: argparse.Namespace) -> int:
    judge, corrections, crops, before, failed = None, 0, 0, 0, 0
    args.out.mkdir(parents=True, exist_ok=True)
    for file in files:
        photo = read_photo(file)
        try:
            if isinstance(photo, Failure):
                raise OSError(photo.reason)
            if os.path.lexists(args.out / f"{name_of(photo)}.json"):
                before += 1
                continue
            if judge is None:
                judge = Judge(*start_model(args))
            record, pictures = suggest(judge, photo, args)
            write(photo, record, pictures, args.out)
        except (OSError, RuntimeError, ValueError) as error:  # cannot be read, judged or written
            print(f"{file}: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
            failed += 1
            continue
        corrections += bool(record["steps"])
        crops += sum(crop["suggested"] for crop in record["crops"].values())
        print(line_of(record))
    looked = len(files) - before - failed
    print(f"{looked} looked at: {corrections} corrections and {crops} crops suggested. {failed} failed.")
    if before:
        print(f"{before} had their suggestions in {args.out} already; another --out makes them anew.")
    return 1 if failed else 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTOS", help="photographs and folders of them")
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("suggestions"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.5,
        help="how much higher the score must be, of 1 to 10 (default: %(default)s)",
    )
    parser.add_argument("--straighten", action="store_true", help="also try to turn photographs by a few degrees")
    args = parser.parse_args(argv)
    args.photos, args.out = [path.expanduser() for path in args.photos], args.out.expanduser()
    for path in args.photos:
        if not os.path.lexists(path):
            parser.error(f"there is no file or folder {path}")
    if not 0 < args.margin < 9:
        parser.error(f"--margin is {args.margin:g}, it must be above 0 and below 9")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads is {args.threads}, it must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of odd EXIF, nothing to act on
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    logging.disable_progress_bar()
    found = find_photos(args.photos)
    for failure in found.failures:
        print(f"{failure.path}: {failure.reason}", file=sys.stderr)
    own = args.out.resolve()
    files = [file for file in found.files if own not in file.resolve().parents]
    try:
        if not files:
            raise CannotStart("No photographs found.")
        return run(files, args) or (1 if found.failures else 0)
    except (CannotStart, OSError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
