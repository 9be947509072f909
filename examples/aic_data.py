"""
Data sets of aesthetic image captioning in one schema, and a report of what they hold and what is wrong with them.

    python examples/aic_data.py my-photographs
    python examples/aic_data.py PCCD --images PCCD/images/full
    python examples/aic_data.py flickr-aes-test.json --images FLICKR-AES --score-range 0 1
    python examples/aic_data.py somebody/photo-critiques --columns caption=text --streaming

Sources, told apart by their names and contents (`readers` has a file a form):
    a folder with metadata.jsonl or metadata.csv   your own, as imagefolder has it: file_name, caption or captions, ...
    any .jsonl, .csv or .json list of such rows    e.g. [{"image": "953980.jpg", "gt_score": 5.21}] of score lists
    guru_{train,validation,test}.json              PCCD, one row for each of the seven aspects of a photograph
    a .json with "images" and their "sentences"    AVA-Captions (Karpathy's form)
    color_lighting.json, composition.json, ...     DPC-Captions
    processed_info_{train,validation,test}.json    RPCD
    AVA.txt                                        AVA, counts of the scores 1 to 10
    a Hub id, or a folder of Parquet files         with an image column

The rows' columns are FEATURES. In your own data: `image` or `file_name`; `captions` (a list) or `caption`; and as you
like `score`, `rating` or `gt_score` (one number, or ten counts or shares of the scores 1 to 10), `aspect` (the topic of
the captions), `caption_weight` (aesthetic relevance, one number or one a caption), `aspect_labels`, `saliency`,
`image_id`, `split`. A split is otherwise named by the file or a folder (train, validation or val, test).

Pictures are yours to bring. What is left out and what is odd is counted, with examples; nothing of it is an error,
except photographs that are both trained and evaluated on.
"""

import argparse
import csv
import functools
import hashlib
import itertools
import math
import os
import posixpath
import random
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
from common import words
from PIL import Image
from readers import find_files, read_rows

from ase_mllm import ASEProcessor
from ase_mllm.processing_ase import AESTHETIC_PROMPTS


FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "image_id": datasets.Value("string"),  # the picture's file name without its suffix, or the source's own
        "captions": datasets.List(datasets.Value("string")),
        "caption_weights": datasets.List(datasets.Value("float64")),  # one a caption, or null
        "topic": datasets.Value("string"),  # what the captions are about; null: everything
        "topic_score": datasets.Value("float64"),  # of this topic alone
        "score": datasets.List(datasets.Value("float64")),  # ten shares of the scores 1 to 10, where they are known
        "score_mean": datasets.Value("float64"),  # of the photograph, on the scale 1 to 10
        "aspect_labels": datasets.List(datasets.Value("float64")),
        "saliency": datasets.List(datasets.List(datasets.Value("float64"))),
        "split": datasets.Value("string"),
    }
)
# on the way: pictures unread, and what is wrong with the row
RAW_FEATURES = datasets.Features(
    {**FEATURES, "image": datasets.Image(decode=False), "problems": datasets.List(datasets.Value("string"))}
)

SPLITS = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
MAX_WORDS = 300  # longer texts are counted as overlong, and kept: the collator cuts them
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif")
UNREAD_SUFFIXES = (".avif", ".heic", ".heif", ".hif", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".orf", ".raf", ".rw2")
PROMPTS = {  # for topics that do not fit "Critique the ... of this photograph."
    **AESTHETIC_PROMPTS,
    "general_impression": "Give your general impression of this photograph.",
    "impression_and_subject": "Give your impression of this photograph and of its subject.",
    "subject_of_photo": "Critique the subject of this photograph.",
    "use_of_camera": "Critique the use of the camera in this photograph.",
    "depth_and_focus": AESTHETIC_PROMPTS["focus"],
    "color_lighting": "Critique the colours and the light of this photograph.",
}

PROBLEMS = {  # what is done about them
    "missing image": "row left out",
    "damaged image": "row left out",
    "unreadable row": "row left out",
    "nothing to learn from": "row left out",
    "empty text": "value left out",
    "unreadable text": "value left out",
    "unparsable score": "value left out",
    "score out of range": "value left out",
    "unparsable topic score": "value left out",
    "unreadable caption_weight": "value left out",
    "unreadable aspect_labels": "value left out",
    "unreadable saliency": "value left out",
    "repeated row": "kept",
    "repeated text": "kept",
    "overlong text": "kept",
    "broken characters": "kept",
}
OF_PHOTOGRAPHS = ("missing image", "damaged image", "unparsable score", "score out of range")  # counted once each


