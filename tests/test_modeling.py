"""The graft: exact equality with its base, what opens with the gates, and that nothing leaks between calls."""

import copy
import threading
from functools import partial

import pytest
import torch
import transformers
from conftest import (
    FUSION,
    IASM,
    IMAGE_TOKENS,
    assert_nothing_is_left,
    edit_checkpoint,
    graft,
    is_added,
    make_inputs,
    open_gates,
    tiny_base,
    tiny_config,
    tiny_model,
    tiny_processor,
)
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
)

from ase_mllm import ASEConfig, ASEForConditionalGeneration, IASMConfig


GENERATIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
}


def generate(model, inputs, **kwargs) -> torch.Tensor:
    torch.manual_seed(1)
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **kwargs)


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# A fresh graft is its base, bit for bit ---------------------------------------------------------------------------


@pytest.mark.parametrize("replaced", [False, True], ids=["as_built", "replaced"])
def test_grafting_leaves_the_base_weights_untouched(replaced):
    base = tiny_base()
    if replaced:  # by a module that transformers does not know to be initialised
        base.model.multi_modal_projector.linear_2 = torch.nn.Linear(32, 32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = graft(base)
    assert model.model.mllm is base
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_saved_base_grafts_by_its_folder(tmp_path):
    inputs = make_inputs()
    base = tiny_base()
    base.generation_config.max_new_tokens = 3
    base.save_pretrained(tmp_path)
    model = graft(str(tmp_path))
    assert torch.equal(logits(model, **inputs), logits(base, **inputs))
    weights = model.model.mllm.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in base.state_dict().items())
    assert model.generate(**inputs).shape[1] == inputs["input_ids"].shape[1] + 3
    assert not model.training


