"""
Trains the bundled model `examples/ase-mini` from nothing but the critique generator, with the standard `Trainer`.

    python examples/critique/train_ase_mini.py --stage all          # a few hours on two cores, minutes of work on a GPU
    python examples/critique/train_ase_mini.py --stage all --samples 64 --work runs/look --out runs/look/out    # a look at the machinery

Stages (each starts from what the one before left in `--work`):
    iasm      the saliency module alone: aspects, scores, saliency maps
    language  the language model alone: the wording of critiques, no pictures
    joint     the whole model end to end with all loss terms; on two cores faster with
              `torchrun --nproc-per-node 2 examples/critique/train_ase_mini.py --stage joint`
    plain     captions in one fixed form, with the saliency module as it is: text learns from them what features mean
    critique  captions again, weaker faults and more subjects, with the saliency module as it is; slowly, or the text
              forgets what it has learned to read
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch
from critique_captions import FAULTS, plain_caption
from critique_data import critique_dataset, load_sources
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)


sys.path.insert(0, str(Path(__file__).parents[1]))

from common import set_gate_rate

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor, IASMConfig


BUNDLE = Path(__file__).parents[1] / "ase-mini"
IMAGE_SIZE, PATCH_SIZE = 192, 32
STAGES = ("iasm", "language", "joint", "plain", "critique")
SAMPLES = {"iasm": 64_000, "language": 16_000, "joint": 76_000, "plain": 16_000, "critique": 32_000}
LEARNING_RATES = {"iasm": 1.5e-3, "language": 1e-3, "joint": 1e-3, "plain": 8e-4, "critique": 3e-4}
WEIGHTS = {"score_loss_weight": 5.0, "aspect_loss_weight": 3.0, "saliency_loss_weight": 1.0}
OPTIONS = {"critique": {"strength": (1.0, 1.6), "composite_share": 0.6}}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}<image>{% else %}{{ item['text'] }}{% endif %}{% endfor %}\n"
    "{% else %}{% generation %}{{ message['content'] if message['content'] is string else message['content'][0]['text'] }}"
    "</s>{% endgeneration %}{% endif %}{% endfor %}"
)


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
    base = LlavaProcessor(
        CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size),
        fast,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return ASEProcessor(base, aspect_names=FAULTS)


def iasm_config(processor: ASEProcessor, backbone: dict, **settings) -> IASMConfig:
    return IASMConfig(
        backbone_config=backbone,
        image_mean=processor.image_processor.image_mean,
        image_std=processor.image_processor.image_std,
        hidden_size=128,
        num_attention_heads=4,
        aspect_names=list(FAULTS),
        **settings,
    )


def build_model(processor: ASEProcessor) -> ASEForConditionalGeneration:
    """A small LLaVA with the saliency branch. Its gates start open: an untrained base has nothing to preserve."""
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=6,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
        ),
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
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    backbone = {
        "model_type": "convnextv2",
        "hidden_sizes": [24, 48, 96, 128],
        "depths": [1, 1, 2, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    model = ASEForConditionalGeneration.from_mllm_pretrained(
        LlavaForConditionalGeneration(config),
        iasm_config=iasm_config(processor, backbone, image_size=IMAGE_SIZE, **WEIGHTS),
        fusion_layers=[0, 1, 2],
        fusion_hidden_size=192,
        fusion_num_attention_heads=12,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("model.fusions.") and name.endswith("gate"):
                parameter.fill_(1.0)
    model.generation_config.update(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        max_new_tokens=128,
        do_sample=False,
    )
    return model


class SaliencyCollator(ASEDataCollator):
    """Pictures and truth, for what learns without captions."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        batch = super().__call__(examples)
        return {name: batch[name] for name in ("pixel_values", "score_targets", "saliency_targets", "aspect_targets")}


class LanguageCollator(ASEDataCollator):
    """Captions after the bare prompt, for the language model alone."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        prompt = self.processor.critique_prompt().replace(self.processor.image_token, "")
        return super().__call__([{"images": [], "prompt": prompt, "caption": row["caption"]} for row in examples])


class PlainCollator(ASEDataCollator):
    """Whole examples whose caption has the fixed form."""

    def __call__(self, examples: list[dict]) -> dict[str, torch.Tensor]:
        return super().__call__([{**row, "caption": plain_caption(row["aspect_labels"])} for row in examples])


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


def train_stage(stage: str, model: ASEForConditionalGeneration, processor: ASEProcessor, sources, args) -> None:
    """One run of the `Trainer`; it resumes by itself from the last checkpoint of an interrupted run."""
    module, collator = {
        "iasm": (model.model.iasm, SaliencyCollator(processor)),
        "language": (model.model.mllm, LanguageCollator(processor)),
        "plain": (model, PlainCollator(processor)),
    }.get(stage, (model, ASEDataCollator(processor)))
    model.requires_grad_(True)
    if stage in ("plain", "critique"):
        model.model.iasm.requires_grad_(False)
    samples = args.samples or SAMPLES[stage]
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = max(1, samples // (args.batch_size * processes))
    learning_rate = LEARNING_RATES[stage]
    folder = args.work / f"{stage}-checkpoints"
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=not torch.cuda.is_available(),  # said aloud, or processes on CPUs train each a model of its own
        ddp_backend="gloo" if processes > 1 and not torch.cuda.is_available() else None,
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, steps // 10),
        logging_steps=50,
        save_steps=1000,
        save_total_limit=1,
        dataloader_num_workers=args.workers,
        dataloader_persistent_workers=args.workers > 0,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        seed=args.seed,
    )
    seed = args.seed + STAGES.index(stage)  # every picture is new
    rows = critique_dataset("train", samples, seed=seed, sources=sources, **OPTIONS.get(stage, {}))
    optimizer = make_optimizer(module, learning_rate, gates=10, iasm=0.5)
    trainer = Trainer(module, arguments, train_dataset=rows, data_collator=collator, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    (args.work / f"{stage}.json").write_text(json.dumps(trainer.state.log_history), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--samples", type=int, help="samples seen in each stage (default: as the bundled model)")
    parser.add_argument(
        "--vocabulary-samples", type=int, default=2000, help="pictures whose captions make the tokenizer"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=1, help="processes that load pictures beside the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sources", type=Path, help="folder with the photographs and cut-outs")
    parser.add_argument("--work", type=Path, default=Path("runs/ase-mini"), help="checkpoints and intermediate models")
    parser.add_argument("--out", type=Path, default=BUNDLE)
    args = parser.parse_args()

    # Data
    set_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    sources = load_sources("train", args.sources)

    # Model
    saved = args.work / "model"
    if (saved / "config.json").exists():
        processor = ASEProcessor.from_pretrained(saved)
        model = ASEForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    else:
        rows = critique_dataset("train", args.vocabulary_samples, seed=args.seed + len(STAGES), sources=sources)
        processor = build_processor([caption for row in rows for caption in row["references"]])
        model = build_model(processor)

    # Run
    is_first = int(os.environ.get("RANK", "0")) == 0
    for stage in STAGES if args.stage == "all" else (args.stage,):
        train_stage(stage, model, processor, sources, args)
        if is_first:
            model.save_pretrained(saved)
            processor.save_pretrained(saved)
    if is_first:
        model.save_pretrained(args.out)
        processor.save_pretrained(args.out)


if __name__ == "__main__":
    main()
