"""The memory of the job's own step: as `ringattn.budget` accounts for it, and as the first step of a run finds it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ringattn.budget
from launch.config import Config, DeepspeedConfig
from launch.data import Sample
from launch.language import Language
from launch.memory import advice, measured
from launch.training import Trainer
from ringattn.budget.amounts import Amount, named
from ringattn.budget.attention import scratch_of
from ringattn.budget.layers import Numerics
from ringattn.budget.model_shape import AttentionShape, LayerShape, MLPShape, ModelShape
from ringattn.budget.step import Gathering, Step, Way
from ringattn.budget.tape import Moment, Tensor
from ringattn.budget.zero import BUCKET, KEPT
from ringattn.context import ContextParallel

ALLOCATED = "allocated by PyTorch"
DIFFERS = 0.1  # of what was planned, from which on a difference is warned of


def shape_of(config: Config, language: Language) -> ModelShape:
    """The shape of a run's model. Raises ValueError for a Transformers config that the account does not know."""
    if config.hf:
        return ringattn.budget.from_config(Path(config.hf))
    own = config.model
    assert own is not None, "a config has one of the two"
    attention = AttentionShape(own.num_heads, own.num_kv_heads, own.head_dim, own.head_dim)
    layer = LayerShape(attention, MLPShape(own.d_ff))
    return ModelShape("the decoder", own.d_model, language.vocabulary, (layer,) * own.num_layers)


def step_of(config: Config, language: Language, cp: ContextParallel, world: int, rows: int = 1) -> Step:
    """A rank's step over sequences of a context, ``rows`` at a time.

    Raises ValueError where it is not accounted for: a model that is not known; with ZeRO 3 one too large to be kept
    whole while a step runs, or in bfloat16; micro-batches with ZeRO 2.
    """
    model, weight = shape_of(config, language), 8 if config.dtype == "float64" else 4
    half, gpu = config.dtype == "bfloat16", config.device == "cuda"
    residual = 2 if config.residual == "bfloat16" else weight
    numerics = Numerics.of(weight, 2 if half else weight, residual, half, gpu)
    tokens = named("local tokens", cp.local_seqlen) * named("rows", rows)
    attention = scratch_of(cp, config.device, torch.get_num_threads(), rows)
    sharded = config.engine == "fsdp" and world > 1
    step = Step(
        model,
        "transformers" if config.hf else "decoder",
        tokens,
        numerics,
        _way(config),
        attention.scratch,
        around=tuple((x, 1) for x in (*_inputs(config, tokens, model), *attention.buffers)),
        gathering=Gathering(world, numerics.weight, numerics.weight, not gpu) if sharded else None,
        zero=_zero(config, model, world) if config.engine == "deepspeed" and world > 1 else None,
        generators=not gpu,
        grown=tuple((x, 1) for x in attention.grown),
    )
    return step.accumulating() if config.accumulate > 1 else step


def _zero(config: Config, model: ModelShape, world: int) -> tuple[int, int, int]:
    stage, numbers = DeepspeedConfig().stage if config.deepspeed is None else config.deepspeed.stage, model.parameters
    if stage == 3 and 2 * numbers > KEPT:
        raise ValueError(
            f"ZeRO 3 lets go of some of {numbers:,} parameters and gathers them again, which is not accounted for"
        )
    if stage == 3 and config.dtype == "bfloat16":
        raise ValueError("ZeRO 3 has linear layers of its own, whose copies in bfloat16 are not accounted for")
    if stage == 2 and config.accumulate > 1:
        raise ValueError("what ZeRO 2 keeps from one micro-batch to the next is not accounted for")
    return stage, world, min(BUCKET, numbers)


def _way(config: Config) -> Way:
    recompute, chunks = config.recompute, config.token_chunks if config.token_chunks > 1 else 0
    if not config.hf and recompute and config.offload:  # see `launch.model.decoder`
        recompute, chunks = False, config.token_chunks
    return Way("attention" if recompute else "none", chunks, bool(config.offload), config.loss_chunks)


