"""PCCD: `guru_*.json`, a list of photographs; each gives a row for every aspect."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ASPECTS = (  # in the order of `score`
    "general_impression",
    "subject_of_photo",
    "composition",
    "use_of_camera",
    "depth_of_field",
    "color_lighting",
    "focus",
)
FILES = (("guru_*.json",),)


def accepts(content: Any) -> bool:
    return isinstance(content, list) and any(
        "general_impression" in entry for entry in content if isinstance(entry, dict)
    )


def read(content: list[Any], file: Path) -> Iterator[dict[str, Any] | None]:
    for entry in content:
        if not isinstance(entry, dict):
            yield None
            continue
        for aspect, score in itertools.zip_longest(ASPECTS, (entry.get("score") or [])[: len(ASPECTS)]):
            yield {
                "image": entry.get("title"),
                "captions": entry.get(aspect),
                "aspect": aspect,
                "aspect_score": score,
                "score": entry.get("overall"),
            }
