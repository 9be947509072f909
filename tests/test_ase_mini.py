"""The bundled model: what the folder holds, and that training and evaluation run end to end, small."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import evaluate_ase_mini
import numpy as np
import pytest
import torch
import train_ase_mini
from common import critique
from critique_captions import ASPECT_FAULTS, ASPECTS, FAULTS, named_aspects
from evaluate_ase_mini import alarms_without_faults, fault_rates
from huggingface_hub import ModelCard
from jinja2 import TemplateError
from PIL import Image, ImageEnhance
from transformers import AutoModelForImageTextToText, AutoProcessor, Dinov2Config, Dinov2Model

from ase_mllm import read_photograph
from ase_mllm.processing_ase import AESTHETIC_PROMPTS


ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "examples" / "ase-mini"


def test_folder_is_small_and_its_code_is_the_roots():
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) <= 60_000_000
    code = {path.name: path.read_bytes() for path in ROOT.glob("*.py") if path.name != "__init__.py"}
    assert {path.name: path.read_bytes() for path in BUNDLE.glob("*.py")} == code, "run `make bundle`"
    assert {path.suffix for path in BUNDLE.iterdir()} <= {".json", ".safetensors", ".py", ".md", ".jinja"}


def test_card_is_hub_metadata_with_measured_figures():
    card = ModelCard.load(BUNDLE / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.library_name == "transformers"
    assert card.data.license
    assert {result.metric_name for result in card.data.eval_results} >= {"macro fault recall", "CIDEr", "score SRCC"}
    assert "| exposure |" in card.text


def test_faults_are_named_and_lower_the_score():
    model, processor = AutoModelForImageTextToText.from_pretrained(BUNDLE), AutoProcessor.from_pretrained(BUNDLE)
    photo = Image.open(ROOT / "examples" / "photos" / "hedgehog.jpg").convert("RGB")
    plain, dark = critique(model, processor, [photo, ImageEnhance.Brightness(photo).enhance(0.35)], [(8, 8)] * 2)
    assert "underexposed" in dark["caption"] and "underexposed" not in plain["caption"]
    assert dark["score"]["mean"] < plain["score"]["mean"] - 0.5


def test_texts_of_the_bundled_photographs_say_just_what_the_labels_say():
    model, processor = AutoModelForImageTextToText.from_pretrained(BUNDLE), AutoProcessor.from_pretrained(BUNDLE)
    photos = [read_photograph(path) for path in sorted((ROOT / "examples" / "photos").glob("*.jpg"))]
    assert len(photos) == 12
    for said in critique(model, processor, photos, [(8, 8)] * len(photos), max_new_tokens=160):
        assert named_aspects(said["caption"]) == {name for name, share in said["aspects"].items() if share > 0.5}


def chat_of(*content: str, role: str = "user") -> dict:
    items = [{"type": "image"} if item == "<image>" else {"type": "text", "text": item} for item in content]
    return {"role": role, "content": items}


@pytest.mark.parametrize(
    "chat",
    [
        [chat_of("<image>", AESTHETIC_PROMPTS["critique"])],
        [chat_of(AESTHETIC_PROMPTS["critique"], "<image>")],
        [chat_of("Describe this image", "<image>", "in one sentence")],
        [{"role": "system", "content": "You are helpful."}, chat_of("<image>")],
        [chat_of("You are helpful.", role="system"), chat_of("<image>", "Hello")],
        [{"role": "user", "content": "<image>\nDescribe this image"}],
        [chat_of("<image>"), {"role": "assistant", "content": "Hm."}, {"role": "user", "content": "And the sky?"}],
        [chat_of("<image>"), chat_of("Hm.", role="assistant"), chat_of("And the sky?")],
    ],
)
def test_whatever_is_asked_the_model_reads_what_it_was_taught(chat):
    processor = AutoProcessor.from_pretrained(BUNDLE)
    asked = processor.apply_chat_template(chat, add_generation_prompt=True)
    assert asked == f"<image>{AESTHETIC_PROMPTS['critique']}\n" == processor.critique_prompt()


def test_a_chat_to_learn_from_is_asked_and_answered_in_turn():
    processor, question = AutoProcessor.from_pretrained(BUNDLE), AESTHETIC_PROMPTS["critique"]
    chat = [chat_of("Say", "<image>"), {"role": "assistant", "content": "So."}, chat_of("More"), chat_of("Or", "so.")]
    chat[-1]["role"] = "assistant"
    assert processor.apply_chat_template(chat) == f"<image>{question}\nSo.</s>{question}\nOrso.</s>"


def test_a_chat_without_a_photograph_is_refused_in_words():
    with pytest.raises(TemplateError, match="no photograph in this chat"):
        AutoProcessor.from_pretrained(BUNDLE).apply_chat_template([chat_of("Hello")], add_generation_prompt=True)


def test_the_template_is_the_training_scripts():
    assert (BUNDLE / "chat_template.jinja").read_text(encoding="utf-8") == train_ase_mini.CHAT_TEMPLATE


@pytest.fixture
def encoder(tmp_path):
    """A folder with a small encoder, deeper than what is kept of it."""
    config = Dinov2Config(hidden_size=32, num_attention_heads=2, num_hidden_layers=12, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.mark.slow
def test_training_and_evaluation_run_small(tmp_path, monkeypatch, critique_sources, encoder):
    for script in (train_ase_mini, evaluate_ase_mini):
        monkeypatch.setattr(script, "load_sources", lambda split, folder: critique_sources[split])
    out, figures, work = tmp_path / "out", tmp_path / "figures.json", tmp_path / "work"
    arguments = f"--encoder {encoder} --pictures 20 --samples 4 --batch-size 2 --workers 1 --work {work} --out {out}"
    train_ase_mini.main(arguments.split())
    assert {path.stem for path in work.glob("*.json")} == {"text", "module", "whole"}
    (out / "README.md").write_text((BUNDLE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    arguments = f"--model {out} --samples 4 --batch-size 2 --json {figures}"
    monkeypatch.setattr(sys, "argv", ["evaluate_ase_mini.py", *arguments.split()])
    critique, given = evaluate_ase_mini.critique, set()

    def listen(*args, **options):
        given.add(options.get("image_token_budget"))
        return critique(*args, **{**options, "max_new_tokens": 4})  # so little trained, it would never end

    monkeypatch.setattr(evaluate_ase_mini, "critique", listen)
    evaluate_ase_mini.main()
    measured = json.loads(figures.read_text())["own edits"]
    assert measured["pictures"] == 4
    budgets = json.loads(figures.read_text())["budgets"]
    assert list(budgets) == ["50%", "25%", "11%"] and given == {None, 0.5, 0.25, 0.11}
    card = ModelCard.load(out / "README.md")
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics["CIDEr"] == round(measured["text"]["CIDEr"], 4)


@pytest.fixture
def lesson(tmp_path, monkeypatch, critique_sources, encoder):
    """A model, and a lesson of text on three pictures with their verdicts."""
    monkeypatch.setattr(train_ase_mini, "load_sources", lambda split, folder: critique_sources[split])
    train_ase_mini.make_pictures(tmp_path, "train", 3, 0, None, encoder, 1)
    pool = train_ase_mini.Pool(tmp_path, "train", torch.device("cpu"))
    processor = train_ase_mini.build_processor(["A plain record of what was there."] * 5)
    model = train_ase_mini.build_model(processor, encoder).eval()
    found = train_ase_mini.find(model, pool)
    critiques = train_ase_mini.write_critiques(found.aspect_logits > 0, processor, pool, 1, 0)
    places = train_ase_mini.SIDE**2
    return model, train_ase_mini.TextLesson(model, processor, pool, *critiques, found.saliency_tokens, places)


def test_half_of_the_verdicts_are_of_other_pictures_with_any_faults():
    """The first are those on the pictures themselves, and the rest of the half near them."""
    found = torch.eye(200, len(ASPECTS)).bool()  # no picture has two aspects
    verdicts = train_ase_mini.draw_verdicts(found, torch.Generator().manual_seed(0))
    half = len(verdicts) // 2
    assert torch.equal(verdicts[0], found)
    changed = (verdicts[1:half] != found).sum(-1).float()
    assert 1 < changed.mean() < 3 and changed.max() <= 12
    both = verdicts[..., ASPECTS.index("underexposed")] & verdicts[..., ASPECTS.index("oversaturated")]
    assert both[:half].sum() < 10 < both[half:].sum()
    exposures = [ASPECTS.index(fault) for fault in ASPECT_FAULTS["exposure"]]
    assert verdicts[half:][..., exposures].sum(-1).max() == 1  # not both at once
    styles = slice(len(FAULTS), None)
    assert (verdicts[half:, :, styles].sum(1) == found[:, styles].sum(0)).all()  # as often as found, elsewhere
    assert (verdicts[half:, :, styles] & found[:, styles]).sum() < found[:, styles].sum()


def test_lessons_on_kept_states_are_of_what_the_model_computes(lesson):
    model, lesson = lesson
    rows = torch.arange(3)
    pixels = train_ase_mini.normalise(lesson.pool.columns["image"])
    with torch.no_grad():
        outputs = model.get_image_features(pixel_values=pixels, return_dict=True)
        features = lesson.features(torch.zeros_like(rows), rows)
        found = train_ase_mini.find(model, lesson.pool)
    # the states are kept in half precision
    torch.testing.assert_close(found.aspect_logits, outputs.aspect_logits, atol=2e-2, rtol=0)
    torch.testing.assert_close(found.saliency_maps, outputs.saliency_maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(features, torch.stack(list(outputs.pooler_output)), atol=2e-2, rtol=0)


def test_a_text_learns_the_verdict_that_it_is_given(lesson):
    """The verdict token is made of the verdict that the text was composed of, whatever the module finds."""
    model, lesson = lesson
    verdicts, tokens = lesson.verdicts, lesson.tokens
    assert verdicts.shape == (train_ase_mini.VARIANTS, 3, len(ASPECTS))
    turned = (verdicts[1 : len(verdicts) // 2] != verdicts[0]).sum(-1)
    assert turned.min() == 0 and 0 < turned.max() < 12
    for verdict, row in zip(verdicts.flatten(0, 1), tokens.flatten(0, 1)):
        text = lesson.tokenizer.decode(row, skip_special_tokens=True)
        assert named_aspects(text) == {name for name, sign in zip(ASPECTS, verdict) if sign > 0}
    seen = []
    handle = lesson.verdict.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    lesson(torch.tensor([0, 4]))["loss"].backward()
    handle.remove()
    assert torch.equal(seen[0], torch.stack([verdicts[0, 0], verdicts[1, 1]]))
    assert lesson.verdict.weight.grad.abs().sum() > 0 and model.model.iasm.queries.grad is None


@pytest.mark.parametrize("bf16", [False, True])
def test_a_stage_computes_in_bfloat16_and_at_the_rate_that_it_is_told(lesson, bf16, tmp_path, monkeypatch):
    seen, rates, make = [], [], train_ase_mini.make_optimizer
    monkeypatch.setattr(
        train_ase_mini,
        "make_optimizer",
        lambda model, rate, **ratios: rates.append(rate) or make(model, rate, **ratios),
    )
    lesson[1].verdict.register_forward_pre_hook(lambda module, args: seen.append(torch.is_autocast_enabled("cpu")))
    rate = 1e-5 if bf16 else None
    args = SimpleNamespace(work=tmp_path, samples=4, batch_size=2, minutes=1, seed=0, bf16=bf16, learning_rate=rate)
    train_ase_mini.train_stage("whole", lesson[1], args)
    assert seen == [bf16] * 2 and rates == [rate or train_ase_mini.LEARNING_RATES["whole"]]


def test_batches_are_of_texts_of_a_length_and_hold_each_row_as_often():
    lengths = torch.arange(1000) % 97
    batches = train_ase_mini.draw_batches(lengths, 250, 8, seed=0)
    assert len(batches) == 250 and torch.cat(batches).bincount().eq(2).all()
    assert np.mean([lengths[batch].float().std() for batch in batches]) < 3


def test_pictures_that_are_not_there_are_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="--stage pictures"):
        train_ase_mini.Pool(tmp_path, "validation", torch.device("cpu"))


def test_thresholds_are_set_where_few_alarms_are_raised(monkeypatch):
    """Logits of a head that is never half sure: its bias moves up until most faults are found."""
    truth = torch.tensor([1] * 20 + [0] * 180, dtype=torch.int8).unsqueeze(1)
    logits = torch.linspace(-3, -1, 200).flip(0).unsqueeze(1)  # faults first
    head = torch.nn.Linear(1, 1)
    torch.nn.init.zeros_(head.bias)
    model = SimpleNamespace(model=SimpleNamespace(iasm=SimpleNamespace(aspect_head=head)))
    monkeypatch.setattr(train_ase_mini, "find", lambda model, pool: SimpleNamespace(aspect_logits=logits))
    train_ase_mini.calibrate(model, SimpleNamespace(columns={"aspects": truth}))
    said = (logits + head.bias > 0).squeeze(1)
    assert said[:20].all() and not said[20:].any()


def test_fault_rates_against_hand_counts():
    absent = dict.fromkeys(FAULTS, 0.0)
    labels = [absent | {"noisy": 1.0}, absent | {"noisy": 1.0}, absent, absent | {"noisy": -1.0}]
    recall, alarms, count = evaluate_ase_mini.fault_rates(
        ["The sky is grainy.", "A calm view.", "It is noisy.", "Noisy."], labels
    )["noise"]
    assert (recall, alarms, count) == (0.5, 1.0, 2)


def test_saliency_scores_against_slow_definitions():
    rng = np.random.default_rng(0)
    saliency, mask = rng.random((8, 8)), (rng.random((8, 8)) > 0.7).astype(np.float32)
    inside, outside = saliency[mask > 0.5], saliency[mask <= 0.5]
    area = np.mean([[1.0 if a > b else 0.5 if a == b else 0.0 for b in outside] for a in inside])
    scores = evaluate_ase_mini.saliency_scores([saliency], [mask])
    assert scores["AUC"] == pytest.approx(area)
    assert scores["NSS"] == pytest.approx(((saliency - saliency.mean()) / saliency.std())[mask > 0.5].mean(), rel=1e-5)
    assert scores["CC"] == pytest.approx(np.corrcoef(saliency.ravel(), mask.ravel())[0, 1])


def test_alarms_on_pictures_without_a_fault_are_counted_apart():
    fine = dict.fromkeys(FAULTS, 0.0)
    labels = [fine, fine | {"subject_centred": 1.0}, fine | {"underexposed": 1.0}]
    captions = ["The picture is underexposed.", "The subject is centred.", "The tones are harsh."]
    share, pictures = alarms_without_faults(captions, labels)
    assert pictures == 2  # exposure is called wrong in one of two, and seven more aspects in none
    assert share == pytest.approx(0.5 / 8)
    assert fault_rates(captions, labels)["contrast"][1] == pytest.approx(1 / 3)
