"""
Finds photographs again in a library of `caption_photos.py`: by words, aspects, score, and likeness to another.

    python examples/search_photos.py captions complementary colours --min-score 8
    python examples/search_photos.py captions animal -blurred
    python examples/search_photos.py captions --aspect underexposed --like holiday/beach.jpg

Words are looked for in the critiques; all of them must occur, in any order. `'"soft light"'`, in double quotes within those
of the shell, is found in this order alone, `'shadow*'` is every word that begins so, what `-blurred` names must not occur.
Capitals and accents do not matter. What is asked for in several ways must hold in all of them.

The first is the most alike with --like, else the one with the clearest aspect with --aspect, else those that have the words
in the order that was typed and whom they fit best, else the one with the highest score. Likeness is what the model's image
encoder sees, above all subject, light and colour: 1 for the same, 0 for no more than any two in this library. The
photograph that it is compared with must be in the library, here or under another name; it is not listed itself.

The library is only read, also while photographs are being captioned.

Exit status: 0 something was found, 1 nothing was, 2 it could not be searched.
"""

import argparse
import hashlib
import json
import re
import sqlite3
import sys
from pathlib import Path
from typing import Any

import numpy as np
from library_file import CERTAIN, NEWEST, LibraryError, as_key, printing, read_row, reading


# Words ---------------------------------------------------------------------------------------------------------------


def full_text_terms(text: str) -> tuple[list[str], list[str]]:
    """What somebody typed as terms of FTS5: those that must all occur, and those of which none may."""
    # NOTE: everything goes into quotes, where FTS5 has no operators: whatever is typed is no error of syntax
    text = text.encode(errors="replace").decode().replace("\0", " ")
    wanted, unwanted = [], []
    for minus, phrase, word in re.findall(r'(?<!\S)(-?)"([^"]*)"?|(\S+)', text):
        if not phrase and word.startswith("-"):
            minus, word = "-", word[1:]
        term = phrase or word
        if any(character.isalnum() for character in term):
            quoted = '"' + term.replace('"', '""') + '"' + ("*" if word.endswith("*") else "")
            (unwanted if minus else wanted).append(quoted)
    return wanted, unwanted


def rows_with(database: sqlite3.Connection, query: str) -> dict[int, float]:
    """Ids of the results whose captions have what is asked for, each with its rank: the lower, the better it fits."""
    return dict(map(tuple, database.execute("SELECT rowid, rank FROM words WHERE words MATCH ?", (query,))))


def fits_of(database: sqlite3.Connection, wanted: list[str]) -> dict[int, tuple[bool, float]]:
    """How well what has all terms fits, by its id: the lower the better, first what has them in the order typed."""
    phrase = " + ".join(term.removesuffix("*") for term in wanted)
    together = rows_with(database, phrase) if len(wanted) > 1 else {}
    fits = rows_with(database, " AND ".join(wanted))
    return {number: (number not in together, rank) for number, rank in fits.items()}


def missing_words(database: sqlite3.Connection, text: str) -> str:
    """Which of the words that must occur do so in no critique at all, in words; empty where each is in some."""
    missing = [term for term in full_text_terms(text)[0] if not rows_with(database, term)]
    return f"No critique in this library has {', '.join(missing)}." if missing else ""


# Likeness ------------------------------------------------------------------------------------------------------------


def comparable_runs(database: sqlite3.Connection, run: int) -> set[int]:
    """Runs of the same weights over the same reading of photographs: only their features mean the same."""
    settings = {row["id"]: json.loads(row["settings"]) for row in database.execute("SELECT id, settings FROM run")}
    kind = {number: (one.get("weights"), one.get("reader")) for number, one in settings.items()}
    return {number for number in kind if kind[number] == kind[run]}


def content_of(database: sqlite3.Connection, photo: Path) -> str | None:
    if photo.is_file():
        return hashlib.sha256(photo.read_bytes()).hexdigest()
    row = database.execute(
        "SELECT sha256 FROM file WHERE path = ?", (as_key(photo),)
    ).fetchone()  # on no drive just now
    return row and row["sha256"]


def likeness_to(database: sqlite3.Connection, photo: Path) -> dict[int, float]:
    """
    Cosine of the pooled image features of all results to a photograph's, about their mean, by the results' ids.

    Raises:
        LibraryError: if the photograph is not in the library, or has no features there.
    """
    content = content_of(database, photo)
    known = database.execute(
        "SELECT id, run, embedding FROM result WHERE sha256 = ? AND error IS NULL ORDER BY embedding IS NULL, id DESC",
        (content,),
    ).fetchone()
    if known is None:
        missing = "is not in this library: run caption_photos.py on it, into the same --out"
        raise LibraryError(f"{photo} {missing}." if content else f"{photo} is not there, and {missing}.")
    if known["embedding"] is None:
        raise LibraryError(
            f"{photo} has no image features in this library. Run the caption_photos.py that captioned it once more; where "
            "its model has none, likeness cannot be told."
        )
    runs = comparable_runs(database, known["run"])
    ids, blobs = [], []
    for row in database.execute("SELECT id, run, embedding FROM result WHERE embedding IS NOT NULL"):
        if row["run"] in runs:
            ids.append(row["id"])
            blobs.append(row["embedding"])
    features = np.frombuffer(b"".join(blobs), "<f2").reshape(len(ids), -1).astype(np.float32)
    features -= features.mean(0)  # what all photographs have in common is no likeness
    features /= np.linalg.norm(features, axis=1, keepdims=True).clip(1e-6)
    return dict(zip(ids, (features @ features[ids.index(known["id"])]).tolist()))