@dataclass(frozen=True)
class Options:
    """How rows are read; see `load`."""

    columns: dict[str, str]
    score_range: tuple[float, float] | None
    decode_images: bool


# Report --------------------------------------------------------------------------------------------------------------


@dataclass
class SplitReport:
    """Counts of one split. Texts, topics and scores are those of the rows that are kept."""

    rows: int = 0
    left_out: int = 0
    words: list[int] = field(default_factory=list, repr=False)  # of each caption
    scores: list[float] = field(default_factory=list, repr=False)  # of each photograph that has one
    with_distribution: int = 0
    topics: Counter = field(default_factory=Counter)
    problems: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    image_ids: set[str] = field(default_factory=set, repr=False)
    _seen: set[int] = field(default_factory=set, repr=False)  # hashes, millions of texts do not fit otherwise

    def add(self, row: dict[str, Any]):
        """Counts a row of `RAW_FEATURES`; its image is not looked at."""
        self.rows += 1
        image_id, topic = row["image_id"], row["topic"]
        for problem in row["problems"]:
            if problem not in OF_PHOTOGRAPHS or self._is_new(problem, image_id):
                self._note(problem, image_id)
        if not is_kept(row["problems"]):
            self.left_out += 1
            return
        if not self._is_new("row", image_id, topic):
            self._note("repeated row", image_id)
        for text in row["captions"]:
            if not self._is_new("text", image_id, topic, text):
                self._note("repeated text", image_id)
            self.words.append(len(words(text)))
        self.topics[topic or "(everything)"] += 1
        if image_id not in self.image_ids and row["score_mean"] is not None:
            self.scores.append(row["score_mean"])
            self.with_distribution += row["score"] is not None
        self.image_ids.add(image_id)

    def _is_new(self, *key: str | None) -> bool:
        known = len(self._seen)
        self._seen.add(hash(key))
        return len(self._seen) > known

    def _note(self, problem: str, image_id: str):
        self.problems[problem] += 1
        if len(self.examples[problem]) < 5 and image_id not in self.examples[problem]:
            self.examples[problem].append(image_id)

    def figures(self) -> dict[str, int | str]:
        figures: dict[str, int | str] = {
            "rows": self.rows,
            "rows left out": self.left_out,
            "photographs": len(self.image_ids),
            "captions": len(self.words),
        }
        if self.words:
            figures |= {"words a caption": f"{np.mean(self.words):.1f}", "words at most": max(self.words)}
        figures |= {"photographs with a score": len(self.scores), "with a distribution": self.with_distribution}
        if self.scores:
            figures["mean score"] = f"{np.mean(self.scores):.2f}"
            figures["range of scores"] = f"{min(self.scores):.2f}-{max(self.scores):.2f}"
        return figures


@dataclass
class Report:
    """What a source holds, split by split; `str(report)` is a table."""

    source: str
    splits: dict[str, SplitReport] = field(default_factory=dict)
    rows_checked: int | None = None  # of each split; None: all

    def __str__(self) -> str:
        parts = self.splits.values()
        columns = [part.figures() for part in parts]
        lines = [("", *self.splits)]
        for name in dict.fromkeys(itertools.chain(*columns)):
            lines.append((name, *(column.get(name, "") for column in columns)))
        topics = dict.fromkeys(itertools.chain(*(part.topics for part in parts)))
        if set(topics) != {"(everything)"}:
            lines += [(f"rows about {name}", *(part.topics[name] for part in parts)) for name in topics]
        examples = []
        for problem, consequence in PROBLEMS.items():
            if any(part.problems[problem] for part in parts):
                lines.append((f"{problem} ({consequence})", *(part.problems[problem] for part in parts)))
                ids = itertools.chain(*(part.examples.get(problem, []) for part in parts))
                examples.append(f"{problem}: {', '.join(itertools.islice(ids, 5))}")
        width = max(len(line[0]) for line in lines)
        table = [line[0].ljust(width) + "".join(str(cell).rjust(12) for cell in line[1:]) for line in lines]
        checked = [] if self.rows_checked is None else [f"Of the first {self.rows_checked} rows of each split."]
        return "\n".join([self.source, *table, *checked, *(["For example:", *examples] if examples else [])])