def test_loading_arguments_reach_the_base(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    model = graft(str(tmp_path), dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.dtype == torch.bfloat16
    assert model.config._attn_implementation == model.config.mllm_config._attn_implementation == "eager"
    with pytest.raises(ValueError, match=r"takes no loading arguments, got \['dtype'\]"):
        graft(tiny_base(), dtype=torch.bfloat16)


def test_beside_half_precision_the_saliency_branch_is_in_single():
    """In half it could not be trained: Adam's steps vanish, or end in NaN."""
    inputs = make_inputs()
    inputs["pixel_values"] = inputs["pixel_values"].half()
    base = tiny_base().half()
    expected = logits(base, **inputs)
    model = graft(base)
    assert {parameter.dtype for parameter in model.model.mllm.parameters()} == {torch.float16}
    for part in (model.model.iasm, model.model.fusions):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}
    assert torch.equal(logits(model, **inputs), expected)
    assert not torch.equal(logits(open_gates(model), **inputs), expected)


def test_the_normalisation_is_read_from_the_image_processor(tmp_path):
    tiny_base().save_pretrained(tmp_path)
    assert graft(str(tmp_path)).config.iasm_config.image_mean == IASMConfig().image_mean  # no image processor there
    processor = tiny_processor().base_processor
    processor.image_processor.image_mean, processor.image_processor.image_std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    processor.save_pretrained(tmp_path)
    config = graft(str(tmp_path)).config.iasm_config
    assert (config.image_mean, config.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    named = graft(str(tmp_path), iasm_config={**IASM, "image_mean": [0.9, 0.9, 0.9]}).config.iasm_config
    assert (named.image_mean, named.image_std) == ([0.9, 0.9, 0.9], [0.4, 0.5, 0.6])
    whole = IASMConfig(**IASM)
    config = graft(str(tmp_path), iasm_config=whole).config.iasm_config
    assert (config.image_mean, config.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert whole.image_mean == IASMConfig().image_mean  # the caller's stays as it is
    other = IASMConfig(**IASM, image_mean=[0.9, 0.9, 0.9])
    assert graft(str(tmp_path), iasm_config=other).config.iasm_config.image_mean == [0.9, 0.9, 0.9]
    live = AutoModelForImageTextToText.from_pretrained(tmp_path)
    config = graft(live).config.iasm_config
    assert (config.image_mean, config.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


def test_a_base_without_an_image_processor_is_told(caplog):
    """A grey of the base would be another grey of the module, and nothing would show it."""
    graft(tiny_base())
    assert "CLIP's normalisation" in caplog.text and "it was not loaded from a folder" in caplog.text
    caplog.clear()
    graft(tiny_base(), iasm_config={**IASM, "image_mean": [0.5] * 3, "image_std": [0.5] * 3})
    graft(tiny_base(), iasm_config=IASMConfig(**IASM, image_mean=[0.5] * 3))
    assert not caplog.text


def test_copies_of_data_parallel_are_refused():
    """Of whose hooks and `forward` every copy would have the first one's."""
    with pytest.raises(RuntimeError, match="accelerate launch"):
        tiny_model()._replicate_for_data_parallel()
        for module in tiny_model().modules():
            module._replicate_for_data_parallel()


def test_weights_of_captions_need_captions():
    inputs = make_inputs()
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        tiny_model().train()(**inputs, caption_weights=torch.ones(2))
    assert tiny_model().eval()(**inputs, caption_weights=torch.ones(2)).loss is None


def test_a_graft_keeps_mode_and_generation_config():
    base = tiny_base().train()
    base.generation_config.max_new_tokens = 3
    model = graft(base)
    assert model.training and model.model.fusions.training
    assert model.generation_config is base.generation_config
    assert not graft(tiny_base()).training


# Gates open -------------------------------------------------------------------------------------------------------


def test_samples_with_and_without_images_share_a_batch():
    inputs = make_inputs()
    model = tiny_model()
    text = make_inputs(text_tokens=6 + IMAGE_TOKENS, seed=3)["input_ids"][:1, IMAGE_TOKENS:]
    text = torch.cat([torch.ones(1, 1, dtype=torch.long), text[:, 1:]], dim=1)
    mixed = {
        "input_ids": torch.cat([text, inputs["input_ids"][:1]]),
        "attention_mask": inputs["attention_mask"],
        "pixel_values": inputs["pixel_values"][:1],
    }
    outputs = model(**mixed)
    assert outputs.saliency_maps.shape == (1, 8, 8) and outputs.score_logits.shape == (1, 10)
    alone = [model(input_ids=text).logits, model(**{name: inputs[name][:1] for name in inputs}).logits]
    torch.testing.assert_close(outputs.logits, torch.cat(alone), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**{**mixed, "pixel_values": inputs["pixel_values"]})


def test_several_images_a_sample():
    inputs = make_inputs()
    image = inputs["input_ids"][:, 1 : 1 + IMAGE_TOKENS]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], image], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["pixel_values"] = make_inputs(batch_size=4)["pixel_values"]
    model = tiny_model()
    before = model(**inputs)
    assert before.saliency_maps.shape[0] == 4
    inputs["pixel_values"][1] += 1.0  # the second image of the first sample
    after = model(**inputs)
    assert torch.equal(before.logits[0, : 1 + IMAGE_TOKENS], after.logits[0, : 1 + IMAGE_TOKENS])
    assert not torch.equal(before.logits[0], after.logits[0])
    assert torch.equal(before.logits[1], after.logits[1])


def test_outputs_are_those_of_transformers():
    inputs = make_inputs()
    model = tiny_model()
    outputs = model(**inputs, output_hidden_states=True, output_attentions=False, logits_to_keep=2)
    assert outputs.logits.shape == (2, 2, 99)
    assert len(outputs.hidden_states) == 3
    as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)
    as_dict = model(**inputs, labels=inputs["input_ids"])
    assert torch.equal(as_tuple[0], as_dict.loss) and torch.equal(as_tuple[1], as_dict.logits)
    inner = model.model(**inputs)
    assert inner.last_hidden_state.shape == (2, 23, 32)
    assert torch.equal(inner.saliency_maps, as_dict.saliency_maps)
    assert torch.equal(model.model(**inputs, return_dict=False)[0], inner.last_hidden_state)


# Training ---------------------------------------------------------------------------------------------------------


def full_targets(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = inputs["input_ids"].clone()
    labels[:, : 1 + IMAGE_TOKENS] = -100
    return {
        "labels": labels,
        "score_targets": torch.rand(2, 10, generator=generator),
        "saliency_targets": torch.rand(2, 40, 40, generator=generator),
        "aspect_targets": torch.tensor([[0.0, 1.0, -1.0], [1.0, 1.0, 0.0]]),
    }


def test_gradient_reaches_all_that_is_added_and_moves_nothing_else():
    inputs = make_inputs()
    model = tiny_model(gate=0.0).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    reached: set[str] = set()
    for step in range(3):
        optimizer.zero_grad()
        model(**inputs, **full_targets(inputs)).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        now = {name for name, gradient in gradients.items() if gradient is not None and gradient.abs().max() > 0}
        if step == 0:  # behind a shut gate nothing but the gate is reached
            assert {name for name in now if "fusions" in name} == {f"model.fusions.{i}.gate" for i in (0, 1)}
        reached |= now
        optimizer.step()
    # a bias of the keys shifts all scores of a query alike, which softmax does not see
    added = {name for name in before if is_added(name) and not name.endswith("k_proj.bias")}
    assert added - reached == set()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert added - moved == set()
    assert {name for name in moved if not is_added(name)} == set()


def test_the_caption_alone_teaches_the_saliency_map():
    inputs = make_inputs()
    model = tiny_model()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if is_added(name)}
    heads = {"score_head", "aspect_head"}
    without = {name for name, gradient in gradients.items() if gradient is None or not gradient.abs().max() > 0}
    assert {name.split(".")[2] for name in without if not name.endswith("k_proj.bias")} == heads


# Generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", GENERATIONS)
def test_images_are_encoded_once_per_generate(strategy):
    inputs = make_inputs()
    model = tiny_model()
    calls = []
    for name in ("iasm", "vision_tower"):
        module = getattr(model.model, name)
        module.register_forward_pre_hook(lambda m, args, n=name: calls.append((n, len(args[0]))))
    generate(model, inputs, **GENERATIONS[strategy])
    assert sorted(calls) == [("iasm", 2), ("vision_tower", 2)]


@pytest.mark.parametrize("strategy", GENERATIONS)
def test_features_encoded_before_generate_the_same(strategy):
    inputs = make_inputs()
    model = tiny_model()
    expected = generate(model, inputs, **GENERATIONS[strategy])
    features = model.get_image_features(inputs.pop("pixel_values"))
    assert features.saliency_maps.shape == (2, 8, 8)
    assert features.score_logits.shape == (2, 10) and features.aspect_logits.shape == (2, 3)
    tokens = generate(model, {**inputs, "mm_encoder_outputs": {"image": features}}, **GENERATIONS[strategy])
    assert torch.equal(tokens, expected)


def test_maps_of_features_encoded_before_are_passed_on():
    inputs = make_inputs()
    model = tiny_model()
    expected = model(**inputs)
    features = model.get_image_features(inputs.pop("pixel_values"))
    outputs = model(**inputs, mm_encoder_outputs={"image": features})
    assert torch.equal(outputs.logits, expected.logits)
    assert torch.equal(outputs.saliency_maps, expected.saliency_maps)
    assert torch.equal(
        model.model(**inputs, mm_encoder_outputs={"image": features}).score_logits, expected.score_logits
    )


@pytest.mark.parametrize("owner", ["whole", "inner"])
def test_image_features_take_the_base_options(owner):
    pixels = make_inputs()["pixel_values"]
    base = tiny_base()
    expected = base.get_image_features(pixels, vision_feature_layer=1, vision_feature_select_strategy="full")
    model = graft(base) if owner == "whole" else graft(base).model
    features = model.get_image_features(pixels, vision_feature_layer=1, vision_feature_select_strategy="full")
    assert torch.equal(torch.stack(features.pooler_output), torch.stack(expected.pooler_output))
    assert features.pooler_output[0].shape[0] == IMAGE_TOKENS + 1  # with the class token


# Nothing of one forward is left for the next ----------------------------------------------------------------------


def attributes(model: torch.nn.Module) -> dict[str, dict[str, object]]:
    """All attributes of all modules, by identity; dictionaries (hooks, buffers, children) by their content's."""

    def content(value: object) -> object:
        return {key: id(item) for key, item in value.items()} if isinstance(value, dict) else id(value)

    return {name: {key: content(value) for key, value in vars(m).items()} for name, m in model.named_modules()}


def test_a_forward_leaves_nothing_behind():
    inputs = make_inputs()
    model = tiny_model()
    model(**inputs)  # installs transformers' own capturing hooks
    generate(model, inputs)
    before = attributes(model)
    model(**inputs, **full_targets(inputs)).loss.backward()
    model.zero_grad()
    generate(model, inputs, num_beams=2)
    model.model.vision_tower(inputs["pixel_values"])
    assert attributes(model) == before
    assert_nothing_is_left(model)


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["layer", "fusion", "iasm", "language_model", "pixels"])
def test_an_exception_leaves_nothing_behind(where, error):
    inputs = make_inputs()
    model = tiny_model()
    expected = logits(model, **inputs)
    broken = {
        "layer": model.model.vision_tower.encoder.layers[1],
        "fusion": model.model.fusions.get_submodule("1"),
        "iasm": model.model.iasm.pyramid,
        "language_model": model.model.language_model,
        "pixels": model.model.vision_tower.embeddings,
    }[where]

    def fail(module, args):
        raise error(where)

    handle = broken.register_forward_pre_hook(fail)
    runs = [partial(model, **inputs), partial(generate, model, inputs), partial(model.model, **inputs)]
    if where != "language_model":
        runs.append(partial(model.get_image_features, inputs["pixel_values"]))
        if error is ArithmeticError:  # torch ends no call of a module on an interrupt
            runs.append(partial(model.model.vision_tower, inputs["pixel_values"]))
    for run in runs:
        with pytest.raises(error, match=where):
            run()
    handle.remove()
    assert_nothing_is_left(model)
    assert torch.equal(logits(model, **inputs), expected)


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 5, 3, 32, 32), (2, 1, 32, 32)])
def test_other_forms_of_pixels_are_refused_with_their_shape(shape):
    model = tiny_model()
    with pytest.raises(ValueError, match="takes images .*" + ", ".join(map(str, shape[1:]))):
        model.model.vision_tower(torch.zeros(shape))
    assert_nothing_is_left(model)


