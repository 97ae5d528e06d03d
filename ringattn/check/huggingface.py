"""What is particular to Hugging Face models, read off the model itself: Transformers is imported for these alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ringattn.check.settings import SubjectError
from ringattn.masks import Mask


def is_one(model: nn.Module) -> bool:
    return hasattr(model, "set_attn_implementation") and hasattr(model, "config")


def _config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def vocab_size(model: nn.Module) -> int:
    return int(getattr(_config(model), "vocab_size", 0) or 0) if is_one(model) else 0


def kinds_of(model: nn.Module) -> list[str]:
    """The kind of each layer, as ``config.layer_types`` has it or as the window implies."""
    config = _config(model)
    windowed = getattr(config, "sliding_window", None) is not None
    every = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return list(getattr(config, "layer_types", None) or every)


def masks_of(model: nn.Module) -> tuple[Mask, ...] | None:
    """The mask of each layer of a Hugging Face decoder; None for another module.

    Raises :class:`SubjectError` for a model that cannot be sharded as it is.
    """
    if not is_one(model):
        return None
    from ringattn.integrations.transformers import layer_masks

    try:
        return layer_masks(_config(model))
    except NotImplementedError as error:
        raise SubjectError(
            f"{error}; or state the masks of the stack as an attribute of the factory, factory.masks = [one ringattn "
            "mask for each attention layer]"
        ) from None


def allow_double(model: nn.Module) -> None:
    """Experts as a loop: torch's grouped matmul, which Transformers takes by default, knows no fp64."""
    if is_one(model) and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # type: ignore[operator]


def make_independent(model: nn.Module, masks: tuple[Mask, ...], seqlen: int, packed: bool) -> None:
    """Puts Transformers' own attention into a model, for the run that ringattn's results are compared with: sdpa, or
    eager where the model cannot use sdpa (sinks, softcap). With packed documents it is given the masks as tensors;
    without, it makes its own from its config.
    """
    implementation = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    model.set_attn_implementation(implementation)  # type: ignore[operator]
    if not packed:
        return
    additive = implementation == "eager"
    of_kind = {k: _dense(m, seqlen, additive) for k, m in zip(kinds_of(model), masks, strict=True)}
    mask = of_kind if len(of_kind) > 1 else next(iter(of_kind.values()))

    def give_mask(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "attention_mask": mask}

    model.register_forward_pre_hook(give_mask, with_kwargs=True)


def _dense(mask: Mask, seqlen: int, additive: bool) -> Tensor:
    """Bool ``[1, 1, seqlen, seqlen]``, or what to add to the scores."""
    allowed = mask.dense(seqlen, seqlen)[None, None]
    if not additive:
        return allowed
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -torch.inf)
