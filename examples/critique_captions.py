"""The words of a photograph critique: which faults there are, how a text names them, and how a caption is composed.

Pure text, no pictures: `compose_caption(truth, rng)` writes one of many phrasings of a known truth, and
`named_faults(text)` reads a text back. For every composed caption `named_faults(caption) == set(truth.faults)`.
"""

import re
from dataclasses import dataclass

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

# The two depth faults come first and are cut out of the text, so that their "blurred" and "out of focus" are not
# read as a fault of sharpness. The subject's phrase names the background as well, so it goes before the background's.
_DEPTH_PATTERNS = {
    "subject_blurred": re.compile(
        r"\bsubject\b(?:(?!\bsubject\b)[^.;]){0,40}?\b(?:out of focus|blurred)\b[^.;]{0,30}?\bbackground\b[^.;]{0,20}?"
        r"\bsharp\b"
        r"|\bbackground\b[^.;]{0,20}?\bsharp\b[^.;]{0,30}?\bsubject\b[^.;]{0,20}?\b(?:out of focus|blurred)\b"
    ),
    "background_blurred": re.compile(
        r"\bbackground (?:\w+ ){0,3}?(?:blurred|out of focus)\b|\bblurred background\b|\bshallow depth of field\b"
    ),
}
_PATTERNS = {
    "underexposed": re.compile(r"\bunder-?expos(?:ed|ure)\b"),
    "overexposed": re.compile(r"\bover-?expos(?:ed|ure)\b"),
    "low_contrast": re.compile(r"\bflat\b|\blow[ -]contrast\b"),
    "high_contrast": re.compile(r"\bharsh\b|\btoo contrasty\b"),
    "cool_cast": re.compile(r"\b(?:cool|bluish) cast\b"),
    "warm_cast": re.compile(r"\b(?:warm|orange) cast\b"),
    "muted": re.compile(r"\bmuted\b|\bdesaturated\b"),
    "oversaturated": re.compile(r"\boversaturated\b|\bgarish\b"),
    "blurred": re.compile(r"\bblurred\b|\bout of focus\b|\bsoft\b"),
    "noisy": re.compile(r"\bnoisy\b|\bgrainy\b"),
    "tilted": re.compile(r"\btilted\b|\bslanted\b"),
    "vignetting": re.compile(r"\bdark corners\b|\bvignetting\b"),
    "subject_centred": re.compile(r"\bcent(?:red|ered)\b"),
    "subject_left_third": re.compile(r"\bleft third\b"),
    "subject_right_third": re.compile(r"\bright third\b"),
    "subject_near_edge": re.compile(r"\bnear the edge\b|\bcropped\b"),
}


def named_faults(text: str) -> set[str]:
    """The members of FAULTS that a text names, read by words alone: a negation is read as the fault it negates."""
    text = " ".join(text.lower().split())
    named = set()
    for fault, pattern in _DEPTH_PATTERNS.items():
        shorter = pattern.sub(" . ", text)
        if shorter != text:
            named.add(fault)
            text = shorter
    named.update(fault for fault, pattern in _PATTERNS.items() if pattern.search(text))
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


