"""
Captions more photographs than one machine can: on all machines of a Ray cluster, or all graphics cards of one machine.

    pip install -e '.[ray]'
    python examples/caption_ray.py PHOTOS... --out DIR [--address auto] [--model NAME_OR_PATH]

PHOTOS are files and folders, as for caption_photos.py, which is the simpler choice for a library on one machine: it also
writes heat maps and a page. On a cluster every machine sees the photographs, DIR, this repository and its environment
under the same paths.

DIR gets Parquet files, a row a photograph: `path`, `sha256`, `caption`, `score` and `std` (1 to 10), `aspects` (JSON),
`width`, `height`, `note`, `model`, and `error`, the reason why a photograph has no caption. DuckDB, pandas and Excel's
Power Query read the folder as one table.

Stop it whenever you like, even by `kill -9`: the same command goes on with the paths that have no row yet, and does the
block (`--block`) again that each worker was at. A machine or worker that dies costs nothing but time; what kills its worker
four times, a file that its reader crashes on, ends the run. Files that were changed since are not looked at again.

Exit status: 0 all captioned, 1 some have an error in place of a caption or the run was ended before its end, 2 nothing
could be started.
"""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from caption_photos import (
    CannotStart,
    add_model_arguments,
    ase_config,
    critique_all,
    describe,
    refuse_below_zero,
    start_model,
)
from filelock import FileLock, Timeout
from photo_files import Failure, Photo, find_photos, read_photo
from PIL import Image


# NOTE: before Ray is imported. It would report to its makers how it is used, and here what it plans
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
try:
    import ray
except ImportError:
    ray = None


