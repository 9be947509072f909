"""
APDDv2, paintings and drawings: a table of `filename`, a total score from 0 to 100, ten scores of 0 to 10, and a comment.

The tables of its parts (`csvfiles/train.csv`, ...) call the total `Score`, from 0 to 10, and have no comments. Absent
scores are empty. Some comments are not UTF-8; what cannot be read in them is counted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import names_in


NAME = "APDDv2"
TOTAL = "Total aesthetic score"
TOPICS = (
    "Theme and logic",
    "Creativity",
    "Layout and composition",
    "Space and perspective",
    "The sense of order",
    "Light and shadow",
    "Color",
    "Details and texture",
    "The overall",
    "Mood",
)


def why_not(content: Any) -> str | None:
    names = names_in(content)
    if isinstance(content, list) and "filename" in names and names & {TOTAL, "Score"} and names & set(TOPICS):
        return None
    return f"no columns filename, {TOTAL!r} and {TOPICS[0]!r}"


def read(content: list[tuple[int, Any]], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in content:
        if not isinstance(entry, dict):
            yield number, None
            continue
        total = TOTAL if TOTAL in entry else "Score"
        comment = entry.get("Language Comment")
        yield (
            number,
            {
                "image": str(entry.get("filename") or "").strip(),
                "captions": [comment] if comment else [],
                "score": entry.get(total),
                "score_range": (0, 100) if total == TOTAL else (0, 10),
                "topic_scores": {topic.lower(): entry[topic] for topic in TOPICS if entry.get(topic)},
                "topic_range": (0, 10),
            },
        )
