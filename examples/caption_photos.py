"""
Captions photographs: a critique in words, a score, and a map of what the model looked at, on one page to leaf through.

    python examples/caption_photos.py PHOTOS... [--model NAME_OR_PATH] [--out DIR]

PHOTOS are files and folders (searched to the bottom, hidden files left out): JPEG, PNG, WebP, TIFF and AVIF; with
`pip install pillow-heif` HEIC too, with `pip install rawpy` the raw files of cameras. What is left out is counted. The
default model is the bundled one; any ASE checkpoint, a folder or a Hub id, can take its place. Photographs are only ever
read.

Stop it whenever you like (Ctrl-C, even `kill -9`): the same command goes on. What is captioned is known by its content,
also where it was moved or renamed, and is not captioned again; an unchanged library does not even load the model.

Written to DIR (default `captions/`), of all photographs of all runs into it:
    gallery.html    the page; it opens from disk and needs no network
    gallery/        its index and thumbnails
    overlays/       the photographs under their heat maps
    captions.jsonl  one line a photograph
    failed.jsonl    one line a file that could not be captioned, with the reason
    library.sqlite  all of this, and what earlier runs said; any SQLite program reads it

With `--xmp` (it needs exiftool) stars, words and tags also go into XMP sidecars beside the photographs, where Lightroom,
darktable, digiKam and Immich look for them. What is in a sidecar stays there. Of the score, rounded to a whole number,
the page shows half as stars: 7 is 3.5. Sidecars take whole stars, and half ones are rounded up: of 9 and 10 become five
stars, of 7 and 8 four, of 5 and 6 three, of 3 and 4 two, of 1 and 2 one.

Exit status: 0 all captioned, 1 some files failed (named on stderr and on the page) or the run was ended before its end,
2 nothing could be started. With --some-may-fail it is 1 for failed files only where no photograph is on the page.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sqlite3
import sys
import time
import warnings
from collections import Counter
from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


# NOTE: before torch is imported. Threads that wait must sleep: spinning, they take the cores from each other wherever
# anything else runs, and a photograph takes many times as long
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from common import critique
from gallery import export
from photo_features import perceptual_hash, pooled_features
from photo_files import READER, SUFFIXES, Failure, Found, Judged, Photo, find_photos, read_photo
from photo_library import Library, LibraryError, as_key, written_beside
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging
from xmp_sidecars import FORMS, write_sidecars

from ase_mllm.processing_ase import AESTHETIC_PROMPTS


HERE = Path(__file__).parent
OVERLAY_SIDE, THUMB_SIDE = 1280, 480  # longest sides: in overlays/, on the page
SMALL_MODEL = 100e6  # parameters; below, more threads than one gain little, and lose much where others work too
EXPORT_EVERY = 300  # seconds from page to page while a run is at work
# Files of a checkpoint that its answers depend on
WEIGHTS = ["*.safetensors", "pytorch_model*.bin", "*config.json", "*.model", "*.jinja"]
WEIGHTS += ["tokenizer*", "chat_template*", "vocab*", "merges.txt", "*_map.json"]


# Photographs ---------------------------------------------------------------------------------------------------------


def read_batches(files: list[Path], size: int, judged: Container[str]) -> Iterator[list[Photo | Judged | Failure]]:
    """`size` files at a time, the next ones read while the caller works: at most three batches are in memory."""

    def read(start: int) -> list[Photo | Judged | Failure]:
        return [read_photo(file, judged) for file in files[start : start + size]]

    with ThreadPoolExecutor(max_workers=1) as reader:
        upcoming = None
        for start in range(0, len(files), size):
            following = reader.submit(read, start)
            if upcoming is not None:
                yield upcoming.result()
            upcoming = following
        if upcoming is not None:
            yield upcoming.result()


# Model ---------------------------------------------------------------------------------------------------------------


def ase_config(name: str, trust_remote_code: bool) -> Any:
    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if config.model_type != "ase":
        raise ValueError(f"{name} is a {config.model_type!r} model, not an ASE checkpoint.")
    return config


def load_model(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    """Model, on the best device there is, and processor."""
    ase_config(name, trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = "float32" if device == "cpu" else "auto"
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
    processor.tokenizer.padding_side = "left"  # what is generated continues the end of each row
    return model.eval().to(device), processor


def run_settings(library: Library, args: argparse.Namespace) -> dict[str, Any]:
    """What results depend on; other settings are another run, which captions all anew."""
    config = ase_config(args.model, args.trust_remote_code)
    folder = Path(args.model)
    if folder.is_dir():
        files = [file for file in folder.iterdir() if any(fnmatch(file.name, pattern) for pattern in WEIGHTS)]
        weights = library.hash_of_files(file for file in files if file.is_file())
    else:
        weights = f"{args.model}@{config._commit_hash}"
    return {
        "weights": weights,
        "prompt": AESTHETIC_PROMPTS["critique"],
        "reader": READER,
        "max_new_tokens": args.max_new_tokens,
    }


def critique_all(model: Any, processor: Any, photos: list[Photo], max_new_tokens: int) -> list[dict[str, Any]]:
    """An answer a photograph. What the model cannot do together is tried in halves; alone, it is an error."""
    images = [photo.image for photo in photos]
    sizes = [reduced(image, OVERLAY_SIDE).size[::-1] for image in images]
    try:
        return critique(model, processor, images, sizes, max_new_tokens=max_new_tokens)
    except RuntimeError as error:  # out of memory, most likely
        if len(photos) == 1:
            return [{"error": f"the model failed: {str(error).splitlines()[0]}"}]
    half = len(photos) // 2
    parts = photos[:half], photos[half:]
    return [answer for part in parts for answer in critique_all(model, processor, part, max_new_tokens)]


def features_of(model: Any, processor: Any, photo: Photo) -> dict[str, Any]:
    """What likeness is known by. A photograph that the model's encoder cannot do has its perceptual hash alone."""
    small = reduced(photo.image, THUMB_SIDE)
    try:
        embedding = pooled_features(model, processor, small)
    except (RuntimeError, ValueError):  # out of memory, or a base without image features
        embedding = None
    return {"sha256": photo.stamp.sha256, "embedding": embedding, "phash": perceptual_hash(small)}


