"""
Measures the bundled model on held-out photographs and cut-outs, and writes the figures into its model card.

    python examples/critique/evaluate_ase_mini.py                                   # the card's figures, a few minutes on a CPU
    python examples/critique/evaluate_ase_mini.py --samples 40 --no-card            # a look

The pictures come from the critique generator's test split, so no photograph and no cut-out was seen in training. Needs
the extra `evaluation`. Two sets are measured: faults "from the least strength that counts up" (as in training) and faults
"at the least strength". What a caption names is read from its words by `critique_captions.named_faults`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from critique_captions import ASPECT_FAULTS, FAULTS, named_faults
from critique_data import critique_dataset, load_sources
from huggingface_hub import EvalResult, ModelCard
from scipy.stats import rankdata, spearmanr
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import critique, words, write_between
from metrics import caption_scores, cc, nss

import ase_mllm  # noqa: F401  (registers the Auto classes)


BUNDLE = Path(__file__).parents[1] / "ase-mini"
SETS = {"from the least strength up": (1.0, 2.5), "at the least strength": (1.0, 1.0)}
APART = ("level", "placement")  # reported beside the macro average, not in it
PROTOCOL = "all five references; lower-case words, no punctuation; pycocoevalcap"


def caption_set(model, processor, rows, batch_size: int, **options) -> dict[str, list]:
    """Captions, scores, maps and truths of all rows; `options` are those of `generate()`."""
    answers, truths = [], [rows[index] for index in range(len(rows))]
    for start in tqdm(range(0, len(rows), batch_size)):
        images = [row["image"] for row in truths[start : start + batch_size]]
        answers += critique(model, processor, images, [(32, 32)] * len(images), **options)
    return {
        "caption": [answer["caption"] for answer in answers],
        "score": [answer["score"]["mean"] for answer in answers],
        "map": [answer["heat"].numpy() for answer in answers],
        "references": [row["references"] for row in truths],
        "labels": [dict(zip(FAULTS, row["aspect_labels"])) for row in truths],
        "composite": [row["composite"] for row in truths],
        "true_score": [float(np.dot(row["score"], np.arange(1, 11))) for row in truths],
        "mask": [row["saliency"] for row in truths],
    }


def fault_rates(captions: list[str], labels: list[dict[str, float]]) -> dict[str, tuple[float, float, int]]:
    """Per aspect: share of present faults that are named, share of pictures without one where one is named, faults."""
    named = [named_faults(caption) for caption in captions]
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


def measure(model, processor, split_rows: dict, train_rows, batch_size: int) -> dict:
    """All figures, by set."""
    centre = np.mean([np.asarray(train_rows[i]["saliency"]) for i in range(len(train_rows))], axis=0)
    figures = {}
    for name, rows in split_rows.items():
        found = caption_set(model, processor, rows, batch_size)
        rates = fault_rates(found["caption"], found["labels"])
        pasted = [index for index, composite in enumerate(found["composite"]) if composite]
        placed = fault_rates([found["caption"][i] for i in pasted], [found["labels"][i] for i in pasted])["placement"]
        macro = [rates[aspect] for aspect in ASPECT_FAULTS if aspect not in APART]
        shuffled = found["references"][1:] + found["references"][:1]  # rows are independent: the next is a wrong photo
        figures[name] = {
            "pictures": len(rows),
            "aspects": {**rates, "placement, composites": placed},
            "macro recall": _mean([recall for recall, _, _ in macro]),
            "largest false alarm": max(alarm for _, alarm, _ in macro),
            "text": caption_scores(found["caption"], found["references"]),
            "wrong photo": caption_scores(found["caption"], shuffled),
            "length ratio": _mean([len(words(text)) for text in found["caption"]])
            / _mean([len(words(text)) for texts in found["references"] for text in texts]),
            "SRCC": float(spearmanr(found["score"], found["true_score"]).statistic),
            "saliency": saliency_scores(found["map"], found["mask"]),
            "centre bias": saliency_scores([centre] * len(rows), found["mask"]),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }
    return figures


def as_markdown(figures: dict) -> str:
    """The card's tables."""
    sets = list(figures.values())
    lines = ["| aspect | " + " | ".join(f"recall, {name} | false alarms | faults" for name in figures) + " |"]
    lines.append("|---" * (1 + 3 * len(sets)) + "|")
    for aspect in sets[0]["aspects"]:
        cells = [f"{r:.0%} | {a:.1%} | {n}" for r, a, n in (one["aspects"][aspect] for one in sets)]
        lines.append(f"| {aspect.replace('_', ' ')} | " + " | ".join(cells).replace("nan%", "-") + " |")
    macro = [f"{one['macro recall']:.0%} | at most {one['largest false alarm']:.1%} | " for one in sets]
    lines += ["| **macro** (without level and placement) | " + " | ".join(macro) + " |", ""]
    lines += ["| figure | " + " | ".join(figures) + " |", "|---" * (1 + len(sets)) + "|"]
    rows = {
        metric: [f"{one['text'][metric]:.3f} (wrong photo {one['wrong photo'][metric]:.3f})" for one in sets]
        for metric in ("CIDEr", "BLEU-4", "ROUGE-L")
    }
    rows["caption length / reference length"] = [f"{one['length ratio']:.2f}" for one in sets]
    rows["score SRCC"] = [f"{one['SRCC']:.3f}" for one in sets]
    for metric in ("AUC", "NSS", "CC"):
        pairs = [(one["saliency"][metric], one["centre bias"][metric]) for one in sets]
        rows[f"saliency {metric}"] = [f"{own:.3f} (centre bias {bias:.3f})" for own, bias in pairs]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    pictures = ", ".join(f"{one['pictures']} pictures {name}" for name, one in figures.items())
    about = f"Text metrics: {PROTOCOL}. Measured on {pictures}. {sets[0]['parameters'] / 1e6:.2f} million parameters."
    return "\n".join([*lines, "", about])


def write_card(path: Path, figures: dict) -> None:
    """Puts the tables between the card's marks and the main figures into its metadata."""
    write_between(path, "<!-- figures: begin -->", "<!-- figures: end -->", as_markdown(figures))
    card = ModelCard.load(path)
    name, measured = next(iter(figures.items()))
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
    rows = {
        name: critique_dataset("test", args.samples, seed=args.seed, sources=test, strength=strength)
        for name, strength in SETS.items()
    }
    train_rows = critique_dataset("train", min(args.samples, 500), seed=args.seed, sources=train)

    # Run
    figures = measure(model, processor, rows, train_rows, args.batch_size)
    print(as_markdown(figures))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    if args.card:
        write_card(Path(args.model) / "README.md", figures)


if __name__ == "__main__":
    main()
