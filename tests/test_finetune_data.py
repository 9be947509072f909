"""`examples/finetune.py` on PCCD, several sources and rows with questions of their own."""

import json
import re
import sys
import warnings
from pathlib import Path

import finetune
import numpy as np
import pytest
from conftest import tiny_processor
from finetuning import (
    CAPTIONS,
    captions,
    command,
    draw,
    run,
    trainer_state,
    write_base,
    write_checkpoint,
    write_photographs,
)
from huggingface_hub import ModelCard
from PIL import Image

from ase_mllm import ASEForConditionalGeneration, ASEProcessor


pytestmark = pytest.mark.slow
SMALL = {"max_steps": 1, "eval_steps": 1, "stage": "added"}
SCORES = ["6", "7", "N", "3", "9", "5", "4"]  # of the seven topics


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def seen(monkeypatch) -> dict:
    """The rows that a run trains and is evaluated on."""
    found = {}
    original = finetune.CritiqueTrainer.__init__

    def remember(self, *args, train_dataset, eval_dataset, photographs, **kwargs):
        found.update(train=train_dataset, validation=eval_dataset, photographs=photographs)
        original(
            self, *args, train_dataset=train_dataset, eval_dataset=eval_dataset, photographs=photographs, **kwargs
        )

    monkeypatch.setattr(finetune.CritiqueTrainer, "__init__", remember)
    return found


def write_pccd(folder: Path, train: int = 4, validation: int = 2) -> Path:
    draw(folder / "images", *(f"{i}.jpg" for i in range(train + validation)))
    for split, numbers in (("train", range(train)), ("validation", range(train, train + validation))):
        texts = [{"general_impression": CAPTIONS[i % 5], "focus": CAPTIONS[0]} for i in numbers]
        entries = [{"title": f"{i}.jpg", "overall": "6", "score": SCORES, **text} for i, text in zip(numbers, texts)]
        (folder / f"guru_{split}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize(
    ("texts", "train", "first"),
    [("aspects", 8, CAPTIONS[0]), ("joined", 4, f"{CAPTIONS[0]}\n{CAPTIONS[0]}"), ("general", 4, CAPTIONS[0])],
)
def test_texts_of_pccd(texts, train, first, checkpoint, tmp_path, seen):
    run(checkpoint, write_pccd(tmp_path / "pccd"), tmp_path / "out", **SMALL, pccd=texts)
    assert len(seen["train"]) == train and len(seen["validation"]) == train // 2
    assert seen["train"][0]["caption"] == first
    asked = {row["topic"] for row in seen["photographs"]}
    assert asked == ({"general_impression", "focus"} if texts == "aspects" else {None})


def test_scores_of_topics_train_the_aspects(base, checkpoint, tmp_path, seen):
    pccd, out = write_pccd(tmp_path / "pccd"), tmp_path / "out"
    run(base, pccd, out, **SMALL, aspect_names="topics", pccd="joined")
    topics = ["general_impression", "subject_of_photo", "use_of_camera", "depth_of_field", "color_lighting", "focus"]
    model = ASEForConditionalGeneration.from_pretrained(out)
    assert model.config.iasm_config.aspect_names == ASEProcessor.from_pretrained(out).aspect_names == topics
    labels = [float(score) / 10 for score in SCORES if score != "N"]
    assert seen["train"][0]["aspect_labels"] == pytest.approx(labels)
    assert "aspect_loss" in trainer_state(out)["log_history"][0]
    run(base, pccd, tmp_path / "two", **SMALL, aspect_names=["composition", "focus"])
    assert seen["train"][0]["aspect_labels"] == pytest.approx([-1, 0.4])  # nobody scored the composition
    with pytest.raises(ValueError, match=r"aspect_names are of a new graft; .* has learned underexposed, .* be focus"):
        run(checkpoint, pccd, tmp_path / "three", **SMALL, aspect_names="focus")
    unscored = write_photographs(tmp_path / "own", [{"file_name": f"{i}.png", "caption": "good"} for i in range(3)])
    with pytest.raises(ValueError, match="no row to train on has scores of topics"):
        run(base, unscored, tmp_path / "four", **SMALL, aspect_names="topics")


