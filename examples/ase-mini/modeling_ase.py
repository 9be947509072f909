"""ASE-MLLM: a vision-language model of transformers whose image encoder sees with a saliency module.

After "Aesthetic Image Captioning with Saliency Enhanced MLLMs" (arXiv 2509.04378), which names the parts (IASM, IAS-ViT,
MLLM) and their connection (cross-attention in the image encoder). It publishes no internals: all that is inside the parts
is this project's own design.
"""

import inspect
import threading
import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import make_dataclass
from functools import cache, partial, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .configuration_ase import ASEConfig, IASMConfig
from .image_encoders import EncoderImages, ImageEncoder, find_image_encoder, probe_places
from .modeling_iasm import (
    ASEPreTrainedModel,
    IASMOutput,
    ImageAestheticSaliencyModule,
    SaliencyFusions,
    join_outputs,
    saliency_losses,
    weighted_caption_loss,
)
from .processing_ase import image_normalisation


TARGETS = ("score_targets", "saliency_targets", "aspect_targets", "caption_weights")
SALIENCY_OUTPUTS = ("saliency_maps", "saliency_map_sizes", "score_logits", "aspect_logits")
LOSS_TERMS = ("caption_loss", "score_loss", "saliency_loss", "aspect_loss")
CACHE_NAMES = ("past_key_values", "cache")  # before transformers 5.24 and since

logger = logging.get_logger(__name__)


# What is active in this thread, so that two threads never see each other's images: the `encoder_context` of the call that
# runs, and the `recorders` of whoever wants to know what the IASM says. NOTE: `torch.compile` traces this and no
# `ContextVar`, and of a subclass with defaults it would read the defaults.
_active = threading.local()


class EncoderContext:
    """What one call of the image encoder hands from its pixels, and the layers that are read, to its fusion layers."""

    def __init__(self, encoder: nn.Module, images: EncoderImages):
        self.encoder = encoder
        self.images = images
        self.states: list[torch.Tensor | list[torch.Tensor]] = []
        self.saliency: IASMOutput | None = None
        self.outer = getattr(_active, "encoder_context", None)


class SaliencyRecorder:
    """Keeps what the IASM of `model` says in this thread while its `with` block runs, and on demand what it was given."""

    def __init__(self, model: "ASEModel", keep_inputs: bool = False):
        self.model = model
        self.keep_inputs = keep_inputs
        self.inputs = []
        self.outputs = []

    def __enter__(self) -> "SaliencyRecorder":
        self.outer, self.context = getattr(_active, "recorders", ()), getattr(_active, "encoder_context", None)
        _active.recorders = (*self.outer, self)
        return self

    def __exit__(self, *error: Any):
        # torch ends an encoder's call on errors, but not on an interrupt (a `BaseException`)
        _active.recorders, _active.encoder_context = self.outer, self.context

    def saliency(self, mm_encoder_outputs: dict[str, ModelOutput] | None = None) -> dict[str, torch.Tensor | None]:
        """What the IASM said, or what it had said when images were encoded before."""
        said = join_outputs(self.outputs) if self.outputs else (mm_encoder_outputs or {}).get("image")
        return {name: None if said is None else said.get(name) for name in SALIENCY_OUTPUTS}


