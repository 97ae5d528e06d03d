"""The loop of a training run: what the processes agree on at the start, the steps, and what is saved when a
run ends or is stopped."""

import math
import os
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from launch import checkpoint, huggingface, model
from launch.config import Config, load
from launch.data import Sample
from launch.engine import distribute
from launch.language import Language, Objective
from launch.mask_text import parse_mask
from launch.processes import World, check_device
from launch.recall import recall
from launch.report import RankSummary, Record, Report
from launch.tasks import Progress, RecallTask, Task, make_task
from launch.training import Outcome, Trainer, make_context
from ringattn.check.huggingface import allow_double


@dataclass(frozen=True, slots=True)
class Job:
    """What a process knows, and has checked, before it talks to any other. `resume` is the checkpoint to go
    on from; `progress` says which step and which position of the task's stream come next."""

    config: Config
    run: Path
    resume: Path | None
    progress: Progress
    task: Task
    language: Language

    def samples(self, world: World) -> list[Sample]:
        """The samples of the next step that the process's replica takes."""
        return [self._sample(index) for index in range(world.replica, self._count(world), world.replicas)]

    def samples_of_all(self, world: World) -> list[Sample]:
        """Those that all replicas take."""
        return [self._sample(index) for index in range(self._count(world))]

    def move(self, world: World, found: Outcome) -> None:
        """Goes on to the next step, once it is done."""
        tokens = self.task.size(self.progress["length"]) * self._count(world)
        self.progress.update(step=self.progress["step"] + 1, position=self.progress["position"] + tokens)
        self.task.learn(self.progress, found.accuracy, found.targets)

    @property
    def done(self) -> bool:
        """All steps are done, or nothing is left to learn."""
        return self.progress["step"] >= self.config.steps or self.task.learnt(self.progress)

    def _count(self, world: World) -> int:
        return world.replicas * self.config.accumulate

    def _sample(self, index: int) -> Sample:
        """The sample `index` of a step: samples lie one behind another in the stream."""
        length = self.progress["length"]
        return self.task.sample(self.progress["position"] + index * self.task.size(length), length)


def build(config: Config) -> Language:
    """The model of a config with its first weights, the same for the same seed. Raises ValueError for what does not
    fit together."""
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    if config.model is not None:
        language = model.decoder(config.model, tuple(map(parse_mask, config.masks)), config.recompute)
    else:
        language = huggingface.decoder(Path(config.hf), config.recompute)
        if dtype == torch.float64:
            allow_double(language.model)
    language.model.to(dtype)
    return language


def prepare(config: Config, run: Path, resume: bool, overwrite: bool) -> Job:
    """Checks all that a process can check alone. Raises ValueError with the value, the rule and the
    remedy."""
    check_device(config.device)
    place = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{run} cannot be written: {place} is a file, or not yours to write in; set --out")
    newest = checkpoint.latest(run)
    if resume and newest is None:
        raise ValueError(f"no complete checkpoint under {run / 'checkpoint'}; start without --resume")
    if newest is not None and not (resume or overwrite):
        raise ValueError(f"{run} holds a checkpoint; go on with --resume {run}, drop it with --overwrite, or set --out")
    task, language = make_task(config), build(config)
    if language.vocabulary < task.least_vocabulary:
        raise ValueError(
            f"the model knows {language.vocabulary} tokens and the data has {task.least_vocabulary}; set a larger "
            "vocab_size"
        )
    progress = {
        **checkpoint.NO_PROGRESS,
        "text": task.digest,
        "model": huggingface.digest(Path(config.hf)) if config.hf else "",
        "length": task.first_length(),
    }
    if not resume or newest is None:
        return Job(config, run, None, progress, task, language)
    checkpoint.check_fit(newest, language.model)
    saved = checkpoint.read_progress(newest)
    _check_resumable(newest, saved, progress, config)
    _check_settings(run, config)
    if task.learnt(saved):
        raise ValueError(f"{run} has nothing left to learn; start a new run with --out")
    return Job(config, run, newest, saved, task, language)


def _check_resumable(path: Path, saved: dict[str, Any], fresh: dict[str, Any], config: Config) -> None:
    if saved["text"] != fresh["text"]:
        raise ValueError(
            f"checkpoint {path} stands at byte {saved['position']:,} of a text other than this one (its files, "
            "their sizes or the seed differ); give the same --data, or start a new run with --out"
        )
    if saved["model"] != fresh["model"]:
        raise ValueError(f"checkpoint {path} is of a model whose config {config.hf} has changed since; restore it")
    if saved["step"] >= config.steps:
        raise ValueError(f"checkpoint {path} has all {config.steps} steps behind it; ask for more with --steps")


