"""Megatron-Core's attention over its context-parallel group: a `core_attention` for the spec of a layer.

layer = get_gpt_layer_local_spec()  # or the spec with Transformer Engine's modules
layer.submodules.self_attention.submodules.core_attention = RingAttention
model = GPTModel(config, transformer_layer_spec=layer, ...)  # context_parallel_size and the batches as ever
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor, nn

from ringattn.attention import attention
from ringattn.comm import together
from ringattn.context import ContextParallel
from ringattn.geometry.layouts import Layout
from ringattn.masks import Mask, causal, documents, full, sliding_window
from ringattn.runtime.settings import Options

LARGEST_SEED = (1 << 62) - 1
KEPT = 8  # contexts of recent batches that are kept
SCHEDULES = {None: "auto", "p2p": "auto", "all_gather": "gather"}  # by cp_comm_type
CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)
MASKS = (*CAUSAL, AttnMaskType.no_mask, AttnMaskType.padding)


class RingAttention(MegatronModule):
    """Takes the place of `DotProductAttention` and `TEDotProductAttention`, with their arguments.

    Each rank of the context-parallel group holds what Megatron's batches give it: of a sequence cut into 2 x cp equal
    chunks, chunk `r` and chunk `2 cp - 1 - r`; of packed sequences (`packed_seq_params`, thd) these chunks of each.
    Attention is causal or full as `attn_mask_type` says, within `window_size` where the layer has one, and within each
    packed sequence; padding between these attends to itself alone. `softmax_type` may be any: an offset is a sink.

    ``seed``: what dropout in attention follows from, a number of your own for each micro-batch (its count, say), the
    same on all ranks; without one, dropout is refused.

    Raises `NotImplementedError` at once for settings that it would not keep, and in `forward()` for a mask or a bias
    given as a tensor, a KV cache, cross-attention, and groups that change from batch to batch.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        _check_config(config, attention_type, cp_comm_type)
        self.layer_number = max(1, layer_number)
        self.attn_mask_type = attn_mask_type
        self.scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.seed: int | None = None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if windowed else None
        self.tp_group = _group_of(pg_collection, "tp", parallel_state.get_tensor_model_parallel_group)
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:  # else it may have a group, and not use it
            self.cp_group = _group_of(pg_collection, "cp", parallel_state.get_context_parallel_group)
        self._schedule = SCHEDULES[cp_comm_type]
        self._options = Options(deterministic=config.deterministic_mode)
        self._own = Contexts(None, self._options)  # of one rank
        self._add_offset(config)

    def _add_offset(self, config: TransformerConfig) -> None:
        """One more logit a head, as `DotProductAttention` has it."""
        self.softmax_offset: Tensor | None = None
        if config.softmax_type == "vanilla":
            return
        heads = config.num_attention_heads // self.tp_group.size()
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
        offset = torch.zeros(heads, device=device, dtype=config.params_dtype)
        if config.softmax_type == "off-by-one":
            self.softmax_offset = offset
            return
        del self.softmax_offset
        self.register_parameter("softmax_offset", nn.Parameter(offset))
        if config.perform_initialization:
            config.init_method(self.softmax_offset)

    sharded_state_dict = DotProductAttention.sharded_state_dict  # of softmax_offset, where it is learned

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """query `[local_seqlen, batch, num_heads, head_dim]`, key and value with this tensor-parallel rank's query
        groups; `[tokens, heads, head_dim]` where sequences are packed. Returns `[local_seqlen, batch, num_heads *
        v_head_dim]`, `[tokens, num_heads * v_head_dim]`."""
        contexts = contexts_of(self.cp_group, self._options) if self.cp_group is not None else self._own
        with together(contexts.base.link.transport, f"layer {self.layer_number}"):  # refused on one rank, on all
            kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
            _check_call(query, key, attention_mask, kind, attention_bias, packed_seq_params)
            packed = query.ndim == 3
            tokens = query.size(0) * contexts.base.world_size
            batch = contexts.packed(packed_seq_params, tokens) if packed else contexts.chunks(tokens)
            q, k, v = (x[None] if packed else x.transpose(0, 1) for x in (query, key, value))
            out = attention(
                q, k, v,
                cp=contexts.context(batch, self._mask(kind), self._schedule),
                scale=self.scale,
                sinks=self.softmax_offset,
                label=f"layer {self.layer_number}",
                **self._dropout(),
            )  # fmt: skip
        return (out[0] if packed else out.transpose(0, 1)).flatten(-2)

    def _mask(self, kind: AttnMaskType) -> Mask:
        mask = causal() if kind in CAUSAL else full()
        if self.window is None:
            return mask
        left, right = (None if side < 0 else side for side in self.window)
        return mask & sliding_window(left, 0 if kind in CAUSAL else right)

    def _dropout(self) -> dict[str, Any]:
        if not (self.training and self.dropout):
            return {}
        if self.seed is None:
            raise NotImplementedError(
                f"attention_dropout={self.dropout} without a seed: Megatron's generators differ between the ranks of a "
                "sequence; set RingAttention.seed of each layer to a number of the micro-batch, or attention_dropout=0"
            )
        seed = hash((self.seed, self.layer_number, self.tp_group.rank())) & LARGEST_SEED
        return {"dropout_p": self.dropout, "seed": seed}


