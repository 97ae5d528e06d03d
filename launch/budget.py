"""The memory of the job's own step, as `ringattn.budget` accounts for it."""

from __future__ import annotations

from pathlib import Path

import torch

from launch.config import Config
from launch.language import Language
from ringattn.budget.amounts import Amount, named
from ringattn.budget.attention import buffers, cpu_scratch, kind_of, swaps
from ringattn.budget.layers import Numerics
from ringattn.budget.model_shape import AttentionShape, LayerShape, MLPShape, ModelShape
from ringattn.budget.step import Gathering, Step, Way
from ringattn.budget.tape import Tensor
from ringattn.context import ContextParallel


def shape_of(config: Config, language: Language) -> ModelShape:
    """The shape of a run's model."""
    if config.hf:
        from ringattn.budget.models import from_config

        return from_config(Path(config.hf))
    own = config.model
    assert own is not None
    attention = AttentionShape(own.num_heads, own.num_kv_heads, own.head_dim, own.head_dim)
    layer = LayerShape(attention, MLPShape(own.d_ff))
    return ModelShape("decoder", own.d_model, language.vocabulary, (layer,) * own.num_layers)


def step_of(config: Config, language: Language, cp: ContextParallel, rank: int, world: int) -> Step:
    """A rank's step."""
    model, code = shape_of(config, language), "transformers" if config.hf else "decoder"
    half, double = config.dtype == "bfloat16", config.dtype == "float64"
    weight = 8 if double else 4
    residual = 2 if config.residual == "bfloat16" else weight
    numerics = Numerics.of(weight, 2 if half else weight, residual, half, config.device == "cuda")
    tokens = named("local tokens", cp.local_seqlen)
    recompute, chunks = config.recompute, config.token_chunks if config.token_chunks > 1 else 0
    if not config.hf and recompute and config.offload:
        recompute, chunks = False, config.token_chunks
    way = Way("attention" if recompute else "none", chunks, bool(config.offload), config.loss_chunks)
    kind = kind_of(cp, config.device)
    programs = [cp.program(mask) for mask in cp.masks]
    scratch, masks = cpu_scratch(programs, kind, torch.get_num_threads())
    around = (*_inputs(tokens, model, code), *buffers(programs, kind), *swaps(cp, kind), *masks[:1])
    sharded = config.engine == "fsdp" and world > 1
    gathering = Gathering(world, numerics.weight, numerics.weight, config.device == "cpu") if sharded else None
    once = tuple((x, 1) for x in around)
    grown = tuple((x, 1) for x in masks[1:])
    return Step(model, code, tokens, numerics, way, scratch, (), once, gathering, config.device == "cpu", grown)


def _inputs(tokens: Amount, model: ModelShape, code: str) -> list[Tensor]:
    size, dim = named("bytes of an id", 8), named("head size", model.layers[0].attention.head_dim)
    found = [Tensor("tokens and labels", name, tokens * size) for name in ("tokens", "labels")]
    names = ("rotation",) if code == "decoder" else ("cos", "sin")
    return found + [Tensor("rotation", name, tokens * dim * named("bytes", 4)) for name in names]
