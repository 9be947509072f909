"""AVA-Captions, in Karpathy's form: an object with `images` and their `sentences`. Its one file has any name."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


def accepts(content: Any) -> bool:
    return isinstance(content, dict) and "images" in content


def read(content: dict[str, Any], file: Path) -> Iterator[dict[str, Any] | None]:
    for entry in content["images"]:
        if isinstance(entry, dict):
            sentences = entry.get("sentences") or []
            captions = [one.get("raw") if isinstance(one, dict) else one for one in sentences]
            yield {"image": entry.get("filename"), "captions": captions, "split": entry.get("split")}
        else:
            yield None
