"""Training batches and prompts by the processors of bases that differ: types of tokens, masks, places of the photograph."""

import pytest
import torch
from common import critique
from conftest import ASPECTS, WORDS, graft, training_examples, with_noise
from families import FAMILIES
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    Blip2Processor,
    BlipImageProcessor,
    CLIPImageProcessor,
    Florence2Processor,
    Gemma3ImageProcessor,
    Gemma3Processor,
    MllamaImageProcessor,
    MllamaProcessor,
    PaliGemmaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
)

from ase_mllm import ASEDataCollator, ASEProcessor


# of PaliGemma's processor, which makes an array of tensors
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SIDES = {"height": 32, "width": 32}
WRITTEN = {"max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": list(range(5))}  # four words, none special


def tokenizer(words: list[str] = WORDS, **special: str) -> PreTrainedTokenizerFast:
    words = [*words, *(f"word{i}" for i in range(len(words), 99))]  # as many as the models have
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words_only,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=special,
    )


def paligemma() -> PaliGemmaProcessor:
    images = SiglipImageProcessor(size=SIDES)
    images.image_seq_length = 16
    words = tokenizer(image_token="<image>")
    words.add_bos_token = True  # the processor sets it to False, and it must be there
    return PaliGemmaProcessor(images, words)


def gemma3() -> Gemma3Processor:
    words = [*WORDS[:10], "<boi>", "<eoi>", *WORDS[12:]]
    special = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
    length = FAMILIES["gemma3"].config().mm_tokens_per_image
    return Gemma3Processor(Gemma3ImageProcessor(size=SIDES), tokenizer(words, **special), image_seq_length=length)


def mllama() -> MllamaProcessor:
    words = ["<|image|>" if word == "<image>" else word for word in WORDS]
    return MllamaProcessor(MllamaImageProcessor(size=SIDES, max_image_tiles=4), tokenizer([*words, "<|python_tag|>"]))


def blip2() -> Blip2Processor:
    number = FAMILIES["blip-2"].config().num_query_tokens
    return Blip2Processor(BlipImageProcessor(size=SIDES), tokenizer(), num_query_tokens=number)


def florence2() -> Florence2Processor:
    images = CLIPImageProcessor(size=SIDES, crop_size=SIDES, do_center_crop=False)
    images.image_seq_length = 17
    return Florence2Processor(images, tokenizer(image_token="<image>"))


PROCESSORS = {"paligemma": paligemma, "gemma3": gemma3, "mllama": mllama, "blip-2": blip2, "florence2": florence2}
DECODERS = [name for name in PROCESSORS if name != "florence2"]


def make(family: str) -> tuple[PreTrainedModel, ASEProcessor]:
    torch.manual_seed(0)
    base = with_noise(AutoModelForImageTextToText.from_config(FAMILIES[family].config()))
    return graft(base).eval(), ASEProcessor(PROCESSORS[family](), aspect_names=ASPECTS)


def examples() -> list[dict]:
    """Captions of different lengths, so that rows are padded."""
    captions = ["good , blurred .", "wrong", "what is good ?"]
    return [{**row, "caption": caption} for row, caption in zip(training_examples(False), captions)]


def collate(processor: ASEProcessor, rows: list[dict], **options) -> dict[str, torch.Tensor]:
    return ASEDataCollator(processor, **options)(rows)


@pytest.mark.parametrize("family", DECODERS)
def test_a_caption_is_not_shown_what_comes_next(family):
    model, processor = make(family)
    batch = collate(processor, examples())
    changed = {name: values.clone() for name, values in batch.items()}
    places = (batch["labels"][2] != -100).nonzero()[:, 0]
    first, last = places[0].item(), places[-2].item()
    assert last - first >= 2
    changed["input_ids"][2, last] = 18 if batch["input_ids"][2, last] != 18 else 17
    with torch.inference_mode():
        before, after = model(**batch).logits[2], model(**changed).logits[2]
    assert torch.equal(before[first - 1 : last], after[first - 1 : last])
    assert (before[last] - after[last]).abs().max() > 0.1


@pytest.mark.parametrize("family", DECODERS)
def test_a_caption_is_as_likely_in_a_batch_as_alone(family):
    """What stands beside the tokens is where they are, with prompts that are padded on the left by the processor."""
    model, processor = make(family)
    place = "" if family == "blip-2" else processor.image_token
    rows = [
        {**row, "prompt": f"{place} {text}"} for row, text in zip(examples(), ("what is good ?", "what", "what is"))
    ]
    batch = collate(processor, rows)
    with torch.inference_mode():
        together = model(**batch).logits
        for i, row in enumerate(rows):
            one = collate(processor, [row])
            alone, length = model(**one).logits[0], one["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][i, :length], one["input_ids"][0])
            torch.testing.assert_close(together[i, :length], alone, atol=1e-4, rtol=1e-4)


def test_an_encoder_is_not_shown_the_caption_and_the_decoder_writes_it():
    model, processor = make("florence2")
    rows = examples()
    batch = collate(processor, rows, encoder_decoder=True)
    answers = [processor.tokenizer(row["caption"])["input_ids"] + [processor.tokenizer.eos_token_id] for row in rows]
    assert [[i for i in row if i != -100] for row in batch["labels"].tolist()] == answers
    prompt = processor(images=rows[0]["image"], text=processor.critique_prompt(), return_tensors="pt")
    assert all(torch.equal(row, prompt["input_ids"][0]) for row in batch["input_ids"])
    plain, weighted = model(**batch), model(**batch, caption_weights=torch.ones(3))
    torch.testing.assert_close(plain.loss, weighted.loss)
    likely = plain.logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0).unsqueeze(-1))[..., 0]
    torch.testing.assert_close(plain.loss, -likely[batch["labels"] != -100].mean())
    alone = model(**batch, caption_weights=torch.tensor([0.0, 1.0, 0.0])).loss * (batch["labels"] != -100).sum()
    torch.testing.assert_close(alone, -likely[1][batch["labels"][1] != -100].sum())
    short = collate(processor, rows, encoder_decoder=True, max_length=3, max_caption_length=2)
    assert short["labels"].shape[1] == 2
    assert collate(processor, rows, encoder_decoder=True, max_length=3)["labels"].shape[1] == 3
    with pytest.raises(ValueError, match=r"florence2 reads prompts in an encoder.*encoder_decoder=True"):
        model(**collate(processor, rows))


@pytest.mark.parametrize("family", PROCESSORS)
def test_the_default_prompt_has_a_place_for_the_photograph_and_critiques_are_what_is_written(family):
    model, processor = make(family)
    photos = [row["image"] for row in examples()[:2]]
    sizes = [photo.size[::-1] for photo in photos]
    answers = critique(model, processor, photos, sizes, **WRITTEN)
    asked = "photograph"
    for photo, size, answer in zip(photos, sizes, answers):
        assert 1 <= len(answer["caption"].split()) <= 4 and asked not in answer["caption"]
        assert critique(model, processor, [photo], [size], **WRITTEN)[0]["caption"] == (answer["caption"])


def test_kept_image_tokens_are_found_where_the_processor_names_another_token():
    model, processor = make("gemma3")
    image = Image.new("RGB", (40, 30), "gray")
    inputs = processor(images=image, text=processor.critique_prompt(), return_tensors="pt")
    outputs = model.generate(**inputs, max_new_tokens=2, image_token_budget=0.5, return_dict_in_generate=True)
    (kept,) = processor.post_process_image_tokens(outputs, inputs["input_ids"])
    assert kept.shape == (2, 2) and kept.sum() == 2
