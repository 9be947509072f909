"""
AVA's counts of the scores 1 to 10.

    AVA.txt                        lines of `index image_id count_1 ... count_10 tag tag challenge`
    TANet's train, val, test .csv  `image_id` and the counts, there called score2 to score11
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import names_in


NAME = "AVA"
FILES = (("AVA.txt",),)
COUNTS = [f"score{number}" for number in range(2, 12)]


def why_not(content: Any) -> str | None:
    if isinstance(content, list) and {"image_id", *COUNTS} <= names_in(content):
        return None
    lines = [row.split() for _, row in content[:20] if isinstance(row, str)] if isinstance(content, list) else []
    if any(len(cells) >= 12 and all(cell.isdigit() for cell in cells[:12]) for cells in lines):
        return None
    return "no lines of an image's id and ten counts, no columns image_id, score2, ..., score11"


def read(content: list[tuple[int, Any]], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in content:
        if isinstance(entry, dict):
            yield number, {"image": entry.get("image_id"), "score": [entry.get(name) for name in COUNTS]}
        elif isinstance(entry, str) and len(cells := entry.split()) >= 12:
            yield number, {"image": cells[1], "score": cells[2:12]}
        else:
            yield number, None
