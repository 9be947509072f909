"""Every way of decoding with open gates writes what plain greedy decoding writes, and fails only where the base fails."""

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
import torch
import transformers
from conftest import assert_no_call_is_under_way, assert_nothing_is_left, graft, open_gates, with_noise
from families import BOS, FAMILIES, Family
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    TextIteratorStreamer,
)

from ase_mllm import ASEForConditionalGeneration


LLAVA = FAMILIES["llava"]
GATE = 0.3
STEPS = 8
# written tokens are words: an image token among them would ask for an image when the text is read again
WORDS_ONLY = list(range(20))
TOKEN_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")

Inputs = dict[str, torch.Tensor]


def build_base(family: Family = LLAVA, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return with_noise(AutoModelForImageTextToText.from_config(family.config()))


def build_model(base: PreTrainedModel) -> ASEForConditionalGeneration:
    torch.manual_seed(1)
    return open_gates(graft(base), GATE)


@pytest.fixture
def base() -> PreTrainedModel:
    return build_base()


@pytest.fixture
def model() -> ASEForConditionalGeneration:
    return build_model(build_base())


def text(*tokens: int) -> Inputs:
    return {"input_ids": torch.tensor([tokens]), "attention_mask": torch.ones(1, len(tokens), dtype=torch.long)}


def join(*pieces: Inputs) -> Inputs:
    """Texts side by side, images in order; token types that a piece does not name are 0."""
    joined = {}
    for name in dict.fromkeys(name for piece in pieces for name in piece):
        if name in TOKEN_INPUTS:
            zeros = [torch.zeros_like(piece["input_ids"]) for piece in pieces]
            joined[name] = torch.cat([piece.get(name, zero) for piece, zero in zip(pieces, zeros)], dim=1)
        else:
            joined[name] = torch.cat([piece[name] for piece in pieces if name in piece])
    return joined


def prompt(images: int = 1, words: int = 2, seed: int = 0) -> Inputs:
    """One sample: each image with four words after it, then `words` random words."""
    generator = torch.Generator().manual_seed(seed)
    pieces = [text(BOS)]
    for i in range(images):
        piece = LLAVA.inputs([torch.randn(3, *LLAVA.sizes[i % 2], generator=generator)])
        pieces.append({name: tensor[:, 1:] if name in TOKEN_INPUTS else tensor for name, tensor in piece.items()})
    return join(*pieces, text(*torch.randint(20, 60, (words,), generator=generator).tolist()))


def left_pad(*prompts: Inputs) -> Inputs:
    length = max(one["input_ids"].shape[1] for one in prompts)
    blanks = [torch.zeros(1, length - one["input_ids"].shape[1], dtype=torch.long) for one in prompts]
    rows = [join({"input_ids": blank, "attention_mask": blank}, one) for blank, one in zip(blanks, prompts)]
    types = {name for row in rows for name in row if name in TOKEN_INPUTS}
    rows = [{**{name: torch.zeros_like(row["input_ids"]) for name in types}, **row} for row in rows]
    return {name: torch.cat([row[name] for row in rows if name in row]) for name in join(*rows)}


def unequal_prompts() -> list[Inputs]:
    """One image, two images, none."""
    return [prompt(1, 2, seed=1), prompt(2, 1, seed=2), prompt(0, 9, seed=3)]


def decode(model: PreTrainedModel, inputs: Inputs, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens `(batch, STEPS)` and unprocessed logits `(batch, STEPS, vocabulary)` of greedy decoding."""
    output = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        suppress_tokens=WORDS_ONLY,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return output.sequences[:, -STEPS:], torch.stack(output.logits, dim=1)


def assert_same(result: tuple[torch.Tensor, torch.Tensor], expected: tuple[torch.Tensor, torch.Tensor]):
    assert torch.equal(result[0], expected[0])
    torch.testing.assert_close(result[1], expected[1], rtol=1e-4, atol=1e-4)


# What is decoded --------------------------------------------------------------------------------------------------


def test_the_image_and_the_gates_decide_what_is_written(base, model):
    """All other tests here would pass on a model that sees nothing."""
    first, other = prompt(seed=0), prompt(seed=1)
    other = {name: other[name] if name not in TOKEN_INPUTS else first[name] for name in first}
    tokens, logits = decode(model, first)
    assert not torch.equal(tokens, decode(model, other)[0])
    assert (logits[:, 0] - decode(base, first)[1][:, 0]).abs().max() > 1e-2
    assert torch.equal(decode(base, first)[1], decode(open_gates(model, 0.0), first)[1])


@pytest.mark.parametrize("images", [0, 1, 2, 3])
def test_a_step_of_generation_is_a_forward_of_all_that_stands_before(model, images):
    inputs = prompt(images)
    tokens, logits = decode(model, inputs)
    with torch.no_grad():
        whole = model(**join(inputs, text(*tokens[0, :-1].tolist())))
    torch.testing.assert_close(logits, whole.logits[:, -STEPS:], rtol=1e-4, atol=1e-4)
    assert (0 if whole.saliency_maps is None else len(whole.saliency_maps)) == images


def test_prompts_of_unequal_length_in_a_batch_are_written_as_alone(model):
    prompts = unequal_prompts()
    assert len({one["input_ids"].shape[1] for one in prompts}) == 3
    tokens, logits = decode(model, left_pad(*prompts))
    for i, one in enumerate(prompts):
        assert_same((tokens[i : i + 1], logits[i : i + 1]), decode(model, one))


# Ways of decoding -------------------------------------------------------------------------------------------------

WAYS = {
    "uncached": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "chunks_of_1": {"prefill_chunk_size": 1},
    "chunks_of_7": {"prefill_chunk_size": 7},  # ends inside an image
    "static_chunks": {"cache_implementation": "static", "prefill_chunk_size": 7},
}


@pytest.mark.parametrize("way", WAYS)
def test_caches_and_chunks_write_the_same(model, way):
    inputs = left_pad(*unequal_prompts())
    assert_same(decode(model, inputs, **WAYS[way]), decode(model, inputs))


def test_a_quantized_cache_is_that_of_the_base(base, model):
    """fp8 is the backend that needs no other package."""
    inputs, quantized = prompt(), {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    tokens, logits = decode(model, inputs, **quantized)
    expected_tokens, expected_logits = decode(model, inputs)
    same = int((tokens == expected_tokens)[0].cumprod(0).sum())  # eight bits may turn a near tie at the end
    assert same >= 4
    assert 1e-4 < (logits - expected_logits)[:, :same].abs().max() < 0.2
    assert torch.equal(decode(open_gates(model, 0.0), inputs, **quantized)[1], decode(base, inputs, **quantized)[1])


def test_prompt_lookup_writes_the_same(model):
    inputs = prompt()
    expected = decode(model, inputs)
    inputs = join(inputs, text(*expected[0][0].tolist(), int(inputs["input_ids"][0, -1])))  # something to be found
    expected = decode(model, inputs)
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    assert_same(decode(model, inputs, prompt_lookup_num_tokens=3), expected)
    handle.remove()
    assert max(lengths[1:]) > 1, "nothing was looked up"


@pytest.mark.parametrize("kind", ["twin", "other", "base", "text"])
def test_assisted_decoding_writes_the_same(base, model, kind):
    # transformers 5.23 shows an assistant no image, so that even a twin's drafts would be refused beside one
    inputs = prompt(images=0 if kind == "twin" else 1)
    expected = decode(model, inputs)
    assistant = {
        "twin": lambda: copy.deepcopy(model),  # all that it drafts is accepted
        "other": lambda: build_model(build_base(seed=1)),
        "base": lambda: base,
        "text": lambda: AutoModelForCausalLM.from_config(base.config.get_text_config()).eval(),
    }[kind]()
    # a tiny model is never confident: without a threshold of 0 it drafts one token at a time
    assistant.generation_config.update(num_assistant_tokens=3, assistant_confidence_threshold=0.0)
    calls = []
    model.register_forward_hook(lambda *args: calls.append("model"))
    assistant.register_forward_hook(lambda *args: calls.append("assistant"))
    assert_same(decode(model, inputs, assistant_model=assistant), expected)
    assert calls.count("assistant") >= 3
    if kind == "twin":  # each call takes three drafts and adds one
        assert calls.count("model") == STEPS // 4


# Several answers --------------------------------------------------------------------------------------------------


def answers(model: PreTrainedModel, inputs: Inputs, **kwargs) -> torch.Tensor:
    torch.manual_seed(3)
    length = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
    return model.generate(**inputs, **length, suppress_tokens=WORDS_ONLY, **kwargs)[:, -STEPS:]


@pytest.mark.parametrize("num_return_sequences", [1, 3])
def test_beams_of_a_batch_are_those_of_its_samples(model, num_return_sequences):
    beams = {"num_beams": 3, "num_return_sequences": num_return_sequences, "do_sample": False}
    prompts = unequal_prompts()
    together = answers(model, left_pad(*prompts), **beams)
    assert torch.equal(together, torch.cat([answers(model, one, **beams) for one in prompts]))
    assert len(together.unique(dim=0)) == 3 * num_return_sequences


def test_several_samples_of_a_prompt_are_those_of_the_prompt_repeated(model):
    prompts = unequal_prompts()
    several = answers(model, left_pad(*prompts), do_sample=True, top_k=0, num_return_sequences=2)
    repeated = left_pad(*(one for one in prompts for _ in range(2)))
    assert torch.equal(several, answers(model, repeated, do_sample=True, top_k=0))
    assert len(several.unique(dim=0)) == 6


# Going on from a cache --------------------------------------------------------------------------------------------


def without_images(inputs: Inputs) -> Inputs:
    return {name: tensor for name, tensor in inputs.items() if name in TOKEN_INPUTS}


def first_turn(model: PreTrainedModel, inputs: Inputs) -> tuple[Inputs, DynamicCache]:
    """The prompt with its answer, and the cache of both."""
    length = {"max_new_tokens": 4, "min_new_tokens": 4}
    output = model.generate(
        **inputs, **length, do_sample=False, suppress_tokens=WORDS_ONLY, return_dict_in_generate=True
    )
    written = output.sequences[:, inputs["input_ids"].shape[1] :]
    return join(inputs, {"input_ids": written, "attention_mask": torch.ones_like(written)}), output.cache


def test_a_second_turn_sees_the_picture_of_the_first(model):
    said, cache = first_turn(model, left_pad(*unequal_prompts()))
    question = torch.tensor([[30, 31, 32]]).expand(3, -1)
    second = join(said, {"input_ids": question, "attention_mask": torch.ones_like(question)})
    expected = decode(model, second)
    model.model.iasm.register_forward_pre_hook(lambda *args: pytest.fail("the pictures were looked at again"))
    assert_same(decode(model, without_images(second), cache=cache), expected)


def test_a_second_turn_may_bring_its_own_picture(model):
    said, cache = first_turn(model, prompt(seed=1))
    new = {name: tensor if name not in TOKEN_INPUTS else tensor[:, 1:] for name, tensor in prompt(seed=2).items()}
    second = join(said, new)
    looked_at = []
    model.model.iasm.register_forward_hook(lambda module, args, output: looked_at.append(len(output.saliency_maps)))
    result = decode(model, {**new, **without_images(second)}, cache=cache)
    assert looked_at == [1]
    assert_same(result, decode(model, second))


def test_one_picture_in_a_cache_serves_several_questions(model):
    seen = prompt()
    with torch.no_grad():
        cache = model(**seen, use_cache=True).cache
    results = []
    for question in (text(40, 41), text(50, 51, 52)):
        whole = join(seen, question)
        results.append(decode(model, without_images(whole), cache=copy.deepcopy(cache)))
        assert_same(results[-1], decode(model, whole))
    assert not torch.equal(results[0][0], results[1][0])


# What generate() returns and takes --------------------------------------------------------------------------------


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for item in value or () for tensor in tensors(item)]


RECORDS = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_fresh_graft_returns_the_records_of_its_base(base, model, num_beams):
    inputs = left_pad(*unequal_prompts())
    outputs = []
    for one in (base, open_gates(model, 0.0)):
        one.set_attn_implementation("eager")
        outputs.append(one.generate(**inputs, **RECORDS, num_beams=num_beams, do_sample=False, max_new_tokens=4))
    expected, result = outputs
    assert isinstance(result, type(expected))
    assert list(result) == [*expected, "saliency_maps", "score_logits", "aspect_logits"]
    for name in set(expected) - {"cache"}:
        pairs = list(zip(tensors(result[name]), tensors(expected[name]), strict=True))
        assert pairs and all(torch.equal(*pair) for pair in pairs), name
    layers = zip(result.cache.layers, expected.cache.layers, strict=True)
    assert all(torch.equal(ours.keys, theirs.keys) for ours, theirs in layers)


def test_records_are_those_of_a_forward_of_all(model):
    model.set_attn_implementation("eager")
    inputs = prompt()
    output = model.generate(**inputs, **RECORDS, do_sample=False, max_new_tokens=STEPS, suppress_tokens=WORDS_ONLY)
    length = inputs["input_ids"].shape[1]
    tokens = output.sequences[:, length:]
    with torch.no_grad():
        whole = model(
            **join(inputs, text(*tokens[0, :-1].tolist())), output_hidden_states=True, output_attentions=True
        )
    for layer, states in enumerate(whole.hidden_states):
        written = torch.cat([step[layer] for step in output.hidden_states], dim=1)
        torch.testing.assert_close(written, states, rtol=1e-4, atol=1e-4)
    for layer, weights in enumerate(whole.attentions):
        for step in range(STEPS):
            written = output.attentions[step][layer][:, :, -1]
            torch.testing.assert_close(written, weights[:, :, length + step - 1, : length + step])
    scores = torch.stack(output.scores, dim=1)
    assert scores[..., WORDS_ONLY].isneginf().all()
    torch.testing.assert_close(scores[..., 20:], whole.logits[:, length - 1 :, 20:], rtol=1e-4, atol=1e-4)
    probabilities = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    expected = scores.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(probabilities, expected)


def test_text_is_streamed_while_it_is_written(model):
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    inputs = prompt()
    tokens, _ = decode(model, inputs)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=decode, args=(model, inputs), kwargs={"streamer": streamer})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == tokenizer.decode(tokens[0])
    assert len(pieces) == STEPS


class StopAt(StoppingCriteria):
    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


def test_writing_stops_where_it_is_told_to(model):
    inputs = prompt()
    length = inputs["input_ids"].shape[1]
    tokens = decode(model, inputs)[0][0].tolist()
    greedy = {"do_sample": False, "max_new_tokens": STEPS, "suppress_tokens": WORDS_ONLY}
    stopped = model.generate(**inputs, **greedy, stopping_criteria=[StopAt(length + 3)])
    assert stopped[0, length:].tolist() == tokens[:3]
    last = next(token for token in tokens if token != tokens[0])
    ended = model.generate(**inputs, **greedy, eos_token_id=last)
    assert ended[0, length:].tolist() == tokens[: tokens.index(last) + 1]


class Next(LogitsProcessor):
    """Allows nothing but the number after the last token."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.full_like(scores, -torch.inf).scatter(1, input_ids[:, -1:] + 1, 0.0)


def test_logits_processors_decide(model):
    inputs = prompt()
    last = int(inputs["input_ids"][0, -1])
    counted = model.generate(**inputs, do_sample=False, max_new_tokens=4, logits_processor=[Next()])
    assert counted[0, -4:].tolist() == [last + i for i in range(1, 5)]


@pytest.mark.parametrize(
    "processing",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"guidance_scale": 3.0},
        {"bad_words_ids": [[token] for token in range(20, 90)]},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_logits_are_processed_as_the_base_s(base, model, processing):
    inputs = left_pad(prompt(seed=1), prompt(words=4, seed=2))
    processed = answers(model, inputs, do_sample=False, **processing)
    assert not torch.equal(processed, answers(model, inputs, do_sample=False)), "nothing was processed"
    expected = answers(base, inputs, do_sample=False, **processing)
    assert torch.equal(answers(open_gates(model, 0.0), inputs, do_sample=False, **processing), expected)


# torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
def test_a_compiled_training_step_is_the_plain_one(model, fresh_compiler):
    inputs = left_pad(prompt(seed=1), prompt(words=4, seed=2))
    targets = {"labels": inputs["input_ids"], "score_targets": torch.ones(2, 10)}
    model(**inputs)  # transformers hooks its recorders in under a lock, which no graph can hold
    expected = model(**inputs, **targets)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    result = torch.compile(model, fullgraph=True, backend="eager")(**inputs, **targets)
    result.loss.backward()
    for name in ("logits", "loss", "score_loss", "saliency_maps", "score_logits", "aspect_logits"):
        torch.testing.assert_close(result[name], expected[name], msg=name)
    torch.testing.assert_close(gradients(model), expected_gradients, rtol=1e-4, atol=1e-6)
    assert any(name.startswith("model.iasm.") for name in expected_gradients)
    assert_nothing_is_left(model)
    assert torch.equal(model(**inputs).logits, expected.logits)


@pytest.mark.slow
def test_the_image_encoder_compiles_alone(model, fresh_compiler):
    """Its hooks are inside the graph, who collects what they say is outside."""
    inputs = prompt()
    with torch.no_grad():
        expected = model(**inputs)
        model.get_encoder("image").compile(backend="eager", fullgraph=True)
        result = model(**inputs)
    assert torch.equal(result.logits, expected.logits)
    assert torch.equal(result.saliency_maps, expected.saliency_maps)
    assert_no_call_is_under_way(model)  # a graph may keep its last tensors


@pytest.mark.slow
def test_generate_compiles_one_graph_for_all_steps(model, fresh_compiler):
    """`generate()` compiles on accelerators alone unless it is told otherwise."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable:
        graphs.append(graph)
        return graph.forward

    inputs = left_pad(*unequal_prompts())
    expected = decode(model, inputs)
    config = CompileConfig(backend=backend, mode=None, fullgraph=True)
    assert_same(decode(model, inputs, cache_implementation="static", compile_config=config), expected)
    assert not graphs
    config._compile_all_devices = True
    assert_same(decode(model, inputs, cache_implementation="static", compile_config=config), expected)
    assert len(graphs) == 1


# Embeddings and parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "multiple", "expected", "mean_resizing"),
    [
        (120, None, 120, False),
        (120, None, 120, True),
        (64, None, 64, False),
        (None, 64, 128, False),
        (70, 16, 80, False),
    ],
    ids=["grow", "grow_by_mean", "shrink", "pad", "shrink_and_pad"],
)
def test_resized_embeddings_write_as_those_of_a_resized_base(
    base, model, size, multiple, expected, mean_resizing, tmp_path
):
    for one in (base, model):
        torch.manual_seed(7)
        one.resize_token_embeddings(size, pad_to_multiple_of=multiple, mean_resizing=mean_resizing)
    assert model.config.get_text_config().vocab_size == model.get_input_embeddings().num_embeddings == expected
    assert model.vocab_size == model.model.vocab_size == model.model.mllm.vocab_size == expected
    inputs = left_pad(*unequal_prompts())
    result = decode(model, inputs)
    assert result[1].shape[-1] == expected
    assert torch.equal(result[1], decode(build_model(base), inputs)[1])
    model.save_pretrained(tmp_path)
    loaded = ASEForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().out_features == expected
    assert torch.equal(decode(loaded, inputs)[1], result[1])


def test_parts_are_those_of_the_base(base, model):
    mllm = model.model.mllm
    for one in (model, model.model):
        assert one.get_decoder() is mllm.get_decoder()
        assert one.get_encoder("image") is mllm.get_encoder("image")
        assert mllm.get_encoder() is mllm  # it has none of texts, and a model that has not one stands for it
        assert one.get_encoder() is one.get_encoder("audio") is one
    assert type(model.get_encoder("image")) is type(base.get_encoder("image"))
    assert type(model.get_decoder()) is type(base.get_decoder())


def test_a_part_is_replaced_where_the_base_has_it(base, model):
    inputs = prompt()
    other = build_base(seed=1)
    for one in (base, model):
        one.set_decoder(copy.deepcopy(other.get_decoder()))
    result = decode(model, inputs)
    assert torch.equal(result[1], decode(build_model(copy.deepcopy(base)), inputs)[1])
    base.set_encoder(copy.deepcopy(other.get_encoder("image")), "image")
    model.set_encoder(copy.deepcopy(other.get_encoder("image")), "image")
    replaced = decode(model, inputs)
    assert not torch.equal(replaced[1], result[1])
    assert torch.equal(replaced[1], decode(build_model(copy.deepcopy(base)), inputs)[1])
    assert set(model.state_dict()) == set(build_model(copy.deepcopy(base)).state_dict())


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copied_configuration_is_equal_and_its_own(model, make_copy):
    model.set_attn_implementation({"mllm_config": {"text_config": "eager"}})
    copied = make_copy(model.config)
    assert copied == model.config and copied.to_dict() == model.config.to_dict()
    assert copied.get_text_config()._attn_implementation == "eager"
    copied.get_text_config().num_hidden_layers = 1
    copied.iasm_config.encoder_layers[0] = 2
    assert copied != model.config
    assert model.config.get_text_config().num_hidden_layers == 2
    assert model.config.iasm_config.encoder_layers == [0]


# What clients see ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_next", "mllama", "lfm2_vl"])
def test_signatures_name_the_inputs_of_the_base(name):
    """Many clients keep only the inputs that they find there."""
    base = build_base(FAMILIES[name])
    model = graft(base)

    def named(function: Callable) -> list[str]:
        kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
        return [p.name for p in inspect.signature(function).parameters.values() if p.kind not in kinds]

    for ours, theirs in [
        (model.forward, base.forward),
        (model.model.forward, base.base_model.forward),
        (model.prepare_inputs_for_generation, base.prepare_inputs_for_generation),
    ]:
        expected = named(theirs)
        assert named(ours)[: len(expected)] == expected
    assert {"score_targets", "caption_weights", "num_items_in_batch"} <= set(named(model.forward))


def test_arguments_by_position_are_those_of_the_base(base, model):
    inputs = prompt()
    names = list(inspect.signature(base.forward).parameters)
    given = [inputs.get(name) for name in names[: names.index("attention_mask") + 1]]
    with torch.no_grad():
        assert torch.equal(model(*given).logits, model(**inputs).logits)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("part", ["model", "body"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cache_is_read_and_taken_under_both_its_names(name, part, model):
    """A loop of one's own, as a server runs it, writes what a forward of everything says."""
    one = {"model": model, "body": model.model}[part]
    whole = prompt(words=4)
    length = whole["input_ids"].shape[1] - 2
    first = {key: tensor[:, :length] if key in TOKEN_INPUTS else tensor for key, tensor in whole.items()}
    with torch.no_grad():
        expected, seen = one(**whole)[0][:, -2:], one(**first, use_cache=True)
        cache = getattr(seen, name)
        assert cache.get_seq_length() == length
        rest = {
            key: whole[key][:, length:] if key == "input_ids" else whole[key] for key in TOKEN_INPUTS if key in whole
        }
        result = one(**rest, **{name: cache})[0]
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_image_features_are_read_under_both_their_names(base, model):
    with torch.no_grad():
        outputs = open_gates(model, 0.0)(**prompt())
        expected = base.get_image_features(prompt()["pixel_values"], return_dict=True).pooler_output
    for features in (outputs.image_outputs.pooler_output, outputs.image_hidden_states):
        assert torch.equal(torch.cat(list(features)), torch.cat(list(expected)))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_features_of_the_caller_are_left_as_they_are(name):
    """transformers repeats them for beams in place; the second call would then write of the wrong photographs."""
    family = FAMILIES[name]
    model = build_model(build_base(family))
    inputs = family.inputs(
        [torch.randn(3, *size, generator=torch.Generator().manual_seed(3)) for size in family.sizes]
    )
    vision = {key: inputs[key] for key in inputs if key not in TOKEN_INPUTS}
    rest = {key: inputs[key] for key in TOKEN_INPUTS + ("image_grid_thw",) if key in inputs}
    features = {"image": model.get_image_features(**vision)}
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 4}
    expected = model.generate(**inputs, **options)
    for _ in range(2):
        assert torch.equal(model.generate(**rest, mm_encoder_outputs=features, **options), expected)


@pytest.mark.parametrize("name", ["blip-2", "florence2"])
def test_a_base_with_a_generate_of_its_own_raises_no_other_warning(name, recwarn, caplog):
    family = FAMILIES[name]
    base = build_base(family)
    inputs = family.inputs([torch.zeros(3, *family.sizes[0])])

    def warnings_of(model: PreTrainedModel) -> list[str]:
        recwarn.clear()
        caplog.clear()
        transformers.utils.logging.get_logger("transformers").warning_once.cache_clear()
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        return [*(str(one.message) for one in recwarn), *(record.message for record in caplog.records)]

    assert warnings_of(graft(copy.deepcopy(base))) == warnings_of(base)


def test_an_assistant_s_saliency_is_not_taken_for_the_model_s(base, model):
    other = build_model(build_base(seed=5))
    inputs = prompt()
    with torch.no_grad():
        expected = model(**inputs)
    options = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True}
    result = model.generate(**inputs, assistant_model=other, **options)
    assert torch.equal(result.score_logits, expected.score_logits)