def test_words_of_captions_train_the_aspects(base, checkpoint, tmp_path, seen):
    """Of a photograph all that its captions say, whichever row has them; words that nearly all or only one have do not count."""
    said = [
        ["soft light", "the light is warm"],
        ["the light is hard"],
        ["it tilts, the sky is warm"],
        ["the sky", "it tilts"],
    ]
    rows = [{"file_name": f"{i}.png", "captions": said[i % 4], "split": "train"} for i in range(8)]
    rows += [{"file_name": f"{i}.png", "captions": ["Soft, WARM."], "split": "validation"} for i in (8, 9)]
    rows += [{"file_name": "10.png", "captions": [], "score": 5, "split": "train"}]
    data = write_photographs(tmp_path / "own", rows)
    run(base, data, tmp_path / "out", **SMALL, aspect_names="words")
    names = ["it", "light", "sky", "tilts", "warm", "hard", "soft"]
    model = ASEForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert (
        model.config.iasm_config.aspect_names == ASEProcessor.from_pretrained(tmp_path / "out").aspect_names == names
    )
    expected = {"0": [0, 1, 0, 0, 1, 0, 1], "1": [0, 1, 0, 0, 0, 1, 0], "2": [1, 0, 1, 1, 1, 0, 0], "10": None}
    trained = dict(zip(seen["train"]["image_id"], seen["train"]["aspect_labels"]))
    assert {name: trained[name] for name in expected} == expected
    assert seen["validation"]["aspect_labels"] == [[0, 0, 0, 0, 1, 0, 1]] * 2
    assert "aspect_loss" in trainer_state(tmp_path / "out")["log_history"][0]
    run(tmp_path / "out", data, tmp_path / "two", **SMALL, aspect_names="words")  # goes on with the same words
    with pytest.raises(ValueError, match="aspect_names are of a new graft"):
        run(checkpoint, data, tmp_path / "three", **SMALL, aspect_names="words")
    labelled = write_photographs(tmp_path / "labelled", [{**rows[0], "aspect_labels": [1, 0]}, rows[8]])
    with pytest.raises(ValueError, match="0 has `aspect_labels` of its own"):
        run(base, labelled, tmp_path / "four", **SMALL, aspect_names="words")
    alone = write_photographs(tmp_path / "alone", [rows[0], rows[8]])
    with pytest.raises(ValueError, match="of 1 photographs with captions no two"):
        run(base, alone, tmp_path / "five", **SMALL, aspect_names="words")


def test_several_sources_are_trained_on_by_their_weights(checkpoint, tmp_path, seen):
    pccd = write_pccd(tmp_path / "pccd", train=4, validation=2)
    (pccd / "images").rename(tmp_path / "elsewhere")
    own = tmp_path / "own"
    write_photographs(own, [{"file_name": f"own{i}.png", "caption": CAPTIONS[1]} for i in range(2)])
    for i in range(2):  # not the pictures that PCCD has
        Image.new("RGB", (40, 30), (90 * i, 60, 30)).save(own / f"own{i}.png")
    options = {**SMALL, "images": [tmp_path / "elsewhere", "-"], "pccd": "joined"}
    out = run(checkpoint, [pccd, own], tmp_path / "out", **options, data_weights=[0.5, 3])
    ids = seen["train"]["image_id"]
    assert len(ids) == 8 and sorted(ids[2:]) == ["own0"] * 3 + ["own1"] * 3 and len(seen["validation"]) == 2
    card = ModelCard.load(out / "README.md")
    assert "The sources:" in card.text and str(own) in card.text and str(pccd) in card.text
    assert card.data.eval_results[0].dataset_type == "pccd, own"
    with pytest.raises(ValueError, match="2 sources take as many weights, got 1"):
        run(checkpoint, [pccd, own], tmp_path / "two", **options, data_weights=2)
    with pytest.raises(ValueError, match="learns once from each photograph"):
        run(checkpoint, [pccd, own], tmp_path / "three", **{**options, "stage": "module"}, data_weights=[1, 2])


def test_what_is_set_aside_is_set_aside_before_it_is_weighed(checkpoint, tmp_path, seen):
    for name in ("one", "two"):
        write_photographs(tmp_path / name, [{"file_name": f"{name}{i}.png", "caption": CAPTIONS[i]} for i in range(5)])
    data = [tmp_path / "one", tmp_path / "two"]
    run(checkpoint, data, tmp_path / "out", **SMALL, data_weights=[2, 1], validation_share=0.4)
    held_out, trained = seen["validation"]["image_id"], seen["train"]["image_id"]
    assert len(held_out) == len(set(held_out)) == 4 and not set(held_out) & set(trained)
    assert {name: trained.count(name) for name in trained} == {name: 1 + name.startswith("one") for name in trained}
    assert len(set(trained)) == 6


