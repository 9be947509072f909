"""Every form in which vision-language models hold their image patches: the same promises for all."""

import copy
from dataclasses import dataclass

import pytest
import torch
from conftest import ASPECTS, graft, is_added, open_gates, read_config, with_noise
from families import FAMILIES, Family, text_inputs
from transformers import AutoModelForImageTextToText, PreTrainedModel

from ase_mllm import ASEForConditionalGeneration
from ase_mllm.encoder_context import SALIENCY_OUTPUTS, SaliencyRecorder
from ase_mllm.image_encoders import find_image_encoder
from ase_mllm.image_tokens import token_grids
from ase_mllm.photometry import SALIENCY_STRIDE


NEW_TOKENS = 4


@dataclass
class Case:
    """A family's base with its fresh graft (one set of weights) and a graft with open gates."""

    name: str
    family: Family
    base: PreTrainedModel
    fresh: ASEForConditionalGeneration
    fused: ASEForConditionalGeneration

    def images(self, seeds: tuple[int, ...] = (0, 1)) -> list[torch.Tensor]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return [torch.randn(3, *size, generator=g) for size, g in zip(self.family.sizes, generators)]

    def inputs(self, seeds: tuple[int, ...] = (0, 1)) -> dict[str, torch.Tensor]:
        return self.family.inputs(self.images(seeds))


def noisy_base(family: Family) -> PreTrainedModel:
    torch.manual_seed(0)
    return with_noise(AutoModelForImageTextToText.from_config(family.config()))


# one of each form of pixels is enough while writing code
QUICK = {"llava", "llava_next", "mllama", "lfm2_vl", "qwen2_vl"}


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def case(request) -> Case:
    family = FAMILIES[request.param]
    base = noisy_base(family)
    fresh = graft(copy.deepcopy(base))
    return Case(request.param, family, base, fresh, open_gates(copy.deepcopy(fresh)))


def generate(model: PreTrainedModel, inputs: dict[str, torch.Tensor], **options):
    torch.manual_seed(1)
    return model.generate(**inputs, **{"max_new_tokens": NEW_TOKENS, "do_sample": False, **options})


def in_dtype(inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


@torch.no_grad()
@DTYPES
def test_a_fresh_graft_is_the_base(case, dtype):
    inputs = in_dtype(case.inputs(), dtype)
    models = (copy.deepcopy(model).to(dtype) for model in (case.fresh, case.base))
    ours, expected = (model(**inputs, output_hidden_states=True) for model in models)
    assert torch.equal(ours.logits, expected.logits)
    assert all(map(torch.equal, ours.get("hidden_states") or (), expected.get("hidden_states") or ()))
    assert ours.saliency_maps.isfinite().all()


@torch.no_grad()
def test_a_fresh_graft_writes_what_the_base_writes(case):
    inputs = case.inputs()
    for cached in (True, False):
        options = {"use_cache": cached, "output_logits": True, "return_dict_in_generate": True}
        ours, expected = (generate(model, inputs, **options) for model in (case.fresh, case.base))
        assert torch.equal(ours.sequences, expected.sequences)
        assert all(map(torch.equal, ours.logits, expected.logits))
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2, "top_k": 0}):
        try:
            expected = generate(case.base, inputs, **options)
        except Exception as error:  # some bases have no beams
            with pytest.raises(type(error)):
                generate(case.fresh, inputs, **options)
        else:
            assert torch.equal(generate(case.fresh, inputs, **options), expected)


def test_the_encoder_is_found_where_its_weights_are_not(case):
    """DeepSpeed's ZeRO-3 takes each parameter away as soon as it is made, and leaves an empty one that tells its shape."""
    base = copy.deepcopy(case.base)
    expected = find_image_encoder(base)
    for parameter in base.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, parameter.data.new_empty(0)
    found = find_image_encoder(base)
    assert (
        found.layers == expected.layers and found.hidden_sizes == expected.hidden_sizes and 0 not in found.hidden_sizes
    )


