"""The columns of data in the examples, and how a row of any source becomes one of them, with what is wrong with it."""

import ast
import io
import json
import math
import re
import tokenize
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from common import words
from picture_files import photograph_id
from readers import pccd
from readers.conversations import PLACEHOLDER
from readers.own import PICTURE
from scales import DEFAULT, Scale, say_scale

from ase_mllm.processing_ase import OPTIONAL_COLUMNS


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "image_id": datasets.Value("string"),  # see `photograph_id`, or the source's own
        "captions": datasets.List(datasets.Value("string")),
        "caption_weights": datasets.List(datasets.Value("float64")),  # one a caption, or null
        "prompt": datasets.Value("string"),  # the row's own question, without a place for the picture; null: by topic
        "topic": datasets.Value("string"),  # what the captions are about; null: everything
        "topic_score": datasets.Value("float64"),  # of this topic alone
        "topic_scores": datasets.List(  # of the photograph, all that are known, or null
            {"topic": datasets.Value("string"), "score": datasets.Value("float64")}
        ),
        "score": datasets.List(datasets.Value("float64")),  # ten shares of the scores 1 to 10, where they are known
        "score_mean": datasets.Value("float64"),  # of the photograph, on the scale 1 to 10, as the topics' scores are
        "aspect_labels": datasets.List(datasets.Value("float64")),
        "saliency": datasets.List(datasets.List(datasets.Value("float64"))),
        "split": datasets.Value("string"),
    }
)
# What rows of one's own may call what `to_schema` reads
KNOWN_COLUMNS = {"caption", "captions", "caption_weight", "caption_weights", "rating", "score", "gt_score", "topic"}
KNOWN_COLUMNS |= {"aspect", "topic_range", "topic_score", "topic_scores", "aspect_labels", "saliency", "split"}
KNOWN_COLUMNS |= {"image_id", "prompt", "score_range", "several_images", *PICTURE}
# on the way: pictures unread, and what the report tells of the row
NOTES = {
    "problems": datasets.List(datasets.Value("string")),
    "place": datasets.Value("string"),  # file and line
    "split_rule": datasets.Value("string"),
    "unscaled": datasets.Value("float64"),  # the score as given, where nobody told its scale
    "scale": datasets.Value("string"),  # what the score was read as
}
RAW_FEATURES = datasets.Features({**FEATURES, "image": datasets.Image(decode=False), **NOTES})

SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MAX_WORDS = 300  # longer texts are counted as overlong, and kept: the collator cuts them


@dataclass(frozen=True)
class Options:
    """How rows are read; see `load`. `known` is the data set that a name tells, and its scale."""

    columns: dict[str, str]
    score_range: Scale | None
    decode_images: bool
    pccd: str = pccd.TEXTS[0]
    known: tuple[str, Scale] | None = None


def to_schema(
    row: dict[str, Any],
    image: dict[str, Any] | None,
    damaged: bool,
    image_id: str,
    split: tuple[str, str],
    options: Options,
) -> dict[str, Any]:
    """
    A row of any source, by the names of the schema and their synonyms, to `RAW_FEATURES`.

    Args:
        image: `path` or `bytes` of the picture, None where there is none.
        damaged: Whether it cannot be read.
        image_id: Of rows that do not name their own.
        split: Of rows that do not name their own, and how it was told.
    """
    problems: list[str] = []
    captions, weights = read_texts(row, problems)
    shares, mean, unscaled, scale = read_score(row, options, problems)
    topic = read_name(row.get("topic") or row.get("aspect"))
    topic_range = row["topic_range"] if is_scale(row.get("topic_range")) else None
    if row.get("several_images") is True:
        problems.append("several images")
    elif image is None:
        problems.append("missing image")
    elif damaged:
        problems.append("damaged image")
    labels, saliency = read_numbers(row, "aspect_labels", 1, problems), read_numbers(row, "saliency", 2, problems)
    told = mean if topic is None else None  # the score of a topic's row is told by the photograph's others
    if not captions and told is None and labels is None and saliency is None:
        problems.append("nothing to learn from")
    if (own := read_name(row.get("split"))) is not None:
        split = own, "a column"
    return {
        "image": image,
        "image_id": read_image_id(row, problems) or image_id,
        "captions": captions,
        "caption_weights": weights,
        "prompt": PLACEHOLDER.sub("", read_name(row.get("prompt")) or "").strip() or None,
        "topic": topic,
        "topic_score": on_scale(row.get("topic_score"), topic_range, problems, "topic score"),
        "topic_scores": read_topic_scores(row, topic_range, problems),
        "score": shares,
        "score_mean": mean,
        "aspect_labels": labels,
        "saliency": saliency,
        "split": SPLITS.get(split[0].lower(), split[0]),
        "problems": problems,
        "place": None,
        "split_rule": split[1],
        "unscaled": unscaled,
        "scale": scale,
    }


def whole(text: str) -> str:
    """The text with U+FFFD for halves of characters, which no file can hold."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def read_name(value: Any) -> str | None:
    """A name, an id or a short text; None for anything else and for nothing."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as tables with gaps have their ids
    if not isinstance(value, str | int) or isinstance(value, bool):
        return None
    return whole(str(value)).strip() or None


def read_image_id(row: dict[str, Any], problems: list[str]) -> str | None:
    value = row.get("image_id")
    name = read_name(value)
    if value not in (None, "") and (name is None or not name.isprintable()):
        problems.append("unreadable image_id")
        return None
    return None if name is None else photograph_id(name)


