"""
Stars and words beside photographs, where other programs look for them: XMP sidecars, merged by exiftool.

A sidecar holds the work of other programs too: all that is theirs stays, an existing rating or description as well. Its
name is the one that is there, `photo.jpg.xmp` or else `photo.xmp`; a second one beside it would hide the first.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gallery import stars_of
from library_file import CERTAIN
from photo_files import Failure
from photo_library import written_beside


FORMS = (
    "photo.jpg.xmp",
    "photo.xmp",
)  # names of new sidecars; darktable and Immich write the first, Lightroom the second
ROOT = "Critique"  # aspects are tags below it
TOGETHER = 500  # sidecars an exiftool: it takes long to start, and little for each
DESCRIPTIONS = ("XMP-dc:Description", "XMP-tiff:ImageDescription")
RATING, SUBJECT = "XMP-xmp:Rating", "XMP-dc:Subject"
PACKET = "XMP:XMP"  # what exiftool says of all of it
# The two ways of keeping a tree of tags: the field, and what stands between the levels
TREES = {"XMP-digiKam:TagsList": "/", "XMP-lr:HierarchicalSubject": "|"}
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}RDF"


@dataclass
class Sidecars:
    """How many were written, how many said it all already, and which could not be written."""

    written: int = 0
    unchanged: int = 0
    problems: list[Failure] = field(default_factory=list)


class Refused(Exception):
    """A sidecar that is left as it is, and why."""


def write_sidecars(results: Iterable[dict[str, Any]], form: str = FORMS[0], overwrite: bool = False) -> Sidecars:
    """
    Writes captions, stars and aspects beside photographs.

    Args:
        results: Rows of `Library.results`.
        form: How a new sidecar is called, one of `FORMS`.
        overwrite: Also change a rating or description that is there, and take away tags of earlier critiques.
    """
    done, taken, rows = Sidecars(), {}, iter(results)
    while chunk := list(islice(rows, TOGETHER)):
        sidecars: dict[Path, dict[str, Any]] = {}
        for row in chunk:
            photo = Path(row["path"])
            try:
                sidecar = sidecar_of(photo, form)
                if (other := taken.setdefault(sidecar, photo)) != photo:
                    raise Refused(f"{sidecar.name} is {other.name}'s too, and speaks of that one")
                check(sidecar)
                sidecars[sidecar] = row
            except (Refused, OSError) as error:
                done.problems.append(Failure(photo, f"no sidecar: {error}"))
        there = {sidecar for sidecar in sidecars if sidecar.exists()}
        said = read([*there, *(Path(row["path"]) for sidecar, row in sidecars.items() if sidecar not in there)])
        for sidecar in there - said.keys():  # what it says is not known, so nothing may be changed
            photo = Path(sidecars.pop(sidecar)["path"])
            done.problems.append(Failure(photo, f"no sidecar: exiftool cannot read {sidecar.name}"))
        # a photograph may say such things itself, and programs that find a sidecar look no further
        photos = {sidecar: Path(row["path"]) for sidecar, row in sidecars.items() if sidecar not in there}
        sources = {sidecar: sidecar for sidecar in there & sidecars.keys()}
        sources |= {sidecar: photo for sidecar, photo in photos.items() if PACKET in said.get(photo, {})}
        changes = {
            sidecar: changes_of(row, said.get(sources.get(sidecar), {}), overwrite)
            for sidecar, row in sidecars.items()
        }
        wanted = {sidecar: arguments for sidecar, arguments in changes.items() if arguments}
        done.unchanged += len(changes) - len(wanted)
        for sidecar, problem in merge(wanted, sources).items():
            if problem is None:
                done.written += 1
            else:
                done.problems.append(Failure(Path(sidecars[sidecar]["path"]), f"no sidecar: {problem}"))
    return done


# Which file ----------------------------------------------------------------------------------------------------------


def sidecar_of(photo: Path, form: str) -> Path:
    """The sidecar that is there, in whatever case its name is, or the one to make."""
    names = {name.lower(): name for name in os.listdir(photo.parent) if name.lower().endswith(".xmp")}
    forms = {"photo.jpg.xmp": f"{photo.name}.xmp", "photo.xmp": f"{photo.stem}.xmp"}
    for name in forms.values():
        if name.lower() in names:
            return photo.parent / names[name.lower()]
    return photo.parent / forms[form]


def check(sidecar: Path) -> None:
    """Refuses what a merge could spoil: what is no whole XMP in UTF-8, and links."""
    if sidecar.is_symlink():
        raise Refused(f"{sidecar.name} is a link")
    if not str(sidecar).isprintable():  # exiftool takes its arguments by lines, and as text
        raise Refused(f"{str(sidecar)!r} has a line break or is no text")
    if not sidecar.exists():
        return
    content = sidecar.read_bytes()
    try:
        content.decode("utf-8-sig")
        root = ElementTree.fromstring(content)
    except (UnicodeDecodeError, ElementTree.ParseError, LookupError, ValueError) as error:
        raise Refused(f"{sidecar.name} is cut short or not UTF-8, it is left as it is ({error})") from error
    if b"\0" in content or (root.tag != RDF and root.find(RDF) is None):
        raise Refused(f"{sidecar.name} is no XMP, it is left as it is")


# What to write -------------------------------------------------------------------------------------------------------


def changes_of(row: dict[str, Any], present: dict[str, Any], overwrite: bool) -> list[str]:
    """Arguments of exiftool that add to a sidecar what it does not say yet."""
    changes = []
    caption = flat(row["caption"] or "")
    described = any(present.get(name) for name in DESCRIPTIONS)
    if caption and (overwrite or not described):
        # NOTE: without the language, exiftool may take the other ones away
        changes += [f"-{name}-x-default={caption}" for name in DESCRIPTIONS if present.get(name) != caption]
    rating = str(min(5, max(1, int(stars_of(row["score"]) + 0.5))))
    rated = present.get(RATING, "0") not in ("0", "")  # 0 is no rating, -1 is the user's "rejected"
    if (overwrite or not rated) and present.get(RATING) != rating:
        changes.append(f"-{RATING}={rating}")
    aspects = [flat(name.replace("_", " ")) for name, share in row["aspects"].items() if share >= CERTAIN]
    tags = {SUBJECT: listed(present.get(SUBJECT))}
    changes += [f"-{SUBJECT}+={name}" for name in aspects if name not in tags[SUBJECT]]
    for field_name, between in TREES.items():
        tree = listed(present.get(field_name))
        # a program that reads this field reads no other: it must know the user's tags as well
        seed = tree or seed_of(present, between)
        ours = [f"{ROOT}{between}{name}" for name in aspects]
        added = [tag for tag in dict.fromkeys([*seed, *ours]) if tag not in tree] if ours else []
        changes += [f"-{field_name}+={flat(tag)}" for tag in added]
        stale = [tag for tag in tree if tag.startswith(f"{ROOT}{between}") and tag not in ours] if overwrite else []
        changes += [f"-{field_name}-={tag}" for tag in stale]
        for leaf in (tag.partition(between)[2] for tag in stale):
            gone = f"-{SUBJECT}-={leaf}"
            if leaf in tags[SUBJECT] and leaf not in aspects and gone not in changes:
                changes.append(gone)
    return changes


def seed_of(present: dict[str, Any], between: str) -> list[str]:
    """The user's tags for a tree that is not there yet: of the other tree, else the flat ones."""
    for field_name, other in TREES.items():
        if other != between and (tree := listed(present.get(field_name))):
            return [tag.replace(other, between) for tag in tree]
    return listed(present.get(SUBJECT))


