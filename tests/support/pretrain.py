"""Runs of the main job: a tiny config, its text, a run that stops where it is told to, and what the command refuses."""

import atexit
import dataclasses
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from launch.config import Config, ModelConfig, OptimizerConfig
from launch.processes import World
from launch.run import Job, prepare, start, train
from launch.tables import dump

TINY = Config(
    name="tiny",
    seqlen=257,
    steps=6,
    masks=("(sliding_window(40) | global_tokens(4)) & causal()", "causal()"),
    documents=True,
    dtype="float64",
    model=ModelConfig(d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24),
    optimizer=OptimizerConfig(lr=1e-2, warmup=2),
)
# For jobs that save nothing: one folder for this process and those that it starts, as two jobs may not share one.
if "RINGATTN_NOWHERE" not in os.environ:
    os.environ["RINGATTN_NOWHERE"] = tempfile.mkdtemp(prefix="ringattn-nowhere-")
    atexit.register(shutil.rmtree, os.environ["RINGATTN_NOWHERE"], ignore_errors=True)
NOWHERE = Path(os.environ["RINGATTN_NOWHERE"])


def tiny(text: Path, **changes: object) -> Config:
    return dataclasses.replace(TINY, data=(str(text),), **changes)


def world_of(rank: int, world_size: int) -> World:
    return World(rank, world_size, torch.device("cpu"), dist.group.WORLD if world_size > 1 else None)


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """Over all parameters, relative to each one's largest entry."""
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max() / np.abs(b[name]).max()) for name in b)


class StopAt:
    """A stop signal that only the last rank receives, when `step` steps are done."""

    def __init__(self, job: Job, world: World, step: int) -> None:
        self.job, self.step, self.hears = job, step, world.rank == world.size - 1

    @property
    def number(self) -> int:
        return signal.SIGINT if self.hears and self.job.progress["step"] == self.step else 0


def run_until(rank: int, world_size: int, config: Config, run: Path, resume: bool, stop_step: int) -> bool:
    job = prepare(config, run, resume, overwrite=False)
    world = world_of(rank, world_size)
    return train(job, start(job, world), StopAt(job, world, stop_step))


def records_of(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def refusal(*arguments: object) -> str:
    from typer.testing import CliRunner  # not needed in the processes that this module starts

    from launch.pretrain import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def config_file(tmp_path: Path, before: str, after: str, config: Config = TINY) -> Path:
    """The tiny config with one piece of its text replaced."""
    written = dump(config)
    assert before in written
    path = tmp_path / "changed.toml"
    path.write_text(written.replace(before, after))
    return path
