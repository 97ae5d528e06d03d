"""What the job adds to DeepSpeed: a step of `launch.pretrain` with `engine = "deepspeed"`, beside the loop that a user
of DeepSpeed writes by hand around the same model, data, loss and optimizer (ZeRO 1), and beside the job with DDP.

Two processes of one thread, 16,384 tokens a step over both, causal, zigzag; the cases take turns.

    python -m benchmarks.engines
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import typer

import ringattn
from benchmarks.common import interleaved, medians, on_processes, ratio, write
from launch.config import find_config, load
from launch.processes import World
from launch.run import _step, prepare, start
from launch.stopping import StopSignal
from launch.training import make_context
from ringattn.integrations.deepspeed import backward, initialize
from ringattn.loss import count_targets, linear_token_mean

SEQLEN, ROUNDS = 16384, 12


def job_step(engine: str, folder: Path, world: World) -> Callable[[], object]:
    """A step of the job, with its record, but for what is written."""
    config = dataclasses.replace(load(find_config("causal-32k")), seqlen=SEQLEN, engine=engine, steps=1000)
    job = prepare(config, folder / engine, go_on=False, overwrite=True)
    trainer, stop = start(job, world), StopSignal()
    return lambda: _step(job, trainer, stop, None, first=False)


def own_loop(folder: Path, world: World) -> Callable[[], object]:
    """The same training with DeepSpeed by hand."""
    config = dataclasses.replace(load(find_config("causal-32k")), seqlen=SEQLEN, steps=1000)
    job = prepare(config, folder / "own", go_on=False, overwrite=True)
    language, settings = job.language, config.optimizer
    cp = make_context(config, world, language)
    parameters, decay = language.model.parameters(), settings.weight_decay
    optimizer = torch.optim.AdamW(parameters, settings.lr, settings.betas, weight_decay=decay, fused=True)
    table = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": settings.clip,
        "zero_optimization": {"stage": 1},
        "steps_per_print": 2**62,
    }
    engine, *_ = initialize(language.model, table, optimizer=optimizer)
    model = engine.module
    position = 0

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ringattn.attention(q, k, v, cp=cp)

    def step() -> float:
        nonlocal position
        sample = job.task.sample(position, SEQLEN)
        position += job.task.size(SEQLEN)
        tokens, labels = (cp.shard(torch.from_numpy(x)) for x in (sample.tokens, sample.labels))
        count = count_targets(labels, world.group)
        share = linear_token_mean(engine(tokens, cp.position_ids, attend), model.head, labels, count=count, chunks=8)
        backward(engine, share)
        engine.step()
        loss = share.detach().clone()
        dist.all_reduce(loss)
        return float(loss)

    return step


def steps(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    os.environ |= {"LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}  # which DeepSpeed reads
    world, place = World(rank, world_size, torch.device("cpu"), dist.group.WORLD), Path(folder)
    world.split(1)
    cases = {"job, ddp": job_step("ddp", place, world)}  # the first of a round pays for ranks that are apart
    cases |= {"own loop": own_loop(place, world), "job, deepspeed": job_step("deepspeed", place, world)}
    seconds = interleaved(cases, ROUNDS)
    return {
        "seconds": {name: round(spent, 4) for name, spent in medians(seconds).items()},
        "job over own loop, DeepSpeed": round(ratio(seconds, "job, deepspeed", "own loop"), 4),
        "DeepSpeed over DDP, job": round(ratio(seconds, "job, deepspeed", "job, ddp"), 4),
        "rounds": ROUNDS,
    }


def main(json: str = "engines-cpu") -> None:
    """Measure, print and write JSON."""
    with tempfile.TemporaryDirectory() as folder:
        result = on_processes(steps, 2, 2, folder)
    for name, figure in result.items():
        print(f"{name}: {figure}")
    write(json, {"seqlen": SEQLEN, "config": "causal-32k", "stage": 1} | result)


if __name__ == "__main__":
    typer.run(main)
