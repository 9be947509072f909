r"""
Does aesthetic saliency make critiques better? ASE against the same base without it, on a pretrained image encoder.

    python examples/critique/critique_benchmark.py --encoder runs/dinov2-small --arms layer-4 layer-6 layer-8 layer-10 layer-12 \
        --samples 0 --seeds 0 --validation --work runs/critique-layers                    # which layer should the base read?
    python examples/critique/critique_benchmark.py --encoder runs/dinov2-small --layer 8 --curve 1000 16000 \
        --record examples/ase-mini/EXPERIMENTS.md                                         # the tables, hours
    python examples/critique/critique_benchmark.py --encoder runs/dinov2-small --arms layer-8 ase --seeds 0 --pictures 500 \
        --test-pictures 200 --warm-up 2000 --vision-samples 500 --samples 500 --work runs/look             # a look, minutes

`convert_dinov2.py` makes the encoder. The base is an InternVL of it, of a fresh projector and of the bundled model's
language model, which has learned to write critiques; four neighbouring patches are one of its 36 image tokens. Every arm
sees the same pictures in the same order with the same labels: `--warm-up` and then `--vision-samples` without captions, for
all but the language model, and `--samples` end to end with captions. A saliency module learns alone before, from the
samples of the warm-up, as it would be trained (`finetune.py --stage module`): from the start beside all others it is left
unused. In every arm aspect labels and scores also train a head on the image features that the
language model reads. Captions to learn from have one fixed form (`plain_caption`), so that few of them teach what to see,
and so has the one reference. What a caption says is read from its words (`critique_captions.named_faults`).

    layer-12       the base reads the encoder's last layer, as most do
    layer-8, ...   the base reads this layer (counted from 1); `--layer` names the one that all arms below stand on, to
                   be chosen on pictures that are not the test (`--validation`)
    longer         that base on twice as many samples in every part, to see whether it only lacks training
    photometry     the saliency branch on photometry of the pixels alone, its map supervised
    control        the saliency branch without map targets: the same parameters and compute, a free attention map
    ase            ASE: the module reads the encoder's layer 6 beside photometry, the map is supervised
    probe          the same, with `probe_tokens`

With `--labels none` no arm is told which aspects are there but by captions, as where people have only those: the module
learns from scores and maps, the control's from scores, and heads for aspects do not learn at all. With `--labels words`
the words of the captions are the aspects that modules and heads learn (`caption_words.py`), of the pictures that have
captions in the last part. In both fusion layers stay shut until there are captions: opened by scores alone they were in
the way of captions.

The encoder is frozen, so what its lower layers give is computed once and kept. With `--train-encoder` every arm also
trains the layers above the sixth. `--curve` repeats the last part with other numbers of captions. Tested are held-out
photographs and cut-outs with the generator's faults (`test`) and with those of `foreign_edits.py` (`foreign`).

Where there is a GPU, pictures, kept states and runs are on it, `--jobs` runs at once; `--workers` processes make pictures.
Finished runs are kept in `--work` and not run again; `--finished` runs none and makes the tables of those that are there,
with nothing but their files. A table that is recorded keeps the runs of the same settings that its JSON names already.
Needs the extra `evaluation`.
"""

