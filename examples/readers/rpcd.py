"""RPCD: `processed_info_*.json`, a list of posts with their first comments and a mean score from 0 to 1."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


FILES = (("processed_info_*.json",),)


def accepts(content: Any) -> bool:
    return isinstance(content, list) and any("im_paths" in entry for entry in content if isinstance(entry, dict))


def read(content: list[Any], file: Path) -> Iterator[dict[str, Any] | None]:
    for entry in content:
        if not isinstance(entry, dict):
            yield None
            continue
        yield {
            "image": entry.get("im_paths"),
            "image_id": entry.get("im_id"),
            "captions": entry.get("first_level_comments_values"),
            "score": entry.get("mean_score"),
            "score_range": (0, 1),
        }
