"""Configurations: what is refused and in which words, what each option does, what a round trip and a graft keep."""

import copy
import json

import pytest
import torch
from conftest import FUSION, IASM, make_inputs, open_gates, tiny_base, tiny_config, tiny_iasm, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from ase_mllm import ASEConfig, ASEForConditionalGeneration, IASMConfig


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"image_size": 100}, "`image_size` must be a positive multiple of 32, got 100"),
        ({"image_size": 0}, "`image_size` must be a positive multiple of 32, got 0"),
        ({"hidden_size": 10, "num_attention_heads": 3}, r"`hidden_size` \(10\) .* `num_attention_heads` \(3\)"),
        ({"hidden_size": 0}, "'hidden_size'[^']*greater or equal to 4, got 0"),
        ({"num_attention_heads": 0}, "'num_attention_heads'[^']*greater or equal to 1, got 0"),
        ({"num_hidden_layers": 0}, "'num_hidden_layers'[^']*greater or equal to 1, got 0"),
        ({"num_queries": 0}, "'num_queries'[^']*greater or equal to 1, got 0"),
        ({"num_aspects": -2}, "'num_aspects'[^']*greater or equal to 0, got -2"),
        ({"num_aspects": 2, "aspect_names": ["flat"]}, "`aspect_names` has 1 names for `num_aspects=2`"),
        ({"image_mean": [0.5]}, r"three numbers each.*\[0.5\]"),
        ({"image_std": [0.5, 0.0, 0.5]}, r"above 0.*\[0.5, 0.0, 0.5\]"),
        ({"score_loss_weight": -0.5}, "'score_loss_weight'[^']*greater or equal to 0, got -0.5"),
        ({"saliency_loss_weight": -0.5}, "'saliency_loss_weight'[^']*greater or equal to 0, got -0.5"),
        ({"aspect_loss_weight": -0.5}, "'aspect_loss_weight'[^']*greater or equal to 0, got -0.5"),
        ({"hidden_size": "32"}, "'hidden_size' expected int, got str"),
        ({"image_mean": [0.5, float("nan"), 0.5]}, r"all finite.*nan"),
        ({"image_std": [float("inf")] * 3}, r"all finite.*inf"),
        ({"score_loss_weight": float("nan")}, "'score_loss_weight'[^']*greater or equal to 0, got nan"),
        ({"aspect_names": "light"}, "'aspect_names'"),
        ({"verdict_token": True}, "`verdict_token` needs an aspect head: `num_aspects` is 0"),
    ],
)
def test_iasm_config_refuses_with_the_numbers(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        IASMConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion_hidden_size": 10, "fusion_num_attention_heads": 4}, r"\(10\) must be a multiple of .* \(4\)"),
        ({"fusion_hidden_size": 0}, "'fusion_hidden_size'[^']*greater or equal to 1, got 0"),
        ({"fusion_num_attention_heads": 0}, "'fusion_num_attention_heads'[^']*greater or equal to 1, got 0"),
        ({"fusion_layers": []}, "`fusion_layers` is empty"),
        ({"fusion_layers": [-1, 2]}, r"counted from 0, got \[-1, 2\]"),
        ({"fusion_layers": [1, 1]}, r"different indices .* got \[1, 1\]"),
        ({"mllm_config": 3}, "'mllm_config'.*expected dict, got int"),
    ],
)
def test_ase_config_refuses_with_the_numbers(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ASEConfig(**fields)


# What each option does --------------------------------------------------------------------------------------------


def test_backbone_config_chooses_the_backbone():
    pixels = make_inputs()["pixel_values"]
    resnet = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
    iasm = tiny_iasm(backbone_config={**resnet, "out_features": ["stage2", "stage4"]})
    assert type(iasm.backbone).__name__ == "ResNetBackbone"
    assert len(iasm.pyramid.laterals) == 2
    assert iasm(pixels).saliency_maps.shape == (2, 8, 8)
    assert tiny_iasm().backbone is None


@pytest.mark.parametrize("image_size", [32, 96])
def test_image_size_sets_the_resolution_of_the_map(image_size):
    outputs = tiny_iasm(image_size=image_size)(make_inputs()["pixel_values"])
    assert outputs.saliency_maps.shape == (2, image_size // 8, image_size // 8)


def test_hidden_size_and_num_queries_shape_the_tokens():
    pixels = make_inputs()["pixel_values"]
    assert tiny_iasm(hidden_size=16, num_queries=3)(pixels).saliency_tokens.shape == (2, 3, 16)
    assert tiny_iasm(hidden_size=32, num_queries=1)(pixels).saliency_tokens.shape == (2, 1, 32)


def test_num_hidden_layers_are_run():
    pixels = make_inputs()["pixel_values"]
    two, one = tiny_iasm(num_hidden_layers=2), tiny_iasm(num_hidden_layers=1)
    one.load_state_dict(two.state_dict(), strict=False)  # all but the second layer
    assert len(two.layers) == 2
    assert not torch.allclose(two(pixels).saliency_tokens, one(pixels).saliency_tokens, atol=1e-3)


@pytest.mark.parametrize("config_name", ["iasm", "fusion"])
def test_attention_heads_split_the_width(config_name):
    """The same weights with another number of heads are another function."""
    inputs = make_inputs()
    one, four = (
        ASEForConditionalGeneration.from_mllm_pretrained(
            tiny_base(),
            iasm_config={**IASM, "num_attention_heads": heads if config_name == "iasm" else 2},
            fusion_hidden_size=16,
            fusion_num_attention_heads=heads if config_name == "fusion" else 2,
        )
        for heads in (1, 4)
    )
    four.load_state_dict(one.state_dict())
    for model in (open_gates(one), open_gates(four)):
        if config_name == "iasm":  # far from uniform attention
            model.model.iasm.query_attention.q_proj.weight.data.mul_(10)
    assert not torch.equal(one(**inputs).logits, four(**inputs).logits)


def test_aspects_add_a_head_and_names_give_their_number():
    pixels = make_inputs()["pixel_values"]
    assert tiny_iasm(aspect_names=None, num_aspects=0)(pixels).aspect_logits is None
    assert tiny_iasm(aspect_names=None, num_aspects=5)(pixels).aspect_logits.shape == (2, 5)
    assert IASMConfig(aspect_names=["flat", "noisy"]).num_aspects == 2
    assert tiny_iasm(aspect_names=["flat", "noisy"])(pixels).aspect_logits.shape == (2, 2)


def test_a_verdict_token_says_what_the_aspect_head_decided():
    pixels = make_inputs()["pixel_values"]
    iasm = tiny_iasm(verdict_token=True)
    outputs = iasm(pixels)
    assert outputs.saliency_tokens.shape[1] == iasm.config.num_queries + 1
    expected = iasm.verdict(torch.where(outputs.aspect_logits > 0, 1.0, -1.0))
    assert torch.equal(outputs.saliency_tokens[:, -1], expected)
    with torch.no_grad():
        iasm.aspect_head.bias += torch.where(outputs.aspect_logits[0] > 0, -20.0, 20.0)
    turned_over = iasm(pixels)
    assert torch.equal(turned_over.saliency_tokens[:, :-1], outputs.saliency_tokens[:, :-1])
    assert not torch.allclose(turned_over.saliency_tokens[0, -1], outputs.saliency_tokens[0, -1])
    assert tiny_iasm().verdict is None


def test_a_model_trains_and_is_saved_with_every_further_token(tmp_path):
    iasm = {**IASM, "verdict_token": True, "fine_statistics": True, "probe_tokens": True}
    base, inputs = tiny_base(), make_inputs()
    expected = base(**inputs).logits
    model = ASEForConditionalGeneration.from_mllm_pretrained(base, iasm_config=iasm)
    assert torch.equal(model(**inputs).logits, expected)
    open_gates(model)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for added in (model.model.iasm.verdict, model.model.iasm.probe.mean, model.model.iasm.probe.layout):
        assert added.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path)
    again = ASEForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**inputs).logits, model.eval()(**inputs).logits)


