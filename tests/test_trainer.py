"""What others do with the model: the standard `Trainer`, PEFT, pipelines."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import graft, is_added, make_inputs, open_gates, tiny_base, tiny_model, tiny_processor
from datasets import Dataset, Features, Image, List, Value
from families import FAMILIES
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from PIL import Image as PILImage
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments, pipeline

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor


CAPTIONS = ["good , blurred .", "wrong", "underexposed", "what is good ?", "blurred", "this photograph is good ."]


def photo(seed: int, size: tuple[int, int] = (40, 30)) -> PILImage.Image:
    generator = np.random.default_rng(seed)
    return PILImage.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def examples(targets: bool = True) -> list[dict]:
    generator = np.random.default_rng(0)
    rows = [{"image": photo(i), "caption": caption} for i, caption in enumerate(CAPTIONS)]
    if targets:
        for row in rows:
            row["score"] = generator.dirichlet(np.ones(10)).tolist()
            row["saliency"] = generator.random((6, 8)).tolist()
            row["aspect_labels"] = generator.integers(-1, 2, 3).astype(float).tolist()
            row["caption_weight"] = float(generator.random())
        rows[1] |= {"score": None, "saliency": None, "aspect_labels": None, "caption_weight": None}
    return rows


def trainer(model, folder: Path, **kwargs) -> Trainer:
    """Three optimizer steps over six examples, shuffled."""
    processor = tiny_processor()
    rows = kwargs.pop("rows", None) or examples()
    evaluation = {name: kwargs.pop(name) for name in ("compute_metrics",) if name in kwargs}
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "remove_unused_columns": False,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **{**arguments, **kwargs}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=ASEDataCollator(processor),
        processing_class=processor,
        **evaluation,
    )


def losses(trained: Trainer) -> list[float]:
    return [entry["loss"] for entry in trained.state.log_history if "loss" in entry]


def seeded_model(gate: float = 0.0) -> ASEForConditionalGeneration:
    base = tiny_base()
    torch.manual_seed(7)
    return open_gates(graft(base), gate)


def freeze_base(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    return model


# Trainer ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen_base"])
def test_resuming_gives_the_loss_of_an_uninterrupted_run(frozen, tmp_path):
    prepare = freeze_base if frozen else lambda model: model
    whole = trainer(prepare(seeded_model()), tmp_path / "whole", save_strategy="steps", save_steps=2)
    before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
    whole.train()
    assert len(losses(whole)) == 3 and len(set(losses(whole))) == 3
    moved = {name for name, tensor in whole.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {name for name in before if is_added(name) and not name.endswith("k_proj.bias")} <= moved
    assert frozen == all(is_added(name) for name in moved)

    resumed = trainer(
        prepare(tiny_model(gate=0.5)), tmp_path / "resumed"
    )  # other weights: all come from the checkpoint
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    weights = resumed.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in whole.model.state_dict().items())


def test_a_checkpoint_is_a_whole_folder(tmp_path):
    trained = trainer(seeded_model(), tmp_path, save_strategy="steps", save_steps=3)
    trained.train()
    folder = tmp_path / "checkpoint-3"
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.model.state_dict().items())
    assert ASEProcessor.from_pretrained(folder).critique_prompt() == tiny_processor().critique_prompt()
    assert "AutoProcessor" in json.loads((folder / "config.json").read_text())["auto_map"]
    assert (folder / "modeling_ase.py").exists()


def test_gradient_accumulation_is_one_large_batch(tmp_path):
    """With captions of different length, and every term of the loss given for every sample."""
    rows = [row for row in examples() if row["score"] is not None][:4]
    for row in rows:
        row["aspect_labels"], row["caption"] = [1.0, 0.0, 1.0], "good , wrong ."
    results = []
    for batch_size in (4, 2):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        accumulated = trainer(
            seeded_model(1.0), tmp_path / str(batch_size), rows=rows, max_steps=1, max_grad_norm=0.0, **options,
            optim="sgd",
        )  # fmt: skip
        accumulated.train()
        results.append((losses(accumulated), accumulated.model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_captions_alone_are_enough(tmp_path):
    trained = trainer(seeded_model(), tmp_path, rows=examples(targets=False))
    trained.train()
    assert np.isfinite(losses(trained)).all()


def test_evaluation(tmp_path):
    seen = {}

    def compute_metrics(prediction) -> dict[str, float]:
        seen["predictions"] = prediction.predictions
        return {"one": 1.0}

    model = seeded_model(1.0)
    alone = trainer(model, tmp_path).evaluate()
    with_metrics = trainer(model, tmp_path, compute_metrics=compute_metrics).evaluate()
    assert with_metrics["eval_one"] == 1.0
    assert alone["eval_loss"] == with_metrics["eval_loss"]
    collator = ASEDataCollator(tiny_processor())
    rows = examples()
    with torch.no_grad():
        batches = [model(**collator(rows[i : i + 8])).loss.item() for i in range(0, len(rows), 8)]
    assert alone["eval_loss"] == pytest.approx(np.mean(batches), rel=1e-4)
    shapes = [array.shape for array in seen["predictions"] if array.shape]
    assert (6, 10) in shapes and (6, 8, 8) not in shapes  # scores of all images, maps only for who asks
    trainer(model, tmp_path, compute_metrics=compute_metrics).evaluate(ignore_keys=["cache", "image_outputs"])
    assert (6, 8, 8) in [array.shape for array in seen["predictions"]]


def test_a_datasets_dataset_feeds_the_trainer(tmp_path):
    rows = examples()
    features = Features(
        {
            "image": Image(),
            "caption": Value("string"),
            "score": List(Value("float32")),
            "saliency": List(List(Value("float32"))),
            "aspect_labels": List(Value("float32")),
            "caption_weight": Value("float32"),
        }
    )
    dataset = Dataset.from_list(rows, features=features)
    from_dataset, from_list = (trainer(seeded_model(), tmp_path, rows=source) for source in (dataset, rows))
    from_dataset.train()
    from_list.train()
    assert losses(from_dataset) == pytest.approx(losses(from_list), rel=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_by_the_trainer_gives_the_same_losses(use_reentrant, tmp_path):
    plain = trainer(seeded_model(), tmp_path)
    plain.train()
    options = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    checkpointed = trainer(seeded_model(), tmp_path, **options)
    checkpointed.train()
    assert losses(checkpointed) == pytest.approx(losses(plain), rel=1e-5)


# PEFT ---------------------------------------------------------------------------------------------------------------


LORA = {
    "r": 4,
    "target_modules": r".*\.language_model\..*\.(q_proj|v_proj)",
    "modules_to_save": ["iasm", "fusions"],
}
# PEFT 0.21 still reads the property by its old name
PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def peft_logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_lora_on_the_language_model_and_the_added_modules_in_full(tmp_path):
    batch = ASEDataCollator(tiny_processor())(examples()[:2])
    batch.pop("labels")
    fresh = seeded_model()
    untrained = peft_logits(fresh, batch)
    model = get_peft_model(copy.deepcopy(fresh), LoraConfig(**LORA))
    assert torch.equal(peft_logits(model, batch), untrained)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trained = trainer(model, tmp_path / "run")
    trained.train()

    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    ours = {name for name in before if "lora_" in name or ".modules_to_save.default." in name}
    assert moved <= ours
    assert {name for name in ours - moved if not name.endswith("k_proj.bias")} == set()
    assert all("language_model" in name for name in moved if "lora_" in name)
    expected = peft_logits(model, batch)
    assert not torch.equal(expected, untrained)

    model.save_pretrained(tmp_path / "adapter")
    reloaded = PeftModel.from_pretrained(graft(tiny_base()), tmp_path / "adapter")
    assert torch.equal(peft_logits(reloaded, batch), expected)
    prompt = {name: tensor for name, tensor in batch.items() if "targets" not in name and name != "caption_weights"}
    tokens = reloaded.generate(**prompt, max_new_tokens=4)
    assert torch.equal(tokens, model.generate(**prompt, max_new_tokens=4))

    merged = reloaded.merge_and_unload()
    assert type(merged) is ASEForConditionalGeneration
    torch.testing.assert_close(peft_logits(merged, batch), expected, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    loaded = ASEForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(peft_logits(loaded, batch), peft_logits(merged, batch))


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_a_disabled_adapter_is_the_fresh_graft(tmp_path):
    batch = ASEDataCollator(tiny_processor())(examples()[:2])
    fresh = seeded_model()
    expected = peft_logits(fresh, batch)
    model = get_peft_model(copy.deepcopy(fresh), LoraConfig(**LORA))
    trainer(model, tmp_path).train()
    assert not torch.equal(peft_logits(model, batch), expected)
    with model.disable_adapter():
        assert torch.equal(peft_logits(model, batch), expected)


PROMPTS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig, "p-tuning": PromptEncoderConfig}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT asks for what transformers has renamed
@pytest.mark.parametrize("kind", PROMPTS)
def test_learned_prompts_work_as_on_the_base(kind):
    """PEFT reads their sizes from the configuration and takes over the outer class's generation."""
    models = []
    for model in (tiny_base(), seeded_model(0.0)):
        torch.manual_seed(1)
        models.append(get_peft_model(model, PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)).eval())
        for parameter in models[-1].prompt_encoder.parameters():
            parameter.data.mul_(3)
    inputs = make_inputs()
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        base, ours = (model(**inputs) for model in models)
        assert torch.equal(ours.logits, base.logits)
        assert not torch.allclose(ours.logits[:, -23:], seeded_model(0.0)(**inputs).logits, atol=1e-2)
        written = models[1].generate(**inputs, **options)
        if kind != "prefix":
            assert torch.equal(written, models[0].generate(**inputs, **options))
            return
        # token by token: with transformers 5.24, PEFT 0.21 loses a base's prefix
        ids, pixels = inputs["input_ids"], inputs["pixel_values"]
        for _ in range(4):
            logits = models[1](input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels).logits[:, -1]
            logits[:, 2] = -torch.inf  # the end, which `min_new_tokens` forbids
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written, ids)


