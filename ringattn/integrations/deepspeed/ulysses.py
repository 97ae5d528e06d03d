"""The ring inside DeepSpeed's Ulysses for Transformers (`UlyssesSPAttentionHF`).

DeepSpeed exchanges heads for tokens, calls the attention that it finds under a name, and exchanges back. It hands no
mask on: whatever Transformers made of padding, windows and documents is replaced by None. Here the mask goes round it,
so that the ring sees all of it, and keeps it or refuses.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.sequence_parallel import parallel_state_sp as state
from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ringattn.arguments.values import integer
from ringattn.comm import together, told
from ringattn.context import ContextParallel
from ringattn.integrations.deepspeed.agreement import agree
from ringattn.integrations.deepspeed.compiling import compile_nothing
from ringattn.integrations.transformers.attention import RingAttention, register
from ringattn.integrations.transformers.data import shard_batch
from ringattn.integrations.transformers.ring import Ring
from ringattn.integrations.transformers.structure import describe_model

WHOLE = ("cu_seq_lens_q", "cu_seq_lens_k")  # of a batch: told on every rank as they are


class UlyssesRing:
    """The ring of a model inside DeepSpeed's Ulysses, and what of a batch lies on this rank.

    ring: as `ringattn.integrations.transformers.register` returns it. ranks, rank: of the axis that splits heads.
    """

    def __init__(self, ring: Ring, ranks: int, rank: int) -> None:
        self.ring, self.ranks, self.rank = ring, ranks, rank

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """This rank's piece of a whole tensor along `dim`: of its ring's shard one of `ranks`, in storage order."""
        cp = self.ring.cp
        with told(cp.link.transport, "UlyssesRing.shard"):
            return self._piece(cp.shard(x, dim), dim)

    def shard_batch(self, batch: Mapping[str, Any], *, multiple: int = 1) -> dict[str, Tensor]:
        """As :func:`ringattn.integrations.transformers.shard_batch`, and of each tensor this rank's piece."""
        local = shard_batch(self.ring.cp, batch, multiple=multiple)
        with told(self.ring.cp.link.transport, "UlyssesRing.shard_batch"):
            return {name: x if name in WHOLE else self._piece(x, x.ndim - 1) for name, x in local.items()}

    def _piece(self, local: Tensor, dim: int) -> Tensor:
        _check_even(local.size(dim), self.ranks)
        return local.chunk(self.ranks, dim)[self.rank].contiguous()


def register_ulysses(
    cp: ContextParallel,
    model: nn.Module,
    ulysses: int,
    *,
    micro_batch_size: int = 1,
    name: str = "ringattn",
    check_positions: bool = True,
) -> UlyssesRing:
    """Makes a model attend in a ring inside DeepSpeed's Ulysses, by `UlyssesSPAttentionHF.register_with_transformers`.

    A call of all ranks. DeepSpeed splits heads over consecutive ranks, so the ring is the outer axis:
    `mesh = init_device_mesh(device, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))`, `cp` over `mesh["ring"]`.

    Args:
        cp: the context over the ring axis, any layout; `cp.local_seqlen` must divide by `ulysses` on every rank.
        model: from Transformers, not yet given to DeepSpeed. Heads must divide by `ulysses`, KV heads divide or be
            divided by it.
        ulysses: ranks that split heads, at least 2.
        micro_batch_size: rows of every batch; packed rows are one.
        name: the attention implementation's name.
        check_positions: as of `ringattn.integrations.transformers.register`.

    Train with :func:`initialize` and :func:`backward`; the mpu that DeepSpeed returns is for nothing here.

    Raises `ValueError`, on all ranks, for what DeepSpeed cannot split, ranks in another order, and while another
    Ulysses is registered in this process: DeepSpeed knows one at a time, and :func:`release_ulysses` ends it.
    """
    compile_nothing()
    deepspeed.init_distributed(verbose=False)
    agree("register_ulysses", lambda: _facts(cp, model, ulysses, name))
    ring = register(cp, model, name=name, check_positions=check_positions)
    inside = RingInUlysses(ALL_ATTENTION_FUNCTIONS[name], ulysses, micro_batch_size)
    ALL_ATTENTION_FUNCTIONS[name] = inside.attend
    UlyssesSPAttentionHF.register_with_transformers(
        model, core_attn_implementation=name, sequence_parallel_size=ulysses, micro_batch_size=micro_batch_size
    )
    inside.exchange = ALL_ATTENTION_FUNCTIONS[name]
    ALL_ATTENTION_FUNCTIONS[name] = inside
    return UlyssesRing(ring, ulysses, state.get_sequence_parallel_rank())


def release_ulysses(name: str = "ringattn") -> None:
    """Ends what :func:`register_ulysses` began, so that another model or size can be registered in this process."""
    if isinstance(ALL_ATTENTION_FUNCTIONS.get(name), RingInUlysses):
        del ALL_ATTENTION_FUNCTIONS[name]  # this instance's own entry, which covers the ring's
    state._release_sequence_parallel_groups()


