"""Plans: a run's memory on the rank that takes most, whether it fits, how far it could go, what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from ringattn.arguments.values import tokens_of
from ringattn.budget.amounts import Amount, named
from ringattn.budget.attention import Attention
from ringattn.budget.layers import LayerCode, Scratch
from ringattn.budget.model_shape import ModelShape
from ringattn.budget.models import model as model_of
from ringattn.budget.positions import reach
from ringattn.budget.runs import Placed, placed_of, step_of
from ringattn.budget.setup import MOST, Setup, bytes_of, checked_gpu
from ringattn.budget.step import Step
from ringattn.budget.tape import Moment
from ringattn.geometry import layouts
from ringattn.planning.hardware import memory_of

# What a process takes beside PyTorch's tensors: CUDA's context and kernels, NCCL's buffers ("about 1 GiB" and "several
# GiB" in ALST, arXiv:2506.13996, section 3.2), and what the allocator cannot hand out of what it holds, here a
# twenty-fifth of the memory. Assumed, not measured; `reserve` sets another.
CONTEXT, PART = 2 << 30, 25
STEP = 1024  # tokens that the longest sequence is a multiple of, times the ranks
PLANNED, GUESSES = 64, 6  # ranks for which lengths are planned in search of it; guesses, before it is halved


@dataclass(frozen=True, slots=True)
class Item:
    """Memory of one kind and name at the peak: ``bytes``, of ``count`` tensors of one ``formula``."""

    kind: str
    name: str
    bytes: int
    count: int
    formula: str

    def __str__(self) -> str:
        times = f"{self.count} x ({self.formula})" if self.count > 1 else self.formula
        return f"{self.kind}: {self.name}: {times} = {self.bytes:,}"


@dataclass(frozen=True)
class Change:
    """Settings that would be others, and what the peak would then be."""

    settings: dict[str, Any]
    peak: int

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{said}: {gigabytes(self.peak)}"


@dataclass(frozen=True)
class Plan:
    """Memory of a run on the rank that takes most, all in bytes.

    items: what lies there at the peak, which is at ``moment``; their sum is ``peak``. reserve: what is taken beside
    tensors. headroom: what is left, negative where it does not ``fits``. warning: of positions beyond the model's.
    """

    setup: Setup
    step: Step
    placed: Placed
    warning: str | None

    @cached_property
    def peak_moment(self) -> Moment:
        return self.step.peak

    @property
    def moment(self) -> str:
        return self.peak_moment.name

    @property
    def peak(self) -> int:
        return self.peak_moment.bytes

    @cached_property
    def items(self) -> tuple[Item, ...]:
        counts: dict[tuple[str, str, str], tuple[int, int]] = {}
        for tensor, count in self.peak_moment.alive:
            key = tensor.kind, tensor.name, str(tensor.size)
            counts[key] = counts.get(key, (0, 0))[0] + count, tensor.size.value
        return tuple(Item(kind, name, size * n, n, text) for (kind, name, text), (n, size) in counts.items() if size)

    @property
    def received(self) -> int:
        """Bytes that this rank receives in the attention calls of a step, of all layers: forward once more where those
        are computed again."""
        again = 2 if self.setup.recompute == "full" else 1
        calls = zip(self.setup.layers(), self.placed.received, strict=True)
        return sum(layers * (again * ahead + back) for layers, (ahead, back) in calls)

    @property
    def reserve(self) -> int:
        return self.reserved.value

    @property
    def reserved(self) -> Amount:
        """The reserve with its formula."""
        if self.setup.reserve is not None:
            return named("reserve", self.setup.reserve)
        return named("context and NCCL", CONTEXT) + named("memory", self.setup.memory).over(PART)

    @property
    def reserve_name(self) -> str:
        """Says whether it was given."""
        return "reserve" if self.setup.reserve is not None else "reserve (assumed)"

    @property
    def headroom(self) -> int:
        return self.setup.memory - self.peak - self.reserve

    @property
    def fits(self) -> bool:
        return self.headroom >= 0

    @property
    def exact(self) -> bool:
        """Whether ``longest`` comes of plans of that length. More ranks take seconds a plan: this one's estimate."""
        return self.setup.context <= PLANNED

    @cached_property
    def longest(self) -> int:
        """The longest sequence that fits, in tokens, a multiple of 1,024 for each rank that shares one, where a step
        more does not fit (for many ranks an estimate, see ``exact``); 0: not even that step. Where the mask has a
        length of its own, that or 0."""
        unit, (low, high), guess = STEP * self.setup.context, (0, 0), self._reach
        if self.setup.ends:
            return self.setup.seqlen if self.fits else 0
        if not self.exact:
            return guess * unit
        tries = 0
        while not high or high - low > 1:
            at = max(guess, low + 1)
            if high:
                at = min(at, high - 1) if tries < GUESSES else (low + high) // 2
            there = self._of(at * unit)
            low, high = (at, high) if there is not None and there.fits else (low, at)
            guess, tries = at // 2 if there is None else there._reach, tries + 1
        return low * unit

    def _of(self, seqlen: int) -> Plan | None:
        """The same run with another length; None where that cannot be."""
        found = _try(self.setup, {"seqlen": seqlen})
        return found if found is None or self.placed.layer is LayerCode else found.computed_by(self.placed.layer)

    @property
    def _reach(self) -> int:
        """Steps of tokens that fit if attention's memory grows with the shard, and nothing is placed anew."""
        setup, unit = self.setup, STEP * self.setup.context

        def fits(units: int) -> bool:
            longer = replace(setup, seqlen=units * unit)
            step = step_of(longer, self.placed.grown(-(-longer.seqlen // setup.context)))
            return step.peak.bytes + self.reserve <= setup.memory

        low, high = 0, 1
        while high < MOST // unit and fits(high):
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """Where it does not fit: sets of changes that make it fit, none of which does without one of its own, in the
        order of the dearest change in each; of the same settings the cheapest values alone. Empty where all of them
        together are not enough."""
        found: list[Change] = []
        together: dict[str, Any] = {}
        for step in () if self.fits else _remedies(self.setup):
            together |= step
            change = self._fitting(step) or (self._least(together, step) if self._fitting(together) else None)
            if change and all(change.settings.keys() != other.settings.keys() for other in found):
                found.append(change)
        return tuple(found)

    def computed_by(self, layer: Callable[..., LayerCode]) -> Plan:
        """The same run with another library's layers, which say themselves what their attention takes."""
        placed = replace(self.placed, attention=Attention((), Scratch()), layer=layer)
        return replace(self, step=step_of(self.setup, placed), placed=placed)

    def _fitting(self, changes: dict[str, Any]) -> Change | None:
        found = _try(self.setup, changes)
        return Change(dict(changes), found.peak) if found and found.fits else None

    def _least(self, together: dict[str, Any], step: dict[str, Any]) -> Change | None:
        """Without those that it does without, the dearest first; None where ``step``, the last of them, is one."""
        least = None
        for name in [*step, *(name for name in reversed(list(together)) if name not in step)]:
            less = {key: value for key, value in together.items() if key != name}
            if fits := self._fitting(less):
                if name in step:
                    return None
                together, least = less, fits
        return least or self._fitting(together)

    @cached_property
    def kinds(self) -> dict[str, int]:
        """Bytes of each kind at the peak, the largest first, with the reserve."""
        found: dict[str, int] = {}
        for item in self.items:
            found[item.kind] = found.get(item.kind, 0) + item.bytes
        return dict(sorted(found.items(), key=lambda kind: -kind[1]))

    def explain(self) -> str:
        """Every number of the peak as a formula with the values put in."""
        lines = [f"peak: {self.moment}", *map(str, self.items), f"sum: {self.peak:,}"]
        lines += [f"{self.reserve_name}: {self.reserved} = {self.reserve:,}"]
        left = f"headroom: {self.setup.memory:,} - {self.peak:,} - {self.reserve:,} = {self.headroom:,}"
        return "\n".join([*lines, left])

    def __str__(self) -> str:
        s = self.setup
        rows = [f"  {kind:32} {gigabytes(size):>10}" for kind, size in self.kinds.items()]
        beside = (self.reserve_name, self.reserve), ("headroom", self.headroom)
        rows += [f"  {name:32} {gigabytes(size):>10}" for name, size in beside]
        on = f"{s.world} x {s.device} of {gigabytes(s.memory)}"
        title = f"{s.model.name}, {s.seqlen:,} tokens on {on}, a rank at its peak: {self.moment}"
        return "\n".join([title, *rows, f"  {'it fits' if self.fits else 'it does not fit'}"])

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        setup = {k: v for k, v in vars(self.setup).items() if k != "model"} | {"model": self.setup.model.name}
        items = [asdict(item) for item in self.items]
        return {
            "setup": setup, "moment": self.moment, "peak": self.peak, "reserve": self.reserve,
            "headroom": self.headroom, "received": self.received,
            "fits": self.fits, "warning": self.warning, "items": items,
        }  # fmt: skip


def plan(
    model: str | ModelShape, seqlen: int | str, *, memory: int | str | None = None,
    reserve: int | str | None = None, **settings: Any,
) -> Plan:  # fmt: skip
    """The memory of a training step on the rank that takes most.

    Args:
        model: a shape's name (`budget.shipped()`), the path of a Transformers config.json, or a :class:`ModelShape`.
        seqlen: tokens of a sequence; "1M" is 2**20.
        memory: of a device; "80GB" is 80e9 bytes, "80GiB" 80 * 2**30; None: the device's, by its datasheet.
        reserve: what is taken of it beside tensors, as measured on such a device; None: 2 GiB and a twenty-fifth of the
            memory, assumed.
        settings: nodes, gpus (of a node), batch (sequences of a replica at a time), dtype (bfloat16, float32),
            optimizer (adamw: fused; adamw_foreach: PyTorch's default; adamw8bit, muon, sgd), shard (none, fsdp, zero1,
            zero2, zero3), recompute (none; attention: a layer keeps its input and attention's result; full), offload
            (what layers keep is on the host), offload_states (what is on the host: none, optimizer, or all: parameters
            and gradients in parts too), loss_chunks, fused_loss (Liger's), token_chunks (pieces of all but attention),
            head_chunks, mask (as text), layout, schedule, ulysses, data (replicas), code (whose layers: transformers,
            or the pretraining job's decoder), device (a GPU's name), transient (attention's buffers are freed behind
            each call, as other libraries' are), autocast (bfloat16 by autocast over fp32 weights, which are gathered
            in fp32, and over an fp32 residual stream, as the pretraining job computes; else weights are gathered, and
            tokens held between layers, in bfloat16).

    Raises:
        ValueError: a name, number or split that cannot be, with the rule and the remedy.
    """
    shape = model if isinstance(model, ModelShape) else model_of(model)
    known = set(Setup.__dataclass_fields__) - {"model", "seqlen", "memory", "reserve"}
    for name in settings:
        if name not in known:
            layouts.named("setting", name, sorted(known))
    beside = None if reserve is None else bytes_of("reserve", reserve, 0)
    own = memory_of(checked_gpu(settings.get("device", Setup.device)))
    size = own if memory is None else bytes_of("memory", memory)
    return planned(Setup(shape, tokens_of("seqlen", seqlen), memory=size, reserve=beside, **settings))


def _try(setup: Setup, changes: dict[str, Any]) -> Plan | None:
    try:
        return planned(replace(setup, **changes))
    except ValueError:  # a split that cannot be
        return None


def planned(setup: Setup) -> Plan:
    """The plan of a run that is checked."""
    placed = placed_of(setup)
    return Plan(setup, step_of(setup, placed), placed, reach(setup.model, setup.seqlen))


def _remedies(setup: Setup) -> Iterator[dict[str, Any]]:
    """Changes that save memory, by what they cost: nothing, a part of the layers computed twice, all of them, the link
    to the host, another optimizer, more devices."""
    if setup.optimizer == "adamw_foreach":
        yield {"optimizer": "adamw"}
    if setup.loss_chunks < 64 <= setup.seqlen:
        yield {"loss_chunks": 64}
    if setup.shard == "none" and setup.world > 1:
        yield {"shard": "fsdp"}
    if setup.token_chunks < 16 <= setup.seqlen:
        yield {"token_chunks": 16}
    if setup.recompute == "none":
        yield {"recompute": "attention"}
    if setup.recompute != "full":
        yield {"recompute": "full"}
    heads = setup.model.layers[0].attention.num_heads // setup.ulysses
    if setup.ulysses > 1 and setup.head_chunks < heads:
        yield {"head_chunks": min(heads, 4)}
    if not setup.offload:
        yield {"offload": True}
    if setup.optimizer.removesuffix("_foreach") == "adamw":
        yield {"optimizer": "adamw8bit"}
    if setup.offload_states != "all" and setup.shard not in ("none", "zero1"):
        yield {"offload_states": "all"}
    for factor in (2, 4, 8, 16):
        yield {"nodes": setup.nodes * factor}


def gigabytes(size: int) -> str:
    """Readable, 1e9 bytes."""
    return f"{size / 1e9:,.2f} GB"


__all__ = ["Change", "Item", "Plan", "plan", "planned"]
