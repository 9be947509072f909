"""
How the field's data sets lie on disk: a file a form.

A reader has `FILES`, patterns of what its folder holds, and `read`, which gives rows by the names of the schema in
`aic_data.py`: `image`, `captions`, `topic`, `score`, ... and None for what cannot be read as a row. One of JSON files
says by `accepts` whether a file's content is of its form. A new data set is a file here and its name in `FORMS`.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ava, ava_captions, dpc_captions, own, pccd, rpcd


# the first whose files a folder has is read, and the first that accepts a JSON file's content
FORMS = (own, pccd, rpcd, dpc_captions, ava)
JSON_FORMS = (ava_captions, dpc_captions, pccd, rpcd, own)


def find_files(source: Path) -> list[Path]:
    """The files to read of a local source; empty where the `datasets` library has to tell."""
    if source.is_file():
        return [source]
    for form in FORMS:
        for patterns in form.FILES:
            if found := sorted(file for pattern in patterns for file in source.glob(pattern)):
                return found
    return []


def read_rows(file: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a file in any of the forms."""
    # NOTE: not by the builders of `datasets`: one score that is no number, or one broken line, would stop them
    suffix = file.suffix.lower()
    if suffix == ".jsonl":
        yield from own.read_lines(file)
    elif suffix == ".csv":
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as lines:
            yield from csv.DictReader(lines)
    elif suffix == ".txt":
        yield from ava.read(file)
    elif suffix == ".json":
        content = json.loads(file.read_text(encoding="utf-8-sig", errors="replace"))
        form = next((form for form in JSON_FORMS if form.accepts(content)), None)
        if form is None:
            raise ValueError(f"{file} holds neither a list nor an object.")
        yield from form.read(content, file)
    else:
        raise ValueError(f"{file} is none of .jsonl, .csv, .json and AVA's .txt.")
