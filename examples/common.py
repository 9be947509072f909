"""What several of these scripts do: take a caption apart, write captions, give the gates a rate, fill in a file."""

import re
import unicodedata
from pathlib import Path
from typing import Any

import torch


BUDGETS = (0.5, 0.25, 0.11)  # shares of the image tokens within which models are measured
# Stems that tell which topic a text speaks of
TOPIC_STEMS = {
    "light": r"light|lit\b|expos|overexpos|underexpos|shadow|bright|dark|contrast|vignett",
    "colour": r"colou?r|saturat|white balance|tones?\b|hue|tint|vivid",
    "composition": r"compos|fram|crop|horizon|tilt|level|cent(re|er)|thirds|plac|corner|edge|(fore|back)ground",
    "focus": r"focus|sharp|blur|depth of field|bokeh",
}


def words(text: str) -> list[str]:
    """Lower-case words without punctuation: the one way in which captions are taken apart."""
    # NOTE: composed first, or an é of two characters would end its word ("caf")
    return re.findall(r"[\w'-]+", unicodedata.normalize("NFC", text).lower())


def topics_of(text: str) -> set[str]:
    return {topic for topic, stems in TOPIC_STEMS.items() if re.search(rf"\b({stems})", text.lower())}


def write_captions(model: Any, processor: Any, inputs: dict[str, Any], **options: Any) -> tuple[list[str], Any]:
    """What is generated after each prompt, on one line, and all that `generate()` returns."""
    output = model.generate(**inputs, do_sample=False, return_dict_in_generate=True, **options)
    # an encoder's prompt does not stand before what its decoder writes
    prompt = 0 if model.config.get_text_config().is_encoder_decoder else inputs["input_ids"].shape[1]
    answers = output.sequences[:, prompt:]
    texts = processor.batch_decode(answers, skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts], output


@torch.inference_mode()
def critique(
    model: Any,
    processor: Any,
    images: list,
    sizes: list[tuple[int, int]],
    questions: list[str] | None = None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Caption, score, aspects and heat map, in 0..1 at `(height, width)` of `sizes`, of each image by an ASE model."""
    prompts = [processor.critique_prompt(one) for one in questions or ["critique"] * len(images)]
    # nested: some processors (Gemma 3, Mllama) take a flat list for the photographs of one prompt
    nested = [[image] for image in images]
    inputs = processor(images=nested, text=prompts, padding=True, return_tensors="pt")
    captions, output = write_captions(model, processor, inputs.to(model.device, dtype=model.dtype), **options)
    columns = {
        "caption": captions,
        "score": processor.post_process_scores(output),
        "aspects": processor.post_process_aspects(output) or [{} for _ in images],
        "heat": processor.post_process_saliency(output, target_sizes=sizes),
    }
    return [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)]


def set_gate_rate(optimizer: torch.optim.Optimizer, model: torch.nn.Module, rate: float):
    """Moves the gates to a group of their own, without decay: at the rate of the others they hardly open."""
    gates = [p for name, p in model.named_parameters() if re.search(r"\bfusions\..*gate$", name) and p.requires_grad]
    ids = set(map(id, gates))
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in ids]
    optimizer.add_param_group({"params": gates, "lr": rate, "weight_decay": 0.0})


def write_between(path: Path, begin: str, end: str, text: str):
    """Replaces what stands between two marks of a Markdown file."""
    old = path.read_text(encoding="utf-8")
    new, found = re.subn(
        f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: f"{begin}\n{text.rstrip()}\n{end}", old, flags=re.DOTALL
    )
    if not found:
        raise ValueError(f"{path} has no lines {begin!r} and {end!r} to write between.")
    path.write_text(new, encoding="utf-8")