def _inputs(config: Config, tokens: Amount, model: ModelShape) -> list[Tensor]:
    size, dim = named("bytes of an id", 8), named("head size", model.layers[0].attention.head_dim)
    number = named("bytes", 8 if config.dtype == "float64" else 4)
    samples = tokens * named("samples", config.accumulate)
    found = [Tensor("tokens and labels", name, samples * size) for name in ("tokens", "labels")]
    names = ("cos", "sin") if config.hf else ("rotation",)
    return found + [Tensor("rotation", name, tokens * dim * number) for name in names]


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a step is planned to take of a rank, and what lies there all the time of it, in bytes; where its peak is."""

    bytes: int
    always: int
    moment: Moment

    @staticmethod
    def of(trainer: Trainer, samples: Sequence[Sample]) -> Forecast:
        """Of the samples of a step, the largest. Raises ValueError as `step_of` does."""
        found = []
        for sample in samples:
            cp, _ = trainer.context_for(sample)
            step = step_of(trainer.config, trainer.language, cp, trainer.world.size, len(sample.tokens))
            found.append(step.peak)
        peak, always = max(found, key=lambda moment: moment.bytes), trainer.engine.held()
        return Forecast(peak.bytes + always, always, peak)

    def __str__(self) -> str:
        kinds: dict[str, int] = {"parameters and optimizer": self.always}
        for tensor, count in self.moment.alive:
            kinds[tensor.kind] = kinds.get(tensor.kind, 0) + tensor.size.value * count
        largest = sorted(kinds.items(), key=lambda kind: -kind[1])[:4]
        of = ", ".join(f"{name} {_size(number)}" for name, number in largest)
        return f"{_size(self.bytes)} a rank at the peak, {self.moment.name} ({of})"


def foretold(trainer: Trainer, samples: Sequence[Sample]) -> tuple[Forecast | None, str]:
    """Before a step: this rank's forecast, None where any rank has none, and what is to be said of the rank that takes
    most. A call of all ranks, which nothing that an account does ends."""
    trainer.world.at("planning memory")

    def told() -> tuple[Forecast, str]:
        own = Forecast.of(trainer, samples)
        return own, str(own)

    found, problem = advice(told)
    own, said = found or (None, "")
    ranks = trainer.world.gather((own.bytes if own else 0, said, problem))
    if unknown := _problem(ranks):
        return None, f"memory is not planned: {unknown}"
    return own, f"memory planned ({ALLOCATED}): {max(ranks)[1]}"


def _problem(ranks: Sequence[tuple[int, Any, str]]) -> str:
    """The first rank's, if any has one."""
    having = [(rank, problem) for rank, (*_, problem) in enumerate(ranks) if problem]
    if not having:
        return ""
    rank, problem = having[0]
    return problem if len(having) == len(ranks) else f"rank {rank}: {problem}"


@contextmanager
def compared(trainer: Trainer, forecast: Forecast | None, watch: bool) -> Iterator[list[str]]:
    """Around a step: what is to be said of its memory behind it."""
    said: list[str] = []
    if not watch:
        yield said
        return
    workspace = trainer.cp.link.workspace
    before, problem = advice(lambda: sum(x.nbytes for x in workspace.buffers()))
    with measured(trainer.world.device, workspace) as found:
        yield said
    always, unknown = advice(lambda: trainer.engine.held() if forecast is None else forecast.always)
    peak, planned = found.peak + (before or 0) + (always or 0), forecast.bytes if forecast else 0
    ranks = trainer.world.gather((peak, planned, problem or found.problem or unknown))
    said += _verdict(ranks, ("first", "second")[trainer.engine.settles])


def _verdict(ranks: Sequence[tuple[int, int, str]], step: str) -> list[str]:
    """Lines about the rank that took most, of what each took, what was planned of it, and why it was not counted."""
    if problem := _problem(ranks):
        return [f"memory of the {step} step was not counted: {problem}"]
    peak, planned, _ = max(ranks)
    what = f"memory of the {step} step ({ALLOCATED})"
    if not planned:
        return [f"{what}: {_size(peak)} a rank at the peak"]
    off = peak / planned - 1
    beside = f"{100 * abs(off):.1f} % {'more' if off > 0 else 'less'} than planned"
    said = [f"{what}: {_size(peak)} a rank at the peak, {beside}"]
    if abs(off) > DIFFERS:
        said.append(
            f"warning: the {step} step took {_size(peak)} where {_size(planned)} were planned, more than "
            f"{100 * DIFFERS:.0f} % apart: do not rely on this plan for other lengths"
        )
    return said


def _size(number: int) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


__all__ = ["Forecast", "compared", "foretold", "shape_of", "step_of"]
