"""
Groups the bursts in a library of `caption_photos.py`, and says which photograph of each is the best, and why.

    python examples/best_of_burst.py captions
    python examples/best_of_burst.py captions --list keepers.txt

A burst is what looks the same (by a perceptual hash) and was taken within seconds. Within it sharpness decides first:
what is clearly less sharp than the sharpest comes after it, among the others the model's score decides. The score alone
would often choose wrongly, it is made to tell good photographs from bad ones, not frames of one moment.

What belongs together stays whole: brackets of exposures (by EXIF, or by brightness where it says nothing), focus stacks
(sharp in different places), panoramas (the view moves on). A raw file and its JPEG are one photograph, copies are too.

What is not known: whose eyes are shut, who smiles, and whether the sharp place is the right one. A retouched copy under
another name is taken for one more frame. Photographs whose time of taking is not told are not grouped.

Nothing is ever moved, deleted or changed. The list (`--list`, a new file, one path a line) holds every photograph but the
outdone ones of bursts.

Exit status: 0 all was grouped, 1 some photographs could not be read (named on stderr; theirs are kept whole), 2 nothing
could be started.
"""

import argparse
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from burst_frames import Look, look_at, same_size, sharpness_of, why_whole
from library_file import NEWEST, LibraryError, printing, read_row, reading
from photo_files import RAW_SUFFIXES


ALIKE = 14  # of 64 bits, at most; other photographs differ in about 32
SOFT = 0.8  # of the sharpest frame's sharpness; below, the score does not count any more
BITS = np.array([number.bit_count() for number in range(256)], np.uint8)


@dataclass
class Frame:
    """A photograph, in one file or several; sharpness is a share of the sharpest of its group, where it is known."""

    paths: list[str]
    sha256: str
    score: float
    phash: str
    taken: datetime | None
    sharpness: float | None = None


@dataclass
class Group:
    """
    Frames that look the same, in the order of time, the best of a burst first; `whole` says why all are kept.

    `neighbours` are the photographs just before and just after, where they were taken within the window too.
    """

    frames: list[Frame]
    neighbours: tuple[Frame | None, Frame | None] = (None, None)
    whole: str | None = None


@dataclass
class Found:
    """Groups of at least two, all other photographs, and how many of these could not be grouped for which reason."""

    groups: list[Group] = field(default_factory=list)
    alone: list[Frame] = field(default_factory=list)
    without_time: int = 0
    without_hash: int = 0


# Grouping ------------------------------------------------------------------------------------------------------------


def read_frames(database: sqlite3.Connection) -> list[Frame]:
    """The photographs of a library in the order of time, each once."""
    frames: list[Frame] = []
    known: dict[str, Frame] = {}
    rows = [read_row(row) for row in database.execute(NEWEST, {"run": 0})]
    # what a raw file shows depends on who develops it: its JPEG goes first
    for row in sorted(rows, key=lambda row: Path(row["path"]).suffix.lower() in RAW_SUFFIXES):
        taken = datetime.fromisoformat(row["taken_at"]) if row["taken_at"] else None
        frame = Frame([row["path"]], row["sha256"], row["score"], row["phash"] or "", taken)
        keys = (row["sha256"], os.path.splitext(row["path"])[0])
        other = next((known[key] for key in keys if key in known), None)
        if other is not None and (other.sha256 == frame.sha256 or is_same_shot(other, frame)):
            other.paths += frame.paths
            other.taken = other.taken or frame.taken
        else:
            frames.append(frame)
            other = frame
        for key in keys:
            known.setdefault(key, other)
    return sorted(frames, key=lambda frame: (frame.taken or datetime.min, frame.paths))


def is_same_shot(first: Frame, second: Frame) -> bool:
    """Of two files of one name; that of a raw file often does not tell its time."""
    if not (first.phash and second.phash) or (first.taken and second.taken and first.taken != second.taken):
        return False
    return distances(bits_of([first]), bits_of([second])).max() <= ALIKE


def bits_of(frames: list[Frame]) -> np.ndarray:
    """Perceptual hashes in bytes, `(n, 8)`."""
    return np.frombuffer(bytes.fromhex("".join(frame.phash for frame in frames)), np.uint8).reshape(-1, 8)


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """In how many of 64 bits the hash `(1, 8)` differs from each of `(n, 8)`."""
    return BITS[one ^ others].sum(1)


def find_groups(frames: list[Frame], window: float) -> Found:
    """
    Groups frames, given in the order of time, that are alike and at most `window` seconds apart, one from the next.

    Frames in one group need not all be alike: light changes and people move while a shutter is held down.
    """
    found = Found()
    timed = [frame for frame in frames if frame.taken and frame.phash]
    found.alone = [frame for frame in frames if not (frame.taken and frame.phash)]
    found.without_time = sum(frame.taken is None for frame in frames)
    found.without_hash = len(found.alone) - found.without_time
    if not timed:
        return found
    seconds = np.array([(frame.taken - datetime(1970, 1, 1)).total_seconds() for frame in timed])
    ends = np.searchsorted(seconds, seconds + window, side="right")
    bits, leaders = bits_of(timed), list(range(len(timed)))

    def leader(number: int) -> int:
        while leaders[number] != number:
            leaders[number] = leaders[leaders[number]]
            number = leaders[number]
        return number

    for number, end in enumerate(ends):
        for offset in np.flatnonzero(distances(bits[number : number + 1], bits[number + 1 : end]) <= ALIKE):
            first, second = sorted((leader(number), leader(number + 1 + int(offset))))
            leaders[second] = first
    members: dict[int, list[int]] = {}
    for number in range(len(timed)):
        members.setdefault(leader(number), []).append(number)
    for numbers in members.values():
        first, last = numbers[0], numbers[-1]
        if first == last:
            found.alone.append(timed[first])
            continue
        before = timed[first - 1] if first and seconds[first] - seconds[first - 1] <= window else None
        after = timed[last + 1] if last + 1 < ends[last] else None
        found.groups.append(Group([timed[number] for number in numbers], (before, after)))
    return found


