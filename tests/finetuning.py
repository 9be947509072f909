"""What the tests of `examples/finetune.py` share: pictures to train on, tiny models, runs, and what a run leaves behind."""

import json
import sys
from pathlib import Path

import finetune
import numpy as np
import pytest
import torch
from conftest import WORDS, graft, tiny_base, tiny_processor
from PIL import Image
from transformers import LlavaForConditionalGeneration

from ase_mllm import ASEForConditionalGeneration


CAPTIONS = ["good , blurred .", "wrong , good .", "underexposed , what .", "what is good ?", "blurred , wrong ."]


# Models and photographs ----------------------------------------------------------------------------------------------


def draw(folder: Path, *names: str):
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for name in names:
        Image.fromarray(generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(folder / name)


def write_photographs(folder: Path, rows: list[dict]) -> Path:
    draw(folder, *(row["file_name"] for row in rows))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def speaking_base() -> LlavaForConditionalGeneration:
    """It writes words and nothing else, so that no critique is empty."""
    base = tiny_base()
    base.generation_config.suppress_tokens = [*range(5), *range(len(WORDS), 99)]
    return base


def write_base(folder: Path) -> Path:
    """An ungrafted model with its processor."""
    speaking_base().save_pretrained(folder)
    tiny_processor().base_processor.save_pretrained(folder)
    return folder


def write_checkpoint(folder: Path) -> Path:
    """A grafted model with its processor."""
    torch.manual_seed(7)
    graft(speaking_base()).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def write_ten(folder: Path) -> Path:
    """Eight photographs to train on and two to validate on; captions of one length, every one rated and labelled."""
    rows = [
        {
            "file_name": f"{i:02d}.png",
            "caption": CAPTIONS[i % len(CAPTIONS)],
            "score": 1.0 + i,
            "aspect_labels": [i % 2, 0, 1],
        }
        for i in range(10)
    ]
    write_photographs(folder / "train", rows[:8])
    write_photographs(folder / "validation", rows[8:])
    return folder


def write_rated(folder: Path) -> Path:
    """Photographs of two sizes with scores, maps and labels for some; one has two captions."""
    for split, numbers in (("train", range(6)), ("validation", range(6, 9))):
        rows = [
            {
                "file_name": f"{i}.png",
                "captions": CAPTIONS[: 1 + (i == 0)],
                "score": 1.0 + i,
                **({"saliency": np.eye(4).tolist()} if i % 2 else {}),
            }
            for i in numbers
        ]
        write_photographs(folder / split, rows)
    return folder


# Runs ----------------------------------------------------------------------------------------------------------------


def command(model: Path, data: Path, out: Path, **options) -> list[str]:
    options = {
        "model": model,
        "data": data,
        "output_dir": out,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_new_tokens": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    if "eval_steps" in options:
        options |= {"eval_strategy": "steps", "save_strategy": "steps", "save_steps": options["eval_steps"]}
    return [part for name, value in options.items() for part in (f"--{name}", *map(str, np.atleast_1d(value)))]


def run(*args, **options) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["finetune.py", *command(*args, **options)])
        finetune.main()
    return args[2]


def trainer_state(out: Path) -> dict:
    """From the newest checkpoint."""
    return json.loads((Path(finetune.last_checkpoint(out)) / "trainer_state.json").read_text())


def history(out: Path, key: str = "loss") -> dict[int, float]:
    """That value by step."""
    return {entry["step"]: entry[key] for entry in trainer_state(out)["log_history"] if key in entry}


def learning_rates(out: Path) -> list[float]:
    """Of what decays, what does not, and the gates."""
    groups = torch.load(Path(finetune.last_checkpoint(out)) / "optimizer.pt")["param_groups"]
    model = ASEForConditionalGeneration.from_pretrained(out)
    assert len(groups[-1]["params"]) == sum(name.endswith("gate") for name, _ in model.named_parameters()) > 0
    return [group["initial_lr"] for group in groups]


def captions(out: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (out / "samples" / f"step-{step:06d}" / "captions.jsonl").open()]


def moved(before: dict[str, torch.Tensor], out: Path) -> set[str]:
    after = ASEForConditionalGeneration.from_pretrained(out).state_dict()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
