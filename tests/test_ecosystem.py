"""What the libraries around transformers do with the model: TRL, PEFT, accelerate, bitsandbytes, the Hub."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

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
    open_gates,
    seeded_graft,
    tiny_base,
    tiny_model,
    tiny_processor,
    training_examples,
)
from datasets import Dataset
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from trl import SFTConfig, SFTTrainer

from ase_mllm import ASEConfig, ASEDataCollator, ASEForConditionalGeneration, ASEModel, ASEProcessor


BUNDLED = Path(__file__).parents[1] / "examples" / "ase-mini"
# what only a score and aspect labels teach, and biases of keys, whose gradient is zero
UNTAUGHT = ("score_head.weight", "score_head.bias", "aspect_head.weight", "aspect_head.bias", "k_proj.bias")


def logits(model: torch.nn.Module, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**(inputs or make_inputs())).logits


def tokens(model: torch.nn.Module, **inputs) -> torch.Tensor:
    return model.generate(**(inputs or make_inputs()), max_new_tokens=4, do_sample=False)


# Evaluation by generating --------------------------------------------------------------------------------------------


def test_evaluation_generates_from_a_training_batch(tmp_path):
    """The batch has targets of the saliency terms, which `generate()` must leave alone as it leaves `labels`."""
    seen = {}

    def compute_metrics(prediction) -> dict[str, float]:
        seen.update(predictions=prediction.predictions, labels=prediction.label_ids)
        return {"count": float(len(prediction.predictions))}

    model, processor, rows = tiny_model(), tiny_processor(), training_examples()
    collator = ASEDataCollator(processor)
    arguments = {"per_device_eval_batch_size": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    trainer = Seq2SeqTrainer(
        model=model,
        args=Seq2SeqTrainingArguments(
            str(tmp_path),
            predict_with_generate=True,
            generation_max_length=40,
            remove_unused_columns=False,
            **arguments,
        ),
        eval_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=compute_metrics,
    )
    metrics = trainer.evaluate()
    batches = [collator([row]) for row in rows]
    assert metrics["eval_count"] == len(batches)
    with torch.no_grad():
        assert metrics["eval_loss"] == pytest.approx(np.mean([model(**batch).loss for batch in batches]), rel=1e-5)
    for batch, predicted, labels in zip(batches, seen["predictions"], seen["labels"]):
        plain = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        written = model.generate(**plain, max_length=40)[0]
        assert predicted[: len(written)].tolist() == written.tolist()
        assert labels[labels != -100].tolist() == batch["labels"][batch["labels"] != -100].tolist()


@pytest.mark.parametrize("strategy", [{"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
def test_targets_do_not_change_what_is_generated(strategy):
    batch = ASEDataCollator(tiny_processor())(training_examples()[:1])
    targets = {name: batch.pop(name) for name in [*batch] if name.endswith(("_targets", "_weights"))}
    assert len(targets) == 4
    written = []
    for extra in ({}, targets):
        torch.manual_seed(0)
        written.append(tiny_model().generate(**batch, **extra, max_new_tokens=4, **strategy))
    assert torch.equal(*written)


# TRL -----------------------------------------------------------------------------------------------------------------

# TRL 1.16 still uses the old name
TRL_SETS = "ignore:`gradient_checkpointing` is deprecated:FutureWarning"


def conversations(form: str, rated: bool = False) -> Dataset:
    rows = []
    for row in training_examples():
        question = [{"role": "user", "content": "Critique this photograph"}]
        answer = [{"role": "assistant", "content": row["caption"]}]
        if form == "messages":
            columns = {"images": [row["image"]], "messages": question + answer}
        else:
            columns = {"images": [row["image"]], "prompt": question, "completion": answer}
        rows.append({**columns, "score": row["score"]} if rated else columns)
    return Dataset.from_list(rows)


def sft(model: PreTrainedModel, folder: Path, dataset: Dataset, trainer_class: type = SFTTrainer, **kwargs) -> Trainer:
    options = {name: kwargs.pop(name) for name in ("peft_config", "data_collator") if name in kwargs}
    trainer = trainer_class(
        model=model,
        args=SFTConfig(str(folder), max_length=None, bf16=False, **{**TRAINING, **kwargs}),
        train_dataset=dataset,
        processing_class=tiny_processor(),
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.slow
@pytest.mark.filterwarnings(TRL_SETS)
@pytest.mark.parametrize("form", ["messages", "prompt-completion"])
def test_sft_trains_the_base_and_ours_by_the_same_lines(form, tmp_path):
    runs = {}
    for name, model in {"base": tiny_base(), "ours": seeded_graft()}.items():
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        trainer = sft(model, tmp_path / name, conversations(form))
        still = {key for key, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[key])}
        assert all(key.endswith(UNTAUGHT) for key in still if is_added(key)), still
        runs[name] = losses(trainer)
    assert len(runs["ours"]) == 3 and np.isfinite(runs["ours"]).all()
    assert runs["ours"][0] == runs["base"][0]  # the gates are shut in the first step,
    assert runs["ours"][2] != runs["base"][2]  # and open after it


@pytest.mark.slow
@pytest.mark.filterwarnings(TRL_SETS, PEFT_ASKS)
def test_sft_trains_an_adapter_and_the_added_modules(tmp_path):
    model = seeded_graft()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = sft(model, tmp_path, conversations("prompt-completion"), peft_config=LoraConfig(**LORA))
    assert np.isfinite(losses(trainer)).all() and len(set(losses(trainer))) == 3
    merged = trainer.model.merge_and_unload()
    moved = {name for name, parameter in merged.named_parameters() if not torch.equal(parameter, before[name])}
    adapted = {
        name for name in before if "language_model" in name and name.endswith(("q_proj.weight", "v_proj.weight"))
    }
    ours = {name for name in before if is_added(name) and not name.endswith(UNTAUGHT)}
    assert moved - {name for name in before if name.endswith("k_proj.bias")} == adapted | ours


@pytest.mark.slow
@pytest.mark.filterwarnings(TRL_SETS)
def test_sft_drops_columns_that_its_collator_does_not_know(tmp_path):
    runs = [sft(seeded_graft(), tmp_path / str(rated), conversations("messages", rated)) for rated in (False, True)]
    assert losses(runs[0]) == losses(runs[1])
    batch = next(iter(runs[1].get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "pixel_values", "labels"}


@pytest.mark.slow
@pytest.mark.filterwarnings(TRL_SETS)
def test_sft_computes_its_own_loss_and_is_told_what_it_leaves_out(tmp_path):
    """It multiplies the body's hidden states by the head itself, so the saliency terms would vanish silently."""
    options = {"data_collator": ASEDataCollator(tiny_processor()), "remove_unused_columns": False}
    dataset = Dataset.from_list(training_examples())
    with pytest.raises(ValueError, match=r"score_targets.*need `ASEForConditionalGeneration\.forward`"):
        sft(seeded_graft(), tmp_path / "theirs", dataset, **options)

    class CritiqueTrainer(SFTTrainer):
        compute_loss = Trainer.compute_loss  # the model's own loss, with all its terms

    model = seeded_graft()
    with torch.no_grad():
        expected = model(**ASEDataCollator(tiny_processor())(training_examples()))
    trained = sft(
        model, tmp_path / "ours", dataset, CritiqueTrainer, per_device_train_batch_size=len(dataset), **options
    )  # one batch of all, so that the order is of no account
    assert expected.loss > expected.caption_loss
    assert losses(trained)[0] == pytest.approx(expected.loss.item(), rel=1e-5)


