"""What Transformers says of a layer's mask, as `ringattn` masks.

Transformers describes a layer's mask as a composition of index functions (`transformers.masking_utils`) and hands it to
the mask function that is registered under the model's attention name. The function here never builds a tensor of the
sequence squared: it translates the composition, and what it returns reaches the layers as their `attention_mask`.
A function that it does not know is refused by name, because dropping it would change the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from ringattn.masks import Mask, causal, chunked, sliding_window
from ringattn.planning.shape import Shape

_PACKED = "packed_sequence_mask_function"  # Transformers' guess at documents
LAYERS = ("full_attention", "chunked_attention", "sliding_attention")  # of Transformers' `layer_types`


@dataclass(frozen=True)
class Structure:
    """What a layer may see, apart from documents: keys up to its own position or all of them, within `limits`.

    padding: bool `[batch, seqlen]` as the model was given it, True for real tokens, or None. jumps: whether
    Transformers saw positions that do not count up one by one. model: whose it is. refusal: why no layer can have it.
    """

    causal: bool
    limits: tuple[Mask, ...] = ()
    padding: Tensor | None = field(default=None, compare=False)
    jumps: bool = field(default=False, compare=False)
    model: str = field(default="the model", compare=False)
    refusal: NotImplementedError | None = field(default=None, compare=False)

    @cached_property
    def padding_kind(self) -> str:
        """`none`, `right` (behind the real tokens of each row) or `other`. Waits for the device, once."""
        if self.padding is None or bool(self.padding.all()):
            return "none"
        comes_back = self.padding[:, 1:] & ~self.padding[:, :-1]
        return "other" if bool(comes_back.any()) else "right"


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **others: Any,
) -> Structure:
    """The mask function that is registered under the attention's name; see `transformers.AttentionMaskInterface`.

    A mask it does not know, and a cache that holds earlier tokens, are refused where a layer attends, with all ranks.
    """
    model = describe_model(config)
    try:
        check_layers(config, getattr(config, "layer_types", None) or ())
        _check_cache(model, q_offset)
        is_causal, limits = (True, ()) if mask_function is None else _translate(mask_function, model)
    except NotImplementedError as error:
        return Structure(True, model=model, refusal=error)
    jumps = mask_function is not None and _is_packed(mask_function)
    return Structure(is_causal, limits, attention_mask, jumps, model)


def _check_cache(model: str, q_offset: Any) -> None:
    if not isinstance(q_offset, int) or q_offset:
        raise NotImplementedError(
            f"{model}: a KV cache of earlier tokens (q_offset={q_offset}), as generate() keeps; sharded attention "
            "computes whole sequences, so pass use_cache=False, and decode after model.set_attn_implementation('sdpa')"
        )


def describe_model(config: Any) -> str:
    """The class of the model that a config belongs to, for error texts."""
    names = getattr(config, "architectures", None)
    return names[0] if names else f"a model of type {getattr(config, 'model_type', type(config).__name__)!r}"


def window(width: int) -> Mask:
    """Transformers' `sliding_window`, which counts the token itself, as a limit: nothing older than `width - 1`."""
    return sliding_window(width - 1, None)


def _translate(function: Callable[..., Any], model: str) -> tuple[bool, tuple[Mask, ...]]:
    """Whether it is causal, and its limits."""
    name, inside = _captured(function)
    match name:
        case "causal_mask_function":
            return True, ()
        case "bidirectional_mask_function":
            return False, ()
        case "and_masks":
            parts = [_translate(part, model) for part in inside["mask_functions"]]
            return any(part[0] for part in parts), tuple(limit for part in parts for limit in part[1])
        case "sliding_window_overlay" | "sliding_window_bidirectional_overlay" if not inside["sliding_window"]:
            return False, ()  # some configs say 0 for none
        case "sliding_window_overlay":
            return False, (window(inside["sliding_window"]),)
        case "sliding_window_bidirectional_overlay":
            return False, (sliding_window(inside["sliding_window"], inside["sliding_window"]),)
        case "chunked_overlay" if not bool(inside["left_padding"].any()):
            return False, (chunked(inside["chunk_size"]),)
        # Transformers' own guess at documents, from the jumps in one shard's positions. Whole bounds come with the
        # batch; positions that start again without them are refused where the attention sees them.
        case "remap_positions_for_packed_sequence":
            return _translate(inside["mask_function"], model)
        case _ if name == _PACKED:
            return False, ()
    raise NotImplementedError(
        f"{model}: its mask is made of {name}, which is not known here; give that layer another attention, or describe "
        "the mask to the context (ContextParallel(mask=...)) and call ringattn.attention yourself"
    )


