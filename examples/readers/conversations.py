"""
Conversations about a picture: LLaVA's `conversations` (Q-Instruct, AesMMIT and others) and `messages` as OpenAI has them.

    {"image": "a/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nHow is the light?"}, {"from": "gpt", ...}]}
    {"images": ["1.jpg"], "messages": [{"role": "system", ...}, {"role": "user", ...}, {"role": "assistant", ...}]}

`file_name` will do for `image`: a folder of pictures with such a metadata.jsonl is what TRL's own scripts read too.
Each answer is a row, whose `prompt` is all that was said before it, the system's words first: a later question may speak
of an earlier answer. Placeholders of the picture are taken out, the processor puts in its own. A message may be a list of
parts with `type` text or image. Answers come with the row's other columns, e.g. `gt_score`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .files import names_in


NAME = "conversations or messages"
ROLES = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "question"),
    **dict.fromkeys(("gpt", "assistant", "model", "bot"), "answer"),
}
# what models put for a picture: <image>, <|image|>, <|image_pad|>, <image_soft_token>, </img>, [IMG_END], <IMG_CONTEXT>
PLACEHOLDER = re.compile(
    r"(?i:<[|/_]*(?:(?:start|begin|end|fake)_(?:of|token_around)_)?(?:(?:image|img|vision|video|media)[a-z0-9_]*|im_[a-z]+)[ \d]*\|?>)"
    r"|\[IMG(?:_[A-Z]+)?\]"  # not as forums write them
)


def why_not(content: Any) -> str | None:
    if isinstance(content, list) and names_in(content) & {"conversations", "messages"}:
        return None
    return "no row has `conversations` or `messages`"


def read(content: list[tuple[int, Any]], file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    for number, entry in content:
        turns = read_turns(entry)
        if not turns:
            yield number, None
            continue
        pictures = pictures_of(entry)
        known = {name: value for name, value in entry.items() if name not in ("conversations", "messages", "images")}
        known |= {"image": pictures[0] if len(pictures) == 1 else None}
        known |= {"several_images": len(pictures) > 1}
        said: list[str] = []
        for role, text in turns:
            if role == "answer":
                yield number, {**known, "prompt": "\n".join(said) or None, "captions": [text]}
            said.append(text)


def read_turns(entry: Any) -> list[tuple[str, str]] | None:
    """What is said by whom; None if there is no answer or anything cannot be read."""
    if not isinstance(entry, dict):
        return None
    messages = entry.get("messages") or entry.get("conversations")
    if not isinstance(messages, list):
        return None
    turns = [("system", entry["system"])] if isinstance(entry.get("system"), str) and entry["system"].strip() else []
    for message in messages:
        if not isinstance(message, dict):
            return None
        role = ROLES.get(str(message.get("from") or message.get("role")).lower())
        text = text_of(message.get("value", message.get("content")))
        if role is None or text is None:
            return None
        # an answer's placeholder is no question of where the picture stands: it is left for the report to count
        turns.append((role, text if role == "answer" else PLACEHOLDER.sub("", text).strip()))
    return turns if any(role == "answer" for role, _ in turns) else None


def text_of(value: Any) -> str | None:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        return None
    parts = [part.get("text") for part in value if isinstance(part, dict) and part.get("type") == "text"]
    return "\n".join(parts) if all(isinstance(part, str) for part in parts) else None


def pictures_of(entry: dict[str, Any]) -> list[Any]:
    """The row's pictures: of its columns, or of the parts of its messages."""
    for name in ("images", "image", "file_name"):
        value = entry.get(name)
        if value not in (None, "", []):
            return value if isinstance(value, list) else [value]
    pictures = []
    for message in entry.get("messages") or entry.get("conversations"):
        parts = message.get("content", message.get("value"))
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
                url = part.get("image_url", part.get("image", part.get("path")))
                pictures.append(url.get("url") if isinstance(url, dict) else url)
    return pictures