@torch.no_grad()
def test_open_gates_move_the_logits_and_generation_follows(case):
    inputs = case.inputs()
    fused = case.fused(**inputs).logits
    assert fused.isfinite().all()
    assert (fused - case.fresh(**inputs).logits).abs().max() > 1e-3
    tokens = generate(case.fused, inputs, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(tokens.logits[0], fused[:, -1].float(), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_generation_says_what_the_iasm_saw(options, case):
    """One row an image, whatever the number of beams or returned sequences, and the IASM runs once."""
    inputs, calls = case.inputs(), []
    expected = case.fused(**inputs)
    hook = case.fused.model.iasm.register_forward_hook(lambda *args: calls.append(1))
    try:
        result = case.fused.generate(
            **inputs, **{"do_sample": False, **options}, max_new_tokens=2, return_dict_in_generate=True
        )
    finally:
        hook.remove()
    assert len(calls) == 1
    for name in SALIENCY_OUTPUTS:
        assert (name in result) == (name in expected)
        if name in expected:
            torch.testing.assert_close(result[name], expected[name])


@DTYPES
def test_every_added_parameter_gets_a_finite_gradient(case, dtype):
    model = copy.deepcopy(case.fused).to(dtype)
    outputs = model(**in_dtype(case.inputs(), dtype))
    assert all(outputs[name].isfinite().all() for name in ("logits", *SALIENCY_OUTPUTS) if name in outputs)
    (outputs.logits.square().mean() + outputs.score_logits.square().mean() + outputs.aspect_logits.mean()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert not [name for name, gradient in gradients.items() if gradient is not None and not gradient.isfinite().all()]
    # a bias of the keys shifts all scores of a query alike, which softmax does not see
    added = [name for name in gradients if is_added(name) and not name.endswith("k_proj.bias")]
    assert not [name for name in added if gradients[name] is None or not gradients[name].any()]


@torch.no_grad()
def test_an_image_moves_its_own_sample_only(case):
    before, after = case.fused(**case.inputs()), case.fused(**case.inputs((0, 2)))
    change = (after.logits - before.logits).abs().amax((1, 2))
    assert change[0] < 1e-5 and change[1] > 1e-3
    images = len(case.fused(**case.family.inputs(case.images()[:1])).score_logits)
    for name in ("saliency_maps", "score_logits", "aspect_logits"):
        assert torch.equal(after[name][:images], before[name][:images])
        assert not torch.equal(after[name][images:], before[name][images:])


@torch.no_grad()
def test_a_batch_of_one_agrees_with_its_row_in_a_batch_of_two(case):
    images = case.images()
    both = case.fused(**case.family.inputs(images))
    rows = 0
    for i, image in enumerate(images):
        alone = case.fused(**case.family.inputs([image]))
        length = min(alone.logits.shape[1], both.logits.shape[1])
        torch.testing.assert_close(alone.logits[0, -4:], both.logits[i, -length:][-4:], atol=1e-4, rtol=1e-4)
        mine = slice(rows, rows + len(alone.score_logits))
        torch.testing.assert_close(alone.score_logits, both.score_logits[mine], atol=1e-5, rtol=1e-5)
        rows += len(alone.score_logits)
    assert rows == len(both.score_logits)


@torch.no_grad()
def test_without_an_image_nothing_changes(case):
    inputs = text_inputs([[], []])
    try:
        logits = case.base(**inputs).logits
    except TypeError:  # BLIP-2 does nothing without pixels
        with pytest.raises(TypeError):
            case.fused(**inputs)
    else:
        outputs = case.fused(**inputs)
        assert torch.equal(outputs.logits, logits)
        assert outputs.saliency_maps is None and outputs.score_logits is None
        assert torch.equal(generate(case.fused, inputs), generate(case.base, inputs))


@torch.no_grad()
def test_saves_and_loads_itself(case, tmp_path):
    case.fused.save_pretrained(tmp_path / "first")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "first").eval()
    loaded.save_pretrained(tmp_path / "second")
    states = [model.state_dict() for model in (case.fused, loaded)]
    states.append(AutoModelForImageTextToText.from_pretrained(tmp_path / "second").state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[key], states[0][key]) for key in state)
    assert read_config(tmp_path / "first") == read_config(tmp_path / "second")
    inputs = case.inputs()
    # not bit for bit: what a base without sdpa leaves at eager is loaded with sdpa
    torch.testing.assert_close(loaded(**inputs).logits, case.fused(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "frozen_base"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(case, reentrant, frozen):
    model = copy.deepcopy(case.fused).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_added(name) or not frozen)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        model(**case.inputs()).logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    torch.testing.assert_close(gradients(), plain)


@torch.no_grad()
def test_a_base_that_has_recorded_hidden_states_is_fused_too(case):
    base = copy.deepcopy(case.base)
    inputs = case.inputs()
    base(**inputs, output_hidden_states=True)
    late = open_gates(graft(base))
    late.load_state_dict(case.fused.state_dict())
    assert torch.equal(late(**inputs).logits, case.fused(**inputs).logits)


def seen_by_iasm(model: ASEForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    seen = []
    hook = model.model.iasm.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen


def test_the_iasm_sees_the_photographs(case):
    """Patches in whatever order are put back; where the base cuts tiles, each is a part of the photograph."""
    images = case.images()
    seen = seen_by_iasm(case.fused, case.family.inputs(images))
    if len(seen) == len(images):
        for image, pixels in zip(images, seen):
            assert torch.equal(pixels.reshape(image.shape), image)
    else:
        assert len(seen) > len(images)
        values = set(torch.cat([image.flatten() for image in images]).tolist())
        tiles = [tile for tile in seen if set(tile.flatten().tolist()) <= values]
        assert len(tiles) >= len(images)


@torch.no_grad()
def test_maps_come_back_at_the_aspect_ratio_of_what_was_seen(case):
    inputs = case.inputs()
    outputs = case.fused(**inputs)
    seen = seen_by_iasm(case.fused, inputs)
    sizes = outputs.saliency_map_sizes
    shape = outputs.saliency_maps.shape
    sizes = [shape[1:]] * len(seen) if sizes is None else sizes.tolist()
    assert len(seen) == len(sizes) == shape[0] == len(outputs.aspect_logits)
    assert outputs.aspect_logits.shape[1] == len(ASPECTS)
    for pixels, (height, width), saliency_map in zip(seen, sizes, outputs.saliency_maps):
        resized = case.fused.model.iasm.to_rgb(pixels[None]).shape
        assert (height, width) == (resized[2] // SALIENCY_STRIDE, resized[3] // SALIENCY_STRIDE)
        torch.testing.assert_close(saliency_map[:height, :width].sum(), torch.tensor(1.0))
        assert (saliency_map > 0).sum() == height * width


# A budget of image tokens ---------------------------------------------------------------------------------------------

# whose image tokens are queries, a column of means, or none in the prompt
REFUSED = {"blip-2": "which are none", "florence2": "which are none", "mllama": "no image tokens"}
PACKED = {"llava_next", "llava_onevision"}  # tiles put together, with an end for each row
RECURRENT = {"lfm2_vl", "qwen3_5", "minicpmv4_6"}  # states pass over what a mask would hide


@pytest.fixture
def cut_case(case) -> Case:
    if case.name in REFUSED:
        pytest.skip("has no tokens to choose from")
    return case


@torch.no_grad()
def test_a_base_without_tokens_of_places_is_refused_in_words(case):
    if case.name not in REFUSED:
        pytest.skip("has such tokens")
    options = {"max_new_tokens": 1} if case.name != "mllama" else {}
    for call in (case.fused, lambda **inputs: case.fused.generate(**inputs, **options)):
        with pytest.raises(ValueError, match=f"image_token_budget.*{REFUSED[case.name]}"):
            call(**case.inputs(), image_token_budget=0.5)


@torch.no_grad()
def test_the_whole_budget_is_no_budget(cut_case):
    inputs = cut_case.inputs()
    assert torch.equal(cut_case.fused(**inputs, image_token_budget=1.0).logits, cut_case.fused(**inputs).logits)
    assert torch.equal(generate(cut_case.fused, inputs, image_token_budget=1.0), generate(cut_case.fused, inputs))


@torch.no_grad()
def test_what_is_taken_out_is_as_if_it_were_masked(cut_case):
    inputs = cut_case.inputs()
    cut = cut_case.fused(**inputs, image_token_budget=0.5)
    is_image = inputs["input_ids"] == cut_case.fused.config.image_token_id
    assert (cut.image_token_mask | is_image).all() and not cut.image_token_mask[is_image].all()
    assert cut.logits.shape[:2] == inputs["input_ids"].shape
    given = {name: value for name, value in inputs.items() if name != "pixel_values"}
    positions = cut_case.base._prepare_position_ids_for_generation(inputs["input_ids"], given)
    mask = inputs["attention_mask"] * cut.image_token_mask
    masked = cut_case.fused(**{**inputs, "attention_mask": mask, "position_ids": positions})
    difference = (masked.logits - cut.logits)[mask.bool()].abs().max()
    assert (difference < 1e-5) == (cut_case.name not in RECURRENT)


@torch.no_grad()
def test_a_cut_prompt_is_gone_on_from(cut_case):
    inputs, model = cut_case.inputs(), cut_case.fused
    options = {"image_token_budget": 0.5, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (generate(model, inputs, use_cache=use, **options) for use in (True, False))
    length = inputs["input_ids"].shape[1]
    assert torch.equal(cached.sequences[:, :length], inputs["input_ids"])
    assert cached.sequences.shape[1] <= length + NEW_TOKENS and torch.equal(cached.sequences, uncached.sequences)
    forward = model(**inputs, image_token_budget=0.5)
    torch.testing.assert_close(cached.logits[0], forward.logits[:, -1].float(), atol=1e-5, rtol=1e-4)
    for one, other in zip(cached.logits, uncached.logits):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    assert torch.equal(cached.image_token_mask, forward.image_token_mask)
    for name in SALIENCY_OUTPUTS:
        assert cached.get(name) is None or torch.equal(cached[name], forward[name])
    limited = generate(model, inputs, image_token_budget=0.5, max_new_tokens=None, max_length=length + NEW_TOKENS)
    assert torch.equal(limited, cached.sequences)


@torch.no_grad()
def test_features_within_a_budget_serve_many_prompts(cut_case):
    inputs, model = cut_case.inputs(), cut_case.fused
    given = model.model._image_arguments(inputs)
    features = model.get_image_features(**given, image_token_budget=0.5)
    others = {name: value for name, value in inputs.items() if name != "pixel_values"}
    for options in ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        expected = generate(model, inputs, image_token_budget=0.5, **options)
        for _ in range(2):
            assert torch.equal(generate(model, others, mm_encoder_outputs={"image": features}, **options), expected)
    torch.testing.assert_close(
        model(**others, mm_encoder_outputs={"image": features}).logits, model(**inputs, image_token_budget=0.5).logits
    )


@torch.no_grad()
def test_a_photograph_is_cut_alone_as_in_a_batch(cut_case):
    both = cut_case.fused(**cut_case.inputs(), image_token_budget=0.5)
    for i, image in enumerate(cut_case.images()):
        alone = cut_case.fused(**cut_case.family.inputs([image]), image_token_budget=0.5)
        torch.testing.assert_close(alone.logits[0, -1], both.logits[i, -1], atol=1e-5, rtol=1e-4)


def test_a_cut_prompt_is_learned_from(cut_case):
    """The loss is that of the logits that are returned, as outside of the model others compute it."""
    inputs, model = cut_case.inputs(), copy.deepcopy(cut_case.fused)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] < 20, -100)
    outputs = model(**inputs, labels=labels, image_token_budget=0.5)
    expected = torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    torch.testing.assert_close(outputs.caption_loss, expected, atol=1e-5, rtol=1e-4)
    outputs.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert any(p.grad is not None and p.grad.any() for p in model.model.fusions.parameters())


def test_tokens_stand_where_their_budget_takes_them_to_stand(cut_case):
    """What a token's feature changes with most are the pixels of its own place."""
    if cut_case.name in PACKED:
        pytest.skip("goes the way of its features: see test_image_tokens.py")
    inputs, model = cut_case.inputs(), cut_case.fresh
    given = model.model._image_arguments(inputs)
    given["pixel_values"] = given["pixel_values"].clone().requires_grad_()
    recorder = SaliencyRecorder(model.model, keep_inputs=True)
    with recorder:
        pooled = model.model.mllm.base_model.get_image_features(**given, return_dict=True).pooler_output
    flat = torch.cat([one.flatten(0, -2) for one in pooled])
    grids = token_grids(model.config.mllm_config, recorder.sizes, len(flat))
    starts = [sum(rows * columns for rows, columns in grids[:i]) for i in range(len(grids))]
    right = []
    for image, (start, (rows, columns)) in enumerate(zip(starts, grids)):
        for place in {0, columns - 1, rows * columns // 2, rows * columns - 1}:
            (gradient,) = torch.autograd.grad(
                flat[start + place].square().sum(), given["pixel_values"], retain_graph=True
            )
            # some take a tile of zeros for none: none of the others may look like it
            gradient = gradient.where((gradient != 0) | (given["pixel_values"] == 0), 1e-12)
            with torch.no_grad(), SaliencyRecorder(model.model, keep_inputs=True) as read:
                # the encoder's own reader arranges the gradient as it does pixels
                model.model.mllm.base_model.get_image_features(**{**given, "pixel_values": gradient}, return_dict=True)
            ((images, _),) = read.inputs
            moved = torch.nn.functional.adaptive_avg_pool2d(images[image].abs().sum(0)[None], (rows, columns))
            right.append(int(moved.argmax()) == place)
    assert sum(right) >= 0.9 * len(right), right