# Results -------------------------------------------------------------------------------------------------------------


def reduced(image: Image.Image, side: int) -> Image.Image:
    image = image.copy()
    image.thumbnail((side, side))
    return image


def overlay_name(photo: Photo, run: int) -> str:
    """Like the photograph's, told from others of its name; short enough for every file system."""
    stem = photo.path.stem.encode(errors="replace")[:80].decode(errors="ignore")
    return f"overlays/{stem}-{photo.stamp.sha256[:10]}-{run}.jpg"


def save_jpeg(image: Image.Image, path: Path, quality: int) -> None:
    with written_beside(path) as beside:
        image.save(beside, "JPEG", quality=quality, optimize=True)


def keep(library: Library, processor: Any, photo: Photo, answer: dict[str, Any]) -> dict[str, Any]:
    """Writes a photograph's overlay and thumbnail, and returns its row of the library."""
    if "error" in answer:
        return {"sha256": photo.stamp.sha256, "error": answer["error"]}
    overlay = overlay_name(photo, library.run)
    thumbnail = f"gallery/thumbs/{photo.stamp.sha256[:2]}/{photo.stamp.sha256[:16]}-{READER}.jpg"
    (library.folder / thumbnail).parent.mkdir(parents=True, exist_ok=True)
    heat = processor.overlay_saliency(reduced(photo.image, OVERLAY_SIDE), answer["heat"])
    save_jpeg(heat, library.folder / overlay, quality=85)
    save_jpeg(reduced(photo.image, THUMB_SIDE), library.folder / thumbnail, quality=80)
    return {
        "sha256": photo.stamp.sha256,
        "caption": answer["caption"],
        "score": answer["score"]["mean"],
        "std": answer["score"]["std"],
        "aspects": json.dumps(answer["aspects"]),
        "width": photo.width,
        "height": photo.height,
        "note": photo.note,
        "overlay": overlay,
        "thumbnail": thumbnail,
    }