# One row -------------------------------------------------------------------------------------------------------------


def to_schema(
    row: dict[str, Any], image: dict[str, Any] | None, image_id: str, split: str, options: Options
) -> dict[str, Any]:
    """
    A row of any source, by the names of the schema and their synonyms, to `RAW_FEATURES`.

    Args:
        image: `path` or `bytes` of the picture, None where there is none.
        split: Of rows that do not name their own.
    """
    problems: list[str] = []
    captions, weights = read_texts(row, problems)
    shares, mean = read_score(row, options.score_range, problems)
    topic = str(row.get("topic") or row.get("aspect") or "").strip() or None
    topic_score = on_scale(row.get("topic_score"), None, problems, "unparsable topic score")
    if image is None:
        problems.append("missing image")
    elif is_damaged(image, options.decode_images):
        problems.append("damaged image")
    labels, saliency = read_numbers(row, "aspect_labels", 1, problems), read_numbers(row, "saliency", 2, problems)
    told = mean if topic is None else None  # the score of a topic's row is told by the photograph's others
    if not captions and told is None and labels is None and saliency is None:
        problems.append("nothing to learn from")
    split = str(row.get("split") or split)
    return {
        "image": image,
        "image_id": image_id,
        "captions": captions,
        "caption_weights": weights,
        "topic": topic,
        "topic_score": topic_score,
        "score": shares,
        "score_mean": mean,
        "aspect_labels": labels,
        "saliency": saliency,
        "split": SPLITS.get(split.lower(), split),
        "problems": problems,
    }


def read_texts(row: dict[str, Any], problems: list[str]) -> tuple[list[str], list[float] | None]:
    """The captions that say anything, and their weights if there are any."""
    texts = row.get("caption") if row.get("captions") is None else row["captions"]
    texts = [] if texts is None else texts if isinstance(texts, list) else [texts]
    weights = row.get("caption_weights", row.get("caption_weight"))
    if not isinstance(weights, list):
        weights = None if weights in (None, "") else [weights] * len(texts)
    weights = read_numbers({"caption_weight": weights}, "caption_weight", 1, problems)
    if weights is not None and len(weights) != len(texts):
        problems.append("unreadable caption_weight")
        weights = None
    kept = []
    for position, text in enumerate(texts):
        if text is None or (isinstance(text, str) and not text.strip()):
            problems.append("empty text")
        elif not isinstance(text, str):
            problems.append("unreadable text")
        else:
            kept.append(position)
            problems += ["overlong text"] * (len(words(text)) > MAX_WORDS)
            problems += ["broken characters"] * ("\ufffd" in text)
    captions = [texts[position].strip() for position in kept]
    return captions, None if weights is None else [weights[position] for position in kept]


def read_score(
    row: dict[str, Any], score_range: tuple[float, float] | None, problems: list[str]
) -> tuple[list[float] | None, float | None]:
    """Shares of the scores 1 to 10 if they are given, and the mean on that scale."""
    value = next((row[name] for name in ("rating", "score", "gt_score") if row.get(name) not in (None, "")), None)
    if not isinstance(value, list):
        return None, on_scale(value, score_range or row.get("score_range"), problems)
    try:
        counts = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        counts = np.zeros(0)
    if counts.shape != (10,) or not np.isfinite(counts).all() or counts.min() < 0 or counts.sum() == 0:
        problems.append("unparsable score")
        return None, None
    shares = counts / counts.sum()
    return shares.tolist(), float(shares @ np.arange(1, 11))


def on_scale(
    value: Any, score_range: tuple[float, float] | None, problems: list[str], problem: str = "unparsable score"
) -> float | None:
    """A score in `score_range` (by default 1 to 10) on the scale 1 to 10; None where there is none."""
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    worst, best = score_range or (1, 10)
    if math.isnan(score):
        problems.append(problem)
    elif not worst <= score <= best:
        problems.append("score out of range")
    else:
        return 1 + 9 * (score - worst) / (best - worst)
    return None


def read_numbers(row: dict[str, Any], name: str, dimensions: int, problems: list[str]) -> list | None:
    value = row.get(name)
    if value is None:
        return None
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.zeros(())
    if array.ndim != dimensions or not np.isfinite(array).all():
        problems.append(f"unreadable {name}")
        return None
    return array.tolist()


