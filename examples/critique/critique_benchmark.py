r"""
Does aesthetic saliency make critiques better? ASE against the same base without it and against a same-size control.

    python examples/critique/critique_benchmark.py --record examples/ase-mini/EXPERIMENTS.md        # the full table, hours
    python examples/critique/critique_benchmark.py --arms base control ase --seeds 0 --pictures 4000 --test-pictures 400 \
        --warm-up 4000 --vision-samples 2000 --samples 2000 --work runs/look                        # a look, minutes

Every arm starts from the same base: the LLaVA inside `examples/ase-mini`, which has learned to write critiques, with its
saliency branch taken away. Every arm sees the same pictures in the same order with the same labels, in three parts:
`--warm-up` samples for the saliency module alone, `--vision-samples` for all but the language model, and `--samples` end
to end with captions (the base, which has no saliency module, trains its encoder in the first part too). In every arm
aspect labels and scores also train a head on the image features that the language model reads. Captions to learn from
have one fixed form (`plain_caption`), so that few of them teach what to see, and so has the one reference. Pictures are
those of the critique generator, tested on held-out photographs and cut-outs. What a caption says is read from its words
(`critique_captions.named_faults`). The standard `Trainer` trains all.

    base            the base, fine-tuned; no saliency branch
    base-longer     the same on three times as many samples in every part, to see whether it only lacks training
    control         the saliency branch without map targets: the same parameters and compute, a free attention map
    ase             ASE: the map is supervised, and the tokens are tied to it
    fusion-*        ASE with one fusion layer: the first, the middle or the last
    no-score-loss   ASE without scores; no-aspect-loss: without aspects for the IASM (control is the one without map)

Finished runs are kept in `--work` and not run again. Needs the extra `evaluation`.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critique_captions import ASPECT_FAULTS, FAULTS, named_faults, plain_caption
from critique_data import critique_dataset, load_sources
from evaluate_ase_mini import saliency_scores
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Dataset
from train_ase_mini import IMAGE_SIZE, WEIGHTS, SaliencyCollator, iasm_config, make_optimizer
from transformers import LlavaForConditionalGeneration, PreTrainedModel, Trainer, TrainingArguments, set_seed


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import write_between, write_captions
from metrics import caption_scores

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor
from ase_mllm.modeling_iasm import aspect_loss, saliency_losses, score_loss


BUNDLE = Path(__file__).parents[1] / "ase-mini"
SALIENCY_SIZE = 128  # pixels that the new saliency branch sees; the base sees 192
MAIN_ARMS = ("base", "control", "ase")
ABLATIONS = ("fusion-first", "fusion-middle", "fusion-last", "no-score-loss", "no-aspect-loss")
ARMS = (*MAIN_ARMS, "base-longer", *ABLATIONS)
BASES = ("base", "base-longer")
LONGER = 3
FUSION_LAYERS = {"fusion-first": [0], "fusion-middle": [1], "fusion-last": [2]}
ADDED_LOSSES = {
    "control": {"saliency_loss_weight": 0.0},
    "no-score-loss": {"score_loss_weight": 0.0},
    "no-aspect-loss": {"aspect_loss_weight": 0.0},
}
PLACED = ("placement", "depth", "subject sharpness")  # what has a place in the picture


# Pictures ------------------------------------------------------------------------------------------------------------


def make_pictures(split: str, number: int, size: int, sources: Path | None) -> dict[str, torch.Tensor]:
    """Samples as every arm and every epoch sees them: `image` is uint8 `(n, 3, size, size)`, squashed to a square."""
    columns = {"image": [], "aspect_labels": [], "score": [], "saliency": [], "composite": []}
    for row in critique_dataset(split, number, seed=0, sources=load_sources(split, sources)):
        image = np.array(row["image"].resize((size, size), Image.Resampling.BICUBIC))
        for name, values in columns.items():
            values.append(torch.from_numpy(image).permute(2, 0, 1) if name == "image" else torch.tensor(row[name]))
    return {name: torch.stack(values) for name, values in columns.items()}


class Pictures(Dataset):
    """`number` samples of one split from `start` on; after the last picture comes the first again."""

    def __init__(self, folder: Path, split: str, number: int | None = None, start: int = 0):
        self.columns = load_file(folder / f"{split}.safetensors")
        self.start, self.number = start, number or len(self.columns["image"])

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = (self.start + index) % len(self.columns["image"])
        row = {name: values[index] for name, values in self.columns.items()}
        image = Image.fromarray(row["image"].permute(1, 2, 0).numpy())
        return {**row, "image": image, "caption": plain_caption(row["aspect_labels"].tolist())}


# Arms ----------------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """A model with a head for aspects and scores on the image features that its language model reads."""

    def __init__(self, mllm: PreTrainedModel):
        super().__init__()
        self.mllm = mllm
        size = mllm.config.image_seq_length * mllm.config.text_config.hidden_size
        self.norm = nn.LayerNorm(size)
        self.aspects = nn.Linear(size, len(FAULTS))
        self.scores = nn.Linear(size, 10)

    def forward(
        self,
        pixel_values: torch.Tensor,
        score_targets: torch.Tensor,
        aspect_targets: torch.Tensor,
        saliency_targets: torch.Tensor,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Without `input_ids`, what can be learned without captions."""
        added = isinstance(self.mllm, ASEForConditionalGeneration)
        targets = {"score_targets": score_targets, "aspect_targets": aspect_targets}
        maps = {"saliency_targets": saliency_targets}
        if inputs.get("input_ids") is not None:
            outputs = self.mllm(pixel_values=pixel_values, **inputs, **(targets | maps if added else {}))
            loss, features = outputs.loss, outputs.image_outputs.pooler_output
        else:
            model = self.mllm if added else self.mllm.model
            outputs = model.get_image_features(pixel_values=pixel_values, return_dict=True)
            loss, features = 0.0, outputs.pooler_output
            if added:
                loss = saliency_losses(self.mllm.config.iasm_config, outputs, **targets, **maps)["loss"]
        features = self.norm(torch.cat(list(features)).reshape(len(pixel_values), -1))
        aspects, scores = self.aspects(features), self.scores(features)
        loss = loss + WEIGHTS["aspect_loss_weight"] * aspect_loss(aspects, aspect_targets)
        return {"loss": loss + WEIGHTS["score_loss_weight"] * score_loss(scores, score_targets), "aspects": aspects}