def _group_of(collection: Any, name: str, fallback: Any) -> dist.ProcessGroup:
    return fallback() if collection is None else getattr(collection, name)


def _check_config(config: TransformerConfig, attention_type: str, cp_comm_type: str | None) -> None:
    """Raises `NotImplementedError` for what would not be kept."""
    refused = {
        "attention_type": (attention_type != "self", attention_type, "keys of another sequence are not sharded so"),
        "cp_comm_type": (
            cp_comm_type not in SCHEDULES,
            cp_comm_type,
            "an all-to-all of heads needs shards of neighbouring tokens; choose p2p or all_gather",
        ),
        **{
            name: (getattr(config, name, False), True, why)
            for name, why in {
                "qk_clip": "largest logits are not handed back; leave it out",
                "log_max_attention_logit": "largest logits are not handed back; leave it out",
                "fp8_dot_product_attention": "q, k and v are computed as they come, in 16 bits or more; leave it out",
                "fp8_multi_head_attention": "q, k and v are computed as they come, in 16 bits or more; leave it out",
                "hybrid_context_parallel": "groups that change from batch to batch are not followed; leave it out",
                "batch_invariant_mode": "sums follow the number of ranks; leave it out",
                "flash_decode": "there is no KV cache here; decode with another core_attention",
            }.items()
        },
    }
    for name, (found, value, why) in refused.items():
        if found:
            raise NotImplementedError(f"{name}={value}: {why}")


def _check_call(
    query: Tensor, key: Tensor, mask: Tensor | None, kind: AttnMaskType, bias: Tensor | None, packed: Any
) -> None:
    if mask is not None:
        raise NotImplementedError(
            f"attention_mask {tuple(mask.shape)}: a mask is told by attn_mask_type, window_size and packed_seq_params "
            "here; pass None (in Megatron-LM --no-create-attention-mask-in-dataloader)"
        )
    if bias is not None:
        raise NotImplementedError(f"attention_bias {tuple(bias.shape)}: rows of a shard have no bias here; pass None")
    if kind not in MASKS:
        raise NotImplementedError(f"attn_mask_type={kind}: must be one of {', '.join(m.name for m in MASKS)}")
    if key.size(0) != query.size(0):
        raise NotImplementedError(
            f"{query.size(0)} queries and {key.size(0)} keys: a KV cache or cross-attention; this is for training"
        )
    if packed is not None and (packed.cp_group is not None or packed.local_cp_size is not None):
        raise NotImplementedError("packed_seq_params.cp_group: groups that change from batch to batch are not followed")
    if (query.ndim == 3) != (packed is not None and packed.qkv_format == "thd"):
        raise ValueError(
            f"query of {query.ndim} dims with packed_seq_params {packed}: thd has 3, [tokens, heads, head_dim], and "
            "all others 4, [local_seqlen, batch, heads, head_dim]"
        )


class Batch:
    """How a batch's tokens lie over the ranks, and where sequences in it end."""

    def __init__(self, layout: Layout, bounds: tuple[int, ...] | None = None) -> None:
        self.layout = layout
        self.apart = None if bounds is None else documents(bounds)