def is_damaged(image: dict[str, Any], decode: bool) -> bool:
    """Whether the head of the picture cannot be read or, if it is decoded, any of it."""
    try:
        if decode:
            datasets.Image().decode_example(image)
        elif image["bytes"] is not None or "://" not in image["path"]:
            Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])).close()
    except Exception:  # Pillow's decoders raise nearly anything on damaged files
        return True
    return False


def is_kept(problems: list[str]) -> bool:
    return not any(PROBLEMS[problem] == "row left out" for problem in problems)


# Files ---------------------------------------------------------------------------------------------------------------


def split_of(path: Path) -> str:
    """The split that the last part of a path names which names any, `train` if none does."""
    parts = re.split(r"[^a-z]+", path.as_posix().lower())
    return next((SPLITS[part] for part in reversed(parts) if part in SPLITS), "train")


def index_images(folder: Path, by_name: bool) -> dict[str, str]:
    """All pictures in a folder by their relative paths, and also by names and stems where these are unique."""
    by_path, named = {}, defaultdict(list)
    for parent, _, names in os.walk(folder):
        for name in names:
            stem, suffix = os.path.splitext(name)
            if suffix.lower() in SUFFIXES:
                path = os.path.join(parent, name)
                by_path[Path(path).relative_to(folder).as_posix()] = path
                for key in (name, stem):
                    named[key].append(path)
    unique = {key: paths[0] for key, paths in named.items() if len(paths) == 1}
    return unique | by_path if by_name else by_path


def without_suffix(name: str) -> str:
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in (*SUFFIXES, *UNREAD_SUFFIXES) else name  # a title may have a dot of its own


def photograph_id(name: str) -> str:
    """
    The one id of a photograph, from its path below the data: no suffix of a picture, slashes, no `.` and `..` within.

    Args:
        name: What a row gives as its `file_name`, `path`, `image` or `image_id`; of paths only those below one root
            are comparable.
    """
    # NOTE: composed, because macOS writes an é of two characters into the names of files
    name = unicodedata.normalize("NFC", str(name)).replace("\\", "/")
    return without_suffix(posixpath.normpath(name)) if name else ""


def find_image(name: str, index: dict[str, str]) -> dict[str, Any] | None:
    """The picture of that path, else name, else stem."""
    if os.path.isabs(name):
        path = name if os.path.isfile(name) else None
    else:
        short = os.path.basename(name)
        keys = (os.path.normpath(name), short, without_suffix(short)) if name else ()
        path = next((index[key] for key in keys if key in index), None)
    return None if path is None else {"path": path, "bytes": None}


def file_rows(files: list[Path], root: Path, images: Path | None, options: Options) -> Iterator[dict[str, Any]]:
    """Rows in `RAW_FEATURES` of files below `root`."""
    # NOTE: metadata files mean the picture beside them; of that name there may be another in the test folder
    find_index = functools.cache(index_images)
    for file in files:
        is_metadata = file.stem == "metadata"
        index = find_index(images or file.parent, by_name=images is not None or not is_metadata)
        place = file.relative_to(root)
        for number, content in enumerate(read_rows(file), start=1):
            row = content or {}
            row = {**row, **{name: row.get(given) for name, given in options.columns.items()}}
            name = str(row.get("image") or row.get("file_name") or "")
            picture = place.with_name(f"{place.name}:{number}") if name == "" else place.parent / name
            folders = [part for part in picture.parent.parts if part.lower() not in SPLITS]
            image_id = row.get("image_id") or Path(*folders, without_suffix(picture.name)).as_posix()
            split_here = split_of(picture.parent if is_metadata else place)
            result = to_schema(row, find_image(name, index), str(image_id), split_here, options)
            if content is None:
                result["problems"] = ["unreadable row"]
            yield result


def load_files(files: list[Path], root: Path, images: Path | None, options: Options) -> dict[str, datasets.Dataset]:
    rows = defaultdict(list)
    for row in file_rows(files, root, images, options):
        rows[row["split"]].append(row)
    return {name: datasets.Dataset.from_list(part, features=RAW_FEATURES) for name, part in rows.items()}


# Hub -----------------------------------------------------------------------------------------------------------------


