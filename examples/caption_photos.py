"""
Captions photographs: a critique in words, a score, and a map of what the model looked at, on one page to leaf through.

    python examples/caption_photos.py PHOTOS... [--model NAME_OR_PATH] [--out DIR]

PHOTOS are files and folders (searched to the bottom, hidden files left out): JPEG, PNG, WebP and TIFF. The default
model is the bundled one; any ASE checkpoint, a folder or a Hub id, can take its place. Photographs are only ever read.

Written to DIR (default `captions/`):
    gallery.html    the page, in one file that needs no network
    captions.jsonl  one line a photograph, written as it goes
    failed.jsonl    one line a file that could not be captioned, with the reason
    overlays/       the photographs under their heat maps

Exit status: 0 all captioned, 1 some files failed (named on stderr and on the page), 2 nothing could be started.
"""

import argparse
import base64
import io
import json
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import torch
from common import critique
from PIL import ExifTags, Image, UnidentifiedImageError
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from ase_mllm import read_photograph


HERE = Path(__file__).parent
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF"]  # NOTE: Pillow's other readers are never tried, one of them starts programs
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"}
PHOTO_SIDE, OVERLAY_SIDE, THUMB_SIDE = 2048, 1280, 480  # longest sides: for the model, in overlays/, on the page
SHORTEST_SIDE = 16


@dataclass
class Photo:
    """An upright sRGB photograph, reduced to `PHOTO_SIDE`; `width` and `height` are the original's, upright."""

    path: Path
    image: Image.Image
    width: int
    height: int


@dataclass
class Failure:
    """A file that could not be captioned, and why."""

    path: Path
    reason: str


# Photographs ---------------------------------------------------------------------------------------------------------


def find_photos(arguments: list[Path], out: Path) -> tuple[list[Path], list[Failure]]:
    """Every photograph once, in order, and folders that could not be read. Named files are taken whatever they are."""
    found, failures = [], []

    def unreadable(error: OSError):
        failures.append(Failure(Path(error.filename), error.strerror))

    for argument in arguments:
        if not argument.is_dir():
            found.append(argument)
            continue
        for folder, subfolders, names in os.walk(argument, onerror=unreadable):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            files = [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
            found += [file for file in files if file.suffix.lower() in SUFFIXES]
    unique: dict[str, Path] = {}
    for file in found:
        unique.setdefault(os.path.realpath(file), file)
    return [file for file in unique.values() if not is_overlay(file, out)], failures


def is_overlay(file: Path, out: Path) -> bool:
    """Whether this script made the file, now or in an earlier run."""
    folder = Path(os.path.realpath(file.parent))
    earlier = folder.name == "overlays" and (folder.parent / "captions.jsonl").is_file()
    return earlier or folder == out.resolve() / "overlays"


def overlay_names(files: list[Path]) -> list[str]:
    """A file name an overlay, like the photograph's; numbered where two would overwrite each other."""
    names, taken = [], set()
    for file in files:
        name, count = file.stem, 1
        while name.casefold() in taken:
            count += 1
            name = f"{file.stem}-{count}"
        taken.add(name.casefold())
        names.append(f"{name}.jpg")
    return names


def read_photo(path: Path) -> Photo | Failure:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # NOTE: opening a named pipe would wait for ever
            return Failure(path, "not a file")
        if status.st_size == 0:
            return Failure(path, "empty file (0 bytes)")
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            image.draft("RGB", (PHOTO_SIDE, PHOTO_SIDE))  # a large JPEG is decoded small
            if image.getexif().get(ExifTags.Base.Orientation, 1) > 4:  # turned by a quarter
                width, height = height, width
            image = read_photograph(image, PHOTO_SIDE)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        return Failure(path, f"too large: over the limit of {limit:.3g} megapixels (raise it with --max-megapixels)")
    except UnidentifiedImageError:
        return Failure(path, "not a JPEG, PNG, WebP or TIFF image, or damaged at its start")
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = error.strerror if isinstance(error, OSError) else None
        return Failure(path, reason or f"damaged: {error or type(error).__name__}")
    if min(image.size) < SHORTEST_SIDE:
        return Failure(path, f"too small to judge: {width} × {height} pixels")
    return Photo(path, image, width, height)


def read_batches(files: list[Path], size: int) -> Iterator[list[Photo | Failure]]:
    """`size` files at a time, the next ones read while the caller works: at most three batches are in memory."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = None
        for start in range(0, len(files), size):
            following = reader.submit(lambda batch: [read_photo(file) for file in batch], files[start : start + size])
            if upcoming is not None:
                yield upcoming.result()
            upcoming = following
        if upcoming is not None:
            yield upcoming.result()


# Model ---------------------------------------------------------------------------------------------------------------


def load_model(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model, on the best device there is, and processor."""
    model_type = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code).model_type
    if model_type != "ase":
        raise ValueError(f"{name} is a {model_type!r} model, not an ASE checkpoint.")
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = "float32" if device == "cpu" else "auto"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    processor.tokenizer.padding_side = "left"  # what is generated continues the end of each row
    return model.eval().to(device), processor


# Results -------------------------------------------------------------------------------------------------------------


def reduced(image: Image.Image, side: int) -> Image.Image:
    image = image.copy()
    image.thumbnail((side, side))
    return image


