"""The saliency module reads states of the base's own encoder, each at the place that it stands for, or says why not."""

import copy
import json

import pytest
import torch
from conftest import FUSION, IASM, graft, make_inputs, open_gates, tiny_base, tiny_config
from families import FAMILIES, PATCH
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForImageTextToText

from ase_mllm import ASEConfig, ASEForConditionalGeneration, IASMConfig, ImageAestheticSaliencyModule
from ase_mllm.image_encoders import find_image_encoder, probe_places
from ase_mllm.modeling_iasm import LinearProbe


# what these encoders do with their states: padding between tiles, windows, stages of different grids
NOT_READ = {"mllama": "tiles with padding", "qwen2_5_vl": "not in the order of its patches", "florence2": "image_size"}


def states_read(model: ASEForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> list:
    """What the saliency module got of each encoder layer that it reads: a list of `(width, rows, columns)`."""
    seen = []
    hook = model.model.iasm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return [list(states) for states in seen[0]]


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_read_where_the_picture_changes(family):
    """The picture is changed before the family's processor makes inputs of it, and the states move there."""
    torch.manual_seed(0)
    model = graft(AutoModelForImageTextToText.from_config(FAMILIES[family].config()).eval(), fusion_layers=None)
    if family in NOT_READ:
        assert model.config.iasm_config.encoder_layers == []
        return
    assert model.config.iasm_config.encoder_layers == [0]
    images = [torch.randn(3, *size) for size in FAMILIES[family].sizes]
    states = states_read(model, FAMILIES[family].inputs(images))[0]
    grid = states[0].shape[1:]
    tiles = len(states) > len(images)  # the first state is of an overview or of the first tile
    height, width = (32, 32) if tiles else images[0].shape[1:]
    side = height // grid[0]
    assert side == width // grid[1] and side in (PATCH, 2 * PATCH)
    if tiles and family in ("llava_next", "llava_onevision"):
        pytest.skip("its first picture is an overview, in which a patch of the photograph is smaller than one of it")
    for row, column in ((0, 1), (1, 0), (grid[0] - 1, grid[1] - 1)):
        changed = [images[0].clone(), images[1]]
        changed[0][:, row * side : (row + 1) * side, column * side : (column + 1) * side] += 3
        moved = states_read(model, FAMILIES[family].inputs(changed))[0]
        distances = [(after - before).abs().sum(0) for after, before in zip(moved, states)]
        assert distances[0].argmax() == row * grid[1] + column
        if not tiles:
            assert distances[1].max() == 0  # the other photograph


@pytest.mark.parametrize("family", NOT_READ)
def test_where_places_are_not_known_it_says_so(family):
    base = AutoModelForImageTextToText.from_config(FAMILIES[family].config())
    prefix, reason = probe_places(find_image_encoder(base), 0)
    assert prefix is None and NOT_READ[family] in reason
    with pytest.raises(ValueError, match=rf"cannot read .*`encoder_layers` \[0\]: .*{NOT_READ[family]}"):
        graft(base, iasm_config={**IASM, "encoder_layers": [0]}, fusion_layers=None)


def test_states_in_another_order_are_found_out():
    base = tiny_base()
    base.model.vision_tower.embeddings.register_forward_hook(
        lambda module, args, output: output.flip(1)
    )  # the class token last, rows turned
    prefix, reason = probe_places(find_image_encoder(base), 0)
    assert prefix is None and "not in the order" in reason


def test_probing_leaves_no_trace():
    base = tiny_base().train()
    before, state = copy.deepcopy(base.state_dict()), torch.get_rng_state()
    probe_places(find_image_encoder(base), 1)
    assert base.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.model.vision_tower.modules())


# Options --------------------------------------------------------------------------------------------------------------


def test_the_default_is_half_depth_and_fusion_follows():
    config = tiny_config(vision_feature_layer=-1)
    config.vision_config.num_hidden_layers = 12
    model = ASEForConditionalGeneration(ASEConfig(mllm_config=config, iasm_config=IASM))
    assert model.config.iasm_config.encoder_layers == [5]
    assert (
        model.config.iasm_config.encoder_hidden_sizes == [32] and model.config.iasm_config.encoder_prefix_length == 1
    )
    assert model.config.fusion_layers == [6, 8, 9, 11]


