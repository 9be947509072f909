"""
Measures the bundled model on held-out photographs and cut-outs, and writes the figures into its model card.

    python examples/critique/evaluate_ase_mini.py                                   # the card's figures, a few minutes on a CPU
    python examples/critique/evaluate_ase_mini.py --samples 40 --no-card            # a look

No photograph and no cut-out was seen in training. Two sets of pictures have faults: the generator's own from the least
strength up (`own edits`, as in training) and those of `foreign_edits.py`, by other means (`foreign edits`). What a text
names is read from its words by `critique_captions.named_aspects`. Besides, on photographs as they were taken: what is
said of them without cause, where the map lies, and whether the verdict stays what it is when the file is saved anew; and
what the text still says within a budget of image tokens.
Needs the extra `evaluation`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from critique_captions import ASPECT_FAULTS, ASPECTS, FAULTS, compose_verdict, named_aspects
from critique_data import PENALTIES, PHOTOMETRIC, critique_dataset, load_sources
from critique_pictures import MAP_SIZE
from foreign_edits import as_jpeg, make_foreign_sample
from huggingface_hub import EvalResult, ModelCard
from PIL import Image
from scipy.stats import rankdata, spearmanr
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import BUDGETS, critique, words, write_between
from metrics import caption_scores, cc, nss

import ase_mllm  # noqa: F401  (registers the Auto classes)


BUNDLE = Path(__file__).parents[1] / "ase-mini"
PHOTOS = Path(__file__).parents[1] / "photos"
APART = ("level", "placement")  # reported beside the macro average, not in it
PROTOCOL = "five references, composed of the truth; lower-case words, no punctuation; pycocoevalcap"


def answers_to(model, processor, images: Sequence[Image.Image], batch_size: int, **options) -> list[dict]:
    """Caption, score, aspects and map of each picture; `options` are those of `generate()`."""
    answers = []
    for start in tqdm(range(0, len(images), batch_size)):
        batch = images[start : start + batch_size]
        answers += critique(model, processor, batch, [(MAP_SIZE, MAP_SIZE)] * len(batch), **options)
    return answers


def caption_set(model, processor, rows: Sequence[dict], batch_size: int, **options) -> dict[str, list]:
    """Captions, scores, maps and truths of all rows."""
    truths = [rows[index] for index in range(len(rows))]
    answers = answers_to(model, processor, [row["image"] for row in truths], batch_size, **options)
    rng = np.random.default_rng(0)
    return {
        "caption": [answer["caption"] for answer in answers],
        "verdict": [verdict(answer) for answer in answers],
        "score": [answer["score"]["mean"] for answer in answers],
        "map": [answer["heat"].numpy() for answer in answers],
        "references": [[compose_verdict(present(row), rng) for _ in range(5)] for row in truths],
        "labels": [dict(zip(FAULTS, row["aspect_labels"])) for row in truths],
        "composite": [row["composite"] for row in truths],
        "true_score": [true_score(row) for row in truths],
        "mask": [row["saliency"] for row in truths],
    }


def verdict(answer: dict) -> set[str]:
    """What the labels say: every aspect at 0.5 or above."""
    return {name for name, share in answer["aspects"].items() if share >= 0.5}


def present(row: dict) -> set[str]:
    """All aspects that are known to be there."""
    return {name for name, label in zip(ASPECTS, row.get("aspects", row["aspect_labels"])) if label == 1}


def true_score(row: dict) -> float:
    """The generator's, or where it gave none, what the faults cost."""
    if any(row["score"]):
        return float(np.dot(row["score"], np.arange(1, 11)))
    return -sum(PENALTIES[fault] for fault in present(row) & PENALTIES.keys())


