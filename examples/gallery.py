"""
The page to leaf through: `gallery.html`, an index of all photographs beside it, thumbnails as files.

The page holds no photograph itself: it reads `gallery/index.js`, filters, sorts and searches in it, and shows 200
photographs at a time. It opens from disk without a server, and asks nothing of any network.
"""

import json
import os
import re
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import jinja2
from library_file import CERTAIN
from photo_files import Failure
from photo_library import Library


PAGE = 200  # photographs at a time
LISTED = 1000  # failures that are named on the page; failed.jsonl names all


def stars_of(score: float) -> float:
    """A score of 1 to 10 in half stars."""
    return round(score) / 2


def write_captions(library: Library, file: TextIO) -> None:
    """captions.jsonl: one line a photograph."""
    for row in library.results():
        record = {
            "path": row["path"],
            "caption": row["caption"],
            "score": {"mean": round(row["score"], 3), "std": round(row["std"], 3)},
            "stars": stars_of(row["score"]),
            "aspects": {name: round(share, 3) for name, share in row["aspects"].items()},
            "width": row["width"],
            "height": row["height"],
            "overlay": row["overlay"],
            "model": row["model"],
        }
        optional = {name: row[name] for name in ("taken_at", "note") if row[name]}
        file.write(json.dumps(record | optional) + "\n")


def write_failures(library: Library, file: TextIO) -> None:
    """failed.jsonl: one line a file that could not be captioned."""
    for failure in library.failures():
        file.write(json.dumps({"path": str(failure.path), "reason": failure.reason}) + "\n")


def write_index(rows: Iterable[list[Any]], file: TextIO) -> None:
    """gallery/index.js: a script, since pages from disk may read no other files."""
    # NOTE: JSON in ASCII is JavaScript too, whatever the captions say
    file.write("const photographs = [\n")
    for row in rows:
        file.write(json.dumps(row, separators=(",", ":")) + ",\n")
    file.write("];\n")


def common_folder(library: Library) -> str:
    """The folder that all photographs of the page lie in, however deep; "" where there are none."""
    folders = {os.path.dirname(row["path"]) for row in library.results()}
    return os.path.commonpath(folders) if folders else ""


def title_of(folder: str) -> str:
    """The name of the folder that all photographs of the page are from, whichever run added them."""
    return re.sub(r"[_-]+", " ", os.path.basename(folder)).strip() or "Photographs"


def index_rows(library: Library, folder: str) -> Iterator[list[Any]]:
    """
    A photograph a row: name below the folder of all, address, caption, mean to sort by and as it is shown, spread,
    stars, aspects named, width, height, thumbnail, overlay, time taken, note.
    """
    for row in library.results():
        aspects = sorted(row["aspects"], key=row["aspects"].get, reverse=True)
        yield [
            os.path.relpath(row["path"], folder),
            address(row["path"], library.folder),
            row["caption"],
            row["score"],
            round(row["score"], 1),  # once: what was rounded before comes out as another number
            round(row["std"], 1),
            stars_of(row["score"]),
            [name.replace("_", " ") for name in aspects if row["aspects"][name] >= CERTAIN],
            row["width"],
            row["height"],
            row["thumbnail"],
            urllib.parse.quote(row["overlay"]),
            row["taken_at"],
            row["note"],
        ]


def address(path: str, folder: Path) -> str:
    """A link from a page in `folder`, relative as long as both are on one drive: they may be moved together."""
    try:
        relative = os.path.relpath(path, folder.absolute())
    except ValueError:  # on another drive of Windows
        return Path(path).as_uri()
    return urllib.parse.quote(os.fsencode(relative.replace(os.sep, "/")))


def write_page(file: TextIO, **context: Any) -> None:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    file.writelines(environment.get_template("gallery.html.jinja").stream(page=PAGE, **context))


def export(library: Library, left_out: Counter, date: str) -> tuple[Path, list[Path]]:
    """Writes captions.jsonl, failed.jsonl and the page anew; returns the page, and what was moved aside for them."""
    models, count, folder = [], 0, common_folder(library)
    for row in library.results():
        count += 1
        if row["model"] not in models:
            models.append(row["model"])
    failures: Iterator[Failure] = library.failures()
    listed = list(islice(failures, LISTED))
    context = {
        "title": title_of(folder),
        "models": models,
        "date": date,
        "count": count,
        "failures": listed,
        "failure_count": len(listed) + sum(1 for _ in failures),
        "left_out": sorted(left_out.items()),
    }
    aside = [
        library.publish("captions.jsonl", lambda file: write_captions(library, file)),
        library.publish("failed.jsonl", lambda file: write_failures(library, file)),
        library.publish("gallery/index.js", lambda file: write_index(index_rows(library, folder), file)),
        library.publish("gallery.html", lambda file: write_page(file, **context)),
    ]
    return library.folder / "gallery.html", [path for path in aside if path is not None]
