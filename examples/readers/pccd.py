"""PCCD: `guru_*.json`, a list of photographs; each gives a row for every topic."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any


TOPICS = (  # in the order of `score`
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
        for topic, score in itertools.zip_longest(TOPICS, (entry.get("score") or [])[: len(TOPICS)]):
            yield {
                "image": entry.get("title"),
                "captions": entry.get(topic),
                "topic": topic,
                "topic_score": score,
                "score": entry.get("overall"),
            }