# PEFT ----------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(PEFT_ASKS)
def test_an_adapter_loads_by_transformers_own_method(tmp_path):
    adapted = get_peft_model(seeded_graft(), LoraConfig(**LORA))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path)
    model = graft(tiny_base())
    untrained = logits(model)
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), logits(adapted))
    assert not torch.equal(logits(model), untrained)


# Quantisation --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whole", "body"])
def test_quantisers_leave_the_added_modules_out(part):
    model = {"whole": tiny_model(), "body": tiny_model().model}[part]
    for asked in (None, ["lm_head"]):
        skipped = HfQuantizer.get_modules_to_not_convert(model, asked, model._keep_in_fp32_modules)
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        kept = {name for name in linear if not should_convert_module(name, skipped)}
        ours = {name for name in linear if is_added(name if part == "whole" else f"model.{name}")}
        assert len(ours) > 20
        assert {name for name in kept if not name.endswith("lm_head")} == ours


BITS = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32}, 8: {"load_in_8bit": True}}


@pytest.fixture(scope="module")
def bundled() -> tuple[ASEForConditionalGeneration, dict[str, torch.Tensor]]:
    """The bundled model and an input: bitsandbytes wants widths that are multiples of 64."""
    pytest.importorskip("bitsandbytes")
    processor = ASEProcessor.from_pretrained(BUNDLED)
    inputs = processor(images=training_examples()[0]["image"], text=processor.critique_prompt(), return_tensors="pt")
    return ASEForConditionalGeneration.from_pretrained(BUNDLED), inputs


