"""The bundled model: what the folder holds, and that training and evaluation run end to end, small."""

import json
import sys
from pathlib import Path

import evaluate_ase_mini
import numpy as np
import pytest
import train_ase_mini
from common import critique
from critique_captions import FAULTS
from huggingface_hub import ModelCard
from PIL import Image, ImageEnhance
from transformers import AutoModelForImageTextToText, AutoProcessor


ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "examples" / "ase-mini"


def test_folder_is_small_and_its_code_is_the_roots():
    assert sum(path.stat().st_size for path in BUNDLE.iterdir()) <= 25_000_000
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


@pytest.mark.slow
def test_training_and_evaluation_run_small(tmp_path, monkeypatch, critique_sources):
    for script in (train_ase_mini, evaluate_ase_mini):
        monkeypatch.setattr(script, "load_sources", lambda split, folder: critique_sources[split])
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    arguments = f"--samples 4 --batch-size 2 --vocabulary-samples 8 --workers 0 --work {tmp_path / 'work'} --out {out}"
    monkeypatch.setattr(sys, "argv", ["train_ase_mini.py", *arguments.split()])
    train_ase_mini.main()
    stages = {path.stem for path in (tmp_path / "work").glob("*.json")}
    assert stages == set(train_ase_mini.STAGES)
    (out / "README.md").write_text((BUNDLE / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    arguments = f"--model {out} --samples 4 --batch-size 2 --json {figures}"
    monkeypatch.setattr(sys, "argv", ["evaluate_ase_mini.py", *arguments.split()])
    evaluate_ase_mini.main()
    measured = json.loads(figures.read_text())["from the least strength up"]
    assert measured["pictures"] == 4
    card = ModelCard.load(out / "README.md")
    metrics = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert metrics["CIDEr"] == round(measured["text"]["CIDEr"], 4)


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
