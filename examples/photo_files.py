"""Finds photographs in folders and reads them: what is left out is counted by kind, what is broken says why."""

import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError, features

from ase_mllm import read_photograph
from ase_mllm.processing_ase import ReducedCopyError


try:
    import pillow_heif
except ImportError:
    pillow_heif = None
try:
    import rawpy
except ImportError:
    rawpy = None

# NOTE: Pillow's other readers are never tried, one of them starts programs
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF"]
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"}
# fmt: off
RAW_SUFFIXES = {
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
    ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
}
# fmt: on
HEIF_SUFFIXES = {".heic", ".heif", ".hif"}
if features.check("avif"):
    FORMATS.append("AVIF")
    SUFFIXES.add(".avif")
if pillow_heif is not None:
    pillow_heif.register_heif_opener()
    FORMATS.append("HEIF")
    SUFFIXES |= HEIF_SUFFIXES
if rawpy is not None:
    SUFFIXES |= RAW_SUFFIXES

READER = 1  # raise it when photographs come out otherwise: they are judged anew
PHOTO_SIDE = 2048  # longest side that is kept: the model sees less, the page and the overlays need no more
SHORTEST_SIDE = 16
RAW_PREVIEW_SIDE = 1024  # a raw file's own preview will do from this length on

SIDECAR_SUFFIXES = (".xmp", ".aae", ".pp3", ".dop")
# What is in folders of photographs and is not read, in the words of the page
KINDS = {
    **dict.fromkeys(HEIF_SUFFIXES, "HEIC (pip install pillow-heif, then they are read)"),
    **dict.fromkeys(RAW_SUFFIXES, "camera raw (pip install rawpy, then they are read)"),
    ".avif": "AVIF (this Pillow cannot read them)",
    ".gif": "GIF (not read: save as PNG)",
    ".bmp": "BMP (not read: save as PNG)",
    ".jxl": "JPEG XL (not read: save as JPEG)",
    **dict.fromkeys([".jp2", ".j2k", ".jpx"], "JPEG 2000 (not read: save as JPEG)"),
    **dict.fromkeys(
        [".psd", ".psb", ".xcf", ".svg", ".ai", ".eps", ".pdf"], "drawing or layered file (not read: export as JPEG)"
    ),
    **dict.fromkeys(
        [".mov", ".mp4", ".m4v", ".avi", ".mts", ".m2ts", ".mkv", ".3gp", ".webm", ".mpg"], "video (no photograph)"
    ),
    **dict.fromkeys(SIDECAR_SUFFIXES, "sidecar without its photograph"),
}
# Folders of thumbnails and of what was deleted, by the names that storage boxes and programs give them
NOT_ALBUMS = {"@eadir", "#recycle", "@recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"}
# Folders of pictures that this program makes, and what lies beside them, now or by its earlier versions
RESULT_FOLDERS = {"overlays": ("library.sqlite", "captions.jsonl"), "gallery": ("library.sqlite",)}


@dataclass
class Stamp:
    """What tells a file's content: size in bytes and time of change, which are quick, and the SHA-256."""

    size: int
    mtime_ns: int
    sha256: str


@dataclass
class Photo:
    """An upright sRGB photograph, reduced to `PHOTO_SIDE`; `width` and `height` are the original's, upright."""

    path: Path
    image: Image.Image
    width: int
    height: int
    stamp: Stamp
    taken_at: str | None = None  # ISO 8601, the camera's clock
    note: str | None = None  # what was done to it before judging


@dataclass
class Judged:
    """A file whose content has a result already: unread, beyond its hash."""

    path: Path
    stamp: Stamp


@dataclass
class Failure:
    """A file that could not be captioned, and why."""

    path: Path
    reason: str


@dataclass
class Found:
    """Photographs, each once and in order; folders that could not be read; how many of each kind were left out."""

    files: list[Path] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    left_out: Counter = field(default_factory=Counter)


# Finding -------------------------------------------------------------------------------------------------------------


