"""
Data sets of aesthetic image captioning in one schema, and a report of what they hold and what is wrong with them.

    python examples/aic_data.py my-photographs
    python examples/aic_data.py PCCD --images PCCD/images/full
    python examples/aic_data.py scores.csv --images photographs --score-range 0 100
    python examples/aic_data.py somebody/photo-critiques --columns caption=text --streaming

Sources, told apart by their names and contents (`readers` has a file a form); a folder works as its files do:
    a folder with metadata.jsonl or metadata.csv   your own, as imagefolder has it: file_name, caption or captions, ...
    any .jsonl, .csv or .json list of such rows    e.g. [{"image": "953980.jpg", "gt_score": 5.21}] of score lists
    rows with "conversations" or "messages"        LLaVA's and OpenAI's: an answer a row, with the question before it
    a .json with "images" and "annotations"        captions as COCO has them
    guru_{train,validation,test}.json, raw.json    PCCD, one row for each of the seven aspects of a photograph
    a .json with "images" and their "sentences"    AVA-Captions (Karpathy's form)
    color_lighting.json, composition.json, ...     DPC-Captions
    245925.json, ...                               DPC2022 of ARIC, comments with their relevance
    processed_info_{train,validation,test}.json    RPCD, and PCCD and AVA as Aestheval has them
    raw_reddit_photocritique_comments.csv, ...     RPCD before that
    AVA.txt, TANet's .csv, AVA_Comments_Full.txt   AVA, counts of the scores 1 to 10, and comments
    APDDv2-10023.csv                               paintings, ten scores besides the total
    a Hub id, or a folder of Parquet files         with an image column

The rows' columns are FEATURES. In your own data: `image` or `file_name`; `captions` (a list) or `caption`; and as you
like `score`, `rating` or `gt_score` (one number, or ten counts or shares of the scores 1 to 10), `aspect` (the topic of
the captions), `prompt` (your own question), `caption_weight` (aesthetic relevance, one number or one a caption),
`aspect_labels`, `saliency`, `image_id`, `split`.

A photograph's id is the path of its picture below the data, without suffix. A name that has no such file is a missing
image: another of the same name elsewhere is never taken for it. Only where data have bare names, as AVA's ids, and the
pictures lie in some folder below, one that is the only one of its name will do.

A split is the row's own, or named by a folder directly below the data (train, validation or val, test), or by the last
word of the file's name (guru_test.json, captions_val2014.json); otherwise it is train. Single scores are from 1 to 10 if
nothing else is told by `--score-range`, by the form, or by the name of a known data set in that of the file or a folder
(`scales`); scores that do not look like 1 to 10 are an error.

Pictures are yours to bring. What is left out and what is odd is counted, with examples; nothing of it is an error,
except photographs that are both trained and evaluated on.
"""

import argparse
import difflib
import functools
import hashlib
import itertools
import os
import posixpath
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import numpy as np
from data_report import Report, SplitReport, is_kept
from data_schema import FEATURES, KNOWN_COLUMNS, NOTES, RAW_FEATURES, SPLITS, Options, read_name, to_schema, whole
from datasets.exceptions import DatasetsError
from picture_files import PictureIndex, find_picture, index_pictures, is_damaged, normal_path, photograph_id
from picture_files import without_suffix as without_suffix
from readers import RefusedFile, find_files, is_one_image, other_files, pccd, read_rows
from scales import known_scale, misfit

from ase_mllm import ASEProcessor
from ase_mllm.processing_ase import AESTHETIC_PROMPTS


# words after a split in the name of a file, as in test_set.csv
OF_FILES = {"set", "split", "data", "list", "labels", "annotations", "captions", "scores"}
PROMPTS = {  # for topics that do not fit "Critique the ... of this photograph."
    **AESTHETIC_PROMPTS,
    "general_impression": "Give your general impression of this photograph.",
    "impression_and_subject": "Give your impression of this photograph and of its subject.",
    "subject_of_photo": "Critique the subject of this photograph.",
    "use_of_camera": "Critique the use of the camera in this photograph.",
    "depth_and_focus": AESTHETIC_PROMPTS["focus"],
    "color_lighting": "Critique the colours and the light of this photograph.",
}
NO_SPLIT = "train", "nothing, so train"


# Files ---------------------------------------------------------------------------------------------------------------


