"""Pictures of data sets: their ids, where they lie in a folder, and whether they can be read."""

import os
import posixpath
import unicodedata
from collections import defaultdict
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import datasets
from PIL import ExifTags, Image


SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
UNREAD_SUFFIXES = (".avif", ".heic", ".heif", ".hif", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")


# Ids -----------------------------------------------------------------------------------------------------------------


def without_suffix(name: str) -> str:
    stem, suffix = posixpath.splitext(name)
    return stem if suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES) else name  # a title may have a dot of its own


def normal_path(name: str) -> str:
    """A path with slashes, without `.` and `..` within, as it is compared; empty where there is none."""
    # NOTE: composed, because macOS writes an é of two characters into the names of files
    name = unicodedata.normalize("NFC", name).replace("\\", "/")
    return posixpath.normpath(name) if name else ""


def photograph_id(name: str) -> str:
    """
    The one id of a photograph, from its path below the data: no suffix of a picture, slashes, no `.` and `..` within.

    Args:
        name: What a row gives as its `file_name`, `path`, `image` or `image_id`; of paths only those below one root
            are comparable.
    """
    return without_suffix(normal_path(str(name)))


# Places --------------------------------------------------------------------------------------------------------------


@dataclass
class PictureIndex:
    """All pictures in a folder, by their paths below it, and by paths, names and stems of names that may be short."""

    by_path: dict[str, str]
    by_name: dict[str, list[str]]


def index_pictures(folder: Path) -> PictureIndex:
    by_path, by_name, seen = {}, defaultdict(list), set()
    # NOTE: data sets are often linked into a folder; a link to a folder above would never end
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                path = os.path.join(parent, name)
                key = normal_path(Path(path).relative_to(folder).as_posix())
                by_path[key] = path
                short = posixpath.basename(key)
                for one in {short, without_suffix(short), without_suffix(key)}:
                    by_name[one].append(path)
    return PictureIndex(by_path, by_name)


def find_picture(name: str, folders: list[str], index: PictureIndex, by_name: bool) -> tuple[str, str] | None:
    """
    The path of a picture and the folder that it was found from.

    Args:
        folders: Below the index's, from which the name may be meant, the first before the next.
        by_name: Whether the suffix of the name may be missing or another and, if the name is without a folder,
            whether the picture may lie in any folder. Of several such pictures it is none.
    """
    name = normal_path(name)
    if not name:
        return None
    if os.path.isabs(name):
        return (name, "") if os.path.isfile(name) else None
    keys = {folder: posixpath.normpath(posixpath.join(folder, name)) for folder in folders}
    for folder, key in keys.items():
        if key in index.by_path:
            return index.by_path[key], folder
    if not by_name:
        return None
    for folder, key in keys.items():
        if "/" in key and len(paths := index.by_name.get(without_suffix(key), [])) == 1:
            return paths[0], folder
    if "/" not in name:
        for key in (name, without_suffix(name)):
            if len(paths := index.by_name.get(key, [])) == 1:
                return paths[0], ""
    return None


# Contents ------------------------------------------------------------------------------------------------------------


def is_damaged(image: dict[str, Any], decode: bool) -> bool:
    """
    Whether a picture cannot be read. One whose file ends as it should is decoded only if `decode`.

    Args:
        image: Its `path` or `bytes`, as `datasets.Image` has it. What is to be fetched is not looked at.
    """
    path, content = image["path"], image["bytes"]
    try:
        if content is None and "://" in path and not decode:
            return False
        if content is None and "://" not in path and not os.path.isfile(path):
            return True  # NOTE: opening a named pipe would wait for ever
        if not decode:
            with open(path, "rb") if content is None else BytesIO(content) as file, Image.open(file) as opened:
                exif = opened.getexif()
                if exif.get(ExifTags.Base.Orientation, 1) != 1:
                    exif.tobytes()  # what turns the picture writes its EXIF anew, and stops where that is broken
                decode = not ends_whole(file, opened.format)
        if decode:
            datasets.Image().decode_example(image)
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return True
    return False


def ends_whole(file: BinaryIO, kind: str | None) -> bool:
    """Whether the last bytes are the end of such a picture. Not if more was appended, as some cameras do."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 32))
    tail = file.read()
    if kind == "WEBP":
        file.seek(4)
        return int.from_bytes(file.read(4), "little") + 8 <= size
    return {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}.get(kind, b"no end") in tail