def test_no_path_of_a_part_is_saved(tmp_path):
    base = tiny_base()
    base.config.vision_config.name_or_path = "somebody/folder"
    ASEForConditionalGeneration.from_mllm_pretrained(base, iasm_config=IASM).save_pretrained(tmp_path)
    assert "somebody" not in (tmp_path / "config.json").read_text(encoding="utf-8")


def test_fine_statistics_reach_the_tokens():
    pixels = make_inputs()["pixel_values"]
    iasm = tiny_iasm(fine_statistics=True)
    width = tiny_iasm().statistics[0].in_features
    assert iasm.statistics[0].in_features == width + 122
    before = iasm(pixels).saliency_tokens
    with torch.no_grad():
        iasm.statistics[0].weight[:, width:] = 0
    assert not torch.allclose(iasm(pixels).saliency_tokens, before)


def test_initializer_range_is_the_spread_of_queries_and_token_types():
    for deviation in (0.02, 0.5):
        iasm = tiny_iasm(num_queries=60, initializer_range=deviation)
        for parameter in (iasm.queries, iasm.token_types):
            assert parameter.std().item() == pytest.approx(deviation, rel=0.1)


def test_fusion_layers_choose_where_and_the_choice_is_written_back():
    pixels = make_inputs()["pixel_values"]
    default = tiny_model()
    assert default.config.fusion_layers == [0, 1]  # layer 2 is beyond `vision_feature_layer=-2`
    last = tiny_model(fusion_layers=[1])
    assert [name for name, _ in last.model.fusions.named_children()] == ["1"]
    towers = [tiny_base().model.vision_tower, last.model.vision_tower, default.model.vision_tower]
    states = [tower(pixels, output_hidden_states=True).hidden_states for tower in towers]
    assert torch.equal(states[0][1], states[1][1])  # the output of layer 0
    assert not torch.equal(states[0][2], states[1][2])
    assert not torch.equal(states[0][1], states[2][1])


