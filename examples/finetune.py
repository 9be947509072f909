"""
Fine-tunes any vision-language model, or an ASE checkpoint, to critique photographs.

    python examples/finetune.py --model examples/ase-mini --data my-photographs --output_dir runs/my-critic

`my-photographs` holds pictures and a metadata.jsonl, one line a picture:
    {"file_name": "petra.jpg", "caption": "The light is soft, the horizon tilts.", "score": 6.5}
aic_data.py says what else is read: PCCD, AVA and others, CSV, Hub data sets, further columns. Several sources are one:
    --data PCCD AVA-Captions my-photographs --images PCCD/images AVA/images - --data_weights 1 0.2 3 --pccd joined
A photograph to train on in one that another evaluates on is refused. Without a split `validation`, `--validation_share`
of the photographs is set aside for it; a split `test` is never looked at. `--aspect_names topics` of a new graft trains the
module's aspects by the data's scores of topics, e.g. PCCD's seven; `--aspect_names words`, where there are captions and no
labels, by which of a hundred words a photograph's captions say.

Interrupted, even by kill -9, the same command goes on from the last whole checkpoint, unless the data have changed
meanwhile. Stages (`--stage`):
    module  only the saliency module, without captions, on what the base's encoder gives once for every photograph
    added   only the saliency module and the cross-attentions; the base stays as it is
    lora    LoRA on the language model, the added modules in full (the default)
    all     everything
The control that every claim needs, the plain base trained alike, is the same command with `--graft none`.
Data with neither aspect labels nor saliency maps leave what a checkpoint knows of aspects as it is: of its saliency module
the scores alone are trained. With much data, `module` and `added` first and then `lora` from the result. The checkpoint
with the least validation loss is kept; from some hundred validation photographs on, choose by
`--metric_for_best_model cider`: few of them give a CIDEr of 0.
All options of `TrainingArguments` hold. Several GPUs or machines, with ddp.yaml, fsdp2.yaml or deepspeed_zero3.yaml:
    accelerate launch --config_file examples/accelerate/ddp.yaml --num_processes 8 examples/finetune.py \
        --model llava-hf/llava-1.5-7b-hf --dtype bfloat16 --bf16 --data my-photographs --output_dir runs/llava

The output folder holds the merged model with its processor and code, a model card, checkpoint-*, samples/ (critiques
and heat maps at each evaluation) and TensorBoard curves of every loss term. Needs the extra `training`.
"""

import contextlib
import json
import random
import shlex
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import accelerate
import datasets
import numpy as np
import peft
import torch
import transformers
from accelerate.utils import gather_object
from aic_data import Report, parse_columns, row_question, split_off_validation, training_rows
from caption_words import label_by_words
from common import set_gate_rate, words, write_captions
from datasets.exceptions import DatasetsError
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from mixtures import load_mixture
from module_stage import ModuleTrainer, first_places, train_module
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image, ImageDraw, ImageFont
from training_guards import GuardedTrainer, check_weights, describe_rows, keep_to_run, last_checkpoint
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BatchFeature,
    EarlyStoppingCallback,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor, read_photograph
from ase_mllm.modeling_ase import TARGETS


try:
    from metrics import caption_scores, topic_coverage
except ModuleNotFoundError as error:
    sys.exit(f"finetune.py needs {error.name}: pip install -e '.[training]'")


METRICS = {  # name and protocol
    "cider": ("CIDEr", "all references; lower-case words, no punctuation; pycocoevalcap"),
    "bleu4": ("BLEU-4", "all references; lower-case words, no punctuation; pycocoevalcap"),
    "topic_coverage": ("topic coverage", "share of the topics in the references that the critique speaks of too"),
    "caption_words": ("words a critique", "mean"),
    "loss": ("loss", "all terms, weighted"),
}
BRANCH_TAGS = ("ase", "saliency", "custom_code")
LOSS_TERMS = ("caption_loss", "score_loss", "saliency_loss", "aspect_loss")


