"""ASE-MLLM: a vision-language model of transformers whose image encoder sees with a saliency module.

After "Aesthetic Image Captioning with Saliency Enhanced MLLMs" (arXiv 2509.04378), which names the parts (IASM, IAS-ViT,
MLLM) and their connection (cross-attention in the image encoder). It publishes no internals: all that is inside the parts
is this project's own design.
"""

import inspect
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .base_interface import CACHE_NAMES, add_fields, drop_none, signed_as, without
from .configuration_ase import ASEConfig, IASMConfig, check_image_token_budget
from .encoder_context import EncoderContext, SaliencyRecorder, active
from .image_encoders import (
    EncoderImages,
    ImageEncoder,
    find_image_encoder,
    resolve_encoder_layers,
    resolve_fusion_layers,
)
from .image_tokens import (
    Packing,
    PromptCut,
    choose_tokens,
    cut_features,
    cut_inputs,
    cut_prompt,
    listen_to_packing,
    pads_left,
    pool_map,
    shorter_limits,
    token_grids,
)
from .modeling_iasm import (
    ASEPreTrainedModel,
    ImageAestheticSaliencyModule,
    SaliencyFusions,
    saliency_losses,
    weighted_caption_loss,
)
from .processing_ase import image_normalisation


TARGETS = ("score_targets", "saliency_targets", "aspect_targets", "caption_weights")
LOSS_TERMS = ("caption_loss", "score_loss", "saliency_loss", "aspect_loss")