# Without it a block whose photographs all failed would have columns of another type, and no file of it be readable
ROWS = pa.schema(
    [
        ("path", pa.string()),
        ("sha256", pa.string()),
        ("caption", pa.string()),
        ("score", pa.float64()),
        ("std", pa.float64()),
        ("aspects", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("note", pa.string()),
        ("error", pa.string()),
        ("model", pa.string()),
    ]
)


# Work of one worker --------------------------------------------------------------------------------------------------


class Captioner:
    """A model in a process of its own; Ray hands it batches of paths."""

    def __init__(self, args: argparse.Namespace):
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of odd EXIF, nothing to act on
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        if args.max_megapixels is not None:
            Image.MAX_IMAGE_PIXELS = int(args.max_megapixels * 1e6)
        self.args = args
        self.model, self.processor = start_model(args)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """A row for every path, whatever becomes of it."""
        read = [read_photo(Path(path)) for path in batch["path"].to_pylist()]
        photos = [item for item in read if isinstance(item, Photo)]
        rows = [self.row_of(photo, answer) for photo, answer in zip(photos, self.answers(photos), strict=True)]
        rows += [{"path": str(item.path), "error": item.reason} for item in read if isinstance(item, Failure)]
        return pa.Table.from_pylist([{**row, "model": self.args.model} for row in rows], schema=ROWS)

    def answers(self, photos: list[Photo]) -> list[dict[str, Any]]:
        if not photos:
            return []
        try:
            return critique_all(self.model, self.processor, photos, self.args.max_new_tokens)
        except Exception as error:  # of one of them: it must not cost the others
            if len(photos) == 1:
                return [{"error": f"the model failed: {error or type(error).__name__}"}]
        return [answer for photo in photos for answer in self.answers([photo])]

    def row_of(self, photo: Photo, answer: dict[str, Any]) -> dict[str, Any]:
        row = {"path": str(photo.path), "sha256": photo.stamp.sha256, "width": photo.width, "height": photo.height}
        if "error" in answer:
            return {**row, "error": answer["error"]}
        score = answer["score"]
        said = {"caption": answer["caption"], "score": score["mean"], "std": score["std"], "note": photo.note}
        return {**row, **said, "aspects": json.dumps(answer["aspects"])}


# What is written -----------------------------------------------------------------------------------------------------


def set_cut_files_aside(folder: Path):
    """What a run that was killed wrote half is no Parquet; its photographs are captioned again."""
    for file in sorted(folder.glob("*.parquet")):
        try:
            pq.read_metadata(file)
        except pa.ArrowInvalid:
            file.rename(file.with_suffix(".cut"))
            print(f"{file}: cut short by the end of a run, renamed to {file.stem}.cut", file=sys.stderr)


def written(folder: Path) -> pa.Table:
    """Path, error and model of all rows."""
    columns = ["path", "error", "model"]
    files = sorted(folder.glob("*.parquet"))
    tables = [pq.ParquetFile(file).read(columns) for file in files]
    return pa.concat_tables([pa.schema([ROWS.field(name) for name in columns]).empty_table(), *tables])


def check_model(rows: pa.Table, model: str, folder: Path):
    others = set(rows["model"].to_pylist()) - {model}
    if others:
        raise CannotStart(f"{folder} has captions by {others.pop()}, not {model}: choose another --out.")


def left_to_do(files: list[Path], rows: pa.Table, retry: bool) -> list[str]:
    """The paths that have no row, or, to be tried again, none without an error."""
    done = {row["path"] for row in rows.to_pylist() if not (retry and row["error"])}
    return [path for path in map(os.path.abspath, files) if path not in done]


# Run -----------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A run that ended before its end, and why."""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="+", type=Path, metavar="PHOTOS", help="photographs and folders of them")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the Parquet files go")
    add_model_arguments(parser, "cores of one model")
    parser.add_argument(
        "--address", help="the Ray cluster; auto: the one that runs here (default: this machine alone)"
    )
    parser.add_argument(
        "--workers", type=int, help="models at work (default: one a graphics card, else one a core but one)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="photographs at a time (default: %(default)s)")
    parser.add_argument("--block", type=int, default=64, help="photographs of one Parquet file (default: %(default)s)")
    parser.add_argument("--retry", action="store_true", help="try those again that have an error; their old rows stay")
    parser.add_argument("--max-new-tokens", type=int, default=160, help="longest critique (default: %(default)s)")
    parser.add_argument("--max-megapixels", type=float, help="refuse larger photographs (default: Pillow's limit, 89)")
    args = parser.parse_args(argv)
    for path in args.photos:
        if not os.path.lexists(path):
            parser.error(f"there is no file or folder {path}")
    refuse_below_zero(parser, args, "workers", "batch_size", "block", "max_new_tokens", "max_megapixels", "threads")
    if os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # workers run in folders of their own
    return args


def workers_of(asked: int | None) -> tuple[int, int]:
    """How many workers, and the graphics cards of each."""
    has = ray.cluster_resources()
    cores, cards = int(has.get("CPU", 0)), int(has.get("GPU", 0))
    workers = asked or cards or max(1, cores - 1)
    # NOTE: a core must be left for Ray's own work (cutting blocks, writing): without one it waits for ever
    if workers + 1 > cores:
        raise CannotStart(f"{workers} workers need {workers + 1} cores, and there are {cores}: fewer --workers.")
    if cards and workers > cards:
        raise CannotStart(f"{workers} workers need a graphics card each, and there are {cards}: fewer --workers.")
    return workers, 1 if cards else 0


def caption(paths: list[str], args: argparse.Namespace):
    workers, cards = workers_of(args.workers)
    print(f"{len(paths)} photographs, {workers} workers", flush=True)
    ray.data.DataContext.get_current().enable_progress_bars = sys.stderr.isatty()
    # NOTE: never `max_errored_blocks`: it leaves rows out without a word. Errors are a column, and what is none ends the
    # run. Without the blocks a run that is killed would have written nothing
    warnings.filterwarnings("ignore", message=".*ray_remote_args_fn.*")  # there is no other way to say how often
    rows = ray.data.from_arrow(pa.table({"path": pa.array(paths, pa.string())}))
    rows = rows.repartition(target_num_rows_per_block=args.block)
    rows = rows.map_batches(
        Captioner,
        fn_constructor_args=(args,),
        compute=ray.data.ActorPoolStrategy(size=workers),
        batch_size=args.batch_size,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=cards,
        ray_remote_args_fn=lambda: {"max_task_retries": 3},  # a file that kills its reader would do so for ever
    )
    try:
        rows.write_parquet(str(args.out), mode="append")
    except Exception as error:  # Ray raises nearly anything
        raise Stopped(str(error).strip() or type(error).__name__) from error


def run(args: argparse.Namespace) -> int:
    if ray is None:
        raise CannotStart("Ray is not installed: pip install -e '.[ray]'")
    found = find_photos(args.photos)
    if found.left_out:
        print(describe(found.left_out))
    for failure in found.failures:
        print(f"{failure.path}: {failure.reason}", file=sys.stderr)
    files = [file for file in found.files if is_text(file)]
    if not files:
        raise CannotStart("No photographs found.")
    set_cut_files_aside(args.out)
    before = written(args.out)
    check_model(before, args.model, args.out)
    paths = left_to_do(files, before, args.retry)
    print(f"{len(files) - len(paths)} of {len(files)} photographs are in {args.out} already")
    if paths:
        ase_config(args.model, args.trust_remote_code)  # what is no ASE model is seen before a cluster is at work
        start_ray(args.address)
        caption(paths, args)
    after = written(args.out)
    if left_to_do([Path(path) for path in paths], after, retry=False) or len(after) != len(before) + len(paths):
        raise Stopped(f"{len(paths)} photographs became {len(after) - len(before)} rows.")
    failed = after["error"].drop_null().length() - before["error"].drop_null().length()
    print(f"{len(paths) - failed} captioned, {failed} failed (the column `error` says why)")
    return 1 if failed or found.failures or len(files) < len(found.files) else 0


def is_text(file: Path) -> bool:
    """Whether a table can hold the name; said, where it cannot."""
    try:
        str(file).encode()
    except UnicodeEncodeError:
        print(f"{file}: its name is no valid text, rename it", file=sys.stderr)
        return False
    return True


def start_ray(address: str | None):
    options = (
        {"address": address} if address else {"num_cpus": max(2, os.cpu_count() or 2), "include_dashboard": False}
    )
    ray.init(**options, log_to_driver=False, logging_level="error")


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        with FileLock(args.out / ".lock", timeout=0):
            return run(args)
    except Timeout:
        print(f"Cannot start: another run is at work in {args.out}.", file=sys.stderr)
        return 2
    except (CannotStart, OSError, ValueError) as error:
        print(f"Cannot start: {error}", file=sys.stderr)
        return 2
    except Stopped as error:
        print(f"Stopped: {error}\nWhat was written is whole: the same command goes on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was written is whole: the same command goes on.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