def find_photos(arguments: list[Path]) -> Found:
    """All photographs of files and folders, these to the bottom. Named files are taken whatever they are."""
    found, files = Found(), []

    def unreadable(error: OSError):
        found.failures.append(Failure(Path(error.filename), f"folder cannot be read: {error.strerror}"))

    for argument in arguments:
        if not argument.is_dir():
            files.append(argument)
            continue
        for folder, subfolders, names in os.walk(argument, onerror=unreadable):
            reasons = {name: folder_left_out(Path(folder, name)) for name in subfolders}
            found.left_out.update(reason for reason in reasons.values() if reason)
            subfolders[:] = sorted(name for name in subfolders if not reasons[name])
            read = [name.lower() for name in names if file_left_out(name) is None]
            described = {*read, *(os.path.splitext(name)[0] for name in read)}
            for name in sorted(names):
                reason, (stem, suffix) = file_left_out(name), os.path.splitext(name.lower())
                # what lies beside its photograph is left out no more than that one
                if suffix in SIDECAR_SUFFIXES and stem in described:
                    continue
                if reason:
                    found.left_out[reason] += 1
                else:
                    files.append(Path(folder, name))
    unique: dict[str, Path] = {}
    for file in files:
        unique.setdefault(os.path.realpath(file), file)
    for real, file in unique.items():
        if is_result(Path(real)):
            found.left_out["result of this program"] += 1
        else:
            found.files.append(file)
    return found


def folder_left_out(folder: Path) -> str | None:
    """Why a folder is not searched, in the words of the page."""
    if folder.is_symlink():
        return f"linked folder ({folder})"
    if folder.name.lower() in NOT_ALBUMS or folder.name in (".thumbnails", ".Trash"):
        return f"{folder.name} folder"
    if folder.name.startswith("."):
        return "hidden folder"
    if folder.name.lower().endswith(".lrdata"):
        return "folder of Lightroom's previews"
    return "folder of results of this program" if is_result(folder / "photo") else None


def file_left_out(name: str) -> str | None:
    if name.startswith("."):
        return "hidden file"
    suffix = os.path.splitext(name)[1].lower()
    return None if suffix in SUFFIXES else KINDS.get(suffix, "other file")


def is_result(file: Path) -> bool:
    """Whether this program made the file, now or in an earlier run: an overlay or a thumbnail."""
    return any(
        (folder.parent / mark).is_file() for folder in file.parents for mark in RESULT_FOLDERS.get(folder.name, ())
    )


# Reading -------------------------------------------------------------------------------------------------------------


def read_photo(path: Path, judged: Container[str] = ()) -> Photo | Judged | Failure:
    """
    Reads a photograph as people see it, black borders cut away.

    Args:
        path: The file.
        judged: Hashes of contents that need not be read again.
    """
    try:
        before = path.stat()
        if not stat.S_ISREG(before.st_mode):  # NOTE: opening a named pipe would wait for ever
            return Failure(path, "not a file")
        if before.st_size == 0:
            return Failure(path, "empty file (0 bytes)")
        stamp = Stamp(before.st_size, before.st_mtime_ns, hash_of(path))
        if stamp.sha256 in judged:
            return Judged(path, stamp)
        photo = read_raw(path, stamp) if path.suffix.lower() in RAW_SUFFIXES else read_picture(path, stamp)
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            return Failure(path, "changed while it was read: run the same command again")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        return Failure(path, f"too large: over the limit of {limit:.3g} megapixels (raise it with --max-megapixels)")
    except UnidentifiedImageError:
        suffix = path.suffix.lower()
        kind = None if suffix in SUFFIXES else KINDS.get(suffix)
        return Failure(path, kind or "not a JPEG, PNG, WebP, AVIF or TIFF image, or damaged at its start")
    except ReducedCopyError as error:
        return Failure(path, str(error))
    except Exception as error:  # decoders raise nearly anything on damaged files
        reason = error.strerror if isinstance(error, OSError) else None
        return Failure(path, reason or f"damaged: {error or type(error).__name__}")
    if min(photo.image.size) < SHORTEST_SIDE:
        return Failure(path, f"too small to judge: {photo.width} × {photo.height} pixels")
    return photo