logger = logging.get_logger(__name__)


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
        self.forward = signed_as(self.forward, mllm.base_model.forward)
        for name in ("get_rope_index", "get_video_features"):  # servers that hold the body alone look for these
            if hasattr(mllm.base_model, name):
                setattr(self, name, getattr(mllm.base_model, name))
        encoder = find_image_encoder(mllm)
        resolve_encoder_layers(config, encoder)
        config.fusion_layers = resolve_fusion_layers(config, encoder)
        self.iasm = ImageAestheticSaliencyModule(config.iasm_config)
        self.fusions = SaliencyFusions(config, {layer: encoder.hidden_sizes[layer] for layer in config.fusion_layers})
        self._hook_encoder(encoder)
        self.post_init()

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError(
            "`nn.DataParallel` copies a model without its hooks: the saliency branch of every copy would be the first one's. "
            "The `Trainer` uses it where one process sees several GPUs: start one process for each, with `accelerate launch` or "
            "`torchrun`, or show it one (CUDA_VISIBLE_DEVICES=0)."
        )

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
        active.encoder_context = EncoderContext(encoder, images)
        if not self.config.iasm_config.encoder_layers:
            self._run_iasm(active.encoder_context)

    def _run_iasm(self, context: EncoderContext):
        context.saliency = self.iasm(context.images.pixels, encoder_states=context.states)
        for recorder in getattr(active, "recorders", ()):
            if recorder.model is self:  # and not the assistant that writes a draft meanwhile
                recorder.outputs.append(context.saliency)
                recorder.sizes += [tuple(image.shape[-2:]) for image in context.images.pixels]
                if recorder.keep_inputs:
                    recorder.inputs.append((context.images.pixels, context.states))

    def _end_encoder_call(self, encoder: nn.Module, args: tuple, output: Any):
        context = getattr(active, "encoder_context", None)
        # after an error before `_start_encoder_call` there is no call of this encoder to end
        if context is not None and context.encoder is encoder:
            active.encoder_context = context.outer

    def _context(self, index: int) -> EncoderContext:
        context = getattr(active, "encoder_context", None)
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
        self,
        pixel_values: torch.Tensor,
        image_token_budget: float | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images once: the base's output, with `saliency_maps`, `score_logits` and `aspect_logits` beside.

        `kwargs` are the arguments of the base's own method (grids, sizes, masks). Pass the output on as
        `generate(..., mm_encoder_outputs={"image": features})`. Within a budget of image tokens (the configuration's by
        default) the features are those of the tokens that are kept, and `image_tokens_kept` says which of all they are.
        """
        budget = self.config.image_token_budget if image_token_budget is None else image_token_budget
        check_image_token_budget(budget)
        with SaliencyRecorder(self) as recorder, listen_to_packing(self.mllm.base_model) as packings:
            features = self.mllm.base_model.get_image_features(
                pixel_values=pixel_values, **{**kwargs, "return_dict": True}
            )
        fields = recorder.saliency()
        if budget is not None:
            fields |= self._choose_tokens(features, fields, recorder.sizes, packings, budget)
            features = cut_features(features, fields["image_tokens_kept"])
        return add_fields(features, fields)

    def _choose_tokens(
        self,
        features: BaseModelOutputWithPooling,
        saliency: dict[str, torch.Tensor | None],
        sizes: list[tuple[int, int]],
        packings: list[Packing],
        budget: float | int,
    ) -> dict[str, torch.Tensor]:
        maps, shapes = saliency["saliency_maps"], saliency["saliency_map_sizes"]
        maps = list(maps) if shapes is None else [one[:h, :w] for one, (h, w) in zip(maps, shapes.tolist())]
        if packings:
            parts, quality = list(features.pooler_output), packings[0].pack_quality(maps)
            grids = [(1, len(one)) for one in parts]
        else:
            flat = torch.cat([one.flatten(0, -2) for one in features.pooler_output])
            grids = token_grids(self.config.mllm_config, sizes, len(flat))
            parts = flat.split([rows * columns for rows, columns in grids])
            quality = [pool_map(*pair) for pair in zip(maps, grids, strict=True)]
        kept = choose_tokens(parts, quality, budget, self.config.image_token_selection)
        return {"image_tokens_kept": kept, "image_token_grids": torch.tensor(grids, device=kept.device)}

    def within_budget(self, given: dict[str, Any], pad_left: bool = False) -> tuple[dict[str, Any], PromptCut | None]:
        """
        The inputs of a prompt without the image tokens beyond the budget, and the cut; as they are where nothing is cut.

        `given` may name an `image_token_budget`, which counts in place of the configuration's. Images are encoded here.
        Rows that are shorter than others then are padded on the side on which the batch is, or with `pad_left`, as what is
        generated needs it, on the left.

        Raises:
            ValueError: where the prompt goes on from a cache, or has no ids in which image tokens could be found.
        """
        given = dict(given)
        budget = given.pop("image_token_budget", None)
        budget = self.config.image_token_budget if budget is None else budget
        check_image_token_budget(budget)
        encoded = given.get("mm_encoder_outputs") or {}
        features = encoded.get("image")
        kept = None if features is None else features.get("image_tokens_kept")
        cuts = budget is not None and not (isinstance(budget, float) and budget == 1)  # the number 1 is one token
        encodes = cuts and features is None and given.get("pixel_values") is not None
        if kept is None and not encodes:
            return given, None
        ids, cache = given.get("input_ids"), next((given[n] for n in CACHE_NAMES if given.get(n) is not None), None)
        if ids is None or (cache is not None and cache.get_seq_length()):
            raise ValueError(
                "An `image_token_budget` cuts whole prompts that are given as `input_ids`, and none that goes on from a "
                "cache or is embedded already. Without it: `image_token_budget=1.0`."
            )
        if encodes:
            features = self.get_image_features(image_token_budget=budget, **self._image_arguments(given))
            kept = features.image_tokens_kept
            given.pop("pixel_values")
        # under another name: what is cut already is not cut again
        features = add_fields(without(features, "image_tokens_kept"), {"image_tokens_cut": kept})
        given["mm_encoder_outputs"] = {**encoded, "image": features}
        given, cut = self._cut(given, kept, pad_left)
        cut.grids = features.image_token_grids
        return given, cut

    def _image_arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        """What of a model's inputs its method for image features takes."""
        encode = getattr(self.mllm.base_model, "get_image_features", None)
        if encode is None:
            name = self.config.mllm_config.model_type
            raise ValueError(f"`image_token_budget` has nothing to cut: {name} puts no image tokens into its prompt.")
        return {name: given[name] for name in inspect.signature(encode).parameters if name in given}

    def _cut(self, given: dict[str, Any], kept: torch.Tensor, pad_left: bool) -> tuple[dict[str, Any], PromptCut]:
        ids = given["input_ids"]
        if given.get("attention_mask") is None:  # gaps in positions alone would be taken for packed sequences
            given["attention_mask"] = torch.ones_like(ids)
        if given.get("position_ids") is None:  # of the whole prompt: M-RoPE needs all places of a picture
            given["position_ids"] = self.mllm._prepare_position_ids_for_generation(ids, given)
        is_image = ids == self.config.image_token_id
        mask = (~is_image).masked_scatter(is_image, kept.to(ids.device))
        cut = cut_prompt(mask, pad_left or pads_left(given["attention_mask"]))
        padding = self.config.get_text_config().pad_token_id
        positions = cut.gather(given.pop("position_ids"), 0)
        return {**cut_inputs(given, cut, padding or 0), "position_ids": positions}, cut

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
        image_token_budget: float | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModelOutput:
        """Arguments and outputs are the base's own, and `SALIENCY_OUTPUTS` beside; what is `None` is not passed on."""
        # a base would swallow them, and whoever computes the loss outside would never know
        if targets := sorted(drop_none(**{name: kwargs.get(name) for name in TARGETS})):
            raise ValueError(f"{targets} need `ASEForConditionalGeneration.forward`: the body computes no loss.")
        given = drop_none(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            image_token_budget=image_token_budget,
        )
        given |= {**kwargs, "return_dict": True}
        with SaliencyRecorder(self) as recorder:
            given, cut = self.within_budget(given)
            outputs = self.mllm.base_model(**given)
        fields = recorder.saliency(mm_encoder_outputs)
        if cut is not None:
            outputs.last_hidden_state = cut.restore(outputs.last_hidden_state)
            fields |= cut.fields()
        return add_fields(outputs, fields)