def test_threads_see_their_own_images():
    model = tiny_model()
    inputs = [make_inputs(seed=seed) for seed in range(2)]
    expected = [model(**one) for one in inputs]
    assert not torch.equal(expected[0].logits, expected[1].logits)
    both_inside = threading.Barrier(2, timeout=30)

    def wait(*args):
        both_inside.wait()

    layer = model.model.vision_tower.encoder.layers[0]
    hooks = model.model.iasm.register_forward_hook(wait), layer.register_forward_pre_hook(wait)
    results = [None, None]

    def run(i: int):
        with torch.no_grad():
            results[i] = model(**inputs[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    for result, one in zip(results, expected):
        assert torch.equal(result.logits, one.logits)
        assert torch.equal(result.saliency_maps, one.saliency_maps)
    assert_nothing_is_left(model)


@pytest.mark.parametrize("inner_fails", [False, True])
def test_two_models_inside_each_other_keep_apart(inner_fails):
    """An encoder call inside another's ends, or fails before it began, without ending the outer one."""
    inputs, others = make_inputs(seed=0), make_inputs(seed=1)
    outer, inner = tiny_model("clip"), tiny_model("siglip")
    expected = logits(outer, **inputs), logits(inner, **others)
    results = []

    def fail(module, args):
        raise ArithmeticError

    def run_inner(module, args):
        try:
            results.append(logits(inner, **others))
        except ArithmeticError:
            results.append(None)

    if inner_fails:
        inner.model.iasm.register_forward_pre_hook(fail)
    outer.model.vision_tower.encoder.layers[0].register_forward_pre_hook(run_inner)
    assert torch.equal(outer(**inputs).logits, expected[0])
    assert results == [None] if inner_fails else torch.equal(results[0], expected[1])


def test_a_deepcopy_is_independent():
    inputs = make_inputs()
    model = tiny_model()
    twin = copy.deepcopy(model)
    expected = logits(model, **inputs)
    calls = []
    model.model.iasm.register_forward_hook(lambda *args: calls.append("original"))
    twin.model.iasm.register_forward_hook(lambda *args: calls.append("copy"))
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(twin, **inputs), expected)
    assert calls == ["copy"]
    assert twin.config.mllm_config is twin.model.mllm.config
    assert twin.config is not model.config


# Incomplete checkpoints -------------------------------------------------------------------------------------------


def test_missing_added_weights_start_as_a_fresh_graft(tmp_path):
    inputs = make_inputs()
    tiny_model().save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, keep=lambda key: not is_added(key) or key.endswith("iasm.queries"))
    model = ASEForConditionalGeneration.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        if is_added(name):
            assert parameter.isfinite().all() and parameter.abs().max() < 2, name
            if name.endswith("gate"):
                assert parameter.item() == 0
            if "norm" in name.rsplit(".", 2)[-2] and name.endswith("weight") and "grn" not in name:
                assert torch.equal(parameter, torch.ones_like(parameter)), name
    assert model.model.iasm.token_types.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(logits(model, **inputs), logits(tiny_base(), **inputs))


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForImageTextToText])
def test_a_checkpoint_without_the_saliency_branch_is_refused(auto, tmp_path):
    """Its scores and maps would be random."""
    tiny_model().save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, keep=lambda key: not is_added(key))
    with pytest.raises(ValueError, match=r"none of the saliency branch.*from_mllm_pretrained"):
        auto.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "cut short", b""])
