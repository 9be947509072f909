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
sees the same pictures in the same order with the same labels, in three parts: `--warm-up` samples for the saliency module
alone, `--vision-samples` for all but the language model, and `--samples` end to end with captions (arms without a module
train in the first part too). In every arm aspect labels and scores also train a head on the image features that the
language model reads. Captions to learn from have one fixed form (`plain_caption`), so that few of them teach what to see,
and so has the one reference. What a caption says is read from its words (`critique_captions.named_faults`).

    layer-12       the base reads the encoder's last layer, as most do
    layer-8, ...   the base reads this layer (counted from 1); `--layer` names the one that all arms below stand on, to
                   be chosen on pictures that are not the test (`--validation`)
    longer         that base on twice as many samples in every part, to see whether it only lacks training
    photometry     the saliency branch on photometry of the pixels alone, its map supervised
    control        the saliency branch without map targets: the same parameters and compute, a free attention map
    ase            ASE: the module reads the encoder's layer 6 beside photometry, the map is supervised

The encoder is frozen, so what its lower layers give is computed once and kept. With `--train-encoder` every arm also
trains the layers above the sixth. `--curve` repeats the last part with other numbers of captions. Tested are held-out
photographs and cut-outs with the generator's faults (`test`) and with those of `foreign_edits.py` (`foreign`).

Finished runs are kept in `--work` and not run again. Needs the extra `evaluation`.
"""

import argparse
import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from critique_captions import ASPECT_FAULTS, FAULTS, named_faults, plain_caption
from critique_data import critique_dataset, load_sources
from evaluate_ase_mini import saliency_scores
from foreign_edits import make_foreign_sample
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
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

from common import write_between, write_captions
from metrics import caption_scores

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor, IASMConfig
from ase_mllm.modeling_iasm import aspect_loss, saliency_losses, score_loss


BUNDLE = Path(__file__).parents[1] / "ase-mini"
IMAGE_SIZE, SALIENCY_SIZE = 168, 160  # pixels that the encoder sees, and the saliency module
MERGED = 2  # patches along each side of what becomes one image token
READ = 6  # the layer that the saliency module reads, counted from 1
LAYER_ARMS = ("layer-4", "layer-6", "layer-8", "layer-10", "layer-12")
GRAFTS = {
    "photometry": {"encoder_layers": []},
    "control": {"encoder_layers": [READ - 1], "saliency_loss_weight": 0.0},
    "ase": {"encoder_layers": [READ - 1]},
}
ARMS = (*LAYER_ARMS, "longer", *GRAFTS)
LONGER = 2
TESTS = ("test", "foreign")
TARGETS = ("score_targets", "saliency_targets", "aspect_targets")
PLACED = ("placement", "depth", "subject sharpness")  # what has a place in the picture


# Pictures ------------------------------------------------------------------------------------------------------------


def make_rows(split: str, number: int, sources: Path | None) -> Iterable[dict[str, Any]]:
    """
    Samples of a split. Beside `train` and `test`: `validation`, photographs to train on with other crops and faults;
    `foreign`, with faults by other means; `photographs`, without cut-outs and all with a subject of their own.
    """
    if split == "foreign":
        pool = load_sources("test", sources)
        return (make_foreign_sample(index, "test", 0, pool) for index in range(number))
    if split == "photographs":
        rows = critique_dataset("test", 4 * number, seed=2, sources=load_sources("test", sources), composite_share=0.0)
        known = (row for row in map(rows.__getitem__, range(len(rows))) if row["saliency"].any())
        return islice(known, number)
    seed, of = (1, "train") if split == "validation" else (0, split)
    rows = critique_dataset(of, number, seed=seed, sources=load_sources(of, sources))
    return (rows[index] for index in range(number))


def make_pictures(split: str, number: int, size: int, sources: Path | None) -> dict[str, torch.Tensor]:
    """Samples as every arm and every epoch sees them: `image` is uint8 `(n, 3, size, size)`, squashed to a square."""
    columns = {"image": [], "aspect_labels": [], "score": [], "saliency": [], "composite": []}
    for row in make_rows(split, number, sources):
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
        return {**row, "index": index, "image": image, "caption": plain_caption(row["aspect_labels"].tolist())}


class Collator(ASEDataCollator):
    """Batches that also say which pictures of their split they are; with `captions=False`, without text."""

    def __init__(self, processor: ASEProcessor, captions: bool = True):
        super().__init__(processor)
        self.captions = captions

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        kept = batch if self.captions else {name: batch[name] for name in ("pixel_values", *TARGETS)}
        return {**kept, "rows": torch.tensor([example["index"] for example in examples])}


def make_processor() -> ASEProcessor:
    """The bundled model's, for pictures as the encoder takes them."""
    processor = ASEProcessor.from_pretrained(BUNDLE)
    images = processor.image_processor
    images.image_mean, images.image_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    images.size = images.crop_size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor.base_processor.patch_size = 14 * MERGED
    return processor


