"""What the critique benchmark counts as right, its figures, and their tables: mean ± standard deviation over seeds."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critique_captions import ASPECT_FAULTS, FAULTS
from evaluate_ase_mini import saliency_scores


READ = 6  # the layer that the saliency module reads, counted from 1
PLACED = ("placement", "depth", "subject sharpness")  # what has a place in the picture
Figures = dict[tuple[str, int, int], dict[str, dict[str, float]]]  # of each arm, number of captions, seed and test
ASPECTS = (*ASPECT_FAULTS, "subject sharpness")
GROUPS = {
    "all": tuple(ASPECT_FAULTS),
    "placed": PLACED,
    "elsewhere": tuple(a for a in ASPECT_FAULTS if a not in PLACED),
}
# a difference of these says nothing
ALONE = ("CIDEr, wrong photo", "map AUC, centre bias", "gates", "parameters, M", "training, s")
FRACTIONS = ("CIDEr", "BLEU", "map", "gates")  # the others are points, millions or seconds


def decide(values: list[float]) -> set[str]:
    """The faults that a head's logits name: the likeliest of an aspect, if likelier than not; a placement always."""
    named, logits = set(), dict(zip(FAULTS, values))
    for aspect, faults in ASPECT_FAULTS.items():
        likeliest = max(faults, key=logits.get)
        if logits[likeliest] > 0 or aspect == "placement":
            named.add(likeliest)
    return named


def accuracies(named: list[set[str]], truths: list[dict[str, float]], composite: list[bool]) -> dict[str, float]:
    """
    Balanced accuracy of each aspect: the mean over its faults, and over "none of them", of how often exactly that is said.

    Only pictures of which the truth is known count; for placement and depth, composites.
    """
    result = {}
    for aspect, (states, hits) in hits_of(named, truths, composite).items():
        recalls = [hits[states == state].mean() for state in range(states.max(initial=-1) + 1)]
        result[aspect] = float(np.mean(recalls)) if recalls else float("nan")
    return result


