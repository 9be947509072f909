"""
Several sources of data as one: their weights, and no photograph that one trains on and another evaluates on.

    splits, reports = load_mixture(["PCCD", "AVA-Captions", "my-photographs"], weights=[1, 0.2, 3])

AVA, AVA-Captions, DPC-Captions and AVA's comments are of the same photographs by the same ids, with test parts of their own.
"""

import filecmp
import os
import random
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from aic_data import Report, hold_out, load, take_out
from PIL import Image, ImageOps


SIDE = 16  # of the small copies by which pictures are compared
UNLIKE = 8.0  # mean difference of their grey values, of 255, from which on they are of two photographs


def load_mixture(
    sources: list[str],
    weights: list[float] | None = None,
    images: list[str | None] | None = None,
    *,
    seed: int = 0,
    validation_share: float | None = None,
    **options: Any,
) -> tuple[datasets.DatasetDict, list[Report]]:
    """
    The splits of all sources in the columns `FEATURES`, in the order of the sources, and the report of each.

    One id may mean two photographs, e.g. `1` in two folders: the later source's is then called by its folder as well.

    Args:
        weights: How often each source's rows to train on are taken: 2 is each twice, 0.5 half of them, drawn by `seed`.
            Default: as they are.
        images: Folders of the pictures, one a source; None for the source's own.
        validation_share: Of the photographs to train on, all sources together, that become `validation` where no source
            has such a split; before any is taken more than once. None: none.
        options: Of `aic_data.load`, the same for all sources.

    Raises:
        ValueError: as `aic_data.load` does, and if a photograph is in train here and in another split there: by its id, or
            by a file of the same bytes.
    """
    weights = weights or [1.0] * len(sources)
    images = images or [None] * len(sources)
    for name, values in (("weights", weights), ("images", images)):
        if len(values) != len(sources):
            raise ValueError(f"{len(sources)} sources take as many {name}, got {len(values)}.")
    if unfit := [weight for weight in weights if not 0 < weight < float("inf")]:
        raise ValueError(f"Weights are larger than 0, got {unfit[0]}.")
    loaded, reports = [], []
    for source, folder in zip(sources, images):
        splits, report = load(source, folder, **options)
        loaded.append(with_own_ids(source, splits, loaded))
        reports.append(report)
    check_apart(list(zip(sources, loaded)))
    if validation_share is not None and not any(splits.get("validation") for splits in loaded):
        loaded = with_validation(loaded, validation_share, seed)
    parts: dict[str, list[datasets.Dataset]] = {}
    for splits, weight in zip(loaded, weights):
        for name, rows in splits.items():
            parts.setdefault(name, []).append(taken(rows, weight, seed) if name == "train" else rows)
    return datasets.DatasetDict({name: datasets.concatenate_datasets(rows) for name, rows in parts.items()}), reports


def taken(rows: datasets.Dataset, weight: float, seed: int) -> datasets.Dataset:
    """Rows as often as their weight says, the fraction drawn."""
    times, fraction = divmod(weight, 1)
    drawn = random.Random(seed).sample(range(len(rows)), round(fraction * len(rows)))
    return rows.select([*list(range(len(rows))) * int(times), *sorted(drawn)])


def with_validation(sources: list[datasets.DatasetDict], share: float, seed: int) -> list[datasets.DatasetDict]:
    """The sources with a share of their photographs as `validation`; one that several sources have goes out of all."""
    trained = [image_id for splits in sources if "train" in splits for image_id in splits["train"]["image_id"]]
    if not trained:
        return sources
    held_out, parted = hold_out(trained, share, seed), []
    for splits in sources:
        if "train" in splits:
            train, validation = take_out(splits["train"], held_out)
            splits = datasets.DatasetDict({**splits, "train": train, "validation": validation})
        parted.append(splits)
    return parted


def check_apart(sources: list[tuple[str, datasets.DatasetDict]]):
    """Raises if a photograph is in train of one source and in another split of another."""
    trained = [(name, splits["train"]) for name, splits in sources if "train" in splits]
    for name, splits in sources:
        for split, rows in ((one, splits[one]) for one in splits if one != "train"):
            for other, train in trained:
                shared = sorted(set(train["image_id"]) & set(rows["image_id"]))
                if not shared and name != other:
                    shared = [f"{theirs} is {ours}" for theirs, ours in same_files(rows, train)]
                if shared:
                    some = ", ".join(shared[:5])
                    raise ValueError(
                        f"{len(shared)} photographs of {split} in {name} are in train of {other}: {some}"
                        f"{' ...' if len(shared) > 5 else ''}. Take them out of one, e.g. by its column `split`."
                    )


def same_files(one: datasets.Dataset, other: datasets.Dataset) -> list[tuple[str, str]]:
    """Ids of photographs whose files are the same, byte for byte; only files of one size are read."""
    sizes: dict[int, dict[str, str]] = {}
    for path, image_id in picture_paths(other).items():
        sizes.setdefault(os.path.getsize(path), {})[path] = image_id
    pairs = (
        (path, image_id, there, their_id)
        for path, image_id in picture_paths(one).items()
        for there, their_id in sizes.get(os.path.getsize(path), {}).items()
    )
    return sorted((mine, theirs) for path, mine, there, theirs in pairs if filecmp.cmp(path, there, shallow=False))


def picture_paths(rows: datasets.Dataset) -> dict[str, str]:
    """The photographs' ids by the paths of their files; those inside of Parquet files are not among them."""
    unread = rows.cast_column("image", datasets.Image(decode=False))
    if not len(rows) or unread[0]["image"]["bytes"] is not None:
        return {}
    paths = unread.select_columns("image").flatten()["image.path"]  # without what lies beside them
    return {path: image_id for path, image_id in zip(paths, rows["image_id"]) if path and os.path.isfile(path)}


def with_own_ids(
    source: str, splits: datasets.DatasetDict, others: Iterable[datasets.DatasetDict]
) -> datasets.DatasetDict:
    """The splits with other ids where a source before has the same for another picture."""
    mine, renamed = first_pictures(splits), set()
    for theirs in map(first_pictures, others):
        renamed |= {one for one in mine.keys() & theirs.keys() if not is_same_picture(mine[one], theirs[one])}
    if not renamed:
        return splits
    name = Path(source).resolve().stem
    return splits.map(
        lambda image_id: {"image_id": f"{name}/{image_id}" if image_id in renamed else image_id},
        input_columns="image_id",
    )


def first_pictures(splits: datasets.DatasetDict) -> dict[str, tuple[datasets.Dataset, int]]:
    """Where the picture of each id is: rows whose pictures are unread, and a place in them."""
    found = {}
    for rows in splits.values():
        unread = rows.cast_column("image", datasets.Image(decode=False))
        for place, image_id in enumerate(rows["image_id"]):
            found.setdefault(image_id, (unread, place))
    return found


def is_same_picture(one: tuple[datasets.Dataset, int], other: tuple[datasets.Dataset, int]) -> bool:
    """Whether two pictures are of one photograph, which may be larger or saved anew in one of them."""
    first, second = (rows[place]["image"] for rows, place in (one, other))
    if first["bytes"] is None and second["bytes"] is None and os.path.samefile(first["path"], second["path"]):
        return True
    return float(np.abs(small_copy(first) - small_copy(second)).mean()) < UNLIKE


def small_copy(image: dict[str, Any]) -> np.ndarray:
    with Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"])) as opened:
        opened.draft("L", (4 * SIDE, 4 * SIDE))  # a large JPEG is decoded small
        return np.asarray(
            ImageOps.exif_transpose(opened).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), float
        )
