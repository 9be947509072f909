"""COCO's captions: an object of `images` with `id` and `file_name`, and `annotations` with `image_id` and `caption`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


NAME = "COCO's annotations"


def why_not(content: Any) -> str | None:
    if not isinstance(content, dict):
        return "not an object"
    missing = [name for name in ("images", "annotations") if not isinstance(content.get(name), list)]
    return f"no list of {' and '.join(missing)}" if missing else None


def read(content: dict[str, Any], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    captions: dict[Any, list[Any]] = {}
    images = list(enumerate(content["images"], 1))
    known = {str(one["id"]) for _, one in images if isinstance(one, dict) and "id" in one}
    for number, entry in enumerate(content["annotations"], 1):
        if not isinstance(entry, dict) or str(entry.get("image_id")) not in known:
            yield number, None
        else:
            captions.setdefault(str(entry["image_id"]), []).append(entry.get("caption"))
    for number, entry in images:
        if isinstance(entry, dict) and "id" in entry:
            texts = captions.get(str(entry["id"]), [])
            yield number, {"image": entry.get("file_name"), "captions": texts, "score": entry.get("gt_score")}
        else:
            yield number, None