def hits_of(
    named: list[set[str]], truths: list[dict[str, float]], composite: list[bool]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of each aspect, the number of the state that each picture is in (-1: does not count), and whether just that is said."""
    result = {}
    for aspect, faults in {**ASPECT_FAULTS, "subject sharpness": ("subject_blurred",)}.items():
        numbers, states, hits = {}, [], []
        for said, truth, pasted in zip(named, truths, composite):
            present = frozenset(fault for fault in faults if truth[fault] == 1)
            known = all(truth[fault] >= 0 for fault in faults) and (pasted or aspect not in PLACED)
            states.append(numbers.setdefault(present, len(numbers)) if known else -1)
            hits.append(present == said & set(faults))
        result[aspect] = np.array(states, int), np.array(hits, bool)
    return result


def measure_maps(maps: list[torch.Tensor], truths: list[np.ndarray]) -> dict[str, float]:
    size = truths[0].shape
    resized = F.interpolate(torch.stack(maps).unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    scores = saliency_scores([saliency[0].numpy() for saliency in resized], truths)
    centre = saliency_scores([np.mean(truths, axis=0)] * len(truths), truths)
    return {**scores, "centre bias AUC": centre["AUC"]}


def figures_of(result: dict[str, Any], test: str) -> dict[str, float]:
    """The figures of one run on one test, without those that it cannot have; accuracies in points."""
    measured, figures = result[test], {}
    for name, source in {
        "captions": "accuracy",
        "heads": "accuracy of the heads",
        "IASM": "accuracy of the IASM",
    }.items():
        for group, aspects in GROUPS.items():
            accuracy = measured.get(source, {})
            figures[f"{name}: {group}"] = 100 * np.mean([accuracy.get(aspect, np.nan) for aspect in aspects])
    for name, source in {
        "CIDEr": "text",
        "CIDEr, composites": "text, composites",
        "CIDEr, wrong photo": "wrong photo",
    }.items():
        figures[name] = measured.get(source, {}).get("CIDEr", np.nan)
    figures["BLEU-4"] = measured.get("text", {}).get("BLEU-4", np.nan)
    saliency = measured["saliency"] or {}
    for name in ("AUC", "NSS", "CC"):
        figures[f"map {name}"] = saliency.get(name, np.nan)
    figures["map AUC, centre bias"] = saliency.get("centre bias AUC", np.nan)
    figures |= {aspect: 100 * measured.get("accuracy", {}).get(aspect, np.nan) for aspect in ASPECTS}
    figures |= {f"heads: {aspect}": 100 * measured["accuracy of the heads"][aspect] for aspect in ASPECTS}
    figures["gates"] = np.mean(np.abs(result["gates"])) if result["gates"] else np.nan
    figures["parameters, M"] = result["parameters"] / 1e6
    figures["training, s"] = result["seconds of training"]
    return {name: float(value) for name, value in figures.items() if not np.isnan(value)}


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(head: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    lines = [[head, *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows)]
    return ["", *("| " + " | ".join(cells) + " |" for cells in lines)] if columns and rows else []


def as_markdown(figures: Figures, samples: int, settings: dict[str, Any], order: tuple[str, ...]) -> str:
    """Arms in this order; differences are those of the same seed."""
    arms = [arm for arm in order if any(one == arm for one, *_ in figures)]
    seeds = sorted({seed for *_, seed in figures})
    tests = list(next(iter(figures.values())))

    def over_seeds(test: str, name: str, arm: str, other: str | None = None, number: int = samples) -> str:
        one = [figures.get((arm, number, seed), {}).get(test, {}) for seed in seeds]
        less = [figures.get((other, number, seed), {}).get(test, {}) if other else {name: 0.0} for seed in seeds]
        values = [a[name] - b[name] for a, b in zip(one, less) if name in a and name in b]
        return spread(values, 3 if name.startswith(FRACTIONS) else 1)

    lines = [about(seeds, samples, settings)]
    others = [arm for arm in arms if arm != "ase"] if "ase" in arms else []
    for test in tests:
        names = list(max((one[test] for one in figures.values()), key=len))
        rows = [(name, [over_seeds(test, name, arm) for arm in arms]) for name in names]
        lines += table(f"figure ({test})", arms, rows)
        rows = [(name, [over_seeds(test, name, "ase", arm) for arm in others]) for name in names if name not in ALONE]
        lines += table(f"difference ({test})", [f"ase - {arm}" for arm in others], rows)
    numbers = sorted({number for _, number, _ in figures})
    if len(numbers) > 1:
        curve = [arm for arm in arms if sum(one == arm for one, *_ in figures) > len(seeds)]
        shown = [(arm, name) for arm in curve for name in ("captions: placed", "captions: elsewhere", "heads: placed")]
        rows = [
            (f"{arm}, {name}", [over_seeds(tests[0], name, arm, number=n) for n in numbers]) for arm, name in shown
        ]
        lines += table(f"captions to learn from ({tests[0]})", [str(number) for number in numbers], rows)
    return "\n".join(lines)


def about(seeds: list[int], samples: int, settings: dict[str, Any]) -> str:
    """What the figures of the tables are, and what was run for them."""
    told = {"none": ", without labels of aspects", "words": ", aspects are words of captions"}.get(
        settings.get("labels"), ""
    )
    trained = f"its layers above the {READ}th trained along" if settings["train_encoder"] else "frozen"
    return (
        f"Seeds {', '.join(map(str, seeds))}; {settings['warm_up']} + {settings['vision_samples']} + {samples} samples of "
        f"{settings['pictures']} pictures{told}, {settings['batch_size']} at a time; tested on {settings['test_pictures']} of each kind. The encoder is "
        f"{settings['encoder']}, {trained}; arms without a layer in their name read layer {settings['layer']}. The language "
        f"model is that in the weights of SHA-256 {settings['base'][:12]}. Balanced accuracy in points, mean ± standard "
        f"deviation over seeds: `captions`, and each aspect, of what captions say, `placed` the mean of {', '.join(PLACED)}, "
        "`elsewhere` of the other aspects; `heads` on the image features; `IASM` its own. CIDEr and BLEU-4 against one "
        "reference, the caption of the truth in the same fixed form. Maps against the exact masks of composites. `gates`: "
        "mean size of their tanh."
    )