class Contexts:
    """The contexts of a group's recent batches, which share one set of buffers for all layers.

    ``base``: the first of them, of which the others are replacements.
    """

    def __init__(self, group: dist.ProcessGroup | None, options: Options) -> None:
        self.base = ContextParallel(group, 1 if group is None else 2 * group.size(), options=options)
        self._known: OrderedDict[Any, ContextParallel] = OrderedDict()
        self._batches: OrderedDict[Any, Batch] = OrderedDict()
        self._latest: tuple[Any, Batch] | None = None  # the cu_seqlens tensor last seen, and its batch

    def context(self, batch: Batch, mask: Mask, schedule: str) -> ContextParallel:
        """The context of a layer with this mask."""
        key = batch, mask, schedule
        if key not in self._known:
            whole = mask if batch.apart is None else mask & batch.apart
            layout = batch.layout
            self._known[key] = self.base.replace(seqlen=layout.seqlen, mask=whole, layout=layout, schedule=schedule)
        return _recent(self._known, key)

    def chunks(self, tokens: int) -> Batch:
        """A batch of rows of so many tokens in all, as `get_batch_on_this_cp_rank` cuts them."""
        if tokens not in self._batches:
            self._batches[tokens] = Batch(paired_chunks([0, tokens], self.base.world_size))
        return _recent(self._batches, tokens)

    def packed(self, params: PackedSeqParams, tokens: int) -> Batch:
        """A batch of packed sequences, as `get_thd_batch_on_this_cp_rank` cuts them."""
        real = params.cu_seqlens_q
        if self._latest is not None and self._latest[0]() is real:
            return self._latest[1]
        held = _numbers(real if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded)
        for name, ours in (("cu_seqlens_kv", real), ("cu_seqlens_kv_padded", params.cu_seqlens_q_padded)):
            theirs = getattr(params, name)
            if theirs is not None and theirs is not ours and _numbers(theirs) != _numbers(ours):
                raise NotImplementedError(f"{name} differs from that of the queries: that is cross-attention")
        if held[-1] != tokens:
            raise ValueError(
                f"packed sequences of {held[-1]} tokens in all (cu_seqlens_q_padded, or cu_seqlens_q without), but the "
                f"{self.base.world_size} ranks hold {tokens}"
            )
        ends = [start + size for start, size in zip(held, _sizes(_numbers(real)), strict=False)]
        key = tuple(held), tuple(sorted({*held, *ends}))  # padding is a document of its own
        if key not in self._batches:
            self._batches[key] = Batch(paired_chunks(held, self.base.world_size), key[1])
        self._latest = weakref.ref(real), _recent(self._batches, key)
        return self._latest[1]


_contexts: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[Options, Contexts]] = weakref.WeakKeyDictionary()


def contexts_of(group: dist.ProcessGroup, options: Options) -> Contexts:
    """Those of a group, whichever layer asks."""
    known = _contexts.setdefault(group, {})
    if options not in known:
        known[options] = Contexts(group, options)
    return known[options]


def paired_chunks(bounds: Sequence[int], world_size: int) -> Layout:
    """Megatron's order: each sequence between two bounds is cut into `2 * world_size` equal chunks, of which rank `r`
    holds the `r`-th from the front and from the back, sequence after sequence."""
    sizes, count = _sizes(bounds), 2 * world_size
    odd = [size for size in sizes if size % count]
    if odd and world_size > 1:
        raise ValueError(
            f"a sequence of {odd[0]} tokens over {world_size} ranks: must be a multiple of {count}, as Megatron gives "
            "each rank two chunks of equal length; pad it (cu_seqlens_q_padded)"
        )
    if world_size == 1:
        return Layout.from_spans([[(0, bounds[-1])]], "paired chunks")
    shards = [
        [
            (start + chunk * size // count, size // count)
            for start, size in zip(bounds, sizes, strict=False)
            for chunk in (rank, count - 1 - rank)
        ]
        for rank in range(world_size)
    ]
    return Layout.from_spans(shards, "paired chunks")


def _numbers(bounds: Tensor | None) -> list[int]:
    return [] if bounds is None else bounds.tolist()


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _recent(kept: OrderedDict[Any, Any], key: Any) -> Any:
    """The value of a key, which is now the last that would be forgotten."""
    kept.move_to_end(key)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[key]
