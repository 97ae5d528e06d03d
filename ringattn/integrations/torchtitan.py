"""torchtitan's training with attention over the `cp` axis of its mesh.

config = llama3_debugmodel()  # any of torchtitan's whose decoder has one causal mask for all layers
config.parallelism.context_parallel_degree, config.training.disable_cuda_graphs = 8, True
RingTrainer(config).train()
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import spmd_types as spmd
import torch
from torch import Tensor, nn
from torchtitan.config import override
from torchtitan.distributed.full_dtensor import parallelize_inputs
from torchtitan.distributed.spmd_types import annotate_input_spmd_types
from torchtitan.models.common.attention import (
    BaseAttention,
    FlexAttention,
    ScaledDotProductAttention,
    VarlenAttention,
)
from torchtitan.models.common.decoder import Decoder
from torchtitan.models.common.decoder_sharding import dense_activation_placement
from torchtitan.protocols.module import Module
from torchtitan.protocols.sharding import LocalMapConfig, ShardingConfig
from torchtitan.trainer import Trainer

from ringattn.attention import attention
from ringattn.comm import together, told
from ringattn.context import ContextParallel
from ringattn.masks import causal, documents

BACKENDS = {"spmd_types": annotate_input_spmd_types, "full_dtensor": parallelize_inputs}  # and what inputs become
OVERRIDE = "ringattn.integrations.torchtitan.ring_attention"
KNOWN = (FlexAttention.Config, ScaledDotProductAttention.Config, VarlenAttention.Config)


class RingAttention(Module):
    """An inner attention of torchtitan, whose `attention_masks` is the context of the batch."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        """It has no settings: they are those of the context."""

    def __init__(self, config: Config) -> None:
        super().__init__()

    def forward(
        self,
        q_BLNH: Tensor,  # torchtitan's names, by which it tells how they are sharded
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: ContextParallel | None = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        **others: Any,
    ) -> Tensor:
        """q `[batch, local_seqlen, num_heads, head_dim]`, k and v with as many heads as they have; returns `[batch,
        local_seqlen, num_heads, v_head_dim]`. Raises `NotImplementedError` for what layers of other models pass."""
        if not isinstance(attention_masks, ContextParallel):
            raise NotImplementedError(
                f"attention_masks is {type(attention_masks).__name__}: only RingTrainer's steps pass the context"
            )
        with together(attention_masks.link.transport, "a layer"):  # what one rank refuses, all of them refuse
            unknown = sorted(name for name, value in others.items() if value is not None)
            if unknown:
                raise NotImplementedError(f"{', '.join(unknown)} of this model's attention: cannot be kept here")
            return attention(q_BLNH, k_BLNH, v_BLNH, cp=attention_masks, scale=scale)


def _sharding() -> ShardingConfig:
    """Queries, keys and values stay where they are: batch over data, tokens over context, heads over tensor ranks."""
    own = dense_activation_placement(tp=spmd.S(2))
    inputs = dict.fromkeys(("q_BLNH", "k_BLNH", "v_BLNH"), own)
    gradients = LocalMapConfig(in_grad_placements=(own, own, own))
    return ShardingConfig(in_src_shardings=inputs, in_dst_shardings=inputs, out_src_shardings=own, local_map=gradients)


@override(target=BaseAttention.Config, description="attention over sharded sequences (ringattn)")
def ring_attention(config: BaseAttention.Config) -> BaseAttention.Config:
    """Gives a layer :class:`RingAttention`, by torchtitan's `override.imports`. Raises `NotImplementedError` where the
    settings of its own inner attention are not known."""
    inner = config.inner_attention
    if not isinstance(inner, KNOWN):
        names = ", ".join(kind.__qualname__ for kind in KNOWN)
        raise NotImplementedError(f"an inner attention {type(inner).__qualname__}: known are {names}")
    if isinstance(inner, VarlenAttention.Config) and tuple(inner.window_size) != (-1, 0):
        raise NotImplementedError(f"window_size={inner.window_size}: all layers share one mask here; (-1, 0)")
    return replace(config, inner_attention=RingAttention.Config(sharding_config=_sharding()))


class RingTrainer(Trainer):
    """torchtitan's trainer, whose batches lie and attend over the ranks of the `cp` axis as a context says.

    Attention is causal, and within documents where the loader's `positions` start again from 0. Rows with documents of
    their own are laid end to end, as one row. `context_parallel_load_balancer` is not looked at: shards are zigzag,
    unless `seed_context()` says otherwise.

    Raises `NotImplementedError` for what would be wrong, or was never tried: pipeline, tensor and expert parallelism,
    CUDA graphs of whole steps, `torch.compile`, torchtitan's validator, the SPMD backend `partial_dtensor`, and models
    with masks of their own.
    """

    def __init__(self, config: Trainer.Config) -> None:
        _check(config)
        if OVERRIDE not in config.override.imports:
            config.override.imports = [*config.override.imports, OVERRIDE]
        super().__init__(config)
        _check_model(self.model_parts[0])
        self.cp = self.seed_context()
        self._bounds: tuple[int, ...] = (0, self.cp.seqlen)

    def seed_context(self) -> ContextParallel:
        """The context of a batch of one document a row, of which all others are replacements. Override it for another
        schedule or kernel, or a layout whose shards are equal (as DTensors are taken to be)."""
        mesh = self.parallel_dims.get_mesh("cp") if self.parallel_dims.cp_enabled else None
        return ContextParallel(mesh, self.config.training.seq_len, layout="zigzag")

    def post_dataloading_process(
        self, input_dict: dict[str, Tensor], labels: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """See `Trainer`. Cuts a batch to this rank's tokens; `attention_masks` is its context."""
        with told(self.cp.link.transport, "a batch"):
            inputs, labels, positions = _laid(input_dict, labels)
            bounds = _bounds(positions)
            if bounds != self._bounds:
                mask = causal() if len(bounds) == 2 else causal() & documents(bounds)
                self.cp, self._bounds = self.cp.replace(seqlen=bounds[-1], mask=mask), bounds
        cp = self.cp
        inputs, labels, positions = (cp.shard(x) for x in (inputs, labels, positions))
        self.ntokens_seen += labels.numel()
        extra = {"positions": positions, "attention_masks": cp}
        known = BACKENDS[self.config.parallelism.spmd_backend]
        return known(self.parallel_dims, inputs, labels, extra)