def test_generation_from_given_features_says_what_was_seen(model, processor):
    inputs = prompt()
    features = model.get_image_features(inputs.pop("pixel_values"))
    options = {"do_sample": False, "max_new_tokens": 2, "return_dict_in_generate": True, "num_beams": 2}
    result = model.generate(**inputs, mm_encoder_outputs={"image": features}, **options)
    assert torch.equal(result.saliency_maps, features.saliency_maps)
    assert processor.post_process_scores(result) == processor.post_process_scores(features)
    assert processor.post_process_aspects(result) == processor.post_process_aspects(features)
    assert torch.equal(processor.post_process_saliency(result)[0], processor.post_process_saliency(features)[0])


def test_servers_find_positions_and_videos_where_the_base_has_them():
    for name in ("qwen2_vl", "llava"):
        base = build_base(FAMILIES[name])
        body = graft(base).model
        for method in ("get_rope_index", "get_video_features"):
            assert hasattr(body, method) == hasattr(base.base_model, method)
            if hasattr(body, method):
                assert getattr(body, method) == getattr(base.base_model, method)


def test_the_cache_s_old_name_warns_as_the_base_does(base, model):
    inputs = prompt()
    for one in (base, model, model.model):
        if "cache" not in inspect.signature(one.forward).parameters:
            pytest.skip("this transformers knows one name")
        with pytest.warns(FutureWarning, match="`past_key_values` is deprecated"):
            old = one(**inputs, past_key_values=DynamicCache(), use_cache=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            new = one(**inputs, cache=DynamicCache(), use_cache=True)
        assert old.cache.get_seq_length() == new.cache.get_seq_length() == inputs["input_ids"].shape[1]
