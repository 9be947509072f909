"""
Aestheval's files `processed_*.json` and `processed_info_*.json`, a list of photographs, of RPCD and of AVA.

    RPCD  `im_paths`, `first_level_comments_values` and a `mean_score` from 0 to 1, which a model read from the comments
    AVA   `im_name` or `im_path`, `comments` and `im_score` from 1 to 10, its raters'

Those of PCCD are read as PCCD. Read as Aestheval's code writes them; AVA's files themselves were not at hand.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .files import names_in


NAME = "Aestheval's RPCD and AVA"
FILES = (("processed_info_*.json",), ("processed_*.json",))


def why_not(content: Any) -> str | None:
    if isinstance(content, list) and names_in(content) & {"im_paths", "im_path", "im_name"}:
        return None
    return "no row has im_paths, im_path or im_name"


def read(content: list[tuple[int, Any]], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in content:
        if not isinstance(entry, dict):
            yield number, None
        elif "im_paths" in entry:
            yield (
                number,
                {
                    "image": entry["im_paths"],
                    "image_id": entry.get("im_id"),
                    "captions": entry.get("first_level_comments_values"),
                    "score": entry.get("mean_score"),
                    "score_range": (0, 1),
                },
            )
        else:
            # `im_path` is where the picture lay on the machine of who made the file
            path = entry.get("im_name") or PurePosixPath(str(entry.get("im_path") or "")).name
            score = {"score": entry.get("im_score"), "score_range": (1, 10)}
            yield number, {"image": path, "captions": entry.get("comments"), **score}
