"""A region: as long as it is entered, `F.scaled_dot_product_attention` attends over the shards of all ranks.

PyTorch hands every function of its own that is called inside to the mode on top of a stack, and nothing is patched.
It takes modes off that stack for what such a function does inside, a whole backward for instance; in there activation
checkpointing computes layers again. So a region begins backward itself, by the edges of the graph, which are no
tensors and leave it entered.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from inspect import isfunction
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction

from ringattn.arguments.values import flag
from ringattn.attention import attention
from ringattn.comm import together
from ringattn.context import ContextParallel
from ringattn.geometry.masks import contains
from ringattn.masks import Mask, causal, full

SDPA = F.scaled_dot_product_attention
# What attends by other ways than SDPA, by names of functions and operators.
OTHERS = frozenset(
    "scaled_dot_product_attention multi_head_attention_forward _native_multi_head_attention flex_attention "
    "_varlen_attn".split()
)
LARGEST_SEED = (1 << 62) - 1
CALLED = "attention; scaled_dot_product_attention of context_parallel"


class local_attention(TorchFunctionMode):
    """``with local_attention():`` inside of a region: attention as PyTorch computes it, on this rank alone, over the
    tensors as they are. Right for keys that every rank holds whole (cross-attention to a text), since each query then
    sees all of them; such keys' gradients are this rank's part, as a parameter's are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _name(func) in OTHERS:  # SDPA among them
            with torch._C.DisableTorchFunction():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class Region(TorchFunctionMode):
    """Attends in a context. ``masks``: what a call sees that is not causal, and one that is. ``seed``: what dropout
    follows from, call by call in their order; None refuses dropout. ``name``: the same on all ranks that are in the
    same region, whose calls meet no other's."""

    def __init__(self, cp: ContextParallel, masks: tuple[Mask, Mask], seed: int | None, name: str) -> None:
        super().__init__()
        self.cp, self.masks, self.seed, self.name = cp, masks, seed, name
        self.drops = 0  # calls with dropout so far
        self.mark = torch.empty(0, int(cp.handle[0]) % (1 << 31), device="cpu")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            with torch._C.DisableTorchFunction():
                return self.attend(*args, **kwargs)
        if func is Tensor.backward:
            return self._backward(*args, **kwargs)
        if func is torch.autograd.backward:
            return self._backward_of(*args, **kwargs)
        if func is torch.autograd.grad:
            return self._grad(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):  # of a compiler: what it is to run begins in the region, too
            args = [self._entered(x) if isfunction(x) else x for x in args]
        if _name(func) in OTHERS:
            with together(self.cp.link.transport, CALLED):
                raise NotImplementedError(
                    f"{_name(func)} inside of context_parallel: it would attend in this rank's shard alone. Call "
                    "F.scaled_dot_product_attention, or ringattn.attention with the context that context_parallel "
                    "gives; what is meant to stay on each rank goes into `with local_attention():`"
                )
        return func(*args, **kwargs)

    def _entered(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inner

    # -- attention ------------------------------------------------------------------------------

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """See `F.scaled_dot_product_attention`: query ``[batch, num_heads, local_seqlen, head_dim]``, key and value
        ``[batch, num_kv_heads, local_seqlen, ...]``; returns ``[batch, num_heads, local_seqlen, v_head_dim]``.

        Raises `ValueError` or `NotImplementedError`, on all ranks, for what cannot be kept.
        """
        given = query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        if torch.compiler.is_compiling():
            try:
                return self._attend(*given)
            except (ValueError, NotImplementedError) as error:  # to be raised when the graph runs, on all ranks
                kind, text = type(error).__name__, error.args[0]
                return torch.ops.ringattn.refused_attention(query, self.cp.handle, kind, text)[0]
        with together(self.cp.link.transport, CALLED):  # what one rank refuses, all of them refuse
            self.cp.link.transport.log.within(self.name)
            return self._attend(*given)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
        scale: float | None, enable_gqa: bool,
    ) -> Tensor:  # fmt: skip
        self._check(query, key, value, attn_mask, flag("enable_gqa", enable_gqa))
        self._check_lengths(query.shape[2], key.shape[2], flag("is_causal", is_causal))
        out = attention(
            *self._marked(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)),
            cp=self.cp,
            mask=self.masks[is_causal],
            scale=scale,
            dropout_p=dropout_p,
            seed=self._seed_of(dropout_p),
            label="" if torch.compiler.is_compiling() else self.name,
        )
        return out.transpose(1, 2)

    def _check(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, gqa: bool) -> None:
        shapes = [tuple(int(n) for n in x.shape) for x in (q, k, v)]
        if any(len(shape) != 4 for shape in shapes):
            raise NotImplementedError(
                f"scaled_dot_product_attention of shapes {shapes} in context_parallel: must be [batch, heads, tokens, "
                "head_dim]; unsqueeze what is missing"
            )
        if attn_mask is not None:
            raise NotImplementedError(
                f"attn_mask of shape {tuple(int(n) for n in attn_mask.shape)} in context_parallel: a mask of the "
                "sequence squared is never held, and a shard of it would be of other keys. Say it as "
                "context_parallel(..., mask=ringattn.documents(cu_seqlens)) or another mask, is_causal, or both"
            )
        if not gqa and shapes[0][1] != shapes[1][1]:
            raise ValueError(f"{shapes[0][1]} heads and {shapes[1][1]} KV heads: pass enable_gqa=True")
        if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and _in_reentrant_checkpoint():
            raise NotImplementedError(
                "activation checkpointing with use_reentrant=True around attention in context_parallel: what it "
                "computes again behind the region would be another attention, and nothing would tell; pass "
                "use_reentrant=False"
            )

    def _check_lengths(self, queries: int, keys: int, is_causal: bool) -> None:
        cp, local = self.cp, self.cp.local_seqlen
        if queries == keys == local:
            return
        found = f"{int(queries)} queries and {int(keys)} keys, but rank {cp.rank} holds {local} of {cp.seqlen} tokens"
        if queries != keys and is_causal:
            raise NotImplementedError(
                f"is_causal=True with {found}: PyTorch aligns such a mask with the first key, wherever that lies in "
                "the whole sequence; use ringattn.attention with a ContextParallel(kv_seqlen=, q_offset=)"
            )
        if queries == local:
            raise NotImplementedError(
                f"{found}: keys of another sequence. Where every rank holds all of them, put the call into "
                "`with local_attention():`; sharded ones are ringattn.attention with a ContextParallel(kv_seqlen=)"
            )
        raise ValueError(
            f"{found}: what they were made of was not sharded. List all tensors along the sequence in buffers, or put "
            "a call that belongs to each rank alone into `with local_attention():`"
        )

    def _seed_of(self, dropout_p: float) -> int | None:
        if not dropout_p:
            return None
        if self.seed is None:
            raise NotImplementedError(
                f"dropout_p={dropout_p} in context_parallel: PyTorch's generator would drop other pairs on each number "
                "of ranks; pass context_parallel(..., seed=), a number of your own for each step, alike on all ranks"
            )
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            raise NotImplementedError(
                f"dropout_p={dropout_p} in context_parallel, in a compiled graph or a layer that is computed again "
                "(activation checkpointing): its calls are not counted there; use ringattn.attention with a seed of "
                "each layer's own"
            )
        self.drops += 1
        return hash((self.seed, self.drops)) & LARGEST_SEED

    def _marked(self, *qkv: Tensor) -> Sequence[Tensor]:
        """With the context's mark among what is saved for backward: activation checkpointing compares what it saves
        again, and so tells a layer that it computes again elsewhere."""
        first = next((i for i, x in enumerate(qkv) if x.requires_grad), None)
        if first is None or torch.compiler.is_compiling():
            return qkv
        return [_Mark.apply(x, self.mark) if i == first else x for i, x in enumerate(qkv)]

    # -- backward -------------------------------------------------------------------------------

    def _backward(self, loss: Tensor, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:
        self._backward_of(loss, gradient, *args, **kwargs)

    def _backward_of(
        self, tensors: Any, grad_tensors: Any = None, retain_graph: bool | None = None, create_graph: bool = False,
        inputs: Any = None,
    ) -> None:  # fmt: skip
        roots, grads = _tuple(tensors), _grads(_tuple(tensors), grad_tensors)
        for x in () if inputs is None else _tuple(inputs):
            if isinstance(x, Tensor) and not x.is_leaf:
                x.retain_grad()
        into = None if inputs is None else _edges(_tuple(inputs))
        with self:
            torch.autograd.backward(_edges(roots), grads, retain_graph, create_graph, inputs=into)

    def _grad(self, outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        roots, grads = _tuple(outputs), _grads(_tuple(outputs), grad_outputs)
        with self:
            return torch.autograd.grad(_edges(roots), _edges(_tuple(inputs)), grads, *args, **kwargs)


class _Mark(torch.autograd.Function):
    """Its input, and a tensor beside that is saved and never looked at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mark: Tensor) -> Tensor:
        ctx.save_for_backward(mark)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def masks_of(mask: Mask | None, seqlen: int) -> tuple[Mask, Mask]:
    """What a call sees that is not causal, and one that is, where all calls see at most ``mask``."""
    if mask is None:
        return full(), causal()
    if not isinstance(mask, Mask):  # the context says why
        return mask, mask
    return mask, mask if contains(causal(), mask, seqlen) else mask & causal()


def _name(func: Any) -> str:
    """Of an operator without its overload."""
    return str(getattr(func, "__name__", "")).partition(".")[0]


def _in_reentrant_checkpoint() -> bool:
    """Whether this is a forward of which nothing is kept but its inputs."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def _tuple(tensors: Any) -> tuple[Any, ...]:
    if isinstance(tensors, (Tensor, GradientEdge)):
        return (tensors,)
    return tuple(tensors.values() if isinstance(tensors, dict) else tensors)


def _edges(tensors: Sequence[Any]) -> tuple[GradientEdge, ...]:
    return tuple(get_gradient_edge(x) if isinstance(x, Tensor) else x for x in tensors)


def _grads(roots: Sequence[Any], given: Any) -> list[Any]:
    """The gradients to begin with; of a scalar it is one, of its own class."""
    grads = [None] * len(roots) if given is None else _tuple(given)
    return [torch.ones_like(x) if g is None and isinstance(x, Tensor) and x.numel() == 1 else g
            for x, g in zip(roots, grads, strict=True)]  # fmt: skip
