"""Tiny models and inputs shared by the tests: no downloads, seconds on a CPU."""

import copy
import gc
import json
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path


os.environ["HF_HUB_OFFLINE"] = "1"
# without it, MKL's last bit depends on where in memory a tensor happens to lie, and equality cannot be tested
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "critique"))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import numpy as np
import pytest
import torch
import transformers
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
    Trainer,
)

from ase_mllm import ASEForConditionalGeneration, ASEProcessor, IASMConfig, ImageAestheticSaliencyModule


ASPECTS = ["underexposed", "blurred", "tilted"]
BACKBONE = {
    "model_type": "convnextv2",
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
IASM = {
    "image_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "num_queries": 2,
    "aspect_names": ASPECTS,
}
FUSION = {"fusion_hidden_size": 16, "fusion_num_attention_heads": 2}
IMAGE_TOKENS = 16
WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<unk>",
    "<image>",
    "Critique",
    "this",
    "photograph",
    ":",
    "what",
    "is",
    "good",
    ",",
    "wrong",
    "would",
    "help",
    "?",
    "underexposed",
    "blurred",
    ".",
]

# three optimizer steps of a `Trainer`
TRAINING = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 3,
}
LORA = {
    "r": 4,
    "target_modules": r".*\.language_model\..*\.(q_proj|v_proj)",
    "modules_to_save": ["iasm", "fusions"],
}
# PEFT 0.21 still reads the property by its old name
PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()


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
    arguments["image_seq_length"] = IMAGE_TOKENS
    return LlavaConfig(vision_config=vision, text_config=text, **{**arguments, **kwargs})


def tiny_base(encoder: str = "clip", **kwargs) -> LlavaForConditionalGeneration:
    torch.manual_seed(0)
    return with_noise(LlavaForConditionalGeneration(tiny_config(encoder, **kwargs)))


def with_noise(base: PreTrainedModel) -> PreTrainedModel:
    """Moves weights away from their small initial values, so that outputs differ visibly."""
    for parameter in base.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return base.eval()


def open_gates(model: ASEForConditionalGeneration, value: float = 1.0) -> ASEForConditionalGeneration:
    for name, parameter in model.named_parameters():
        if name.startswith("model.fusions.") and name.endswith("gate"):
            parameter.data.fill_(value)
    return model


def graft(base, **kwargs) -> ASEForConditionalGeneration:
    return ASEForConditionalGeneration.from_mllm_pretrained(base, **{"iasm_config": IASM, **FUSION, **kwargs})


def tiny_model(encoder: str = "clip", gate: float = 1.0, **kwargs) -> ASEForConditionalGeneration:
    return open_gates(graft(tiny_base(encoder), **kwargs), gate)


def seeded_graft(gate: float = 0.0) -> ASEForConditionalGeneration:
    """The same weights each time, also of what is added."""
    base = tiny_base()
    torch.manual_seed(7)
    return open_gates(graft(base), gate)


def tiny_iasm(**kwargs) -> ImageAestheticSaliencyModule:
    torch.manual_seed(0)
    return ImageAestheticSaliencyModule(IASMConfig(**copy.deepcopy({**IASM, **kwargs}))).eval()


def is_added(name: str) -> bool:
    """Whether a parameter of `ASEForConditionalGeneration` is ours and not the base's."""
    return name.startswith(("model.iasm.", "model.fusions."))


def edit_checkpoint(folder: Path, keep: Callable[[str], bool]) -> list[str]:
    """Deletes the tensors that `keep` refuses from a saved model; returns their keys."""
    tensors = load_file(folder / "model.safetensors")
    dropped = [key for key in tensors if not keep(key)]
    assert dropped, "the test deletes nothing"
    save_file({key: tensors[key] for key in tensors if keep(key)}, folder / "model.safetensors", {"format": "pt"})
    return dropped


def read_config(folder: Path) -> dict:
    """The saved configuration without the dtypes, which loading writes into every part."""

    def without_dtype(value: object) -> object:
        return {k: without_dtype(v) for k, v in value.items() if k != "dtype"} if isinstance(value, dict) else value

    return without_dtype(json.loads((folder / "config.json").read_text()))


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


