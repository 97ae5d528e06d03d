"""Which split of the devices: every ring x head split x data, way of recomputing, offload and micro-batch that fits,
with its memory, the bytes that a rank receives and its seconds, of the one cost function and the model's FLOP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from ringattn.budget.model_shape import ModelShape
from ringattn.budget.plans import Plan, gigabytes, plan, planned
from ringattn.planning.hardware import hardware
from ringattn.planning.heads import divisors

BATCHES = (1, 2, 4)
WAYS = ("none", "attention", "full")
HOST = 5e10  # bytes a second between a GPU and its host: PCIe 5 x16, 63 GB/s each way by its specification, four fifths
EFFICIENCY = 0.7  # of the rate of attention's kernels, which matrix products reach at least: assumed


@dataclass(frozen=True)
class Split:
    """A choice that fits: memory (bytes of the rank that takes most), received (bytes a step, of attention),
    seconds (a step) and tokens (of all replicas in it); ``command`` starts the pretraining job, with ``settings``,
    lines of TOML, in its config. The job computes one sequence at a time and keeps attention's result where it
    recomputes, so a ``batch`` above 1 and ``recompute`` "full" are for loops of one's own."""

    ring: int
    ulysses: int
    data: int
    batch: int
    recompute: str
    offload: bool
    memory: int
    received: int
    seconds: float
    tokens: int
    command: str
    settings: str

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens

    def row(self) -> list[str]:
        """As a table shows it."""
        return [
            f"{self.ring} x {self.ulysses} x {self.data}", str(self.batch), self.recompute,
            "yes" if self.offload else "no", gigabytes(self.memory), gigabytes(self.received), f"{self.seconds:.1f}",
            f"{1e6 * self.per_token:.2f}",
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self) | {"seconds_a_token": self.per_token}


def splits(model: str | ModelShape, seqlen: int | str, **settings: Any) -> list[Split]:
    """All that fit, by seconds a token, then by memory, then by bytes received. Settings as `plan` takes them.

    Raises ValueError as `plan` does.
    """
    found = [_split(p) for p in _plans(plan(model, seqlen, **settings))]
    return sorted(found, key=lambda split: (round(split.per_token, 12), split.memory, split.received))


def _plans(first: Plan) -> Iterator[Plan]:
    setup = first.setup
    heads = setup.model.layers[0].attention.num_heads
    for data in divisors(setup.world):
        for ulysses in divisors(setup.world // data):
            if ulysses > min(heads, setup.gpus) or setup.seqlen < setup.world // data:
                continue
            for batch in BATCHES:
                for recompute in WAYS:
                    for offload in (False, True):
                        split = replace(setup, data=data, ulysses=ulysses, batch=batch)
                        found = planned(replace(split, recompute=recompute, offload=offload))
                        if found.fits:
                            yield found


def _split(found: Plan) -> Split:
    s = found.setup
    ring, tokens = s.context // s.ulysses, s.seqlen * s.data * s.batch
    engine = {"none": "ddp", "fsdp": "fsdp"}.get(s.shard, "deepspeed")  # which has its stage in [deepspeed]
    meet = "--rdzv-backend c10d --rdzv-endpoint HOST:29500 " if s.nodes > 1 else ""
    command = (
        f"torchrun --nnodes {s.nodes} {meet}--nproc-per-node {s.gpus} -m launch.pretrain --config CONFIG.toml "
        f"--engine {engine} --data-parallel {s.data}"
    )
    told = dict(seqlen=s.seqlen, ulysses=s.ulysses, layout=s.layout, schedule=s.schedule, dtype=s.dtype)
    told |= dict(recompute=s.recompute != "none", offload=s.offload, loss_chunks=s.loss_chunks)
    told |= {"token_chunks": s.token_chunks} if s.code == "decoder" else {}
    settings = "\n".join(f"{name} = {json.dumps(value)}" for name, value in told.items())
    return Split(
        ring, s.ulysses, s.data, s.batch, s.recompute, s.offload, found.peak, found.received, _seconds(found), tokens,
        command, settings,
    )  # fmt: skip


def _seconds(found: Plan) -> float:
    """Of a step: attention's by the cost function, once more forward where it is computed again; products of the
    model's matrices, six FLOP a parameter and token and two more where they are; what is offloaded, there and back, as
    far as that takes longer."""
    s = found.setup
    rates, local = hardware(f"NVIDIA {s.device}").rates, found.placed.tokens * s.batch
    again = {"none": (0, 0.0), "attention": (2, 0.0), "full": (2, 1 / 3)}[s.recompute]
    calls = sum(layers * seconds for layers, seconds in zip(s.layers(), found.placed.seconds, strict=True))
    attention = calls * (1 + again[1])
    products = (6 + again[0]) * s.model.matmuls * local / (EFFICIENCY * rates.forward)
    moved = 2 * sum(x.size.value * n for layer in s.model.layers for x, n in found.step.layers[layer].kept) / HOST
    return max(attention + products, moved if s.offload else 0.0)


__all__ = ["Split", "splits"]
