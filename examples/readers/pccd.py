"""
PCCD: `guru_*.json` or its own `raw.json`, a list of photographs.

By `texts` each photograph gives a row for every topic (`aspects`), or one of the whole photograph: all that was written,
in the order of the topics (`joined`), or the general impression (`general`). Scores are from 0 to 10. What its reviewers did not write (a score "N", an empty text) is absent. The files of Aestheval
(`processed_*.json`, `processed_info_*.json`) name the picture `im_name` and have no overall score: their `mean_score` is
what a model read from the texts, not a rating.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import names_in


NAME = "PCCD"
TOPICS = (  # in the order of `score`
    "general_impression",
    "subject_of_photo",
    "composition",
    "use_of_camera",
    "depth_of_field",
    "color_lighting",
    "focus",
)
FILES = (("guru_*.json",), ("raw.json",))
ABSENT = (None, "", "n", "n/a", "na", "-", "none")
SCALE = (0, 10)
TEXTS = ("aspects", "joined", "general")


def why_not(content: Any) -> str | None:
    if isinstance(content, list) and len(names_in(content) & set(TOPICS)) > 1:
        return None
    return f"no row has {TOPICS[0]}, {TOPICS[1]}, ..."


def read(
    content: list[tuple[int, Any]], file: Path, texts: str = TEXTS[0]
) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in content:
        if not isinstance(entry, dict):
            yield number, None
            continue
        scores = entry.get("score") if isinstance(entry.get("score"), list) else []
        scores = dict(itertools.zip_longest(TOPICS, map(present, scores[: len(TOPICS)])))
        shared = {
            "image": entry.get("title") or entry.get("im_name"),
            "score": present(entry.get("overall")),
            "score_range": SCALE,
            "topic_scores": {topic: score for topic, score in scores.items() if score is not None},
            "topic_range": SCALE,
        }
        written = [topic for topic in TOPICS if present(entry.get(topic)) is not None]
        if texts == "general":
            written = written[:1] if written[:1] == [TOPICS[0]] else []
        if texts == "aspects" and written:
            for topic in written:
                yield number, {**shared, "captions": entry[topic], "topic": topic, "topic_score": scores[topic]}
        elif all(isinstance(entry[topic], str) for topic in written):
            whole = "\n".join(entry[topic].strip() for topic in written)
            yield number, {**shared, "captions": [whole] if whole else []}
        else:
            yield number, None


def present(value: Any) -> Any:
    return None if value is None or (isinstance(value, str) and value.strip().lower() in ABSENT) else value
