"""Which numbers are the worst and the best of a source's scores: told, known of a data set, or a question to the user."""

import re
from collections.abc import Iterable


# Of single scores, by the words of the data set's name
KNOWN = {
    ("flickr", "aes"): (0, 1),
    ("flickraes",): (0, 1),
    ("rpcd",): (0, 1),
    ("para",): (1, 5),
    ("kadid",): (1, 5),
    ("ava",): (1, 10),
    ("tad66k",): (1, 10),
    ("artimuse",): (0, 10),
    ("baid",): (0, 10),
    ("pccd",): (0, 10),
    ("koniq",): (0, 100),
    ("spaq",): (0, 100),
    ("ista",): (0, 100),
    ("apddv2",): (0, 100),
}
USUAL = ((0, 1), (1, 5), (0, 5), (0, 10), (0, 100))
DEFAULT = (1, 10)
ENOUGH = 5  # scores, before it says anything that none is above 5
MISFITS = 0.1  # share of scores outside of a data set's scale from which on it is another data set

Scale = tuple[float, float]


def known_scale(names: Iterable[str]) -> tuple[str, Scale] | None:
    """
    The data set that the first of these names of files and folders names by separate words, and its scale.

    `KonIQ-10k`, `koniq10k` and `test_koniq` are KonIQ, `paradise` is not PARA. A name of two data sets with different
    scales is none.
    """
    for name in names:
        given = re.findall(r"[a-z0-9]+", name.lower())
        plain = [re.sub(r"\d+k$", "", word) if word != "tad66k" else word for word in given]
        found = {}
        for words, scale in KNOWN.items():
            starts = range(len(plain) - len(words) + 1)
            if any(tuple(plain[i : i + len(words)]) == words for i in starts):
                found[scale] = "-".join(words).upper()
        if len(found) == 1:
            (scale, label), *_ = found.items()
            return label, scale
    return None


def say_scale(scale: Scale) -> str:
    return f"{scale[0]:g} to {scale[1]:g}"


def misfit(scores: list[tuple[float, str | None]]) -> str | None:
    """
    Why scores whose scale nobody told, each with its place, are not from 1 to 10; None if they may be.

    They are not if any is below 1 or above 10, or if there are at least `ENOUGH` and none is above 5: an error that
    the user answers is better than the best read as the worst.
    """
    if not scores:
        return None
    (low, lowest), (high, highest) = (choose(scores, key=lambda one: one[0]) for choose in (min, max))
    if DEFAULT[0] <= low and high <= DEFAULT[1] and (high > 5 or len(scores) < ENOUGH):
        return None
    usual = next((scale for scale in USUAL if scale[0] <= low and high <= scale[1]), None)
    perhaps = "" if usual is None else f", perhaps --score-range {usual[0]:g} {usual[1]:g}"
    return (
        f"{len(scores)} scores from {low:g}{_at(lowest)} to {high:g}{_at(highest)}, and nothing says what is the worst "
        f"and what the best; they do not look like 1 to 10. Say it by --score-range WORST BEST{perhaps} (with --score-range 1 10 those outside "
        "are left out and counted)."
    )


def _at(place: str | None) -> str:
    return "" if place is None else f" ({place})"
