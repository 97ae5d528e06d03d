"""DeepSpeed's `DistributedAttention`, for models that call it themselves, around the ring's attention."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.sequence.layer import DistributedAttention
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ringattn.attention import attention
from ringattn.comm import together
from ringattn.context import ContextParallel
from ringattn.integrations.deepspeed.compiling import compile_nothing


class LocalAttention(nn.Module):
    """What computes between DeepSpeed's two exchanges: all of the ring's tokens on this rank, some of the heads."""

    def __init__(self, cp: ContextParallel) -> None:
        super().__init__()
        self.cp = cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *, sequence_first: bool, **scores: Any) -> Tensor:
        """Tensors `[batch, seqlen, heads, dim]`, or `[seqlen, batch, heads, dim]` with `sequence_first`."""
        if sequence_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        out: Tensor = attention(query, key, value, cp=self.cp, **scores)
        return out.transpose(0, 1) if sequence_first else out


class RingDistributedAttention(DistributedAttention):
    """`deepspeed.sequence.layer.DistributedAttention` whose local attention is the ring's.

    The ranks of `ulysses` hold the pieces of one shard of the ring, in storage order: `x` of a rank is
    `cp.shard(x).chunk(u, dim=1)[ulysses_rank]`. (Without DeepSpeed: `ContextParallel(..., ulysses=u)`.)

    Args:
        cp: over the other axis, the ring; `cp.local_seqlen` must divide by the ranks of `ulysses`.
        ulysses: the 1-D mesh, or the group, of the ranks that split heads.
    """

    def __init__(self, cp: ContextParallel, ulysses: DeviceMesh | dist.ProcessGroup) -> None:
        compile_nothing()
        deepspeed.init_distributed(verbose=False)  # DeepSpeed's exchange goes over its own backend
        group = ulysses.get_group() if isinstance(ulysses, DeviceMesh) else ulysses
        super().__init__(LocalAttention(cp), group)
        self.cp, self.ranks = cp, dist.get_world_size(group)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch_dim_idx: int = 0,
        rotary_pos_emb: Any = None,
        **scores: Any,
    ) -> Tensor:
        """As DeepSpeed's: `[batch, piece, heads, dim]` with `batch_dim_idx=0`, `[piece, batch, heads, dim]` with 1.

        scores: `mask`, `scale` and `softcap` of `ringattn.attention`. What counts heads (a bias, sinks, dropout) is
        refused, since a rank sees some of the heads.
        """
        with together(self.cp.link.transport, "RingDistributedAttention"):
            self._check((query, key, value), batch_dim_idx, rotary_pos_emb, scores)
        self.gather_idx = 1 - batch_dim_idx
        out: Tensor = super().forward(query, key, value, batch_dim_idx, sequence_first=batch_dim_idx == 1, **scores)
        return out

    def _check(self, qkv: tuple[Tensor, ...], batch_dim_idx: int, rotary: Any, scores: dict[str, Any]) -> None:
        if batch_dim_idx not in (0, 1) or any(x.ndim != 4 for x in qkv):
            raise ValueError(
                f"batch_dim_idx={batch_dim_idx} and tensors {[tuple(x.shape) for x in qkv]}: must be [batch, piece, "
                "heads, dim] and 0, or [piece, batch, heads, dim] and 1"
            )
        if rotary is not None:
            raise ValueError("rotary_pos_emb: its rows would be those of another shard; rotate q and k before")
        for x, name in zip(qkv, ("query", "key", "value"), strict=True):
            if x.size(2) % self.ranks:
                raise ValueError(
                    f"{name} has {x.size(2)} heads for {self.ranks} ranks of ulysses: DeepSpeed splits uneven heads by "
                    "a rank that it knows only of its own mpu, and would mix them up; take a divisor, repeat KV heads, "
                    "or ContextParallel(ulysses=...), which splits any"
                )
            if x.size(1 - batch_dim_idx) * self.ranks != self.cp.local_seqlen:
                raise ValueError(
                    f"{name} has {x.size(1 - batch_dim_idx)} tokens, but a piece has {self.cp.local_seqlen} / "
                    f"{self.ranks} of them on every rank: shard with cp.shard(x).chunk(ranks)[rank], and "
                    "lengths that divide"
                )
        counted = set(scores) - {"mask", "scale", "softcap"}
        if counted:
            raise ValueError(
                f"{sorted(counted)[0]} is counted by heads, of which a rank sees some under other numbers; use "
                "ContextParallel(ulysses=...), which knows them"
            )
