"""The words of a photograph critique: which faults there are, how a text names them, and how a caption is composed.

Pure text, no pictures: `compose_caption(truth, rng)` writes one of many phrasings of a known truth, and
`named_faults(text)` reads a text back. For every composed caption `named_faults(caption) == set(truth.faults)`.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np


ASPECT_FAULTS: dict[str, tuple[str, ...]] = {
    "exposure": ("underexposed", "overexposed"),
    "contrast": ("low_contrast", "high_contrast"),
    "white_balance": ("cool_cast", "warm_cast"),
    "saturation": ("muted", "oversaturated"),
    "sharpness": ("blurred",),
    "noise": ("noisy",),
    "level": ("tilted",),
    "vignette": ("vignetting",),
    "placement": ("subject_centred", "subject_left_third", "subject_right_third", "subject_near_edge"),
    "depth": ("background_blurred", "subject_blurred"),
}
FAULTS: tuple[str, ...] = tuple(fault for faults in ASPECT_FAULTS.values() for fault in faults)

# Fields: {adv} slightly..badly, {adj} faint..strong, {bit} a little..a lot, {some} a little..a lot of, {by} an amount
# of stops or degrees, {size} "small " or "".
# Clauses begin in lower case and hold one verb; nouns go into a list of faults; fixes are imperatives.
PHRASES = json.loads(Path(__file__).with_name("critique_phrases.json").read_text(encoding="utf-8"))
# The two depth faults come first and are cut out of the text, so that their "blurred" and "out of focus" are not
# read as a fault of sharpness. The subject's phrase names the background as well, so it goes before the background's.
_PATTERNS = {fault: re.compile(pattern) for fault, pattern in PHRASES["patterns"].items()}


def named_faults(text: str) -> set[str]:
    """The members of FAULTS that a text names, read by words alone: a negation is read as the fault it negates."""
    text = " ".join(text.lower().split())
    named = set()
    for fault, pattern in _PATTERNS.items():
        if pattern.search(text):
            named.add(fault)
            text = pattern.sub(" . ", text) if fault in ASPECT_FAULTS["depth"] else text
    return named


@dataclass(frozen=True)
class Truth:
    """What is true of one picture, as far as a caption may speak of it.

    `faults` maps each fault present to its strength in multiples of the least strength that counts as a fault.
    `fine` holds the aspects known to be without fault; aspects in neither are not spoken of.
    `hue`, `brightest` and `texture` are what can be seen of the photograph itself ("" when nothing stands out), and
    `size` is the subject's size in the frame.
    """

    faults: dict[str, float]
    fine: frozenset[str]
    hue: str = ""
    brightest: str = ""
    texture: str = ""
    size: str = ""


_COUNTS = ["five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen"]
_STOPS = ["half a stop", "about one stop", "more than one stop", "about one and a half stops", "almost two stops",
          "about two stops", "more than two stops"]  # fmt: skip
_GOOD_DEPTH = "background_blurred"
_PLACEMENT = ASPECT_FAULTS["placement"]
_DRAWBACKS = frozenset(FAULTS) - {*_PLACEMENT[:3], _GOOD_DEPTH}


def _stops(exposure_value: float) -> str:
    limits = (0.8, 1.2, 1.4, 1.65, 1.9, 2.2)
    return _STOPS[next((i for i, limit in enumerate(limits) if exposure_value < limit), -1)]


def _fields(fault: str, strength: float, truth: Truth, rng: np.random.Generator) -> dict[str, str]:
    """The words of degree that belong to a fault of this strength."""
    level = 0 if strength < 1.35 else 1 if strength < 1.85 else 2
    adv = (("slightly", "somewhat"), ("clearly", "noticeably"), ("badly", "heavily"))[level]
    adj = (("slight", "faint", "mild"), ("clear", "distinct", "marked"), ("strong", "heavy", "severe"))[level]
    bit = (("a little", "a touch"), ("a good deal", "a fair bit"), ("a lot", "a great deal"))[level]
    some = (("a little", "a touch of"), ("some", "a fair amount of"), ("a lot of", "plenty of"))[level]
    degrees = f"about {_COUNTS[int(np.clip(round(5 * strength), 5, 14)) - 5]} degrees"
    by, size = degrees if fault == "tilted" else _stops(strength), f"{truth.size} " if truth.size else ""
    chosen = {name: _pick(words, rng) for name, words in (("adv", adv), ("adj", adj), ("bit", bit), ("some", some))}
    return chosen | {"by": by, "size": size}


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _say(table: dict[str, tuple[str, ...]], fault: str, truth: Truth, rng: np.random.Generator) -> str:
    return _pick(table[fault], rng).format(**_fields(fault, truth.faults[fault], truth, rng))


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


def _sentence(text: str) -> str:
    return _cap(text) + "."


def _join(parts: list[str], rng: np.random.Generator) -> str:
    """Clauses to one clause: 'a', 'a and b', 'a, b and c'."""
    if len(parts) == 2:
        return parts[0] + _pick((" and ", ", and ", "; "), rng) + parts[1]
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 2 else parts[0]


def _topics(truth: Truth) -> list[str]:
    """What may be praised, the most telling first."""
    topics = []
    if {"white_balance", "saturation"} <= truth.fine:
        topics.append("hue" if truth.hue else "colour")
    topics += ["brightest"] * bool(truth.brightest)
    topics += ["texture"] * (bool(truth.texture) and "sharpness" in truth.fine)
    topics += [topic for topic in ("sharpness", "noise", "level") if topic in truth.fine]
    # Each of the two also shows in the other, so either is praised only when both are fine.
    topics += ["exposure", "contrast"] * ({"exposure", "contrast"} <= truth.fine)
    if "sharpness" in topics and not {"background_blurred", "subject_blurred"}.isdisjoint(truth.faults):
        topics.remove("sharpness")
        topics += ["subject_sharp"] * ("background_blurred" in truth.faults)
    return topics


def _praise(truth: Truth, count: int, rng: np.random.Generator) -> list[str]:
    """`count` things that are good; the first two come from what the photograph is like, so that captions differ."""
    topics = _topics(truth)
    telling = [topic for topic in topics if topic in ("hue", "brightest", "texture")]
    rest = [topic for topic in topics if topic not in telling]
    rng.shuffle(rest)
    chosen = (telling[: max(1, count - 1)] + rest)[:count]
    said = []
    for topic in chosen:
        text = _pick(PHRASES["praise"][topic], rng)
        at = _pick(PHRASES["places"][truth.brightest], rng) if truth.brightest else ""
        texture = _pick(PHRASES["textures"][truth.texture], rng) if truth.texture else ""
        said.append(text.format(hue=truth.hue, at=at, texture=texture))
    return said


def compose_caption(truth: Truth, rng: np.random.Generator) -> str:
    """One critique of a known truth: what is good, what is wrong, and a fix for each thing that is wrong."""
    drawbacks = [fault for fault in truth.faults if fault in _DRAWBACKS]
    rng.shuffle(drawbacks)
    placement = [fault for fault in truth.faults if fault in _PLACEMENT[:3]]
    good = [_say(PHRASES["clauses"], fault, truth, rng) for fault in placement]
    good += [_say(PHRASES["clauses"], fault, truth, rng) for fault in truth.faults if fault == _GOOD_DEPTH]
    wanted = (3, 2, 2, 1, 1)[min(len(drawbacks), 4)] - (len(good) > 1) - (len(good) > 0 and len(drawbacks) >= 3)
    good += _praise(truth, max(wanted, 0 if good else 1), rng)
    praise = _good_sentences(good, rng)
    if not drawbacks:
        ending = _pick(PHRASES["off_centre"], rng) if "subject_centred" in placement and rng.random() < 0.5 else None
        return " ".join([praise, _sentence(ending or _pick(PHRASES["nothing"], rng))])
    if len(drawbacks) <= 2 and rng.random() < 0.35:
        return _paired(truth, drawbacks, praise, rng)
    bad, fix = _bad(truth, drawbacks, rng), _fix(truth, drawbacks, rng)
    if not praise:
        return f"{_cap(bad)} {fix}"
    if rng.random() < 0.6:
        return f"{praise} {_cap(_pick(PHRASES['but'], rng) + bad)} {fix}"
    plus = _pick(PHRASES["plus"], rng)
    return f"{_cap(bad)} {fix} {plus}{praise[0].lower() + praise[1:]}"


def _good_sentences(good: list[str], rng: np.random.Generator) -> str:
    if not good:
        return ""
    if len(good) > 2:
        return f"{_sentence(good[0])} {_sentence(_join(good[1:], rng))}"
    return _sentence(_join(good, rng))


def _paired(truth: Truth, drawbacks: list[str], praise: str, rng: np.random.Generator) -> str:
    """Each fault with its fix in one sentence."""
    pairs = []
    for fault in drawbacks:
        problem, fix = _say(PHRASES["clauses"], fault, truth, rng), _say(PHRASES["fixes"], fault, truth, rng)
        pairs.append(_sentence(problem + _pick(("; ", ": ", ", so "), rng) + fix))
    parts = [praise, *pairs] if rng.random() < 0.6 else [*pairs, praise]
    return " ".join(part for part in parts if part)


def _bad(truth: Truth, drawbacks: list[str], rng: np.random.Generator) -> str:
    """What is wrong, as clauses for one or two faults and as a list for more; begins in lower case where it may."""
    listed = [fault for fault in drawbacks if fault in PHRASES["nouns"]]
    told = [fault for fault in drawbacks if fault not in PHRASES["nouns"]]
    if len(drawbacks) <= 2 or len(listed) < 2:
        listed, told = [], drawbacks
    sentences = []
    if told:
        sentences.append(_join([_say(PHRASES["clauses"], fault, truth, rng) for fault in told], rng) + ".")
    if listed:
        nouns = [_say(PHRASES["nouns"], fault, truth, rng) for fault in listed]
        start = _pick(PHRASES["lists"], rng)
        if not sentences:
            start = start if start.startswith("I ") else start[0].lower() + start[1:]
        sentences.append(start + ", ".join(nouns[:-1]) + " and " + nouns[-1] + ".")
    return " ".join(sentences)


def _fix(truth: Truth, drawbacks: list[str], rng: np.random.Generator) -> str:
    fixes = [_say(PHRASES["fixes"], fault, truth, rng) for fault in drawbacks]
    start = _pick(PHRASES["fix_starts"], rng) if len(fixes) <= 3 else ""
    if len(fixes) == 1:
        return _cap(start + fixes[0] + ".")
    joined = ", ".join(fixes[:-1]) + _pick((" and ", ", then ", " and also "), rng) + fixes[-1]
    return _cap(start + joined + ".")


def plain_caption(labels: list[float]) -> str:
    """
    The critique of `labels` (in the order of FAULTS: 1 present, 0 absent, -1 not spoken of) in one fixed form.

    The same faults are always said in the same words and order, and nothing else is, so that a model that trains on
    such captions can only learn to see.
    """
    known = dict(zip(FAULTS, labels, strict=True))
    present = [fault for fault, label in known.items() if label == 1]
    good = [_without_degree(PHRASES["clauses"][fault][0]) for fault in present if fault not in _DRAWBACKS]
    if not any(fault in _PLACEMENT for fault in present):
        fine = [aspect for aspect in ("sharpness", "noise", "level") if known[ASPECT_FAULTS[aspect][0]] == 0]
        good += [PHRASES["praise"][aspect][0] for aspect in fine[:1]]
    told = [
        _without_degree(PHRASES["clauses"][fault][0])
        for fault in present
        if fault in _DRAWBACKS and fault not in PHRASES["nouns"]
    ]
    nouns = [PHRASES["nouns"][fault][0] for fault in present if fault in PHRASES["nouns"]]
    listed = [PHRASES["lists"][0].lower() + _plain_list(nouns)] if nouns else []
    fixes = [_without_degree(PHRASES["fixes"][fault][0]) for fault in present if fault in _DRAWBACKS]
    ending = _plain_list(fixes) if fixes else PHRASES["nothing"][0]
    return " ".join(_sentence(text) for text in (*good, *told, *listed, ending))


def _without_degree(text: str) -> str:
    """'raise the exposure by {by}' -> 'raise the exposure'."""
    return re.sub(r"(?: by)? \{\w+\}", "", text.replace("{size}", ""))


def _plain_list(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
