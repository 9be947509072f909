"""Training the saliency module alone (`finetune.py --stage module`): its encoder runs once over every photograph.

The module reads states of the base's encoder, so it cannot learn without them; but they do not change while it learns.
They are kept in half precision for the length of the run: width x places x 2 bytes a photograph and layer (0.2 MB at
ViT-S/14 and 224 pixels), and as much again for its pixels.
"""

import inspect
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch.utils.data import Dataset
from tqdm import tqdm
from training_guards import GuardedTrainer
from transformers import TrainingArguments

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration
from ase_mllm.modeling_ase import TARGETS


MODULE_TARGETS = tuple(name for name in TARGETS if name != "caption_weights")
OF_ROWS = ("score", "aspect_labels", "saliency")  # the same targets, by the names of the data
PIXELS, STATES = "pixel_values", "encoder_states"


class KeptInputs(Dataset):
    """What the module is given of each photograph, and its targets; a file a photograph."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.safetensors"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return load_file(self.files[index])


def first_places(image_ids: Iterable[str]) -> list[int]:
    """The first place of each photograph."""
    first: dict[str, int] = {}
    for place, name in enumerate(image_ids):
        first.setdefault(name, place)
    return list(first.values())


def first_rows(rows: datasets.Dataset) -> datasets.Dataset:
    """One row a photograph, since the module learns nothing from a second caption: the first that tells the most."""
    best: dict[str, tuple[int, int]] = {}  # how many targets, and where
    for place, row in enumerate(rows.select_columns(["image_id", *OF_ROWS])):
        known = sum(row[name] is not None for name in OF_ROWS)
        if known > best.get(row["image_id"], (-1, 0))[0]:
            best[row["image_id"]] = known, place
    return rows.select([place for _, place in best.values()])


@torch.no_grad()
def keep_inputs(
    model: ASEForConditionalGeneration,
    rows: datasets.Dataset,
    collator: ASEDataCollator,
    args: TrainingArguments,
    folder: Path,
):
    """Runs the encoder once over the rows, every process over its share, and writes what its module would be given."""
    folder.mkdir(parents=True, exist_ok=True)
    known = inspect.signature(model.model.mllm.base_model.get_image_features).parameters
    mine, step = range(args.process_index, len(rows), args.world_size), args.per_device_eval_batch_size
    for start in tqdm(range(0, len(mine), step), "encoder", disable=args.process_index > 0 or args.disable_tqdm):
        numbers = list(mine[start : start + step])
        batch = collator([rows[i] for i in numbers])
        images = {name: batch[name].to(args.device) for name in known if name in batch}
        images[PIXELS] = images[PIXELS].to(model.dtype)
        given = model.model.get_iasm_inputs(**images)
        if len(given) != len(numbers):
            raise ValueError(
                f"{len(numbers)} photographs became {len(given)} images of the encoder: the module's targets are of whole "
                "photographs. Let the base's processor leave them whole (no tiles)."
            )
        for row, (number, inputs) in enumerate(zip(numbers, given)):
            tensors = {PIXELS: inputs[PIXELS], **{f"{STATES}.{i}": one for i, one in enumerate(inputs[STATES])}}
            tensors = {name: one.half().cpu().contiguous() for name, one in tensors.items()}
            tensors |= {name: batch[name][row].contiguous() for name in MODULE_TARGETS if name in batch}
            save_file(tensors, folder / f"{number:08d}.safetensors")


def collate(examples: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
    """A batch of the module's arguments: stacked where all photographs have one size, lists where they do not."""

    def join(name: str) -> torch.Tensor | list[torch.Tensor]:
        values = [example[name].float() for example in examples]
        return torch.stack(values) if len({value.shape for value in values}) == 1 else values

    layers = sum(name.startswith(STATES) for name in examples[0])
    batch = {PIXELS: join(PIXELS), STATES: [join(f"{STATES}.{i}") for i in range(layers)]}
    return batch | {name: _stack(name, examples) for name in MODULE_TARGETS if any(name in one for one in examples)}


def _stack(name: str, examples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Targets of a batch; where a photograph has none, the mark of that."""
    shapes = {example[name].shape for example in examples if name in example}
    if len(shapes) > 1:
        raise ValueError(f"`{name}` has different shapes in one batch: {sorted(map(tuple, shapes))}.")
    unknown = torch.full(shapes.pop(), -1.0 if name == "aspect_targets" else 0.0)
    return torch.stack([example.get(name, unknown) for example in examples])


class ModuleTrainer(GuardedTrainer):
    """Trains the saliency module of `whole`, and saves all of that as the result."""

    def __init__(self, *args, whole: ASEForConditionalGeneration, script_args: Any, **kwargs):
        super().__init__(*args, model=whole.model.iasm, data_collator=collate, **kwargs)
        self.whole, self.script_args, self.photographs = whole, script_args, ()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach().mean(), None, None


def train_module(
    model: ASEForConditionalGeneration,
    splits: dict[str, datasets.Dataset],
    collator: ASEDataCollator,
    args: TrainingArguments,
    script_args: Any,
    resumed: str | None,
    **arguments: Any,
) -> ModuleTrainer:
    """
    One run over what the encoder gives for the splits `train_dataset` and `eval_dataset`; of the module learns what is not
    frozen.

    That goes when the run ends, and is made anew where one goes on: the photographs may have changed meanwhile.
    """
    learning = [parameter for parameter in model.model.iasm.parameters() if parameter.requires_grad]
    model.to(args.device).eval().requires_grad_(False)
    folder, processes = Path(args.output_dir, "inputs"), PartialState()
    if processes.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    processes.wait_for_everyone()
    for name, rows in splits.items():
        keep_inputs(model, first_rows(rows), collator, args, folder / name)
    processes.wait_for_everyone()
    for parameter in learning:
        parameter.requires_grad_(True)
    kept = {name: KeptInputs(folder / name) for name in splits}
    trainer = ModuleTrainer(whole=model, args=args, script_args=script_args, **kept, **arguments)
    trainer.train(resume_from_checkpoint=resumed)
    processes.wait_for_everyone()
    if processes.is_main_process:
        shutil.rmtree(folder)
    return trainer