class RingInUlysses:
    """What Transformers' registry holds: DeepSpeed's exchange of heads around the ring's attention."""

    def __init__(self, inner: RingAttention, ranks: int, rows: int) -> None:
        self.inner, self.ranks, self.rows = inner, ranks, rows
        self.exchange: Callable[..., tuple[Tensor, None]]
        self._gathered: tuple[Callable[[], Tensor | None], Tensor] | None = None  # positions of a piece, of the shard

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **others: Any
    ) -> tuple[Tensor, None]:
        """A layer's call: `[batch, num_heads, piece, head_dim]`, all heads of this rank's tokens."""
        model = describe_model(getattr(module, "config", None))
        ring = self.inner.ring(module, model)
        with together(ring.cp.link.transport, f"a layer of {model}"):
            self._check(model, ring, (query, key, value), others)
        mask, piece = attention_mask, others.get("position_ids")
        return self.exchange(module, query, key, value, None, ring_mask=mask, ring_positions=piece, **others)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **others: Any
    ) -> tuple[Tensor, None]:
        """The call inside the exchange: some of the heads, for all tokens of the ring's shard."""
        mask, piece = others.pop("ring_mask"), others.pop("ring_positions")
        if self._gathered is None or self._gathered[0]() is not piece:
            self._gathered = weakref.ref(piece), others["position_ids"]
        others["position_ids"] = self._gathered[1]  # one tensor for all layers: each tensor is looked at once
        return self.inner(module, query, key, value, mask, **others)

    def _check(self, model: str, ring: Ring, qkv: tuple[Tensor, ...], others: Mapping[str, Any]) -> None:
        """Raises for what would be lost, or hang, in DeepSpeed's exchange."""
        query, key, value = qkv
        if query.size(0) != self.rows:
            raise ValueError(
                f"{model}: {query.size(0)} rows in a batch, but micro_batch_size={self.rows} was registered; packed "
                "rows are one"
            )
        if key.shape != value.shape:
            raise NotImplementedError(
                f"{model}: K {tuple(key.shape)} and V {tuple(value.shape)} of other sizes, which DeepSpeed cannot "
                "exchange; use ContextParallel(ulysses=...)"
            )
        for what, found in (("dropout", others.get("dropout")), ("s_aux", others.get("s_aux"))):
            if found is not None and found is not False and (what == "s_aux" or found):
                raise NotImplementedError(
                    f"{model}: {what} is counted by heads, of which a rank computes some under other numbers; use "
                    "ContextParallel(ulysses=...), which knows them"
                )
        cu = others.get("cu_seq_lens_q")
        ring.batch(model, query.size(2) * self.ranks, cu, others.get("cu_seq_lens_k"), others.get("seq_idx"), None)


def _facts(cp: ContextParallel, model: nn.Module, ulysses: int, name: str) -> dict[str, str]:
    """What the ranks must have alike. Raises what this rank refuses."""
    ranks, world, rank = integer("ulysses", ulysses, 2), dist.get_world_size(), dist.get_rank()
    if world % (ranks * cp.world_size):
        raise ValueError(
            f"ulysses={ranks} and a ring of {cp.world_size}: their product must divide the {world} ranks; start "
            "another number of ranks"
        )
    if cp.rank != rank // ranks % cp.world_size:
        raise ValueError(
            f"rank {rank} is number {cp.rank} of its ring, but DeepSpeed splits heads over consecutive ranks, so it "
            f"must be {rank // ranks % cp.world_size}: make it on mesh['ring'] of a mesh whose last axis is ulysses"
        )
    _check_even(cp.local_seqlen, ranks)
    _check_heads(model, ranks)
    if state._SEQUENCE_PARALLEL_GROUP is not None or isinstance(ALL_ATTENTION_FUNCTIONS.get(name), RingInUlysses):
        raise ValueError(
            "another Ulysses is registered in this process, and DeepSpeed knows one at a time; end it with "
            "ringattn.integrations.deepspeed.ulysses.release_ulysses()"
        )
    return {"ulysses": str(ranks), "seqlen": str(cp.seqlen), "masks": str(cp.masks), "layout": cp.q_layout.name}


def _check_even(tokens: int, ranks: int) -> None:
    if tokens % ranks:
        raise ValueError(
            f"a shard of {tokens} tokens for ulysses={ranks}: DeepSpeed exchanges equal pieces alone; take a length "
            "that divides on every rank (multiple= of a batch that is packed), or ContextParallel(ulysses=...), which "
            "takes any"
        )


def _check_heads(model: nn.Module, ranks: int) -> None:
    config: Any = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no config: DeepSpeed's Ulysses is for models of Transformers")
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{heads} heads and {kv_heads} KV heads for ulysses={ranks}: heads must divide by it, KV heads divide or "
            "be divided by it; take another number, or ContextParallel(ulysses=...), which splits any"
        )