# Fields: {adv} slightly..badly, {adj} faint..strong, {bit} a little..a lot, {some} a little..a lot of, {by} an amount
# of stops or degrees, {size} "small " or "".
# Clauses begin in lower case and hold one verb; nouns go into a list of faults; fixes are imperatives.
_CLAUSES = {
    "underexposed": (
        "the picture is {adv} underexposed",
        "the frame is underexposed by {by}",
        "the shot looks {adv} underexposed and the shadows swallow detail",
        "everything is {adv} underexposed",
        "the scene comes out {adv} underexposed",
        "the whole image is underexposed by {by}",
        "too little light leaves the shot {adv} underexposed",
        "the photograph is {adv} underexposed, so the darks close up",
    ),
    "overexposed": (
        "the picture is {adv} overexposed",
        "the frame is overexposed by {by}",
        "the shot looks {adv} overexposed and the highlights wash out",
        "everything is {adv} overexposed",
        "the scene comes out {adv} overexposed",
        "the whole image is overexposed by {by}",
        "too much light leaves the shot {adv} overexposed",
        "the photograph is {adv} overexposed, so the brights lose detail",
    ),
    "low_contrast": (
        "the tones are {adv} flat",
        "low contrast makes the scene look lifeless",
        "the picture is {adv} flat and lacks punch",
        "the image suffers from low contrast",
        "the tonal range is {adv} flat, with neither deep blacks nor clear whites",
        "low contrast leaves the forms without depth",
        "the rendering looks {adv} flat",
        "blacks and whites sit close together in a {adv} flat print",
    ),
    "high_contrast": (
        "the contrast is {adv} harsh",
        "the picture is too contrasty",
        "the tones are {adv} harsh, with blocked shadows and burnt lights",
        "the shot looks {adv} harsh",
        "the rendering is too contrasty and loses the tones between",
        "the step from dark to light is {adv} harsh",
        "the image is too contrasty, so detail drops out at both ends",
        "{adv} harsh contrast splits the frame into black and white",
    ),
    "cool_cast": (
        "a cool cast lies over the colours",
        "the colours carry a {adj} bluish cast",
        "the white balance leaves a {adj} cool cast",
        "a {adj} bluish cast chills the scene",
        "there is a {adj} cool cast",
        "whites and greys take on a bluish cast",
        "the picture shows a {adj} cool cast",
        "neutral tones drift into a bluish cast",
    ),
    "warm_cast": (
        "a warm cast lies over the colours",
        "the colours carry a {adj} orange cast",
        "the white balance leaves a {adj} warm cast",
        "a {adj} orange cast heats the scene",
        "there is a {adj} warm cast",
        "whites and greys take on an orange cast",
        "the picture shows a {adj} warm cast",
        "neutral tones drift into an orange cast",
    ),
    "muted": (
        "the colours are {adv} muted",
        "the picture looks {adv} desaturated",
        "{adv} muted colour drains the mood",
        "the palette is {adv} desaturated",
        "the colour comes across as {adv} muted",
        "the hues are {adv} desaturated and tired",
        "everything looks {adv} muted, almost without colour",
        "a {adv} desaturated rendering takes life from the scene",
    ),
    "oversaturated": (
        "the colours are {adv} oversaturated",
        "the picture looks {adv} garish",
        "{adv} oversaturated colour shouts at the viewer",
        "the palette is {adv} garish",
        "the colour comes across as {adv} oversaturated",
        "the hues are {adv} garish and unreal",
        "everything looks {adv} oversaturated, like a cheap print",
        "a {adv} garish rendering makes the scene look artificial",
    ),
    "blurred": (
        "the whole picture is {adv} blurred",
        "the shot is {adv} out of focus",
        "detail is {adv} soft throughout",
        "edges look {adv} soft",
        "the image is {adv} blurred from side to side",
        "everything is {adv} out of focus, as if the camera had missed",
        "fine structure is {adv} blurred away",
        "the rendering is {adv} soft and nothing is truly in focus",
    ),
    "noisy": (
        "the picture is {adv} noisy",
        "the tones are {adv} grainy",
        "even areas look {adv} grainy",
        "the image is {adv} noisy throughout",
        "{adv} noisy pixels cover the surfaces",
        "a {adv} grainy texture breaks up smooth areas",
        "the file is {adv} noisy, as at a high ISO",
        "the shot looks {adv} grainy",
    ),
    "tilted": (
        "the frame is tilted by {by}",
        "the picture is {adv} tilted",
        "the camera was held {adv} slanted",
        "lines that should be upright are slanted by {by}",
        "the view is {adv} tilted and feels unstable",
        "the whole scene is slanted by {by}",
        "the framing is {adv} slanted",
        "the shot is tilted by {by}, so it seems to slide",
    ),
    "vignetting": (
        "{adv} dark corners frame the view",
        "vignetting pulls the corners down",
        "the lens leaves {adv} dark corners",
        "the picture shows {adj} vignetting",
        "dark corners draw the eye into a tunnel",
        "the light falls off into dark corners",
        "{adj} vignetting darkens the rim",
        "there are {adv} dark corners",
    ),
    "subject_centred": (
        "the {size}subject is centred",
        "the {size}subject sits centred in the frame",
        "a centred {size}subject makes a calm, direct composition",
        "the composition keeps the {size}subject centred",
        "with the {size}subject centred, the view is direct",
        "the {size}subject stands centred and plain to see",
        "the framing puts the {size}subject centred",
        "the {size}subject is placed centred, a static choice",
    ),
    "subject_left_third": (
        "the {size}subject sits on the left third",
        "the {size}subject is placed on the left third",
        "placing the {size}subject on the left third gives balance",
        "the composition sets the {size}subject on the left third",
        "with the {size}subject on the left third, the frame has tension",
        "the {size}subject stands well on the left third",
        "the framing puts the {size}subject on the left third",
        "the left third holds the {size}subject and leaves room beside it",
    ),
    "subject_right_third": (
        "the {size}subject sits on the right third",
        "the {size}subject is placed on the right third",
        "placing the {size}subject on the right third gives balance",
        "the composition sets the {size}subject on the right third",
        "with the {size}subject on the right third, the frame has tension",
        "the {size}subject stands well on the right third",
        "the framing puts the {size}subject on the right third",
        "the right third holds the {size}subject and leaves room beside it",
    ),
    "subject_near_edge": (
        "the {size}subject is cropped",
        "the {size}subject sits too near the edge",
        "the {size}subject is pushed near the edge and cropped",
        "the framing leaves the {size}subject near the edge, partly cropped",
        "part of the {size}subject is cropped",
        "the {size}subject hangs near the edge, half lost",
        "a cropped {size}subject unbalances the composition",
        "the {size}subject is squeezed near the edge",
    ),
    "background_blurred": (
        "the background is blurred, so the subject stands out",
        "a shallow depth of field lifts the subject forward",
        "the blurred background sets the subject apart",
        "shallow depth of field keeps the eye on the subject",
        "with the background blurred, nothing distracts",
        "a blurred background gives the scene depth",
        "the background is nicely blurred",
        "shallow depth of field separates the planes",
    ),
    "subject_blurred": (
        "the subject is out of focus while the background is sharp",
        "the subject is blurred while the background is sharp",
        "the background is sharp but the subject is out of focus",
        "focus missed, leaving the subject out of focus while the background is sharp",
        "the subject looks blurred although the background is sharp",
        "the background is sharp, yet the subject is blurred",
        "the subject falls out of focus while the background stays sharp",
        "with the background sharp, the subject is left out of focus",
    ),
}

