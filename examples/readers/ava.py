"""AVA: `AVA.txt`, lines of `index image_id count_1 ... count_10 tag tag challenge`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any


FILES = (("AVA.txt",),)


def read(file: Path) -> Iterator[dict[str, Any] | None]:
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            cells = line.split()
            if len(cells) >= 12:
                yield {"image": cells[1], "score": cells[2:12]}
            elif cells:
                yield None
