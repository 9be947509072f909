"""Rows that name their columns as the schema does: metadata.jsonl or .csv, as imagefolder has it, and lists of such."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


FILES = (("**/metadata.jsonl",), ("**/metadata.csv",))


def accepts(content: Any) -> bool:
    return isinstance(content, list)


def read(content: list[Any], file: Path) -> Iterator[dict[str, Any] | None]:
    for entry in content:
        yield entry if isinstance(entry, dict) else None


def read_lines(file: Path) -> Iterator[dict[str, Any] | None]:
    with open(file, encoding="utf-8-sig", errors="replace") as lines:
        for line in lines:
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:
                    row = None
                yield row if isinstance(row, dict) else None