def listed(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [str(one) for one in value] if isinstance(value, list) else [value]


def flat(text: str) -> str:
    """On one line: exiftool takes its arguments by lines."""
    return " ".join(text.split())


# exiftool ------------------------------------------------------------------------------------------------------------


def exiftool(arguments: list[str | Path]) -> subprocess.CompletedProcess:
    """Runs exiftool on arguments of which none has a line break, by a file: no command line is long enough for all."""
    with tempfile.NamedTemporaryFile(suffix=".args", delete=False) as file:
        file.write(b"\n".join(os.fsencode(argument) for argument in arguments) + b"\n")
    try:
        command = ["exiftool", "-charset", "filename=UTF8", "-@", file.name]
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    finally:
        os.unlink(file.name)


def read(files: list[Path]) -> dict[Path, dict[str, Any]]:
    """What sidecars, or photographs, say in the fields that are written here, all as text."""
    if not files:
        return {}
    names = [f"-{name}" for name in ("XMP", *DESCRIPTIONS, RATING, SUBJECT, *TREES)]
    output = exiftool(["-json", "-G1", "-api", "struct=0", *names, *files]).stdout
    # NOTE: a tag such as 2024 or 1e5 is text, too
    rows = json.loads(output or "[]", parse_int=str, parse_float=str)
    return {Path(row["SourceFile"]): row for row in rows if "Error" not in row}


def merge(changes: dict[Path, list[str]], sources: dict[Path, Path]) -> dict[Path, str | None]:
    """
    Writes all sidecars anew, each beside and renamed; says of each what went wrong, if anything.

    `sources` are the files whose XMP they begin with: themselves, or of new ones the photographs, if they have any.
    """
    outcome: dict[Path, str | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        arguments, drafts = [], {}
        for number, (sidecar, wanted) in enumerate(changes.items()):
            drafts[sidecar] = Path(folder, f"{number}.xmp")
            if arguments:
                arguments.append("-execute")
            source = sources.get(sidecar)
            if source is None:
                arguments += [*wanted, drafts[sidecar]]
                continue
            if source != sidecar:  # exiftool copies all of it, but then changes nothing in the same step
                packet = Path(folder, f"{number}-own.xmp")
                arguments += ["-tagsfromfile", source, "-XMP", packet, "-execute"]
                source = packet
            arguments += [*wanted, "-o", drafts[sidecar], source]
        said = exiftool(arguments).stderr.strip() if arguments else ""
        for sidecar, draft in drafts.items():
            try:
                check(draft)
                if not draft.exists():
                    raise Refused(f"exiftool: {said or 'wrote nothing'}")
                with written_beside(sidecar) as beside:
                    shutil.copyfile(draft, beside)
                    if sidecar.exists():
                        shutil.copymode(sidecar, beside)
                outcome[sidecar] = None
            except (Refused, OSError) as error:
                outcome[sidecar] = str(error)
    return outcome