def base_checksum() -> str:
    return hashlib.sha256((BUNDLE / "model.safetensors").read_bytes()).hexdigest()


def load_base() -> LlavaForConditionalGeneration:
    """The LLaVA of the bundled model, without the saliency branch."""
    bundle = ASEForConditionalGeneration.from_pretrained(BUNDLE, dtype=torch.float32)
    base = LlavaForConditionalGeneration(bundle.config.mllm_config)
    base.load_state_dict(bundle.model.mllm.state_dict())
    base.generation_config = bundle.generation_config
    return base


def graft(arm: str, base: LlavaForConditionalGeneration, processor: ASEProcessor) -> PreTrainedModel:
    """The base with the saliency branch of this arm; for the arms of the base as it is."""
    if arm in BASES:
        return base
    backbone = {
        "model_type": "resnet",
        "embedding_size": 24,
        "hidden_sizes": [24, 48, 96, 128],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    losses = WEIGHTS | ADDED_LOSSES.get(arm, {})
    return ASEForConditionalGeneration.from_mllm_pretrained(
        base,
        iasm_config=iasm_config(processor, backbone, image_size=SALIENCY_SIZE, **losses),
        fusion_layers=FUSION_LAYERS.get(arm, [0, 1, 2]),
        fusion_hidden_size=192,
        fusion_num_attention_heads=12,
    )


# Runs ----------------------------------------------------------------------------------------------------------------


def train(
    model: nn.Module, pictures: Pictures, collator: Callable, batch_size: int, seed: int, args: argparse.Namespace
) -> float:
    """One run of the `Trainer` over all pictures; seconds that it took."""
    arguments = TrainingArguments(
        output_dir=str(args.work / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=1,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, len(pictures) // batch_size // 10),
        save_strategy="no",
        logging_steps=100,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    optimizer = make_optimizer(model, args.learning_rate)
    trainer = Trainer(model, arguments, train_dataset=pictures, data_collator=collator, optimizers=(optimizer, None))
    return trainer.train().metrics["train_runtime"]


def run_arm(arm: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one arm, or reads what it gave."""
    path = args.work / f"{arm}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    set_seed(seed)
    processor = ASEProcessor.from_pretrained(BUNDLE)
    whole_rows, without_text = ASEDataCollator(processor), SaliencyCollator(processor)
    learner = Learner(load_base())
    learner.mllm = graft(arm, learner.mllm, processor)
    numbers = np.array([args.warm_up, args.vision_samples, args.samples]) * (LONGER if arm == "base-longer" else 1)
    starts = np.cumsum(numbers) - numbers
    warm_up, vision, whole = (Pictures(args.work, "train", int(n), int(start)) for n, start in zip(numbers, starts))
    alone = learner if arm in BASES else learner.mllm.model.iasm
    seconds = train(alone, warm_up, without_text, 2 * args.batch_size, seed, args)
    seconds += train(learner, vision, without_text, args.batch_size, seed, args)
    seconds += train(learner, whole, whole_rows, args.batch_size, seed, args)
    result = measure(learner.eval(), Pictures(args.work, "test"), processor)
    result["seconds of training"] = seconds
    result["parameters"] = sum(parameter.numel() for parameter in learner.mllm.parameters())
    result["gates"] = [p.tanh().item() for name, p in learner.mllm.named_parameters() if name.endswith("gate")]
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


@torch.inference_mode()
def measure(learner: Learner, pictures: Pictures, processor: ASEProcessor) -> dict[str, Any]:
    """All figures of one trained arm on the held-out pictures."""
    rows = [pictures[i] for i in range(len(pictures))]
    model = learner.mllm
    captions, heads, judged, maps = [], [], [], []
    for start in range(0, len(rows), 50):
        batch = rows[start : start + 50]
        images, prompts = [row["image"] for row in batch], [processor.critique_prompt()] * len(batch)
        inputs = processor(images=images, text=prompts, return_tensors="pt")
        captions += write_captions(model, processor, inputs, max_new_tokens=90)[0]
        heads += learner(**SaliencyCollator(processor)(batch))["aspects"].tolist()
        if isinstance(model, ASEForConditionalGeneration):
            outputs = model.model.iasm(inputs["pixel_values"])
            maps += list(outputs.saliency_maps)
            judged += outputs.aspect_logits.tolist()
    truths = [dict(zip(FAULTS, row["aspect_labels"].tolist())) for row in rows]
    composite = [bool(row["composite"]) for row in rows]
    said = [named_faults(caption) for caption in captions]
    references = [[row["caption"]] for row in rows]
    pasted = [i for i, is_composite in enumerate(composite) if is_composite]
    return {
        "accuracy": accuracies(said, truths, composite),
        "accuracy of the heads": accuracies([decide(logits) for logits in heads], truths, composite),
        "accuracy of the IASM": accuracies([decide(logits) for logits in judged], truths, composite)
        if judged
        else None,
        "text": caption_scores(captions, references),
        "text, composites": caption_scores([captions[i] for i in pasted], [references[i] for i in pasted]),
        "wrong photo": caption_scores(captions, references[1:] + references[:1]),
        "saliency": measure_maps(maps, [row["saliency"].numpy() for row in rows]) if maps else None,
        "captions": captions,
    }


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
    aspects = {**ASPECT_FAULTS, "subject sharpness": ("subject_blurred",)}
    result = {}
    for aspect, faults in aspects.items():
        hits = {}
        for said, truth, pasted in zip(named, truths, composite):
            known = all(truth[fault] >= 0 for fault in faults) and (pasted or aspect not in PLACED)
            if known:
                present = frozenset(fault for fault in faults if truth[fault] == 1)
                hits.setdefault(present, []).append(present == said & set(faults))
        result[aspect] = float(np.mean([np.mean(values) for values in hits.values()])) if hits else float("nan")
    return result


def measure_maps(maps: list[torch.Tensor], truths: list[np.ndarray]) -> dict[str, float]:
    size = truths[0].shape
    resized = F.interpolate(torch.stack(maps).unsqueeze(1), size=size, mode="bilinear", align_corners=False)
    scores = saliency_scores([saliency[0].numpy() for saliency in resized], truths)
    centre = saliency_scores([np.mean(truths, axis=0)] * len(truths), truths)
    return {**scores, "centre bias AUC": centre["AUC"]}


# Table ---------------------------------------------------------------------------------------------------------------

Figures = dict[tuple[str, int], dict[str, float]]  # of each arm and seed
ASPECTS = (*ASPECT_FAULTS, "subject sharpness")
# a difference of these says nothing
ALONE = ("CIDEr, wrong photo", "map AUC, centre bias", "gates", "parameters, M", "training, s")
FRACTIONS = ("CIDEr", "BLEU", "map", "gates")  # the others are points, millions or seconds
OF_ABLATIONS = ("accuracy", "placed", "elsewhere", *PLACED, "heads, placed", "CIDEr, composites", "map AUC")


def figures_of(result: dict[str, Any]) -> dict[str, float]:
    """The figures of one run that the tables show, without those that it cannot have; accuracies in points."""
    accuracy, heads = result["accuracy"], result["accuracy of the heads"]
    iasm, saliency = result["accuracy of the IASM"] or dict.fromkeys(heads, float("nan")), result["saliency"] or {}
    figures = {
        "accuracy": 100 * np.mean([accuracy[aspect] for aspect in ASPECT_FAULTS]),
        "placed": 100 * np.mean([accuracy[aspect] for aspect in PLACED]),
        "elsewhere": 100 * np.mean([accuracy[aspect] for aspect in ASPECT_FAULTS if aspect not in PLACED]),
        "heads": 100 * np.mean([heads[aspect] for aspect in ASPECT_FAULTS]),
        "heads, placed": 100 * np.mean([heads[aspect] for aspect in PLACED]),
        "IASM": 100 * np.mean([iasm[aspect] for aspect in ASPECT_FAULTS]),
        "IASM, placed": 100 * np.mean([iasm[aspect] for aspect in PLACED]),
        "CIDEr": result["text"]["CIDEr"],
        "CIDEr, composites": result["text, composites"]["CIDEr"],
        "CIDEr, wrong photo": result["wrong photo"]["CIDEr"],
        "BLEU-4": result["text"]["BLEU-4"],
        "map AUC": saliency.get("AUC", float("nan")),
        "map NSS": saliency.get("NSS", float("nan")),
        "map CC": saliency.get("CC", float("nan")),
        "map AUC, centre bias": saliency.get("centre bias AUC", float("nan")),
        **{aspect: 100 * accuracy[aspect] for aspect in ASPECTS},
        "gates": np.mean(np.abs(result["gates"])) if result["gates"] else float("nan"),
        "parameters, M": result["parameters"] / 1e6,
        "training, s": result["seconds of training"],
    }
    return {name: float(value) for name, value in figures.items() if not np.isnan(value)}


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def as_markdown(figures: Figures, settings: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds; differences are those of the same seed."""
    arms = [arm for arm in ARMS if any(one == arm for one, _ in figures)]
    seeds = sorted({seed for _, seed in figures})

    def over_seeds(name: str, arm: str, other: str | None = None) -> str:
        pairs = [(figures.get((arm, s), {}), figures.get((other, s), {}) if other else {name: 0.0}) for s in seeds]
        values = [one[name] - less[name] for one, less in pairs if name in one and name in less]
        return spread(values, 3 if name.startswith(FRACTIONS) else 1)

    def table(head: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
        lines = [[head, *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows)]
        return ["", *("| " + " | ".join(cells) + " |" for cells in lines)] if columns and rows else []

    names = list(max(figures.values(), key=len))
    shown = [arm for arm in arms if arm not in ABLATIONS]
    others = [arm for arm in shown if arm != "ase"] if "ase" in arms else []
    ablations = [arm for arm in arms if arm in ABLATIONS] if "ase" in arms else []
    lines = table("figure", shown, [(name, [over_seeds(name, arm) for arm in shown]) for name in names])
    rows = [(name, [over_seeds(name, "ase", arm) for arm in others]) for name in names if name not in ALONE]
    lines += table("difference", [f"ase - {arm}" for arm in others], rows)
    rows = [(arm, [over_seeds(name, arm, "ase") for name in OF_ABLATIONS]) for arm in ablations]
    lines += table("ablation - ase", list(OF_ABLATIONS), rows)
    return "\n".join([about(seeds, settings), *lines])


def about(seeds: list[int], settings: dict[str, Any]) -> str:
    """What the figures of the tables are, and what was run for them."""
    return (
        f"Seeds {', '.join(map(str, seeds))}; {settings['warm_up']} + "
        f"{settings['vision_samples']} + {settings['samples']} samples of {settings['pictures']} pictures; tested on "
        f"{settings['test_pictures']}. The base is the LLaVA in the weights of SHA-256 {settings['base'][:12]}. Balanced "
        "accuracy in points, mean ± standard deviation over seeds: `accuracy`, and each aspect, of what captions say, "
        f"`placed` the mean of {', '.join(PLACED)}, `elsewhere` of the other aspects; `heads` on the image features; "
        "`IASM` its own. CIDEr and BLEU-4 against one reference, the caption of the truth in the same fixed form. "
        "`gates`: mean size of their tanh."
    )


def check_settings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Finished runs only stand beside runs of the same settings, which it returns."""
    names = ("pictures", "test_pictures", "warm_up", "vision_samples", "samples", "batch_size", "learning_rate")
    settings, path = {name: getattr(args, name) for name in names}, args.work / "settings.json"
    settings["base"] = base_checksum()
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        parser.error(f"{args.work} holds runs of other settings ({before}): give another --work")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=8000, help="different pictures to train on")
    parser.add_argument("--test-pictures", type=int, default=800)
    parser.add_argument("--warm-up", type=int, default=8000, help="samples that train the saliency branch alone")
    parser.add_argument("--vision-samples", type=int, default=4000, help="samples without captions after that")
    parser.add_argument("--samples", type=int, default=4000, help="samples end to end with captions after that")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--work", type=Path, default=Path("runs/critique-benchmark"))
    parser.add_argument("--record", type=Path, help="write the table between this file's marks, all runs beside it")
    args = parser.parse_args()

    # Data
    args.work.mkdir(parents=True, exist_ok=True)
    settings = check_settings(args, parser)
    runs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    for split, number in (("train", args.pictures), ("test", args.test_pictures)):
        if not (path := args.work / f"{split}.safetensors").exists():
            save_file(make_pictures(split, number, IMAGE_SIZE, args.sources), path)

    # Run
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        side_by_side = pool.map if args.jobs > 1 else map
        results = side_by_side(run_arm, [arm for arm, _ in runs], [seed for _, seed in runs], [args] * len(runs))
        figures = {run: figures_of(result) for run, result in zip(runs, results)}
    table = as_markdown(figures, settings)
    print(table)
    (args.work / "table.md").write_text(table, encoding="utf-8")
    if args.record:
        write_between(args.record, "<!-- benchmark: begin -->", "<!-- benchmark: end -->", table)
        arms = {arm: {seed: figures[arm, seed] for seed in args.seeds} for arm in args.arms}
        record = json.dumps({"settings": settings, "arms": arms}, indent=1)
        args.record.with_suffix(".json").write_text(record + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