def quantised(model: torch.nn.Module) -> set[str]:
    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name for name, module in linear.items() if type(module) is not torch.nn.Linear}


@pytest.mark.parametrize("bits", BITS)
def test_a_quantised_model_keeps_its_saliency(bits, bundled):
    model, inputs = bundled
    skipped = ["model.mllm.model.vision_tower", "model.mllm.model.multi_modal_projector", "lm_head"]
    settings = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=skipped)
    loaded = ASEForConditionalGeneration.from_pretrained(BUNDLED, quantization_config=settings)
    assert quantised(loaded) and all(name.startswith("model.mllm.model.language_model.") for name in quantised(loaded))
    with torch.no_grad():
        outputs, expected = loaded(**inputs), model(**inputs)
    assert torch.equal(outputs.saliency_maps, expected.saliency_maps)
    features = zip(outputs.image_outputs.pooler_output, expected.image_outputs.pooler_output, strict=True)
    assert all(torch.equal(*images) for images in features)
    difference = (outputs.logits - expected.logits).abs().max()
    assert 0 < difference < 0.2 * expected.logits.abs().max()
    assert tokens(loaded, **inputs).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("skipped", [None, ["model.vision_tower", "lm_head"]], ids=["default", "named"])
@pytest.mark.parametrize("bits", BITS)
@torch.no_grad()
def test_a_graft_on_a_quantised_base_is_a_quantised_model(bits, skipped, bundled, tmp_path):
    """It was loaded by another class, yet saves, loads and trains as what it is."""
    model, inputs = bundled
    model.model.mllm.save_pretrained(tmp_path / "base")
    settings = BitsAndBytesConfig(**BITS[bits], llm_int8_skip_modules=skipped)
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", quantization_config=settings)
    expected = {f"model.mllm.{name}" for name in quantised(base)}
    reference = base(**inputs).logits
    grafted = graft(base)
    assert quantised(grafted) == expected
    assert torch.equal(grafted(**inputs).logits, reference)
    assert grafted.is_quantized and getattr(grafted, f"is_loaded_in_{bits}bit")
    assert settings.llm_int8_skip_modules == skipped  # the caller's object is not written to

    open_gates(grafted).save_pretrained(tmp_path / "graft")
    loaded = ASEForConditionalGeneration.from_pretrained(tmp_path / "graft")
    assert quantised(loaded) == expected
    assert torch.equal(loaded(**inputs).logits, grafted(**inputs).logits)
    assert not quantised(loaded.dequantize())


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("bits", BITS)
def test_lora_on_a_quantised_base(bits, bundled, tmp_path):
    model, _ = bundled
    model.model.mllm.save_pretrained(tmp_path / "base")
    grafted = graft(str(tmp_path / "base"), quantization_config=BitsAndBytesConfig(**BITS[bits]))
    adapted = get_peft_model(grafted, LoraConfig(**LORA))
    layer = adapted.get_base_model().get_decoder().layers[0].self_attn.q_proj
    assert type(layer).__module__ == "peft.tuners.lora.bnb"
    before = {name: parameter.detach().clone() for name, parameter in adapted.named_parameters()}
    processor = ASEProcessor.from_pretrained(BUNDLED)
    trainer = Trainer(
        model=adapted,
        args=TrainingArguments(str(tmp_path), remove_unused_columns=False, **TRAINING),
        train_dataset=training_examples(),
        data_collator=ASEDataCollator(processor),
    )
    trainer.train()
    assert np.isfinite(losses(trainer)).all()
    moved = {name for name, parameter in adapted.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {name for name in before if "lora_" in name or ".modules_to_save.default." in name}
    assert moved <= expected
    assert all(name.endswith("k_proj.bias") for name in expected - moved)


# Devices -------------------------------------------------------------------------------------------------------------


def parts(**places: str) -> dict[str, str]:
    """A device map of the tiny model: everything on the CPU but what is named."""
    modules = {
        "vision_tower": "model.mllm.model.vision_tower",
        "projector": "model.mllm.model.multi_modal_projector",
        "language_model": "model.mllm.model.language_model",
        "lm_head": "model.mllm.lm_head",
        "iasm": "model.iasm",
        "fusions": "model.fusions",
    }
    return {module: places.get(name, "cpu") for name, module in modules.items()}


DEVICE_MAPS = {
    "cpu": "cpu",
    "auto": "auto",
    "language_model": parts(language_model="disk", lm_head="disk"),
    "encoder": parts(vision_tower="disk"),
    "added": parts(iasm="disk", fusions="disk"),
    "all": {"": "disk"},
}
SAVES_OFFLOADED = "ignore:Attempting to save a model with offloaded modules:UserWarning"


@pytest.mark.slow
@pytest.mark.filterwarnings(SAVES_OFFLOADED)
@pytest.mark.parametrize("device_map", DEVICE_MAPS)
def test_device_maps_change_no_output(device_map, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    loaded = ASEForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=DEVICE_MAPS[device_map], offload_folder=tmp_path / "offload"
    )
    offloaded = any(parameter.device.type == "meta" for parameter in loaded.parameters())
    assert offloaded == (device_map not in ("cpu", "auto"))
    inputs = make_inputs()
    for _ in range(2):  # what is loaded for a call is put away after it
        outputs, expected = loaded(**inputs), model(**inputs)
        assert torch.equal(outputs.logits, expected.logits)
        assert torch.equal(outputs.saliency_maps, expected.saliency_maps)
    assert torch.equal(tokens(loaded), tokens(model))
    features = loaded.get_image_features(inputs["pixel_values"])
    assert torch.equal(features.score_logits, expected.score_logits)
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(ASEForConditionalGeneration.from_pretrained(tmp_path / "again")), logits(model))


