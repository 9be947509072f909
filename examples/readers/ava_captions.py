"""AVA-Captions, in Karpathy's form: an object with `images` and their `sentences`. Its one file has any name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


NAME = "Karpathy's images with sentences"


def why_not(content: Any) -> str | None:
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return None
    return "not an object with a list of images"


def read(content: dict[str, Any], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in enumerate(content["images"], 1):
        if isinstance(entry, dict):
            sentences = entry.get("sentences") or []
            sentences = sentences if isinstance(sentences, list) else [sentences]
            captions = [one.get("raw") if isinstance(one, dict) else one for one in sentences]
            name = entry.get("filename") or entry.get("file_name")
            yield number, {"image": name, "captions": captions, "split": entry.get("split")}
        else:
            yield number, None