def _with_normalisation(
    iasm_config: dict | IASMConfig | None, name_or_path: str, **kwargs: Any
) -> dict[str, Any] | IASMConfig:
    """The settings with the normalisation of the image processor at that place, where they have the default."""
    found = image_normalisation(name_or_path, **kwargs) if name_or_path else {}
    given, default = iasm_config or {}, IASMConfig()
    if isinstance(given, IASMConfig):
        found = {name: value for name, value in found.items() if getattr(given, name) == getattr(default, name)}
        given = copy(given)
        for name, value in found.items():
            setattr(given, name, value)
        left = given.image_mean == default.image_mean and not found
    else:
        left = "image_mean" not in found and "image_mean" not in given
        given = {**found, **given}
    if left:
        logger.warning(
            f"No image processor is known of this base ({name_or_path or 'it was not loaded from a folder'}): the saliency "
            "module takes CLIP's normalisation. If the base has another, name `image_mean` and `image_std` in `iasm_config`."
        )
    return given


class ASEForConditionalGeneration(ASEPreTrainedModel, GenerationMixin):
    """Writes aesthetic critiques: the base vision-language model with the saliency branch in its image encoder."""

    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: ASEConfig, mllm: PreTrainedModel | None = None):
        super().__init__(config)
        self.model = ASEModel(config, mllm)
        self.input_modalities = self.model.input_modalities
        mllm = self.model.mllm
        self.forward = signed_as(self.forward, mllm.forward)
        self.prepare_inputs_for_generation = signed_as(
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
                the new one and keeps its weights, dtype, device and attention. The saliency branch has the base's dtype, or
                float32 beside float16.
            iasm_config, fusion_layers, fusion_hidden_size, fusion_num_attention_heads: See `ASEConfig`. The image
                normalisation is read from the image processor in the folder (of a live model: in that which it was loaded
                from) unless `iasm_config` names another than its default.
            kwargs: Passed to `AutoModelForImageTextToText.from_pretrained`.

        Raises:
            ValueError: if the base has no image encoder of a known form.
        """
        mllm = pretrained_model_name_or_path_or_model
        live = isinstance(mllm, PreTrainedModel)
        if live and kwargs:
            raise ValueError(f"A live model takes no loading arguments, got {sorted(kwargs)}.")
        iasm_config = _with_normalisation(iasm_config, mllm.name_or_path if live else mllm, **kwargs)
        if not live:
            mllm = AutoModelForImageTextToText.from_pretrained(mllm, **kwargs)
        given = drop_none(
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
        # in half precision the added part could not be trained (Adam's steps are none or NaN); loading keeps it so, too
        dtype = torch.float32 if mllm.dtype == torch.float16 else mllm.dtype
        model.model.iasm.to(dtype=dtype, device=device)
        model.model.fusions.to(dtype=dtype, device=device)
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
        image_token_budget: float | int | None = None,
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
            image_token_budget: In place of the configuration's, see `ASEConfig`. Logits are those of the whole prompt all
                the same (what was taken out has those of the place before it), hidden states and attentions are not;
                `image_token_mask` `(batch, sequence)` beside them says what was kept, `image_token_grids` in which rows
                and columns an image's tokens stand.
        """
        encoder_decoder = self.config.mllm_config.is_encoder_decoder  # whose decoder reads the labels, one place late
        given = drop_none(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            labels=labels if caption_weights is None or encoder_decoder else None,
            num_items_in_batch=num_items_in_batch if labels is not None else None,
            logits_to_keep=logits_to_keep,
            image_token_budget=image_token_budget,
        )
        self._check_labels(labels, input_ids, caption_weights)
        if unknown := [name for name in kwargs if name.endswith(("_target", "_targets")) or name == "caption_weight"]:
            raise TypeError(f"{sorted(unknown)} are no targets of this model, which takes {sorted(TARGETS)}.")
        given |= {**kwargs, "return_dict": True}
        with SaliencyRecorder(self.model) as recorder:
            given, cut = self.model.within_budget(given)
            outputs = self.model.mllm(**given)
        fields = {**recorder.saliency(mm_encoder_outputs), **dict.fromkeys(LOSS_TERMS)}
        if cut is not None:
            fields |= cut.fields()
            if isinstance(logits_to_keep, int | None) and not logits_to_keep:
                outputs.logits = cut.restore(outputs.logits)
        result = add_fields(outputs, fields)
        if labels is not None:
            if caption_weights is not None:
                shift_labels = labels if encoder_decoder else kwargs.get("shift_labels")
                result.loss = weighted_caption_loss(
                    outputs.logits, labels, caption_weights, num_items_in_batch, shift_labels
                )
            result.caption_loss = result.loss
        self._add_saliency_losses(result, score_targets, saliency_targets, aspect_targets, labels, num_items_in_batch)
        return result

    def _check_labels(
        self,
        labels: torch.LongTensor | None,
        input_ids: torch.LongTensor | None,
        caption_weights: torch.Tensor | None,
    ):
        if labels is None:
            if self.training and caption_weights is not None:
                raise ValueError(
                    "`caption_weights` are given without `labels`: there is no caption to weigh. With "
                    "`label_smoothing_factor` the `Trainer` takes the labels away and computes a loss of its own, which "
                    "knows neither weights nor targets, and for image-text models predicts each token from itself: leave "
                    "it out."
                )
        elif (
            input_ids is not None
            and self.config.mllm_config.is_encoder_decoder
            and labels.shape == input_ids.shape
            and bool((labels[:, 0] == -100).all())
        ):
            raise ValueError(
                f"These labels lie behind their prompt, and {self.config.mllm_config.model_type} reads prompts in an encoder: "
                "it would be shown the captions that it is to write. Use `ASEDataCollator(..., encoder_decoder=True)`."
            )

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
        targets = drop_none(
            score_targets=score_targets, saliency_targets=saliency_targets, aspect_targets=aspect_targets
        )
        if not targets:
            return
        if result.saliency_maps is None:
            raise ValueError(f"{sorted(targets)} are given, but no image was: there is nothing to compare them with.")
        terms = saliency_losses(self.config.iasm_config, result, **targets)
        added = terms.pop("loss")
        if num_items_in_batch is not None and labels is not None:
            learned = labels if self.config.mllm_config.is_encoder_decoder else labels[:, 1:]
            added = added * (learned != -100).sum() / num_items_in_batch
        for name, term in terms.items():
            result[name] = term
        result.loss = added if result.loss is None else result.loss + added

    # Generation ------------------------------------------------------------------------------------------------------

    @torch.no_grad()  # within a budget images are encoded here
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        **kwargs: Any,
    ) -> ModelOutput | torch.LongTensor:
        """
        See `GenerationMixin.generate`. A base with another way to generate does it by itself.

        With `return_dict_in_generate=True` the output has `saliency_maps`, `saliency_map_sizes`, `score_logits` and
        `aspect_logits` too, one row an image whatever the number of beams or returned sequences; within an
        `image_token_budget` (the configuration's, or given here) also `image_token_mask` `(batch, prompt)`. Sequences
        begin with the whole prompt all the same; streamers and logits processors see the shorter one.
        """
        prompt = {**kwargs, **drop_none(input_ids=inputs)} if inputs is None or inputs.ndim == 2 else kwargs
        given, cut = self.model.within_budget(prompt, pad_left=True)
        if cut is None:
            kwargs.pop("image_token_budget", None)
            return self._generate(inputs, generation_config, **kwargs)
        whole, short = prompt["input_ids"], given["input_ids"].shape[1]
        given |= shorter_limits(generation_config or self.generation_config, kwargs, whole.shape[1] - short)
        outputs = self._generate(None, generation_config, **given)
        sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
        prompts = whole.repeat_interleave(len(sequences) // len(whole), dim=0)
        sequences = torch.cat([prompts, sequences[:, short:]], dim=1)
        if isinstance(outputs, torch.Tensor):
            return sequences
        outputs.sequences = sequences
        return add_fields(outputs, cut.fields())

    def _generate(
        self, inputs: torch.Tensor | None, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> ModelOutput | torch.LongTensor:
        if (features := kwargs.get("mm_encoder_outputs")) is not None:
            # transformers repeats the features for beams in the very object that it is given
            kwargs["mm_encoder_outputs"] = {name: copy(value) for name, value in features.items()}
        mllm = self.model.mllm
        # a method of its own (BLIP-2 and its kin), or an encoder for the text too (Florence-2)
        if type(mllm).generate is not GenerationMixin.generate or mllm.config.is_encoder_decoder:
            mllm.generation_config = self.generation_config
            generate, kwargs = (
                mllm.generate,
                {**kwargs, **drop_none(inputs=inputs, generation_config=generation_config)},
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
            prompts = drop_none(**{name: kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")})
            rows = (len(next(iter(prompts.values()))), times, -1)
            saliency = {
                name: None if values is None else values.unflatten(0, rows)[:, 0].flatten(0, 1)
                for name, values in saliency.items()
            }
        return add_fields(outputs, saliency)

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any], *args, **kwargs
    ) -> dict[str, Any]:
        given = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if (
            given is not None
            and given.get("image_tokens_cut") is not None
            and model_kwargs.get("attention_mask") is None
        ):
            # transformers has dropped it where nothing is padded, and gaps in positions would be taken for packed texts
            model_kwargs["attention_mask"] = torch.ones_like(inputs_tensor)
        # the base knows the names of its encoder's arguments; what it returns are the `model_kwargs` of generation
        with SaliencyRecorder(self.model) as recorder:
            prepared = self.model.mllm._maybe_prepare_encoder_kwargs_for_generation(
                inputs_tensor, model_kwargs, *args, **kwargs
            )
        features = (prepared.get("mm_encoder_outputs") or {}).get("image")  # not there for videos alone
        if features is not None and "saliency_maps" not in features:
            prepared["mm_encoder_outputs"]["image"] = add_fields(features, recorder.saliency())
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
