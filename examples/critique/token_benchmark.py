r"""
What a budget of image tokens costs in quality, trained within it or not, and which tokens are best kept.

    python examples/critique/critique_benchmark.py --encoder runs/dinov2-small --arms ase --train-encoder --work runs/trained
    python examples/critique/token_benchmark.py --encoder runs/dinov2-small --work runs/trained \
        --record examples/ase-mini/TOKENS.md                                                   # an hour on two cores

Goes on from what `critique_benchmark.py` keeps in its `--work` of the arm `ase`: its module and encoder have learned without
captions. Now captions are learned twice from there, from the same pictures: with all image tokens, and within a budget
drawn for each batch, from the smallest that is measured to all, chosen as the model chooses by default. Both then write
captions of the same held-out pictures within each budget, with tokens chosen in different ways:

    diverse, uniform, saliency     the model's own selections
    unweighted                     `diverse` without saliency: features that differ, and nothing else
    random                         any of them
    attention                      those that the class token of the encoder's last layer attends to most
    pooled                         none is dropped: the mean of each block of neighbours
    smaller picture                none is dropped: a picture of as many fewer pixels for the encoder

Figures are balanced accuracy of what captions say, in points (`critique_tables.py`), mean ± standard deviation over seeds.
Differences are those of the same pictures, seeds and training, with the interval of 95 of 100 resamplings of the pictures.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critique_benchmark import (
    BUNDLE,
    IMAGE_SIZE,
    MERGED,
    TESTED,
    Collator,
    Learner,
    Pictures,
    aspects_to_learn,
    base_checksum,
    be_quiet,
    caption_pictures,
    device,
    in_processes,
    load_tower,
    make_processor,
    prompt_tokens,
    see,
    train,
)
from critique_captions import FAULTS, named_faults
from critique_tables import GROUPS, READ, hits_of, spread, table
from torch import nn
from transformers import set_seed


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import BUDGETS, write_between

from ase_mllm import ASEProcessor, image_tokens


SELECTIONS = ("diverse", "unweighted", "uniform", "saliency", "random", "attention", "pooled", "smaller picture")
TRAININGS = ("all tokens", "within budgets")
SIDE = IMAGE_SIZE // 14 // MERGED  # of the grid of image tokens
BLOCKS = {0.5: (1, 2), 0.25: (2, 2), 0.11: (3, 3)}  # of tokens that `pooled` makes one
SMALLER = {0.25: SIDE // 2, 0.11: SIDE // 3}  # sides of the grid that a smaller picture has; half of it is no square
RESAMPLED = 2000
MARKS = "<!-- budgets: begin -->", "<!-- budgets: end -->"
FIGURES = {"all": GROUPS["all"], "placed": GROUPS["placed"], "placement": ("placement",)}


# Ways to choose ------------------------------------------------------------------------------------------------------


def choose_unweighted(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    return image_tokens._SELECT["diverse"](features, torch.ones_like(quality), number)


def choose_randomly(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    return torch.rand(quality.shape, device=quality.device).topk(number, dim=1).indices


def choose_blocks(features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
    """One place of each block; with `PooledFeatures` each holds the mean of its block."""
    height, width = next(block for block in BLOCKS.values() if SIDE**2 // (block[0] * block[1]) == number)
    places = torch.arange(SIDE**2, device=quality.device).view(SIDE, SIDE)[height // 2 :: height, width // 2 :: width]
    return places.flatten().expand(len(quality), -1)


class ClassAttention:
    """Chooses what the class token attends to in the encoder's last layer, the mean of its heads."""

    def __init__(self, layer: nn.Module):
        self.layer = layer
        self.handle = layer.register_forward_pre_hook(self.listen, with_kwargs=True)

    def listen(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
        self.states = args[0] if args else kwargs["hidden_states"]

    def choose(self, features: torch.Tensor, quality: torch.Tensor, number: int) -> torch.Tensor:
        states, attention = self.layer.norm1(self.states), self.layer.attention
        query, keys = (
            one.unflatten(-1, (attention.num_attention_heads, -1)).transpose(1, 2)
            for one in (attention.q_proj(states[:, :1]), attention.k_proj(states))
        )
        weights = (query @ keys.transpose(-1, -2) * attention.scaling).softmax(-1)[:, :, 0, 1:].mean(1)
        tokens = F.avg_pool2d(weights.unflatten(1, (SIDE * MERGED, -1)), MERGED).flatten(1)
        return tokens.topk(number, dim=1).indices


class PooledFeatures:
    """Puts in the place of each image token the mean of its block of neighbours."""

    def __init__(self, projector: nn.Module, block: tuple[int, int]):
        self.block = block
        self.handle = projector.register_forward_hook(self.pool)

    def pool(self, projector: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        grid = output.transpose(1, 2).unflatten(2, (SIDE, SIDE))
        height, width = self.block
        means = F.avg_pool2d(grid, self.block)
        means = means.repeat_interleave(height, dim=2).repeat_interleave(width, dim=3)
        return means.flatten(2).transpose(1, 2)


image_tokens._SELECT |= {"unweighted": choose_unweighted, "random": choose_randomly, "pooled": choose_blocks}


# Runs ----------------------------------------------------------------------------------------------------------------


class CaptionLesson(nn.Module):
    """Captions and the module's own targets, with all image tokens or within another budget in each batch."""

    def __init__(self, learner: Learner, budgets: random.Random | None):
        super().__init__()
        self.mllm, self.kept, self.budgets = learner.mllm, learner.kept, budgets

    def forward(self, rows: torch.Tensor, **inputs: Any) -> dict[str, Any]:
        self.kept.choose(rows)
        budget = None if self.budgets is None else self.budgets.uniform(min(BUDGETS), 1)
        return {"loss": self.mllm(**inputs, image_token_budget=budget).loss}


def run(args: argparse.Namespace, of: tuple[int, str]) -> dict[str, list[str]]:
    """The captions of the test's pictures that each way of choosing leads to, after one training from one seed."""
    (seed, training), path = of, args.work / "tokens-{}-{}-{}.json".format(args.samples, *of).replace(" ", "-")
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    be_quiet()
    set_seed(seed)
    processor = make_processor(args.language_model)
    learner, _ = see("ase", seed, args, processor)
    pictures = Pictures(args.work, "train", args.samples, args.warm_up + args.vision_samples)
    learner.kept.open("train")
    lesson = CaptionLesson(learner, random.Random(seed) if training == "within budgets" else None)
    train(lesson, pictures, Collator(pictures, processor, labels=aspects_to_learn(args)[1]), seed, args)
    learner.eval()
    test = Pictures(args.work, "test", args.test_pictures)
    captions = {"all": write(learner, test, processor)}
    for budget in BUDGETS:
        for selection in args.selections:
            way = f"{budget:.0%}, {selection}"
            if selection != "smaller picture":
                with chosen_by(selection, budget, learner):
                    captions[way] = write(learner, test, processor, budget)
            elif budget in SMALLER:
                captions[way] = write_of_smaller(learner, test, processor, args.encoder, SMALLER[budget])
    path.write_text(json.dumps(captions, indent=1), encoding="utf-8")
    print(*of, {name: np.mean([len(one) for one in said]) for name, said in captions.items()}, flush=True)
    return captions


@contextmanager
def chosen_by(selection: str, budget: float, learner: Learner) -> Iterator[None]:
    """The learner's model chooses image tokens this way."""
    base, config, handle = learner.mllm.model.mllm.model, learner.mllm.config, None
    if selection == "pooled":
        handle = PooledFeatures(base.multi_modal_projector, BLOCKS[budget]).handle
    elif selection == "attention":
        seen = ClassAttention(base.vision_tower.encoder.layer[-1])
        image_tokens._SELECT["attention"], handle = seen.choose, seen.handle
    before, config.image_token_selection = config.image_token_selection, selection
    yield
    config.image_token_selection = before
    if handle is not None:
        handle.remove()


@torch.inference_mode()
def write(learner: Learner, pictures: Pictures, processor: ASEProcessor, budget: float | None = None) -> list[str]:
    """Captions of all pictures, with all image tokens or within a budget."""
    torch.manual_seed(0)  # of a random choice
    collator, captions = Collator(pictures, processor, captions=False), []
    learner.kept.open("test")
    for rows in torch.arange(len(pictures)).split(TESTED):
        pixels = collator(rows.tolist())["pixel_values"]
        learner.kept.choose(rows)
        captions += caption_pictures(
            learner.mllm, processor, prompt_tokens(processor), pixels, image_token_budget=budget
        )
    return captions


@torch.inference_mode()
def write_of_smaller(
    learner: Learner, pictures: Pictures, processor: ASEProcessor, encoder: Path, side: int
) -> list[str]:
    """Captions of pictures shrunk to so many image tokens a side, with all of those."""
    lower, prompt = load_tower(encoder, READ).eval().to(device()), prompt_tokens(processor)
    is_image = prompt == processor.image_token_id
    prompt = torch.cat([prompt[is_image][: side**2], prompt[~is_image]])
    collator, captions = Collator(pictures, processor, captions=False), []
    for rows in torch.arange(len(pictures)).split(TESTED):
        pixels = collator(rows.tolist())["pixel_values"]
        pixels = F.interpolate(pixels, size=side * MERGED * 14, mode="bicubic", antialias=True)
        learner.kept.current = lower(pixels, output_hidden_states=True).hidden_states[READ]
        captions += caption_pictures(learner.mllm, processor, prompt, pixels)
    return captions


# Figures -------------------------------------------------------------------------------------------------------------


class Judge:
    """Balanced accuracies of captions of one set of pictures, on all of them and on resamplings."""

    def __init__(self, pictures: Pictures):
        labels, self.composite = (pictures.columns[name].tolist() for name in ("aspect_labels", "composite"))
        self.truths = [dict(zip(FAULTS, one)) for one in labels[: len(pictures)]]
        self.composite = self.composite[: len(pictures)]
        drawn = np.random.default_rng(0).integers(0, len(pictures), (RESAMPLED, len(pictures)))
        weights = np.stack([np.bincount(rows, minlength=len(pictures)) for rows in drawn])
        self.weights = np.concatenate([np.ones((1, len(pictures))), weights])

    def points(self, captions: list[str]) -> dict[str, np.ndarray]:
        """For each of `FIGURES`, points on all pictures, then on each resampling."""
        named = [named_faults(caption) for caption in captions]
        aspects = {}
        for aspect, (states, hits) in hits_of(named, self.truths, self.composite).items():
            is_in = states[:, None] == np.arange(states.max(initial=-1) + 1)
            with np.errstate(invalid="ignore"):  # a state that a resampling has not drawn
                recalls = (self.weights @ (is_in & hits[:, None])) / (self.weights @ is_in)
            aspects[aspect] = 100 * np.nanmean(recalls, axis=1)
        return {name: np.mean([aspects[one] for one in group], axis=0) for name, group in FIGURES.items()}


def as_markdown(said: dict[tuple[int, str], dict[str, list[str]]], judge: Judge, about: str) -> tuple[str, dict]:
    """The tables, and the points behind them by training, seed, way and figure."""
    seeds, trainings = sorted({seed for seed, _ in said}), [one for one in TRAININGS if any(one == t for _, t in said)]
    points = {of: {way: judge.points(captions) for way, captions in one.items()} for of, one in said.items()}
    ways = max(points.values(), key=len)

    def over_seeds(training: str, way: str, figure: str, other: str | None = None) -> list[np.ndarray]:
        """Of the seeds that have it, less that of another way."""
        found = [points.get((seed, training), {}) for seed in seeds]
        return [
            one[way][figure] - (one[other][figure] if other else 0.0)
            for one in found
            if way in one and (other is None or other in one)
        ]

    def difference(training: str, way: str, other: str, figure: str) -> str:
        differences = over_seeds(training, way, figure, other)
        if not differences:
            return "-"
        mean, *resampled = np.mean(differences, axis=0)
        low, high = np.quantile(resampled, [0.025, 0.975])
        return f"{mean:+.1f} [{low:.1f}, {high:.1f}]"

    lines = [about]
    columns = [f"{training}: {figure}" for training in trainings for figure in FIGURES]
    rows = [
        (way, [spread([one[0] for one in over_seeds(t, way, f)], 1) for t in trainings for f in FIGURES])
        for way in ways
    ]
    lines += table("kept", columns, rows)
    for head, other in (("less all of them", "all"), ("less uniform", "uniform")):
        rows = []
        for way in ways:
            beside = other if other == "all" else f"{way.split(',')[0]}, {other}"
            if way not in ("all", beside):
                rows.append((way, [difference(t, way, beside, f) for t in trainings for f in FIGURES]))
        lines += table(head, columns, rows)
    record = {
        f"{training}, seed {seed}": {
            way: {f: float(one[0]) for f, one in figures.items()} for way, figures in of.items()
        }
        for (seed, training), of in points.items()
    }
    return "\n".join(lines), record


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--encoder", type=Path, required=True, help="folder of a Dinov2 model, as for critique_benchmark.py"
    )
    parser.add_argument("--language-model", type=Path, default=BUNDLE, help="as for critique_benchmark.py")
    parser.add_argument("--work", type=Path, required=True, help="that of critique_benchmark.py")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=4000, help="captions to learn from")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=SELECTIONS)
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=TRAININGS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument(
        "--record", type=Path, help="write the tables between this file's marks, all figures beside it"
    )
    args = parser.parse_args(argv)
    settings = args.work / "settings.json"
    if not settings.exists():
        parser.error(f"{settings} is not there: run the arm `ase` of critique_benchmark.py with this --work first")
    settings = json.loads(settings.read_text(encoding="utf-8"))
    if settings["base"] != base_checksum(args.language_model):
        parser.error(f"{args.work} holds runs of another language model than {args.language_model}'s")
    args = argparse.Namespace(**{"labels": "truth", **settings, **vars(args)})
    runs = [(seed, training) for seed in args.seeds for training in args.trainings]
    said = dict(zip(runs, in_processes(partial(run, args), runs, args.jobs)))
    trained = "trained along above" if args.train_encoder else "frozen; the module reads"
    about = (
        f"Seeds {', '.join(map(str, args.seeds))}; {args.samples} captions to learn from, {args.test_pictures} pictures of the "
        f"test, {SIDE**2} image tokens. The encoder is {settings['encoder']}, {trained} its layer {READ}."
    )
    text, record = as_markdown(said, Judge(Pictures(args.work, "test", args.test_pictures)), about)
    print(text)
    if args.record:
        write_between(args.record, *MARKS, text)
        args.record.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