def _is_packed(function: Callable[..., Any]) -> bool:
    name, inside = _captured(function)
    return name == _PACKED or (name == "and_masks" and any(map(_is_packed, inside["mask_functions"])))


def _captured(function: Callable[..., Any]) -> tuple[str, dict[str, Any]]:
    """The name of the function, or of the function that made it, and the variables it has captured."""
    code = getattr(function, "__code__", None)
    if code is None:
        return repr(function), {}
    values = (cell.cell_contents for cell in function.__closure__ or ())
    return function.__qualname__.split(".")[0], dict(zip(code.co_freevars, values, strict=True))


def layer_masks(config: Any, base: Mask = causal()) -> tuple[Mask, ...]:  # noqa: B008 - a mask is immutable
    """The mask of each layer of a model's stack, in order.

    Args:
        config: a Transformers config; of a composite one the text part.
        base: what a layer without limits sees: causal, or documents & causal, ...

    Raises `NotImplementedError` for layers that are no softmax attention.
    """
    return tuple(limited(base, _limits(config.get_text_config(), kind)) for kind in _types(config))


def masks_of(config: Any, base: Mask = causal()) -> tuple[Mask, ...]:  # noqa: B008 - a mask is immutable
    """The masks of a model's whole stack of layers, for `ContextParallel(mask=...)`, so that the layout suits them all:
    :func:`layer_masks` without repeats, the widest first."""
    ordered = sorted(set(_types(config)), key=LAYERS.index)
    return tuple(dict.fromkeys(limited(base, _limits(config.get_text_config(), kind)) for kind in ordered))


def shape_of(config: Any, batch: int = 1, dtype: Any = "bfloat16") -> Shape:
    """The shape of a model's attention calls, for `ContextParallel(shape=...)`; with latent attention K and V of all
    heads travel. Of a composite config the text part. batch: rows of a call; dtype: in which q, k and v are, by name or
    a `torch.dtype`, since a config says nothing of autocast.

    Raises `ValueError` for what is no config, and for one whose layers differ in heads or their sizes.
    """
    try:
        return _shape_of(config.get_text_config(), batch, dtype)
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            f"{type(config).__name__}: no one shape of attention for all its layers ({error}); pass a config, or "
            "ringattn.Shape(num_heads, num_kv_heads, head_dim) with the largest of them"
        ) from None


def _shape_of(config: Any, batch: int, dtype: Any) -> Shape:
    heads = config.num_attention_heads
    if getattr(config, "kv_lora_rank", None):
        return Shape(heads, heads, config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim, batch, dtype)
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(heads, getattr(config, "num_key_value_heads", None) or heads, dim, batch=batch, dtype=dtype)


def _types(config: Any) -> list[str]:
    config = config.get_text_config()
    types = getattr(config, "layer_types", None)
    if types is None:
        kind = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
        types = [kind] * config.num_hidden_layers
    check_layers(config, types)
    return list(types)


def _limits(config: Any, kind: str) -> tuple[Mask, ...]:
    if kind == "sliding_attention" and getattr(config, "sliding_window", None):
        return (window(config.sliding_window),)
    if kind == "chunked_attention" and getattr(config, "attention_chunk_size", None):
        return (chunked(config.attention_chunk_size),)
    return ()


def check_layers(config: Any, types: Iterable[str]) -> None:
    """Raises `NotImplementedError` for layers that carry state along the sequence without attention: each shard
    would start afresh, without a word."""
    _check_rotation(config)
    unknown = sorted(set(types) - set(LAYERS))
    if unknown:
        raise NotImplementedError(
            f"{describe_model(config)} has layers of type {', '.join(unknown)}, which would not see beyond their "
            f"shard; only {', '.join(LAYERS)} can be sharded here"
        )


def _check_rotation(config: Any) -> None:
    """Raises for rotary embeddings that Transformers computes from the largest position it is given: each shard would
    be rotated as a sequence of another length."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    each = [found, *(value for value in found.values() if isinstance(value, dict))]
    for kind in ("dynamic", "longrope"):
        if any(kind == parameters.get("rope_type", parameters.get("type")) for parameters in each):
            raise NotImplementedError(
                f"{describe_model(config)} has rope_type {kind!r}, whose angles Transformers takes from the length of "
                "the shard; give the config a type with fixed angles (default, linear, yarn, llama3)"
            )


def limited(base: Mask, limits: tuple[Mask, ...]) -> Mask:
    """`base` within limits; a causal window is written as users write it."""
    for limit in limits:
        if base == causal() and limit.kind == "sliding_window" and limit.args[1] is None:
            base = sliding_window(limit.args[0])
        else:
            base = base & limit
    return base