def hash_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_picture(path: Path, stamp: Stamp) -> Photo:
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            image.draft("RGB", (PHOTO_SIDE, PHOTO_SIDE))  # a large JPEG is decoded small
            taken_at = time_taken(image)
            image = read_photograph(image, PHOTO_SIDE)
    except ReducedCopyError:  # a raw file by another name
        if rawpy is None:
            raise
        return read_raw(path, stamp)
    if (width < height) != (image.width < image.height):  # it lay on its side
        width, height = height, width
    return without_borders(Photo(path, image, width, height, stamp, taken_at))


def time_taken(image: Image.Image) -> str | None:
    """By the camera's clock, ISO 8601; nothing if EXIF does not say it or cannot be read."""
    try:
        taken = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal)
        return datetime.strptime(str(taken).strip("\0 "), "%Y:%m:%d %H:%M:%S").isoformat()
    except Exception:  # Pillow raises nearly anything on broken EXIF; clocks that were never set say year 0
        return None


def read_raw(path: Path, stamp: Stamp) -> Photo:
    """A camera's raw file: its own preview where that is large enough, else developed at half size."""
    if rawpy is None:
        raise ReducedCopyError(KINDS[".dng"])
    with rawpy.imread(str(path)) as raw:
        preview, sizes = raw_preview(raw), raw.sizes
        image = preview or Image.fromarray(raw.postprocess(half_size=True, use_camera_wb=True))
    width, height = sizes.width, sizes.height
    if sizes.flip in (5, 6):  # a quarter to the left, to the right
        width, height = height, width
    image = read_photograph(image, PHOTO_SIDE)
    return without_borders(Photo(path, image, width, height, stamp, raw_time_taken(path)))


def raw_preview(raw: Any) -> Image.Image | None:
    """The largest preview in a raw file, as the camera was held, if its long side is enough."""
    try:
        preview = raw.extract_thumb()
    except (rawpy.LibRawNoThumbnailError, rawpy.LibRawUnsupportedThumbnailError):
        return None
    if preview.format != rawpy.ThumbFormat.JPEG:
        return None
    image = Image.open(io.BytesIO(preview.data), formats=["JPEG"])
    if max(image.size) < RAW_PREVIEW_SIDE:
        return None
    exif = image.getexif()
    if ExifTags.Base.Orientation not in exif:  # most previews leave it to the raw file
        exif[ExifTags.Base.Orientation] = {3: 3, 5: 8, 6: 6}.get(raw.sizes.flip, 1)
    return image


def raw_time_taken(raw: Path) -> str | None:
    """When a raw file was taken, where it is a TIFF inside, as most are."""
    try:
        with Image.open(raw, formats=["TIFF"]) as image:
            return time_taken(image)
    except Exception:  # not one of these, or another that Pillow does not know
        return None


def without_borders(photo: Photo) -> Photo:
    """
    Cuts black borders away: bars of films and screenshots, edges of scans.

    A border is black all along, ends at a straight edge and takes less than half of the picture. The night around a lamp
    or a dark studio is none: it ends here and there.
    """
    lit = np.asarray(photo.image).max(axis=2) > 24  # JPEG leaves traces in black
    box = [0, 0, photo.image.width, photo.image.height]
    for axis, (low, high) in ((1, (1, 3)), (0, (0, 2))):
        shares = lit.mean(axis=axis)
        bright = np.flatnonzero(shares > 0.01)
        if len(bright) == 0:
            return photo  # a black picture
        for side, edge, inwards in ((low, bright[0], 1), (high, bright[-1] + 1, -1)):
            border = edge if inwards == 1 else len(shares) - edge
            content = shares[edge : edge + 4] if inwards == 1 else shares[edge - 4 : edge]
            if border >= max(2, len(shares) / 100) and content.max(initial=0) > 0.6:
                box[side] = int(edge)
        lit = lit[box[1] : box[3]]  # bars above and below are no part of the columns
    width, height = box[2] - box[0], box[3] - box[1]
    if (width, height) == photo.image.size or width * height < photo.image.width * photo.image.height / 2:
        return photo
    return replace(photo, image=photo.image.crop(box), note="black borders cut away before judging")
