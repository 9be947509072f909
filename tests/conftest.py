"""Tiny models and inputs shared by the tests: no downloads, seconds on a CPU."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

from ase_mllm import ASEForConditionalGeneration, ASEProcessor


ASPECTS = ["underexposed", "blurred", "tilted"]
IASM = {
    "backbone_config": {
        "model_type": "convnextv2",
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    },
    "image_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_queries": 2,
    "aspect_names": ASPECTS,
}
FUSION = {"fusion_hidden_size": 16, "fusion_num_attention_heads": 2}
IMAGE_TOKENS = 16
WORDS = "<pad> <s> </s> <unk> <image> Critique this photograph : what is good , wrong would help ? underexposed blurred .".split()

torch.set_num_threads(1)


def tiny_config(encoder: str = "clip", **kwargs) -> LlavaConfig:
    """LLaVA with two-layer parts; images 32x32 in 16 patches."""
    vision_class = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[encoder]
    vision = vision_class(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=99,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    strategy = "default" if encoder == "clip" else "full"
    arguments = {"image_token_index": 4, "vision_feature_select_strategy": strategy, "vision_feature_layer": -2}
    return LlavaConfig(vision_config=vision, text_config=text, **{**arguments, **kwargs})


def tiny_base(encoder: str = "clip", **kwargs) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    base = LlavaForConditionalGeneration(tiny_config(encoder, **kwargs)).eval()
    for parameter in base.parameters():  # away from the small initial values, so that outputs differ visibly
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return base


def open_gates(model: ASEForConditionalGeneration, value: float = 1.0) -> ASEForConditionalGeneration:
    for name, parameter in model.named_parameters():
        if name.startswith("model.fusions.") and name.endswith("gate"):
            parameter.data.fill_(value)
    return model


def tiny_model(encoder: str = "clip", gate: float = 1.0, **kwargs) -> ASEForConditionalGeneration:
    model = ASEForConditionalGeneration.from_mllm_pretrained(tiny_base(encoder), iasm_config=IASM, **FUSION, **kwargs)
    return open_gates(model, gate)


def tiny_processor() -> ASEProcessor:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
    )
    size = {"height": 32, "width": 32}
    base = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False),
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=(
            "{% for message in messages %}{% for item in message['content'] %}"
            "{% if item['type'] == 'image' %}<image>{% else %} {{ item['text'] }}{% endif %}{% endfor %}{% endfor %} "
        ),
    )
    return ASEProcessor(base, aspect_names=ASPECTS)


def make_inputs(batch_size: int = 2, seed: int = 0, text_tokens: int = 6) -> dict[str, torch.Tensor]:
    """One image a sample, its placeholders first."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, 99, (batch_size, text_tokens), generator=generator)
    image = torch.full((batch_size, IMAGE_TOKENS), 4)
    input_ids = torch.cat([torch.ones(batch_size, 1, dtype=torch.long), image, text], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values": torch.randn(batch_size, 3, 32, 32, generator=generator),
    }


@pytest.fixture
def model() -> ASEForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def processor() -> ASEProcessor:
    return tiny_processor()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return make_inputs()
