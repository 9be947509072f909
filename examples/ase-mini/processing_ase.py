"""Processor and data collator of ASE-MLLM: the base model's own processor, aesthetic prompts, maps and scores."""

import base64
import difflib
import functools
import json
import os
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import ExifTags, Image, ImageCms, ImageFilter, ImageOps
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, ProcessorMixin
from transformers.dynamic_module_utils import custom_object_save
from transformers.image_processing_base import ImageProcessingMixin
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

DOWNLOAD_SECONDS = 60  # that an address may take

# These put the places of a photograph before the prompt themselves; one that stands in it would be one too many
_PLACES_IMAGES_ITSELF = ("Blip2Processor", "InstructBlipProcessor", "Florence2Processor")

ASKED_SIDE = 2048  # pixels; a larger picture takes seconds to ask a processor what it leaves of a photograph

# From dark violet over red to yellow, at equal steps: readable on photographs and in greyscale.
HEAT_COLOURS = np.array([[40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39]])


# The collator's columns that need not be there, and the numbers they take; a negative aspect is unknown.
OPTIONAL_COLUMNS = {
    "score": (0, float("inf")),
    "saliency": (0, float("inf")),
    "aspect_labels": (float("-inf"), 1),
    "caption_weight": (0, float("inf")),
}

# Photographs ----------------------------------------------------------------------------------------------------------


def read_photograph(photo: str | os.PathLike | bytes | Image.Image, longest_side: int | None = None) -> Image.Image:
    """
    A photograph as people see it: upright, sRGB, 8 bits a colour, what is transparent over white.

    Everything of this package that looks at photographs reads them so. A plain `convert("RGB")` makes 16 bits white or
    black, shows what transparency hides, and takes wide colours for pale ones. These are known by their profile, or by
    the mark that cameras set for Adobe RGB.

    Args:
        photo: A file's path or content, or an opened image.
        longest_side: Larger photographs are reduced to it, in pixels.

    Raises:
        OSError: of Pillow, if it is no picture or cut short.
        ReducedCopyError: an `OSError` too, if only a small copy of the photograph can be seen, as in raw files.
    """
    if isinstance(photo, bytes):
        photo = BytesIO(photo)
    if not isinstance(photo, Image.Image):
        with Image.open(photo) as opened:
            if longest_side is not None:
                opened.draft("RGB", (longest_side, longest_side))  # a large JPEG is decoded small
            return read_photograph(opened, longest_side)
    _refuse_reduced_copy(photo)
    profile, wide = photo.info.get("icc_profile"), _says_adobe_rgb(photo)
    image = _upright(photo)
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
        image = _to_eight_bits(image)
        # where white is 0, which Pillow heeds in 8 bits only
        if isinstance(photo, TiffImageFile) and photo.tag_v2.get(262) == 0:
            image = ImageOps.invert(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    elif image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if longest_side is not None and max(image.size) > longest_side:
        image = image.copy()  # the caller's stays as it is
        image.thumbnail((longest_side, longest_side))
    if profile:
        try:
            source, srgb = ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB")
            image = ImageCms.profileToProfile(image, source, srgb, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError):
            pass  # a broken profile, or one of another mode: the plain colours are the best guess
    elif wide and image.mode == "RGB":
        image = image.filter(_adobe_rgb_to_srgb())
    image = image.convert("RGB")
    for said in ("icc_profile", "exif"):  # of the colours that are no more: read again, it would be done twice
        image.info.pop(said, None)
    return image


class ReducedCopyError(OSError):
    """A file in which Pillow sees no more than a small copy of the photograph, as in most cameras' raw files."""


def _refuse_reduced_copy(photo: Image.Image):
    if not isinstance(photo, TiffImageFile):
        return
    tags, (width, height) = photo.tag_v2, photo.size
    larger = [size for size in _sub_image_sizes(photo) if size[0] * size[1] > width * height]
    reduced = tags.get(254, 0) & 1 or tags.get(255) == 2  # NewSubfileType, SubfileType
    if reduced or larger or 50706 in tags:  # DNGVersion
        raise ReducedCopyError(
            f"a camera's raw file or a reduced copy, of which only a preview of {width} × {height} pixels can be seen "
            "here: export the photograph as JPEG or TIFF, or use a raw reader (caption_photos.py has one: pip install "
            "rawpy)"
        )


def _sub_image_sizes(photo: TiffImageFile) -> list[tuple[int, int]]:
    """Width and height of the images that a TIFF keeps below its first one."""
    offsets = photo.tag_v2.get(330, ())  # SubIFDs
    if photo.fp is None:  # read already
        return []
    place, sizes = photo.fp.tell(), []
    for offset in (offsets,) if isinstance(offsets, int) else offsets:
        tags = ImageFileDirectory_v2(b"II*\0\0\0\0\0" if photo.tag_v2.prefix == b"II" else b"MM\0*\0\0\0\0")
        try:
            photo.fp.seek(offset)
            tags.load(photo.fp)
            sizes.append((int(tags.get(256, 0)), int(tags.get(257, 0))))
        except Exception:  # Pillow raises nearly anything on damaged tags, and these are no part of the picture
            continue
    photo.fp.seek(place)
    return sizes


def _upright(photo: Image.Image) -> Image.Image:
    photo.load()  # NOTE: outside of the guard, what is cut short must be an error
    try:
        return ImageOps.exif_transpose(photo)
    except Exception:  # Pillow raises nearly anything on broken EXIF, which must not cost a good photograph
        return photo.copy()


def _says_adobe_rgb(photo: Image.Image) -> bool:
    """Whether its EXIF has the mark by which cameras say Adobe RGB without a profile."""
    try:
        return photo.getexif().get_ifd(ExifTags.IFD.Interop).get(1, "").strip("\0 ") == "R03"
    except Exception:  # Pillow raises nearly anything on broken EXIF
        return False


@functools.cache
def _adobe_rgb_to_srgb() -> ImageFilter.Color3DLUT:
    """A table of colours: linear light by Adobe's curve, its primaries in sRGB's, and sRGB's curve again."""
    matrix = np.array([[1.39836, -0.39836, 0], [0, 1, 0], [0, -0.04293, 1.04293]])

    def convert(*rgb: float) -> tuple[float, ...]:
        linear = (matrix @ np.power(rgb, 563 / 256)).clip(0, 1)
        return tuple(np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055))

    return ImageFilter.Color3DLUT.generate(33, convert)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """
    Greyscale of 16 or 32 bits or of floating point: full white is what its numbers reach for.

    A few numbers that are none, infinite or far above the others (hot pixels, sparkling light) do not darken the rest.
    """
    values = np.asarray(image, dtype=np.float32)
    finite = values[np.isfinite(values)]
    whites = [1, 255, 65535] if image.mode == "F" else [255, 65535]
    brightest = float(np.percentile(finite, 99.9, method="higher")) if finite.size else 0.0
    white = 65535 if image.mode.startswith("I;16") else next((w for w in whites if brightest <= w), brightest)
    values = np.nan_to_num(values, posinf=white, neginf=0).clip(0, white)
    return Image.fromarray((values / white * 255).round().astype(np.uint8))


