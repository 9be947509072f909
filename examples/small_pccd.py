"""
A small data set in PCCD's form, made of the bundled photographs, and a tiny base, to try the field's whole procedure offline.

    python examples/small_pccd.py runs/small     # writes runs/small/pccd and runs/small/base, in seconds

Each picture is a piece of one of twelve photographs with light, colour and sharpness as they are or worse; its critiques
say which, in words that vary as people's do, and its scores are lower. Pieces of a photograph are all of one split. What a
model makes of it says that the procedure works, and nothing about photographs.
"""

import argparse
import json
import random
from pathlib import Path

import torch
from picture_edits import expose
from PIL import Image, ImageEnhance, ImageFilter
from readers.pccd import TOPICS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)


PHOTOS = Path(__file__).with_name("photos")
SPLITS = {"train": (8, 240), "validation": (1, 24), "test": (3, 60)}  # photographs, pieces of them
SIDE, PATCH = 64, 8  # pixels
FAULTS = {  # by topic: what is said of a piece without a fault, and of one with
    "color_lighting": {
        "fine": ["The light is soft and even.", "Soft light, and the colours glow.", "I like the even light."],
        "dark": ["The picture is too dark.", "Too dark for me; lift the shadows.", "The shadows swallow everything."],
        "bright": ["The sky is far too bright.", "Overexposed; hold the light back.", "The whites are burnt out."],
        "dull": ["The colours are dull.", "Dull colours; add some life.", "A grey veil lies over the colours."],
    },
    "focus": {
        "fine": ["The focus is sharp.", "Sharp where it matters.", "Crisp detail throughout."],
        "blurred": ["The picture is blurred.", "Not sharp; use a faster shutter.", "The focus is soft all over."],
    },
}
COMPOSITION = [
    "The frame is calm.",
    "A little tight at the edges.",
    "I would crop the left side.",
]  # of no picture in particular
IMPRESSIONS = {
    0: ["A strong photograph.", "Lovely work.", "I would hang this on a wall."],
    1: ["Nice, with one weakness.", "Good, but it could be better.", "Almost there."],
    2: ["It does not work for me.", "Two things spoil it.", "Try again on another day."],
}


def spoil(piece: Image.Image, light: str, focus: str) -> Image.Image:
    if light in ("dark", "bright"):
        piece = expose(piece, -2 if light == "dark" else 1.7)
    elif light == "dull":
        piece = ImageEnhance.Color(piece).enhance(0.15)
    return piece.filter(ImageFilter.GaussianBlur(3)) if focus == "blurred" else piece


def write_entry(rng: random.Random, name: str, light: str, focus: str) -> dict:
    """What PCCD holds of one photograph: texts and seven scores, of which a few are absent."""
    faults = (light != "fine") + (focus != "fine")
    texts = {
        "general_impression": rng.choice(IMPRESSIONS[faults]),
        "composition": rng.choice(COMPOSITION),
        "color_lighting": rng.choice(FAULTS["color_lighting"][light]),
        "focus": rng.choice(FAULTS["focus"][focus]),
    }
    means = {"color_lighting": 8 if light == "fine" else 5, "focus": 8 if focus == "fine" else 5}
    scores = [str(round(rng.gauss(means.get(topic, 8 - 1.5 * faults), 0.4) * 2) / 2) for topic in TOPICS]
    scores = ["N" if rng.random() < 0.05 else score for score in scores]
    overall = f"{rng.gauss(7.5 - 2.4 * faults, 0.4):.1f}"
    return {
        "title": name,
        "description": "",
        "overall": overall,
        "score": scores,
        **dict.fromkeys(TOPICS, ""),
        **texts,
    }


def write_data(folder: Path, seed: int = 0):
    rng, photos = random.Random(seed), sorted(PHOTOS.glob("*.jpg"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng.shuffle(photos)
    for split, (number, pieces) in SPLITS.items():
        mine, photos, entries = photos[:number], photos[number:], []
        for i in range(pieces):
            with Image.open(mine[i % number]) as photo:
                side = rng.randint(160, 240)
                left, top = (rng.randint(0, length - side) for length in photo.size)
                piece = photo.convert("RGB").crop((left, top, left + side, top + side)).resize((128, 128))
            light, focus = (rng.choice(["fine", *FAULTS[topic]]) for topic in FAULTS)
            name = f"{mine[i % number].stem}_{i:03d}.jpg"
            spoil(piece, light, focus).save(folder / "images" / name, quality=92)
            entries.append(write_entry(rng, name, light, focus))
        (folder / f"guru_{split}.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")


def write_base(folder: Path, texts: list[str], seed: int = 0):
    """A LLaVA of random weights with a tokenizer of the words in `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    names, alphabet = [*special.values(), "<image>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=names, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **special, extra_special_tokens={"image_token": "<image>"}, padding_side="left"
    )
    shape = {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**shape, num_hidden_layers=4, image_size=SIDE, patch_size=PATCH)
    text = LlamaConfig(
        **shape, num_hidden_layers=2, vocab_size=len(fast), pad_token_id=0, bos_token_id=1, eos_token_id=2
    )
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3, vision_feature_layer=-1)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, do_center_crop=False),
        fast,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)


def write_small(folder: Path) -> tuple[Path, Path]:
    """The folders of the data and of the base below `folder`."""
    data, base = folder / "pccd", folder / "base"
    write_data(data)
    entries = json.loads((data / "guru_train.json").read_text(encoding="utf-8"))
    write_base(base, [entry[topic] for entry in entries for topic in TOPICS])
    return data, base


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the data and the base go")
    print(*write_small(parser.parse_args(argv).folder))


if __name__ == "__main__":
    main()
