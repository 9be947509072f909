"""`examples/finetune.py --stage module`: the encoder runs once, then the saliency module learns alone."""

from pathlib import Path

import aic_data
import datasets
import module_stage
import pytest
import torch
from finetuning import run, write_base, write_checkpoint, write_rated
from huggingface_hub import ModelCard
from module_stage import collate as collate_inputs
from transformers import TrainingArguments

from ase_mllm import ASEDataCollator, ASEForConditionalGeneration, ASEProcessor


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def rated(tmp_path_factory) -> Path:
    return write_rated(tmp_path_factory.mktemp("rated"))


def test_stage_module_trains_the_module_alone_as_its_encoder_would_feed_it(checkpoint, rated, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(module_stage, "collate", lambda rows: seen.append(len(rows)) or collate_inputs(rows))
    out = run(checkpoint, rated, tmp_path / "out", stage="module", num_train_epochs=2, per_device_train_batch_size=3)
    assert sum(seen) == 2 * 6 + 2 * 3  # once a photograph, not once a caption
    assert not (out / "inputs").exists()
    before = ASEForConditionalGeneration.from_pretrained(checkpoint).state_dict()
    model = ASEForConditionalGeneration.from_pretrained(out)
    assert model.config.iasm_config.encoder_layers
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert all(name.startswith("model.iasm.") for name in moved)
    assert {
        "model.iasm.map_head.0.weight",
        "model.iasm.score_head.weight",
        "model.iasm.encoder_norms.0.weight",
    } <= moved
    assert ASEProcessor.from_pretrained(out) and ModelCard.load(out / "README.md").data.eval_results


def test_of_the_rows_of_a_photograph_the_one_with_targets_is_taken():
    """One data set has its captions, another its scores."""
    columns = {
        "image_id": ["a", "b", "a", "a", "b"],
        "score": [None, None, [0.5, 0.5], [1.0, 0.0], None],
        "aspect_labels": [None, None, None, None, None],
        "saliency": [None, None, None, None, [[1.0]]],
    }
    found = module_stage.first_rows(datasets.Dataset.from_dict(columns))
    assert found["score"] == [[0.5, 0.5], None] and found["saliency"] == [None, [[1.0]]]
    assert found["image_id"] == ["a", "b"]


def test_kept_inputs_train_as_the_whole_model_does(base, rated, tmp_path):
    """The loss of the kept batch is that of the whole model, up to half precision."""
    model, processor = (
        ASEForConditionalGeneration.from_mllm_pretrained(base).eval(),
        ASEProcessor.from_pretrained(base),
    )
    splits, _ = aic_data.load(str(rated))
    rows = module_stage.first_rows(aic_data.training_rows(splits["train"], processor))
    args = TrainingArguments(output_dir=str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none")
    collator = ASEDataCollator(processor)
    module_stage.keep_inputs(model, rows, collator, args, tmp_path / "kept")
    kept = module_stage.KeptInputs(tmp_path / "kept")
    assert len(kept) == len(rows) == 6
    batch = module_stage.collate([kept[i] for i in range(6)])
    assert batch["encoder_states"][0].shape[0] == 6 and batch["encoder_states"][0].ndim == 4
    with torch.no_grad():
        whole = model(**collator([rows[i] for i in range(6)]))
        alone = model.model.iasm(**batch)
    for name in ("score_loss", "saliency_loss"):
        torch.testing.assert_close(alone[name], whole[name], rtol=2e-3, atol=1e-4)
