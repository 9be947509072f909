"""What makes the outer model answer like its base: signatures, and outputs with fields beside the base's own."""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import make_dataclass
from functools import cache, wraps
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput


CACHE_NAMES = ("past_key_values", "cache")  # before transformers 5.24 and since


def drop_none(**kwargs: Any) -> dict[str, Any]:
    """Without the `None`s: some bases treat an explicit `None` otherwise than a missing argument."""
    return {name: value for name, value in kwargs.items() if value is not None}


def without(outputs: ModelOutput, name: str) -> ModelOutput:
    return type(outputs)(**{key: value for key, value in outputs.items() if key != name})


def signed_as(method: MethodType, base: Callable) -> MethodType:
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


def add_fields(outputs: ModelOutput, fields: dict[str, torch.Tensor | None]) -> ModelOutput:
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
        return add_fields, (base(**values), fields)

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