def load_hub(
    source: str, options: Options, streaming: bool
) -> dict[str, datasets.Dataset] | dict[str, datasets.IterableDataset]:
    splits = {}
    for name, rows in datasets.load_dataset(source, streaming=streaming).items():
        column = options.columns.get("image", "image")
        if column not in rows.column_names:
            raise ValueError(f"{source} has no column {column!r}, only {rows.column_names}: name it by `columns`.")
        rows = rows.cast_column(column, datasets.Image(decode=False))
        convert = functools.partial(hub_row, split=name, options=options)
        splits[SPLITS.get(name, name)] = rows.map(convert, features=RAW_FEATURES, remove_columns=rows.column_names)
    return splits


def hub_row(row: dict[str, Any], split: str, options: Options) -> dict[str, Any]:
    row = {**row, **{name: row.get(given) for name, given in options.columns.items()}}
    image = row["image"]
    path, content = (None, None) if image is None else (image["path"], image["bytes"])
    if content is None and (path is None or ("://" not in path and not os.path.isfile(path))):
        image = None
    if (image_id := row.get("image_id")) is None:  # NOTE: names inside of Parquet files often start again in each
        image_id = hashlib.sha256(content).hexdigest()[:16] if content else PurePosixPath(path or "(none)").stem
    # the split is the one it was found in: it cannot move to another
    return to_schema({**row, "split": None}, image, str(image_id), split, options)


# All -----------------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    images: str | Path | None = None,
    *,
    columns: dict[str, str] | None = None,
    score_range: tuple[float, float] | None = None,
    decode_images: bool = False,
    streaming: bool = False,
    check: int | None = None,
    verbose: bool = True,
) -> tuple[datasets.DatasetDict | datasets.IterableDatasetDict, Report]:
    """
    The splits of a source in the columns `FEATURES`, and the report of what they hold, which is printed too.

    Args:
        source: A file or folder in one of the forms above, or a Hub id.
        images: Folder of the pictures, searched to the bottom; by default the source's own.
        columns: Names in the source of columns that it calls otherwise, e.g. `{"caption": "text"}`.
        score_range: Worst and best of single scores, by default 1 and 10 (RPCD: 0 and 1).
        decode_images: Also decodes every picture, so that those which are cut short are left out. Slow; otherwise
            only what does not begin as a picture is.
        streaming: Pictures of a Hub data set are fetched when they are asked for, and rows never kept.
        check: Look only at so many rows of each split for the report and for overlap, e.g. of a Hub data set that is
            too large to read twice.
        verbose: Print the report.

    Raises:
        ValueError: if no row can be used, or photographs of train are in another split as well.
    """
    if score_range is not None and not score_range[0] < score_range[1]:
        raise ValueError(f"`score_range` is worst and best, got {score_range}.")
    options = Options(columns or {}, score_range, decode_images)
    path = Path(source)
    if files := find_files(path):
        root = path if path.is_dir() else path.parent
        splits = load_files(files, root, None if images is None else Path(images), options)
        if streaming:
            splits = {name: rows.to_iterable_dataset() for name, rows in splits.items()}
    else:
        splits = load_hub(str(source), options, streaming)
    splits = {name: splits[name] for name in dict.fromkeys((*SPLITS.values(), *splits)) if name in splits}
    report = Report(str(source), rows_checked=check)
    for name, rows in splits.items():
        part = report.splits[name] = SplitReport()
        for row in itertools.islice(rows.remove_columns("image"), check):
            part.add(row)
    if verbose:
        print(report)
    if not any(part.image_ids for part in report.splits.values()):
        raise ValueError(f"No row of {source} can be used (do `images` and `columns` fit?):\n{report}")
    trained = report.splits["train"].image_ids if "train" in report.splits else set()
    for name, part in report.splits.items():
        if name != "train" and (shared := sorted(trained & part.image_ids)):
            raise ValueError(
                f"{len(shared)} photographs of {name} are in train as well: {', '.join(shared)}. Take them out of one; "
                "if they are different photographs of the same name, give each a column `image_id`."
            )
    kind = datasets.IterableDatasetDict if streaming else datasets.DatasetDict
    kept = {name: rows.filter(is_kept, input_columns="problems") for name, rows in splits.items()}
    splits = {
        name: rows.remove_columns("problems").cast_column("image", datasets.Image()) for name, rows in kept.items()
    }
    return kind(splits), report


