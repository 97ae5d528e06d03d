"""The loop of a training run: what the processes agree on at the start, the steps, and what is saved when a
run ends or is stopped."""

import math
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from launch import checkpoint
from launch.config import Config, load
from launch.data import Text, open_text
from launch.mask_text import parse_mask
from launch.model import Decoder
from launch.processes import World, check_device
from launch.report import RankSummary, Record, Report
from launch.training import Masks, Trainer, make_context


@dataclass(frozen=True, slots=True)
class Job:
    """What a process knows, and has checked, before it talks to any other. `resume` is the checkpoint to go
    on from; `progress` is the step and the byte of the text that come next."""

    config: Config
    run: Path
    resume: Path | None
    progress: dict[str, Any]
    text: Text
    masks: Masks
    model: Decoder


def prepare(config: Config, run: Path, resume: bool, overwrite: bool) -> Job:
    """Checks all that a process can check alone. Raises ValueError with the value, the rule and the
    remedy."""
    check_device(config.device)
    newest = checkpoint.latest(run)
    if resume and newest is None:
        raise ValueError(f"no complete checkpoint under {run / 'checkpoint'}; start without --resume")
    if newest is not None and not (resume or overwrite):
        raise ValueError(f"{run} holds a checkpoint; go on with --resume {run}, drop it with --overwrite, or set --out")
    masks = tuple(parse_mask(mask) for mask in config.masks)
    text = open_text(config.data, config.seqlen, config.seed)
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    model = Decoder(config.model, config.recompute).to(dtype)
    progress = {"step": 0, "position": 0, "text": text.digest}
    if not resume or newest is None:
        return Job(config, run, None, progress, text, masks, model)
    checkpoint.check_fit(newest, model)
    saved = checkpoint.read_progress(newest)
    _check_resumable(newest, saved, progress, config)
    _check_settings(run, config)
    return Job(config, run, newest, saved, text, masks, model)


def _check_resumable(path: Path, saved: dict[str, Any], fresh: dict[str, Any], config: Config) -> None:
    if saved["text"] != fresh["text"]:
        raise ValueError(
            f"checkpoint {path} stands at byte {saved['position']:,} of a text other than this one (its files, "
            "their sizes or the seed differ); give the same --data, or start a new run with --out"
        )
    if saved["step"] >= config.steps:
        raise ValueError(f"checkpoint {path} has all {config.steps} steps behind it; ask for more with --steps")


def _check_settings(run: Path, config: Config) -> None:
    """What must not change in the middle of a run: the loss curve would break without a word."""
    before = load(run / "config.toml") if (run / "config.toml").exists() else config
    for name in ("seqlen", "masks", "documents", "seed"):
        was, now = getattr(before, name), getattr(config, name)
        if was != now:
            raise ValueError(f"{run} was trained with {name} = {was!r}, not {now!r}; resume without --config")


def start(job: Job, world: World) -> Trainer:
    """Puts the same model on every rank, at the checkpoint if there is one. Raises ValueError where ranks
    differ."""
    config, settings = job.config, job.config.optimizer
    world.agree({"config": config, "text": job.text.digest, "progress": job.progress})
    model = job.model.to(world.device)
    world.copy_from_first([parameter.detach() for parameter in model.parameters()])
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    trainer = Trainer(config, world, model, optimizer, job.masks, make_context(config, world, job.masks))
    if job.resume is not None:
        checkpoint.load(job.resume, model, optimizer, job.progress)
    elif world.rank == 0:
        shutil.rmtree(job.run / "checkpoint", ignore_errors=True)
    return trainer


class StopSignal:
    """Remembers the first SIGINT or SIGTERM instead of dying of it. Further ones change nothing: a launcher
    passes on what the terminal has already sent."""

    def __init__(self) -> None:
        self.number = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number


def train(job: Job, trainer: Trainer, stop: StopSignal) -> bool:
    """Runs the remaining steps and saves. False if a signal ended the run early. Raises FloatingPointError,
    and saves nothing, once the loss is not a number."""
    config, world, progress = job.config, trainer.world, job.progress
    with _open_report(job, trainer) if world.rank == 0 else nullcontext() as report:
        before, asked = trainer.counters(), False
        while progress["step"] < config.steps and not asked:
            record, asked = _step(job, trainer, stop)
            if report:
                report.add(record)
            if config.save_every and progress["step"] % config.save_every == 0:
                checkpoint.save(job.run, trainer.model, trainer.optimizer, progress)
        saved = checkpoint.save(job.run, trainer.model, trainer.optimizer, progress)
        ranks = world.gather(RankSummary(world.peak_memory(), trainer.counters().since(before)))
        if report:
            report.summarize(ranks)
            rest = "" if progress["step"] >= config.steps else f"; go on with --resume {job.run}"
            report.say(f"saved {saved}{rest}")
    return progress["step"] >= config.steps


def _open_report(job: Job, trainer: Trainer) -> Report:
    config = job.config
    entropy = job.text.unigram_entropy(0, min(job.text.size, config.steps * config.seqlen))
    report = Report(job.run, config, entropy, job.progress["step"])
    report.say(trainer.cp.describe())
    return report


def _step(job: Job, trainer: Trainer, stop: StopSignal) -> tuple[Record, bool]:
    """One step, with `progress` moved on; and whether any rank was asked to stop."""
    config, progress = job.config, job.progress
    step, position = progress["step"], progress["position"]
    begin, before = time.perf_counter(), trainer.counters()
    sample = job.text.sample(position, config.seqlen)
    lr = config.optimizer.lr_at(step, config.steps)
    loss, norm, asked = trainer.step(sample, lr, stop.number != 0)
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss of step {step} is {loss}; the last checkpoint is untouched, resume with a lower optimizer.lr"
        )
    seconds = time.perf_counter() - begin
    progress.update(step=step + 1, position=position + config.seqlen)
    waited = trainer.counters().since(before).waited
    return Record(step, loss, norm, lr, seconds, config.seqlen / seconds, waited, position), asked
