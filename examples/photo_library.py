"""
What was said about which photograph, in one SQLite file that survives whatever ends a run.

    file      where photographs lie: path, size, time of change, SHA-256 of the content; and why one could not be judged
    result    what a run said about a content; a moved or renamed photograph keeps its results. Beside the words the
              pooled features of the model's image encoder (embedding) and a perceptual hash (phash), to find what is alike
    run       what results depend on: weights, prompt, reader, settings of generation
    words     full-text search (FTS5) over the captions: SELECT rowid FROM words WHERE words MATCH 'soft light'
    made      every state of the exported files as this program left it, so that others' are known
    weights   hashes of large files, so that they are read once

Any SQLite program can read it, also while a run is at work. All that is found out about a batch of photographs is written
in one transaction: after `kill -9` or a power cut at most one batch is done again.
"""

import contextlib
import hashlib
import json
import os
import socket
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from filelock import FileLock, Timeout
from library_file import APPLICATION, NAME, NEWEST, SCHEMA, UPGRADES, VERSION, LibraryError, as_key, read_row
from photo_files import RESULT_FOLDERS, Failure, Judged, Photo, hash_of


LOCK = "library.lock"
EXPORTS = ("captions.jsonl", "failed.jsonl", "gallery.html", "gallery/index.js")