@dataclass
class Outcome:
    """What a run did: photographs captioned, files that failed, and why it ended early, if it did."""

    captioned: int = 0
    failed: int = 0
    stopped: str | None = None


class CannotStart(Exception):
    """Nothing was captioned, and why."""


def caption_all(library: Library, found: Found, files: list[Path], args: argparse.Namespace) -> Outcome:
    """Captions what has no result yet; each batch is in the library before the next one begins."""
    outcome, model, exported = Outcome(), None, time.monotonic()
    pending = [file for file in files if not library.is_unchanged(file)]
    judged, captioned = library.judged(), library.without_features()
    if captioned:
        print(f"{len(captioned)} captions lack what search needs: it is added, the captions stay as they are.")
    with tqdm(total=len(pending), unit="photo", desc="Captioning", disable=not pending) as progress:

        def report(failures: list[Failure]):
            outcome.failed += len(failures)
            for failure in failures:
                progress.write(f"{failure.path}: {failure.reason}", file=sys.stderr)

        try:
            report(found.failures)
            library.add(found.failures)
            for batch in read_batches(pending, args.batch_size, judged):
                photos = [item for item in batch if isinstance(item, Photo)]
                # copies of one photograph are captioned once
                new = {photo.stamp.sha256: photo for photo in photos if photo.stamp.sha256 not in judged}
                if new and model is None:
                    model, processor = start_model(args)
                features = {sha256: features_of(model, processor, photo) for sha256, photo in new.items()}
                new = {sha256: photo for sha256, photo in new.items() if sha256 not in captioned}
                answers = critique_all(model, processor, list(new.values()), args.max_new_tokens) if new else []
                results = [
                    keep(library, processor, photo, one) for photo, one in zip(new.values(), answers, strict=True)
                ]
                library.add(batch, results, features.values())
                judged.update(sha256 for sha256 in features if sha256 in captioned)
                judged.update(row["sha256"] for row in results if "error" not in row)
                broken = {row["sha256"]: row["error"] for row in results if "error" in row}
                report([item for item in batch if isinstance(item, Failure)])
                report([Failure(one.path, broken[one.stamp.sha256]) for one in photos if one.stamp.sha256 in broken])
                outcome.captioned += len(results) - len(broken)
                progress.update(len(batch))
                if time.monotonic() - exported > EXPORT_EVERY:
                    publish(library, found.left_out)
                    exported = time.monotonic()
        except KeyboardInterrupt:
            outcome.stopped = "interrupted"
        except (OSError, sqlite3.Error) as error:  # a full disk, most likely
            outcome.stopped = str(error)
    return outcome


def add_model_arguments(parser: argparse.ArgumentParser, threads: str = "cores to work on"):
    """What `start_model` is told."""
    parser.add_argument(
        "--model",
        default=str(HERE / "ase-mini"),
        help="ASE checkpoint, a folder or a Hub id (default: the bundled one)",
    )
    parser.add_argument("--threads", type=int, help=f"{threads} (default: one for small models, else all)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the checkpoint")