import argparse
import copy
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from critique_captions import FAULTS, named_faults, plain_caption
from critique_data import critique_dataset, load_sources
from critique_tables import READ, Figures, accuracies, as_markdown, decide, figures_of, measure_maps
from foreign_edits import make_foreign_sample
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from train_ase_mini import WEIGHTS, make_optimizer
from transformers import (
    AutoConfig,
    AutoModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


sys.path.insert(0, str(Path(__file__).parents[1]))

from caption_words import choose_words, labels_of_words
from common import write_between, write_captions
from metrics import caption_scores

from ase_mllm import ASEForConditionalGeneration, ASEProcessor, IASMConfig
from ase_mllm.modeling_iasm import aspect_loss, saliency_losses, score_loss


BUNDLE = Path(__file__).parents[1] / "ase-mini"
IMAGE_SIZE, SALIENCY_SIZE = 168, 160  # pixels that the encoder sees, and the saliency module
MERGED = 2  # patches along each side of what becomes one image token
PART = 100  # pictures that a process makes at once
TESTED = 200  # pictures at once in tests
LAYER_ARMS = ("layer-4", "layer-6", "layer-8", "layer-10", "layer-12")
GRAFTS = {
    "photometry": {"encoder_layers": []},
    "control": {"encoder_layers": [READ - 1], "saliency_loss_weight": 0.0},
    "ase": {"encoder_layers": [READ - 1]},
    "probe": {"encoder_layers": [READ - 1], "probe_tokens": True},
}
ARMS = (*LAYER_ARMS, "longer", *GRAFTS)
LONGER = 2
TESTS = ("test", "foreign")
TARGETS = {"score_targets": "score", "saliency_targets": "saliency", "aspect_targets": "aspect_labels"}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# Pictures ------------------------------------------------------------------------------------------------------------


def make_rows(split: str, numbers: range, sources: Path | None) -> Iterable[dict[str, Any]]:
    """
    Samples of a split, by number. Beside `train` and `test`: `validation`, photographs to train on with other crops and
    faults; `foreign`, with faults by other means; `photographs`, without cut-outs and all with a subject of their own.
    """
    if split == "foreign":
        pool = load_sources("test", sources)
        return (make_foreign_sample(index, "test", 0, pool) for index in numbers)
    if split == "photographs":
        drawn = 4 * numbers.stop
        rows = critique_dataset("test", drawn, seed=2, sources=load_sources("test", sources), composite_share=0.0)
        known = (row for row in map(rows.__getitem__, range(drawn)) if row["saliency"].any())
        return islice(known, numbers.start, numbers.stop)
    seed, of = (1, "train") if split == "validation" else (0, split)
    rows = critique_dataset(of, numbers.stop, seed=seed, sources=load_sources(of, sources))
    return (rows[index] for index in numbers)


def make_pictures(split: str, number: int, size: int, sources: Path | None) -> dict[str, torch.Tensor]:
    """Samples as every arm and every epoch sees them: `image` is uint8 `(n, 3, size, size)`, squashed to a square."""
    return {name: torch.from_numpy(one) for name, one in make_part((split, range(number)), size, sources).items()}


def make_part(part: tuple[str, range], size: int, sources: Path | None) -> dict[str, np.ndarray]:
    """Some samples of a split, as arrays: between processes, tensors would take a shared file each."""
    columns = {"image": [], "aspect_labels": [], "score": [], "saliency": [], "composite": []}
    for row in make_rows(*part, sources):
        image = np.array(row["image"].resize((size, size), Image.Resampling.BICUBIC))
        for name, values in columns.items():
            values.append(torch.from_numpy(image).permute(2, 0, 1) if name == "image" else torch.tensor(row[name]))
    return {name: torch.stack(values).numpy() for name, values in columns.items()}


@lru_cache(maxsize=1)
def read_columns(folder: Path, split: str) -> dict[str, torch.Tensor]:
    """The pictures of a split and what is true of them, on the device."""
    return load_file(folder / f"{split}.safetensors", device=str(device()))


class Pictures(Dataset):
    """`number` places in one split from `start` on; after the last picture comes the first again."""

    def __init__(self, folder: Path, split: str, number: int | None = None, start: int = 0):
        self.columns = read_columns(folder, split)
        self.start, self.number = start, number or len(self.columns["image"])

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> int:
        return (self.start + index) % len(self.columns["image"])

    def captions(self) -> list[str]:
        """Of all pictures of the split."""
        return [plain_caption(labels) for labels in self.columns["aspect_labels"].tolist()]


@lru_cache(maxsize=1)
def word_labels(folder: Path, places: range) -> tuple[list[str], torch.Tensor]:
    """Words of the captions of pictures to train on, and which of them each says; of pictures elsewhere that is unknown."""
    pictures = Pictures(folder, "train", len(places), places.start)
    captions, captioned = pictures.captions(), sorted({pictures[i] for i in range(len(pictures))})
    words = choose_words([[captions[place]] for place in captioned])
    labels = torch.full((len(captions), len(words)), -1.0)
    labels[captioned] = torch.tensor([labels_of_words([captions[place]], words) for place in captioned])
    return words, labels


def aspects_to_learn(args: argparse.Namespace) -> tuple[list[str], torch.Tensor | None]:
    """Names of what modules and heads learn to tell, and its labels in the pictures to train on; None: the truth."""
    if args.labels == "words":
        start = args.warm_up + args.vision_samples
        return word_labels(args.work, range(start, start + args.samples))
    if args.labels == "none":
        return list(FAULTS), torch.full_like(read_columns(args.work, "train")["aspect_labels"], -1)
    return list(FAULTS), None


def prompt_tokens(processor: ASEProcessor) -> torch.Tensor:
    """The prompt of every picture, `(tokens,)`, with a place for each image token."""
    blank = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    return processor(text=[processor.critique_prompt()], images=[blank], return_tensors="pt")["input_ids"][0]


class Collator:
    """
    Batches from places in a split, as `ASEDataCollator` makes them, on the device and without a way over files of pictures.

    `rows` are the places. With `captions=False`, without text; `labels` of aspects by default are the truth.
    """

    def __init__(
        self,
        pictures: Pictures,
        processor: ASEProcessor,
        captions: bool = True,
        labels: torch.Tensor | None = None,
    ):
        self.columns, images = pictures.columns, processor.image_processor
        if labels is not None:
            self.columns = {**self.columns, "aspect_labels": labels.to(self.columns["image"].device)}
        self.device = self.columns["image"].device
        self.mean, self.std = (
            torch.tensor(one, device=self.device).view(3, 1, 1) for one in (images.image_mean, images.image_std)
        )
        self.tokens = None
        if captions:
            prompt, tokenizer = prompt_tokens(processor), processor.tokenizer
            answers = tokenizer(pictures.captions(), add_special_tokens=False)["input_ids"]
            tokens = [torch.cat([prompt, torch.tensor([*answer, tokenizer.eos_token_id])]) for answer in answers]
            self.begin, self.ends = len(prompt), torch.tensor([len(one) for one in tokens])
            tokens = pad_sequence(tokens, batch_first=True, padding_value=tokenizer.pad_token_id)
            self.tokens = tokens.to(self.device)

    def __call__(self, rows: list[int]) -> dict[str, torch.Tensor]:
        places = torch.tensor(rows, device=self.device)
        batch = {"rows": places, "pixel_values": (self.columns["image"][places] / 255 - self.mean) / self.std}
        batch |= {name: self.columns[column][places] for name, column in TARGETS.items()}
        if self.tokens is None:
            return batch
        ends = self.ends[rows]
        steps = torch.arange(int(ends.max()), device=self.device)
        tokens = self.tokens[places, : len(steps)]
        inside = steps < ends.to(self.device)[:, None]
        labels = tokens.masked_fill(~inside | (steps < self.begin), -100)
        return {**batch, "input_ids": tokens, "attention_mask": inside.long(), "labels": labels}


def make_processor(language_model: Path) -> ASEProcessor:
    """That of the language model's folder, for pictures as the encoder takes them."""
    processor = ASEProcessor.from_pretrained(language_model)
    images = processor.image_processor
    images.image_mean, images.image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    images.size = images.crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor.base_processor.patch_size = 14 * MERGED
    return processor


# What frozen layers give ---------------------------------------------------------------------------------------------


def states_path(args: argparse.Namespace, split: str, layer: int) -> Path:
    return args.work / f"{split}-layer-{layer}.safetensors"


def keep_states(args: argparse.Namespace, split: str, layers: set[int]):
    """Writes the output of these layers (counted from 1) for all pictures of a split, in half precision."""
    layers = {layer for layer in layers if not states_path(args, split, layer).exists()}
    if not layers:
        return
    with safe_open(args.work / f"{split}.safetensors", "pt") as file:
        number = file.get_slice("image").get_shape()[0]
    workers = 1 if torch.cuda.is_available() else args.workers
    parts = in_processes(partial(read_states, args, split, layers), parts_of(number), workers)
    for layer in layers:
        states = torch.from_numpy(np.concatenate([part[layer] for part in parts]))
        save_whole({"states": states}, states_path(args, split, layer))


@torch.inference_mode()
def read_states(args: argparse.Namespace, split: str, layers: set[int], part: range) -> dict[int, np.ndarray]:
    """What these layers give for some pictures of a split, `(n, tokens, width)` by layer."""
    encoder, states = load_tower(args.encoder, max(layers)).eval().to(device()), {layer: [] for layer in layers}
    mean, std = (
        torch.tensor(one, device=device()).view(3, 1, 1) for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    with safe_open(args.work / f"{split}.safetensors", "pt") as file:
        images = file.get_slice("image")[part.start : part.stop].to(device())
    for batch in images.split(25):
        hidden = encoder((batch / 255 - mean) / std, output_hidden_states=True).hidden_states
        for layer, kept in states.items():
            kept.append(hidden[layer].half().cpu())
    return {layer: torch.cat(kept).numpy() for layer, kept in states.items()}


class KeptStates:
    """The states of the pictures in hand, in place of what the lower layers of an encoder would compute."""

    def __init__(self, args: argparse.Namespace, layer: int):
        self.read = lambda split: load_file(states_path(args, split, layer), device=str(device()))["states"]
        self.layer, self.split, self.current = layer, None, None

    def open(self, split: str):
        if split != self.split:
            self.split, self.states = split, self.read(split)

    def choose(self, rows: torch.Tensor) -> torch.Tensor:
        """Those of some pictures of the open split, `(n, tokens, width)`; they stay chosen."""
        self.current = self.states[rows].float()
        return self.current

    def replace_in(self, tower: PreTrainedModel):
        """From now on the tower begins after the layer; hooks on the layers below still run."""
        tower.embeddings.forward = lambda pixel_values, **kwargs: self.current
        for layer in tower.encoder.layer[: self.layer]:
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states


# Arms ----------------------------------------------------------------------------------------------------------------


class Learner(nn.Module):
    """A model with a head for aspects and scores on the image features that its language model reads."""

    def __init__(self, mllm: PreTrainedModel, kept: KeptStates, num_aspects: int = len(FAULTS)):
        super().__init__()
        self.mllm, self.kept = mllm, kept
        size = mllm.config.image_seq_length * mllm.config.text_config.hidden_size
        self.norm = nn.LayerNorm(size)
        self.aspects = nn.Linear(size, num_aspects)
        self.scores = nn.Linear(size, 10)

    def forward(
        self,
        rows: torch.Tensor,
        pixel_values: torch.Tensor,
        score_targets: torch.Tensor,
        aspect_targets: torch.Tensor,
        saliency_targets: torch.Tensor,
        **inputs: Any,
    ) -> dict[str, Any]:
        """Without `input_ids`, what can be learned without captions."""
        self.kept.choose(rows)
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


class ModuleAlone(nn.Module):
    """The saliency module on kept states, without its encoder."""

    def __init__(self, learner: Learner):
        super().__init__()
        self.iasm, self.kept = learner.mllm.model.iasm, learner.kept

    def forward(self, rows: torch.Tensor, **inputs: torch.Tensor) -> dict[str, Any]:
        patches = self.kept.choose(rows)[:, 1:]  # without the class token
        side = IMAGE_SIZE // 14
        grid = patches.transpose(1, 2).unflatten(2, (side, side))
        return {"loss": self.iasm(**inputs, encoder_states=[grid] * len(self.iasm.config.encoder_layers)).loss}


def be_quiet():
    """In every process: one thread, the GPU's fast float32, no reports of the layers that are left out on purpose."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def parts_of(number: int) -> list[range]:
    return [range(start, min(start + PART, number)) for start in range(0, number, PART)]


def in_processes(function: Callable, items: list, workers: int) -> list:
    if workers == 1:
        be_quiet()
        return list(map(function, items))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=be_quiet) as pool:
        return list(pool.map(function, items))


def save_whole(tensors: dict[str, torch.Tensor], path: Path, **metadata: str):
    """Under another name first: what was begun and not ended must not pass for finished."""
    part = path.with_name(f".{os.getpid()}.{path.name}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata=metadata)
    part.replace(path)


def base_checksum(language_model: Path) -> str:
    files = sorted(language_model.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@cache
def load_bundle(folder: Path) -> ASEForConditionalGeneration:
    return ASEForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def load_tower(encoder: Path, layers: int) -> PreTrainedModel:
    return AutoModel.from_pretrained(encoder, num_hidden_layers=layers, dtype=torch.float32)


def load_base(encoder: Path, layer: int, language_model: Path) -> InternVLForConditionalGeneration:
    """The base that reads this layer of the encoder (counted from 1): InternVL with a bundle's language model."""
    depth = AutoConfig.from_pretrained(encoder).num_hidden_layers
    tower, bundle = load_tower(encoder, layer), load_bundle(language_model)
    config = InternVLConfig(
        vision_config=tower.config,
        text_config=copy.deepcopy(bundle.config.text_config),
        image_token_id=bundle.config.image_token_id,
        image_seq_length=(IMAGE_SIZE // 14 // MERGED) ** 2,
        downsample_ratio=1 / MERGED,
        vision_feature_layer=-1 if layer == depth else layer,
        tie_word_embeddings=True,
    )
    base = InternVLForConditionalGeneration(config)
    base.model.vision_tower.load_state_dict(tower.state_dict())
    base.model.language_model.load_state_dict(bundle.model.mllm.model.language_model.state_dict())
    base.tie_weights()
    base.generation_config = copy.deepcopy(bundle.generation_config)
    return base


@lru_cache(maxsize=1)
@torch.inference_mode()
def known_scale(language_model: Path, work: Path) -> torch.Tensor:
    """Standard deviation of the image features that a bundle's language model has learned to read."""
    bundle, processor = load_bundle(language_model), ASEProcessor.from_pretrained(language_model)
    pixels = processor.image_processor(first_images(work), return_tensors="pt")["pixel_values"]
    return torch.cat(list(bundle.get_image_features(pixels).pooler_output)).std()


@torch.inference_mode()
def match_scale(base: InternVLForConditionalGeneration, processor: ASEProcessor, args: argparse.Namespace):
    """A fresh projector gives features as large as those that the language model knows, or it does not learn to read."""
    pixels = processor.image_processor(first_images(args.work), return_tensors="pt")["pixel_values"]
    fresh = base.model.get_image_features(pixel_values=pixels, return_dict=True)
    scale = known_scale(args.language_model, args.work) / torch.cat(list(fresh.pooler_output)).std()
    base.model.multi_modal_projector.linear_2.weight.mul_(scale)


def first_images(work: Path) -> list[Image.Image]:
    images = Pictures(work, "train").columns["image"][:32].permute(0, 2, 3, 1).cpu().numpy()
    return list(map(Image.fromarray, images))


def graft(
    arm: str, base: PreTrainedModel, processor: ASEProcessor, aspects: Sequence[str] = FAULTS
) -> PreTrainedModel:
    """The base with the saliency branch of this arm; for the arms of the base as it is."""
    if arm not in GRAFTS:
        return base
    iasm = IASMConfig(
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
        image_size=SALIENCY_SIZE,
        hidden_size=128,
        num_attention_heads=4,
        aspect_names=list(aspects),
        **{**WEIGHTS, **GRAFTS[arm]},
    )
    fused = list(range(READ - 1, base.config.vision_config.num_hidden_layers))
    return ASEForConditionalGeneration.from_mllm_pretrained(
        base, iasm_config=iasm, fusion_layers=fused, fusion_hidden_size=192, fusion_num_attention_heads=12
    )


def base_layer(arm: str, args: argparse.Namespace) -> int:
    return int(arm.removeprefix("layer-")) if arm in LAYER_ARMS else args.layer


def kept_layer(arm: str, args: argparse.Namespace) -> int:
    """Below and at this layer nothing is trained or fused."""
    return READ if arm in GRAFTS or args.train_encoder else base_layer(arm, args)


def build(arm: str, args: argparse.Namespace, processor: ASEProcessor) -> Learner:
    base = load_base(args.encoder, base_layer(arm, args), args.language_model)
    match_scale(base, processor, args)
    kept, (aspects, _) = KeptStates(args, kept_layer(arm, args)), aspects_to_learn(args)
    learner = Learner(base, kept, len(aspects))
    learner.mllm = graft(arm, base, processor, aspects)  # places are probed while the encoder is whole
    tower = base.model.vision_tower.requires_grad_(False)
    kept.replace_in(tower)
    if args.train_encoder:
        tower.encoder.layer[kept.layer :].requires_grad_(True)
    return learner.to(device())


# Runs ----------------------------------------------------------------------------------------------------------------


def train(model: nn.Module, pictures: Pictures, collator: Collator, seed: int, args: argparse.Namespace) -> float:
    """One run of the `Trainer` over all pictures; seconds that it took."""
    arguments = TrainingArguments(
        output_dir=str(args.work / "trainer"),
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=1,
        per_device_train_batch_size=args.batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=min(100, len(pictures) // args.batch_size // 10),
        save_strategy="no",
        logging_steps=100,
        logging_nan_inf_filter=False,  # would wait for the GPU in every step
        remove_unused_columns=False,
        dataloader_pin_memory=False,  # batches are made on the device
        label_names=["labels"],
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )
    optimizer = make_optimizer(model, args.learning_rate, encoder=0.05)
    trainer = Trainer(model, arguments, train_dataset=pictures, data_collator=collator, optimizers=(optimizer, None))
    return trainer.train().metrics["train_runtime"]


@contextmanager
def shut_fusions(learner: Learner, shut: bool):
    """Inside, if `shut`, fusion layers do not learn: their gates stay at zero."""
    fusions = [p for name, p in learner.mllm.named_parameters() if shut and ".fusions." in name]
    for parameter in fusions:
        parameter.requires_grad_(False)
    yield
    for parameter in fusions:
        parameter.requires_grad_(True)


def see(arm: str, seed: int, args: argparse.Namespace, processor: ASEProcessor) -> tuple[Learner, float]:
    """The learner after the two parts without captions, trained or as it was kept, and the seconds that they took."""
    learner, path = build(arm, args, processor), args.work / f"{arm}-{seed}.safetensors"
    trained = {name: tensor for name, tensor in learner.named_parameters() if tensor.requires_grad}
    if path.exists():
        with safe_open(path, "pt") as file, torch.no_grad():
            for name, tensor in trained.items():
                tensor.copy_(file.get_tensor(name))
            return learner, float(file.metadata()["seconds"])
    numbers = np.array([args.warm_up, args.vision_samples]) * (LONGER if arm == "longer" else 1)
    warm_up, vision = (
        Pictures(args.work, "train", n, start) for n, start in zip(numbers.tolist(), (0, int(numbers[0])))
    )
    collator = Collator(warm_up, processor, captions=False, labels=aspects_to_learn(args)[1])
    learner.kept.open("train")
    seconds = train(ModuleAlone(learner), warm_up, collator, seed, args) if arm in GRAFTS else 0.0
    with shut_fusions(learner, args.labels != "truth"):
        seconds += sum(train(learner, part, collator, seed, args) for part in (warm_up, vision))
    save_whole({name: tensor.detach() for name, tensor in trained.items()}, path, seconds=str(seconds))
    return learner, seconds


def result_path(args: argparse.Namespace, run: tuple[str, int, int]) -> Path:
    return args.work / "{}-{}-{}.json".format(*run)


def run_arm(args: argparse.Namespace, run: tuple[str, int, int]) -> dict[str, Any]:
    """Trains and measures one arm, with so many captions and this seed, or reads what it gave."""
    (arm, samples, seed), path = run, result_path(args, run)
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    be_quiet()
    set_seed(seed)
    processor = make_processor(args.language_model)
    learner, seconds = see(arm, seed, args, processor)
    if samples:
        number = samples * (LONGER if arm == "longer" else 1)
        pictures = Pictures(args.work, "train", number, args.warm_up + args.vision_samples)
        learner.kept.open("train")
        collator = Collator(pictures, processor, labels=aspects_to_learn(args)[1])
        seconds += train(learner, pictures, collator, seed, args)
    result = {
        split: measure(learner.eval(), split, Pictures(args.work, split), processor, bool(samples), args.labels)
        for split in args.tests
    }
    result["seconds of training"] = seconds
    result["parameters"] = sum(parameter.numel() for parameter in learner.mllm.parameters())
    result["gates"] = [p.tanh().item() for name, p in learner.mllm.named_parameters() if name.endswith("gate")]
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(*run, {name: round(v, 1) for name, v in list(figures_of(result, args.tests[0]).items())[:8]}, flush=True)
    return result


def caption_pictures(
    model: PreTrainedModel, processor: ASEProcessor, prompt: torch.Tensor, pixel_values: torch.Tensor, **options: Any
) -> list[str]:
    """Captions of a batch of pictures after one prompt, `(tokens,)`."""
    prompts = prompt.to(device()).expand(len(pixel_values), -1)
    inputs = {"input_ids": prompts, "attention_mask": torch.ones_like(prompts), "pixel_values": pixel_values}
    return write_captions(model, processor, inputs, max_new_tokens=90, **options)[0]


@torch.inference_mode()
def measure(
    learner: Learner,
    split: str,
    pictures: Pictures,
    processor: ASEProcessor,
    with_captions: bool,
    labels: str = "truth",
) -> dict[str, Any]:
    """All figures of one trained arm on the pictures of one split; those of heads only where they have learned."""
    columns = {name: values.cpu() for name, values in pictures.columns.items() if name != "image"}
    learner.kept.open(split)
    unknown = torch.full((len(pictures.columns["image"]), learner.aspects.out_features), -1.0)  # only losses need them
    model, collator = learner.mllm, Collator(pictures, processor, captions=False, labels=unknown)
    captions, heads, judged, maps = [], [], [], []
    for rows in torch.arange(len(pictures)).split(TESTED):
        batch = collator(rows.tolist())
        heads += learner(**batch)["aspects"].tolist()
        if with_captions:
            captions += caption_pictures(model, processor, prompt_tokens(processor), batch["pixel_values"])
        if isinstance(model, ASEForConditionalGeneration):
            outputs = model.get_image_features(batch["pixel_values"])
            maps += list(outputs.saliency_maps.cpu())
            judged += outputs.aspect_logits.tolist()
    if labels != "truth":
        heads, judged = [], []
    truths = [dict(zip(FAULTS, labels)) for labels in columns["aspect_labels"].tolist()]
    composite = columns["composite"].tolist()
    references = [[caption] for caption in pictures.captions()]
    pasted = [i for i, is_composite in enumerate(composite) if is_composite]
    result = {
        "accuracy of the heads": accuracies([decide(logits) for logits in heads], truths, composite),
        "accuracy of the IASM": accuracies([decide(logits) for logits in judged], truths, composite),
        "saliency": measure_maps([maps[i] for i in pasted], [columns["saliency"][i].numpy() for i in pasted])
        if maps
        else None,
    }
    if captions:
        result |= {
            "accuracy": accuracies([named_faults(caption) for caption in captions], truths, composite),
            "text": caption_scores(captions, references),
            "text, composites": caption_scores([captions[i] for i in pasted], [references[i] for i in pasted]),
            "wrong photo": caption_scores(captions, references[1:] + references[:1]),
            "captions": captions,
        }
    return result


# Command -------------------------------------------------------------------------------------------------------------


def check_settings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Finished runs only stand beside runs of the same settings, which it returns."""
    names = ("pictures", "test_pictures", "warm_up", "vision_samples", "batch_size", "learning_rate")
    names += ("layer", "train_encoder", "validation")
    settings, path = {name: getattr(args, name) for name in names}, args.work / "settings.json"
    if args.labels != "truth":  # not a word of it else: records of before it was an option have none
        settings["labels"] = args.labels
    if args.finished:
        if not path.exists():
            parser.error(f"{path} is not there: the finished runs need the settings that they were made with")
        return json.loads(path.read_text(encoding="utf-8"))
    settings |= {"base": base_checksum(args.language_model), "encoder": args.encoder.name}
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        parser.error(f"{args.work} holds runs of other settings ({before}): give another --work")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return settings


def make_data(args: argparse.Namespace, arms: set[str]):
    """Writes the pictures of all splits and what frozen layers give for them, where they are not there yet."""
    sizes = {"train": args.pictures, **dict.fromkeys(args.tests, args.test_pictures)}
    missing = [split for split in sizes if not (args.work / f"{split}.safetensors").exists()]
    parts = [(split, part) for split in missing for part in parts_of(sizes[split])]
    made = in_processes(partial(make_part, size=IMAGE_SIZE, sources=args.sources), parts, args.workers)
    for split in missing:
        own = [one for (of, _), one in zip(parts, made) if of == split]
        columns = {name: torch.from_numpy(np.concatenate([one[name] for one in own])) for name in own[0]}
        save_whole(columns, args.work / f"{split}.safetensors")
    for split in sizes:
        keep_states(args, split, {kept_layer(arm, args) for arm in arms})


def read_record(record: Path | None, settings: dict[str, Any]) -> Figures:
    """The figures beside a recorded table, of the runs of the same settings."""
    if record is None or not record.with_suffix(".json").exists():
        return {}
    before = json.loads(record.with_suffix(".json").read_text(encoding="utf-8"))
    if before["settings"] != settings:
        return {}
    return {(run.pop("arm"), run.pop("captions"), run.pop("seed")): run for run in before["runs"]}


def run_all(args: argparse.Namespace, runs: list[tuple[str, int, int]]) -> dict[tuple[str, int, int], dict[str, Any]]:
    """What all runs gave, `--jobs` at once, in any order. One that fails takes no other with it."""
    results, failed = {}, {}

    def settle(run: tuple[str, int, int], ended: Callable[[], dict[str, Any]]):
        try:
            results[run] = ended()
        except BrokenExecutor:  # a process was killed, and its pool with all that it had to do
            raise
        except Exception as error:
            failed[run] = f"{type(error).__name__}: {error}"
            traceback.print_exception(error)

    def try_in_processes(waiting: list[tuple[str, int, int]], jobs: int) -> dict[tuple[str, int, int], str]:
        broken = {}
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            futures = {pool.submit(run_arm, args, run): run for run in waiting}
            for future in as_completed(futures):
                try:
                    settle(futures[future], future.result)
                except BrokenExecutor as error:
                    broken[futures[future]] = str(error)
        return broken

    if args.jobs == 1:
        for run in runs:
            settle(run, partial(run_arm, args, run))
    while args.jobs > 1 and (waiting := [run for run in runs if run not in results and run not in failed]):
        if len(try_in_processes(waiting, args.jobs)) == len(waiting):  # which of them kills its process shows alone
            for run in waiting:
                failed |= try_in_processes([run], 1)
    for run, error in failed.items():
        print("failed:", *run, error, file=sys.stderr, flush=True)
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a Dinov2 model")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["layer-12", "layer-8", *ARMS[len(LAYER_ARMS) :]])
    parser.add_argument("--layer", type=int, default=8, help="that the base of the arms without a number reads")
    parser.add_argument("--train-encoder", action="store_true", help="train its layers above the sixth, too")
    parser.add_argument(
        "--labels", choices=["truth", "none", "words"], default="truth", help="of aspects that modules and heads learn"
    )
    parser.add_argument("--validation", action="store_true", help="measure on photographs to train on, seen otherwise")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=8000, help="different pictures to train on")
    parser.add_argument("--test-pictures", type=int, default=600)
    parser.add_argument(
        "--warm-up", type=int, default=16000, help="samples that train the saliency module alone, then all"
    )
    parser.add_argument("--vision-samples", type=int, default=4000, help="samples without captions after that")
    parser.add_argument("--samples", type=int, default=4000, help="samples end to end with captions after that")
    parser.add_argument("--curve", nargs="*", type=int, default=[], help="other numbers of them")
    parser.add_argument("--curve-arms", nargs="+", choices=ARMS, default=["layer-8", "ase"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--workers", type=int, default=2, help="processes that make pictures, and states on a CPU")
    parser.add_argument("--finished", action="store_true", help="run nothing: tables of the runs that are in --work")
    parser.add_argument(
        "--language-model", type=Path, default=BUNDLE, help="folder of the bundle that it is taken from"
    )
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--work", type=Path, default=Path("runs/critique-benchmark"))
    parser.add_argument("--record", type=Path, help="write the table between this file's marks, all runs beside it")
    args = parser.parse_args()
    args.tests = ["validation"] if args.validation else list(TESTS)

    args.work.mkdir(parents=True, exist_ok=True)
    settings = check_settings(args, parser)
    # the same arm with all seeds before the next, so that what was named first is known first
    runs = [(arm, args.samples, seed) for arm in args.arms for seed in args.seeds]
    curve = [(arm, number, seed) for arm in args.curve_arms for number in args.curve for seed in args.seeds]
    runs += [run for run in curve if run not in runs]
    if args.finished:
        results = {run: run_arm(args, run) for run in runs if result_path(args, run).exists()}
    else:
        make_data(args, {run[0] for run in runs if not result_path(args, run).exists()})
        results = run_all(args, runs)
    if not results:
        parser.error(f"of {len(runs)} runs none is finished in {args.work}")
    figures = read_record(args.record, settings) | {
        run: {test: figures_of(result, test) for test in args.tests} for run, result in results.items()
    }
    text = as_markdown(figures, args.samples, settings, ARMS)
    print(text)
    (args.work / "table.md").write_text(text, encoding="utf-8")
    if args.record:
        write_between(args.record, "<!-- benchmark: begin -->", "<!-- benchmark: end -->", text)
        listed = [
            {"arm": arm, "captions": number, "seed": seed, **one} for (arm, number, seed), one in figures.items()
        ]
        record = json.dumps({"settings": settings, "runs": listed}, indent=1)
        args.record.with_suffix(".json").write_text(record + "\n", encoding="utf-8")
    return int(len(results) < len(runs))


if __name__ == "__main__":
    sys.exit(main())