@pytest.mark.parametrize(
    ("num_layers", "vision_feature_layer", "expected"),
    [(24, -2, [12, 15, 19, 22]), (24, -1, [13, 16, 20, 23]), (3, -2, [0, 1]), (3, [-3, 2], [0, 1]), (8, 3, [0, 1, 2])],
)
def test_default_fusion_layers_end_where_the_language_model_looks(num_layers, vision_feature_layer, expected):
    config = tiny_config(vision_feature_layer=vision_feature_layer)
    config.vision_config.num_hidden_layers = num_layers
    ase_config = ASEConfig(mllm_config=config, iasm_config=IASM, **FUSION)
    ASEForConditionalGeneration(ase_config)
    assert ase_config.fusion_layers == expected


def test_fusion_hidden_size_is_the_inner_width():
    model = ASEForConditionalGeneration.from_mllm_pretrained(
        tiny_base(), iasm_config=IASM, fusion_hidden_size=24, fusion_num_attention_heads=3
    )
    fusion = model.model.fusions.get_submodule("0")
    assert fusion.attention.q_proj.weight.shape == (24, 32)
    assert fusion.attention.head_dim == 8


def test_a_part_of_no_type_is_refused():
    with pytest.raises(ValueError, match=r"`backbone_config` has no `model_type` .* names \['depths'\]"):
        IASMConfig(backbone_config={"depths": [1]})
    with pytest.raises(ValueError, match=r"`mllm_config` has no `model_type` .* names \['hidden_size'\]"):
        ASEConfig(mllm_config={"hidden_size": 8})


def test_whole_numbers_are_numbers():
    """As published processors and people write them."""
    config = IASMConfig(score_loss_weight=2, image_mean=[0, 0, 0], image_std=[1, 1, 1])
    pixels = torch.rand(1, 3, 64, 64)
    iasm = tiny_iasm(image_mean=[0, 0, 0], image_std=[1, 1, 1])
    assert config.score_loss_weight == 2 and torch.equal(iasm.to_rgb(pixels), pixels)