class ASEModel(ASEPreTrainedModel):
    """
    A vision-language model whose image encoder is an IAS-ViT, without the language model's head.

    `mllm` is the whole base model. Hooks on its encoder run the IASM on the encoder's own pixels and fuse the saliency
    tokens after `config.fusion_layers`; nothing of the base is renamed, wrapped or copied.
    """

    # what computes on one device; a device map may only cut between these
    _no_split_modules = ["ImageAestheticSaliencyModule", "SaliencyCrossAttention"]
    # Quantisers leave these out too, so that a quantised base can be trained with them. The patterns hold with and
    # without the generating class around.
    _keep_in_fp32_modules = [r"(?:model\.)?iasm", r"(?:model\.)?fusions"]

    def __init__(self, config: ASEConfig, mllm: PreTrainedModel | None = None):
        super().__init__(config)
        if mllm is None:
            if "tie_word_embeddings" in vars(config.mllm_config):  # whoever unties or ties sets it on the outer config
                config.mllm_config.tie_word_embeddings = config.tie_word_embeddings
            mllm = AutoModelForImageTextToText.from_config(config.mllm_config)
        # attention is switched on the config object that the modules hold, so it must be the same one
        config.mllm_config = mllm.config
        self.mllm = mllm
        self.input_modalities = mllm.input_modalities
        self.forward = _signed_as(self.forward, mllm.base_model.forward)
        for name in ("get_rope_index", "get_video_features"):  # servers that hold the body alone look for these
            if hasattr(mllm.base_model, name):
                setattr(self, name, getattr(mllm.base_model, name))
        encoder = find_image_encoder(mllm)
        _resolve_encoder_layers(config, encoder)
        config.fusion_layers = _resolve_fusion_layers(config, encoder)
        self.iasm = ImageAestheticSaliencyModule(config.iasm_config)
        self.fusions = SaliencyFusions(config, {layer: encoder.hidden_sizes[layer] for layer in config.fusion_layers})
        self._hook_encoder(encoder)
        self.post_init()

    def _hook_encoder(self, encoder: ImageEncoder):
        hooks = [getattr(hook, "func", None) for hook in encoder.module._forward_pre_hooks.values()]
        if any(getattr(hook, "__name__", None) == self._start_encoder_call.__name__ for hook in hooks):
            raise ValueError(
                f"This {type(self.mllm).__name__} has the saliency branch already: use the ASE model that holds it, or "
                "load the base again."
            )
        # NOTE: partials of bound methods, because deepcopy follows those to the copied model and closures to the old
        start = partial(self._start_encoder_call, encoder.arguments, encoder.pixels.read)
        encoder.module.register_forward_pre_hook(start, with_kwargs=True)
        encoder.module.register_forward_hook(self._end_encoder_call, always_call=True)
        for layer in self.config.fusion_layers:
            # before the hooks that record hidden states: LLaVA reads its features from the recorded ones
            encoder.layers[layer].register_forward_hook(partial(self._fuse, layer), prepend=True)
        for layer in self.config.iasm_config.encoder_layers:  # and before the fusion of the same layer
            encoder.layers[layer].register_forward_hook(partial(self._read, layer), prepend=True)

    def _start_encoder_call(
        self,
        arguments: list[str],
        reader: Callable[..., EncoderImages],
        encoder: nn.Module,
        args: tuple,
        kwargs: dict[str, Any],
    ):
        given = {**dict(zip(arguments, args)), **kwargs}
        images = reader(encoder, given.pop(arguments[0]), **given)
        _active.encoder_context = EncoderContext(encoder, images)
        if not self.config.iasm_config.encoder_layers:
            self._run_iasm(_active.encoder_context)

    def _run_iasm(self, context: EncoderContext):
        context.saliency = self.iasm(context.images.pixels, encoder_states=context.states)
        for recorder in getattr(_active, "recorders", ()):
            if recorder.model is self:  # and not the assistant that writes a draft meanwhile
                recorder.outputs.append(context.saliency)
                if recorder.keep_inputs:
                    recorder.inputs.append((context.images.pixels, context.states))

    def _end_encoder_call(self, encoder: nn.Module, args: tuple, output: Any):
        context = getattr(_active, "encoder_context", None)
        # after an error before `_start_encoder_call` there is no call of this encoder to end
        if context is not None and context.encoder is encoder:
            _active.encoder_context = context.outer

    def _context(self, index: int) -> EncoderContext:
        context = getattr(_active, "encoder_context", None)
        if context is None:
            raise RuntimeError(
                f"Encoder layer {index} ran outside a call of its image encoder, so there are no pixels."
            )
        return context

    def _read(self, index: int, layer: nn.Module, args: tuple, output: torch.Tensor | tuple):
        context, config = self._context(index), self.config.iasm_config
        hidden_states = output[0] if isinstance(output, tuple) else output
        width = config.encoder_hidden_sizes[len(context.states)]
        context.states.append(context.images.locate(hidden_states, width, config.encoder_prefix_length))
        if len(context.states) == len(config.encoder_layers):
            self._run_iasm(context)

    def _fuse(self, index: int, layer: nn.Module, args: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        context = self._context(index)
        hidden_states = output[0] if isinstance(output, tuple) else output
        patches = context.images.split(hidden_states, self.fusions.hidden_size(index))
        fused = self.fusions(index, patches, context.saliency.saliency_tokens)
        fused = context.images.merge(fused, hidden_states)
        return (fused, *output[1:]) if isinstance(output, tuple) else fused

    @property
    def language_model(self) -> nn.Module:
        return self.mllm.get_decoder()

    @property
    def vision_tower(self) -> nn.Module:
        return self.mllm.get_encoder(modality="image")

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        encoder = self.mllm.get_encoder(modality=modality)
        return self if encoder is self.mllm else encoder  # a model without such an encoder gives itself

    def set_encoder(self, encoder: nn.Module, modality: str | None = None):
        self.mllm.set_encoder(encoder, modality=modality)
        if modality == "image":
            self._hook_encoder(find_image_encoder(self.mllm))

    def set_decoder(self, decoder: nn.Module):
        self.mllm.set_decoder(decoder)

    def get_input_embeddings(self) -> nn.Module:
        return self.mllm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.mllm.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = self.mllm.resize_token_embeddings(*args, **kwargs)  # new rows get the base's own initialisation
        self.vocab_size = self.mllm.vocab_size
        return embeddings

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images once: the base's output, with `saliency_maps`, `score_logits` and `aspect_logits` beside.

        `kwargs` are the arguments of the base's own method (grids, sizes, masks). Pass the output on as
        `generate(..., mm_encoder_outputs={"image": features})`.
        """
        with SaliencyRecorder(self) as recorder:
            features = self.mllm.base_model.get_image_features(
                pixel_values=pixel_values, **{**kwargs, "return_dict": True}
            )
        return _add_fields(features, recorder.saliency())

    @torch.no_grad()
    def get_iasm_inputs(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> list[dict[str, torch.Tensor | list[torch.Tensor]]]:
        """
        What the saliency module is given of each image, to keep and to train the module alone on.

        Arguments as of `get_image_features`. Of `n` images, `n` dictionaries: `pixel_values` `(3, h, w)` and
        `encoder_states`, one `(width, rows, columns)` for each of `config.iasm_config.encoder_layers`. The module takes
        lists of such images.
        """
        with SaliencyRecorder(self, keep_inputs=True) as recorder:
            self.mllm.base_model.get_image_features(pixel_values=pixel_values, **{**kwargs, "return_dict": True})
        return [
            {"pixel_values": image, "encoder_states": list(states)}
            for pixels, layers in recorder.inputs
            for image, *states in zip(pixels, *layers, strict=True)
        ]

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """Arguments and outputs are the base's own, and `SALIENCY_OUTPUTS` beside; what is `None` is not passed on."""
        # a base would swallow them, and whoever computes the loss outside would never know
        if targets := sorted(_drop_none(**{name: kwargs.get(name) for name in TARGETS})):
            raise ValueError(f"{targets} need `ASEForConditionalGeneration.forward`: the body computes no loss.")
        given = _drop_none(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        given |= {**kwargs, "return_dict": True}
        with SaliencyRecorder(self) as recorder:
            outputs = self.mllm.base_model(**given)
        return _add_fields(outputs, recorder.saliency(mm_encoder_outputs))


def _resolve_encoder_layers(ase_config: ASEConfig, encoder: ImageEncoder):
    """Decides which layers the saliency module reads, unless the configuration says it, and where their states stand."""
    config = ase_config.iasm_config
    layers = config.encoder_layers
    if layers is None:
        last = min(ase_config.fusion_layers or [encoder.last_layer])
        layers = [min(max((encoder.last_layer + 1) // 2, 1) - 1, last)]
    elif not layers or config.encoder_hidden_sizes is not None:
        return
    if max(layers) > encoder.last_layer:
        raise ValueError(
            f"`encoder_layers` {layers} reaches beyond layer {encoder.last_layer}, the last one that is seen."
        )
    prefix, reason = probe_places(encoder, max(layers))
    name = type(encoder.module).__name__
    if prefix is None and config.encoder_layers is not None:
        raise ValueError(f"The saliency module cannot read {name}'s `encoder_layers` {layers}: {reason}.")
    if prefix is None:
        logger.warning(f"The saliency module does not read {name} but judges by photometry alone: {reason}.")
        layers, prefix = [], 0
    config.encoder_layers, config.encoder_prefix_length = layers, prefix
    config.encoder_hidden_sizes = [encoder.hidden_sizes[layer] for layer in layers]


def _resolve_fusion_layers(config: ASEConfig, encoder: ImageEncoder) -> list[int]:
    first = max(config.iasm_config.encoder_layers, default=0)  # the tokens are not there before
    count = encoder.last_layer + 1 - first
    if config.fusion_layers is None:
        if count < 1:
            raise ValueError(
                f"`encoder_layers` {config.iasm_config.encoder_layers} leave no layer to fuse: the language model sees none "
                f"after layer {encoder.last_layer}."
            )
        return sorted({first + round((i + 1) * count / 4) - 1 for i in range(4)} - {first - 1})
    if max(config.fusion_layers) > encoder.last_layer:
        raise ValueError(
            f"`fusion_layers` {config.fusion_layers} reaches beyond layer {encoder.last_layer}: the encoder has "
            f"{len(encoder.layers)} layers and the language model sees none after that one."
        )
    if min(config.fusion_layers) < first:
        raise ValueError(
            f"`fusion_layers` {config.fusion_layers} begins before layer {first}, which the saliency module reads first."
        )
    return config.fusion_layers


def _drop_none(**kwargs: Any) -> dict[str, Any]:
    """Without the `None`s: some bases treat an explicit `None` otherwise than a missing argument."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _signed_as(method: MethodType, base: Callable) -> MethodType:
    """
    The method with the signature of the base's: clients keep only the inputs that they find there (grids, sizes, masks).

    It takes arguments by position in the base's order, and a cache under either of its names.
    """
    function = method.__func__
    own, theirs = inspect.signature(function).parameters, inspect.signature(base).parameters
    kinds = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    shared = [parameter for parameter in theirs.values() if parameter.kind not in kinds]
    names = [parameter.name for parameter in shared]
    name, other = next((pair for pair in (CACHE_NAMES, CACHE_NAMES[::-1]) if pair[0] in names), CACHE_NAMES)
    self, *mine = [parameter for name, parameter in own.items() if name not in names and parameter.kind not in kinds]
    mine = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in mine]
    rest = inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)

    # NOTE: without `__wrapped__`, by which accelerate would take the function for one of its own wrappings
    @wraps(function, updated=())
    def signed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # NOTE: a new dict, because torch.compile does not trace signatures once a caller's dict was changed
        given = {**kwargs, **dict(zip(names, args))}
        if name in names and other in given:
            cache = given.pop(other)
            if name not in given and name == "cache" and not torch.compiler.is_compiling():
                warnings.warn(f"`{other}` is deprecated: transformers calls it `{name}`.", FutureWarning, stacklevel=2)
            # NOTE: PEFT 0.21 puts its prefix beside the still empty cache, each under one of the names
            if given.get(name) is None or not given[name].get_seq_length():
                given[name] = cache
        return function(self, **given)

    del signed.__wrapped__
    signed.__signature__ = inspect.Signature([self, *shared, *mine, rest])
    return MethodType(signed, method.__self__)


def _add_fields(outputs: ModelOutput, fields: dict[str, torch.Tensor | None]) -> ModelOutput:
    """A base's output with what the IASM said, and the terms of the loss, beside its own fields."""
    return _output_class(type(outputs), tuple(fields))(**outputs, **fields)


@torch.compiler.assume_constant_result  # a compiled forward takes the class as it is, and does not trace its making
def _output_class(base: type[ModelOutput], added: tuple[str, ...]) -> type[ModelOutput]:
    return _make_output_class(base, added)


@cache
def _make_output_class(base: type[ModelOutput], added: tuple[str, ...]) -> type[ModelOutput]:
    """A base's output class with fields of ours: what takes outputs apart (pytrees) makes them again from fields alone."""

    def reduce(self: ModelOutput) -> tuple:  # pickle finds no class that was made here
        values = dict(self)
        fields = {name: values.pop(name, None) for name in added}
        return _add_fields, (base(**values), fields)

    namespace = {"__reduce__": reduce}
    if "past_key_values" in base.__dataclass_fields__:  # the name that lasts, where transformers has not got it yet
        namespace["cache"] = property(lambda self: self.past_key_values)
    if "image_hidden_states" in base.__dataclass_fields__:
        namespace["image_outputs"] = property(_image_outputs)
    fields = [(name, torch.Tensor | None, None) for name in added]
    return make_dataclass(f"ASE{base.__name__}", fields, bases=(base,), namespace=namespace)


def _image_outputs(outputs: ModelOutput) -> BaseModelOutputWithPooling | None:
    features = outputs.image_hidden_states
    return None if features is None else BaseModelOutputWithPooling(pooler_output=features)


class ASEForConditionalGeneration(ASEPreTrainedModel, GenerationMixin):
    """Writes aesthetic critiques: the base vision-language model with the saliency branch in its image encoder."""

    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: ASEConfig, mllm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = ASEModel(config, mllm)
        self.input_modalities = self.model.input_modalities
        mllm = self.model.mllm
        self.forward = _signed_as(self.forward, mllm.forward)
        self.prepare_inputs_for_generation = _signed_as(
            self.prepare_inputs_for_generation, mllm.prepare_inputs_for_generation
        )
        self._is_stateful = mllm._is_stateful  # such caches cannot be cut back, as assisted decoding does
        self.post_init()

    @classmethod
    def from_mllm_pretrained(
        cls,
        pretrained_model_name_or_path_or_model: str | PreTrainedModel,
        iasm_config: dict | IASMConfig | None = None,
        fusion_layers: list[int] | None = None,
        fusion_hidden_size: int | None = None,
        fusion_num_attention_heads: int | None = None,
        **kwargs: Any,
    ) -> "ASEForConditionalGeneration":
        """
        Gives a saved or live image-text-to-text model the saliency branch. Fresh gates are shut: it answers as before.

        Args:
            pretrained_model_name_or_path_or_model: A folder, a Hub id, or the model itself, which becomes a part of
                the new one and keeps its weights, dtype, device and attention.
            iasm_config, fusion_layers, fusion_hidden_size, fusion_num_attention_heads: See `ASEConfig`. The image
                normalisation is read from the folder's image processor unless `iasm_config` names it.
            kwargs: Passed to `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            ValueError: if the base has no image encoder of a known form.
        """
        mllm = pretrained_model_name_or_path_or_model
        iasm_config = iasm_config if iasm_config is not None else {}
        if not isinstance(mllm, PreTrainedModel):
            if isinstance(iasm_config, dict):
                iasm_config = {**image_normalisation(mllm, **kwargs), **iasm_config}
            mllm = AutoModelForImageTextToText.from_pretrained(mllm, **kwargs)
        elif kwargs:
            raise ValueError(f"A live model takes no loading arguments, got {sorted(kwargs)}.")
        given = _drop_none(
            fusion_layers=fusion_layers,
            fusion_hidden_size=fusion_hidden_size,
            fusion_num_attention_heads=fusion_num_attention_heads,
        )
        config = ASEConfig(mllm_config=mllm.config, iasm_config=iasm_config, **given)
        # the base's weights and attention are its own: `post_init` must not touch the one, nor the defaults the other
        for module in mllm.modules():
            module._is_hf_initialized = True
        attention = mllm.config._attn_implementation
        config._attn_implementation_internal = attention
        config.iasm_config._attn_implementation_internal = attention
        config.dtype = mllm.dtype
        model = cls(config, mllm)
        device = model._inherit_devices(mllm)
        model.model.iasm.to(dtype=mllm.dtype, device=device)
        model.model.fusions.to(dtype=mllm.dtype, device=device)
        model._inherit_quantisation(mllm)
        model.generation_config = mllm.generation_config
        return model.train(mllm.training)

    def _inherit_devices(self, mllm: PreTrainedModel) -> torch.device | int | str:
        """Extends the device map of a base that has one; returns where the added modules belong."""
        device_map = vars(mllm).get("hf_device_map")
        if device_map is None:
            return mllm.device
        # accelerate computes what is offloaded on the first device that is not an offload
        device = next((device for device in device_map.values() if device not in ("cpu", "disk")), "cpu")
        inherited = {f"model.mllm.{name}" if name else "model.mllm": place for name, place in device_map.items()}
        self.hf_device_map = {**inherited, "model.iasm": device, "model.fusions": device}
        return device

    def _inherit_quantisation(self, mllm: PreTrainedModel):
        """Loading marks the model that it quantised; saving, `Trainer` and PEFT look for the marks on the outer one."""
        for name in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
            if name in vars(mllm):
                setattr(self, name, vars(mllm)[name])
        if "quantization_config" not in vars(mllm.config):
            return
        settings = copy(vars(mllm.config).pop("quantization_config"))
        # the names of what stays as it is count from the base; its own patterns may also be ends of names
        skipped = vars(mllm.hf_quantizer).get("modules_to_not_convert", [])
        field = "llm_int8_skip_modules" if "llm_int8_skip_modules" in vars(settings) else "modules_to_not_convert"
        setattr(settings, field, [*skipped, *(f"model.mllm.{name}" for name in skipped)])
        self.config.quantization_config = settings

    @property
    def lm_head(self) -> nn.Module:
        return self.model.mllm.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module):
        self.model.mllm.set_output_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs) -> nn.Embedding:
        embeddings = self.model.resize_token_embeddings(*args, **kwargs)
        self.vocab_size = self.model.vocab_size
        return embeddings

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """See `ASEModel.get_image_features`."""
        return self.model.get_image_features(pixel_values=pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        score_targets: torch.Tensor | None = None,
        saliency_targets: torch.Tensor | None = None,
        aspect_targets: torch.Tensor | None = None,
        caption_weights: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        r"""
        Arguments are the base's own (those left `None` are not passed on) and the targets of the saliency terms.

        Returns the base's own output with `saliency_maps`, `saliency_map_sizes`, `score_logits` and `aspect_logits` beside
        (see `IASMOutput`; `None` without an image), and the unweighted terms of `loss`: `caption_loss`, `score_loss`,
        `saliency_loss`, `aspect_loss`.

        Args:
            labels: `(batch, sequence)`, token ids, -100 where nothing is learned.
            score_targets, saliency_targets, aspect_targets: One row an image; see `ImageAestheticSaliencyModule`.
            caption_weights: `(batch,)`, how much each sample's caption counts (its aesthetic relevance), 1 by default.
            num_items_in_batch: Target tokens in all micro-batches of a training step, as the `Trainer` counts them.
        """
        given = _drop_none(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            labels=labels if caption_weights is None else None,
            num_items_in_batch=num_items_in_batch if labels is not None else None,
            logits_to_keep=logits_to_keep,
        )
        if unknown := [name for name in kwargs if name.endswith(("_target", "_targets")) or name == "caption_weight"]:
            raise TypeError(f"{sorted(unknown)} are no targets of this model, which takes {sorted(TARGETS)}.")
        given |= {**kwargs, "return_dict": True}
        with SaliencyRecorder(self.model) as recorder:
            outputs = self.model.mllm(**given)
        result = _add_fields(outputs, {**recorder.saliency(mm_encoder_outputs), **dict.fromkeys(LOSS_TERMS)})
        if labels is not None:
            if caption_weights is not None:
                shift_labels = kwargs.get("shift_labels")
                result.loss = weighted_caption_loss(
                    outputs.logits, labels, caption_weights, num_items_in_batch, shift_labels
                )
            result.caption_loss = result.loss
        self._add_saliency_losses(result, score_targets, saliency_targets, aspect_targets, labels, num_items_in_batch)
        return result

    def _add_saliency_losses(
        self,
        result: ModelOutput,
        score_targets: torch.Tensor | None,
        saliency_targets: torch.Tensor | None,
        aspect_targets: torch.Tensor | None,
        labels: torch.LongTensor | None,
        num_items_in_batch: torch.Tensor | int | None,
    ):
        """Adds the terms to `result`. A micro-batch counts by its share of the step's target tokens, as captions do."""
        targets = _drop_none(
            score_targets=score_targets, saliency_targets=saliency_targets, aspect_targets=aspect_targets
        )
        if not targets:
            return
        if result.saliency_maps is None:
            raise ValueError(f"{sorted(targets)} are given, but no image was: there is nothing to compare them with.")
        terms = saliency_losses(self.config.iasm_config, result, **targets)
        added = terms.pop("loss")
        if num_items_in_batch is not None and labels is not None:
            added = added * (labels[:, 1:] != -100).sum() / num_items_in_batch
        for name, term in terms.items():
            result[name] = term
        result.loss = added if result.loss is None else result.loss + added

    # Generation ------------------------------------------------------------------------------------------------------

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """
        See `GenerationMixin.generate`. A base with another way to generate does it by itself.

        With `return_dict_in_generate=True` the output has `saliency_maps`, `saliency_map_sizes`, `score_logits` and
        `aspect_logits` too, one row an image whatever the number of beams or returned sequences.
        """
        if (features := kwargs.get("mm_encoder_outputs")) is not None:
            # transformers repeats the features for beams in the very object that it is given
            kwargs["mm_encoder_outputs"] = {name: copy(value) for name, value in features.items()}
        mllm = self.model.mllm
        # a method of its own (BLIP-2 and its kin), or an encoder for the text too (Florence-2)
        if type(mllm).generate is not GenerationMixin.generate or mllm.config.is_encoder_decoder:
            mllm.generation_config = self.generation_config
            generate, kwargs = (
                mllm.generate,
                {**kwargs, **_drop_none(inputs=inputs, generation_config=generation_config)},
            )
        else:
            generate, kwargs = super().generate, {**kwargs, "inputs": inputs, "generation_config": generation_config}
        with SaliencyRecorder(self.model) as recorder:
            outputs = generate(**kwargs)
        saliency = recorder.saliency(features)
        if not isinstance(outputs, ModelOutput):
            return outputs
        if generate != mllm.generate and not self._supports_mm_encoder_outputs():
            # the base (Mllama) encodes the photographs once for each beam: one row of each is kept
            settings = {**(generation_config or self.generation_config).to_dict(), **kwargs}
            times = max(settings[name] or 1 for name in ("num_beams", "num_return_sequences"))
            prompts = _drop_none(**{name: kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")})
            rows = (len(next(iter(prompts.values()))), times, -1)
            saliency = {
                name: None if values is None else values.unflatten(0, rows)[:, 0].flatten(0, 1)
                for name, values in saliency.items()
            }
        return _add_fields(outputs, saliency)

    def _maybe_prepare_encoder_kwargs_for_generation(self, *args, **kwargs) -> dict[str, Any]:
        # the base knows the names of its encoder's arguments; what it returns are the `model_kwargs` of generation
        with SaliencyRecorder(self.model) as recorder:
            prepared = self.model.mllm._maybe_prepare_encoder_kwargs_for_generation(*args, **kwargs)
        features = (prepared.get("mm_encoder_outputs") or {}).get("image")  # not there for videos alone
        if features is not None and "saliency_maps" not in features:
            prepared["mm_encoder_outputs"]["image"] = _add_fields(features, recorder.saliency())
        return prepared

    def prepare_inputs_for_generation(self, **kwargs) -> dict[str, Any]:
        # evaluation hands a whole training batch over; as transformers drops `labels` here, so go the other targets
        kwargs = {name: value for name, value in kwargs.items() if name not in TARGETS}
        return self.model.mllm.prepare_inputs_for_generation(**kwargs)

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]):
        known = {name: value for name, value in model_kwargs.items() if name not in TARGETS}
        self.model.mllm._validate_model_kwargs(known)


def _base_hook(name: str) -> Callable:
    """A method of `ASEForConditionalGeneration` that is the base's own."""

    def hook(self: ASEForConditionalGeneration, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.model.mllm, name)(*args, **kwargs)

    return hook


# A base knows its positions, masks and caches; of the first of these, transformers' own would look at the signature of
# the outer `prepare_inputs_for_generation`, and not start from embeddings.
for _name in (
    "_prepare_model_inputs",
    "_prepare_position_ids_for_generation",
    "_expand_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_static_cache",
    "_prepare_cache_for_generation",
    "_supports_mm_encoder_outputs",
    "_supports_logits_to_keep",
):
    setattr(ASEForConditionalGeneration, _name, _base_hook(_name))


__all__ = ["ASEForConditionalGeneration", "ASEModel"]