def test_evaluation_gathers_batches_of_other_image_sizes(tmp_path):
    family = FAMILIES["qwen2_vl"]
    torch.manual_seed(0)
    model = graft(AutoModelForImageTextToText.from_config(family.config()))
    images = [torch.randn(3, *family.sizes[i]) for i in (0, 1, 0, 0, 1)]

    def collate(examples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        batch = family.inputs(examples)
        return {**batch, "labels": batch["input_ids"], "score_targets": torch.full((len(examples), 10), 0.1)}

    gathered = []
    trainer = Trainer(
        model,
        TrainingArguments(tmp_path, per_device_eval_batch_size=2, remove_unused_columns=False, report_to="none"),
        eval_dataset=images,
        data_collator=collate,
        compute_metrics=lambda prediction: gathered.extend(prediction.predictions) or {},
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert (5, 10) in [values.shape for values in gathered]  # the scores of all five
    assert not any(values.ndim == 3 and values.shape[-1] != 99 for values in gathered)  # no maps beside the logits


# Pipelines ----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["objects", "folder"])
def captioner(request, tmp_path):
    model, processor = tiny_model(), tiny_processor()
    if request.param == "objects":
        return pipeline("image-text-to-text", model=model, processor=processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    return pipeline("image-text-to-text", model=str(tmp_path))


def test_pipelines_write_what_generate_writes(captioner):
    processor, model = captioner.processor, captioner.model
    assert type(model) is ASEForConditionalGeneration and type(processor) is ASEProcessor
    image, prompt = photo(0), processor.critique_prompt()
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()  # as pipelines do
    options = {"max_new_tokens": 5, "do_sample": False}
    plain = captioner(images=image, text=prompt, return_full_text=False, generate_kwargs=options)
    assert plain[0]["generated_text"].strip() == expected
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Critique this photograph"}]
    chat = [{"role": "user", "content": content}]
    answer = captioner(text=chat, return_full_text=False, generate_kwargs=options)[0]["generated_text"]
    inputs = processor(images=image, text=processor.critique_prompt("Critique this photograph"), return_tensors="pt")
    tokens = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    assert answer.strip() == processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