_NOUNS = {
    "underexposed": ("an underexposed frame", "underexposed tones", "an underexposed scene"),
    "overexposed": ("an overexposed frame", "overexposed tones", "an overexposed scene"),
    "low_contrast": ("low contrast", "flat tones", "a flat tonal range"),
    "high_contrast": ("harsh contrast", "harsh tones", "a too contrasty rendering"),
    "cool_cast": ("a cool cast", "a bluish cast", "a {adj} cool cast"),
    "warm_cast": ("a warm cast", "an orange cast", "a {adj} warm cast"),
    "muted": ("muted colours", "desaturated colours", "a muted palette"),
    "oversaturated": ("oversaturated colours", "garish colours", "a garish palette"),
    "blurred": ("blurred detail", "soft edges", "an out of focus rendering"),
    "noisy": ("noisy surfaces", "grainy tones", "a grainy texture"),
    "tilted": ("a tilted frame", "a slanted view", "a tilted camera"),
    "vignetting": ("dark corners", "vignetting", "{adj} vignetting"),
}

_FIXES = {
    "underexposed": (
        "raise the exposure by {by}",
        "lift the exposure by {by}",
        "brighten it by {by}",
        "add {by} of light",
        "open the aperture by {by}",
        "expose {by} longer",
    ),
    "overexposed": (
        "lower the exposure by {by}",
        "cut the exposure by {by}",
        "darken it by {by}",
        "take away {by} of light",
        "close the aperture by {by}",
        "expose {by} shorter",
    ),
    "low_contrast": (
        "raise the contrast {bit}",
        "add {some} contrast",
        "deepen the blacks and lift the whites {bit}",
        "steepen the tone curve {bit}",
        "stretch the levels {bit}",
        "spread the tones {bit} further",
    ),
    "high_contrast": (
        "lower the contrast {bit}",
        "take out {some} contrast",
        "open the shadows and hold back the lights {bit}",
        "relax the tone curve {bit}",
        "use gentler light or a lower contrast",
        "bring the extremes {bit} closer",
    ),
    "cool_cast": (
        "warm the white balance {bit}",
        "shift the temperature {bit} toward yellow",
        "move the white balance {bit} away from blue",
        "set a higher colour temperature",
        "take out {some} blue",
        "balance the greys with {some} yellow",
    ),
    "warm_cast": (
        "cool the white balance {bit}",
        "shift the temperature {bit} toward blue",
        "move the white balance {bit} away from yellow",
        "set a lower colour temperature",
        "take out {some} yellow",
        "balance the greys with {some} blue",
    ),
    "muted": (
        "raise the saturation {bit}",
        "add {some} colour",
        "bring back {some} saturation",
        "push the vibrance up {bit}",
        "strengthen the colours {bit}",
        "give the hues {bit} more weight",
    ),
    "oversaturated": (
        "lower the saturation {bit}",
        "take out {some} colour",
        "pull back {some} saturation",
        "turn the vibrance down {bit}",
        "calm the colours {bit}",
        "give the hues {bit} less weight",
    ),
    "blurred": (
        "refocus and hold the camera steady",
        "use a faster shutter or a tripod",
        "focus again with care",
        "check the focus and shoot again",
        "steady the camera and sharpen the detail",
        "focus on the main detail and stop down",
    ),
    "noisy": (
        "lower the ISO",
        "shoot at a lower ISO",
        "reduce the noise {bit}",
        "smooth the noise {bit} in editing",
        "apply {some} noise reduction",
        "use a lower ISO and a longer exposure",
    ),
    "tilted": (
        "straighten it by {by}",
        "rotate it back by {by}",
        "level the camera",
        "turn the frame upright by {by}",
        "correct the angle by {by}",
        "level it with {by} of rotation",
    ),
    "vignetting": (
        "brighten the corners {bit}",
        "lift the corners by {by}",
        "correct the lens falloff",
        "even out the corners {bit}",
        "apply a lens profile to the corners",
        "raise the light at the rim by {by}",
    ),
    "subject_near_edge": (
        "move the subject further in",
        "leave more room around the subject",
        "step back to show all of it",
        "reframe so that the subject is whole",
        "give the subject more space",
        "turn the camera to bring it inside the frame",
    ),
    "subject_blurred": (
        "place the focus on the subject",
        "focus on the subject itself",
        "set the focus point on the subject",
        "bring the focus plane to the subject",
        "refocus on the main subject",
        "shift the focus from the distance to the subject",
    ),
}