def data_uri(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    reduced(image, THUMB_SIDE).save(buffer, "JPEG", quality=quality, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def as_record(photo: Photo, answer: dict[str, Any], overlay: str) -> dict[str, Any]:
    """A line of captions.jsonl."""
    return {
        "path": str(photo.path),
        "caption": answer["caption"],
        "score": {name: round(value, 3) for name, value in answer["score"].items()},
        "stars": round(answer["score"]["mean"]) / 2,  # a rating of 1 to 10 in half stars
        "aspects": {name: round(share, 3) for name, share in answer["aspects"].items()},
        "width": photo.width,
        "height": photo.height,
        "overlay": overlay,
    }


def as_card(record: dict[str, Any], photo: Photo, overlay: Image.Image, folder: str) -> dict[str, Any]:
    """What the page shows of a photograph; its name is the path below `folder`."""
    named = sorted((name for name, share in record["aspects"].items() if share >= 0.5), key=record["aspects"].get)
    return {
        **record,
        "name": os.path.relpath(photo.path, folder),
        "aspects": [name.replace("_", " ") for name in reversed(named)],
        "photo_uri": data_uri(photo.image, quality=80),
        "overlay_uri": data_uri(overlay, quality=65),
    }


def write_gallery(path: Path, **context: Any) -> None:
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("gallery.html.jinja").stream(**context)
    # file names need not be valid text
    page.dump(str(path), encoding="utf-8", errors="replace")


def caption_all(
    model: Any, processor: Any, files: list[Path], failures: list[Failure], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Writes captions.jsonl, failed.jsonl and the overlays as it goes; returns the page's cards and adds failures."""
    cards, names = [], dict(zip(files, overlay_names(files)))
    common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    with (
        open(args.out / "captions.jsonl", "w", encoding="utf-8") as captions,
        open(args.out / "failed.jsonl", "w", encoding="utf-8") as failed,
        tqdm(total=len(files), unit="photo", desc="Captioning") as progress,
    ):
        (args.out / "overlays").mkdir(exist_ok=True)

        def report(failure: Failure):
            progress.write(f"{failure.path}: {failure.reason}", file=sys.stderr)
            failed.write(json.dumps({"path": str(failure.path), "reason": failure.reason}) + "\n")

        for failure in failures:
            report(failure)
        for batch in read_batches(files, args.batch_size):
            for failure in (item for item in batch if isinstance(item, Failure)):
                failures.append(failure)
                report(failure)
            photos = [item for item in batch if isinstance(item, Photo)]
            images = [photo.image for photo in photos]
            sizes = [reduced(image, OVERLAY_SIDE).size[::-1] for image in images]
            answers = critique(model, processor, images, sizes, max_new_tokens=args.max_new_tokens) if photos else []
            for photo, answer in zip(photos, answers, strict=True):
                overlay = processor.overlay_saliency(reduced(photo.image, OVERLAY_SIDE), answer["heat"])
                overlay.save(args.out / "overlays" / names[photo.path], quality=85)
                record = as_record(photo, answer, f"overlays/{names[photo.path]}")
                captions.write(json.dumps(record) + "\n")
                cards.append(as_card(record, photo, overlay, common))
            captions.flush()
            failed.flush()
            progress.update(len(batch))
    return cards


# Run -----------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTOS", help="photographs and folders of them")
    parser.add_argument(
        "--model",
        default=str(HERE / "ase-mini"),
        help="ASE checkpoint, a folder or a Hub id (default: the bundled one)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("captions"), metavar="DIR", help="where results go (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="photographs at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="longest critique (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many photographs")
    parser.add_argument("--max-megapixels", type=float, help="refuse larger photographs (default: Pillow's limit, 89)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the checkpoint")
    args = parser.parse_args(argv)
    # not every shell expands `~` within an argument of make
    args.photos, args.out = [path.expanduser() for path in args.photos], args.out.expanduser()
    for path in args.photos:
        if not os.path.lexists(path):
            parser.error(f"there is no file or folder {path}")
    for name in ("batch_size", "max_new_tokens", "limit", "max_megapixels"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} is {value:g}, it must be above 0")
    # NOTE: something of the same name that this script did not make must not be overwritten: it may be photographs
    present = [(args.out / name).exists() for name in ("captions.jsonl", "overlays")]
    if any(present) and not all(present):
        parser.error(f"{args.out} holds a captions.jsonl or an overlays folder from elsewhere: choose another --out")
    return args


def title_of(arguments: list[Path]) -> str:
    """The folder's name, when all photographs are from one."""
    folders = {argument.resolve() if argument.is_dir() else argument.resolve().parent for argument in arguments}
    return re.sub(r"[_-]+", " ", folders.pop().name) if len(folders) == 1 else ""


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of odd EXIF, nothing to act on
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    if args.max_megapixels is not None:
        Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6)
    files, failures = find_photos(args.photos, args.out)
    files = files[: args.limit]
    if not files:
        for failure in failures:
            print(f"{failure.path}: {failure.reason}", file=sys.stderr)
        print(f"No photographs found ({', '.join(sorted(SUFFIXES))}).", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        model, processor = load_model(args.model, args.trust_remote_code)
    except (OSError, ValueError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    cards = caption_all(model, processor, files, failures, args)
    page = args.out / "gallery.html"
    today = date.today()
    write_gallery(
        page,
        title=title_of(args.photos) or "Photographs",
        model=os.path.basename(os.path.abspath(args.model)),
        date=f"{today.day} {today:%B %Y}",
        cards=cards,
        failures=failures,
    )
    megabytes = page.stat().st_size / 1e6
    print(f"{len(cards)} captioned, {len(failures)} failed: {page} ({megabytes:.1f} MB)")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