@contextlib.contextmanager
def written_beside(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of `path` at the end; after an error `path` is as it was."""
    beside = path.with_name(f".{path.name}.part")
    beside.unlink(missing_ok=True)  # of a run that was killed; a link goes itself, never what it points to
    os.close(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


class Library:
    """
    The state of an output folder, for one run at a time. Use it as a context.

    Args:
        folder: The output folder; made if it is not there.
        command: What this run was started with, to name it to another that comes too early.

    Raises:
        LibraryError: if another run is at work there, or something there is not this program's.
    """

    def __init__(self, folder: Path, command: str):
        self.folder, self.run = folder, 0
        with contextlib.ExitStack() as opened:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._refuse_links()
                opened.callback(self._lock().release)
                self.database = opened.enter_context(contextlib.closing(self._connect()))
                self._begin(command)
            except sqlite3.DatabaseError as error:
                raise LibraryError(
                    f"{folder / NAME} cannot be used: {error}. Choose another --out, or move it away."
                ) from error
            self._opened = opened.pop_all()

    def __enter__(self) -> "Library":
        return self

    def __exit__(self, *exception: object):
        self._opened.close()

    # Opening ---------------------------------------------------------------------------------------------------------

    def _refuse_links(self):
        """What is written through a link may be somebody's photograph."""
        for name in (NAME, f"{NAME}-wal", f"{NAME}-shm", LOCK, *RESULT_FOLDERS, "gallery/thumbs"):
            if (self.folder / name).is_symlink():
                raise LibraryError(f"{self.folder / name} is a link: take it away, or choose another --out.")

    def _lock(self) -> FileLock:
        lock = FileLock(self.folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise LibraryError(f"Another run is at work in {self.folder}{self._holder()}. Wait for its end.") from None
        return lock

    def _holder(self) -> str:
        try:
            with contextlib.closing(
                sqlite3.connect(f"{(self.folder / NAME).absolute().as_uri()}?mode=ro", uri=True)
            ) as other:
                process, host, began, command = other.execute(
                    "SELECT process, host, began, command FROM holder"
                ).fetchone()
        except (sqlite3.Error, TypeError):
            return ""  # it has only just begun
        return f": process {process} on {host}, since {began}: {command}"

    def _connect(self) -> sqlite3.Connection:
        path = self.folder / NAME
        foreign = [name for name in (*EXPORTS, *RESULT_FOLDERS) if os.path.lexists(self.folder / name)]
        if foreign and not (path.is_file() and path.stat().st_size):
            raise LibraryError(
                f"{self.folder} holds {foreign[0]} but no {NAME}: it is from elsewhere or of an earlier version. "
                "Move it away, or choose another --out."
            )
        database = sqlite3.connect(path, timeout=30, isolation_level=None)
        database.row_factory = sqlite3.Row
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        return database

    def _begin(self, command: str):
        application, version, tables = (
            self.database.execute(question).fetchone()[0]
            for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if not tables:
            self.database.executescript(SCHEMA)
        elif application != APPLICATION:
            raise LibraryError(f"{self.folder / NAME} is another program's. Choose another --out.")
        elif version in UPGRADES:
            self.database.executescript(UPGRADES[version])
        elif version != VERSION:
            raise LibraryError(
                f"{self.folder / NAME} is of form {version}, this program knows {VERSION}. Choose another --out."
            )
        for name in RESULT_FOLDERS:
            (self.folder / name).mkdir(exist_ok=True)
        began = f"{datetime.now():%Y-%m-%d %H:%M}"
        self.database.execute(
            "INSERT OR REPLACE INTO holder VALUES (1, ?, ?, ?, ?)", (os.getpid(), socket.gethostname(), began, command)
        )

    # What is known ---------------------------------------------------------------------------------------------------

    def begin_run(self, model: str, settings: dict[str, Any], fresh: bool = False) -> int:
        """Goes on with the last run of these settings, or begins one."""
        written = json.dumps({"model": model, **settings}, sort_keys=True)
        row = self.database.execute("SELECT max(id) FROM run WHERE settings = ?", (written,)).fetchone()
        self.run = row[0] or 0
        if fresh or not self.run:
            began = datetime.now().isoformat(timespec="seconds")
            self.run = self.database.execute(
                "INSERT INTO run(model, settings, began) VALUES (?, ?, ?)", (model, written, began)
            ).lastrowid
        return self.run

    def hash_of_files(self, paths: Iterable[Path]) -> str:
        """One hash over the contents of files, each read once as long as it stays as it is."""
        digest = hashlib.sha256()
        for path in sorted(paths):
            status = path.stat()
            stamp = (str(path.resolve()), status.st_size, status.st_mtime_ns)
            row = self.database.execute(
                "SELECT sha256 FROM weights WHERE (path, size, mtime_ns) = (?, ?, ?)", stamp
            ).fetchone()
            known = row[0] if row else hash_of(path)
            if not row:
                self.database.execute("INSERT OR REPLACE INTO weights VALUES (?, ?, ?, ?)", (*stamp, known))
            digest.update(f"{path.name} {known}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def is_unchanged(self, path: Path) -> bool:
        """Whether this run has all results of the file as it is now, by its size and time of change."""
        try:
            status = path.stat()
        except OSError:
            return False
        found = self.database.execute(
            "SELECT 1 FROM file JOIN result USING (sha256) WHERE path = ? AND size = ? AND mtime_ns = ? "
            "AND run = ? AND file.error IS NULL AND result.error IS NULL AND phash IS NOT NULL",
            (as_key(path), status.st_size, status.st_mtime_ns, self.run),
        )
        return found.fetchone() is not None

    def judged(self) -> set[str]:
        """Hashes of the contents that this run has all results of."""
        return self._contents("error IS NULL AND phash IS NOT NULL")

    def without_features(self) -> set[str]:
        """Hashes of the contents that this run has captions of and no features: of an earlier form of the library."""
        return self._contents("error IS NULL AND phash IS NULL")

    def _contents(self, condition: str) -> set[str]:
        rows = self.database.execute(f"SELECT sha256 FROM result WHERE run = ? AND {condition}", (self.run,))
        return {row[0] for row in rows}

    # Writing ---------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.database.execute("COMMIT")
        except BaseException:
            if self.database.in_transaction:
                self.database.execute("ROLLBACK")
            raise

    def add(
        self,
        files: list[Photo | Judged | Failure],
        results: Iterable[dict[str, Any]] = (),
        features: Iterable[dict[str, Any]] = (),
    ):
        """All that was found out about a batch, or nothing of it; `features` are those of results that are there."""
        rows = []
        for file in files:
            if isinstance(file, Failure):
                rows.append((as_key(file.path), None, None, None, None, file.reason))
            else:
                stamp, taken_at = file.stamp, file.taken_at if isinstance(file, Photo) else None
                rows.append((as_key(file.path), stamp.size, stamp.mtime_ns, stamp.sha256, taken_at, None))
        with self._transaction():
            for row in rows:
                # a moved file was not read again: when it was taken is known from where it lay
                self.database.execute(
                    "INSERT OR REPLACE INTO file SELECT ?1, ?2, ?3, ?4, coalesce("
                    "?5, (SELECT taken_at FROM file WHERE sha256 = ?4 AND taken_at IS NOT NULL)), ?6",
                    row,
                )
            for result in results:
                self.database.execute("DELETE FROM result WHERE sha256 = ? AND run = ?", (result["sha256"], self.run))
                columns = {"run": self.run, **result}
                self.database.execute(
                    f"INSERT INTO result({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})",
                    list(columns.values()),
                )
            for row in features:
                self.database.execute(
                    "UPDATE result SET embedding = :embedding, phash = :phash WHERE sha256 = :sha256 AND run = :run",
                    {"run": self.run, **row},
                )

    def forget_missing(self, arguments: list[Path], found: Iterable[Path]) -> int:
        """
        Forgets where files lay that are gone from the folders of this run, and what was wrong with them; returns their
        number. Results stay: a file that comes back, here or elsewhere, is known by its content.
        """
        present = {as_key(path) for path in found}
        roots = [os.path.abspath(argument) for argument in arguments]
        gone = []
        for key, error in self.database.execute("SELECT path, error FROM file"):
            path = os.fsdecode(key)
            if key in present or not any(path == root or path.startswith(os.path.join(root, "")) for root in roots):
                continue
            try:
                os.lstat(path)
                missing = error is not None  # of no interest any more, or found out again
            except (FileNotFoundError, NotADirectoryError):
                missing = True
            except OSError:  # a folder that cannot be read just now
                missing = False
            if missing:
                gone.append((key,))
        with self._transaction():
            self.database.executemany("DELETE FROM file WHERE path = ?", gone)
        return len(gone)

    # Exports ---------------------------------------------------------------------------------------------------------

    def results(self) -> Iterator[dict[str, Any]]:
        """Of each file that lies somewhere its newest result, one by one, by path."""
        for row in self.database.execute(NEWEST, {"run": self.run}):
            yield read_row(row)

    def failures(self) -> Iterator[Failure]:
        """Files that could not be captioned, by reading or by the model, by path."""
        rows = self.database.execute(
            "SELECT path, coalesce(file.error, result.error) FROM file LEFT JOIN result "
            "ON result.sha256 = file.sha256 AND run = ? WHERE coalesce(file.error, result.error) IS NOT NULL "
            "ORDER BY path",
            (self.run,),
        )
        for path, reason in rows:
            yield Failure(Path(os.fsdecode(path)), reason)

    def publish(self, name: str, write: Callable[[TextIO], None]) -> Path | None:
        """
        Writes an exported file anew, whole or not at all; returns where somebody else's of this name went.

        What is there and was not left so by this program (edited, say, or put there) is moved aside, never overwritten.
        """
        path, aside = self.folder / name, None
        with written_beside(path) as beside:
            # file names need not be valid text
            with open(beside, "w", encoding="utf-8", errors="replace", newline="\n") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            if os.path.lexists(path) and not self._made(name, path):
                aside = free_name(path)
                path.rename(aside)
            status = beside.stat()  # a new name keeps size and time of change
            self.database.execute(
                "INSERT OR REPLACE INTO made VALUES (?, ?, ?)", (name, status.st_size, status.st_mtime_ns)
            )
        return aside

    def _made(self, name: str, path: Path) -> bool:
        status = path.lstat()
        row = self.database.execute(
            "SELECT 1 FROM made WHERE (name, size, mtime_ns) = (?, ?, ?)", (name, status.st_size, status.st_mtime_ns)
        )
        return row.fetchone() is not None


def free_name(path: Path) -> Path:
    """`captions.kept-1.jsonl` for `captions.jsonl`, or the next number that is free."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.stem}.kept-{number}{path.suffix}")):
        number += 1
    return aside