def test_weights_that_cannot_be_read_are_named(content, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content == "cut short" else content)
    with pytest.raises(ValueError, match=r"cannot be read: .*model\.safetensors"):
        ASEForConditionalGeneration.from_pretrained(tmp_path)


def test_a_missing_weight_does_not_reset_its_siblings(tmp_path):
    saved = tiny_model(gate=0.7)
    saved.model.iasm.queries.data.fill_(3.0)
    saved.save_pretrained(tmp_path)
    missing = {"model.fusions.0.attention.q_proj.weight", "model.fusions.1.gate", "model.iasm.token_types"}
    assert set(edit_checkpoint(tmp_path, keep=lambda key: key not in missing)) == missing
    loaded = ASEForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    for name, tensor in saved.state_dict().items():
        if name not in missing:
            assert torch.equal(loaded[name], tensor), name
    assert loaded["model.fusions.1.gate"].item() == 0
    assert 0.1 < loaded["model.fusions.0.attention.q_proj.weight"].abs().max() < 1
    assert loaded["model.iasm.token_types"].std().item() == pytest.approx(0.02, rel=0.2)


def test_missing_base_weights_get_the_initialisation_of_their_own_class(tmp_path):
    """CLIP initialises its attention from parameterless modules, which transformers skips for custom code."""
    tiny_model().save_pretrained(tmp_path)
    edit_checkpoint(tmp_path, keep=lambda key: "vision_tower.encoder.layers" not in key)
    model = ASEForConditionalGeneration.from_pretrained(tmp_path)
    config = model.config.vision_config
    width, depth = config.hidden_size, config.num_hidden_layers
    expected = {"q_proj": width**-0.5 * (2 * depth) ** -0.5, "out_proj": width**-0.5, "fc1": (2 * width) ** -0.5}
    for name, parameter in model.model.vision_tower.encoder.layers.named_parameters():
        if (module := name.split(".")[-2]) in expected and name.endswith("weight"):
            assert parameter.std().item() == pytest.approx(expected[module], rel=0.1), name


