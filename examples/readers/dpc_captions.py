"""DPC-Captions: a file for each topic, an object of image names and their comments."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


TOPICS = ("color_lighting", "composition", "depth_and_focus", "impression_and_subject", "use_of_camera")
FILES = (tuple(f"{topic}.json" for topic in TOPICS),)


def accepts(content: Any) -> bool:
    return isinstance(content, dict)


def read(content: dict[str, Any], file: Path) -> Iterator[dict[str, Any]]:
    for name, comments in content.items():
        yield {"image": name, "captions": comments, "topic": file.stem}