# What frozen layers give ---------------------------------------------------------------------------------------------


def states_path(args: argparse.Namespace, split: str, layer: int) -> Path:
    return args.work / f"{split}-layer-{layer}.safetensors"


@torch.inference_mode()
def keep_states(args: argparse.Namespace, split: str, layers: set[int]):
    """Writes the output of these layers (counted from 1) for all pictures of a split, in half precision."""
    layers = {layer for layer in layers if not states_path(args, split, layer).exists()}
    if not layers:
        return
    be_quiet()
    encoder = AutoModel.from_pretrained(args.encoder, num_hidden_layers=max(layers)).eval()
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    states = {layer: [] for layer in layers}
    for images in load_file(args.work / f"{split}.safetensors")["image"].split(25):
        hidden = encoder((images / 255 - mean) / std, output_hidden_states=True).hidden_states
        for layer, kept in states.items():
            kept.append(hidden[layer].half())
    for layer, kept in states.items():
        save_file({"states": torch.cat(kept)}, states_path(args, split, layer))


class KeptStates:
    """The states of the pictures in hand, in place of what the lower layers of an encoder would compute."""

    def __init__(self, args: argparse.Namespace, layer: int):
        self.read = lambda split: load_file(states_path(args, split, layer))["states"]
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

    def __init__(self, mllm: PreTrainedModel, kept: KeptStates):
        super().__init__()
        self.mllm, self.kept = mllm, kept
        size = mllm.config.image_seq_length * mllm.config.text_config.hidden_size
        self.norm = nn.LayerNorm(size)
        self.aspects = nn.Linear(size, len(FAULTS))
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
    """In every process: one thread, and no reports of the layers that are left out on purpose."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def base_checksum() -> str:
    return hashlib.sha256((BUNDLE / "model.safetensors").read_bytes()).hexdigest()


@cache
def load_bundle() -> ASEForConditionalGeneration:
    return ASEForConditionalGeneration.from_pretrained(BUNDLE, dtype=torch.float32).eval()


def load_base(encoder: Path, layer: int) -> InternVLForConditionalGeneration:
    """The base that reads this layer of the encoder (counted from 1): InternVL with the bundled model's language model."""
    depth = AutoConfig.from_pretrained(encoder).num_hidden_layers
    tower = AutoModel.from_pretrained(encoder, num_hidden_layers=layer)
    bundle = load_bundle()
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


@torch.inference_mode()
def match_scale(base: InternVLForConditionalGeneration, processor: ASEProcessor, images: list[Image.Image]):
    """A fresh projector gives features as large as those that the language model knows, or it does not learn to read."""
    bundle, original = load_bundle(), ASEProcessor.from_pretrained(BUNDLE)
    known = bundle.get_image_features(original.image_processor(images, return_tensors="pt")["pixel_values"])
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    fresh = base.model.get_image_features(pixel_values=pixels, return_dict=True)
    scale = torch.cat(list(known.pooler_output)).std() / torch.cat(list(fresh.pooler_output)).std()
    base.model.multi_modal_projector.linear_2.weight.mul_(scale)


