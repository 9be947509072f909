"""
RPCD before its processing.

    reddit_photocritique_image_comments.json  columns `im_paths` and `first_level_comments_values`
    raw_reddit_photocritique_comments.csv     a comment a line: `submission_id`, `comment_parent_id`, `comment_body`

Of the table only comments on the post itself are read, without what was deleted and what bots wrote; those of the
photographer cannot be told from others. Its pictures are `<submission_id>-image.jpg` and the like. There are no scores.
Splits are those of `train_ids.csv`, `validation_ids.csv`, `test_ids.csv` beside the file, a submission's id a line. Read
as Aestheval's code writes them; the files themselves were not at hand.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .files import listed_splits, names_in


NAME = "raw RPCD"
FILES = (("reddit_photocritique_image_comments.json",), ("raw_reddit_photocritique_comments.csv",))
NO_CRITIQUES = ("[deleted]", "[removed]", "i am a bot, and", "your post has been marked as abandoned")


def why_not(content: Any) -> str | None:
    wanted = (
        {"comment_body", "submission_id"} if isinstance(content, list) else {"im_paths", "first_level_comments_values"}
    )
    if missing := wanted - names_in(content):
        return f"no {' and '.join(sorted(missing))}"
    columns = [content[name] for name in wanted] if isinstance(content, dict) else []
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        return "its columns are no lists of one length"
    return None


def read(content: Any, file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    splits = listed_splits(file.parent, "id")
    if isinstance(content, dict):
        for number, (path, comments) in enumerate(
            zip(content["im_paths"], content["first_level_comments_values"], strict=True), 1
        ):
            identity = PurePosixPath(str(path)).name.partition("-")[0].removeprefix("submission_")
            yield number, {"image": path, "captions": comments, "split": splits.get(identity)}
        return
    posts: dict[str, tuple[int, list[str]]] = {}
    for number, entry in content:
        if not isinstance(entry, dict) or not entry.get("submission_id"):
            yield number, None
            continue
        _, comments = posts.setdefault(str(entry["submission_id"]), (number, []))
        text, parent = str(entry.get("comment_body") or ""), str(entry.get("comment_parent_id") or "t3_")
        if parent.startswith("t3_") and not any(one in text.lower() for one in NO_CRITIQUES):
            comments.append(text)
    for identity, (number, comments) in posts.items():
        yield number, {"image": f"{identity}-image", "captions": comments, "split": splits.get(identity)}
