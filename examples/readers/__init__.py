"""
How the field's data sets lie on disk: a file a form.

A form has a `NAME` and
    why_not(content)     why the content of a file (see `files.parse`) is not of it, in words; None if it is
    read(content, file)  numbered rows by the names of the schema in `aic_data.py`: `image`, `captions`, `topic`,
                         `score`, ... and None for what cannot be read as a row
and, if its files have names by which a folder is known, `FILES`: patterns, of which the first that finds any is taken.
A new data set is a file here and its name in `FORMS`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import (
    apddv2,
    ava,
    ava_captions,
    ava_comments,
    coco,
    conversations,
    dpc2022,
    dpc_captions,
    own,
    pccd,
    rpcd,
    rpcd_raw,
)
from .files import SPLIT_LISTS, RefusedFile, parse


# in this order the first that does not refuse a file reads it; `own` takes any rows that name a picture
FORMS = (
    conversations,
    coco,
    ava_captions,
    dpc2022,
    pccd,
    rpcd,
    rpcd_raw,
    ava,
    ava_comments,
    apddv2,
    dpc_captions,
    own,
)
# in this order the first whose files a folder has is read
BY_NAME = (own, pccd, rpcd, rpcd_raw, dpc_captions, dpc2022, ava, ava_comments)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "state.json", "package.json")


def find_files(source: Path) -> list[Path]:
    """
    The files to read of a local source; of a folder whose files have no known names, all that may hold rows, those
    directly in it before others. Empty where the `datasets` library has to tell.
    """
    if source.is_file():
        return [source]
    if source.exists() and not source.is_dir():
        raise ValueError(f"{source} is neither a file nor a folder.")
    for form in BY_NAME:
        for patterns in form.FILES:
            if found := sorted(file for pattern in patterns for file in source.glob(pattern)):
                return found
    if any(source.rglob("*.parquet")) or any(source.rglob("*.arrow")):
        return []
    for pattern in ("*", "**/*"):
        if found := sorted(file for file in source.glob(pattern) if is_data(file)):
            return found
    return []


def other_files(source: Path, files: list[Path]) -> list[str]:
    """Names of files directly in a folder that may hold rows as well, and are not among those to read."""
    named = (pattern for form in BY_NAME for patterns in form.FILES for pattern in patterns if "**" not in pattern)
    found = {*filter(is_data, source.iterdir()), *(file for pattern in named for file in source.glob(pattern))}
    with_lists = (*dpc2022.FILES, *rpcd_raw.FILES)  # their splits are lists beside them
    if any(file.match(pattern) for file in files[:1] for patterns in with_lists for pattern in patterns):
        found = {file for file in found if file.name not in SPLIT_LISTS}
    return sorted(file.name for file in found - set(files))


def is_one_image(file: Path) -> bool:
    """Whether by its name the file is one of many, each of a single image."""
    return any(file.match(pattern) for patterns in dpc2022.FILES for pattern in patterns)


def is_data(file: Path) -> bool:
    """Whether a file's name says that it may hold rows."""
    return file.suffix.lower() in SUFFIXES and file.name not in NOT_DATA


def read_rows(
    file: Path, columns: dict[str, str], pccd_texts: str = pccd.TEXTS[0]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """
    The rows of a file in any of the forms, numbered by its lines, or by their places in a list.

    Args:
        columns: Names of the schema, and what the file calls them.
        pccd_texts: Which of PCCD's texts; see `pccd`.

    Raises:
        RefusedFile: naming each form and why the file is not of it, or that it is empty.
        ValueError: if the file cannot be read at all.
    """
    content = parse(file)
    if columns and isinstance(content, list):
        content = [(number, _rename(row, columns)) for number, row in content]
    reasons = []
    for form in FORMS:
        if (reason := form.why_not(content)) is None:
            return form.read(content, file, pccd_texts) if form is pccd else form.read(content, file)
        reasons.append(f"{form.NAME}: {reason}")
    raise RefusedFile(f"{file} is of no known form. Tried:\n  " + "\n  ".join(reasons))


def _rename(row: Any, columns: dict[str, str]) -> Any:
    return {**row, **{name: row.get(given) for name, given in columns.items()}} if isinstance(row, dict) else row