_PRAISE = {
    "hue": (
        "the {hue} look natural",
        "natural {hue} carry the picture",
        "the {hue} are rendered faithfully",
        "{hue} lead a believable palette",
        "the colour is natural, led by {hue}",
        "true {hue} set the mood",
    ),
    "colour": (
        "the colour is natural",
        "colours look true to life",
        "the palette is believable",
        "the colour balance is right",
        "the colours are pleasant and natural",
        "hues are rendered faithfully",
    ),
    "brightest": (
        "the light is strongest {at}",
        "the brightest area lies {at}",
        "bright light {at} leads the eye",
        "the eye goes first to the light {at}",
        "the highlights gather {at}",
        "most of the light falls {at}",
    ),
    "texture": ("{texture}",),
    "exposure": (
        "the exposure is well balanced",
        "the exposure is right",
        "brightness is well judged",
        "the light is well metered",
        "the exposure suits the scene",
        "the brightness is pleasing",
    ),
    "contrast": (
        "the tonal range is full",
        "the contrast is well judged",
        "tones run fully from black to white",
        "the contrast gives depth",
        "the tones are well graded",
        "forms are well modelled by the tones",
    ),
    "sharpness": (
        "fine detail is crisp",
        "the detail is sharp",
        "edges are crisp",
        "the focus is accurate",
        "the picture is sharp and clear",
        "textures are rendered crisply",
    ),
    "subject_sharp": (
        "the subject itself is crisp",
        "the focus on the subject is accurate",
        "the subject is sharp and clear",
        "the subject shows crisp detail",
    ),
    "noise": (
        "the tones are clean",
        "surfaces are clean",
        "the file is clean",
        "shadows stay clean",
        "the rendering is clean and smooth",
        "even areas are smooth and clean",
    ),
    "level": (
        "the camera is held level",
        "the frame is level",
        "the framing is straight",
        "the view stands upright",
    ),
}
_TEXTURES = {
    "busy": (
        "rich texture fills the frame",
        "there is a wealth of small detail",
        "dense texture covers the view",
        "the frame is full of structure",
    ),
    "calm": (
        "broad calm areas give the eye rest",
        "large quiet areas keep it simple",
        "the view is simple and open",
        "empty space keeps the view simple",
    ),
}
_PLACES = {
    "top": ("at the top", "in the upper part", "above"),
    "bottom": ("at the bottom", "in the lower part", "below"),
    "left": ("on the left", "on the left side", "to the left"),
    "right": ("on the right", "on the right side", "to the right"),
    "middle": ("in the middle", "in the middle of the frame", "around the middle"),
}
_NOTHING = (
    "nothing needs fixing",
    "there is nothing to correct",
    "no correction is needed",
    "it can stay as it is",
    "I would leave it as it is",
    "it needs no further work",
    "keep it as it is",
    "it is ready to print",
)
_OFF_CENTRE = (
    "a place off the middle would add tension",
    "moving it to one side would add tension",
    "try it off to one side for more life",
    "a step to one side would be less static",
)
_BUT = ("However, ", "Yet ", "But ", "Still, ", "Unfortunately, ", "On the other hand, ", "")
_PLUS = ("On the plus side, ", "Otherwise ", "At least ", "Even so, ", "What works: ", "In its favour, ")
_LISTS = ("It suffers from ", "The picture shows ", "Problems are ", "It is let down by ", "What hurts it: ", "I see ")
_FIX_STARTS = (
    "",
    "",
    "",
    "Next time, ",
    "To fix it, ",
    "Better: ",
    "I would ",
    "Try this: ",
    "In editing or in camera, ",
)
_COUNTS = ["five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen"]
_GOOD_DEPTH = "background_blurred"
_PLACEMENT = ASPECT_FAULTS["placement"]
_DRAWBACKS = frozenset(FAULTS) - {*_PLACEMENT[:3], _GOOD_DEPTH}


