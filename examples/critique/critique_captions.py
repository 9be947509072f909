"""The words of a photograph critique: what can be said of a picture, how a text names it, and how texts are composed.

Pure text, no pictures. `compose_verdict(present, rng)` writes one of many critiques that name exactly the aspects in
`present`, and `named_aspects(text)` reads a text back: for every verdict `named_aspects(text) == set(present)`.
`compose_caption(truth, rng)` does so for faults alone and tells more of what the photograph is like:
`named_faults(caption) == set(truth.faults)`.
"""

import json
import re
from collections.abc import Collection, Mapping
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
# What a photographer means: no faults, though each looks like one.
STYLES: tuple[str, ...] = ("monochrome", "high_key", "low_key", "silhouette", "foggy")
# What can be measured of a composition: `critique_qualities.py` defines each.
QUALITIES: tuple[str, ...] = (
    "stands_out_by_light", "stands_out_by_colour", "calm_background", "busy_background", "small_in_frame",
    "fills_frame", "complementary_colours", "analogous_colours", "symmetric",
)  # fmt: skip
# Coarse kinds of subject; an object is a tool or any other thing that people make.
KINDS: tuple[str, ...] = (
    "bird", "animal", "insect", "fish", "flower", "plant", "food", "building", "landscape", "vehicle", "instrument",
    "object", "person",
)  # fmt: skip
ASPECTS: tuple[str, ...] = FAULTS + STYLES + QUALITIES + KINDS

# Fields: {adv} slightly..badly, {adj} faint..strong, {bit} a little..a lot, {some} a little..a lot of, {by} an amount
# of stops or degrees, {size} "small " or "".
# Clauses begin in lower case and hold one verb; nouns go into a list of faults; fixes are imperatives.
PHRASES = json.loads(Path(__file__).with_name("critique_phrases.json").read_text(encoding="utf-8"))
# The two depth faults come first and are cut out of the text, so that their "blurred" and "out of focus" are not
# read as a fault of sharpness. The subject's phrase names the background as well, so it goes before the background's.
_PATTERNS = {fault: re.compile(pattern) for fault, pattern in PHRASES["patterns"].items()}
# What stands in [] is said only where the strength is known. {the}, {it}, {its} and {a} stand for the subject.
VERDICTS = json.loads(Path(__file__).with_name("critique_verdicts.json").read_text(encoding="utf-8"))
_OTHER_PATTERNS = {aspect: re.compile(pattern) for aspect, pattern in VERDICTS["patterns"].items()}


def named_faults(text: str) -> set[str]:
    """The members of FAULTS that a text names, read by words alone: a negation is read as the fault it negates."""
    text = " ".join(text.lower().split())
    named = set()
    for fault, pattern in _PATTERNS.items():
        if pattern.search(text):
            named.add(fault)
            text = pattern.sub(" . ", text) if fault in ASPECT_FAULTS["depth"] else text
    return named


def named_aspects(text: str) -> set[str]:
    """The members of ASPECTS that a text names, read by words alone, as `named_faults` does."""
    plain = " ".join(text.lower().split())
    return named_faults(text) | {aspect for aspect, pattern in _OTHER_PATTERNS.items() if pattern.search(plain)}


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


def _fields(fault: str, strength: float, rng: np.random.Generator) -> dict[str, str]:
    """The words of degree that belong to a fault of this strength, a multiple of the least that counts."""
    level = 0 if strength < 1.35 else 1 if strength < 1.85 else 2
    adv = (("slightly", "somewhat"), ("clearly", "noticeably"), ("badly", "severely"))[level]
    adj = (("slight", "faint", "mild"), ("clear", "distinct", "marked"), ("strong", "heavy", "severe"))[level]
    bit = (("a little", "a touch"), ("a good deal", "a fair bit"), ("a lot", "a great deal"))[level]
    some = (("a little", "a touch of"), ("some", "a fair amount of"), ("a lot of", "plenty of"))[level]
    degrees = f"about {_COUNTS[int(np.clip(round(5 * strength), 5, 14)) - 5]} degrees"
    by = degrees if fault == "tilted" else _stops(strength)
    chosen = {name: _pick(words, rng) for name, words in (("adv", adv), ("adj", adj), ("bit", bit), ("some", some))}
    return chosen | {"by": by}


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _say(table: dict[str, tuple[str, ...]], fault: str, truth: Truth, rng: np.random.Generator) -> str:
    size = f"{truth.size} " if truth.size else ""
    return _pick(table[fault], rng).format(**_fields(fault, truth.faults[fault], rng), size=size)


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


# Verdicts ------------------------------------------------------------------------------------------------------------

