"""AVA's comments, `AVA_Comments_Full.txt`: lines of `index#image_id#comment#comment...`, cut at every #."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


NAME = "AVA's comments"
FILES = (("AVA_Comments_Full.txt",), ("ava_comments.txt",))


def why_not(content: Any) -> str | None:
    lines = [row.split("#") for _, row in content[:20] if isinstance(row, str)] if isinstance(content, list) else []
    if any(len(cells) > 1 and cells[1].strip().isdigit() for cells in lines):
        return None
    return "no lines of index#image_id#comment"


def read(content: list[tuple[int, Any]], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, line in content:
        cells = [cell.strip() for cell in line.split("#")]
        if len(cells) > 1 and cells[1].isdigit():
            yield number, {"image": cells[1], "captions": [cell for cell in cells[2:] if cell]}
        else:
            yield number, None
