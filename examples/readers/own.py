"""Rows that name their columns as the schema does: metadata.jsonl or .csv, as imagefolder has it, and lists of such."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import names_in


NAME = "rows of your own"
FILES = (("**/metadata.jsonl",), ("**/metadata.csv",))
PICTURE = ("image", "file_name", "filename", "path", "image_path", "image_name", "image_id")


def why_not(content: Any) -> str | None:
    if not isinstance(content, list):
        return "not a list of rows"
    if not any(isinstance(row, dict) for _, row in content):
        return "no row is an object"
    if not {str(name).lower() for name in names_in(content)} & set(PICTURE):
        found = ", ".join(sorted(map(str, names_in(content)))) or "nothing"
        return f"no row names its picture (image, file_name, ...; found {found}): name the column, --columns image=..."
    return None


def read(content: list[tuple[int, Any]], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in content:
        if isinstance(entry, dict):
            # tables are often headed by `Score` or `Caption`
            entry = {**{name.lower(): value for name, value in entry.items() if isinstance(name, str)}, **entry}
            name = next((entry[one] for one in PICTURE if entry.get(one) not in (None, "")), None)
            yield number, {**entry, "image": name}
        else:
            yield number, None