def _check_settings(run: Path, config: Config) -> None:
    """What must not change in the middle of a run: the loss curve would break without a word."""
    before = load(run / "config.toml") if (run / "config.toml").exists() else config
    for name in ("model", "seqlen", "masks", "hf", "documents", "lengths", "recall", "seed"):
        was, now = getattr(before, name), getattr(config, name)
        if was != now:
            raise ValueError(f"{run} was trained with {name} = {was!r}, not {now!r}; resume without --config")


def start(job: Job, world: World) -> Trainer:
    """Puts the same model on every rank, at the checkpoint if there is one. Raises ValueError where ranks
    differ."""
    config, settings, language = job.config, job.config.optimizer, job.language
    world.agree({"config": config, "text": job.task.digest, "progress": job.progress})
    world.split(config.data_parallel)
    context, shortest = world.size // world.replicas, job.task.first_length()
    if context > shortest:
        raise ValueError(
            f"the first sequences have {shortest} tokens for {context} ranks; start fewer, or set data_parallel or "
            "recall.pairs higher"
        )
    language.model.to(world.device)
    world.copy_from_first([tensor.detach() for tensor in (*language.model.parameters(), *language.model.buffers())])
    cp = make_context(config, world, language.distinct)
    module = distribute(Objective(language, config.loss_chunks, job.task.guesses), config.engine, world.mesh)
    optimizer = torch.optim.AdamW(
        language.model.parameters(),
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    trainer = Trainer(config, world, language, module, optimizer, cp)
    if job.resume is not None:
        checkpoint.load(job.resume, language.model, optimizer, job.progress)
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
        while not job.done and not asked:
            record, asked = _step(job, trainer, stop)
            if report:
                report.add(record)
            if config.save_every and progress["step"] % config.save_every == 0:
                _save(job, trainer)
        saved = _save(job, trainer)
        ranks = world.gather(RankSummary(world.peak_memory(), trainer.counters().since(before)))
        answers = recall(trainer, job.task) if job.done and isinstance(job.task, RecallTask) else []
        if report:
            report.summarize(ranks, answers)
            report.say(f"saved {saved}" if job.done else f"saved {saved}; go on with --resume {job.run}")
    return job.done


def _save(job: Job, trainer: Trainer) -> Path:
    assert trainer.optimizer is not None
    return checkpoint.save(job.run, trainer.model, trainer.optimizer, job.progress)


def _open_report(job: Job, trainer: Trainer) -> Report:
    config, world = job.config, trainer.world
    tokens = config.steps * config.seqlen * world.replicas * config.accumulate
    report = Report(job.run, config, job.task.baseline(tokens), job.progress["step"])
    if world.size > 1:
        report.say(f"{world.size} ranks: {world.replicas} x {world.size // world.replicas} (data x context)")
    if config.hf:
        report.say(f"{type(trainer.model).__name__} of {config.hf}: masks are the model's own")
    report.say(trainer.cp.describe())
    return report


def _step(job: Job, trainer: Trainer, stop: StopSignal) -> tuple[Record, bool]:
    """One step, with `progress` moved on; and whether any rank was asked to stop."""
    config, world, progress = job.config, trainer.world, job.progress
    step, position = progress["step"], progress["position"]
    begin, before = time.perf_counter(), trainer.counters()
    samples = job.samples(world)
    lr = config.optimizer.lr_at(step, config.steps) * job.task.rate(progress["length"])
    found = trainer.step(samples, lr, stop.number != 0)
    if not math.isfinite(found.loss) or not math.isfinite(found.norm):
        raise FloatingPointError(
            f"the loss of step {step} is {found.loss}, its gradient's norm {found.norm}; the last checkpoint is "
            "untouched, resume with a lower optimizer.lr"
        )
    seconds = time.perf_counter() - begin
    job.move(world, found)
    record = Record(
        step=step,
        loss=found.loss,
        grad_norm=found.norm,
        lr=lr,
        seconds=seconds,
        tokens=progress["position"] - position,
        waiting_s=trainer.counters().since(before).waited,
        position=position,
        seqlen=samples[0].tokens.shape[1],
        documents=len(samples[0].cu_seqlens) - 1,
        accuracy=found.accuracy if job.task.guesses else None,
    )
    return record, found.asked