def _stops(exposure_value: float) -> str:
    for limit, words in ((0.8, "half a stop"), (1.2, "about one stop"), (1.4, "more than one stop")):
        if exposure_value < limit:
            return words
    for limit, words in ((1.65, "about one and a half stops"), (1.9, "almost two stops"), (2.2, "about two stops")):
        if exposure_value < limit:
            return words
    return "more than two stops"


def _fields(fault: str, strength: float, truth: Truth, rng: np.random.Generator) -> dict[str, str]:
    """The words of degree that belong to a fault of this strength."""
    level = 0 if strength < 1.35 else 1 if strength < 1.85 else 2
    adv = (("slightly", "somewhat"), ("clearly", "noticeably"), ("badly", "heavily"))[level]
    adj = (("slight", "faint", "mild"), ("clear", "distinct", "marked"), ("strong", "heavy", "severe"))[level]
    bit = (("a little", "a touch"), ("a good deal", "a fair bit"), ("a lot", "a great deal"))[level]
    some = (("a little", "a touch of"), ("some", "a fair amount of"), ("a lot of", "plenty of"))[level]
    if fault == "tilted":
        by = f"about {_COUNTS[int(np.clip(round(5 * strength), 5, 14)) - 5]} degrees"
    else:
        by = _stops(strength)
    size = f"{truth.size} " if truth.size else ""
    words = {"adv": _pick(adv, rng), "adj": _pick(adj, rng), "bit": _pick(bit, rng), "some": _pick(some, rng)}
    return words | {"by": by, "size": size}


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def _say(table: dict[str, tuple[str, ...]], fault: str, truth: Truth, rng: np.random.Generator) -> str:
    return _pick(table[fault], rng).format(**_fields(fault, truth.faults[fault], truth, rng))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


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
        text = _pick(_PRAISE[topic], rng)
        at = _pick(_PLACES[truth.brightest], rng) if truth.brightest else ""
        texture = _pick(_TEXTURES[truth.texture], rng) if truth.texture else ""
        said.append(text.format(hue=truth.hue, at=at, texture=texture))
    return said


