"""`examples/post_train.py`: rewards by hand, and TRL's GRPO and DPO trainers on the tiny model, unmodified."""

import json

import aic_data
import datasets
import pytest
import torch
from conftest import tiny_model, tiny_processor
from PIL import Image


pytest.importorskip("trl")
import post_train
from trl import SFTConfig, SFTTrainer

from ase_mllm import ASEForConditionalGeneration


pytestmark = pytest.mark.slow
TRL_SETS = "ignore:`gradient_checkpointing` is deprecated:FutureWarning"


def said(*texts: str) -> list[list[dict]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_aspects_are_those_of_the_labels_that_are_known():
    reward = post_train.reward_aspects(["underexposed", "left_third", "noisy"])
    texts = said("Underexposed, noisy.", "The left third is calm.", "Fine.", "Not overexposednoisy at all.", "x")
    labels = [[1, 0, -1], [0, 1, 0], [0, 0, 0], [0, 0, 1], None]
    assert reward(texts, labels) == [1, 1, 1, 0, None]
    assert reward(said("noisy and underexposed"), [[1, 0, 0]]) == [pytest.approx(2 / 3)]


def test_topics_are_those_of_the_captions():
    texts = said("Soft light.", "Soft light and a level horizon.", "Nice.")
    references = [["The light is soft."], ["The light is hard."], ["Lovely!"]]
    assert post_train.reward_topics(texts, references) == [1, pytest.approx(2 / 3), None]


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Score: 6.5.", 6.5),
        ("I give it 7/10", 7),
        ("8 out of 10!", 8),
        ("three birds, 12 of them", None),
        ("rating 40", None),
    ],
)
def test_ratings_are_read_from_the_text(text, rating):
    assert post_train.read_rating(text) == rating


def test_a_rating_is_worth_its_nearness():
    assert post_train.reward_rating(said("7/10", "7/10", "none", "7/10"), [7.0, 9.0, 5.0, None]) == [1, 0.5, 0, None]


def test_lengths_fall_outside_of_the_range():
    texts = said("a " * 10, "a " * 30, "a " * 5, "a " * 40, "", "a " * 25)
    limits = post_train.reward_length([10, 20])
    assert limits(texts, [None] * 6) == [1, 0.5, 0, 0, 0, 0.75]
    of_captions = post_train.reward_length(None)
    assert of_captions(said("a b c", "a"), [["a b c", "a b c d"], None]) == [1, None]


def test_what_is_said_again_counts_against_it():
    assert post_train.reward_once(said("Soft light. Soft, light! Calm.", "One.", "")) == [pytest.approx(2 / 3), 1, 0]


def test_unknown_rewards_are_refused():
    args = post_train.ScriptArguments("m", "d", rewards=["length:2", "beauty"])
    with pytest.raises(ValueError, match="no rewards beauty; known are aspects, topics"):
        post_train.choose_rewards(args, tiny_processor())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critic")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(4):
        Image.effect_noise((48, 40), 20 + 40 * i).convert("RGB").save(folder / f"{i}.png")
    rows = [{"file_name": f"{i}.png", "caption": "good , blurred .", "score": 5 + i} for i in range(4)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def moved(checkpoint, out) -> set[str]:
    before, after = (ASEForConditionalGeneration.from_pretrained(one).state_dict() for one in (checkpoint, out))
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


OPTIONS = [
    "--use_cpu",
    "--max_steps",
    "2",
    "--learning_rate",
    "1e-2",
    "--disable_tqdm",
    "true",
    "--save_strategy",
    "no",
]


@pytest.mark.filterwarnings(TRL_SETS, "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_grpo(checkpoint, photographs, tmp_path):
    arguments = ["grpo", "--model", checkpoint, "--data", photographs, "--output_dir", tmp_path / "out", *OPTIONS]
    arguments += ["--rewards", "length:2", "once", "--words", "2", "5", "--num_generations", "4"]
    arguments += ["--per_device_train_batch_size", "4", "--max_completion_length", "8", "--temperature", "3"]
    post_train.main([str(one) for one in arguments])
    names = moved(checkpoint, tmp_path / "out")
    assert any(".language_model." in name for name in names) and not any(".iasm." in name for name in names)


@pytest.mark.filterwarnings(TRL_SETS, "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_dpo(checkpoint, photographs, tmp_path):
    pairs = [{"image": f"{i}.png", "chosen": "good , blurred .", "rejected": "what ."} for i in range(4)]
    file = photographs / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    arguments = [
        "dpo",
        "--model",
        checkpoint,
        "--data",
        file,
        "--output_dir",
        tmp_path / "out",
        *OPTIONS,
        "--train_iasm",
    ]
    post_train.main([str(one) for one in arguments])
    names = moved(checkpoint, tmp_path / "out")
    assert any(".language_model." in name for name in names)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "0.png", "chosen": "a"}', "line 2: not an object with"),
        ('{"image": "9.png", "chosen": "a", "rejected": "b"}', "line 2: there is no"),
        ("[", "line 2: not"),
    ],
)
def test_a_line_that_is_no_pair_is_named(photographs, line, message):
    file = photographs / "pairs.jsonl"
    file.write_text('{"image": "0.png", "chosen": "a", "rejected": "b"}\n' + line)
    with pytest.raises(ValueError, match=message):
        post_train.dpo_rows(file)


@pytest.mark.filterwarnings(TRL_SETS, "ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_a_folder_of_messages_is_read_by_trl_and_by_us(checkpoint, photographs, tmp_path):
    """What TRL's sft_vlm.py does with a model's name and a folder's; its trainer finds the processor by itself."""
    said = [{"role": "user", "content": "what is good ?"}, {"role": "assistant", "content": "blurred ."}]
    rows = [{"file_name": f"{i}.png", "messages": said} for i in range(4)]
    (photographs / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ours = aic_data.load(photographs)[0]["train"]
    assert [(row["image_id"], row["prompt"], row["captions"]) for row in ours] == [
        (str(i), "what is good ?", ["blurred ."]) for i in range(4)
    ]
    theirs = datasets.load_dataset(str(photographs), cache_dir=str(tmp_path / "cache"))["train"]
    options = {"max_steps": 1, "learning_rate": 1e-2, "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    args = SFTConfig(str(tmp_path / "out"), max_length=None, save_strategy="no", bf16=False, **options)
    model = post_train.AutoModelForImageTextToText.from_pretrained(checkpoint)
    trainer = SFTTrainer(model=model, args=args, train_dataset=theirs)
    trainer.train()
    trainer.save_model()
    assert any(".language_model." in name for name in moved(checkpoint, tmp_path / "out"))
