"""Attention implementations: each reaches the parts it is meant for, a base keeps its own, and ours agree."""

import pytest
import torch
from conftest import FUSION, IASM, graft, make_inputs, tiny_base, tiny_config, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ase_mllm import ASEConfig, ASEForConditionalGeneration, modeling_iasm


SEEN = set()
VISION, TEXT, BASE = {"CLIPVisionConfig"}, {"LlamaConfig"}, {"CLIPVisionConfig", "LlamaConfig"}
OURS = {"IASMConfig", "ASEConfig"}


def spied(module, *args, **kwargs):
    """sdpa that notes who asked for it, by the class of its configuration."""
    SEEN.add(type(module.config).__name__)
    return sdpa_attention_forward(module, *args, **kwargs)


AttentionInterface.register("spied", spied)
AttentionMaskInterface.register("spied", sdpa_mask)


def run(model: ASEForConditionalGeneration) -> tuple[torch.Tensor, set[str]]:
    """Logits, and whose attention was "spied"."""
    SEEN.clear()
    with torch.no_grad():
        return model(**make_inputs()).logits, set(SEEN)


ATTENTIONS = {
    "everything": ("spied", BASE | OURS),
    "base": ({"mllm_config": "spied"}, BASE),
    "iasm": ({"iasm_config": "spied"}, {"IASMConfig"}),
    "fusions": ({"": "spied"}, {"ASEConfig"}),
    "vision": ({"mllm_config": {"vision_config": "spied"}}, VISION),
    "text": ({"mllm_config": {"text_config": "spied"}}, TEXT),
}


@pytest.mark.parametrize("loaded", [False, True], ids=["run_time", "loaded"])
@pytest.mark.parametrize("parts", ATTENTIONS)
def test_an_attention_reaches_the_parts_it_is_meant_for(parts, loaded, tmp_path):
    attention, expected = ATTENTIONS[parts]
    model = tiny_model()
    logits, seen = run(model)
    assert not seen
    if loaded:
        model.save_pretrained(tmp_path)
        model = ASEForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=attention)
    else:
        model.set_attn_implementation(attention)
    result, seen = run(model)
    assert torch.equal(result, logits)
    assert seen == expected


def test_the_parts_can_be_switched_alone():
    body, module = tiny_model(), tiny_model()
    body.model.set_attn_implementation("spied")
    module.model.iasm.set_attn_implementation("spied")
    assert run(body)[1] == BASE | OURS and run(module)[1] == {"IASMConfig"}


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ("sdpa", set()),
        ("spied", BASE | OURS),
        ({"": "sdpa", "vision_config": "spied", "text_config": "sdpa"}, VISION),
        ({"": "spied", "vision_config": "sdpa", "text_config": "sdpa"}, OURS),
    ],
    ids=["sdpa", "spied", "vision", "base"],
)
def test_a_live_base_keeps_its_attention(attention, expected):
    """And what is added takes it over."""
    base = tiny_base()
    base.set_attn_implementation(attention)
    ASEConfig(mllm_config=base.config, iasm_config=IASM, **FUSION)
    assert run(graft(base))[1] == expected


def test_an_explicit_attention_is_honoured():
    nested = {"mllm_config": {"": "sdpa", "vision_config": "spied", "text_config": "sdpa"}, "iasm_config": "spied"}
    for attention, expected in (("spied", BASE | OURS), (nested, VISION | {"IASMConfig"})):
        base = tiny_config(attn_implementation="sdpa")
        config = ASEConfig(mllm_config=base, iasm_config=IASM, attn_implementation=attention, **FUSION)
        assert run(ASEForConditionalGeneration(config))[1] == expected


def test_eager_and_sdpa_agree(monkeypatch):
    calls, eager = [], modeling_iasm.eager_attention_forward
    monkeypatch.setattr(
        modeling_iasm, "eager_attention_forward", lambda *args, **kw: calls.append(1) or eager(*args, **kw)
    )
    model = tiny_model()
    sdpa, _ = run(model)
    assert not calls
    model.set_attn_implementation("eager")
    torch.testing.assert_close(run(model)[0], sdpa, rtol=1e-4, atol=1e-4)
    assert len(calls) == 4  # queries, token layer, two fusions
    model.set_attn_implementation("sdpa")
    assert torch.equal(run(model)[0], sdpa)
