"""What lies in a file, whatever its form: numbered rows of .jsonl, .csv, .json and .txt, or one object of .json."""

import codecs
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


# Each with its line in the file, or its place in a list; None for what cannot be read
Rows = list[tuple[int, Any]]

# as long as a critique may be, and no longer than memory
LONGEST_CELL = 1 << 24
SPLIT_LISTS = {
    f"{name}{end}": split
    for name, split in (("train", "train"), ("validation", "validation"), ("val", "validation"), ("test", "test"))
    for end in ("_ids.csv", ".csv")
}
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class RefusedFile(ValueError):
    """A file that holds no rows of any form."""


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or UTF-16 with its mark; what is neither is U+FFFD, which the report counts."""
    if not file.is_file():  # NOTE: opening a named pipe would wait for ever
        raise ValueError(f"{file} is no file.")
    content = file.read_bytes()
    encoding = next((name for mark, name in BYTE_ORDER_MARKS if content.startswith(mark)), "utf-8")
    text = content.decode(encoding, errors="replace")
    if not text.strip():
        raise RefusedFile(f"{file} is empty.")
    if "\0" in text[:1000]:
        raise ValueError(f"{file} is not text, or UTF-16 without its mark: save it as UTF-8.")
    return text


def parse(file: Path) -> Rows | dict[str, Any]:
    """
    The content of a file.

    Raises:
        ValueError: if it cannot be read at all.
    """
    # NOTE: not by the builders of `datasets`: one score that is no number, or one broken line, would stop them
    suffix = file.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return parse_lines(read_text(file))
    if suffix in (".csv", ".tsv"):
        return list(parse_table(read_text(file), file))
    if suffix == ".txt":
        return [(number, line) for number, line in enumerate(read_text(file).split("\n"), 1) if line.strip()]
    if suffix == ".json":
        return parse_json(file)
    if suffix in (".pkl", ".pickle"):
        raise ValueError(
            f"{file} is a pickle, which can run any program when it is read: convert it to .json or .csv."
        )
    raise ValueError(f"{file} is none of .jsonl, .csv, .json and AVA's .txt.")


def parse_json(file: Path) -> Rows | dict[str, Any]:
    text = read_text(file)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{file} is nested too deeply.") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # an object a line, by the wrong suffix
            return parse_lines(text)
        raise ValueError(f"{file} is no JSON: {error}.") from error
    if isinstance(content, list):
        return list(enumerate(content, 1))
    if isinstance(content, dict):
        return content
    raise ValueError(f"{file} holds neither a list nor an object.")


def parse_lines(text: str) -> Rows:
    rows = []
    # NOTE: not `splitlines`, which also cuts at characters that JSON allows within a text
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            rows.append((number, row if isinstance(row, dict) else None))
    return rows


def parse_table(text: str, file: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Rows of a table with commas, or the semicolons or tabs of which there are more in its head."""
    head = text[: text.find("\n")]
    lines = read_cells(text, max(",;\t", key=head.count))
    names = next(lines)[1]
    if names is None:
        raise ValueError(f"{file}, line 1: the names of the columns have a quote that is not closed, or not doubled.")
    names = [name.strip() for name in names]
    for begin, cells in lines:
        if cells is None or any(cell.strip() for cell in cells[len(names) :]):
            yield begin, None  # more cells than the head: a comma that nobody quoted has cut a text
        elif cells:
            yield begin, dict(zip(names, cells))


def read_cells(text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str] | None]]:
    """
    The cells of each row with the line where it begins; None for a line that is none.

    A quote that is not closed would take all that follows into its cell. So quotes have to be right, and where they are
    not, the line with which the row begins is no row, and reading goes on with the line after it.
    """
    csv.field_size_limit(LONGEST_CELL)
    given, begin = list(io.StringIO(text, newline="")), 0
    while begin < len(given):
        rows = csv.reader(map(given.__getitem__, range(begin, len(given))), delimiter=delimiter, strict=True)
        start = begin
        try:
            for cells in rows:
                yield begin + 1, cells
                begin = start + rows.line_num
        except csv.Error:
            yield begin + 1, None
            begin += 1


def names_in(content: Rows | dict[str, Any]) -> set[str]:
    """The names of all columns of the first rows, or of an object."""
    if isinstance(content, dict):
        return set(content)
    return {name for _, row in content[:200] if isinstance(row, dict) for name in row}


def listed_splits(folder: Path, column: str) -> dict[str, str]:
    """Splits by id, of lists beside the data: `train_ids.csv`, or `train.csv` with such a column; without, all lines."""
    splits = {}
    for name, split in SPLIT_LISTS.items():
        if (folder / name).is_file():
            lines = []
            for number, cells in read_cells(read_text(folder / name)):
                if cells is None:  # the photographs that it lists would be taken for others, to train on
                    raise ValueError(f"{folder / name}, line {number}: a quote that is not closed, or not doubled.")
                lines.append(cells)
            has_head = column in lines[0]
            position = lines[0].index(column) if has_head else 0
            splits |= {line[position].strip(): split for line in lines[has_head:] if len(line) > position}
    return splits
