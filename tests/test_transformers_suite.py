"""What the model tests of transformers check, the other files here did not; `transformers_suite.py` runs them all."""

import copy
import pickle

import pytest
import torch
from conftest import graft, tiny_base, tiny_model
from torch.utils._pytree import tree_map_only
from transformers.exporters import DynamoConfig, DynamoExporter
from transformers.exporters.utils import decompose_for_generation
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

from ase_mllm import ASEConfig, ASEForConditionalGeneration, ASEModel, ImageAestheticSaliencyModule


GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


# Generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_beams", [1, 2])
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_are_written_from_as_ids_are(num_beams, with_ids, model, inputs):
    expected = model.generate(**inputs, **GREEDY, num_beams=num_beams)
    input_ids = inputs.pop("input_ids")
    given = {"input_ids": input_ids} if with_ids else {}
    embeddings = model.get_input_embeddings()(input_ids)
    result = model.generate(**given, **inputs, inputs_embeds=embeddings, **GREEDY, num_beams=num_beams)
    # without the ids only what is written is returned
    assert torch.equal(result, expected if with_ids else expected[:, input_ids.shape[1] :])


# Image features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copied",
    [
        lambda features: tree_map_only(torch.Tensor, torch.clone, features),
        copy.copy,
        copy.deepcopy,
        lambda features: pickle.loads(pickle.dumps(features)),
    ],
    ids=["pytree", "copy", "deepcopy", "pickle"],
)
def test_image_features_can_be_taken_apart_and_put_together(copied, model, inputs):
    features = model.get_image_features(inputs["pixel_values"])
    expected = model.generate(**inputs, **GREEDY)
    again = copied(features)
    assert type(again) is type(features) and list(again) == list(features)
    assert isinstance(again, type(tiny_base().get_image_features(inputs["pixel_values"])))
    for name in ("saliency_maps", "score_logits", "aspect_logits"):
        assert torch.equal(again[name], features[name])
    del inputs["pixel_values"]
    assert torch.equal(model.generate(**inputs, mm_encoder_outputs={"image": again}, **GREEDY), expected)


# Parts and names --------------------------------------------------------------------------------------------------


def test_the_head_is_an_attribute():
    base = tiny_base()
    model = graft(base)
    assert model.lm_head is model.get_output_embeddings() is base.lm_head
    assert not [name for name, _ in model.named_parameters() if name.startswith("lm_head")]


def test_the_tables_of_names_hold_our_classes():
    """Much of transformers looks classes up by name, not by configuration."""
    assert MODEL_MAPPING_NAMES["ase"] == ASEModel.__name__
    assert MODEL_MAPPING_NAMES["ase_iasm"] == ImageAestheticSaliencyModule.__name__
    assert MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["ase"] == ASEForConditionalGeneration.__name__


def test_export_finds_the_parts_that_it_finds_in_the_base(inputs):
    base = tiny_base()
    expected, parts = decompose_for_generation(base, inputs), decompose_for_generation(graft(base), inputs)
    assert set(parts) == set(expected) == {"language_model", "lm_head", "decode"}
    for name in ("language_model", "lm_head"):
        assert parts[name][0] is expected[name][0]


@pytest.mark.slow
def test_an_exported_encoder_fuses(model, inputs):
    """Its hooks are in the exported graph."""
    encoder, pixels = model.get_encoder("image"), {"pixel_values": inputs["pixel_values"]}
    exported = DynamoExporter().export(encoder, pixels, DynamoConfig()).program.module()(**pixels)
    torch.testing.assert_close(exported.last_hidden_state, encoder(**pixels).last_hidden_state)
    unfused = tiny_base().get_encoder("image")(**pixels).last_hidden_state
    assert (exported.last_hidden_state - unfused).abs().max() > 1e-2


# Losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_labels_shifted_before_replace_the_labels(weighted, model, inputs):
    """As parallel training gives them, which cuts sequences over devices."""
    labels = inputs["input_ids"]
    weights = {"caption_weights": torch.tensor([0.5, 2.0])} if weighted else {}
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(**inputs, labels=labels, **weights).loss
    result = model(**inputs, labels=labels.flip(0), shift_labels=shifted, **weights).loss
    torch.testing.assert_close(result, expected)
    other = model(**inputs, labels=labels, shift_labels=shifted.flip(0), **weights).loss
    assert (other - expected).abs() > 1e-3


# Loading ----------------------------------------------------------------------------------------------------------


def test_weights_of_another_shape_start_afresh_if_asked_to(tmp_path, inputs):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    config = ASEConfig.from_pretrained(tmp_path)
    config.iasm_config.aspect_names, config.iasm_config.num_aspects = None, 5
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        ASEForConditionalGeneration.from_pretrained(tmp_path, config=config)
    loaded, report = ASEForConditionalGeneration.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    names = {f"model.iasm.aspect_head.{name}" for name in ("weight", "bias")}
    assert {name for name, *_ in report["mismatched_keys"]} == names
    assert loaded(**inputs).aspect_logits.shape == (2, 5)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