def test_a_file_without_a_base_is_refused(tmp_path):
    ASEConfig(mllm_config=tiny_config(), iasm_config=IASM, **FUSION).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    for empty in ({}, None):
        path.write_text(json.dumps({**json.loads(path.read_text()), "mllm_config": empty}))
        with pytest.raises(ValueError, match="names no base model: its `mllm_config` is missing or empty"):
            AutoConfig.from_pretrained(tmp_path)


def test_files_name_no_place_of_this_machine(tmp_path):
    """Neither where the base was loaded from nor what it has by default."""
    tiny_base().save_pretrained(tmp_path / "base")
    model = ASEForConditionalGeneration.from_mllm_pretrained(tmp_path / "base", iasm_config=IASM, **FUSION)
    model.save_pretrained(tmp_path / "ase")
    saved = json.loads((tmp_path / "ase" / "config.json").read_text())
    assert str(tmp_path) not in json.dumps(saved) and "text_config" not in saved
    base = json.loads((tmp_path / "base" / "config.json").read_text())
    assert saved["mllm_config"].keys() == base.keys() - {"transformers_version"}


def test_what_is_ignored_by_evaluation_is_the_base_s_too():
    base = tiny_config()
    base.keys_to_ignore_at_inference = ["past_key_values", "router_logits"]
    ignored = ASEConfig(mllm_config=base, iasm_config=IASM, **FUSION).keys_to_ignore_at_inference
    assert {"router_logits", "cache", "image_outputs", "saliency_maps"} <= set(ignored)


# Composite ----------------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    config = ASEConfig(mllm_config=tiny_config("siglip"), iasm_config={**IASM, "initializer_range": 0.5}, **FUSION)
    config.fusion_layers = [1]
    config.save_pretrained(tmp_path)
    for loaded in (ASEConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is ASEConfig
        assert type(loaded.mllm_config) is type(config.mllm_config)
        assert loaded.mllm_config.vision_config.model_type == "siglip_vision_model"
        assert loaded.to_diff_dict() == config.to_diff_dict()
        assert loaded.iasm_config.initializer_range == 0.5
        assert loaded.iasm_config.aspect_names == IASM["aspect_names"]


def test_iasm_config_round_trip(tmp_path):
    config = IASMConfig(**IASM, image_mean=[0.1, 0.2, 0.3])
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is IASMConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


def test_defaults_need_no_argument():
    config = ASEConfig()
    assert config.mllm_config.model_type == "llava"
    assert type(config.iasm_config) is IASMConfig
    assert ASEConfig(mllm_config=tiny_config().to_dict()).mllm_config.vision_config.hidden_size == 32


def test_delegates_to_the_base_config():
    base = tiny_config(tie_word_embeddings=True)
    config = ASEConfig(mllm_config=base, iasm_config=IASM, **FUSION)
    assert config.mllm_config is base
    assert config.get_text_config() is config.text_config is base.text_config
    assert config.get_text_config(decoder=True) is base.text_config
    assert config.vision_config is base.vision_config
    assert config.image_token_id == config.image_token_index == 4
    assert config.tie_word_embeddings is True
    assert ASEConfig(mllm_config=tiny_config()).tie_word_embeddings is False
    base.video_token_id = 7
    assert config.video_token_id == 7


def test_the_base_model_holds_the_very_config_object():
    model = tiny_model()
    assert model.config.mllm_config is model.model.mllm.config
    assert model.config.mllm_config.vision_config is model.model.vision_tower.config
    base = tiny_base()
    built = ASEForConditionalGeneration(ASEConfig(mllm_config=base.config.to_dict(), iasm_config=IASM, **FUSION), base)
    assert built.config.mllm_config is base.config
    loaded = ASEForConditionalGeneration(copy.deepcopy(model.config))
    assert loaded.config.mllm_config is loaded.model.mllm.config
    assert loaded.config.iasm_config is loaded.model.iasm.config
