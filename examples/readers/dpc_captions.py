"""DPC-Captions: a file for each topic, an object of image names and their comments."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


NAME = "DPC-Captions"
TOPICS = ("color_lighting", "composition", "depth_and_focus", "impression_and_subject", "use_of_camera")
FILES = (tuple(f"{topic}.json" for topic in TOPICS),)


def why_not(content: Any) -> str | None:
    if not isinstance(content, dict):
        return "not an object"
    if not any(isinstance(comments, list) for comments in content.values()):
        return "not an object of names of pictures and lists of comments"
    return None


def read(content: dict[str, Any], file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    topic = file.stem if file.stem in TOPICS else None
    for number, (name, comments) in enumerate(content.items(), 1):
        yield number, {"image": name, "captions": comments, "topic": topic}
