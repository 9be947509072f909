"""`examples/finetune.py`: stages, evaluation, the card, the plain base, and what goes wrong."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import finetune
import numpy as np
import pytest
import torch
from conftest import PEFT_ASKS, is_added, tiny_processor
from finetuning import (
    CAPTIONS,
    captions,
    draw,
    history,
    learning_rates,
    run,
    trainer_state,
    write_base,
    write_checkpoint,
    write_photographs,
    write_rated,
    write_ten,
)
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.modeling_outputs import ModelOutput

from ase_mllm import ASEForConditionalGeneration, ASEProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    return write_ten(tmp_path_factory.mktemp("photographs"))


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    return write_rated(tmp_path_factory.mktemp("rated"))


# Parts ---------------------------------------------------------------------------------------------------------------


def test_critiques_are_compared_with_their_own_references():
    references = [["the light is soft", "soft light"], ["the horizon tilts"], ["sharp eyes , dull colours"]]
    perfect = finetune.caption_metrics([texts[0] for texts in references], references)
    shuffled = finetune.caption_metrics([references[i][0] for i in (1, 2, 0)], references)
    assert perfect["bleu4"] == pytest.approx(1, abs=1e-4) and perfect["topic_coverage"] == 1
    assert perfect["cider"] > 1 > shuffled["cider"]
    assert shuffled["bleu4"] < 0.01 and shuffled["topic_coverage"] == 0


def test_tiles_are_drawn_without_a_heat_map():
    photo = Image.new("RGB", (40, 30), "black")
    one, three = (ModelOutput(saliency_maps=torch.ones(count, 4, 4)) for count in (1, 3))
    (with_heat,) = finetune.draw_samples(tiny_processor(), one, [photo], ["What is good?"], ["good"])
    (without,) = finetune.draw_samples(tiny_processor(), three, [photo], ["What is good?"], ["good " * 200])
    assert with_heat.size[0] == without.size[0] == 960 and with_heat.size[1] < without.size[1]
    assert with_heat.getpixel((480, 10)) != (0, 0, 0) == without.getpixel((480, 10)) == with_heat.getpixel((470, 10))


def test_losses_and_copies_that_would_be_wrong_are_refused(checkpoint, photographs, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="predicts each token from itself"):
        run(checkpoint, photographs, tmp_path / "smooth", **SMALL, label_smoothing_factor=0.1)
    monkeypatch.setattr(finetune.TrainingArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*accelerate launch"):
        run(checkpoint, photographs, tmp_path / "copies", **SMALL)


def test_a_prompt_that_leaves_no_room_is_refused(checkpoint, photographs, tmp_path):
    with pytest.raises(ValueError, match="no room for a caption in 9"):
        run(checkpoint, photographs, tmp_path / "out", max_steps=1, stage="all", max_length=9)


# One process ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graft_run(base, tmp_path_factory) -> tuple[Path, list]:
    """A base is grafted, its added modules are trained by all four terms, and the result is pushed; what was pushed."""
    folder = tmp_path_factory.mktemp("graft")
    rows = [
        {"file_name": f"{i}.png", "text": CAPTIONS[i % len(CAPTIONS)], "score": i / 7, "aspect_labels": [i % 2, 0]}
        for i in range(8)
    ]
    lines = [{**row, "saliency": np.eye(4).tolist()} for row in rows] + [{"file_name": "cut.png", "text": "wrong"}]
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw(folder / "images" / "deep", *(line["file_name"] for line in lines))
    os.truncate(folder / "images" / "deep" / "cut.png", 2000)
    pushed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: pushed.append(repo_id))
        patch.setattr(HfApi, "upload_folder", lambda api, **kwargs: pushed.append(kwargs))
        out = run(
            base,
            folder / "list.jsonl",
            folder / "out",
            images=folder / "images",
            columns="caption=text",
            score_range=[0, 1],
            decode_images=True,
            validation_share=0.4,
            stage="added",
            fusion_layers=[1],
            aspect_names=["bright", "blurred"],
            score_loss_weight=2.5,
            saliency_loss_weight=0.25,
            aspect_loss_weight=1.5,
            gate_lr_ratio=5,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            max_steps=3,
            eval_steps=1,
            eval_photographs=2,
            num_samples=1,
            patience=0,
            report_to="tensorboard",
            push_to="someone/critic",
        )
    return out, pushed


WEIGHTS = {"caption_loss": 1, "score_loss": 2.5, "saliency_loss": 0.25, "aspect_loss": 1.5}


def test_stage_added_trains_the_added_modules_alone(graft_run, base):
    out, _ = graft_run
    model = ASEForConditionalGeneration.from_pretrained(out)
    before = ASEForConditionalGeneration.from_mllm_pretrained(base).state_dict()
    for name, tensor in model.state_dict().items():
        assert is_added(name) or torch.equal(tensor, before[name]), name
    assert [gate.item() != 0 for name, gate in model.named_parameters() if name.endswith("gate")] == [True]
    assert model.config.fusion_layers == [1]
    settings = model.config.iasm_config
    assert settings.aspect_names == ASEProcessor.from_pretrained(out).aspect_names == ["bright", "blurred"]
    assert {name: getattr(settings, f"{name}_weight") for name in WEIGHTS if name != "caption_loss"} == {
        name: weight for name, weight in WEIGHTS.items() if name != "caption_loss"
    }
    assert "EarlyStoppingCallback" not in trainer_state(out)["stateful_callbacks"]
    assert len(list(out.glob("checkpoint-*"))) == 2
    assert learning_rates(out)[-1] == pytest.approx(0.05)


def test_the_terms_of_the_loss_are_logged_and_drawn(graft_run):
    out, _ = graft_run
    for prefix in ("", "eval_"):
        terms = {name: history(out, prefix + name) for name in WEIGHTS}
        for step, loss in history(out, f"{prefix}loss").items():
            weighted = sum(weight * terms[name][step] for name, weight in WEIGHTS.items())
            assert loss == pytest.approx(weighted, rel=1e-4)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(next((out / "runs").rglob("events*")).parent), size_guidance={"images": 0})
    board.Reload()
    for name in WEIGHTS:
        drawn = [event.value for event in board.Scalars(f"train/{name}")]
        assert drawn == pytest.approx(list(history(out, name).values()))
    assert [event.step for event in board.Images("samples/000")] == [1, 2, 3]


def test_evaluation_writes_critiques_and_pictures(graft_run):
    out, _ = graft_run
    for step in (1, 2, 3):
        assert [len(line["caption"].split()) for line in captions(out, step)] == [4, 4]  # of three photographs
        (picture,) = (out / "samples" / f"step-{step:06d}").glob("*.jpg")
        assert Image.open(picture).size[0] == 960
        assert picture.stem == f"000-{captions(out, step)[0]['image_id']}"
    assert history(out, "eval_caption_words") == {1: 4, 2: 4, 3: 4}
    assert history(out, "eval_cider").keys() == history(out, "eval_bleu4").keys() == {1, 2, 3}


def test_the_card_says_what_was_done(graft_run):
    out, _ = graft_run
    card, best = ModelCard.load(out / "README.md"), trainer_state(out)["best_global_step"]
    figures = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert figures.keys() >= {"CIDEr", "BLEU-4"} and figures["loss"] == round(history(out, "eval_loss")[best], 4)
    for text in (
        f"Of step {best} of 3, one seed (42), on 2 validation critiques.",
        "5 rows to train on; 3 of other photographs",
        "damaged image (row left out)",
        "    python finetune.py --model",
        "| CIDEr |",
        f"transformers {finetune.transformers.__version__}",
        'model="someone/critic"',
    ):
        assert text in card.text


def test_the_result_is_uploaded_without_checkpoints(graft_run):
    out, (created, upload) = graft_run
    assert created == upload["repo_id"] == "someone/critic"
    paths = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    files = set(filter_repo_objects(paths, ignore_patterns=upload["ignore_patterns"]))
    assert any(path.startswith("checkpoint-") for path in paths)
    assert files >= {"README.md", "model.safetensors", "config.json", "modeling_ase.py", "processor_config.json"}
    assert not [file for file in files if file.startswith(("checkpoint", "samples", "runs"))]


def test_scores_alone_teach_the_scores_alone(checkpoint, tmp_path):
    """Ratings of AVA: no critique is written, and captions of weight 0 add nothing. Evaluated after the epoch."""
    draw(tmp_path, "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "AVA.txt").write_text("".join(f"{i} {i} 0 0 0 0 1 9 {i} 0 0 0 1 2 3\n" for i in (1, 2, 3)))
    out = run(checkpoint, tmp_path, tmp_path / "out", max_steps=1, stage="all", dtype="bfloat16")
    assert history(out, "caption_loss") == {1: 0}
    weight = ASEForConditionalGeneration.from_pretrained(out).config.iasm_config.score_loss_weight
    assert history(out)[1] == pytest.approx(weight * history(out, "score_loss")[1], rel=1e-2) != 0
    assert history(out, "eval_loss").keys() == {1}
    assert not (out / "samples").exists() and "| loss |" in (out / "README.md").read_text()
    tensors = load_file(out / "model.safetensors")
    assert {tensor.dtype for name, tensor in tensors.items() if is_added(name)} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors.items() if not is_added(name)} == {torch.bfloat16}


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("stage", ["module", "added", "lora", "all"])
def test_data_without_labels_leave_the_aspects_as_they_are(stage, checkpoint, tmp_path, capsys):
    """With captions and scores alone the module's tokens would be bent, and the labels read from them would be wrong."""
    rows = [{"file_name": f"{i}.png", "caption": CAPTIONS[i], "score": 1.0 + i} for i in range(4)]
    out = run(checkpoint, write_photographs(tmp_path / "data", rows), tmp_path / "out", max_steps=2, stage=stage)
    assert "neither aspect labels nor saliency maps" in capsys.readouterr().out
    before = ASEForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    after = ASEForConditionalGeneration.from_pretrained(out).state_dict()
    moved = {name for name in before if name.startswith("model.iasm.") and not torch.equal(before[name], after[name])}
    assert moved == {"model.iasm.score_head.weight", "model.iasm.score_head.bias"}


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("known", [{"aspect_labels": [1, 0, -1]}, {"saliency": np.eye(4).tolist()}])
def test_labels_or_maps_train_the_module(known, checkpoint, tmp_path, capsys):
    rows = [{"file_name": f"{i}.png", "caption": CAPTIONS[i], **known} for i in range(5)]
    out = run(checkpoint, write_photographs(tmp_path / "data", rows), tmp_path / "out", max_steps=2, stage="added")
    assert "neither aspect labels nor saliency maps" not in capsys.readouterr().out
    before = ASEForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    after = ASEForConditionalGeneration.from_pretrained(out).state_dict()
    assert not torch.equal(before["model.iasm.queries"], after["model.iasm.queries"])