def refuse_below_zero(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str):
    """Ends the program with a word where one of these options is given and no number above 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} is {value:g}, it must be a number above 0")


def start_model(args: argparse.Namespace) -> tuple[Any, Any]:
    try:
        model, processor = load_model(args.model, args.trust_remote_code)
    except Exception as error:  # damaged weights, code that is missing: libraries raise nearly anything
        raise CannotStart(f"{args.model} cannot be loaded: {error}") from error
    if args.threads is not None or model.num_parameters() < SMALL_MODEL:
        torch.set_num_threads(args.threads or 1)
    return model, processor


def publish(library: Library, left_out: Counter) -> Path:
    today = date.today()
    page, aside = export(library, left_out, f"{today.day} {today:%B %Y}")
    for path in aside:
        print(f"{path}: moved here, since something else than this program wrote it", file=sys.stderr)
    return page


# Run -----------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTOS", help="photographs and folders of them")
    add_model_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("captions"), metavar="DIR", help="where results go (default: %(default)s)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="caption all anew; what earlier runs said stays in the library"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="photographs at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="longest critique (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first so many photographs")
    parser.add_argument("--max-megapixels", type=float, help="refuse larger photographs (default: Pillow's limit, 89)")
    parser.add_argument(
        "--xmp",
        nargs="?",
        const=FORMS[0],
        choices=FORMS,
        help="write XMP sidecars; how new ones are called (default: %(const)s), those that are there are updated",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="with --xmp: also change ratings and descriptions that are there"
    )
    parser.add_argument(
        "--some-may-fail",
        action="store_true",
        help="exit with 0 although files failed, if any photograph is on the page",
    )
    args = parser.parse_args(argv)
    # not every shell expands `~` within an argument of make
    args.photos, args.out = [path.expanduser() for path in args.photos], args.out.expanduser()
    for path in args.photos:
        if not os.path.lexists(path):
            parser.error(f"there is no file or folder {path}")
    refuse_below_zero(parser, args, "batch_size", "max_new_tokens", "limit", "max_megapixels", "threads")
    if args.xmp and shutil.which("exiftool") is None:
        parser.error("--xmp needs exiftool (apt install libimage-exiftool-perl, brew install exiftool, exiftool.org)")
    if args.overwrite and not args.xmp:
        parser.error("--overwrite goes with --xmp")
    return args


def describe(left_out: Counter) -> str:
    return "Left out: " + ", ".join(f"{number} × {kind}" for kind, number in sorted(left_out.items()))


def run(library: Library, found: Found, files: list[Path], args: argparse.Namespace) -> int:
    try:
        settings = run_settings(library, args)
    except Exception as error:  # no such model, no network, a damaged file: libraries raise nearly anything
        raise CannotStart(str(error)) from error
    library.begin_run(os.path.basename(os.path.abspath(args.model)), settings, args.fresh)
    gone = library.forget_missing(args.photos, found.files)
    if gone:
        print(f"{gone} files of earlier runs are gone from where they were.")
    outcome, shown = caption_all(library, found, files, args), 0
    try:
        page = publish(library, found.left_out)
        shown = sum(1 for _ in library.results())
        print(f"{outcome.captioned} captioned, {outcome.failed} failed, {shown} on the page: {page}")
    except (OSError, sqlite3.Error) as error:
        outcome.stopped = outcome.stopped or str(error)
    if outcome.stopped:
        again = "without --fresh the same command goes on" if args.fresh else "the same command goes on"
        print(f"Stopped: {outcome.stopped}. What was written is whole: {again}.", file=sys.stderr)
    elif args.xmp:
        outcome.failed += write_xmp(library, files, args)
    forgiven = args.some_may_fail and shown
    return 1 if outcome.stopped or (outcome.failed and not forgiven) else 0


def write_xmp(library: Library, files: list[Path], args: argparse.Namespace) -> int:
    """Writes the sidecars of this command's photographs; returns how many could not be written."""
    asked = {as_key(file) for file in files}
    results = (row for row in library.results() if as_key(row["path"]) in asked)
    sidecars = write_sidecars(results, args.xmp, args.overwrite)
    for problem in sidecars.problems:
        print(f"{problem.path}: {problem.reason}", file=sys.stderr)
    failed = len(sidecars.problems)
    print(f"Sidecars: {sidecars.written} written, {sidecars.unchanged} said it already, {failed} failed")
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of odd EXIF, nothing to act on
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    if args.max_megapixels is not None:
        Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6)
    logging.disable_progress_bar()
    try:
        found = find_photos(args.photos)
        if found.left_out:
            print(describe(found.left_out))
        files = found.files[: args.limit]
        if not files:
            for failure in found.failures:
                print(f"{failure.path}: {failure.reason}", file=sys.stderr)
            raise CannotStart(f"No photographs found ({', '.join(sorted(SUFFIXES))}).")
        command = shlex.join(sys.argv if argv is None else ["caption_photos.py", *argv])
        with Library(args.out, command) as library:
            return run(library, found, files, args)
    except (CannotStart, LibraryError, OSError, sqlite3.Error) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does
    sys.exit(main())
