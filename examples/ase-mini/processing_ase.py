"""Processor and data collator of ASE-MLLM: the base model's own processor, aesthetic prompts, maps and scores."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.modeling_outputs import ModelOutput
from transformers.utils import PROCESSOR_NAME


# What to ask for; the wordings are this project's own.
AESTHETIC_PROMPTS = {
    "critique": "Critique this photograph: what is good, what is wrong, what would help?",
    "light": "Critique the light and exposure of this photograph.",
    "colour": "Critique the colours of this photograph.",
    "composition": "Critique the composition of this photograph.",
    "focus": "Critique the focus and depth of field of this photograph.",
}

# From dark violet over red to yellow, at equal steps: readable on photographs and in greyscale.
HEAT_COLOURS = np.array([[40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39]])


class ASEProcessor(ProcessorMixin):
    """
    Wraps the processor of the base model, which prepares images and text exactly as before.

    Args:
        base_processor: The base model's processor. It is saved at the folder's root, its class by name.
        aspect_names: Names of the model's aspect logits, in order.
    """

    def __init__(self, base_processor: ProcessorMixin, aspect_names: list[str] | tuple[str, ...] = ()):
        self.base_processor = base_processor
        self.aspect_names = list(aspect_names)

    def __getattr__(self, name: str) -> Any:
        # tokenizer, image_processor, image_token, ...; the guard keeps copy and pickle from recursing
        if name == "base_processor":
            raise AttributeError(name)
        return getattr(self.base_processor, name)

    def __setattr__(self, name: str, value: Any):
        # a new tokenizer or image token is the base's, which works with its own
        if name in ("base_processor", "aspect_names") or hasattr(type(self), name):
            super().__setattr__(name, value)
        else:
            setattr(self.base_processor, name, value)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs) -> BatchFeature:
        """The base processor's call; transformers looks for these two names."""
        return self.base_processor(images=images, text=text, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(aspect_names={self.aspect_names}, base_processor={self.base_processor!r})"

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        return self.base_processor.chat_template

    @chat_template.setter
    def chat_template(self, template: str | dict[str, str] | None):
        self.base_processor.chat_template = template

    @property
    def model_input_names(self) -> list[str]:
        return self.base_processor.model_input_names

    @property
    def unused_input_names(self) -> list[str]:
        return self.base_processor.unused_input_names

    def apply_chat_template(self, *args, **kwargs) -> Any:
        return self.base_processor.apply_chat_template(*args, **kwargs)

    def batch_decode(self, *args, **kwargs) -> list[str]:
        return self.base_processor.batch_decode(*args, **kwargs)

    def decode(self, *args, **kwargs) -> str:
        return self.base_processor.decode(*args, **kwargs)

    def post_process_image_text_to_text(self, *args, **kwargs) -> list[str]:
        return self.base_processor.post_process_image_text_to_text(*args, **kwargs)

    def _get_num_multimodal_tokens(self, *args, **kwargs) -> Any:
        return self.base_processor._get_num_multimodal_tokens(*args, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.base_processor.to_dict(),
            "processor_class": type(self).__name__,
            "base_processor_class": type(self.base_processor).__name__,
            "aspect_names": self.aspect_names,
        }

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Saves the base processor's files, this class's name and its code, so that the folder loads anywhere."""
        files = self.base_processor.save_pretrained(save_directory, **kwargs)
        custom_object_save(self, save_directory)
        settings = {**self.to_dict(), "auto_map": {"AutoProcessor": f"processing_ase.{type(self).__name__}"}}
        path = Path(save_directory) / PROCESSOR_NAME
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved.update({name: settings[name] for name in settings if name not in saved or name == "processor_class"})
        path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return files

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> "ASEProcessor":
        """
        Loads a saved `ASEProcessor`, or wraps the processor of a base model's folder or Hub id.

        Raises:
            ValueError: if the named class is not one of transformers.
        """
        settings, _ = ProcessorMixin.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        aspect_names = kwargs.pop("aspect_names", settings.get("aspect_names", ()))
        name = settings.get("base_processor_class")
        if name is None:  # the folder of a base model
            base = transformers.AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            return cls(base, aspect_names)
        base_class = getattr(transformers, name, None)
        if base_class is None:
            raise ValueError(
                f"`base_processor_class` {name!r} of {pretrained_model_name_or_path} is not in transformers."
            )
        # NOTE: never AutoProcessor here, it would find this class again
        return cls(base_class.from_pretrained(pretrained_model_name_or_path, **kwargs), aspect_names)

    # Aesthetic prompts and outputs -----------------------------------------------------------------------------------

    def critique_prompt(self, aspect: str = "critique") -> str:
        """
        The prompt for one image: a key of `AESTHETIC_PROMPTS` or a wording of your own, in the chat template if any.
        """
        text = AESTHETIC_PROMPTS.get(aspect, aspect)
        if self.chat_template is None:
            return f"{self.image_token}\n{text}\n"
        message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
        prompt = self.apply_chat_template([message], add_generation_prompt=True)
        # most tokenizers begin every text with this token themselves; it must not stand there twice
        begin = self.tokenizer("")["input_ids"][:1]
        return prompt.removeprefix(self.tokenizer.bos_token) if begin == [self.tokenizer.bos_token_id] else prompt

    def post_process_saliency(
        self, outputs: ModelOutput, target_sizes: list[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """
        Saliency maps for looking at: one `(height, width)` tensor an image in 0..1, the most salient place 1.

        Args:
            outputs: Anything with `saliency_maps` (and `saliency_map_sizes`, where they differ): a forward's or
                `get_image_features`' output.
            target_sizes: `(height, width)` of each photograph; each map's own size by default.
        """
        maps = outputs.saliency_maps.detach().float()
        if (sizes := outputs.get("saliency_map_sizes")) is not None:
            maps = [one[:height, :width] for one, (height, width) in zip(maps, sizes.tolist())]
        if target_sizes is not None and len(target_sizes) != len(maps):
            raise ValueError(f"`target_sizes` has {len(target_sizes)} sizes for {len(maps)} saliency maps.")
        heat = []
        for i, saliency_map in enumerate(maps):
            if target_sizes is not None:
                size = tuple(int(side) for side in target_sizes[i])
                saliency_map = F.interpolate(saliency_map[None, None], size=size, mode="bilinear")[0, 0]
            heat.append(saliency_map / saliency_map.max())
        return heat

    def overlay_saliency(self, image: Image.Image, heat: torch.Tensor, opacity: float = 0.65) -> Image.Image:
        """The photograph with its heat map `(height, width)` in 0..1 laid over it; cold places stay as they are."""
        photo = np.asarray(image.convert("RGB"), dtype=np.float32)
        values = heat.float().cpu().numpy()
        if values.shape != photo.shape[:2]:
            raise ValueError(f"The heat map is {values.shape}, the photograph {photo.shape[:2]} (height, width).")
        steps = np.linspace(0, 1, len(HEAT_COLOURS))
        colours = np.stack([np.interp(values, steps, HEAT_COLOURS[:, channel]) for channel in range(3)], axis=-1)
        alpha = (opacity * np.sqrt(values))[..., None]
        return Image.fromarray((photo * (1 - alpha) + colours * alpha).round().astype(np.uint8))

    def post_process_scores(self, outputs: ModelOutput) -> list[dict[str, float]]:
        """Mean and standard deviation of each image's rating distribution, on the scale 1 (worst) to 10 (best)."""
        shares = outputs.score_logits.float().softmax(-1)
        ratings = torch.arange(1, shares.shape[-1] + 1, device=shares.device, dtype=shares.dtype)
        means = (shares * ratings).sum(-1)
        deviations = ((shares * (ratings - means.unsqueeze(-1)).square()).sum(-1)).sqrt()
        return [{"mean": mean, "std": std} for mean, std in zip(means.tolist(), deviations.tolist())]

    def post_process_aspects(self, outputs: ModelOutput) -> list[dict[str, float]]:
        """Probability of each named aspect, one dictionary an image; empty if the model has no aspect head."""
        if outputs.get("aspect_logits") is None:
            return [{} for _ in outputs.saliency_maps]
        probabilities = outputs.aspect_logits.float().sigmoid().tolist()
        if len(self.aspect_names) != len(probabilities[0]):
            raise ValueError(
                f"The model has {len(probabilities[0])} aspects, the processor names {len(self.aspect_names)}: "
                "pass `aspect_names` to the processor."
            )
        return [dict(zip(self.aspect_names, row)) for row in probabilities]


@dataclass
class ASEDataCollator:
    """
    Makes training batches of examples with an `image` (or `images`) and a `caption`.

    Optional columns: `prompt` (text with image placeholders; the critique prompt by default), `rating` (ten shares of
    the ratings 1 to 10), `saliency` (a map `(h, w)`), `aspect_labels` (0..1 each, negative unknown) and
    `caption_weight`. Examples without them are marked as such, so that they add nothing to that term of the loss.

    Args:
        processor: The model's processor.
        max_length: Longest sequence in tokens. Longer captions are cut; a prompt that leaves no room is an error.
    """

    processor: ASEProcessor
    max_length: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> BatchFeature:
        images = [example["images"] if "images" in example else [example["image"]] for example in examples]
        images = [[image.convert("RGB") for image in group] for group in images]
        prompts = [example.get("prompt") or self.processor.critique_prompt() for example in examples]
        batch = self.processor(images=images, text=prompts, padding=True, return_tensors="pt")
        self._append_captions(batch, [example["caption"] for example in examples])
        counts = [len(group) for group in images]
        for column, name in (
            ("rating", "rating_targets"),
            ("saliency", "saliency_targets"),
            ("aspect_labels", "aspect_targets"),
        ):
            if (targets := _stack([example.get(column) for example in examples], column)) is not None:
                batch[name] = targets.repeat_interleave(torch.tensor(counts), dim=0)
        if any(example.get("caption_weight") is not None for example in examples):
            weights = [example.get("caption_weight") for example in examples]
            batch["caption_weights"] = torch.tensor([1.0 if weight is None else weight for weight in weights])
        return batch

    def _append_captions(self, batch: BatchFeature, captions: list[str]):
        """Joins prompt and caption as tokens, as generation does, and puts labels on the caption alone."""
        tokenizer = self.processor.tokenizer
        kept = batch.pop("attention_mask").bool()
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.pop("input_ids"), kept)]
        answers = tokenizer(captions, add_special_tokens=False)["input_ids"]
        rows, labels = [], []
        for prompt, answer in zip(prompts, answers):
            answer = answer + [tokenizer.eos_token_id]
            if self.max_length is not None:
                room = self.max_length - len(prompt)
                if room < 1:
                    raise ValueError(
                        f"The prompt has {len(prompt)} tokens, no room for a caption in {self.max_length}."
                    )
                answer = answer[:room]
            rows.append(prompt + answer)
            labels.append([-100] * len(prompt) + answer)
        length = max(map(len, rows))
        batch["input_ids"] = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
        batch["labels"] = torch.tensor([row + [-100] * (length - len(row)) for row in labels])
        batch["attention_mask"] = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        for name in ("token_type_ids", "mm_token_type_ids"):  # of the prompt; captions are text, type 0
            if name in batch:
                types = [types[mask].tolist() for types, mask in zip(batch[name], kept)]
                batch[name] = torch.tensor([row + [0] * (length - len(row)) for row in types])


def _stack(values: list[Any], column: str) -> torch.Tensor | None:
    """Stacks what is there; missing rows become zeros (no truth), missing aspects -1 (unknown)."""
    given = [torch.as_tensor(np.asarray(value), dtype=torch.float32) for value in values if value is not None]
    if not given:
        return None
    shapes = {tuple(value.shape) for value in given}
    if len(shapes) > 1:
        raise ValueError(f"Column `{column}` has different shapes in one batch: {sorted(shapes)}.")
    missing = torch.full_like(given[0], -1.0 if column == "aspect_labels" else 0.0)
    rows = iter(given)
    return torch.stack([missing if value is None else next(rows) for value in values])


__all__ = ["ASEDataCollator", "ASEProcessor"]