# What goes wrong -----------------------------------------------------------------------------------------------------

SMALL = {"max_steps": 2, "eval_steps": 1, "stage": "added"}


def break_after(monkeypatch, step: int, breaking: Callable):
    """Calls `breaking(model)` before the forward pass that follows so many steps."""
    original = finetune.CritiqueTrainer.compute_loss

    def compute_loss(self, model, *args, **kwargs):
        if self.state.global_step == step and model.training:
            breaking(model)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(finetune.CritiqueTrainer, "compute_loss", compute_loss)


def test_a_loss_that_is_no_number_stops_the_run_with_its_terms(checkpoint, photographs, tmp_path, monkeypatch):
    break_after(monkeypatch, 1, lambda model: model.model.iasm.score_head.bias.data.fill_(float("nan")))
    with pytest.raises(
        ValueError, match=r"After step 1 the loss is nan \(terms: caption \d.*score nan.*--learning_rate"
    ):
        run(checkpoint, photographs, tmp_path / "out", **SMALL)
    assert finetune.last_checkpoint(tmp_path / "out").endswith("checkpoint-1")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_are_no_numbers_are_not_saved(checkpoint, photographs, tmp_path, monkeypatch):
    original = finetune.CritiqueTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = original(self, model, *args, **kwargs)
        if self.state.global_step == 1:  # the last step makes them so: no loss would tell
            model.model.iasm.score_head.bias.grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(finetune.CritiqueTrainer, "training_step", training_step)
    monkeypatch.setattr(finetune.CritiqueTrainer, "evaluate", lambda *args, **kwargs: {"eval_loss": 1.0})
    with pytest.raises(ValueError, match=r"trained tensors hold nan or infinity, e\.g\. model\.iasm\."):
        run(checkpoint, photographs, tmp_path / "out", **SMALL)
    assert finetune.last_checkpoint(tmp_path / "out").endswith("checkpoint-1")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_run_does_not_go_on_with_other_data(checkpoint, photographs, tmp_path, capsys):
    data, out = shutil.copytree(photographs, tmp_path / "data"), tmp_path / "out"
    run(checkpoint, data, out, **SMALL)
    lines = (data / "train" / "metadata.jsonl").read_text().splitlines()
    (data / "train" / "metadata.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    options = SMALL | {"max_steps": 3}
    with pytest.raises(ValueError, match=r"train: 8 rows 8 photographs .*now 7 rows 7 photographs.*--output_dir"):
        run(checkpoint, data, out, **options)
    with pytest.raises(ValueError, match=r"model: .*now"):
        run(checkpoint, photographs, out, **{**options, "stage": "all"})
    run(checkpoint, data, out, **options, resume_from_checkpoint=out / "checkpoint-2")  # named, so it is meant
    assert trainer_state(out)["global_step"] == 3
    run(checkpoint, data, out, **options)  # and is what the run is of from now on
    assert "Goes on from" in capsys.readouterr().out


def test_a_run_without_evaluations(checkpoint, photographs, tmp_path):
    out = run(checkpoint, photographs, tmp_path / "out", max_steps=2, stage="added", eval_strategy="no", save_steps=1)
    assert not history(out, "eval_loss") and (out / "model.safetensors").exists()


def test_a_caption_of_three_thousand_words_is_cut_by_default(checkpoint, tmp_path, monkeypatch):
    rows = [{"file_name": f"{i}.png", "caption": "good " * (3000 if i == 0 else 3)} for i in range(4)]
    write_photographs(tmp_path / "data", rows)
    lengths = []
    original = finetune.CritiqueTrainer.compute_loss
    monkeypatch.setattr(
        finetune.CritiqueTrainer,
        "compute_loss",
        lambda self, model, inputs, *args, **kwargs: (
            lengths.append((inputs["labels"] != -100).sum(1).max().item())
            or original(self, model, inputs, *args, **kwargs)
        ),
    )
    run(checkpoint, tmp_path / "data", tmp_path / "out", **SMALL)
    assert max(lengths) in (4, 512)  # the long one may be held out


def test_a_budget_of_image_tokens_is_drawn_for_each_batch(checkpoint, photographs, tmp_path, monkeypatch):
    seen = []
    original = ASEForConditionalGeneration.forward

    def forward(self, *args, image_token_budget=None, **kwargs):
        seen.append((self.training, image_token_budget))
        return original(self, *args, image_token_budget=image_token_budget, **kwargs)

    monkeypatch.setattr(ASEForConditionalGeneration, "forward", forward)
    run(checkpoint, photographs, tmp_path / "out", **SMALL, image_token_budget=[0.25, 0.75])
    drawn = [budget for training, budget in seen if training]
    assert len(set(drawn)) == len(drawn) == 2 and all(0.25 <= budget <= 0.75 for budget in drawn)
    assert {budget for training, budget in seen if not training} == {None}
    with pytest.raises(ValueError, match="two shares"):
        run(checkpoint, photographs, tmp_path / "other", **SMALL, image_token_budget=[0.25, 1.5])


# The plain base ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(PEFT_ASKS)
@pytest.mark.parametrize("stage", ["lora", "all"])
def test_the_plain_base_is_trained_by_the_same_command(stage, base, rated, tmp_path, monkeypatch):
    seen = []
    original = finetune.CritiqueTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        seen.append(set(inputs))
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(finetune.CritiqueTrainer, "compute_loss", compute_loss)
    out = run(base, rated, tmp_path / "out", stage=stage, graft="none", max_steps=2, eval_steps=1)
    assert not any(name.endswith(("_targets", "_weights")) for names in seen for name in names)
    model = LlavaForConditionalGeneration.from_pretrained(out)
    before = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and (stage == "all") == any("vision_tower" in name for name in moved)
    assert LlavaProcessor.from_pretrained(out) and not list(out.glob("modeling_ase.py"))
    assert len(captions(out, 1)) == 3 and history(out, "eval_cider").keys() == {1, 2}
    card = ModelCard.load(out / "README.md")
    assert (
        "without a saliency branch" in card.text
        and "trust_remote_code" not in card.text
        and "ase" not in card.data.tags
    )


def test_the_plain_base_needs_captions_and_no_branch(base, checkpoint, photographs, tmp_path):
    with pytest.raises(ValueError, match="which has the branch"):
        run(checkpoint, photographs, tmp_path / "out", graft="none")
    with pytest.raises(ValueError, match="got stage added"):
        run(base, photographs, tmp_path / "out", graft="none", stage="added")
    draw(tmp_path / "ava", "1.jpg", "2.jpg", "3.jpg")
    (tmp_path / "ava" / "AVA.txt").write_text("".join(f"{i} {i} 0 0 0 0 1 9 {i} 0 0 0 1 2 3\n" for i in (1, 2, 3)))
    with pytest.raises(ValueError, match="no captions"):
        run(base, tmp_path / "ava", tmp_path / "out", graft="none", stage="all")
