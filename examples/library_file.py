"""
The form of `library.sqlite`, and reading it: by any number of programs, also while a run writes.

Nothing heavy is imported here, so that a question is answered at once.
"""

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any


NAME = "library.sqlite"
APPLICATION, VERSION = 0x41534C42, 2  # marks of SQLite files: whose it is, and of which form

SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE run (
    id INTEGER PRIMARY KEY, model TEXT NOT NULL, settings TEXT NOT NULL, began TEXT NOT NULL
);
CREATE TABLE file (
    path PRIMARY KEY, -- text, or bytes where a file system allows what is no text
    size INTEGER, mtime_ns INTEGER, sha256 TEXT, taken_at TEXT, error TEXT
) WITHOUT ROWID;
CREATE INDEX file_of_content ON file(sha256);
CREATE TABLE result (
    id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, run INTEGER NOT NULL REFERENCES run(id),
    caption TEXT, score REAL, std REAL, aspects TEXT, width INTEGER, height INTEGER, note TEXT,
    overlay TEXT, thumbnail TEXT, error TEXT,
    embedding BLOB, -- float16, little-endian; NULL where the base has no image features
    phash TEXT, -- 64 bits in hexadecimal; NULL in what was captioned before there were any
    UNIQUE (sha256, run)
);
CREATE VIRTUAL TABLE words USING fts5(caption, content='result', content_rowid='id');
CREATE TRIGGER result_written AFTER INSERT ON result BEGIN
    INSERT INTO words(rowid, caption) VALUES (new.id, new.caption);
END;
CREATE TRIGGER result_deleted AFTER DELETE ON result BEGIN
    INSERT INTO words(words, rowid, caption) VALUES ('delete', old.id, old.caption);
END;
CREATE TABLE made (name TEXT, size INTEGER, mtime_ns INTEGER, PRIMARY KEY (name, size, mtime_ns)) WITHOUT ROWID;
CREATE TABLE weights (path TEXT PRIMARY KEY, size INTEGER, mtime_ns INTEGER, sha256 TEXT) WITHOUT ROWID;
CREATE TABLE holder (id INTEGER PRIMARY KEY CHECK (id = 1), process INTEGER, host TEXT, began TEXT, command TEXT);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
COMMIT;
"""
# What makes a library of the form before this one; the captions stay
UPGRADES = {
    1: """
BEGIN IMMEDIATE;
ALTER TABLE result ADD COLUMN embedding BLOB;
ALTER TABLE result ADD COLUMN phash TEXT;
PRAGMA user_version = 2;
COMMIT;
"""
}
CERTAIN = 0.5  # a photograph has an aspect from this probability on

# Of each file the newest result, those of the run that is asked for first. Embeddings are large, and asked for by id
NEWEST = """
SELECT file.path, file.taken_at, run.model, result.id, result.sha256, result.run, caption, score, std, aspects, width,
    height, note, overlay, thumbnail, phash
FROM file
JOIN result ON result.id = (
    SELECT id FROM result AS one WHERE one.sha256 = file.sha256 AND one.error IS NULL
    ORDER BY one.run = :run DESC, one.id DESC LIMIT 1
)
JOIN run ON run.id = result.run
WHERE file.error IS NULL ORDER BY file.path
"""


class LibraryError(Exception):
    """The library cannot be used; says why and what to do."""


def as_key(path: Path | str) -> str | bytes:
    """A path as it is stored: absolute, and bytes where it is no valid text."""
    absolute = os.path.abspath(path)
    try:
        absolute.encode()
    except UnicodeEncodeError:
        return os.fsencode(absolute)
    return absolute


def read_row(row: sqlite3.Row) -> dict[str, Any]:
    """A row of `NEWEST` with its path as Python has it and its aspects taken apart."""
    return {**row, "path": os.fsdecode(row["path"]), "aspects": json.loads(row["aspects"])}


@contextlib.contextmanager
def reading(library: Path) -> Iterator[sqlite3.Connection]:
    """
    A library to read from, for as long as the context lasts.

    Args:
        library: The folder that `caption_photos.py` wrote to, or its `library.sqlite`.

    Raises:
        LibraryError: if there is none, or it is of another form.
    """
    path = library / NAME if library.is_dir() else library
    if not path.is_file():
        raise LibraryError(f"There is no library {path}: python examples/caption_photos.py PHOTOS --out {library}")
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=30)
        ) as opened:
            opened.row_factory = sqlite3.Row
            marks = [opened.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")]
            if marks[0] != APPLICATION:
                raise LibraryError(f"{path} is no library of caption_photos.py.")
            if marks[1] != VERSION:
                raise LibraryError(f"{path} is of form {marks[1]}, this program reads {VERSION}. {remedy(marks[1])}")
            yield opened
    except sqlite3.DatabaseError as error:
        raise LibraryError(f"{path} cannot be read: {error}.") from error


def remedy(version: int) -> str:
    if version in UPGRADES:
        return "Run caption_photos.py into it once more: its captions stay, what they lack is added."
    return "Take a newer version of this program."


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """What prints in this context ends without a word when nobody reads any further, as of `| head`."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