@dataclass
class ScriptArguments:
    model: str = field(metadata={"help": "A base model to graft or an ASE checkpoint to continue: folder or Hub id."})
    data: list[str] = field(metadata={"help": "Folders, files or Hub ids, each in one of the forms of aic_data.py."})
    images: list[str] | None = field(
        default=None, metadata={"help": "Folder of the pictures of each, if they are elsewhere; - if they are not."}
    )
    data_weights: list[float] | None = field(
        default=None, metadata={"help": "How often each of the data is trained on: 2 twice, 0.5 half of it, drawn."}
    )
    pccd: Literal["aspects", "joined", "general"] = field(
        default="aspects", metadata={"help": "Which texts of PCCD are a row: each topic's, all together, the general."}
    )
    columns: list[str] = field(default_factory=list, metadata={"help": "Columns of other names, e.g. caption=text."})
    score_range: list[float] | None = field(default=None, metadata={"help": "Worst and best score, if not 1 10."})
    decode_images: bool = field(default=False, metadata={"help": "Decode all pictures first to find damaged ones."})
    validation_share: float = field(default=0.1, metadata={"help": "Of the photographs, where no split is given."})
    graft: Literal["ase", "none"] = field(
        default="ase",
        metadata={"help": "none: the plain base, trained on the same rows in the same order, to compare."},
    )
    stage: Literal["module", "added", "lora", "all"] = field(default="lora", metadata={"help": "What is trained."})
    dtype: str = field(default="float32", metadata={"help": "Of the base. The added modules train in float32."})
    fusion_layers: list[int] | None = field(default=None, metadata={"help": "Of a new graft: see `ASEConfig`."})
    aspect_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "Of a new graft, for `aspect_labels`; topics: those with scores in the data; words: those of captions."
        },
    )
    score_loss_weight: float | None = field(default=None, metadata={"help": "Default: as in the configuration."})
    saliency_loss_weight: float | None = field(default=None, metadata={"help": "Default: as in the configuration."})
    aspect_loss_weight: float | None = field(default=None, metadata={"help": "Default: as in the configuration."})
    image_token_budget: list[float] | None = field(
        default=None, metadata={"help": "Least and largest share of image tokens, drawn for each batch: 0.25 1."}
    )
    lora_rank: int = 16
    lora_alpha: int = 32
    gate_lr_ratio: float = field(default=20.0, metadata={"help": "Times the rate: gates hardly open otherwise."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of prompt and caption; longer ones are cut."}
    )
    max_caption_length: int = field(default=512, metadata={"help": "Tokens; longer captions are cut."})
    max_new_tokens: int = field(default=128, metadata={"help": "Longest critique in evaluations."})
    eval_photographs: int = field(default=500, metadata={"help": "Critiqued at most in each evaluation."})
    num_samples: int = field(default=4, metadata={"help": "Of these, drawn as pictures with their heat maps."})
    patience: int = field(default=3, metadata={"help": "Evaluations without improvement before stopping; 0 never."})
    push_to: str | None = field(default=None, metadata={"help": "Hub id to which the result is uploaded at the end."})


def parse_arguments() -> tuple[ScriptArguments, TrainingArguments]:
    parser = HfArgumentParser((ScriptArguments, TrainingArguments))
    parser.set_defaults(
        learning_rate=1e-4,
        lr_scheduler_type="cosine",
        num_train_epochs=10,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        restore_callback_states_from_checkpoint=True,  # of early stopping
        logging_steps=1,  # means over more would differ after a resume between two of them
        report_to="tensorboard" if find_spec("tensorboard") else "none",
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
        remove_unused_columns=False,
        # NOTE: images, scores and maps may be missing from a process's batch, and frozen parts get no gradient
        ddp_find_unused_parameters=True,
    )
    given, _ = parser.parse_known_args()
    if given.eval_strategy == "no":  # then there is no best
        parser.set_defaults(load_best_model_at_end=False)
    return parser.parse_args_into_dataclasses()


# Model ---------------------------------------------------------------------------------------------------------------


def has_branch(model: str) -> bool:
    """Whether a folder or Hub id is an ASE checkpoint, and no base."""
    return AutoConfig.from_pretrained(model).model_type == "ase"


def load_model(args: ScriptArguments) -> PreTrainedModel:
    """
    Continues an ASE checkpoint or grafts a base; the added modules are in float32, for small steps to count. ZeRO-3 has
    one dtype for all that is trained, and float32 copies of its own.
    """
    continues = has_branch(args.model)
    if args.graft == "none":
        if continues or args.stage not in ("lora", "all"):
            raise ValueError(
                f"`--graft none` trains a base without the saliency branch, by `--stage lora` or `all`; got stage "
                f"{args.stage} of {args.model}{', which has the branch' if continues else ''}."
            )
        return AutoModelForImageTextToText.from_pretrained(args.model, dtype=args.dtype)
    if continues:
        model = ASEForConditionalGeneration.from_pretrained(args.model, dtype=args.dtype)
        if (names := model.config.iasm_config.aspect_names) != args.aspect_names and args.aspect_names is not None:
            raise ValueError(
                f"--aspect_names are of a new graft; {args.model} has learned {', '.join(names) or 'none'}, and the data's "
                f"would be {', '.join(args.aspect_names) or 'none'}."
            )
    else:
        iasm_config = {} if args.aspect_names is None else {"aspect_names": args.aspect_names}
        model = ASEForConditionalGeneration.from_mllm_pretrained(
            args.model, iasm_config=iasm_config, fusion_layers=args.fusion_layers, dtype=args.dtype
        )
    if not is_deepspeed_zero3_enabled():
        model.model.iasm.float()
        model.model.fusions.float()
    for name in ("score_loss_weight", "saliency_loss_weight", "aspect_loss_weight"):
        if (weight := getattr(args, name)) is not None:
            setattr(model.config.iasm_config, name, weight)
    return model


def would_unlearn_aspects(args: ScriptArguments, model: PreTrainedModel, rows: datasets.Dataset) -> bool:
    """
    Whether the checkpoint judges aspects of which the rows say nothing, nor where to look.

    All that the module says is read from the same tokens: bent towards scores and captions, they would go on to give labels,
    and wrong ones.
    """
    if not has_branch(args.model) or not model.config.iasm_config.num_aspects:
        return False
    told = rows.select_columns(["aspect_labels", "saliency"]).iter(batch_size=1000)
    return not any(one is not None for batch in told for values in batch.values() for one in values)


def prepare_stage(model: PreTrainedModel, args: ScriptArguments, keep_aspects: bool = False) -> torch.nn.Module:
    """Freezes what the stage leaves alone, and with `keep_aspects` all of the saliency module but its head of scores."""
    trained = ["iasm.score_head" if keep_aspects else "iasm", "fusions"] if args.graft == "ase" else []
    added = tuple(f"model.{name}." for name in trained)
    for name, parameter in model.named_parameters():
        if args.stage == "added" or name.startswith("model.iasm."):
            parameter.requires_grad_(name.startswith(added))
    if args.stage != "lora":
        return model
    decoder = set(model.get_decoder().modules())
    linear = [name for name, part in model.named_modules() if part in decoder and isinstance(part, torch.nn.Linear)]
    sizes = {"r": args.lora_rank, "lora_alpha": args.lora_alpha}
    config = LoraConfig(**sizes, target_modules=linear, modules_to_save=trained or None)
    return get_peft_model(model, config, autocast_adapter_dtype=not is_deepspeed_zero3_enabled())


# Training ------------------------------------------------------------------------------------------------------------


class PlainCollator(ASEDataCollator):
    """Batches of captions alone, as a base without the saliency branch takes them."""

    def __call__(self, examples: list[dict[str, Any]]) -> BatchFeature:
        batch = super().__call__(examples)
        return BatchFeature({name: value for name, value in batch.items() if name not in TARGETS})


def with_captions(rows: datasets.Dataset) -> datasets.Dataset:
    """The rows from which a base without scores learns; it counts every caption alike."""
    kept = rows.filter(lambda weight: weight > 0, input_columns="caption_weight")
    if len(kept) < len(rows) or any(weight != 1 for weight in kept["caption_weight"]):
        print(f"The plain base learns from {len(kept)} of {len(rows)} rows, those with captions, each of weight 1.")
    if not len(kept):
        raise ValueError("There are no captions, and `--graft none` learns from nothing else.")
    return kept


class CritiqueTrainer(GuardedTrainer):
    """
    With a learning rate for gates, loss terms by name in the log, and critiques of `photographs` at each evaluation.
    """

    def __init__(self, *args, script_args: ScriptArguments, photographs: datasets.Dataset, **kwargs):
        super().__init__(*args, **kwargs)
        self.script_args = script_args
        self.photographs = photographs
        self._terms = {}  # sum and count of each loss term since the last log

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            optimizer = super().create_optimizer(model)
            if self.script_args.graft == "ase":
                rate = self.script_args.gate_lr_ratio * self.args.learning_rate
                set_gate_rate(optimizer, self.model if model is None else model, rate)
        return self.optimizer

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if (budget := self.script_args.image_token_budget) is not None and model.training:
            # the same in every process, whose steps then take as long, and in a run that goes on
            drawn = random.Random(f"{self.args.seed} {self.state.global_step}").uniform(*budget)
            inputs = {**inputs, "image_token_budget": drawn}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        # the captions' term is divided by the tokens of the whole step, the others are means of this batch
        tokens = (inputs["labels"][:, 1:] != -100).sum()
        share = 1 if num_items_in_batch is None else tokens / num_items_in_batch
        for name in LOSS_TERMS:
            if (term := outputs.get(name)) is not None:
                term = term.detach().float() / (share if name == "caption_loss" else 1)
                self._terms[name] = self._terms.get(name, 0) + torch.stack([term, torch.ones_like(term)])
        # NOTE: with FSDP2 a head without targets in one process's batch must still get a gradient, or the others wait
        for logits in (outputs.get("score_logits"), outputs.get("aspect_logits")):
            if logits is not None and model.training:
                loss = loss + 0 * logits.sum()
        return (loss, outputs) if return_outputs else loss

    def _pop_terms(self) -> dict[str, float]:
        """Means of the terms over all processes since the last call."""
        terms, self._terms = self._terms, {}
        sums = torch.stack([terms.get(name, torch.zeros(2, device=self.args.device)) for name in LOSS_TERMS])
        sums = self.accelerator.reduce(sums, reduction="sum").tolist()
        return {name: total / count for name, (total, count) in zip(LOSS_TERMS, sums) if count}

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self._pop_terms()
        super().log(logs, start_time)

    # Evaluation by generation ----------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        training, self._terms = self._terms, {}
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._pop_terms()
        self._terms = training
        if len(self.photographs):  # there are none in data of scores alone
            critiques, pictures = self.write_critiques()
            metrics |= caption_metrics(critiques, list(self.photographs["captions"]))
            if self.is_world_process_zero():
                self.write_samples(pictures, critiques)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    @torch.no_grad()
    def write_critiques(self) -> tuple[list[str], dict[int, Image.Image]]:
        """The critiques of all rows, each process writing its share, and pictures of the first `num_samples` photographs."""
        processes, count = self.accelerator.num_processes, len(self.photographs)
        # as many rounds for every process, or generation with sharded weights waits for ever
        rounds = -(-count // processes)
        mine = [i % count for i in range(self.accelerator.process_index, rounds * processes, processes)]
        step, processor = self.args.per_device_eval_batch_size, self.processing_class
        critiques, pictures = {}, {}
        drawn = set(first_places(self.photographs["image_id"])[: self.script_args.num_samples])
        self.model.eval()
        for indices in (mine[start : start + step] for start in range(0, len(mine), step)):
            rows = [self.photographs[i] for i in indices]
            images = [read_photograph(row["image"]) for row in rows]
            questions = [row_question(row["topic"], row["prompt"]) for row in rows]
            prompts = [processor.critique_prompt(question) for question in questions]
            inputs = self._prepare_inputs(
                processor(images=[[image] for image in images], text=prompts, padding=True, return_tensors="pt")
            )
            with self.compute_loss_context_manager():
                texts, outputs = write_captions(
                    self.model, processor, inputs, max_new_tokens=self.script_args.max_new_tokens
                )
            critiques |= dict(zip(indices, texts))
            if drawn & set(indices):
                samples = zip(indices, draw_samples(processor, outputs, images, questions, texts))
                pictures |= {i: sample for i, sample in samples if i in drawn}
        critiques, pictures = (dict(gather_object(list(part.items()))) for part in (critiques, pictures))
        return [critiques[i] for i in range(count)], {i: pictures[i] for i in sorted(pictures)}

    def write_samples(self, pictures: dict[int, Image.Image], critiques: list[str]):
        folder = Path(self.args.output_dir, "samples", f"step-{self.state.global_step:06d}")
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.photographs.select_columns(["image_id", "topic", "prompt"]).rename_column("topic", "aspect")
        lines = [json.dumps({**row, "caption": text}) + "\n" for row, text in zip(rows, critiques)]
        (folder / "captions.jsonl").write_text("".join(lines), encoding="utf-8")  # evaluate_captions.py reads it
        for i, picture in pictures.items():
            picture.save(folder / f"{i:03d}-{Path(rows[i]['image_id']).name}.jpg", quality=90)
            for board in self.callback_handler.callbacks:
                if isinstance(board, TensorBoardCallback) and board.tb_writer is not None:
                    pixels = np.asarray(picture)
                    board.tb_writer.add_image(f"samples/{i:03d}", pixels, self.state.global_step, dataformats="HWC")


def draw_samples(
    processor: ASEProcessor, outputs: Any, images: list[Image.Image], questions: list[str], texts: list[str]
) -> list[Image.Image]:
    """Photograph and heat map side by side, the question and the critique below them."""
    overlays, maps = images, outputs.get("saliency_maps")
    if maps is not None and len(maps) == len(images):  # otherwise none, or tiles, each with a map of its own
        heat = processor.post_process_saliency(outputs, [image.size[::-1] for image in images])
        overlays = [processor.overlay_saliency(image, one) for image, one in zip(images, heat)]
    samples = []
    for image, overlay, question, text in zip(images, overlays, questions, texts):
        width, height = (max(1, round(side * 480 / max(image.size))) for side in image.size)
        lines = [line for part in (question, text) for line in textwrap.wrap(part, 2 * width // 7)]
        sample = Image.new("RGB", (2 * width, height + 10 + 18 * len(lines)), "white")
        sample.paste(image.resize((width, height)), (0, 0))
        sample.paste(overlay.resize((width, height)), (width, 0))
        ImageDraw.Draw(sample).text((4, height + 4), "\n".join(lines), "black", ImageFont.load_default(14))
        samples.append(sample)
    return samples


def caption_metrics(critiques: list[str], references: list[list[str]]) -> dict[str, float]:
    """What `METRICS` says of captions."""
    scores = caption_scores(critiques, references)
    metrics = {
        "cider": scores["CIDEr"],
        "bleu4": scores["BLEU-4"],
        "caption_words": float(np.mean([len(words(text)) for text in critiques])),
    }
    covered, known = topic_coverage(critiques, references).sum(axis=0)
    return metrics | ({"topic_coverage": float(covered / known)} if known else {})


# Result --------------------------------------------------------------------------------------------------------------


def save_result(trainer: CritiqueTrainer | ModuleTrainer, processor: ASEProcessor, reports: list[Report]):
    """The model as one folder that loads anywhere; an adapter is kept too, and merged into the base."""
    args, out = trainer.script_args, Path(trainer.args.output_dir)
    check_weights(trainer.model)
    if args.stage == "module":
        if trainer.is_world_process_zero():
            trainer.whole.save_pretrained(out)
    else:
        trainer.save_model(str(out / "adapter" if args.stage == "lora" else out))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    if args.stage == "lora":
        # loaded again, because the weights in training may lie in pieces on many devices; whole now, by this process
        unset_hf_deepspeed_config()
        PeftModel.from_pretrained(load_model(args), out / "adapter").merge_and_unload().save_pretrained(out)
    (processor if args.graft == "ase" else processor.base_processor).save_pretrained(out)
    write_card(trainer, reports)
    if args.push_to is not None:
        HfApi().create_repo(args.push_to, exist_ok=True)
        unwanted = ["checkpoint-*", "samples/*", "runs/*", "adapter/*"]
        HfApi().upload_folder(repo_id=args.push_to, folder_path=out, ignore_patterns=unwanted)


def write_card(trainer: CritiqueTrainer | ModuleTrainer, reports: list[Report]):
    args, out, state = trainer.script_args, Path(trainer.args.output_dir), trainer.state
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    best = [entry for entry in evaluations if entry["step"] == state.best_global_step] or evaluations[-1:]
    figures = {name: entry[f"eval_{name}"] for entry in best for name in METRICS if f"eval_{name}" in entry}
    data, task = ", ".join(Path(one).name for one in args.data), "image-text-to-text"
    header = ModelCardData(
        model_name=out.name,
        base_model=None if Path(args.model).exists() else args.model,
        library_name="transformers",
        pipeline_tag=task,
        tags=["aesthetics", "image-captioning", "photography", *(BRANCH_TAGS if args.graft == "ase" else ())],
        eval_results=[
            EvalResult(task, data, f"{data}, validation", name, round(value, 4), metric_name=METRICS[name][0])
            for name, value in figures.items()
        ],
    )
    packages = (transformers, torch, accelerate, peft, datasets)
    ModelCard.from_template(
        header,
        template_path=Path(__file__).with_name("model_card.md.jinja"),
        title=out.name,
        task=task,
        args=args,
        trainer=trainer,
        reports="\n\n".join(map(str, reports)),
        folder=args.push_to or out,
        question=trainer.processing_class.critique_prompt(),
        step=best[0]["step"] if best else state.global_step,
        figures=[(METRICS[name][0], value, METRICS[name][1]) for name, value in figures.items()],
        command=shlex.join(sys.argv),
        packages=", ".join(f"{one.__name__} {one.__version__}" for one in packages),
    ).save(out / "README.md")


def check_arguments(args: ScriptArguments):
    if (budget := args.image_token_budget) is not None:
        if len(budget) != 2 or not 0 < budget[0] <= budget[1] <= 1:
            raise ValueError(f"--image_token_budget takes two shares, the least and the largest, got {budget}.")
        if args.graft == "none" or args.stage == "module":
            raise ValueError("--image_token_budget is of the saliency branch, and of captions.")
    if args.data_weights is not None and args.stage == "module":
        raise ValueError(
            "--stage module learns once from each photograph, whatever --data_weights say: leave them out."
        )


def check_training_arguments(training_args: TrainingArguments):
    if training_args.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor is not for image-text models: the Trainer's own loss predicts each token from itself "
            "there, and leaves out scores, maps, aspects and caption weights."
        )
    if training_args.n_gpu > 1:
        raise ValueError(
            f"One process sees {training_args.n_gpu} GPUs: start one for each, `accelerate launch --num_processes "
            f"{training_args.n_gpu} examples/finetune.py ...`, or show it one (CUDA_VISIBLE_DEVICES=0)."
        )


def warn_of_lost_questions(rows: datasets.Dataset, prompts: datasets.Dataset, model: str):
    """Says when the prompts made of rows have fewer wordings than the rows have questions: the chat template drops words."""
    asked, wordings = set(map(row_question, rows["topic"], rows["prompt"])), prompts.unique("prompt")
    if len(wordings) < len(asked):
        print(
            f"WARNING: the chat template of {model} asks {len(asked)} different questions of the data in {len(wordings)} "
            f"wording{'s' * (len(wordings) > 1)}: the model cannot tell which one it is to answer. Give the tokenizer another "
            "chat template, or train on one kind of text.",
            file=sys.stderr,
        )


def scored_topics(rows: datasets.Dataset) -> list[str]:
    """The topics that have scores, in the order in which the rows name them."""
    names = dict.fromkeys(one["topic"] for scores in rows["topic_scores"] for one in scores or [])
    if not names:
        raise ValueError("--aspect_names topics: no row to train on has scores of topics.")
    return list(names)


class InputError(ValueError):
    """What was given cannot be trained on; says why."""


@contextlib.contextmanager
def input_errors() -> Iterator[None]:
    """Tells what is wrong with the user's data, model or options from what goes wrong in training."""
    try:
        yield
    except (OSError, ValueError, DatasetsError) as error:
        raise InputError(str(error)) from error


def read_data(
    args: ScriptArguments, training_args: TrainingArguments, processor: ASEProcessor
) -> tuple[datasets.Dataset, datasets.Dataset, datasets.Dataset, list[Report]]:
    """Rows to train on and to validate on, the photographs to critique at evaluations, and the sources' reports."""
    with training_args.main_process_first(desc="reading the data"):
        splits, reports = load_mixture(
            args.data,
            args.data_weights,
            args.images and [None if folder == "-" else folder for folder in args.images],
            seed=training_args.seed,
            validation_share=args.validation_share,
            columns=parse_columns(args.columns),
            score_range=args.score_range,
            decode_images=args.decode_images,
            pccd_texts=args.pccd,
            verbose=training_args.process_index == 0,
        )
        train, validation = split_off_validation(splits, args.validation_share, training_args.seed)
        if args.aspect_names == ["topics"]:
            args.aspect_names = scored_topics(train)
        if args.aspect_names == ["words"]:
            args.aspect_names, train, validation = label_by_words(train, validation)
        if args.aspect_names is not None:
            processor.aspect_names = args.aspect_names
        train_rows, validation_rows = (training_rows(part, processor) for part in (train, validation))
        if training_args.process_index == 0:
            warn_of_lost_questions(train, train_rows, args.model)
        photographs = validation.filter(len, input_columns="captions")
        if len(photographs) > args.eval_photographs:
            photographs = photographs.shuffle(training_args.seed).select(range(args.eval_photographs))
    if args.graft == "none":
        train_rows, validation_rows = with_captions(train_rows), with_captions(validation_rows)
    return train_rows, validation_rows, photographs, reports


def main():
    args, training_args = parse_arguments()
    set_seed(training_args.seed)
    with input_errors():
        check_arguments(args)
        check_training_arguments(training_args)
        processor = ASEProcessor.from_pretrained(args.model)
        processor.tokenizer.padding_side = "left"  # as generation in batches needs it
        train_rows, validation_rows, photographs, reports = read_data(args, training_args, processor)
        model = load_model(args)
        keep_aspects = would_unlearn_aspects(args, model, train_rows)
        model = prepare_stage(model, args, keep_aspects)
    if keep_aspects and training_args.process_index == 0:
        print(
            f"The data have neither aspect labels nor saliency maps: what {args.model} knows of aspects is kept, and of its "
            "saliency module the scores alone are trained."
        )
    evaluates = training_args.eval_strategy != "no"
    shared = {
        "processing_class": processor,
        "callbacks": [EarlyStoppingCallback(args.patience)] if args.patience and evaluates else None,
    }
    make_collator = PlainCollator if args.graft == "none" else ASEDataCollator
    encoder_decoder = model.config.get_text_config().is_encoder_decoder
    collator = make_collator(processor, args.max_length, args.max_caption_length, encoder_decoder)
    is_first, named = training_args.process_index == 0, training_args.resume_from_checkpoint
    resumed = named or last_checkpoint(training_args.output_dir, verbose=is_first)
    run = {"model": {"name": args.model, "graft": args.graft, "stage": args.stage}}
    run |= {"train": describe_rows(train_rows), "validation": describe_rows(validation_rows)}
    with input_errors():
        keep_to_run(training_args.output_dir, run, resumed and not named, write=is_first)
    if resumed and is_first:
        print(f"Goes on from {resumed}. For a new run name another --output_dir.")
    if args.stage == "module":
        kept = {"train_dataset": train_rows, "eval_dataset": validation_rows}
        trainer = train_module(model, kept, collator, training_args, args, resumed, **shared)
        return save_result(trainer, processor, reports)
    trainer = CritiqueTrainer(
        model=model,
        args=training_args,
        script_args=args,
        train_dataset=train_rows,
        eval_dataset=validation_rows,
        photographs=photographs,
        data_collator=collator,
        **shared,
    )
    if trainer.is_fsdp_enabled:
        # a base also lists layers of parts that it was built without, and accelerate stops at the first such name
        names = {type(part).__name__ for part in model.modules()} & set(model._no_split_modules)
        trainer.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(names)
    trainer.train(resume_from_checkpoint=resumed)
    save_result(trainer, processor, reports)


def run_command():
    # PEFT 0.21 still reads the property by its old name, as often as a model is wrapped
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    try:
        main()
    except InputError as error:
        sys.exit(f"Cannot train: {error}")


if __name__ == "__main__":
    run_command()
