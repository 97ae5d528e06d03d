"""The subject of a check: the user's model, its masks and its training step, from the user's factory."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ringattn.check import huggingface
from ringattn.check.settings import IGNORED, Settings, SubjectError
from ringattn.context import ContextParallel
from ringattn.masks import Mask, causal
from ringattn.validation import UNKNOWN_MASK

Step = Callable[[nn.Module, Tensor, Tensor, ContextParallel], Tensor]
NOISE = 0.02  # added to every weight: a zero-initialised output layer would hide all that comes before it
WILD = 1e3  # weights beyond are memory that nobody initialised


@dataclass(frozen=True)
class Stack:
    """The masks of a model's attention layers, in order, without documents. ``each_layer`` is False where one mask
    stands for all layers, however many."""

    masks: tuple[Mask, ...]
    each_layer: bool


@dataclass(frozen=True)
class Subject:
    """What the factory made. ``step(model, tokens, labels, cp)`` returns the loss and leaves gradients."""

    model: nn.Module
    step: Step


def load_factory(name: str) -> Callable[[ContextParallel], Any]:
    """The function ``module:function``, looked for in the working directory first."""
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise
        raise SubjectError(f"--model {name}: no module {module!r} here or among the installed ones") from None
    if not callable(found):
        raise SubjectError(f"--model {name}: {module} has no function {function!r}")
    return found


def declared(factory: Callable[..., Any]) -> Stack | None:
    """The masks that the factory states as its attribute ``masks``, if it does."""
    masks = getattr(factory, "masks", None)
    if masks is None:
        return None
    each_layer = not isinstance(masks, Mask)
    masks = tuple(masks) if each_layer else (masks,)
    if not masks or not all(isinstance(m, Mask) for m in masks):
        raise SubjectError(f"masks={masks!r} of the factory: must be a ringattn mask, or one for each attention layer")
    return Stack(masks, each_layer)


def stack_of(factory: Callable[..., Any], model: nn.Module) -> Stack:
    """What the factory declares, or what the config of a Hugging Face model asks for, or causal attention."""
    stated = declared(factory)
    if stated is not None:
        return stated
    masks = huggingface.masks_of(model)
    return Stack((causal(),), False) if masks is None else Stack(masks, True)


def make(factory: Callable[[ContextParallel], Any], cp: ContextParallel, seed: int) -> Subject:
    """Calls the factory with every source of random numbers seeded alike on all ranks."""
    torch.manual_seed(seed)
    made = factory(cp)
    model, step = made if isinstance(made, tuple) and len(made) == 2 else (made, default_step)
    if not isinstance(model, nn.Module) or not callable(step):
        raise SubjectError(f"the factory returned {made!r:.200}: must be an nn.Module, or (nn.Module, step)")
    huggingface.allow_double(model)
    return Subject(model.eval(), step)


def settle_weights(model: nn.Module, seed: int) -> None:
    """Initialised numbers everywhere and none of them exactly zero, the same for the same seed."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p[~(p.abs() < WILD)] = 0.0  # NaN too
            p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype), alpha=NOISE)


def vocabulary(model: nn.Module, settings: Settings) -> int:
    """How many token ids there are: as told, as the config says, or as many as the smallest embedding takes."""
    if settings.vocab is not None:
        return settings.vocab
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    size = huggingface.vocab_size(model) or min(sizes, default=0)
    if size < 2:
        raise SubjectError("the model has neither config.vocab_size nor an nn.Embedding: say how many ids, --vocab N")
    return size


def call(model: nn.Module, tokens: Tensor, position_ids: Tensor) -> Tensor:
    """Logits ``[batch, local_seqlen, vocab]`` of a shard: tokens ``[batch, local_seqlen]``, position ids
    ``[1, local_seqlen]``. By keyword where ``forward`` has an argument ``input_ids``, as Hugging Face models do."""
    names = inspect.signature(model.forward).parameters
    cache = {"use_cache": False} if huggingface.is_one(model) else {}
    try:
        if "input_ids" in names:
            out = model(input_ids=tokens, position_ids=position_ids, **cache)
        else:
            out = model(tokens, position_ids)
    except ValueError as error:
        if UNKNOWN_MASK not in str(error):
            raise
        what = str(error).rpartition("; ")[0]  # the check makes the context, not whoever reads this
        raise SubjectError(
            f"{what}. The check cuts the masks of layers at the documents that it packs: state them as the factory's "
            "attribute, make.masks = [...], and let layers take theirs from cp.masks"
        ) from None
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.shape[:2] != tokens.shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise SubjectError(
            f"the model gave {got} for tokens {tuple(tokens.shape)}: must be [batch, local_seqlen, vocab], or an "
            "object with such .logits"
        )
    return logits


def default_step(model: nn.Module, tokens: Tensor, labels: Tensor, cp: ContextParallel) -> Tensor:
    """A right training step: labels shifted before they are sharded, the mean over all ranks' targets, gradients
    summed over the ranks.

    ``tokens`` and ``labels``: int64 ``[batch, seqlen]``, whole, labels not shifted and -100 without a target.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    logits = call(model, cp.shard(tokens), cp.position_ids[None])
    total = F.cross_entropy(logits.flatten(0, 1), cp.shard(targets).flatten(), ignore_index=IGNORED, reduction="sum")
    share = total / (targets != IGNORED).sum()
    share.backward()
    loss = share.detach()
    dist.all_reduce(loss)
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # an expert that no token of a rank chose
            dist.all_reduce(p.grad)
    return loss
