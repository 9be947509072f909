"""
DPC2022, the data of ARIC: one JSON an image, `<id>.json`, with `ID`, `avg_all_users_score` and `score_comments`.

A comment's weight is its relevance `norm_sum_score` within 0 and 1, as ARIC's loss cuts it. Splits are those of
`train.csv`, `val.csv` and `test.csv` beside the files, by their column `ID`. Read as ARIC's README and loader show it; the
files themselves were not at hand.
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import listed_splits


NAME = "DPC2022"
COMMENTS = ("score_comments", "clean_comments", "raw_comments")
FILES = (("[0-9]*.json",), ("clean_and_all_score/[0-9]*.json",))

splits_beside = functools.lru_cache(maxsize=4)(listed_splits)  # the same for half a million files


def why_not(content: Any) -> str | None:
    if isinstance(content, dict) and any(isinstance(content.get(name), list) for name in COMMENTS):
        return None
    return "no object with score_comments"


def read(content: dict[str, Any], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    identity = str(content.get("ID") or file.stem)
    name = next(name for name in COMMENTS if isinstance(content.get(name), list))
    weights = None
    if name == "score_comments":
        comments = [one if isinstance(one, dict) else {} for one in content[name]]
        texts = [one.get("comment") for one in comments]
        texts = [text.get("comment") if isinstance(text, dict) else text for text in texts]
        weights = [_within(one.get("norm_sum_score")) for one in comments]
    else:  # cleaned comments are cut into sentences
        texts = [" ".join(map(str, text)) if isinstance(text, list) else text for text in content[name]]
    row = {"image": identity, "captions": texts, "caption_weights": weights or None}
    row |= {"score": content.get("avg_all_users_score"), "score_range": (1, 10)}
    yield 1, {**row, "split": splits_beside(file.parent, "ID").get(identity)}


def _within(value: Any) -> Any:
    return min(max(value, 0.0), 1.0) if isinstance(value, int | float) and value == value else None