def training_examples(targets: bool = True) -> list[dict]:
    """Six photographs of noise; the second has no targets."""
    captions = ["good , blurred .", "wrong", "underexposed", "what is good ?", "blurred", "this photograph is good ."]
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (len(captions), 30, 40, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(one), "caption": caption} for one, caption in zip(pixels, captions)]
    if targets:
        for row in rows:
            row["score"] = generator.dirichlet(np.ones(10)).tolist()
            row["saliency"] = generator.random((6, 8)).tolist()
            row["aspect_labels"] = generator.integers(-1, 2, 3).astype(float).tolist()
            row["caption_weight"] = float(generator.random())
        rows[1] |= {"score": None, "saliency": None, "aspect_labels": None, "caption_weight": None}
    return rows


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_no_call_is_under_way(model: ASEForConditionalGeneration):
    with pytest.raises(RuntimeError, match="Encoder layer 1 ran outside a call of its image encoder"):
        model.model.vision_tower.encoder.layers[1](torch.zeros(1, 17, 32), None)


def assert_nothing_is_left(model: ASEForConditionalGeneration):
    """No call of the image encoder is under way, and nobody goes on keeping what the IASM says."""
    assert_no_call_is_under_way(model)
    said = []
    hook = model.model.iasm.register_forward_hook(lambda m, args, out: said.append(weakref.ref(out.saliency_tokens)))
    with torch.no_grad():
        assert model(**make_inputs()).saliency_maps is not None
    hook.remove()
    if said[0]() is not None:
        gc.collect()  # slow, and needed after torch.compile alone
    assert [reference() for reference in said] == [None]


@pytest.fixture
def model() -> ASEForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def processor() -> ASEProcessor:
    return tiny_processor()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return make_inputs()


def landscape(rng: np.random.Generator) -> Image.Image:
    """Random coloured shapes over a gradient, with grain fine enough to be sharp."""
    image = Image.fromarray(rng.integers(60, 200, (6, 8, 3), dtype=np.uint8)).resize((480, 360), Image.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(250):
        x, y, size = rng.uniform(0, 480), rng.uniform(0, 360), rng.uniform(4, 40)
        draw.rectangle((x, y, x + size, y + size), tuple(int(c) for c in rng.integers(20, 235, 3)))
    return image


def cutout(rng: np.random.Generator) -> Image.Image:
    image = Image.fromarray(rng.integers(0, 255, (160, 200, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    alpha = Image.new("L", image.size)
    ImageDraw.Draw(alpha).ellipse((4, 4, 195, 155), 255)
    image.putalpha(alpha)
    return image


@pytest.fixture(scope="session")
def critique_sources(tmp_path_factory) -> dict:
    """A train and a test pool of generated photographs and cut-outs, as `critique_data.load_sources` gives them."""
    import critique_data

    folder, rng = tmp_path_factory.mktemp("sources"), np.random.default_rng(7)
    (folder / "photos").mkdir()
    (folder / "cutouts").mkdir()
    entries = {"photos": [], "cutouts": []}
    for number in range(8):
        split, boxed = ("train", "test")[number % 2], number >= 6
        box = {"subject": True, "box": [0.4, 0.3, 0.6, 0.7]} if boxed else {"subject": False}
        entries["photos"].append({"id": f"photo-{number}", "split": split} | box)
        landscape(rng).save(folder / "photos" / f"photo-{number}.jpg", quality=95)
        entries["cutouts"].append({"id": f"cutout-{number}", "split": split, "name": "A disc."})
        cutout(rng).save(folder / "cutouts" / f"cutout-{number}.png")
    (folder / "sources.json").write_text(json.dumps(entries))
    masks = np.zeros((64, 16 * 64), np.uint8)  # both photographs with a subject: what their box covers
    for left in (0, 64):
        masks[round(0.3 * 64) : round(0.7 * 64), left + round(0.4 * 64) : left + round(0.6 * 64)] = 255
    Image.fromarray(masks).save(folder / "critique_masks.png")
    return {split: critique_data.load_sources(split, folder, folder / "sources.json") for split in ("train", "test")}


@pytest.fixture
def backbone_config() -> dict:
    return dict(BACKBONE)
