"""Training by the standard `Trainer` and by PEFT."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    LORA,
    PEFT_ASKS,
    TRAINING,
    graft,
    is_added,
    losses,
    make_inputs,
    seeded_graft,
    tiny_base,
    tiny_model,
    tiny_processor,
    training_examples,
)
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
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor


def trainer(model, folder: Path, **kwargs) -> Trainer:
    """Three optimizer steps over six examples, shuffled."""
    processor = tiny_processor()
    rows = kwargs.pop("rows", None) or training_examples()
    evaluation = {name: kwargs.pop(name) for name in ("compute_metrics",) if name in kwargs}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), remove_unused_columns=False, **{**TRAINING, **kwargs}),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=ASEDataCollator(processor),
        processing_class=processor,
        **evaluation,
    )


def freeze_base(model: torch.nn.Module) -> torch.nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    return model


# Trainer ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen_base"])
def test_resuming_gives_the_loss_of_an_uninterrupted_run(frozen, tmp_path):
    prepare = freeze_base if frozen else lambda model: model
    whole = trainer(prepare(seeded_graft()), tmp_path / "whole", save_strategy="steps", save_steps=2)
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
    trained = trainer(seeded_graft(), tmp_path, save_strategy="steps", save_steps=3)
    trained.train()
    folder = tmp_path / "checkpoint-3"
    loaded = AutoModelForImageTextToText.from_pretrained(folder)
    weights = loaded.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.model.state_dict().items())
    assert ASEProcessor.from_pretrained(folder).critique_prompt() == tiny_processor().critique_prompt()
    assert "AutoProcessor" in json.loads((folder / "config.json").read_text())["auto_map"]
    assert (folder / "modeling_ase.py").exists()


@pytest.mark.slow
def test_gradient_accumulation_is_one_large_batch(tmp_path):
    """With captions of different length, and every term of the loss given for every sample."""
    rows = [row for row in training_examples() if row["score"] is not None][:4]
    for row in rows:
        row["aspect_labels"], row["caption"] = [1.0, 0.0, 1.0], "good , wrong ."
    results = []
    for batch_size in (4, 2):
        options = {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": 4 // batch_size}
        accumulated = trainer(
            seeded_graft(1.0), tmp_path / str(batch_size), rows=rows, max_steps=1, max_grad_norm=0.0, **options,
            optim="sgd",
        )  # fmt: skip
        accumulated.train()
        results.append((losses(accumulated), accumulated.model.state_dict()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_captions_alone_are_enough(tmp_path):
    trained = trainer(seeded_graft(), tmp_path, rows=training_examples(targets=False))
    trained.train()
    assert np.isfinite(losses(trained)).all()


def test_evaluation(tmp_path):
    seen = {}

    def compute_metrics(prediction) -> dict[str, float]:
        seen["predictions"] = prediction.predictions
        return {"one": 1.0}

    model = seeded_graft(1.0)
    alone = trainer(model, tmp_path).evaluate()
    with_metrics = trainer(model, tmp_path, compute_metrics=compute_metrics).evaluate()
    assert with_metrics["eval_one"] == 1.0
    assert alone["eval_loss"] == with_metrics["eval_loss"]
    collator = ASEDataCollator(tiny_processor())
    rows = training_examples()
    with torch.no_grad():
        batches = [model(**collator(rows[i : i + 8])).loss.item() for i in range(0, len(rows), 8)]
    assert alone["eval_loss"] == pytest.approx(np.mean(batches), rel=1e-4)
    shapes = [array.shape for array in seen["predictions"] if array.shape]
    assert (6, 10) in shapes and (6, 8, 8) not in shapes  # scores of all images, maps only for who asks
    trainer(model, tmp_path, compute_metrics=compute_metrics).evaluate(ignore_keys=["cache", "image_outputs"])
    assert (6, 8, 8) in [array.shape for array in seen["predictions"]]


@pytest.mark.slow
def test_a_datasets_dataset_feeds_the_trainer(tmp_path):
    rows = training_examples()
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
    from_dataset, from_list = (trainer(seeded_graft(), tmp_path, rows=source) for source in (dataset, rows))
    from_dataset.train()
    from_list.train()
    assert losses(from_dataset) == pytest.approx(losses(from_list), rel=1e-5)


# PEFT ---------------------------------------------------------------------------------------------------------------


def peft_logits(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.slow
@pytest.mark.filterwarnings(PEFT_ASKS)
def test_lora_on_the_language_model_and_the_added_modules_in_full(tmp_path):
    batch = ASEDataCollator(tiny_processor())(training_examples()[:2])
    batch.pop("labels")
    fresh = seeded_graft()
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
    batch = ASEDataCollator(tiny_processor())(training_examples()[:2])
    fresh = seeded_graft()
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
    for model in (tiny_base(), seeded_graft(0.0)):
        torch.manual_seed(1)
        models.append(get_peft_model(model, PROMPTS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)).eval())
        for parameter in models[-1].prompt_encoder.parameters():
            parameter.data.mul_(3)
    inputs = make_inputs()
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    with torch.no_grad():
        base, ours = (model(**inputs) for model in models)
        assert torch.equal(ours.logits, base.logits)
        assert not torch.allclose(ours.logits[:, -23:], seeded_graft(0.0)(**inputs).logits, atol=1e-2)
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