# Bases ------------------------------------------------------------------------------------------------------------


def tiny_from_config(config) -> ASEForConditionalGeneration:
    with torch.device("meta"):
        return ASEForConditionalGeneration(ASEConfig(mllm_config=config, iasm_config=IASM, **FUSION))


TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


def test_a_base_without_an_image_encoder_is_refused():
    config = transformers.FuyuConfig(text_config={**TINY_TEXT, "model_type": "persimmon"}, **TINY_TEXT, patch_size=8)
    with pytest.raises(ValueError, match=r"FuyuForCausalLM has no image encoder that `get_encoder.*its parts are"):
        tiny_from_config(config)


def test_patches_whose_colours_stand_in_an_unknown_order_are_refused():
    config = transformers.Ernie4_5_VLMoeConfig(
        vision_config={"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "patch_size": 8}
    )
    with pytest.raises(
        ValueError, match=r"Ernie.* no convolution over three colours, so the order of its pixels is not"
    ):
        tiny_from_config(config)


def test_an_encoder_with_unknown_arguments_is_refused():
    base = tiny_base()
    forward = base.model.vision_tower.forward
    base.model.vision_tower.forward = lambda pixel_values, patch_map, **kwargs: forward(pixel_values, **kwargs)
    with pytest.raises(ValueError, match=r"CLIPVisionModel needs \['patch_map'\] beside its pixels; known are"):
        graft(base)


def test_a_base_is_grafted_once():
    base = tiny_base()
    model = graft(base)
    for again in (base, model):
        with pytest.raises(ValueError, match="has the saliency branch already"):
            graft(again)


def test_a_text_model_is_refused():
    text = LlamaForCausalLM(LlamaConfig(**TINY_TEXT))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no image encoder .*its parts are .*layers"):
        graft(text)


@pytest.mark.parametrize("fusion_layers", [[2], [0, 2], [7]])
def test_layers_that_the_language_model_never_sees_are_refused(fusion_layers):
    with pytest.raises(ValueError, match=r"reaches beyond layer 1: the encoder has 3 layers"):
        graft(tiny_base(), fusion_layers=fusion_layers)
    if fusion_layers != [7]:  # another choice of features sees the last layer
        assert graft(tiny_base(vision_feature_layer=-1), fusion_layers=fusion_layers)


# Embeddings -------------------------------------------------------------------------------------------------------


def test_token_embeddings_can_be_replaced():
    model = tiny_model()
    embeddings, head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50, bias=False)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(head)
    assert model.model.mllm.model.language_model.embed_tokens is model.model.get_input_embeddings() is embeddings
    assert model.model.mllm.lm_head is model.get_output_embeddings() is head


def test_tying_on_the_outer_config_ties_the_base():
    config = ASEConfig(mllm_config=tiny_config(), iasm_config=IASM, **FUSION)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = True
    model = ASEForConditionalGeneration(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("saved", [False, True], ids=["live", "saved"])
def test_tied_embeddings_stay_tied(saved, tmp_path):
    base = LlavaForConditionalGeneration(tiny_config(tie_word_embeddings=True)).eval()
    expected = logits(base, **make_inputs())
    model = graft(base)
    if saved:
        model.save_pretrained(tmp_path)
        model = ASEForConditionalGeneration.from_pretrained(tmp_path)
    assert model.config.tie_word_embeddings
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model, **make_inputs()), expected)