# Search --------------------------------------------------------------------------------------------------------------


def known_aspects(names: list[str], rows: list[dict[str, Any]]) -> list[str]:
    """The model's own names of what is asked for, which may be written with blanks or dashes."""
    known = sorted({name for row in rows for name in row["aspects"]})
    written = {re.sub(r"[^a-z0-9]+", "_", name.lower()): name for name in known}
    aspects = []
    for name in names:
        key = re.sub(r"[^a-z0-9]+", "_", name.lower())
        if key not in written:
            raise LibraryError(
                f"{name!r} is no aspect that this library's models tell. There are: {', '.join(known) or 'none'}."
            )
        aspects.append(written[key])
    return aspects


def search(database: sqlite3.Connection, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of what was found, the best first; `likeness` is among their columns where it was asked for."""
    rows = [read_row(row) for row in database.execute(NEWEST, {"run": 0})]
    aspects = known_aspects(args.aspect, rows)
    wanted, unwanted = full_text_terms(args.words)
    if args.words.strip() and not wanted and not unwanted:
        raise LibraryError(f"There is no word to look for in {args.words!r}.")
    fits = fits_of(database, wanted) if wanted else None
    left_out = rows_with(database, " OR ".join(unwanted)) if unwanted else {}
    rows = [
        row
        for row in rows
        if (fits is None or row["id"] in fits)
        and row["id"] not in left_out
        and args.min_score <= round(row["score"], 1) <= args.max_score  # the number that is shown
        and all(row["aspects"].get(name, 0) >= CERTAIN for name in aspects)
    ]
    if args.like is not None:
        likeness = likeness_to(database, args.like)
        others = [row for row in rows if as_key(row["path"]) != as_key(args.like)]
        rows = [{**row, "likeness": likeness[row["id"]]} for row in others if row["id"] in likeness]
        if len(rows) < len(others):
            print(f"{len(others) - len(rows)} left out: of another model, or without image features.", file=sys.stderr)

    def order(row: dict[str, Any]) -> tuple:
        fit = () if fits is None else fits[row["id"]]
        clearness = min((row["aspects"][name] for name in aspects), default=0)
        return -row.get("likeness", 0), -clearness, fit, -row["score"], row["path"]

    return sorted(rows, key=order)[: args.limit]


# Run -----------------------------------------------------------------------------------------------------------------


def line_of(row: dict[str, Any]) -> str:
    certain = {name: share for name, share in row["aspects"].items() if share >= CERTAIN}
    strongest = sorted(certain, key=certain.get, reverse=True)
    parts = [f"{row['score']:.1f} of 10", ", ".join(name.replace("_", " ") for name in strongest)]
    parts.insert(0, f"{row['likeness']:.2f} alike" if "likeness" in row else "")
    return "    " + " · ".join(part for part in (*parts, row["caption"]) if part)


def record_of(row: dict[str, Any]) -> dict[str, Any]:
    names = ("path", "likeness", "score", "std", "aspects", "caption", "taken_at", "model")
    return {name: row[name] for name in names if name in row}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    description, _, details = __doc__.strip().partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("library", type=Path, metavar="LIBRARY", help="the folder that caption_photos.py wrote to")
    parser.add_argument("words", nargs="*", metavar="WORDS", help="what the critique must say, -WORD what it must not")
    parser.add_argument(
        "--aspect",
        action="append",
        default=[],
        metavar="NAME",
        help="with this aspect, as the page names it: a fault, a style, a kind of subject; may be repeated",
    )
    parser.add_argument("--min-score", type=float, default=1, help="from this score on, of 1 to 10")
    parser.add_argument("--max-score", type=float, default=10, help="up to this score")
    parser.add_argument("--like", type=Path, metavar="PHOTO", help="the most alike first")
    parser.add_argument("--limit", type=int, help="only the first so many")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--paths", action="store_true", help="print paths alone")
    form.add_argument("--json", action="store_true", help="print a line of JSON a photograph")
    given = sys.argv[1:] if argv is None else argv
    unwanted = [one for one in given if re.match(r"-[^\W\d]{2}|-\"", one)]  # would be options to argparse, or -h
    args = parser.parse_intermixed_args([one for one in given if one not in unwanted])
    args.words = " ".join([*args.words, *unwanted])
    args.library = args.library.expanduser()
    args.like = args.like and args.like.expanduser()
    for name in ("min_score", "max_score"):
        if not 1 <= getattr(args, name) <= 10:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name):g}, scores are from 1 to 10")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}, it must be above 0")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        with reading(args.library) as database:
            found = search(database, args)
            missing = "" if found else missing_words(database, args.words)
    except (LibraryError, OSError) as error:
        print(f"Cannot search: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"Nothing was found. {missing}".rstrip(), file=sys.stderr)
        return 1
    with printing():
        for row in found:
            print(json.dumps(record_of(row)) if args.json else row["path"])
            if not args.json and not args.paths:
                print(line_of(row))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    sys.stderr.reconfigure(errors="backslashreplace")
    sys.exit(main())