def graft(arm: str, base: PreTrainedModel, processor: ASEProcessor) -> PreTrainedModel:
    """The base with the saliency branch of this arm; for the arms of the base as it is."""
    if arm not in GRAFTS:
        return base
    iasm = IASMConfig(
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
        image_size=SALIENCY_SIZE,
        hidden_size=128,
        num_attention_heads=4,
        aspect_names=list(FAULTS),
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
    base = load_base(args.encoder, base_layer(arm, args))
    pictures = Pictures(args.work, "train", 32)
    match_scale(base, processor, [pictures[i]["image"] for i in range(32)])
    kept = KeptStates(args, kept_layer(arm, args))
    learner = Learner(base, kept)
    learner.mllm = graft(arm, base, processor)  # places are probed while the encoder is whole
    tower = base.model.vision_tower.requires_grad_(False)
    kept.replace_in(tower)
    if args.train_encoder:
        tower.encoder.layer[kept.layer :].requires_grad_(True)
    return learner


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
    optimizer = make_optimizer(model, args.learning_rate, encoder=0.05)
    trainer = Trainer(model, arguments, train_dataset=pictures, data_collator=collator, optimizers=(optimizer, None))
    return trainer.train().metrics["train_runtime"]


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
    collator = Collator(processor, captions=False)
    alone = ModuleAlone(learner) if arm in GRAFTS else learner
    learner.kept.open("train")
    seconds = train(alone, warm_up, collator, args.batch_size, seed, args)
    seconds += train(learner, vision, collator, args.batch_size, seed, args)
    tensors = {name: tensor.detach().contiguous() for name, tensor in trained.items()}
    save_file(tensors, path, metadata={"seconds": str(seconds)})
    return learner, seconds


def run_arm(arm: str, samples: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures one arm, or reads what it gave."""
    path = args.work / f"{arm}-{samples}-{seed}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    be_quiet()
    set_seed(seed)
    processor = make_processor()
    learner, seconds = see(arm, seed, args, processor)
    if samples:
        number = samples * (LONGER if arm == "longer" else 1)
        pictures = Pictures(args.work, "train", number, args.warm_up + args.vision_samples)
        learner.kept.open("train")
        seconds += train(learner, pictures, Collator(processor), args.batch_size, seed, args)
    result = {
        split: measure(learner.eval(), split, Pictures(args.work, split), processor, bool(samples))
        for split in args.tests
    }
    result["seconds of training"] = seconds
    result["parameters"] = sum(parameter.numel() for parameter in learner.mllm.parameters())
    result["gates"] = [p.tanh().item() for name, p in learner.mllm.named_parameters() if name.endswith("gate")]
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(
        arm,
        samples,
        seed,
        {name: round(v, 1) for name, v in list(figures_of(result, args.tests[0]).items())[:8]},
        flush=True,
    )
    return result


@torch.inference_mode()
def measure(
    learner: Learner, split: str, pictures: Pictures, processor: ASEProcessor, with_captions: bool
) -> dict[str, Any]:
    """All figures of one trained arm on the pictures of one split."""
    rows = [pictures[i] for i in range(len(pictures))]
    learner.kept.open(split)
    model, collator = learner.mllm, Collator(processor, captions=False)
    captions, heads, judged, maps = [], [], [], []
    for start in range(0, len(rows), 50):
        batch = collator(rows[start : start + 50])
        heads += learner(**batch)["aspects"].tolist()
        if with_captions:
            inputs = processor(text=[processor.critique_prompt()] * len(batch["rows"]), images=[row["image"] for row in rows[start : start + 50]], return_tensors="pt")  # fmt: skip
            captions += write_captions(model, processor, inputs, max_new_tokens=90)[0]
        if isinstance(model, ASEForConditionalGeneration):
            outputs = model.get_image_features(batch["pixel_values"])
            maps += list(outputs.saliency_maps)
            judged += outputs.aspect_logits.tolist()
    truths = [dict(zip(FAULTS, row["aspect_labels"].tolist())) for row in rows]
    composite = [bool(row["composite"]) for row in rows]
    references = [[row["caption"]] for row in rows]
    pasted = [i for i, is_composite in enumerate(composite) if is_composite]
    result = {
        "accuracy of the heads": accuracies([decide(logits) for logits in heads], truths, composite),
        "accuracy of the IASM": accuracies([decide(logits) for logits in judged], truths, composite),
        "saliency": measure_maps([maps[i] for i in pasted], [rows[i]["saliency"].numpy() for i in pasted])
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

Figures = dict[tuple[str, int, int], dict[str, dict[str, float]]]  # of each arm, number of captions, seed and test
ASPECTS = (*ASPECT_FAULTS, "subject sharpness")
GROUPS = {
    "all": tuple(ASPECT_FAULTS),
    "placed": PLACED,
    "elsewhere": tuple(a for a in ASPECT_FAULTS if a not in PLACED),
}
# a difference of these says nothing
ALONE = ("CIDEr, wrong photo", "map AUC, centre bias", "gates", "parameters, M", "training, s")
FRACTIONS = ("CIDEr", "BLEU", "map", "gates")  # the others are points, millions or seconds


def figures_of(result: dict[str, Any], test: str) -> dict[str, float]:
    """The figures of one run on one test, without those that it cannot have; accuracies in points."""
    measured, figures = result[test], {}
    for name, source in {
        "captions": "accuracy",
        "heads": "accuracy of the heads",
        "IASM": "accuracy of the IASM",
    }.items():
        for group, aspects in GROUPS.items():
            accuracy = measured.get(source, {})
            figures[f"{name}: {group}"] = 100 * np.mean([accuracy.get(aspect, np.nan) for aspect in aspects])
    for name, source in {
        "CIDEr": "text",
        "CIDEr, composites": "text, composites",
        "CIDEr, wrong photo": "wrong photo",
    }.items():
        figures[name] = measured.get(source, {}).get("CIDEr", np.nan)
    figures["BLEU-4"] = measured.get("text", {}).get("BLEU-4", np.nan)
    saliency = measured["saliency"] or {}
    for name in ("AUC", "NSS", "CC"):
        figures[f"map {name}"] = saliency.get(name, np.nan)
    figures["map AUC, centre bias"] = saliency.get("centre bias AUC", np.nan)
    figures |= {aspect: 100 * measured.get("accuracy", {}).get(aspect, np.nan) for aspect in ASPECTS}
    figures |= {f"heads: {aspect}": 100 * measured["accuracy of the heads"][aspect] for aspect in ASPECTS}
    figures["gates"] = np.mean(np.abs(result["gates"])) if result["gates"] else np.nan
    figures["parameters, M"] = result["parameters"] / 1e6
    figures["training, s"] = result["seconds of training"]
    return {name: float(value) for name, value in figures.items() if not np.isnan(value)}


def spread(values: list[float], digits: int) -> str:
    if not values:
        return "-"
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(head: str, columns: list[str], rows: list[tuple[str, list[str]]]) -> list[str]:
    lines = [[head, *columns], ["---"] * (1 + len(columns)), *([name, *cells] for name, cells in rows)]
    return ["", *("| " + " | ".join(cells) + " |" for cells in lines)] if columns and rows else []


def as_markdown(figures: Figures, samples: int, settings: dict[str, Any]) -> str:
    """Mean ± standard deviation over seeds; differences are those of the same seed."""
    arms = [arm for arm in ARMS if any(one == arm for one, *_ in figures)]
    seeds = sorted({seed for *_, seed in figures})
    tests = list(next(iter(figures.values())))

    def over_seeds(test: str, name: str, arm: str, other: str | None = None, number: int = samples) -> str:
        one = [figures.get((arm, number, seed), {}).get(test, {}) for seed in seeds]
        less = [figures.get((other, number, seed), {}).get(test, {}) if other else {name: 0.0} for seed in seeds]
        values = [a[name] - b[name] for a, b in zip(one, less) if name in a and name in b]
        return spread(values, 3 if name.startswith(FRACTIONS) else 1)

    lines = [about(seeds, samples, settings)]
    others = [arm for arm in arms if arm != "ase"] if "ase" in arms else []
    for test in tests:
        names = list(max((one[test] for one in figures.values()), key=len))
        rows = [(name, [over_seeds(test, name, arm) for arm in arms]) for name in names]
        lines += table(f"figure ({test})", arms, rows)
        rows = [(name, [over_seeds(test, name, "ase", arm) for arm in others]) for name in names if name not in ALONE]
        lines += table(f"difference ({test})", [f"ase - {arm}" for arm in others], rows)
    numbers = sorted({number for _, number, _ in figures})
    if len(numbers) > 1:
        curve = [arm for arm in arms if sum(one == arm for one, *_ in figures) > len(seeds)]
        shown = [(arm, name) for arm in curve for name in ("captions: placed", "captions: elsewhere", "heads: placed")]
        rows = [
            (f"{arm}, {name}", [over_seeds(tests[0], name, arm, number=n) for n in numbers]) for arm, name in shown
        ]
        lines += table(f"captions to learn from ({tests[0]})", [str(number) for number in numbers], rows)
    return "\n".join(lines)


def about(seeds: list[int], samples: int, settings: dict[str, Any]) -> str:
    """What the figures of the tables are, and what was run for them."""
    trained = f"its layers above the {READ}th trained along" if settings["train_encoder"] else "frozen"
    return (
        f"Seeds {', '.join(map(str, seeds))}; {settings['warm_up']} + {settings['vision_samples']} + {samples} samples of "
        f"{settings['pictures']} pictures; tested on {settings['test_pictures']} of each kind. The encoder is "
        f"{settings['encoder']}, {trained}; arms without a layer in their name read layer {settings['layer']}. The language "
        f"model is that in the weights of SHA-256 {settings['base'][:12]}. Balanced accuracy in points, mean ± standard "
        f"deviation over seeds: `captions`, and each aspect, of what captions say, `placed` the mean of {', '.join(PLACED)}, "
        "`elsewhere` of the other aspects; `heads` on the image features; `IASM` its own. CIDEr and BLEU-4 against one "
        "reference, the caption of the truth in the same fixed form. Maps against the exact masks of composites. `gates`: "
        "mean size of their tanh."
    )


def check_settings(args: argparse.Namespace, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Finished runs only stand beside runs of the same settings, which it returns."""
    names = ("pictures", "test_pictures", "warm_up", "vision_samples", "batch_size", "learning_rate")
    names += ("layer", "train_encoder", "validation")
    settings, path = {name: getattr(args, name) for name in names}, args.work / "settings.json"
    settings |= {"base": base_checksum(), "encoder": args.encoder.name}
    if path.exists() and (before := json.loads(path.read_text(encoding="utf-8"))) != settings:
        parser.error(f"{args.work} holds runs of other settings ({before}): give another --work")
    path.write_text(json.dumps(settings), encoding="utf-8")
    return settings


def make_data(args: argparse.Namespace, arms: list[str]):
    """Writes the pictures of all splits and what frozen layers give for them, where they are not there yet."""
    sizes = {"train": args.pictures, **dict.fromkeys(args.tests, args.test_pictures)}
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        side_by_side = pool.map if args.jobs > 1 else map
        list(side_by_side(partial(make_split, args), sizes.items()))
        list(side_by_side(partial(keep_states, args, layers={kept_layer(arm, args) for arm in arms}), sizes))


def make_split(args: argparse.Namespace, split: tuple[str, int]):
    if not (path := args.work / f"{split[0]}.safetensors").exists():
        save_file(make_pictures(*split, IMAGE_SIZE, args.sources), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="folder of a Dinov2 model")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["layer-12", "layer-8", *ARMS[len(LAYER_ARMS) :]])
    parser.add_argument("--layer", type=int, default=8, help="that the base of the arms without a number reads")
    parser.add_argument("--train-encoder", action="store_true", help="train its layers above the sixth, too")
    parser.add_argument("--validation", action="store_true", help="measure on photographs to train on, seen otherwise")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--pictures", type=int, default=8000, help="different pictures to train on")
    parser.add_argument("--test-pictures", type=int, default=600)
    parser.add_argument("--warm-up", type=int, default=16000, help="samples that train the saliency branch alone")
    parser.add_argument("--vision-samples", type=int, default=4000, help="samples without captions after that")
    parser.add_argument("--samples", type=int, default=4000, help="samples end to end with captions after that")
    parser.add_argument("--curve", nargs="*", type=int, default=[], help="other numbers of them")
    parser.add_argument("--curve-arms", nargs="+", choices=ARMS, default=["layer-8", "ase"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--work", type=Path, default=Path("runs/critique-benchmark"))
    parser.add_argument("--record", type=Path, help="write the table between this file's marks, all runs beside it")
    args = parser.parse_args()
    args.tests = ["validation"] if args.validation else list(TESTS)

    # Data
    args.work.mkdir(parents=True, exist_ok=True)
    settings = check_settings(args, parser)
    make_data(args, args.arms)

    # Run
    runs = [(arm, args.samples, seed) for seed in args.seeds for arm in args.arms]
    runs += [(arm, number, seed) for seed in args.seeds for number in args.curve for arm in args.curve_arms]
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn")) as pool:
        side_by_side = pool.map if args.jobs > 1 else map
        results = list(side_by_side(partial(run_one, args), runs))
    figures = {run: {test: figures_of(one, test) for test in args.tests} for run, one in zip(runs, results)}
    text = as_markdown(figures, args.samples, settings)
    print(text)
    (args.work / "table.md").write_text(text, encoding="utf-8")
    if args.record:
        write_between(args.record, "<!-- benchmark: begin -->", "<!-- benchmark: end -->", text)
        listed = [
            {"arm": arm, "captions": number, "seed": seed, **figures[arm, number, seed]} for arm, number, seed in runs
        ]
        record = json.dumps({"settings": settings, "runs": listed}, indent=1)
        args.record.with_suffix(".json").write_text(record + "\n", encoding="utf-8")


def run_one(args: argparse.Namespace, run: tuple[str, int, int]) -> dict[str, Any]:
    return run_arm(*run, args)


if __name__ == "__main__":
    main()
