"""What one call of an image encoder hands on, and who listens to what the saliency module says meanwhile."""

import threading
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from .image_encoders import EncoderImages
from .modeling_iasm import IASMOutput, join_outputs


SALIENCY_OUTPUTS = ("saliency_maps", "saliency_map_sizes", "score_logits", "aspect_logits")

# What is active in this thread, so that two threads never see each other's images: the `encoder_context` of the call that
# runs, and the `recorders` of whoever wants to know what the IASM says. NOTE: `torch.compile` traces this and no
# `ContextVar`, and of a subclass with defaults it would read the defaults.
active = threading.local()


class EncoderContext:
    """What one call of the image encoder hands from its pixels, and the layers that are read, to its fusion layers."""

    def __init__(self, encoder: nn.Module, images: EncoderImages):
        self.encoder = encoder
        self.images = images
        self.states: list[torch.Tensor | list[torch.Tensor]] = []
        self.saliency: IASMOutput | None = None
        self.outer = getattr(active, "encoder_context", None)


class SaliencyRecorder:
    """Keeps what the IASM of `model` says in this thread while its `with` block runs, and on demand what it was given."""

    def __init__(self, model: nn.Module, keep_inputs: bool = False):
        self.model = model
        self.keep_inputs = keep_inputs
        self.inputs = []
        self.sizes: list[tuple[int, int]] = []  # of the images, in pixels
        self.outputs = []

    def __enter__(self) -> "SaliencyRecorder":
        self.outer, self.context = getattr(active, "recorders", ()), getattr(active, "encoder_context", None)
        active.recorders = (*self.outer, self)
        return self

    def __exit__(self, *error: Any):
        # torch ends an encoder's call on errors, but not on an interrupt (a `BaseException`)
        active.recorders, active.encoder_context = self.outer, self.context

    def saliency(self, mm_encoder_outputs: dict[str, ModelOutput] | None = None) -> dict[str, torch.Tensor | None]:
        """What the IASM said, or what it had said when images were encoded before."""
        said = join_outputs(self.outputs) if self.outputs else (mm_encoder_outputs or {}).get("image")
        return {name: None if said is None else said.get(name) for name in SALIENCY_OUTPUTS}