def split_off_validation(
    splits: datasets.DatasetDict, share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train and to validate on; where the source has no such split, all rows of a photograph stay together."""
    if not splits.get("train"):
        raise ValueError(f"There is nothing to train on, only {list(splits)}.")
    train = splits["train"]
    if splits.get("validation"):
        return train, splits["validation"]
    photographs = sorted(set(train["image_id"]))
    if len(photographs) < 2:
        raise ValueError("One photograph cannot be split into training and validation.")
    held_out = set(random.Random(seed).sample(photographs, max(1, round(share * len(photographs)))))
    is_held_out = np.array([image_id in held_out for image_id in train["image_id"]])
    return train.select(np.flatnonzero(~is_held_out)), train.select(np.flatnonzero(is_held_out))


# Training rows -------------------------------------------------------------------------------------------------------


def training_rows(
    rows: datasets.Dataset | datasets.IterableDataset, processor: ASEProcessor
) -> datasets.Dataset | datasets.IterableDataset:
    """
    One row for each caption, in the columns of `ASEDataCollator`, with its `length` in tokens.

    A photograph that has a score but no caption is one row with an empty caption of weight 0.
    """
    names = ("image", "image_id", "score", "aspect_labels", "saliency")
    features = datasets.Features(
        {
            **{name: FEATURES[name] for name in names},
            "prompt": datasets.Value("string"),
            "caption": datasets.Value("string"),
            "caption_weight": datasets.Value("float64"),
            "length": datasets.Value("int64"),
        }
    )

    def split_up(batch: dict[str, list]) -> dict[str, list]:
        result = {name: [] for name in features}
        prompts = {topic: topic_prompt(processor, topic) for topic in set(batch["topic"])}
        for i, captions in enumerate(batch["captions"]):
            weights = batch["caption_weights"][i] or [1.0] * len(captions)
            for caption, weight in zip(captions or [""], weights or [0.0], strict=True):
                for name in names:
                    result[name].append(batch[name][i])
                result["score"][-1] = batch["score"][i] or score_of_mean(batch["score_mean"][i])
                result["prompt"].append(prompts[batch["topic"][i]])
                result["caption"].append(caption)
                result["caption_weight"].append(weight)
                result["length"].append(len(processor.tokenizer(caption)["input_ids"]))
        return result

    unread = rows.cast_column("image", datasets.Image(decode=False))
    if isinstance(rows, datasets.IterableDataset):  # NOTE: with features given to `map`, its pictures stay undecoded
        return unread.map(split_up, batched=True, batch_size=32, remove_columns=list(FEATURES)).cast(features)
    return unread.map(split_up, batched=True, remove_columns=list(FEATURES), features=features)


def score_of_mean(mean: float | None) -> list[float] | None:
    """
    The narrowest shares of the scores 1 to 10 that have this mean: nothing is known of the spread.

    What is learned by the squared earth mover's distance still gets wide where the score is hard to tell.
    """
    if mean is None:
        return None
    return np.clip(1 - np.abs(np.arange(1, 11) - mean), 0, 1).tolist()


def topic_question(topic: str | None) -> str:
    topic = topic or "critique"
    return PROMPTS.get(topic, f"Critique the {topic.replace('_', ' ')} of this photograph.")


def topic_prompt(processor: ASEProcessor, topic: str | None) -> str:
    return processor.critique_prompt(topic_question(topic))


# Run -----------------------------------------------------------------------------------------------------------------


def parse_columns(pairs: Iterable[str]) -> dict[str, str]:
    columns = dict(pair.partition("=")[::2] for pair in pairs)
    if not all(columns.values()):
        raise ValueError(f"--columns takes pairs like caption=text, got {', '.join(pairs)}.")
    return columns


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file, folder or Hub id")
    parser.add_argument("--images", type=Path, help="folder of the pictures (default: the source's own)")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=GIVEN", help="columns of other names")
    parser.add_argument("--score-range", nargs=2, type=float, metavar=("WORST", "BEST"), help="default: 1 10")
    parser.add_argument("--decode-images", action="store_true", help="decode every picture, to find those cut short")
    parser.add_argument("--streaming", action="store_true", help="do not hold or store the rows")
    parser.add_argument("--check", type=int, metavar="ROWS", help="look at so many rows of each split only")
    args = parser.parse_args(argv)
    datasets.disable_progress_bars()
    try:
        load(
            args.source,
            args.images,
            columns=parse_columns(args.columns),
            score_range=args.score_range and tuple(args.score_range),
            decode_images=args.decode_images,
            streaming=args.streaming,
            check=args.check,
        )
    except (OSError, ValueError, csv.Error) as error:
        print(f"{args.source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
