"""Activation checkpointing that keeps attention: recomputing a layer in backward does not run the ring again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import ops
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

import ringattn.runtime.dispatch  # noqa: F401 - defines the operator


def keep_attention() -> Callable[[], Any]:
    """The `context_fn` of `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)` that saves `(out, lse)` of each
    attention by the operator's name and computes everything else again. K/V then travel once in forward and once in
    backward, as without checkpointing.

    For a Transformers model: `model.activation_checkpointing_enable({"use_reentrant": False, "context_fn":
    keep_attention()})`, which before version 5.24 is called `gradient_checkpointing_enable`.
    """
    return partial(create_selective_checkpoint_contexts, _policy)


def _policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    saved = operator is ops.ringattn.attention.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE
