r"""
Post-trains a critic by rewards (GRPO) or by preferences (DPO), with TRL's own trainers.

    python examples/post_train.py grpo --model runs/my-critic --data my-photographs --output_dir runs/my-critic-grpo
    python examples/post_train.py dpo --model runs/my-critic --data pairs.jsonl --output_dir runs/my-critic-dpo

For what: a model that was fine-tuned on captions writes like them, and misses what they never rewarded. GRPO lets it try
(`--num_generations` critiques a photograph) and strengthens what scores better. Rewards, each from 0 to 1 and left out
where a row has no truth for it:
    aspects    the aspects named in the text against `aspect_labels` (F1; names are those of the processor)
    topics     the topics spoken of against those of the row's captions (F1: light, colour, composition, focus)
    rating     a rating written in the text ("7/10", "Score: 6.5") against the row's score
    length     within the range of lengths that the row's captions have, or `--words 20 80`
    once       the share of sentences that are not said before
`--rewards aspects:2 length:0.5` chooses and weighs them. Rewards by words can be gamed; look at the samples.

DPO takes lines {"image": "a.jpg", "chosen": "...", "rejected": "...", "prompt"?: "..."}, e.g. what people preferred. Data of
GRPO are those of aic_data.py. The saliency module stays as it is (`--train_iasm` trains it along, without its own losses).
All options of TRL's GRPOConfig or DPOConfig hold. Needs the extra `trl`.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from aic_data import load, row_question
from common import topics_of, words
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser, PreTrainedModel

import ase_mllm  # noqa: F401  (registers the Auto classes)


try:
    from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer
except ModuleNotFoundError as error:
    sys.exit(f"post_train.py needs {error.name}: pip install -e '.[trl]'")


Completions = list[list[dict[str, Any]]]
Rewards = list[float | None]
RATING = re.compile(r"(?:scores?|ratings?|rate)\D{0,12}?(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?)\s*(?:/|out of)\s*10\b", re.I)


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "Folder or Hub id."})
    data: str = field(metadata={"help": "Of aic_data.py's forms for grpo; a .jsonl of pairs for dpo."})
    rewards: list[str] = field(
        default_factory=lambda: ["aspects", "topics", "length", "once"], metadata={"help": "NAME or NAME:WEIGHT."}
    )
    words: list[int] | None = field(default=None, metadata={"help": "Least and most words of a critique."})
    train_iasm: bool = field(default=False, metadata={"help": "Train the saliency module along."})
    dtype: str = field(default="float32", metadata={"help": "Of the model."})


# Rewards -------------------------------------------------------------------------------------------------------------


def texts_of(completions: Completions) -> list[str]:
    return ["".join(turn["content"] for turn in turns) for turns in completions]


def f1(said: set[str], true: set[str]) -> float:
    return 1.0 if not said and not true else 2 * len(said & true) / (len(said) + len(true))


def reward_aspects(names: list[str]) -> Callable[..., Rewards]:
    """Of labels 0..1 in the order of `names`; what is unknown (negative) does not count."""
    spoken = {name: re.compile(rf"\b{re.escape(name.replace('_', ' '))}\b", re.I) for name in names}

    def aspects(completions: Completions, aspect_labels: list[list[float] | None], **columns: Any) -> Rewards:
        rewards: Rewards = []
        for text, labels in zip(texts_of(completions), aspect_labels):
            known = {name: label for name, label in zip(names, labels or []) if label >= 0}
            said = {name for name in known if spoken[name].search(text)}
            rewards.append(f1(said, {name for name, label in known.items() if label >= 0.5}) if known else None)
        return rewards

    return aspects


def reward_topics(completions: Completions, captions: list[list[str]], **columns: Any) -> Rewards:
    known = [set().union(*map(topics_of, one or [])) for one in captions]
    return [f1(topics_of(text), true) if true else None for text, true in zip(texts_of(completions), known)]


def read_rating(text: str) -> float | None:
    """The first rating of 0 to 10 that a text gives."""
    found = RATING.search(text)
    value = float(found.group(1) or found.group(2)) if found else None
    return value if value is not None and value <= 10 else None


def reward_rating(completions: Completions, score_mean: list[float | None], **columns: Any) -> Rewards:
    rewards: Rewards = []
    for text, true in zip(texts_of(completions), score_mean):
        said = read_rating(text)
        rewards.append(None if true is None else 0.0 if said is None else max(0.0, 1 - abs(said - true) / 4))
    return rewards


def reward_length(limits: list[int] | None) -> Callable[..., Rewards]:
    """1 inside the limits (of the captions' lengths without any given), falling to 0 at half and at twice of them."""

    def length(completions: Completions, captions: list[list[str]], **columns: Any) -> Rewards:
        rewards: Rewards = []
        for text, references in zip(texts_of(completions), captions):
            counts = limits or [len(words(one)) for one in references or []]
            if not counts:
                rewards.append(None)
                continue
            least, most, count = min(counts), max(counts), len(words(text))
            below, above = 2 * count / max(least, 1) - 1, 2 - count / max(most, 1)
            rewards.append(float(np.clip(min(below, above), 0, 1)))
        return rewards

    return length


def reward_once(completions: Completions, **columns: Any) -> Rewards:
    rewards = []
    for text in texts_of(completions):
        sentences = [" ".join(words(one)) for one in re.split(r"[.!?;]+", text) if words(one)]
        rewards.append(len(set(sentences)) / len(sentences) if sentences else 0.0)
    return rewards


def choose_rewards(args: ScriptArguments, processor: Any) -> tuple[list[Callable[..., Rewards]], list[float]]:
    known = {
        "aspects": reward_aspects(list(getattr(processor, "aspect_names", None) or [])),
        "topics": reward_topics,
        "rating": reward_rating,
        "length": reward_length(args.words),
        "once": reward_once,
    }
    pairs = [name.partition(":")[::2] for name in args.rewards]
    if unknown := sorted({name for name, _ in pairs} - known.keys()):
        raise ValueError(f"There are no rewards {', '.join(unknown)}; known are {', '.join(known)}.")
    return [known[name] for name, _ in pairs], [float(weight or 1) for _, weight in pairs]


# Data ----------------------------------------------------------------------------------------------------------------


def question_of(topic: str | None, prompt: str | None) -> list[dict[str, str]]:
    return [{"role": "user", "content": row_question(topic, prompt)}]


def grpo_rows(data: str) -> datasets.Dataset:
    """A row a photograph and topic: a question to answer, and what rewards need to know."""
    rows = load(data)[0]["train"]
    prompts = [question_of(*pair) for pair in zip(rows["topic"], rows["prompt"])]
    kept = rows.select_columns(["image", "captions", "score_mean", "aspect_labels"])
    return kept.add_column("prompt", prompts)


def dpo_rows(path: Path) -> datasets.Dataset:
    """
    Pairs of answers to one question of one photograph.

    Raises:
        ValueError: naming the line that is none.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, chosen, rejected = (row[name] for name in ("image", "chosen", "rejected"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not an object with `image`, `chosen`, `rejected`.") from error
        if not (path.parent / image).is_file():
            raise ValueError(f"{path}, line {number}: there is no {path.parent / image}.")
        question = question_of(None, row.get("prompt"))
        answers = {
            name: [{"role": "assistant", "content": text}]
            for name, text in (("chosen", chosen), ("rejected", rejected))
        }
        rows.append({"images": [str(path.parent / image)], "prompt": question, **answers})
    if not rows:
        raise ValueError(f"{path} has no pairs.")
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


# Run -----------------------------------------------------------------------------------------------------------------


def load_model(args: ScriptArguments) -> PreTrainedModel:
    model = AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype)
    if not args.train_iasm and model.config.model_type == "ase":
        model.model.iasm.requires_grad_(False)
    return model


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(
            f"usage: post_train.py {{grpo,dpo}} [--help] ...\n{__doc__}\n`post_train.py grpo --help` lists its options."
        )
        raise SystemExit(0)
    if not argv or argv[0] not in ("grpo", "dpo"):
        raise SystemExit("Name the method first: post_train.py grpo or post_train.py dpo; --help says what they are.")
    config = GRPOConfig if argv[0] == "grpo" else DPOConfig
    parser = HfArgumentParser((ScriptArguments, config))
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported(), report_to="none")
    args, training_args = parser.parse_args_into_dataclasses(argv[1:])
    processor = AutoProcessor.from_pretrained(args.model)
    model = load_model(args)
    if argv[0] == "grpo":
        rewards, training_args.reward_weights = choose_rewards(args, processor)
        rows = grpo_rows(args.data)
        trainer = GRPOTrainer(model, rewards, training_args, train_dataset=rows, processing_class=processor)
    else:
        rows = dpo_rows(Path(args.data))
        trainer = DPOTrainer(model, args=training_args, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(training_args.output_dir)


if __name__ == "__main__":
    main()