def _laid(batch: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels and positions, `[rows, seqlen]`; one row of all where rows have other documents than the first."""
    unknown = sorted(set(batch) - {"input", "positions"})
    if unknown:
        raise NotImplementedError(f"{', '.join(unknown)} of the batch: how to shard it is not known; leave it out")
    inputs, positions = batch["input"], batch.get("positions")
    if positions is None:
        positions = torch.arange(inputs.size(1), device=inputs.device).expand_as(inputs)
    starts = positions == 0
    if not starts[:, 0].all():
        raise ValueError("positions of a row that do not start with 0: a document that began before it; start it anew")
    if (starts != starts[:1]).any():
        inputs, labels, positions = (x.reshape(1, -1) for x in (inputs, labels, positions))
    return inputs, labels, positions


def _bounds(positions: Tensor) -> tuple[int, ...]:
    starts = (positions[0] == 0).nonzero().flatten()
    return (*starts.tolist(), positions.size(1))


def _check(config: Trainer.Config) -> None:
    """Raises `NotImplementedError` for settings with which training would be wrong, or was never tried."""
    parallel = config.parallelism
    refused = {
        "pipeline_parallel_degree": (parallel.pipeline_parallel_degree > 1, "stages pass on tensors alone; 1"),
        "tensor_parallel_degree": (parallel.tensor_parallel_degree > 1, "was never tried; 1"),
        "expert_parallel_degree": (parallel.expert_parallel_degree > 1, "was never tried; 1"),
        "spmd_backend": (parallel.spmd_backend not in BACKENDS, f"knows no other attention; {' or '.join(BACKENDS)}"),
        "disable_cuda_graphs": (not config.training.disable_cuda_graphs, "a graph of a step keeps its documents; True"),
        "compile.enable": (config.compile.enable, "was never tried; False"),
        "validator.enable": (config.validator.enable, "cuts its batches itself; False"),
    }
    for name, (wrong, why) in refused.items():
        if wrong:
            raise NotImplementedError(f"{name}: {why}")


def _check_model(model: nn.Module) -> None:
    """Raises `NotImplementedError` for layers that see anything but what a causal mask within documents shows."""
    owner: Any = type(model)
    if not isinstance(model, Decoder) or owner.get_attention_masks is not Decoder.get_attention_masks:
        raise NotImplementedError(
            f"{owner.__name__} has masks of its own, but is to have torchtitan's (causal, by documents)"
        )
    for name, layer in model.layers.items():
        inner = getattr(getattr(layer, "attention", None), "inner_attention", None)
        if not isinstance(inner, RingAttention):
            raise NotImplementedError(
                f"layer {name} of {owner.__name__} mixes tokens by {type(inner).__name__}, which knows no shards"
            )