def split_of(file: PurePosixPath, picture: str) -> tuple[str, str]:
    """
    The split of a row, and what told it.

    Args:
        file: Where the row stands, below the data.
        picture: Its picture, below the data.
    """
    words = re.findall(r"[a-z]+", file.stem.lower())
    while words and words[-1] in OF_FILES:
        words.pop()
    if len(file.parts) > 1 and file.parts[0].lower() in SPLITS:
        return SPLITS[file.parts[0].lower()], "a folder's name"
    if words and words[-1] in SPLITS:
        return SPLITS[words[-1]], "the file's name"
    folder, _, below = picture.partition("/")
    return (SPLITS[folder.lower()], "a folder's name") if below and folder.lower() in SPLITS else NO_SPLIT


def file_rows(
    files: list[Path], root: Path, images: Path | None, options: Options, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """Rows in `RAW_FEATURES` of files below `root`; what is not read is noted."""
    find_index = functools.cache(index_pictures)

    @functools.cache  # a photograph may have many rows
    def is_damaged_file(path: str) -> bool:
        return is_damaged({"path": path, "bytes": None}, options.decode_images)

    for file in files:
        try:
            rows = read_rows(file, options.columns, options.pccd)
        except RefusedFile as error:
            if len(files) == 1:
                raise
            notes.append(f"Not read: {error}")
            continue
        except ValueError:
            if len(files) == 1 or not is_one_image(file):
                raise
            rows = [(1, None)]
        place = PurePosixPath(file.relative_to(root).as_posix())
        names = [file.stem, *(folder.name for folder in file.absolute().parents[: len(place.parts)])]
        here_options = replace(options, known=known_scale(names))
        here = "" if len(place.parts) == 1 else place.parent.as_posix()
        beside = file.stem == "metadata"  # it means the picture of that very path
        unused = set()
        for number, content in rows:
            row = content or {}
            for name in row.keys() - KNOWN_COLUMNS - unused:
                unused.add(name)
                near = difflib.get_close_matches(str(name).lower(), KNOWN_COLUMNS, 1, 0.85)
                if near and near[0] not in row:
                    notes.append(f"{place}: the column {name!r} is not read: {near[0]!r} would be")
            name = read_name(row.get("image")) or ""
            found = find_row_picture(name, here, images, beside, find_index(images or root)) if name else None
            split = split_of(place, normal_path(posixpath.join(here, name) if beside else name))
            image = None if found is None else {"path": found[0], "bytes": None}
            where = whole(f"{place}:{number}")
            # what lies beside a file in a folder is told from what lies beside another; a split's folder is none
            folder = here if beside else "" if found is None else found[1]
            first, _, below = folder.partition("/")
            folder = below if first.lower() in SPLITS else folder
            image_id = photograph_id(posixpath.join(folder, name)) if name else where
            damaged = found is not None and is_damaged_file(found[0])
            result = to_schema(row, image, damaged, image_id, split, here_options)
            result["place"] = where
            if content is None:
                result["problems"] = ["unreadable row"]
            yield result


def find_row_picture(
    name: str, here: str, images: Path | None, beside: bool, index: PictureIndex
) -> tuple[str, str] | None:
    """
    A row's picture and the folder below the data beside whose file it was found, if it was.

    Args:
        here: The folder of the row's file below the data.
        images: The folder of all pictures, if the user gave one.
        beside: Whether the file means only pictures by their paths from it.
    """
    if images is not None:
        # names may begin with the folder that the user gave: images/1.jpg
        short = normal_path(name).removeprefix(f"{images.resolve().name}/")
        found = find_picture(name, ["", here], index, by_name=True) or find_picture(short, [""], index, by_name=False)
        return None if found is None else (found[0], "")
    if beside:
        return find_picture(name, [here], index, by_name=False)
    found = find_picture(name, [here, "", "images"], index, by_name=True)
    return found if found is None or found[1] == here else (found[0], "")


def load_files(
    files: list[Path], root: Path, images: Path | None, options: Options, notes: list[str]
) -> dict[str, datasets.Dataset]:
    rows = defaultdict(list)
    for row in file_rows(files, root, images, options, notes):
        rows[row["split"]].append(row)
    if not rows:
        raise ValueError("\n".join([f"No file of {root} holds rows.", *notes]))
    return {name: datasets.Dataset.from_list(part, features=RAW_FEATURES) for name, part in rows.items()}


# Hub -----------------------------------------------------------------------------------------------------------------


def load_hub(
    source: str, options: Options, streaming: bool
) -> dict[str, datasets.Dataset] | dict[str, datasets.IterableDataset]:
    splits, options = {}, replace(options, known=known_scale([PurePosixPath(source).name]))
    try:
        loaded = datasets.load_dataset(source, streaming=streaming)
    except (ConnectionError, FileNotFoundError) as error:
        if Path(source).exists():
            raise
        raise ValueError(
            f"{source} is no file or folder here (looked in {Path.cwd()}), and no data set of that name can be had from the "
            f"Hub ({str(error).splitlines()[0]}). Is it spelled right?"
        ) from error
    for name, rows in loaded.items():
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
    damaged = image is not None and is_damaged(image, options.decode_images)
    # the split is the one it was found in: it cannot move to another
    return to_schema({**row, "split": None}, image, damaged, str(image_id), (split, "the data set"), options)


# All -----------------------------------------------------------------------------------------------------------------


def load(
    source: str | Path,
    images: str | Path | None = None,
    *,
    columns: dict[str, str] | None = None,
    score_range: tuple[float, float] | None = None,
    decode_images: bool = False,
    pccd_texts: str = pccd.TEXTS[0],
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
        score_range: Worst and best of single scores, by default what the form or the name of a known data set tells,
            else 1 and 10.
        decode_images: Decodes every picture, to leave out all that are damaged. Slow; otherwise only those that do not
            begin as a picture, have broken EXIF, or are cut short are found.
        pccd_texts: Of PCCD, a row for every topic (`aspects`), or one of the photograph with all texts (`joined`) or the
            general impression (`general`).
        streaming: Pictures of a Hub data set are fetched when they are asked for, and rows never kept.
        check: Look only at so many rows of each split for the report and for overlap, e.g. of a Hub data set that is
            too large to read twice.
        verbose: Print the report.

    Raises:
        ValueError: if the source is of no known form, no row can be used, scores are on a scale that nobody told, or
            photographs of train are in another split as well.
    """
    if score_range is not None and not score_range[0] < score_range[1]:
        raise ValueError(f"`score_range` is worst and best, got {score_range}.")
    if pccd_texts not in pccd.TEXTS:
        raise ValueError(f"`pccd_texts` is one of {', '.join(pccd.TEXTS)}, got {pccd_texts!r}.")
    options = Options(columns or {}, score_range, decode_images, pccd_texts)
    splits, notes = load_source(Path(source), images, options, streaming)
    splits = {name: splits[name] for name in dict.fromkeys((*SPLITS.values(), *splits)) if name in splits}
    report = Report(str(source), rows_checked=check, notes=notes)
    for name, rows in splits.items():
        part = report.splits[name] = SplitReport()
        for row in itertools.islice(rows.remove_columns("image"), check):
            part.add(row)
    if verbose:
        print(report)
    check_scores(report)
    if not any(part.image_ids for part in report.splits.values()):
        rows = sum(part.rows for part in report.splits.values())
        told = "" if verbose else f"\n{report}"
        raise ValueError(
            f"None of the {rows} rows of {source} can be used: {report.first_problem()}. Do --images (the pictures' folder) "
            f"and --columns (what its columns are called) fit?{told}"
        )
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
        name: rows.remove_columns(list(NOTES)).cast_column("image", datasets.Image()) for name, rows in kept.items()
    }
    return kind(splits), report


def load_source(
    path: Path, images: str | Path | None, options: Options, streaming: bool
) -> tuple[dict[str, datasets.Dataset] | dict[str, datasets.IterableDataset], list[str]]:
    """All rows in `RAW_FEATURES`, and what the report says of the files."""
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"{images}, where the pictures should be, is no folder.")
    if not (files := find_files(path)):
        if images is not None:
            raise ValueError(f"{path} has no files that name pictures in a folder: leave `images` out.")
        if path.is_dir() and not any(path.rglob("*.parquet")) and not any(path.rglob("*.arrow")):
            pictures = len(index_pictures(path).by_path)
            raise ValueError(
                f"{path} has {pictures or 'no'} pictures and no .jsonl, .csv, .json, .txt or .parquet file with rows: write "
                'a metadata.jsonl beside the pictures, one line a picture: {"file_name": "petra.jpg", "caption": "..."}'
            )
        return load_hub(str(path), options, streaming), []
    notes: list[str] = []
    root = path if path.is_dir() else path.parent
    splits = load_files(files, root, None if images is None else Path(images), options, notes)
    if path.is_dir() and (others := other_files(path, files)):
        notes.append(f"Not read, name it to read it: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}.")
    if streaming:
        splits = {name: rows.to_iterable_dataset() for name, rows in splits.items()}
    return splits, notes


def check_scores(report: Report):
    """Raises if the scores do not look like what they were read as."""
    unscaled = [score for part in report.splits.values() for score in part.unscaled]
    if why := misfit(unscaled):
        raise ValueError(f"{report.source} has {why}")
    for name, part in report.splits.items():
        if why := part.scale_misfit():
            raise ValueError(f"{report.source}, {name}: {why}")


def split_off_validation(
    splits: datasets.DatasetDict, share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Rows to train and to validate on; where the source has no such split, all rows of a photograph stay together."""
    if not splits.get("train"):
        raise ValueError(f"There is nothing to train on, only {list(splits)}.")
    train = splits["train"]
    if splits.get("validation"):
        return train, splits["validation"]
    return take_out(train, hold_out(train["image_id"], share, seed))


def hold_out(image_ids: Iterable[str], share: float, seed: int) -> set[str]:
    """A share of the photographs, at least one of them, drawn by `seed`."""
    photographs = sorted(set(image_ids))
    if len(photographs) < 2:
        raise ValueError(
            f"There is one photograph alone ({', '.join(photographs)}), and training needs two: one is set aside to validate "
            "on. Add photographs, or say by a column `split` which are for what."
        )
    return set(random.Random(seed).sample(photographs, max(1, round(share * len(photographs)))))


def take_out(rows: datasets.Dataset, photographs: set[str]) -> tuple[datasets.Dataset, datasets.Dataset]:
    """The rows of all other photographs, and those of these."""
    is_theirs = np.array([image_id in photographs for image_id in rows["image_id"]], dtype=bool)
    return rows.select(np.flatnonzero(~is_theirs)), rows.select(np.flatnonzero(is_theirs))


# Training rows -------------------------------------------------------------------------------------------------------


def training_rows(
    rows: datasets.Dataset | datasets.IterableDataset, processor: ASEProcessor
) -> datasets.Dataset | datasets.IterableDataset:
    """
    One row for each caption, in the columns of `ASEDataCollator`, with its `length` in tokens.

    A photograph that has a score but no caption is one row with an empty caption of weight 0. Where topics are called as
    the processor's aspects are and a row has no `aspect_labels`, the scores of the topics become them.
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
        asked = list(zip(batch["topic"], batch["prompt"]))
        prompts = {one: topic_prompt(processor, *one) for one in set(asked)}
        for i, captions in enumerate(batch["captions"]):
            weights = batch["caption_weights"][i] or [1.0] * len(captions)
            for caption, weight in zip(captions or [""], weights or [0.0], strict=True):
                for name in names:
                    result[name].append(batch[name][i])
                result["score"][-1] = batch["score"][i] or score_of_mean(batch["score_mean"][i])
                result["aspect_labels"][-1] = batch["aspect_labels"][i] or labels_of_topics(
                    batch["topic_scores"][i], processor.aspect_names
                )
                result["prompt"].append(prompts[asked[i]])
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


def labels_of_topics(scores: list[dict[str, Any]] | None, names: list[str] | None) -> list[float] | None:
    """Scores of topics that are called as aspects are: 0 the worst, 1 the best, -1 unknown; None where all are unknown."""
    known = {one["topic"]: (one["score"] - 1) / 9 for one in scores or []}
    labels = [known.get(name, -1.0) for name in names or []]
    return labels if any(label >= 0 for label in labels) else None


def row_question(topic: str | None, prompt: str | None = None) -> str:
    """A row's own `prompt`, else that of its topic."""
    topic = topic or "critique"
    return prompt or PROMPTS.get(topic, f"Critique the {topic.replace('_', ' ')} of this photograph.")


def topic_prompt(processor: ASEProcessor, topic: str | None, prompt: str | None = None) -> str:
    """What the model is asked, in its chat template with a place for the picture."""
    return processor.critique_prompt(row_question(topic, prompt))


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
    parser.add_argument("--score-range", nargs=2, type=float, metavar=("WORST", "BEST"), help="default: see above")
    parser.add_argument("--decode-images", action="store_true", help="decode every picture, to find those cut short")
    parser.add_argument("--pccd", choices=pccd.TEXTS, default=pccd.TEXTS[0], help="which texts of PCCD are a row")
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
            pccd_texts=args.pccd,
            streaming=args.streaming,
            check=args.check,
        )
    except (OSError, ValueError, DatasetsError) as error:
        print(f"{args.source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
