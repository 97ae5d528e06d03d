"""Which split of the devices: every ring x head split x data, way of recomputing, offload and micro-batch that fits,
with its memory, the bytes that a rank receives and its seconds, of the one cost function and the model's FLOP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ringattn.arguments.values import flag
from ringattn.budget import job
from ringattn.budget.model_shape import ModelShape
from ringattn.budget.plans import Plan, plan, planned
from ringattn.budget.setup import RECOMPUTE, Setup
from ringattn.planning.hardware import hardware
from ringattn.planning.heads import divisors

BATCHES = (1, 2, 4)  # of loops of one's own; the job has one sequence at a time
HOST = 5e10  # bytes a second between a GPU and its host: PCIe 5 x16, 63 GB/s each way by its specification, four fifths
EFFICIENCY = 0.7  # of the rate of attention's kernels, which matrix products reach at least: assumed


@dataclass(frozen=True)
class Split:
    """A choice that fits: memory (bytes of the rank that takes most), received (bytes a step, of attention),
    seconds (a step) and tokens (of all replicas in it), all estimates of what ``setup`` says. ``command`` starts the
    pretraining job, with ``settings``, TOML, as its config; both are empty for a loop of one's own. ``call``: the same
    plan and its context in Python."""

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
    call: str
    setup: Setup

    @property
    def per_token(self) -> float:
        return self.seconds / self.tokens

    def row(self) -> list[str]:
        """As a table shows it: memory and bytes received in units of 1e9 bytes, seconds of a step, microseconds of a
        token."""
        return [
            f"{self.ring} x {self.ulysses} x {self.data}", str(self.batch), self.recompute,
            "yes" if self.offload else "no", f"{self.memory / 1e9:,.2f}", f"{self.received / 1e9:,.2f}",
            f"{self.seconds:,.1f}", f"{1e6 * self.per_token:,.2f}",
        ]  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "setup"}
        return values | {"seconds_a_token": self.per_token}


def splits(model: str | ModelShape, seqlen: int | str, *, own_loop: bool = False, **settings: Any) -> list[Split]:
    """All that fit, by seconds a token, then by memory, then by bytes received.

    Args:
        model: as `plan` takes it; without ``own_loop`` a name or path, as the job reads a config.json.
        seqlen: as `plan` takes it.
        own_loop: splits of a training loop of one's own, with micro-batches and layers computed again as a whole; else
            those that `launch.pretrain` computes, in the way it does: under autocast, one sequence at a time.
        settings: as `plan` takes them.

    Raises ValueError as `plan` does, and for a setting that the job does not have.
    """
    if not flag("own_loop", own_loop):
        settings = job.of_job(model, settings)
    batches, ways = (BATCHES, RECOMPUTE) if own_loop else ((1,), job.WAYS)
    found = [_split(model, p, own_loop) for p in _plans(plan(model, seqlen, **settings), batches, ways)]
    return sorted(found, key=lambda split: (round(split.per_token, 12), split.memory, split.received))


def _plans(first: Plan, batches: Sequence[int], ways: Sequence[str]) -> Iterator[Plan]:
    setup = first.setup
    heads = setup.model.layers[0].attention.num_heads
    for data in divisors(setup.world):
        for ulysses in divisors(setup.world // data):
            if ulysses > min(heads, setup.gpus) or setup.seqlen < setup.world // data:
                continue
            for batch in batches:
                for recompute in ways:
                    for offload in (False, True):
                        split = replace(setup, data=data, ulysses=ulysses, batch=batch)
                        found = planned(replace(split, recompute=recompute, offload=offload))
                        if found.fits:
                            yield found


def _split(model: str | ModelShape, found: Plan, own_loop: bool) -> Split:
    s = found.setup
    ring, tokens = s.context // s.ulysses, s.seqlen * s.data * s.batch
    started = ("", "") if own_loop or isinstance(model, ModelShape) else (job.command_of(s), job.config_of(model, s))
    return Split(
        ring, s.ulysses, s.data, s.batch, s.recompute, s.offload, found.peak, found.received, _seconds(found), tokens,
        *started, job.calls_of(model, s), s,
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