def image_normalisation(name_or_path: str, **kwargs: Any) -> dict[str, list[float]]:
    """Mean and standard deviation of a checkpoint's image processor, or nothing where it has none."""
    hub = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(
            name_or_path, **{name: kwargs[name] for name in hub if name in kwargs}
        )
    except OSError:
        return {}
    if settings.get("do_normalize") is False:
        return {"image_mean": [0.0, 0.0, 0.0], "image_std": [1.0, 1.0, 1.0]}
    return {name: settings[name] for name in ("image_mean", "image_std") if settings.get(name) is not None}


def _read_images(images: Any) -> Any:
    """Photographs in whatever nesting, read; what is none (tensors) stays as it is."""
    if isinstance(images, (list, tuple)):
        return [_read_images(image) for image in images]
    if isinstance(images, str) and images.startswith("data:image/"):
        return read_photograph(base64.b64decode(images.partition(",")[2]))
    if isinstance(images, str) and images.startswith(("http://", "https://")):
        # NOTE: with a name, for some sites (Wikimedia's) refuse programs that have none
        with urlopen(Request(images, headers={"User-Agent": "ase-mllm"}), timeout=DOWNLOAD_SECONDS) as response:
            return read_photograph(response.read())
    if isinstance(images, Image.Image) or (isinstance(images, (str, os.PathLike)) and os.path.isfile(images)):
        return read_photograph(images)
    return images


