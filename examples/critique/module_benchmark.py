"""
What should the saliency module read? The module alone, on frozen states of a pretrained encoder, or on pixels.

    python examples/critique/module_benchmark.py --encoder runs/dinov2-small --record examples/ase-mini/MODULE.md

`convert_dinov2.py` makes that encoder. All arms have the same pictures of the critique generator, labels, order, steps
and about the same size, and are tested on held-out photographs and cut-outs:

    photometry    photometry of the pixels alone
    backbone      the same and a ConvNeXt of its own, trained from scratch
    layer-4, -6, -8, -12    the same and the states of this layer of the encoder (counted from 1, of 12)
    layers-4-8    two of them
    layer-8-random    states of an encoder with random weights

`map`: AUC and CC against the exact masks of composites. `placement`: balanced accuracy of four classes, composites.
`real map`, `real placement`: the same on photographs whose own subject is known (masks of the focus network that the
encoder was taken from; `centre` is what their mean as a map for all would reach).
`elsewhere`: balanced accuracy of the aspects without a place, by the module's head. `score`: Spearman's correlation of
mean scores. `blurred subject`: AUC. `parameters`: of the module itself, in millions.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critique_benchmark import make_pictures
from critique_captions import ASPECT_FAULTS, FAULTS
from critique_tables import PLACED, accuracies, decide
from evaluate_ase_mini import area_under_roc, saliency_scores
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from train_ase_mini import WEIGHTS, make_optimizer
from transformers import AutoConfig, AutoModel, set_seed
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ase_mllm import IASMConfig, ImageAestheticSaliencyModule


SIZE = 224  # pixels of the encoder's pictures; the module sees them at 192
LAYERS = (4, 6, 8, 12)
ARMS = {
    "photometry": {},
    "backbone": {
        "backbone_config": {
            "model_type": "convnextv2",
            "hidden_sizes": [24, 48, 96, 128],
            "depths": [1, 1, 2, 1],
            "out_features": ["stage1", "stage2", "stage3", "stage4"],
        }
    },
    **{f"layer-{layer}": {"encoder_layers": [layer - 1]} for layer in LAYERS},
    "layers-4-8": {"encoder_layers": [3, 7]},
    "layer-8-random": {"encoder_layers": [7]},
}
FIGURES = ("map AUC", "map CC", "placement", "real map AUC", "real map CC", "real placement", "elsewhere", "score",
           "blurred subject", "parameters")  # fmt: skip


def normalised(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def read_states(encoder: Path, images: torch.Tensor, random: bool) -> dict[str, torch.Tensor]:
    """The states of `LAYERS` at their places, half precision `(n, width, rows, columns)`, by layer from 1."""
    set_seed(0)
    model = (
        AutoModel.from_config(AutoConfig.from_pretrained(encoder)) if random else AutoModel.from_pretrained(encoder)
    )
    states = {str(layer): [] for layer in LAYERS}
    for batch in images.split(25):
        hidden = model.eval()(normalised(batch), output_hidden_states=True).hidden_states
        for layer, kept in states.items():
            patches = hidden[int(layer)][:, 1:]  # without the class token
            side = round(patches.shape[1] ** 0.5)
            kept.append(patches.transpose(1, 2).unflatten(2, (side, side)).half())
    return {layer: torch.cat(kept) for layer, kept in states.items()}


def build(arm: str, width: int) -> ImageAestheticSaliencyModule:
    settings = dict(ARMS[arm])
    settings.setdefault("encoder_layers", [])
    return ImageAestheticSaliencyModule(
        IASMConfig(
            **settings,
            encoder_hidden_sizes=[width] * len(settings["encoder_layers"]),
            image_size=192,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
            hidden_size=128,
            num_attention_heads=4,
            aspect_names=list(FAULTS),
            **WEIGHTS,
        )
    )


def train(iasm: ImageAestheticSaliencyModule, data: dict, states: dict, args: argparse.Namespace, seed: int):
    """The module alone, `--steps` batches."""
    optimizer = make_optimizer(iasm, args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=args.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(seed)
    number = len(data["image"])
    order = torch.cat(
        [torch.randperm(number, generator=generator) for _ in range(1 + args.steps * args.batch_size // number)]
    )
    for step in range(args.steps):
        rows = order[step * args.batch_size : (step + 1) * args.batch_size]
        loss = iasm.train()(
            normalised(data["image"][rows]),
            score_targets=data["score"][rows],
            saliency_targets=data["saliency"][rows],
            aspect_targets=data["aspect_labels"][rows],
            encoder_states=[states[str(layer + 1)][rows].float() for layer in iasm.config.encoder_layers],
        ).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(iasm.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.inference_mode()
def answer(iasm: ImageAestheticSaliencyModule, data: dict, states: dict) -> tuple[list, list, list]:
    """Maps (32, 32), aspect logits and mean scores of all pictures."""
    maps, logits, scores = [], [], []
    for rows in torch.arange(len(data["image"])).split(50):
        outputs = iasm.eval()(
            normalised(data["image"][rows]),
            encoder_states=[states[str(layer + 1)][rows].float() for layer in iasm.config.encoder_layers],
        )
        maps.append(F.interpolate(outputs.saliency_maps[:, None], size=(32, 32), mode="bilinear")[:, 0])
        logits += outputs.aspect_logits.tolist()
        scores += (outputs.score_logits.softmax(-1) @ torch.arange(1.0, 11)).tolist()
    return [one.numpy() for one in torch.cat(maps)], logits, scores


def measure(iasm: ImageAestheticSaliencyModule, data: dict, states: dict) -> dict[str, float]:
    maps, logits, scores = answer(iasm, data, states)
    labels, composite = data["aspect_labels"], data["composite"].bool().tolist()
    truths = [dict(zip(FAULTS, row)) for row in labels.tolist()]
    pasted = [i for i, one in enumerate(composite) if one]
    accuracy = accuracies([decide(row) for row in logits], truths, composite)
    saliency = saliency_scores([maps[i] for i in pasted], [data["saliency"][i].numpy() for i in pasted])
    blurred = [i for i in pasted if truths[i]["subject_blurred"] >= 0]
    column = list(FAULTS).index("subject_blurred")
    return {
        "map AUC": saliency["AUC"],
        "map CC": saliency["CC"],
        "placement": accuracy["placement"],
        "elsewhere": float(np.mean([accuracy[aspect] for aspect in ASPECT_FAULTS if aspect not in PLACED])),
        "score": float(spearmanr(scores, data["score"] @ torch.arange(1.0, 11, dtype=data["score"].dtype)).statistic),
        "blurred subject": area_under_roc(
            np.array([logits[i][column] for i in blurred]),
            np.array([truths[i]["subject_blurred"] == 1 for i in blurred]),
        ),
        "parameters": sum(parameter.numel() for parameter in iasm.parameters()) / 1e6,
        **accuracy,
    }


def measure_photographs(iasm: ImageAestheticSaliencyModule, data: dict, states: dict) -> dict[str, float]:
    """Of photographs with a subject of their own: the map against its mask, and the placement where that is clear."""
    maps, logits, _ = answer(iasm, data, states)
    masks = [mask.numpy() for mask in data["saliency"]]
    truths = [dict(zip(FAULTS, row)) for row in data["aspect_labels"].tolist()]
    saliency, centre = saliency_scores(maps, masks), saliency_scores([np.mean(masks, axis=0)] * len(masks), masks)
    return {
        "real map AUC": saliency["AUC"],
        "real map CC": saliency["CC"],
        "real map AUC, centre": centre["AUC"],
        "real placement": accuracies([decide(row) for row in logits], truths, [True] * len(truths))["placement"],
    }


def as_markdown(results: dict[str, list[dict[str, float]]], about: str) -> str:
    lines = [about, "", "| module reads | " + " | ".join(FIGURES) + " |", "|---" * (1 + len(FIGURES)) + "|"]
    for arm, runs in results.items():
        cells = []
        for figure in FIGURES:
            values = [run[figure] for run in runs]
            deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 and figure != "parameters" else ""
            cells.append(f"{np.mean(values):.3f}{deviation}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--pictures", type=int, default=2500)
    parser.add_argument("--test-pictures", type=int, default=600)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--work", type=Path, default=Path("runs/module-benchmark"), help="keeps pictures and states")
    parser.add_argument("--record", type=Path, help="write the table here, all figures beside it as JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)

    def kept(name: str, make: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        path = args.work / f"{name}.safetensors"
        if not path.exists():
            save_file({name: tensor.contiguous() for name, tensor in make().items()}, path)
        return load_file(path)

    splits = {"train": args.pictures, "test": args.test_pictures, "photographs": args.test_pictures}
    data = {
        split: kept(f"{split}-{number}", partial(make_pictures, split, number, SIZE, args.sources))
        for split, number in splits.items()
    }
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in args.arms:
        random = arm.endswith("random")
        needed = bool(ARMS[arm].get("encoder_layers"))
        states = {
            split: kept(f"{split}-{number}-states{'-random' * random}", partial(read_states, args.encoder, data[split]["image"], random))
            if needed else {}
            for split, number in splits.items()
        }  # fmt: skip
        for seed in args.seeds:
            set_seed(seed)
            iasm = build(arm, AutoConfig.from_pretrained(args.encoder).hidden_size)
            train(iasm, data["train"], states["train"], args, seed)
            figures = measure(iasm, data["test"], states["test"])
            figures |= measure_photographs(iasm, data["photographs"], states["photographs"])
            results.setdefault(arm, []).append(figures)
            print(arm, seed, {name: round(results[arm][-1][name], 3) for name in FIGURES}, flush=True)
    about = (
        f"Seeds {', '.join(map(str, args.seeds))}; {args.pictures} pictures, {args.steps} steps of {args.batch_size}; tested on "
        f"{args.test_pictures} held-out ones, and as many views of photographs with a subject (centre AUC "
        f"{next(iter(results.values()))[0]['real map AUC, centre']:.3f})."
    )
    table = as_markdown(results, about)
    print(table)
    if args.record:
        args.record.write_text(table + "\n", encoding="utf-8")
        args.record.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