@pytest.mark.parametrize("share", [0.6, 0.75, 0.9])
def test_an_automatic_device_map_never_cuts_through_the_saliency_module(share, tmp_path):
    """It computes across its parts, which must lie on one device; so must a cross-attention and an encoder layer."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    memory = {"cpu": int(share * model.get_memory_footprint())}
    loaded = ASEForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory=memory, offload_folder=tmp_path / "offload"
    )
    assert set(loaded.hf_device_map.values()) == {"cpu", "disk"}
    whole = r"model\.iasm\.|model\.fusions\.\d+\.|.*\.layers\.\d+\."
    assert not [name for name in loaded.hf_device_map if re.match(whole, name)]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.filterwarnings(SAVES_OFFLOADED)
@pytest.mark.parametrize("offloaded", ["model.vision_tower", "model.language_model"])
def test_a_graft_on_an_offloaded_base(offloaded, tmp_path):
    base = tiny_base()
    base.save_pretrained(tmp_path / "base")
    modules = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    device_map = {name: "disk" if name == offloaded else "cpu" for name in modules}
    model = graft(str(tmp_path / "base"), device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert {parameter.device.type for name, parameter in model.named_parameters() if is_added(name)} == {"cpu"}
    assert torch.equal(logits(model), logits(base))
    assert model.hf_device_map[f"model.mllm.{offloaded}"] == "disk"
    open_gates(model).save_pretrained(tmp_path / "graft")
    assert torch.equal(logits(ASEForConditionalGeneration.from_pretrained(tmp_path / "graft")), logits(model))


def test_the_tensor_parallel_plan_is_the_base_s():
    base = tiny_base()
    plan = base.tp_plan
    assert any("q_proj" in name for name in plan)
    model = graft(base)
    assert model.supports_tp_plan
    assert model.tp_plan == {f"model.mllm.{name}": style for name, style in plan.items()}
    names = {
        ".".join("*" if part.isdigit() else part for part in name.split(".")) for name, _ in model.named_modules()
    }
    assert set(model.tp_plan) <= names


# Loading -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [None, "auto", torch.float16, torch.float32], ids=str)
def test_the_dtype_asked_for_is_the_dtype_loaded(asked, tmp_path):
    saved = torch.bfloat16
    tiny_model().to(saved).save_pretrained(tmp_path)
    model = ASEForConditionalGeneration.from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
    expected = saved if asked in ("auto", None) else asked
    # what quantisers leave out, transformers keeps in float32 when the rest is float16: it is one list
    ours = torch.float32 if expected == torch.float16 else expected
    dtypes = {is_added(name): set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        dtypes[is_added(name)].add(parameter.dtype)
    assert dtypes == {False: {expected}, True: {ours}}
    assert model.dtype == model.config.dtype == expected
    inputs = make_inputs()
    outputs = model(**{**inputs, "pixel_values": inputs["pixel_values"].to(expected)})
    assert outputs.logits.dtype == expected and outputs.logits.isfinite().all()


@pytest.mark.parametrize("load", [ASEForConditionalGeneration.from_pretrained, ASEModel.from_pretrained,
                                  ASEConfig.from_pretrained])  # fmt: skip
def test_a_base_s_folder_is_refused_with_the_way_to_load_it(load, tmp_path):
    tiny_base().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`llava` model, not of an `ase` model.*from_mllm_pretrained"):
        load(tmp_path)


# The Hub -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """A folder that gets what is committed; nothing leaves the machine."""

    def create_repo(api: HfApi, repo_id: str, **kwargs) -> SimpleNamespace:
        (tmp_path / "hub" / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def create_commit(api: HfApi, repo_id: str, operations: list, **kwargs):
        for operation in operations:
            target = tmp_path / "hub" / repo_id / operation.path_in_repo
            target.parent.mkdir(exist_ok=True)
            shutil.copy(operation.path_or_fileobj, target)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    return tmp_path / "hub"


def by_method(part, repo_id: str, folder: Path):
    part.push_to_hub(repo_id)


def by_saving(part, repo_id: str, folder: Path):
    part.save_pretrained(folder, push_to_hub=True, repo_id=repo_id)


@pytest.mark.parametrize("push", [by_method, by_saving])
def test_what_is_pushed_is_a_whole_repository(push: Callable, hub, tmp_path):
    model = tiny_model()
    for part in (model, tiny_processor()):
        push(part, "someone/critic", tmp_path / "local")
    folder = hub / "someone" / "critic"
    files = {path.name for path in folder.iterdir()}
    code = {path.name for path in Path(__file__).parents[1].glob("*.py")} - {"__init__.py"}
    assert files >= code | {"model.safetensors", "config.json", "generation_config.json", "processor_config.json"}
    assert files >= {"tokenizer.json", "chat_template.jinja"}
    assert torch.equal(logits(AutoModelForImageTextToText.from_pretrained(folder)), logits(model))
    assert type(AutoProcessor.from_pretrained(folder)) is ASEProcessor


def test_the_trainer_writes_a_card(tmp_path):
    trainer = Trainer(
        model=tiny_model(),
        args=TrainingArguments(str(tmp_path), **TRAINING),
        train_dataset=training_examples(),
        processing_class=tiny_processor(),
    )
    trainer.create_model_card(model_name="critic", tasks="image-text-to-text")
    card = (tmp_path / "README.md").read_text()
    assert "library_name: transformers" in card and "# critic" in card
