"""
What a budget of image tokens costs in quality: the same critic with all tokens, and with a share of them.

    python examples/critique/token_benchmark.py --record examples/ase-mini/TOKENS.md      # some minutes on a CPU
    python examples/critique/token_benchmark.py --train 8000 --record runs/TOKENS-trained.md     # and half an hour before it

With `--train` the critic first learns from so many more captions, with all tokens ("all" and the rows below) or, for the
rows that say so, within a budget drawn for each batch. Held-out pictures of the critique generator, one set for all rows. `diverse`, `uniform` and `saliency` are the model's own
selections; `random` chooses any, the control for all three. `recall`: macro recall of faults by what captions say,
without level and placement; `placement`: share of composites whose placement is named. Differences to all tokens are
those of the same pictures, with the standard error of their mean.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from critique_captions import ASPECT_FAULTS, named_faults
from critique_data import critique_dataset, load_sources
from evaluate_ase_mini import APART, BUNDLE, caption_set
from train_ase_mini import make_optimizer
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)


sys.path.insert(0, str(Path(__file__).parents[1]))

from ase_mllm import ASEDataCollator, image_tokens


BUDGETS = (0.5, 0.25, 0.11)
SELECTIONS = ("diverse", "uniform", "saliency", "random")


def choose_randomly(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    return torch.rand(quality.shape).topk(number, dim=1).indices


class BudgetTrainer(Trainer):
    """Draws a budget for each batch, from the smallest that is measured to all tokens."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            inputs = {**inputs, "image_token_budget": random.Random(self.state.global_step).uniform(min(BUDGETS), 1)}
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(kind: type[Trainer], model: PreTrainedModel, processor: Any, args: argparse.Namespace):
    """More of the bundled model's last stage: captions, with the saliency module as it is."""
    model.requires_grad_(True)
    model.model.iasm.requires_grad_(False)
    sources = load_sources("train", args.sources)
    rows = critique_dataset("train", args.train, seed=11, sources=sources, strength=(1.0, 1.6), composite_share=0.6)
    arguments = TrainingArguments(
        output_dir="runs/token-benchmark",
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=1,
        per_device_train_batch_size=16,
        lr_scheduler_type="cosine",
        save_strategy="no",
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )
    optimizer = make_optimizer(model, 3e-4, gates=10, iasm=0.5)
    collator = ASEDataCollator(processor)
    kind(model, arguments, train_dataset=rows, data_collator=collator, optimizers=(optimizer, None)).train()
    model.eval()


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
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS)
    parser.add_argument("--train", type=int, default=0, help="captions to learn from first")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--record", type=Path, help="write the table here, the figures beside it as JSON")
    args = parser.parse_args(argv)
    set_seed(args.seed)
    logging.set_verbosity_error()
    image_tokens._SELECT["random"] = choose_randomly
    processor = AutoProcessor.from_pretrained(args.model)
    rows = critique_dataset("test", args.samples, seed=args.seed, sources=load_sources("test", args.sources))
    results = {}
    for trainer in (Trainer, BudgetTrainer)[: 2 if args.train else 1]:
        model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=torch.float32).eval()
        if args.train:
            train(trainer, model, processor, args)
        said = ", trained within budgets" if trainer is BudgetTrainer else ""
        results[f"all{said}"] = figures_of(caption_set(model, processor, rows, args.batch_size))
        for budget in BUDGETS:
            for selection in args.selections:
                model.config.image_token_selection = selection
                found = caption_set(model, processor, rows, args.batch_size, image_token_budget=budget)
                results[f"{budget:.0%}, {selection}{said}"] = figures_of(found)
    after = f" after {args.train} more captions" if args.train else ""
    about = f"{args.samples} pictures, {Path(args.model).name}{after}; trained with all image tokens where nothing is said."
    table = as_markdown(results, about)
    print(table)
    if args.record:
        args.record.write_text(table + "\n", encoding="utf-8")
        means = {name: {key: float(np.nanmean(one)) for key, one in row.items()} for name, row in results.items()}
        args.record.with_suffix(".json").write_text(json.dumps(means, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