def compose_caption(truth: Truth, rng: np.random.Generator) -> str:
    """One critique of a known truth: what is good, what is wrong, and a fix for each thing that is wrong."""
    drawbacks = [fault for fault in truth.faults if fault in _DRAWBACKS]
    rng.shuffle(drawbacks)
    placement = [fault for fault in truth.faults if fault in _PLACEMENT[:3]]
    good = [_say(_CLAUSES, fault, truth, rng) for fault in placement]
    good += [_say(_CLAUSES, fault, truth, rng) for fault in truth.faults if fault == _GOOD_DEPTH]
    wanted = (3, 2, 2, 1, 1)[min(len(drawbacks), 4)] - (len(good) > 1) - (len(good) > 0 and len(drawbacks) >= 3)
    good += _praise(truth, max(wanted, 0 if good else 1), rng)
    praise = _good_sentences(good, rng)
    if not drawbacks:
        ending = _pick(_OFF_CENTRE, rng) if "subject_centred" in placement and rng.random() < 0.5 else None
        return " ".join([praise, _sentence(ending or _pick(_NOTHING, rng))])
    if len(drawbacks) <= 2 and rng.random() < 0.35:
        return _paired(truth, drawbacks, praise, rng)
    bad, fix = _bad(truth, drawbacks, rng), _fix(truth, drawbacks, rng)
    if not praise:
        return f"{_cap(bad)} {fix}"
    if rng.random() < 0.6:
        return f"{praise} {_cap(_pick(_BUT, rng) + bad)} {fix}"
    plus = _pick(_PLUS, rng)
    return f"{_cap(bad)} {fix} {plus}{praise[0].lower() + praise[1:]}"


def _cap(text: str) -> str:
    return text[0].upper() + text[1:]


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
        problem, fix = _say(_CLAUSES, fault, truth, rng), _say(_FIXES, fault, truth, rng)
        pairs.append(_sentence(problem + _pick(("; ", ": ", ", so "), rng) + fix))
    parts = [praise, *pairs] if rng.random() < 0.6 else [*pairs, praise]
    return " ".join(part for part in parts if part)


def _bad(truth: Truth, drawbacks: list[str], rng: np.random.Generator) -> str:
    """What is wrong, as clauses for one or two faults and as a list for more; begins in lower case where it may."""
    listed = [fault for fault in drawbacks if fault in _NOUNS]
    told = [fault for fault in drawbacks if fault not in _NOUNS]
    if len(drawbacks) <= 2 or len(listed) < 2:
        listed, told = [], drawbacks
    sentences = []
    if told:
        sentences.append(_join([_say(_CLAUSES, fault, truth, rng) for fault in told], rng) + ".")
    if listed:
        nouns = [_say(_NOUNS, fault, truth, rng) for fault in listed]
        start = _pick(_LISTS, rng)
        if not sentences:
            start = start if start.startswith("I ") else start[0].lower() + start[1:]
        sentences.append(start + ", ".join(nouns[:-1]) + " and " + nouns[-1] + ".")
    return " ".join(sentences)


def _fix(truth: Truth, drawbacks: list[str], rng: np.random.Generator) -> str:
    fixes = [_say(_FIXES, fault, truth, rng) for fault in drawbacks]
    start = _pick(_FIX_STARTS, rng) if len(fixes) <= 3 else ""
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
    good = [_without_degree(_CLAUSES[fault][0]) for fault in present if fault not in _DRAWBACKS]
    if not any(fault in _PLACEMENT for fault in present):
        fine = [aspect for aspect in ("sharpness", "noise", "level") if known[ASPECT_FAULTS[aspect][0]] == 0]
        good += [_PRAISE[aspect][0] for aspect in fine[:1]]
    told = [_without_degree(_CLAUSES[fault][0]) for fault in present if fault in _DRAWBACKS and fault not in _NOUNS]
    nouns = [_NOUNS[fault][0] for fault in present if fault in _NOUNS]
    listed = [_LISTS[0].lower() + _plain_list(nouns)] if nouns else []
    fixes = [_without_degree(_FIXES[fault][0]) for fault in present if fault in _DRAWBACKS]
    ending = _plain_list(fixes) if fixes else _NOTHING[0]
    return " ".join(_sentence(text) for text in (*good, *told, *listed, ending))


def _without_degree(text: str) -> str:
    """'raise the exposure by {by}' -> 'raise the exposure'."""
    return re.sub(r"(?: by)? \{\w+\}", "", text.replace("{size}", ""))


def _plain_list(parts: list[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