def read_texts(row: dict[str, Any], problems: list[str]) -> tuple[list[str], list[float] | None]:
    """The captions that say anything, and their weights if there are any."""
    texts = read_list(row.get("caption") if row.get("captions") is None else row["captions"])
    texts = [] if texts is None else texts if isinstance(texts, list) else [texts]
    weights = read_list(row.get("caption_weights", row.get("caption_weight")))
    if not isinstance(weights, list):
        weights = None if weights in (None, "") else [weights] * len(texts)
    weights = read_numbers({"caption_weight": weights}, "caption_weight", 1, problems) if texts else None
    if weights is not None and len(weights) != len(texts):
        problems.append("unreadable caption_weight")
        weights = None
    kept = {}
    for position, text in enumerate(texts):
        if text is None or (isinstance(text, str) and not text.strip()):
            problems.append("empty text")
        elif not isinstance(text, str):
            problems.append("unreadable text")
        elif PLACEHOLDER.search(text):  # the model would look for another picture there
            problems.append("image token in text")
        else:
            kept[position] = text = whole(text).strip()
            problems += ["overlong text"] * (len(words(text)) > MAX_WORDS)
            problems += ["broken characters"] * ("\ufffd" in text)
    return list(kept.values()), None if weights is None else [weights[position] for position in kept]


def read_list(value: Any) -> Any:
    """The list that a table's cell holds as text, as JSON or as Python writes it; anything else as it is."""
    if not isinstance(value, str) or not (text := value.strip()).startswith("["):
        return value
    for parse in (json.loads, parse_literal):
        try:
            parsed = parse(text)
        except (ValueError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError):
            continue
        if isinstance(parsed, list):
            return parsed
    return value


def parse_literal(text: str) -> Any:
    """What Python's text says; texts without a comma between them, as an array has them, stay as many."""
    parts, before = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.NL:
            parts += [","] * (token.type == before == tokenize.STRING) + [token.string]
            before = token.type
    return ast.literal_eval(" ".join(parts).strip())


def read_score(
    row: dict[str, Any], options: Options, problems: list[str]
) -> tuple[list[float] | None, float | None, float | None, str | None]:
    """
    Shares of the scores 1 to 10 if they are given, and the mean on that scale; the score as given if nobody told its
    scale; what it was read as, in words.
    """
    value = next((row[name] for name in ("rating", "score", "gt_score") if row.get(name) not in (None, "")), None)
    value = read_list(value)
    if value is None:
        return None, None, None, None
    if isinstance(value, list):
        shares = read_shares(value)
        if shares is None:
            problems.append("unparsable score")
            return None, None, None, None
        return shares, float(np.dot(shares, np.arange(1, 11))), None, "counts or shares of 1 to 10"
    number, told = read_number(value), options.score_range or row.get("score_range")
    if number is None or (told is not None and not is_scale(told)):
        problems.append("unparsable score")
        return None, None, None, None
    if told is not None:
        return None, on_scale(number, told, problems), None, say_scale(told)
    if options.known is not None:
        name, told = options.known
        return None, on_scale(number, told, problems), None, f"{say_scale(told)} by the name {name}"
    # a negative score is one row's mistake, it says nothing about the scale of the others
    unscaled = number if number >= 0 else None
    return None, on_scale(number, DEFAULT, problems), unscaled, f"{say_scale(DEFAULT)}, as no scale is given"


def read_shares(counts: list[Any]) -> list[float] | None:
    try:
        counts = np.array(counts, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        return None
    if counts.shape != (10,) or not np.isfinite(counts).all() or counts.min() < 0 or not 0 < counts.sum() < np.inf:
        return None
    return (counts / counts.sum()).tolist()


def read_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) and not isinstance(value, bool) else None


def is_scale(value: Any) -> bool:
    numbers = [read_number(one) for one in value] if isinstance(value, list | tuple) else []
    return len(numbers) == 2 and None not in numbers and numbers[0] < numbers[1]


def on_scale(value: Any, scale: Scale | None, problems: list[str], what: str = "score") -> float | None:
    """A score on its scale (by default 1 to 10) on the scale 1 to 10; None where there is none."""
    if value is None or value == "":
        return None
    score, (worst, best) = read_number(value), scale or DEFAULT
    if score is None:
        problems.append(f"unparsable {what}")
    elif not worst <= score <= best:
        problems.append(f"{what} out of range")
    else:
        return 1 + 9 * (score - worst) / (best - worst)
    return None


def read_topic_scores(
    row: dict[str, Any], topic_range: Scale | None, problems: list[str]
) -> list[dict[str, Any]] | None:
    """Where the row is about one of the topics, what is wrong with the others is told by their rows."""
    given = row.get("topic_scores")
    if not isinstance(given, dict):
        return None
    wrong = problems if row.get("topic") is None else []
    scores = {topic: on_scale(score, topic_range, wrong, "topic score") for topic, score in given.items()}
    return [{"topic": whole(topic), "score": score} for topic, score in scores.items() if score is not None] or None


def read_numbers(row: dict[str, Any], name: str, dimensions: int, problems: list[str]) -> list | None:
    value = read_list(row.get(name))
    if value is None or value == "":
        return None
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        array = np.zeros(())
    low, high = OPTIONAL_COLUMNS[name]
    if (
        array.ndim != dimensions
        or not array.size
        or not np.isfinite(array).all()
        or (array < low).any()
        or (array > high).any()
    ):
        problems.append(f"unreadable {name}")
        return None
    return array.tolist()