def test_samples_are_of_different_photographs_and_answer_their_own_questions(checkpoint, tmp_path, monkeypatch):
    drawn = []
    original = finetune.draw_samples

    def draw_samples(processor, outputs, images, questions, texts):
        drawn.extend(questions)
        return original(processor, outputs, images, questions, texts)

    monkeypatch.setattr(finetune, "draw_samples", draw_samples)
    asked = ["what is good ?", "what is wrong ?", None]
    turns = [{"file_name": f"{i}.png", "prompt": prompt, "caption": CAPTIONS[i]} for i in range(3) for prompt in asked]
    write_photographs(tmp_path / "data" / "train", turns[:3])
    write_photographs(tmp_path / "data" / "validation", turns[3:])
    prompts = []
    original_prompt = ASEProcessor.critique_prompt
    monkeypatch.setattr(
        ASEProcessor,
        "critique_prompt",
        lambda self, topic="critique": prompts.append(topic) or original_prompt(self, topic),
    )
    out = run(checkpoint, tmp_path / "data", tmp_path / "out", **SMALL, num_samples=2, per_device_eval_batch_size=2)
    names = sorted(path.stem for path in (out / "samples" / "step-000001").glob("*.jpg"))
    assert names == ["000-1", "003-2"]
    assert [line["prompt"] for line in captions(out, 1)] == asked * 2
    general = finetune.row_question(None)
    assert prompts[-7:-1] == [*asked[:2], general] * 2 and drawn == [*asked[:2], general, asked[0]]


def test_a_sample_shows_the_question():
    photo, output = Image.new("RGB", (40, 30), "black"), {}
    one, two = (
        finetune.draw_samples(tiny_processor(), output, [photo], [question], ["good"])[0]
        for question in ("what is good ?", "what is wrong ?")
    )
    assert one.size == two.size and (np.asarray(one) != np.asarray(two)).any()


def test_questions_that_the_template_puts_in_the_same_words_are_told(tmp_path, base, capsys):
    """As the bundled model's does: it asks one question, whatever the words were."""
    data = write_pccd(tmp_path / "PCCD")
    run(base, data, tmp_path / "apart", **SMALL)
    assert "WARNING" not in capsys.readouterr().err
    processor = tiny_processor()
    processor.chat_template = processor.base_processor.chat_template = "{{ '<image>' }}critique:"
    assert processor.critique_prompt("What of the light?") == "<image>critique:"
    model = write_base(tmp_path / "base")
    processor.base_processor.save_pretrained(model)
    run(model, data, tmp_path / "alike", **SMALL)
    error = capsys.readouterr().err
    assert "asks 2 different questions" in error and str(model) in error
    run(model, data, tmp_path / "one", pccd="general", **SMALL)
    assert "WARNING" not in capsys.readouterr().err


def rated(*scores: float) -> list[dict]:
    return [{"file_name": f"{i}.png", "caption": CAPTIONS[0], "score": score} for i, score in enumerate(scores)]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "photographs/metadata.jsonl is empty"),
        (rated(6), r"one photograph alone \(0\), and training needs two"),
        (
            rated(5, 15, 25),
            r"3 scores from 5 \(metadata.jsonl:1\) to 25 \(metadata.jsonl:3\).*--score-range WORST BEST",
        ),
        ([{"file_name": "0.png", "text": "good"}], r"None of the 1 rows of .* can be used: 1 × nothing to learn from"),
        (None, "has 2 pictures and no .jsonl,.*write a metadata.jsonl beside the pictures"),
        ("nowhere", "^Cannot train: nowhere is no file or folder here.* Is it spelled right"),
    ],
)
def test_data_that_cannot_be_trained_on_end_the_command_in_words(rows, reason, checkpoint, tmp_path, monkeypatch):
    data = tmp_path / "photographs"
    if isinstance(rows, list):
        write_photographs(data, rows)
    else:
        draw(data, "0.png", "1.png")
    given = data if rows != "nowhere" else rows
    monkeypatch.setattr(sys, "argv", ["finetune.py", *command(checkpoint, given, tmp_path / "out", **SMALL)])
    with pytest.raises(SystemExit) as stopped:
        finetune.run_command()
    assert re.search(reason, stopped.value.code) and "\n" not in stopped.value.code
    assert not (tmp_path / "out").exists()


def test_an_option_that_does_not_fit_ends_the_command_in_words(checkpoint, tmp_path, monkeypatch):
    write_photographs(tmp_path / "data", rated(2, 8, 6))
    options = {**SMALL, "image_token_budget": [0.5, 0.1]}
    monkeypatch.setattr(
        sys, "argv", ["finetune.py", *command(checkpoint, tmp_path / "data", tmp_path / "out", **options)]
    )
    with pytest.raises(SystemExit, match="Cannot train: --image_token_budget takes two shares"):
        finetune.run_command()


def test_the_command_does_not_pass_on_what_only_peft_can_change(monkeypatch):
    said = "`is_gradient_checkpointing` is deprecated and will be removed in v6."
    monkeypatch.setattr(finetune, "main", lambda: warnings.warn(said, FutureWarning, stacklevel=2))
    with warnings.catch_warnings(record=True) as passed_on:
        warnings.simplefilter("always")
        finetune.run_command()
    assert passed_on == []
