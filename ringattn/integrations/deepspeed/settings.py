"""What a DeepSpeed config may not say where all ranks, those of a context too, count as data parallel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ringattn.arguments.values import shown

AUTO = "auto"  # what Transformers fills in
PLAIN = "all ranks must count as data parallel, those of a context too: leave it out"


@dataclass(frozen=True, slots=True)
class Rule:
    """A setting that is refused where `wrong(value)`. key: dots lead into tables. why: and the remedy."""

    key: str
    wrong: Callable[[Any], bool]
    why: str


def _given(value: Any) -> bool:
    return value != 1


RULES = (
    Rule("sequence_parallel_size", _given, f"DeepSpeed would divide the ranks by it when it counts samples; {PLAIN}"),
    Rule(
        "data_parallel_size", _given, f"DeepSpeed would sum gradients over so many ranks instead of over all; {PLAIN}"
    ),
    Rule(
        "gradient_allreduce_op",
        lambda value: str(value).lower() != "mean",
        "loss_scale() multiplies by the ranks because DeepSpeed takes the mean over them, and ZeRO 3 knows nothing "
        "else; leave it out",
    ),
    Rule(
        "tensor_parallel.autotp_size",
        lambda value: value > 1,
        f"ranks that share a matrix are no data parallel ranks, and were never tried with a context; {PLAIN}",
    ),
    Rule(
        "expert_parallel.enabled",
        bool,
        f"gradients of experts are summed over other ranks, which was never tried with a context; {PLAIN}",
    ),
    Rule(
        "compile.passes",
        lambda value: "autosp" in value,
        "AutoSP cuts sequences and rewrites the attention of a compiled graph itself, and knows PyTorch's only; leave "
        "it out, and cut them with the context",
    ),
    Rule(
        "data_efficiency.enabled",
        bool,
        "it shortens or drops tokens by their place in a shard; shorten whole sequences before they are sharded",
    ),
    Rule("hybrid_engine.enabled", bool, "it generates with a KV cache, which a sharded model cannot; leave it out"),
)


def check_settings(config: Mapping[str, Any], world_size: int) -> None:
    """Raises `ValueError` with the key, its value, the reason and the remedy for a setting with which loss or gradients
    would be wrong over `world_size` ranks. "auto", which Transformers fills in, passes."""
    for rule in RULES:
        value = look_up(config, rule.key)
        if value is not None and value != AUTO and rule.wrong(value):
            raise ValueError(f"DeepSpeed's {rule.key}={shown(value)}: {rule.why}")
    _check_samples(config, world_size)
    _check_precision(config)
    _check_factor(config, world_size)


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """The value under a key whose dots lead into tables, or None."""
    found: Any = config
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def stage_of(config: Mapping[str, Any]) -> int:
    """ZeRO's stage."""
    return int(look_up(config, "zero_optimization.stage") or 0)


def _check_samples(config: Mapping[str, Any], world_size: int) -> None:
    """DeepSpeed takes what is missing of three numbers from the other two: by a `train_batch_size` that does not count
    the ranks of a context it would accumulate fewer micro-batches than the user does, or have larger ones."""
    names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    total, micro, steps = (config.get(name) for name in names)
    if total is None or AUTO in (total, micro, steps):
        return
    if micro is None or total != micro * (steps or 1) * world_size:
        counted = (
            "" if micro is None else f" {micro} x {steps or 1} x {world_size} = {micro * (steps or 1) * world_size}"
        )
        raise ValueError(
            f"DeepSpeed's train_batch_size={shown(total)}: it counts a sample once for every rank that shares it, "
            f"train_micro_batch_size_per_gpu x gradient_accumulation_steps x all ranks{counted}; leave it out and give "
            "the other two"
        )


def _check_precision(config: Mapping[str, Any]) -> None:
    sums = look_up(config, "data_types.grad_accum_dtype")
    if look_up(config, "bf16.enabled") is True and stage_of(config) == 0 and sums in ("fp32", "float32"):
        raise ValueError(
            f"DeepSpeed's data_types.grad_accum_dtype={sums!r} with bf16 at ZeRO stage 0, which has no such sums; take "
            "stage 1, or leave it out"
        )


def _check_factor(config: Mapping[str, Any], world_size: int) -> None:
    """ZeRO 3 divides by a factor before it sums, and multiplies by it afterwards unless it is the number of ranks."""
    factor = config.get("gradient_predivide_factor")
    if factor == world_size > 1 and stage_of(config) == 3:
        raise ValueError(
            f"DeepSpeed's gradient_predivide_factor={factor!r} over as many ranks at ZeRO stage 3, which would divide "
            "gradients by it twice; leave it out"
        )