_SUBJECT_FAULTS = ("subject_blurred", "subject_near_edge", "busy_background")
# Each of these is told in a sentence that names the subject.
_TOLD_OF_SUBJECT = {*QUALITIES[:3], *QUALITIES[4:6], *_PLACEMENT, *ASPECT_FAULTS["depth"]}
# Of these an opened aperture puts the background out of focus; from a house or a hill away it does nothing.
_NEAR = set(KINDS) - {"building", "landscape", "vehicle"}


def compose_verdict(
    present: Collection[str], rng: np.random.Generator, strengths: Mapping[str, float] | None = None
) -> str:
    """A critique that names exactly the aspects in `present`: what is good, what is wrong, and what would help.

    `present` may be any members of ASPECTS, also such as exclude each other. `strengths` (of a fault, in multiples of
    the least that counts as one) choose the words of degree; a fault without one is named without degree.
    """
    if unknown := set(present) - set(ASPECTS):
        raise ValueError(f"no aspects: {sorted(unknown)}; they are {', '.join(ASPECTS)}.")
    found = [aspect for aspect in ASPECTS if aspect in set(present)]
    subject = _Subject.of(found)
    opening, placing = _opening(found, subject, rng), _placing(found, subject, rng)
    content = _content(found, subject, bool(opening), rng)
    good = opening + placing + content
    bad = _shortcomings(found, subject, strengths or {}, bool(placing) and not content, rng)
    if bad and good and " but " not in bad[0]:
        bad[0] = _pick(VERDICTS["but"], rng) + bad[0]
    if not bad:
        good += [_pick(VERDICTS["modest"], rng)] * (not good)
        good += [_pick(VERDICTS["sound"], rng)] * (len(good) < 2 or rng.random() < 0.5)
    return " ".join(_sentence(text) for text in (*good, *bad))


@dataclass(frozen=True)
class _Subject:
    """How a text calls the subject: by its kind, if that is known. `others` are further kinds, `told` says that a
    sentence of its own speaks of it."""

    noun: str
    others: tuple[str, ...]
    told: bool

    @classmethod
    def of(cls, found: list[str]) -> "_Subject":
        kinds = [kind for kind in KINDS if kind in found and kind != "landscape"]
        told = not _TOLD_OF_SUBJECT.isdisjoint(found)
        return cls(kinds[0] if kinds else "subject", tuple(kinds[1:]), told)

    @property
    def fields(self) -> dict[str, str]:
        person = self.noun == "person"
        return {"the": f"the {self.noun}", "it": "them" if person else "it", "its": "their" if person else "its"}

    @property
    def again(self) -> str:
        """What it is called once it has been named."""
        return "the person" if self.noun == "person" else "it"


def _a(noun: str) -> str:
    if noun in ("food", "fish"):
        return {"food": "some food", "fish": "a fish"}[noun]
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _opening(found: list[str], subject: _Subject, rng: np.random.Generator) -> list[str]:
    """What sort of picture it is, where it has a style: 'a quiet monochrome picture of a bird in related colours'."""
    if set(STYLES).isdisjoint(found):
        return []
    manners = [word for word in VERDICTS["styles"] if word in found]
    if len(manners) < 2:
        text = _pick(VERDICTS["moods"][manners[0] if manners else "silhouette"], rng)
    else:
        text = _a(VERDICTS["styles"][manners[0]][0]).split()[0]
    text += "".join(f" {_pick(VERDICTS['styles'][word], rng)}" for word in manners)
    text += f" {'landscape' if 'landscape' in found else _pick(VERDICTS['pictures'], rng)}"
    known = subject.noun != "subject"
    if "silhouette" in found:
        a = _a(subject.noun) if known and not subject.told else f"the {subject.noun}"
        text += " " + _pick(VERDICTS["silhouettes"], rng).format(a=a)
    elif known and not subject.told:
        text += f" {'with' if 'landscape' in found else 'of'} {_a(subject.noun)}"
    palette = _palette(found)
    return [f"{text} {_pick(VERDICTS['built_on'][palette], rng)}" if palette else text]


def _palette(found: list[str]) -> str:
    colours = [aspect for aspect in ("complementary_colours", "analogous_colours") if aspect in found]
    return "both" if len(colours) == 2 else "".join(colours)