def _read_conversation(conversation: Any) -> Any:
    """A conversation, or several, with the photographs in it read."""
    if isinstance(conversation, (list, tuple)):
        return [_read_conversation(part) for part in conversation]
    if not isinstance(conversation, dict):
        return conversation
    if conversation.get("type") not in ("image", "image_url"):
        return {name: _read_conversation(v) if name == "content" else v for name, v in conversation.items()}
    given = {
        name: conversation[name] for name in ("image", "url", "path", "base64", "image_url") if name in conversation
    }
    for name, value in given.items():
        if isinstance(value, dict):  # as OpenAI's clients write it
            value = value.get("url")
        photo = read_photograph(base64.b64decode(value)) if name == "base64" else _read_images(value)
        if isinstance(photo, Image.Image):
            rest = {key: other for key, other in conversation.items() if key not in given}
            return {**rest, "type": "image", "image": photo}
    return conversation


class ASEProcessor(ProcessorMixin):
    """
    Wraps the processor of the base model, which prepares text and images; photographs go through `read_photograph` first.

    Args:
        base_processor: The base model's processor. It is saved at the folder's root, its class by name.
        aspect_names: Names of the model's aspect logits, in order.
    """

    def __init__(self, base_processor: ProcessorMixin, aspect_names: list[str] | tuple[str, ...] = ()):
        if isinstance(aspect_names, str) or not all(isinstance(name, str) for name in aspect_names):
            raise ValueError(f"`aspect_names` takes a list of names, got {aspect_names!r}.")
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
        return self.base_processor(images=_read_images(images), text=text, **kwargs)

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

    def apply_chat_template(self, conversation: list, *args, **kwargs) -> Any:
        return self.base_processor.apply_chat_template(_read_conversation(conversation), *args, **kwargs)

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
            ValueError: if the named class is no processor of transformers.
        """
        settings, _ = ProcessorMixin.get_processor_dict(pretrained_model_name_or_path, **kwargs)
        aspect_names = kwargs.pop("aspect_names", settings.get("aspect_names", ()))
        name = settings.get("base_processor_class")
        if name is None:  # the folder of a base model
            base = transformers.AutoProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs)
            return cls(base, aspect_names)
        base_class = getattr(transformers, name, None)
        if not (isinstance(base_class, type) and issubclass(base_class, ProcessorMixin)):
            raise ValueError(
                f"`base_processor_class` {name!r} of {pretrained_model_name_or_path} is no processor of transformers."
            )
        # NOTE: never AutoProcessor here, it would find this class again
        return cls(base_class.from_pretrained(pretrained_model_name_or_path, **kwargs), aspect_names)

    # Aesthetic prompts and outputs -----------------------------------------------------------------------------------

    def critique_prompt(self, topic: str = "critique") -> str:
        """The prompt for one image: a key of `AESTHETIC_PROMPTS` or a wording of your own, in the chat template if any."""
        text = AESTHETIC_PROMPTS.get(topic, topic)
        if type(self.base_processor).__name__ in _PLACES_IMAGES_ITSELF:
            return text
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
            outputs: Anything with `saliency_maps` (and `saliency_map_sizes`, where they differ): a forward's,
                `get_image_features`' or `generate(..., return_dict_in_generate=True)`'s output.
            target_sizes: `(height, width)` of each photograph; each map's own size by default. What the processor cuts
                away before the model sees it has heat 0.
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
                saliency_map = _place_map(saliency_map, self._seen_box(*size), size)
            heat.append(saliency_map / saliency_map.max())
        return heat

    def _seen_box(self, height: int, width: int) -> tuple[float, float, float, float]:
        """
        Which part of a photograph the model sees: top, left, bottom and right, in pixels of the photograph.

        Where the image processor crops or pads, it is asked: a picture whose colours tell their place goes through it.
        """
        whole = (0.0, 0.0, float(height), float(width))
        processor = self.image_processor
        if not (getattr(processor, "do_center_crop", False) or getattr(processor, "do_pad", False)):
            return whole
        reduce = max(1, max(height, width) / ASKED_SIDE if getattr(processor, "do_resize", False) else 1)
        asked = max(1, round(height / reduce)), max(1, round(width / reduce))
        y, x = np.mgrid[0 : asked[0], 0 : asked[1]]
        colours = np.stack([x / asked[1] * 200, y / asked[0] * 200, np.full_like(x, 255)], axis=-1)
        colours = colours.round().astype(np.uint8)
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        seen = processor(images=Image.fromarray(colours), **options)
        pixels = seen["pixel_values"]
        if set(seen) != {"pixel_values"} or pixels.ndim != 4 or len(pixels) != 1:
            return whole  # tiles, patches or masked padding: there the encoder's images are the photograph's own
        pixels = pixels[0].float().numpy()
        inside = pixels[2] > 250  # what is padded has another blue
        rows, columns = inside.any(1).nonzero()[0], inside.any(0).nonzero()[0]
        if len(rows) < 4 or len(columns) < 4:
            raise ValueError(
                f"{type(processor).__name__} leaves {len(rows)} rows and {len(columns)} columns of a photograph of "
                f"{height} x {width}: its saliency map has no place there. Leave `target_sizes` away."
            )
        edges = []
        for places, values, side, of, cells in (
            (rows, pixels[1][:, columns].mean(1)[rows], height, asked[0], pixels.shape[1]),
            (columns, pixels[0][rows].mean(0)[columns], width, asked[1], pixels.shape[2]),
        ):
            slope, start = np.polyfit(places[1:-1] + 0.5, (values[1:-1] / 200 * of + 0.5) * side / of, 1)
            edges.append((start, start + slope * cells))
        (top, bottom), (left, right) = edges
        return top, left, bottom, right

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

    def post_process_image_tokens(self, outputs: ModelOutput, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """
        Which image tokens a budget has kept: one boolean `(rows, columns)` an image of the encoder.

        `outputs` are a forward's or `generate(..., return_dict_in_generate=True)`'s within an `image_token_budget`, and
        `input_ids` its prompts `(batch, sequence)`.
        """
        if outputs.get("image_token_mask") is None:
            raise ValueError("These outputs are of no `image_token_budget`: every image token was kept.")
        mask, ids = outputs.image_token_mask, input_ids.to(outputs.image_token_mask.device)
        # NOTE: what is cut is an image token; the processor's own `image_token_id` is that of its beginning in Gemma 3
        image_token_id = self.image_token_id if mask.all() else ids[~mask][0]
        kept = mask[ids == image_token_id]
        grids = outputs.image_token_grids.tolist()
        return [one.view(*grid) for one, grid in zip(kept.split([rows * columns for rows, columns in grids]), grids)]

    def overlay_image_tokens(self, image: Image.Image, kept: torch.Tensor) -> Image.Image:
        """The photograph with the places dark whose tokens `(rows, columns)` the language model was not handed."""
        dark = Image.fromarray((~kept.cpu().numpy() * 190).astype(np.uint8))
        top, left, bottom, right = self._seen_box(image.height, image.width)
        seen = dark.resize((max(1, round(right - left)), max(1, round(bottom - top))), Image.Resampling.NEAREST)
        mask = Image.new("L", image.size, 190)
        mask.paste(seen, (round(left), round(top)))
        return Image.composite(Image.new("RGB", image.size), image.convert("RGB"), mask)

    def post_process_scores(self, outputs: ModelOutput) -> list[dict[str, float]]:
        """Mean and standard deviation of each image's distribution of scores, on the scale 1 (worst) to 10 (best)."""
        shares = outputs.score_logits.float().softmax(-1)
        scale = torch.arange(1, shares.shape[-1] + 1, device=shares.device, dtype=shares.dtype)
        means = (shares * scale).sum(-1)
        deviations = ((shares * (scale - means.unsqueeze(-1)).square()).sum(-1)).sqrt()
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

    Optional columns: `prompt` (text with image placeholders; the critique prompt by default), `score` (ten shares of
    the scores 1 to 10), `saliency` (a map `(h, w)`), `aspect_labels` (0..1 each, negative unknown) and
    `caption_weight`. Examples without them are marked as such, so that they add nothing to that term of the loss.

    Args:
        processor: The model's processor.
        max_length: Longest sequence in tokens. Longer captions are cut; a prompt that leaves no room is an error.
        max_caption_length: Longest caption in tokens, whatever its prompt. Longer ones are cut, and then do not end.
        encoder_decoder: The base reads the prompt in an encoder and writes the caption in a decoder (Florence-2, BLIP-2 with
            T5; `model.config.mllm_config.is_encoder_decoder`): labels are the caption alone.
    """

    processor: ASEProcessor
    max_length: int | None = None
    max_caption_length: int | None = None
    encoder_decoder: bool = False

    def __call__(self, examples: list[dict[str, Any]]) -> BatchFeature:
        for example in examples:
            self._check_columns(example)
        images = [
            _read_images(example["images"] if "images" in example else [example["image"]]) for example in examples
        ]
        prompts = [example.get("prompt") or self.processor.critique_prompt() for example in examples]
        # a batch of text alone has no images at all: some processors would make an empty tensor of none
        given = {"images": images} if any(images) else {}
        batch = self.processor(**given, text=prompts, padding=True, return_tensors="pt")
        captions = [example["caption"] for example in examples]
        if self.encoder_decoder:
            batch["labels"] = _pad_rows([answer[: self.max_length] for answer in self._answers(captions)], -100)
        else:
            self._append_captions(batch, captions)
        counts = torch.tensor([len(group) for group in images])
        for column, name in (
            ("score", "score_targets"),
            ("saliency", "saliency_targets"),
            ("aspect_labels", "aspect_targets"),
        ):
            targets = _stack([example.get(column) for example in examples], column)
            if targets is not None and any(images):
                batch[name] = targets.repeat_interleave(counts, dim=0)
        if "saliency_targets" in batch:
            sizes = [image.size[::-1] for group in images for image in group]
            boxes = [self.processor._seen_box(*size) for size in sizes]
            batch["saliency_targets"] = torch.stack(list(map(_cut_map, batch["saliency_targets"], boxes, sizes)))
        if any(example.get("caption_weight") is not None for example in examples):
            weights = [example.get("caption_weight") for example in examples]
            batch["caption_weights"] = torch.tensor([1.0 if weight is None else float(weight) for weight in weights])
            _check_range("caption_weight", batch["caption_weights"], 0)
        return batch

    def _check_columns(self, example: dict[str, Any]):
        """A column that is missing, misspelt or of another kind is an error: it would be taken for something else."""
        known = {"image", "images", "caption", "prompt", *OPTIONAL_COLUMNS}
        if "caption" not in example or not {"image", "images"} & set(example):
            raise ValueError(
                f"An example needs `caption` and `image` (or `images`), got {sorted(example)}. `Trainer` takes away what "
                "the model itself does not know: pass `TrainingArguments(..., remove_unused_columns=False)`."
            )
        if not isinstance(example["caption"], str):
            raise ValueError(f"Column `caption` takes one text an example, got {example['caption']!r}.")
        if example.get("image", example.get("images")) is None:
            raise ValueError("Column `image` is None: an example without a photograph has `images` [].")
        for name in set(example) - known:
            near = (
                ["score"]
                if name in ("rating", "ratings")
                else difflib.get_close_matches(name, OPTIONAL_COLUMNS, 1, 0.85)
            )
            if near and near[0] not in example:
                raise ValueError(f"Column `{name}` is not known: did you mean `{near[0]}`? Rename it or take it away.")

    def _answers(self, captions: list[str]) -> list[list[int]]:
        """Tokens of captions and of their end."""
        tokenizer = self.processor.tokenizer
        answers = tokenizer(captions, add_special_tokens=False)["input_ids"]
        return [(answer + [tokenizer.eos_token_id])[: self.max_caption_length] for answer in answers]

    def _append_captions(self, batch: BatchFeature, captions: list[str]):
        """Joins prompt and caption as tokens, as generation does, and puts labels on the caption alone."""
        kept = batch.pop("attention_mask").bool()
        prompts = [ids[mask].tolist() for ids, mask in zip(batch.pop("input_ids"), kept)]
        answers = self._answers(captions)
        if self.max_length is not None:
            longest = max(map(len, prompts))
            if longest >= self.max_length:
                raise ValueError(f"The prompt has {longest} tokens, no room for a caption in {self.max_length}.")
            answers = [answer[: self.max_length - len(prompt)] for prompt, answer in zip(prompts, answers)]
        rows = [prompt + answer for prompt, answer in zip(prompts, answers)]
        batch["input_ids"] = _pad_rows(rows, self.processor.tokenizer.pad_token_id)
        batch["labels"] = _pad_rows([[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers)], -100)
        batch["attention_mask"] = _pad_rows([[1] * len(row) for row in rows], 0)
        # of captions: they are text, type 0; but PaliGemma's type 0 is a prefix, all of whose tokens see each other
        types = {"token_type_ids": int(type(self.processor.base_processor).__name__ == "PaliGemmaProcessor")}
        types["mm_token_type_ids"] = 0
        for name in types.keys() & batch.keys():
            of_prompts = [values[mask].tolist() for values, mask in zip(batch[name], kept)]
            batch[name] = _pad_rows(
                [values + [types[name]] * len(answer) for values, answer in zip(of_prompts, answers)], 0
            )
        if "cross_attention_mask" in batch:  # Mllama's, of tokens and tiles: a caption sees what its prompt's end sees
            masks = [values[mask] for values, mask in zip(batch["cross_attention_mask"], kept)]
            masks = [torch.cat([one, one[-1:].expand(len(a), -1, -1)]) for one, a in zip(masks, answers)]
            batch["cross_attention_mask"] = pad_sequence(masks, batch_first=True)


def _pad_rows(rows: list[list[int]], padding: int) -> torch.Tensor:
    """Rows of different lengths as one tensor, padded on the right."""
    return pad_sequence(list(map(torch.tensor, rows)), batch_first=True, padding_value=padding)


def _place_map(
    saliency_map: torch.Tensor, box: tuple[float, float, float, float], size: tuple[int, int]
) -> torch.Tensor:
    """A map `(h, w)` of the part `box` (top, left, bottom, right) of a picture, on the whole of it: `size`, 0 outside."""
    height, width = size
    if box == (0.0, 0.0, float(height), float(width)):
        return F.interpolate(saliency_map[None, None], size=size, mode="bilinear")[0, 0]
    top, left, bottom, right = box
    y = (torch.arange(height, device=saliency_map.device) + 0.5 - top) / (bottom - top) * 2 - 1
    x = (torch.arange(width, device=saliency_map.device) + 0.5 - left) / (right - left) * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)[None].to(saliency_map.dtype)
    placed = F.grid_sample(saliency_map[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    return placed * (grid[0].abs() <= 1).all(-1)


def _cut_map(
    saliency_map: torch.Tensor, box: tuple[float, float, float, float], size: tuple[int, int]
) -> torch.Tensor:
    """The part `box` of a map `(h, w)` that covers a picture of `size`, at the map's own shape, 0 outside of the picture."""
    height, width = size
    if box == (0.0, 0.0, float(height), float(width)):
        return saliency_map
    top, left, bottom, right = box
    rows, columns = saliency_map.shape
    y = (top + (torch.arange(rows) + 0.5) / rows * (bottom - top)) / height * 2 - 1
    x = (left + (torch.arange(columns) + 0.5) / columns * (right - left)) / width * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(x, y[:, None]), dim=-1)[None]
    cut = F.grid_sample(saliency_map[None, None], grid, padding_mode="border", align_corners=False)[0, 0]
    return cut * (grid[0].abs() <= 1).all(-1)


def _stack(values: list[Any], column: str) -> torch.Tensor | None:
    """Stacks what is there; missing rows become zeros (no truth), missing aspects -1 (unknown)."""
    given = [torch.as_tensor(np.asarray(value, dtype=np.float32)) for value in values if value is not None]
    for value in given:
        _check_range(column, value, *OPTIONAL_COLUMNS[column])
    if not given:
        return None
    shapes = {tuple(value.shape) for value in given}
    if len(shapes) > 1:
        raise ValueError(f"Column `{column}` has different shapes in one batch: {sorted(shapes)}.")
    missing = torch.full_like(given[0], -1.0 if column == "aspect_labels" else 0.0)
    rows = iter(given)
    return torch.stack([missing if value is None else next(rows) for value in values])


def _check_range(column: str, values: torch.Tensor, low: float, high: float = float("inf")):
    if not values.isfinite().all() or values.amin() < low or values.amax() > high:
        allowed = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        low, high = values.amin().item(), values.amax().item()
        raise ValueError(f"Column `{column}` takes finite numbers {allowed}, got {low:g} to {high:g}.")


__all__ = ["ASEDataCollator", "ASEProcessor", "read_photograph"]
