"""
What a budget of image tokens costs in quality: the same critic with all tokens, and with a share of them.

    python examples/critique/token_benchmark.py --record examples/ase-mini/TOKENS.md      # some minutes on a CPU

Held-out pictures of the critique generator, one set for all rows. `diverse`, `uniform` and `saliency` are the model's own
selections; `random` chooses any, the control for all three. `recall`: macro recall of faults by what captions say,
without level and placement; `placement`: share of composites whose placement is named. Differences to all tokens are
those of the same pictures, with the standard error of their mean.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from critique_captions import ASPECT_FAULTS, named_faults
from critique_data import critique_dataset, load_sources
from evaluate_ase_mini import APART, BUNDLE, caption_set
from transformers import AutoModelForImageTextToText, AutoProcessor, logging, set_seed


sys.path.insert(0, str(Path(__file__).parents[1]))

import ase_mllm  # noqa: F401  (registers the Auto classes)
from ase_mllm import image_tokens


BUDGETS = (0.5, 0.25, 0.11)
SELECTIONS = ("diverse", "uniform", "saliency", "random")


def choose_randomly(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    return torch.rand(quality.shape).topk(number, dim=1).indices


def figures_of(found: dict[str, list]) -> dict[str, np.ndarray]:
    """Of each picture, the share of its faults that is named, and whether its placement is; nan where there is none."""
    rows = []
    for caption, labels, composite in zip(found["caption"], found["labels"], found["composite"]):
        named = named_faults(caption)
        faults = [f for aspect, names in ASPECT_FAULTS.items() if aspect not in APART for f in names if labels[f] == 1]
        placed = [f for f in ASPECT_FAULTS["placement"] if labels[f] == 1] if composite else []
        shares = ([fault in named for fault in one] for one in (faults, placed))
        rows.append([np.mean(share) if share else np.nan for share in shares])
    recall, placement = np.array(rows).T
    return {"recall": recall, "placement": placement}


def as_markdown(results: dict[str, dict[str, np.ndarray]], about: str) -> str:
    lines = [about, "", "| tokens | recall | less than all | placement | less than all |", "|---|---|---|---|---|"]
    whole = results["all"]
    for name, figures in results.items():
        cells = []
        for figure, values in figures.items():
            difference = values - whole[figure]
            known = difference[~np.isnan(difference)]
            error = known.std(ddof=1) / len(known) ** 0.5
            cells += [f"{np.nanmean(values):.3f}", "-" if name == "all" else f"{-known.mean():.3f} ± {error:.3f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUNDLE))
    parser.add_argument("--samples", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--record", type=Path, help="write the table here, the figures beside it as JSON")
    args = parser.parse_args(argv)
    set_seed(args.seed)
    logging.set_verbosity_error()
    image_tokens._SELECT["random"] = choose_randomly
    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
    rows = critique_dataset("test", args.samples, seed=args.seed, sources=load_sources("test", args.sources))
    results = {"all": figures_of(caption_set(model, processor, rows, args.batch_size))}
    for budget in BUDGETS:
        for selection in SELECTIONS:
            model.config.image_token_selection = selection
            found = caption_set(model, processor, rows, args.batch_size, image_token_budget=budget)
            results[f"{budget:.0%}, {selection}"] = figures_of(found)
    about = f"{args.samples} pictures, {Path(args.model).name}, which was trained with all of its image tokens."
    table = as_markdown(results, about)
    print(table)
    if args.record:
        args.record.write_text(table + "\n", encoding="utf-8")
        means = {name: {key: float(np.nanmean(one)) for key, one in row.items()} for name, row in results.items()}
        args.record.with_suffix(".json").write_text(json.dumps(means, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
