"""What keeps a training run from going wrong without a word: losses, weights and checkpoints are looked at."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError, safe_open
from transformers import Trainer


RUN_FILE = "run.json"


class GuardedTrainer(Trainer):
    """Stops at a loss that is no number, and saves no weights that are none."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss).all():
            terms = {name: outputs.get(f"{name}_loss") for name in ("caption", "score", "saliency", "aspect")}
            said = ", ".join(f"{name} {term.mean().item():.4g}" for name, term in terms.items() if term is not None)
            raise ValueError(
                f"After step {self.state.global_step} the loss is {loss.mean().item()} (terms: {said or 'none'}), so "
                "training stops; the last checkpoint is from before. Usual causes: too large a --learning_rate, float16 "
                "(bfloat16 or float32 reach further), or a target that is out of all proportion."
            )
        return (loss, outputs) if return_outputs else loss

    def _save_checkpoint(self, model, trial):
        check_weights(model)
        super()._save_checkpoint(model, trial)


def check_weights(model: torch.nn.Module):
    """
    Raises:
        ValueError: if a parameter that was trained holds a number that is none.
    """
    names = [name for name, one in model.named_parameters() if one.requires_grad and not torch.isfinite(one).all()]
    if names:
        raise ValueError(
            f"{len(names)} trained tensors hold nan or infinity, e.g. {names[0]}: nothing is saved, the last checkpoint is "
            "from before. Try a smaller --learning_rate, or bfloat16 in place of float16."
        )


# Checkpoints ---------------------------------------------------------------------------------------------------------


def damage_of(checkpoint: Path) -> str:
    """What of a checkpoint cannot be read, "" where nothing is wrong. The trainer's state is the last file of each."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"trainer_state.json: {error}"
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt")
            elif path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()  # as torch saves them: a file cut short has lost its directory
        except (OSError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path.relative_to(checkpoint)}: {error}"
    return ""


def last_checkpoint(folder: str | Path, verbose: bool = False) -> str | None:
    """The newest checkpoint that can be read; `verbose` says which newer ones cannot."""
    numbers = {path: path.name.split("-")[1] for path in Path(folder).glob("checkpoint-*")}
    for path in sorted((p for p in numbers if numbers[p].isdigit()), key=lambda p: int(numbers[p]), reverse=True):
        if not (damage := damage_of(path)):
            return str(path)
        if verbose:
            print(f"{path} is damaged or unfinished ({damage}): left aside for the one before.")
    return None


# What a run is of ----------------------------------------------------------------------------------------------------


def describe_rows(rows: datasets.Dataset) -> dict[str, Any]:
    """Counts and a checksum of training rows, without the contents of the pictures."""
    digest = hashlib.sha256()
    for row in rows.remove_columns("image"):
        digest.update(json.dumps(row, sort_keys=True).encode("utf-8", "backslashreplace"))
    return {"rows": len(rows), "photographs": len(set(rows["image_id"])), "sha256": digest.hexdigest()}


def keep_to_run(folder: Path, run: dict[str, dict[str, Any]], resumed: bool, write: bool):
    """
    A run that goes on must be of what it began with, which is noted in its folder.

    Args:
        run: By name, what the run is of.
        resumed: Whether it goes on from a checkpoint that nobody has named.
        write: Whether this process notes it.

    Raises:
        ValueError: naming what has changed.
    """
    path = Path(folder, RUN_FILE)
    if resumed and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in run if name in before and before[name] != run[name]]
        if changed:
            told = "; ".join(f"{name}: {_short(before[name])}, now {_short(run[name])}" for name in changed)
            raise ValueError(
                f"{folder} holds a run of something else ({told}). Give a new run another --output_dir, or name the "
                "checkpoint to go on from regardless by --resume_from_checkpoint."
            )
    elif write:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")


def _short(value: dict[str, Any]) -> str:
    return " ".join(f"{number[:8] if name == 'sha256' else number} {name}" for name, number in value.items())