def fault_rates(captions: list[str], labels: list[dict[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Per aspect: share of present faults that are named, share of pictures without one where one is named, faults."""
    named = [named_aspects(caption) for caption in captions]
    rates = {}
    for aspect, faults in ASPECT_FAULTS.items():
        hits = [fault in names for names, truth in zip(named, labels) for fault in faults if truth[fault] == 1]
        clean = [
            bool(names & set(faults))
            for names, truth in zip(named, labels)
            if all(truth[fault] == 0 for fault in faults)
        ]
        rates[aspect] = (_mean(hits), _mean(clean), len(hits))
    return rates


def alarms_without_faults(captions: list[str], labels: list[dict[str, float]]) -> tuple[float, int]:
    """
    Mean of the aspects' false alarms over the pictures that have no fault of light, colour, detail or level, and how many.

    A fault brings others along that its maker does not know of: too little light, by a gamma curve, is harsh as well.
    """
    faults = [fault for aspect in PHOTOMETRIC for fault in ASPECT_FAULTS[aspect]]
    pairs = [pair for pair in zip(captions, labels) if not any(pair[1][fault] == 1 for fault in faults)]
    rates = fault_rates([caption for caption, _ in pairs], [truth for _, truth in pairs])
    alarms = [rates[aspect][1] for aspect in ASPECT_FAULTS if aspect not in APART]
    return _mean([alarm for alarm in alarms if not np.isnan(alarm)]), len(pairs)


def _mean(values: list) -> float:
    return float(np.mean(values)) if values else float("nan")


def area_under_roc(values: np.ndarray, positive: np.ndarray) -> float:
    hits, misses = positive.sum(), (~positive).sum()
    return float((rankdata(values)[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))


def saliency_scores(maps: list[np.ndarray], masks: list[np.ndarray]) -> dict[str, float]:
    """CC, NSS and AUC against subject masks; the positions that the subject covers by half count as looked at."""
    rows = []
    for saliency, mask in zip(maps, masks):
        looked_at = mask > 0.5
        if 0 < looked_at.sum() < looked_at.size:
            area = area_under_roc(saliency.ravel(), looked_at.ravel())
            rows.append((cc(saliency, mask), nss(saliency, looked_at), area))
    return dict(zip(("CC", "NSS", "AUC"), np.mean(rows, axis=0).tolist())) | {"pictures": len(rows)}


def measure_edits(found: dict[str, list], centre: np.ndarray) -> dict:
    """Figures of one set of pictures with faults."""
    rates = fault_rates(found["caption"], found["labels"])
    pasted = [index for index, composite in enumerate(found["composite"]) if composite]
    plain = [index for index, composite in enumerate(found["composite"]) if not composite]

    def of(indices: list[int]) -> tuple[float, float, int]:
        return fault_rates([found["caption"][i] for i in indices], [found["labels"][i] for i in indices])["placement"]

    macro = [rates[aspect] for aspect in ASPECT_FAULTS if aspect not in APART]
    subject = [i for i, labels in enumerate(found["labels"]) if labels["subject_blurred"] == 1]
    said = [named_aspects(caption) for caption in found["caption"]]
    shuffled = found["references"][1:] + found["references"][:1]  # rows are independent: the next is a wrong photo
    masks = [found["mask"][i] for i in pasted]
    return {
        "pictures": len(said),
        "aspects": {**rates, "placement, composites": of(pasted), "placement, photographs": of(plain)},
        "macro recall": _mean([recall for recall, _, _ in macro]),
        "mean false alarm": _mean([alarm for _, alarm, _ in macro]),
        "faultless": alarms_without_faults(found["caption"], found["labels"]),
        "subject blurred": (_mean(["subject_blurred" in said[i] for i in subject]), len(subject)),
        "text": caption_scores(found["caption"], found["references"]),
        "wrong photo": caption_scores(found["caption"], shuffled),
        "length ratio": _mean([len(words(text)) for text in found["caption"]])
        / _mean([len(words(text)) for texts in found["references"] for text in texts]),
        "SRCC": float(spearmanr(found["score"], found["true_score"]).statistic),
        "saliency": saliency_scores([found["map"][i] for i in pasted], masks),
        "centre bias": saliency_scores([centre] * len(masks), masks),
        "agreement": _mean([names == labels for names, labels in zip(said, found["verdict"], strict=True)]),
    }


def measure_photographs(model, processor, test, train, batch_size: int) -> dict:
    """Figures of the held-out photographs as they were taken."""
    photos = [photo for photo in test.photos if photo.mask is not None]
    answers = answers_to(model, processor, [photo.raw for photo in test.photos], batch_size)
    masks = [_small(photo.mask) for photo in photos]
    maps = [answer["heat"].numpy() for answer, photo in zip(answers, test.photos) if photo.mask is not None]
    centre = np.mean([_small(photo.mask) for photo in train.photos if photo.mask is not None], axis=0)
    faults = [[bool(verdict(answer) & set(ASPECT_FAULTS[aspect])) for answer in answers] for aspect in PHOTOMETRIC]
    return {
        "photographs": len(answers),
        "false alarms": dict(zip(PHOTOMETRIC, map(_mean, faults))),
        "mean false alarm": float(np.mean(faults)),
        "masks": len(masks),
        "saliency": saliency_scores(maps, masks),
        "centre bias": saliency_scores([centre] * len(masks), masks),
    }


def _small(mask: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(mask).resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BOX))


def measure_copies(model, processor, photos: list[Image.Image], batch_size: int) -> dict[str, float]:
    """Share of the photographs whose verdict is the same from another file, and of those in grey that are called muted."""
    copies = {
        "JPEG 95": [as_jpeg(photo, 95) for photo in photos],
        "JPEG 85": [as_jpeg(photo, 85) for photo in photos],
        "at 90 % size": [photo.resize((photo.width * 9 // 10, photo.height * 9 // 10)) for photo in photos],
    }
    first = [verdict(answer) for answer in answers_to(model, processor, photos, batch_size)]
    same = {}
    for name, images in copies.items():
        again = [verdict(answer) for answer in answers_to(model, processor, images, batch_size)]
        same[name] = _mean([one == other for one, other in zip(first, again)])
    grey = answers_to(model, processor, [photo.convert("L").convert("RGB") for photo in photos], batch_size)
    return same | {"monochrome called muted": _mean(["muted" in verdict(answer) for answer in grey])}


def as_markdown(figures: dict) -> str:
    """The card's tables."""
    sets = [figures["own edits"], figures["foreign edits"]]
    names = ("own edits", "foreign edits")
    lines = ["| aspect | " + " | ".join(f"recall, {name} | false alarms | faults" for name in names) + " |"]
    lines.append("|---" * (1 + 3 * len(sets)) + "|")
    for aspect in sets[0]["aspects"]:
        cells = [f"{r:.0%} | {a:.1%} | {n}" for r, a, n in (one["aspects"][aspect] for one in sets)]
        lines.append(f"| {aspect.replace('_', ' ')} | " + " | ".join(cells).replace("nan%", "-") + " |")
    macro = [f"{one['macro recall']:.0%} | {one['mean false alarm']:.1%} | " for one in sets]
    lines += ["| **macro** (without level and placement) | " + " | ".join(macro) + " |", ""]
    lines += ["| figure | " + " | ".join(names) + " |", "|---" * (1 + len(sets)) + "|"]
    rows = {
        "false alarms, no fault of light, colour, detail or level": [
            "{:.1%} of {}".format(*one["faultless"]) for one in sets
        ],
        "text says just what the labels say": [f"{one['agreement']:.0%}" for one in sets],
        "subject blurred, named": ["{:.0%} of {}".format(*one["subject blurred"]) for one in sets],
        "score SRCC": [f"{one['SRCC']:.3f}" for one in sets],
    }
    for metric in ("AUC", "NSS", "CC"):
        pairs = [(one["saliency"][metric], one["centre bias"][metric]) for one in sets]
        rows[f"saliency {metric}, composites"] = [f"{own:.3f} (centre bias {bias:.3f})" for own, bias in pairs]
    for metric in ("CIDEr", "BLEU-4", "ROUGE-L"):
        rows[metric] = [f"{one['text'][metric]:.3f} (wrong photo {one['wrong photo'][metric]:.3f})" for one in sets]
    rows["caption length / reference length"] = [f"{one['length ratio']:.2f}" for one in sets]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    raw, copies = figures["photographs"], figures["copies"]
    lines += ["", f"| {raw['photographs']} held-out photographs as they were taken | |", "|---|---|"]
    lines.append(f"| a fault is named, mean of {len(raw['false alarms'])} aspects | {raw['mean false alarm']:.1%} |")
    for metric in ("AUC", "NSS", "CC"):
        own, bias = raw["saliency"][metric], raw["centre bias"][metric]
        lines.append(f"| saliency {metric}, {raw['masks']} with a mask | {own:.3f} (centre bias {bias:.3f}) |")
    lines += [f"| same verdict, {name} | {share:.0%} |" for name, share in copies.items() if "muted" not in name]
    lines.append(f"| the bundled photographs in grey, called muted | {copies['monochrome called muted']:.0%} |")
    lines += [
        "",
        "| image tokens, own edits | macro recall | false alarms | text says just what the labels say |",
        "|---|---|---|---|",
    ]
    for share, one in {"all": sets[0], **figures["budgets"]}.items():
        lines.append(
            f"| {share} | {one['macro recall']:.0%} | {one['mean false alarm']:.1%} | {one['agreement']:.0%} |"
        )
    pictures = ", ".join(f"{one['pictures']} pictures with {name}" for name, one in zip(names, sets))
    about = f"Text metrics: {PROTOCOL}. Measured on {pictures}. {figures['parameters'] / 1e6:.2f} million parameters."
    return "\n".join([*lines, "", about])


def write_card(path: Path, figures: dict) -> None:
    """Puts the tables between the card's marks and the main figures into its metadata."""
    write_between(path, "<!-- figures: begin -->", "<!-- figures: end -->", as_markdown(figures))
    card = ModelCard.load(path)
    name, measured = "own edits", figures["own edits"]
    values = {
        "macro fault recall": measured["macro recall"],
        "CIDEr": measured["text"]["CIDEr"],
        "BLEU-4": measured["text"]["BLEU-4"],
        "ROUGE-L": measured["text"]["ROUGE-L"],
        "score SRCC": measured["SRCC"],
        "saliency AUC": measured["saliency"]["AUC"],
    }
    card.data.model_name = "ase-mini"
    card.data.eval_results = [
        EvalResult(
            task_type="image-text-to-text",
            dataset_type="critique-generator",
            dataset_name=f"critique generator, held-out sources, {name}",
            dataset_split="test",
            metric_type=metric.replace(" ", "_").lower(),
            metric_name=metric,
            metric_value=round(value, 4),
        )
        for metric, value in values.items()
    ]
    card.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLE))
    parser.add_argument("--samples", type=int, default=800, help="pictures of each set")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    parser.add_argument(
        "--card", action=argparse.BooleanOptionalAction, default=True, help="write into the model card"
    )
    args = parser.parse_args()

    # Model
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()

    # Data
    test, train = load_sources("test", args.sources), load_sources("train", args.sources)
    own = critique_dataset("test", args.samples, seed=args.seed, sources=test)
    own = [own[index] for index in range(len(own))]  # made once for all that is measured on them
    foreign = [make_foreign_sample(index, "test", args.seed, test) for index in range(args.samples)]
    train_rows = critique_dataset("train", min(args.samples, 500), seed=args.seed, sources=train)
    centre = np.mean([np.asarray(train_rows[i]["saliency"]) for i in range(len(train_rows))], axis=0)
    bundled = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.jpg"))]

    # Run
    figures = {
        name: measure_edits(caption_set(model, processor, rows, args.batch_size), centre)
        for name, rows in (("own edits", own), ("foreign edits", foreign))
    }
    figures["budgets"] = {
        f"{budget:.0%}": measure_edits(
            caption_set(model, processor, own, args.batch_size, image_token_budget=budget), centre
        )
        for budget in BUDGETS
    }
    figures["photographs"] = measure_photographs(model, processor, test, train, args.batch_size)
    figures["copies"] = measure_copies(model, processor, bundled, args.batch_size)
    figures["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    print(as_markdown(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if args.card:
        write_card(Path(args.model) / "README.md", figures)


if __name__ == "__main__":
    main()