def _placing(found: list[str], subject: _Subject, rng: np.random.Generator) -> list[str]:
    """How the subject stands in the frame, in one or two sentences."""
    means = [word for word in ("light", "colour") if f"stands_out_by_{word}" in found]
    grounds = ["calm"] * ("calm_background" in found) + ["blurred"] * ("background_blurred" in found)
    ground = _pick(VERDICTS["grounds"]["_".join(grounds)], rng) if grounds else ""
    verbs = []
    if means:
        verb = _pick(VERDICTS["stand_out"], rng).format(its=subject.fields["its"], means=" and ".join(means))
        verbs.append(f"{verb} {_pick(VERDICTS['against'], rng).format(ground=ground)}" if ground else verb)
    elif ground:
        verbs.append(_pick(VERDICTS["is_before"], rng).format(ground=ground))
    verbs += [_pick(VERDICTS["sizes"][size], rng) for size in VERDICTS["sizes"] if size in found]
    verbs += [_pick(VERDICTS["places"][place], rng) for place in VERDICTS["places"] if place in found]
    if not verbs:
        return []
    first = verbs if len(verbs) == 1 or (len(verbs) == 2 and rng.random() < 0.5) else verbs[:1]
    texts = [f"the {subject.noun} {' and '.join(first)}"]
    if len(verbs) > len(first):
        texts.append(f"{subject.again} {_plain_list(verbs[len(first) :])}")
    if "subject_centred" in found and "symmetric" not in found and verbs[-1] in VERDICTS["places"]["subject_centred"]:
        texts[-1] += f"; {_pick(VERDICTS['room'], rng)}" if rng.random() < 0.4 else ""
    return texts


def _content(found: list[str], subject: _Subject, opened: bool, rng: np.random.Generator) -> list[str]:
    """The subject, the colours and the order of the picture, as far as an opening has not told of them, and what else
    is in view."""
    texts = []
    if not opened:
        if not subject.told and subject.noun != "subject":
            texts.append(_pick(VERDICTS["seen"], rng).format(a=_a(subject.noun)))
        texts += [_pick(VERDICTS["views"], rng)] * ("landscape" in found)
        texts += [_pick(VERDICTS["symmetry"], rng)] * ("symmetric" in found)
        texts += [_pick(VERDICTS["palette"][palette], rng) for palette in [_palette(found)] if palette]
    if subject.others:
        others = _plain_list([_a(kind) for kind in subject.others])
        texts.append(_pick(VERDICTS["also"], rng).format(a=others))
    return texts


def _shortcomings(
    found: list[str], subject: _Subject, strengths: Mapping[str, float], just_named: bool, rng: np.random.Generator
) -> list[str]:
    """Sentences on what is wrong and what would help, those on the subject first, which may have been `just_named`."""
    texts, listed = [], []
    for fault in _SUBJECT_FAULTS:
        if fault in found:
            near = VERDICTS["near"].get(fault, []) if subject.noun in _NEAR else []
            clause, fix = _pick(VERDICTS["own"][fault] + near, rng)
            if just_named and not texts and rng.random() < 0.7:
                clause = re.sub(r"^\{the\}", subject.again, clause)
            text = _with_degree(clause + _pick(VERDICTS["links"], rng) + fix, fault, strengths, rng)
            texts.append(text.format(**subject.fields))
    for aspect, faults in ASPECT_FAULTS.items():
        here = [fault for fault in faults if fault in found and fault in VERDICTS["clauses"]]
        if len(here) == 2:
            texts.append(": ".join(VERDICTS["opposed"][aspect]))
        else:
            listed += here
    rng.shuffle(listed)
    return texts + (_pairs(listed, strengths, rng) if len(listed) < 3 else _listed(listed, strengths, rng))


def _with_degree(template: str, fault: str, strengths: Mapping[str, float], rng: np.random.Generator) -> str:
    """'[{adv} ]flat' -> 'clearly flat', or 'flat' where the strength is not known."""
    if fault not in strengths:
        return re.sub(r"\[[^]]*\]", "", template)
    fields = _fields(fault, strengths[fault], rng)
    return re.sub(r"\[([^]]*)\]", lambda match: match[1].format(**fields), template)


def _pairs(faults: list[str], strengths: Mapping[str, float], rng: np.random.Generator) -> list[str]:
    """Each fault and what would help in one sentence."""
    texts = []
    for fault in faults:
        clause, fix = (_pick(VERDICTS[table][fault], rng) for table in ("clauses", "fixes"))
        texts.append(_with_degree(clause + _pick(VERDICTS["links"], rng) + fix, fault, strengths, rng))
    return texts


def _listed(faults: list[str], strengths: Mapping[str, float], rng: np.random.Generator) -> list[str]:
    """All faults in one sentence and what would help in the next."""

    def told(table: str, strengths: Mapping[str, float]) -> list[str]:
        chosen = [fault for fault in faults if fault in VERDICTS[table]]
        return [_with_degree(_pick(VERDICTS[table][fault], rng), fault, strengths, rng) for fault in chosen]

    fixes = told("fixes", {})  # words of degree on everything in a list would be a drone
    text, extras = f"the picture is {_plain_list(told('is', strengths))}", told("has", strengths)
    if extras:
        text += f", with {_plain_list(extras)}"
    return [text, _pick(VERDICTS["next"], rng) + _plain_list(fixes)]