# Choosing ------------------------------------------------------------------------------------------------------------


def judge(group: Group) -> list[str]:
    """Says of a group why it stays whole, or puts its best frame first; returns what was wrong with its files."""
    looks = [look_at(Path(frame.paths[0])) for frame in group.frames]
    problems = [f"{look.path}: {look.reason}" for look in looks if not isinstance(look, Look)]
    if problems:
        group.whole = f"{len(problems)} of them cannot be read"
        return problems
    for frame, sharpness in zip(group.frames, sharpness_of(same_size(looks)), strict=True):
        frame.sharpness = sharpness

    def before_and_after() -> list[Look | None]:
        seen = [neighbour and look_at(Path(neighbour.paths[0])) for neighbour in group.neighbours]
        return [look if isinstance(look, Look) else None for look in seen]

    group.whole = why_whole(looks, before_and_after)
    if group.whole is None:
        group.frames.sort(key=rank)
    return []


def rank(frame: Frame) -> tuple:
    """The sharp ones by score, then the others by sharpness."""
    soft = frame.sharpness < SOFT
    return soft, -frame.sharpness if soft else -frame.score, frame.paths


def reason_of(frame: Frame, best: Frame) -> str:
    if frame is best:
        return "best"
    return "less sharp" if frame.sharpness < SOFT else "as sharp, lower score"


# Output --------------------------------------------------------------------------------------------------------------


def records(groups: list[Group]) -> Iterator[dict[str, Any]]:
    """A group each: `kept` tells frames to keep from those that others outdo."""
    for group in groups:
        frames = []
        for frame in group.frames:
            reason = None if group.whole else reason_of(frame, group.frames[0])
            frames.append(
                {
                    "paths": frame.paths,
                    "kept": reason in (None, "best"),
                    "reason": reason,
                    "score": round(frame.score, 3),
                    "sharpness": None if frame.sharpness is None else round(frame.sharpness, 3),
                    "taken_at": frame.taken.isoformat(),
                }
            )
        yield {"kind": "set" if group.whole else "burst", "whole": group.whole, "frames": frames}


def lines_of(number: int, record: dict[str, Any]) -> Iterator[str]:
    frames, why = record["frames"], record["whole"]
    times = sorted(frame["taken_at"].replace("T", " ") for frame in frames)
    yield f"{number}. {len(frames)} photographs from {times[0]} on" + (f", kept whole: {why}" if why else "")
    for frame in frames:
        sharpness = "" if frame["sharpness"] is None else f", sharpness {frame['sharpness']:.0%}"
        reason = f" ({frame['reason']})" if frame["reason"] else ""
        yield f"  {'*' if frame['kept'] else ' '} {frame['paths'][0]}  score {frame['score']:.1f}{sharpness}{reason}"
        yield from (f"      with {path}" for path in frame["paths"][1:])


def write_list(path: Path, found: Found) -> list[str]:
    """Every photograph but the outdone ones, one path a line; returns what was wrong with names."""
    kept = [frame for group in found.groups for frame in (group.frames if group.whole else group.frames[:1])]
    paths = sorted(path for frame in (*kept, *found.alone) for path in frame.paths)
    with open(path, "xb") as file:  # never over what is there
        file.writelines(os.fsencode(one) + b"\n" for one in paths if "\n" not in one)
    return [f"{one!r}: not in the list, its name is of several lines" for one in paths if "\n" in one]


def report(found: Found, as_json: bool) -> None:
    all_records = list(records(found.groups))
    for number, record in enumerate(all_records, 1):
        print(json.dumps(record) if as_json else "\n".join(lines_of(number, record)))
    if as_json:
        return
    outdone = sum(not frame["kept"] for record in all_records for frame in record["frames"])
    sets = sum(record["kind"] == "set" for record in all_records)
    print(
        f"Bursts: {len(all_records) - sets}, {outdone} photographs in them are outdone. Sets kept whole: {sets}. "
        f"Photographs alone: {len(found.alone)}."
    )
    if found.without_time:
        print(f"{found.without_time} of these tell no time of taking, and were not grouped.")
    if found.without_hash:
        print(f"{found.without_hash} lack a perceptual hash: run their caption_photos.py once more, captions stay.")


# Run -----------------------------------------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path, metavar="LIBRARY", help="the folder that caption_photos.py wrote to")
    parser.add_argument(
        "--window", type=float, default=10, metavar="SECONDS", help="from one frame to the next (default: %(default)s)"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="also write what to keep, one path a line")
    parser.add_argument("--json", action="store_true", help="print a line of JSON a group")
    args = parser.parse_args(argv)
    args.library = args.library.expanduser()
    if not 0 < args.window < float("inf"):
        parser.error(f"--window is {args.window:g}, it must be a number above 0")
    if args.list is not None:
        args.list = args.list.expanduser()
        if os.path.lexists(args.list):
            parser.error(f"{args.list} is there already: name a new file")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        with reading(args.library) as database:
            found = find_groups(read_frames(database), args.window)
        problems = [problem for group in found.groups for problem in judge(group)]
        if args.list is not None:
            problems += write_list(args.list, found)
        with printing():
            report(found, args.json)
    except (LibraryError, OSError) as error:
        print(f"Cannot be done: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