def test_states_of_several_layers_beside_a_backbone(backbone_config):
    iasm = {**IASM, "encoder_layers": [1, 0], "backbone_config": backbone_config}
    model = graft(tiny_base(), iasm_config=iasm, fusion_layers=[1])
    assert model.config.iasm_config.encoder_layers == [0, 1]
    inputs = make_inputs()
    expected = tiny_base().model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    for states, hidden in zip(states_read(model, inputs), expected[1:]):
        assert torch.equal(torch.stack(states), hidden[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
    assert len(model.model.iasm.map_pyramid.laterals) == 2 + 4


@pytest.mark.parametrize("train_encoder", [True, False])
def test_whether_its_losses_reach_the_encoder(train_encoder):
    model = graft(tiny_base(), iasm_config={**IASM, "train_encoder": train_encoder})
    model(**make_inputs(), saliency_targets=torch.rand(2, 8, 8)).loss.backward()
    weight = find_image_encoder(model.model.mllm).layers[0].mlp.fc1.weight
    assert (weight.grad is not None and bool(weight.grad.abs().sum() > 0)) == train_encoder


def test_nothing_below_a_frozen_tower_is_computed_backward():
    model = open_gates(graft(tiny_base()))
    model.model.vision_tower.requires_grad_(False)
    seen = []
    model.model.iasm.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_states"][0].requires_grad), with_kwargs=True
    )
    model(**make_inputs(), labels=make_inputs()["input_ids"]).loss.backward()
    assert seen == [False] and all(p.grad is not None for p in model.model.iasm.encoder_norms.parameters())


def test_with_neither_encoder_nor_backbone_it_is_photometry_alone():
    model = graft(tiny_base(), iasm_config={**IASM, "encoder_layers": []})
    iasm = model.model.iasm
    assert iasm.backbone is None and not iasm.encoder_norms and not iasm.pyramid.laterals
    assert model(**make_inputs()).saliency_maps.shape == (2, 8, 8)


@pytest.mark.parametrize(
    ("layers", "fusion", "message"),
    [
        ([0, 0], None, r"different indices counted from 0, got \[0, 0\]"),
        ([-1], None, r"different indices counted from 0, got \[-1\]"),
        ([2], None, r"\[2\] reaches beyond layer 1"),
        ([1], [0], r"`fusion_layers` \[0\] begins before layer 1"),
    ],
)
def test_layers_that_cannot_be(layers, fusion, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        graft(tiny_base(), iasm_config={**IASM, "encoder_layers": layers}, fusion_layers=fusion)


def test_the_module_alone_wants_the_states_that_it_was_made_for():
    iasm = graft(tiny_base()).model.iasm
    with pytest.raises(ValueError, match=r"reads 1 layers of an image encoder \(`encoder_layers` \[0\]\), got .* 0"):
        iasm(make_inputs()["pixel_values"])


# Saved models -----------------------------------------------------------------------------------------------------------


def test_a_saved_model_is_not_probed_again(tmp_path, monkeypatch):
    model = open_gates(graft(tiny_base()))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["iasm_config"]
    assert (saved["encoder_layers"], saved["encoder_hidden_sizes"], saved["encoder_prefix_length"]) == ([0], [32], 1)
    monkeypatch.setattr("ase_mllm.image_encoders.probe_places", None)
    loaded = ASEForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded(**make_inputs()).logits, model(**make_inputs()).logits)


def test_a_configuration_of_a_backbone_alone_stays_so(backbone_config):
    """As checkpoints have it that were saved before the module read the encoder."""
    assert IASMConfig(backbone_config=backbone_config).encoder_layers == []
    model = ASEForConditionalGeneration(
        ASEConfig(mllm_config=tiny_config(), iasm_config={**IASM, "backbone_config": backbone_config}, **FUSION)
    )
    assert not model.model.iasm.encoder_norms and model.config.fusion_layers == [0, 1]


def test_the_module_is_one_without_a_model():
    """Of states of any size at any stride: they are laid over the picture."""
    config = IASMConfig(**IASM, encoder_layers=[3], encoder_hidden_sizes=[16])
    iasm, generator = ImageAestheticSaliencyModule(config).eval(), torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 64, 96, generator=generator)
    states = torch.randn(2, 16, 5, 7, generator=generator)
    together = iasm(pixels, encoder_states=[states])
    alone = iasm(list(pixels), encoder_states=[list(states)])
    torch.testing.assert_close(alone.saliency_maps, together.saliency_maps)
    other = iasm(pixels, encoder_states=[states.flip(-1)])
    assert not torch.equal(other.saliency_maps, together.saliency_maps)


# The linear probe ------------------------------------------------------------------------------------------------------


def test_the_probes_tokens_are_linear_in_the_mean_and_in_the_layout():
    probe, generator = LinearProbe([16, 8], 32), torch.Generator().manual_seed(0)
    coarse, fine = (torch.randn(2, *shape, generator=generator) for shape in ((16, 5, 7), (8, 12, 12)))
    tokens = probe([coarse, fine])
    assert tokens.shape == (2, 2, 32)
    halves = [probe([coarse, 0 * fine]), probe([0 * coarse, fine])]
    torch.testing.assert_close(sum(halves) - probe([0 * coarse, 0 * fine]), tokens, atol=1e-5, rtol=1e-5)
    turned = probe([coarse, fine.flip(-1)])
    torch.testing.assert_close(turned[:, 0], tokens[:, 0])
    assert not torch.allclose(turned[:, 1], tokens[:, 1])
    within_a_place = fine.unflatten(-1, (6, 2)).flip(-1).flatten(-2)
    torch.testing.assert_close(probe([coarse, within_a_place]), tokens)


def test_probe_tokens_stand_between_the_queries_and_the_verdict():
    base, inputs = tiny_base(), make_inputs()
    expected = base(**inputs).logits
    model = graft(base, iasm_config={**IASM, "probe_tokens": True, "verdict_token": True})
    assert torch.equal(model(**inputs).logits, expected)
    logits, iasm = open_gates(model)(**inputs).logits, model.model.iasm
    states = [torch.randn(2, 32, 4, 4, generator=torch.Generator().manual_seed(0))]
    seen = iasm(inputs["pixel_values"], encoder_states=states)
    assert seen.saliency_tokens.shape[1] == IASM["num_queries"] + 3
    torch.testing.assert_close(
        seen.saliency_tokens[:, -1], iasm.verdict(torch.where(seen.aspect_logits > 0, 1.0, -1.0))
    )
    with torch.no_grad():
        iasm.probe.layout.weight.mul_(5)
    other = iasm(inputs["pixel_values"], encoder_states=states)
    assert torch.equal(other.saliency_maps, seen.saliency_maps)
    assert not torch.allclose(other.aspect_logits, seen.aspect_logits)
    assert not torch.allclose(model(**inputs).logits, logits)


def test_without_an_encoder_to_read_there_is_no_probe():
    with pytest.raises(ValueError, match="`probe_tokens` are made of an encoder's states"):
        graft(tiny_base(), iasm_config={**IASM, "probe_tokens": True, "encoder_layers": []})
    assert graft(tiny_base()).model.iasm.probe is None
