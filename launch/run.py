"""The loop of a training run: what the processes agree on at the start, the steps, and what is saved when a
run ends or is stopped."""

import math
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launch import checkpoint, huggingface, model, resume
from launch.board import ALONE, Attempt
from launch.budget import Forecast, compared, foretold
from launch.config import Config, check_heads, check_profile
from launch.data import Sample
from launch.engines import make_engine
from launch.language import Language, Objective
from launch.mask_text import leaks, parse_mask
from launch.processes import World, check_device, check_transport
from launch.recall import recall
from launch.report import RankSummary, Record, Report
from launch.rules import shown
from launch.scalars import check_tensorboard
from launch.stopping import StopSignal
from launch.tables import dump
from launch.tasks import Progress, RecallTask, Task, make_task
from launch.traces import traced
from launch.training import Outcome, Trainer, make_context


@dataclass(frozen=True, slots=True)
class Job:
    """What a process knows, and has checked, before it talks to any other. `resume`: whether to go on from the newest
    whole checkpoint; `restarted`: because the launcher has begun this very job anew, in `attempt`. `progress` says
    which step and which position of the task's stream come next, `good` which checkpoints are known to be whole, the
    newest last; `locks` keep other jobs away until the last step."""

    config: Config
    run: Path
    resume: bool
    restarted: bool
    attempt: Attempt
    progress: Progress
    task: Task
    language: Language
    good: list[Path] = field(default_factory=list)
    locks: ExitStack = field(default_factory=ExitStack)

    @property
    def stage(self) -> Config:
        """The settings of the next step."""
        return self.config.at(self.progress["step"])

    def settle(self, **progress: Any) -> None:
        """Takes over progress; what comes next has the length that its stage wants."""
        self.progress.update(progress)
        self.progress["length"] = self.task.length(self.progress["length"], self.stage.seqlen)

    def samples(self, world: World) -> list[Sample]:
        """The samples of the next step that the process's replica takes."""
        return [self._sample(index) for index in range(world.replica, self._count(world), world.replicas)]

    def samples_of_all(self, world: World) -> list[Sample]:
        """Those that all replicas take."""
        return [self._sample(index) for index in range(self._count(world))]

    def move(self, world: World, found: Outcome) -> None:
        """Goes on to the next step, once it is done."""
        tokens = self.task.size(self.progress["length"]) * self._count(world)
        self.task.learn(self.progress, found.accuracy, found.targets)
        self.settle(step=self.progress["step"] + 1, position=self.progress["position"] + tokens)

    def objective(self, language: Language) -> Objective:
        """What an engine is given."""
        config = self.config
        return Objective(language, config.loss_chunks, self.task.guesses, autocast=config.dtype == "bfloat16")

    @property
    def done(self) -> bool:
        """All steps are done, or nothing is left to learn."""
        return self.progress["step"] >= self.config.steps or self.task.learnt(self.progress)

    def _count(self, world: World) -> int:
        return world.replicas * self.stage.accumulate

    def _sample(self, index: int) -> Sample:
        """The sample `index` of a step: samples lie one behind another in the stream."""
        length = self.progress["length"]
        return self.task.sample(self.progress["position"] + index * self.task.size(length), length)


def build(config: Config) -> Language:
    """The model of a config with its first weights, the same for the same seed. Raises ValueError for what does not
    fit together."""
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.dtype == "float64" else torch.float32
    for text in config.masks:
        for _, stage in config.stages():
            if not parse_mask(text).area(stage.seqlen, stage.seqlen):
                raise ValueError(f"mask {shown(text)} lets no token of {stage.seqlen:,} attend to any; name another")
    if config.model is not None:
        language = model.decoder(config, config.model, tuple(map(parse_mask, config.masks)))
    else:
        language = huggingface.decoder(Path(config.hf), config.recompute)
        if dtype == torch.float64:
            huggingface.allow_double(language.model)
    check_heads(config.ulysses, language.shape.num_heads)
    language.model.to(dtype)
    return language


def prepare(config: Config, run: Path, go_on: bool, overwrite: bool, attempt: Attempt = ALONE) -> Job:
    """Checks all that a process can check alone. Raises ValueError with the value, the rule and the
    remedy."""
    check_device(config.device, config.share_gpus)
    check_transport(config.transport)
    if config.tensorboard:
        check_tensorboard()
    _check_place(config, run)
    restarted, there = resume.began_here(run, attempt), checkpoint.holds_any(run)
    if not go_on and not restarted:
        check_profile(config)  # else once it is known how far the run has come
    if go_on and not restarted and not there:
        raise ValueError(f"no checkpoint under {run / 'checkpoint'}; start without --resume")
    if there and not (go_on or overwrite or restarted):
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
    }
    job = Job(config, run, go_on or restarted, restarted, attempt, progress, task, language)
    job.settle()
    return job


def _check_place(config: Config, run: Path) -> None:
    """Raises ValueError where `run` cannot be this job's directory."""
    try:
        dump(config).encode()
        place = next(path for path in (run, *run.absolute().parents) if path.exists())
    except UnicodeEncodeError:
        raise ValueError("the config has a path that is no UTF-8 text, and could not be saved; rename it") from None
    except OSError as error:
        raise ValueError(f"{shown(str(run))} is no possible directory ({error.strerror}); set --out") from None
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"{run} cannot be written: {place} is a file, or not yours to write in; set --out")
    folder = run / "checkpoint"
    if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
        raise ValueError(f"{folder} is no directory, and checkpoints could not be saved in it; move it away")


def start(job: Job, world: World) -> Trainer:
    """Puts the same model on every rank, at the checkpoint if there is one. Raises ValueError where ranks
    differ."""
    config, language = job.config, job.language
    world.at("comparing settings")
    world.agree({"config": config, "text": job.task.digest, "progress": job.progress})
    world.at("looking for a checkpoint")
    saved = resume.point(job, world)
    if saved is not None:
        job.settle(**saved.progress)
        job.good.append(saved.path)
    for stage in config.since(job.progress["step"]):
        check_ranks(stage, world.size, job.task.length(0, stage.seqlen))
    config = job.stage
    world.split(config.data_parallel)
    world.at("placing the model")
    language.model.to(world.device)
    world.copy_from_first([tensor.detach() for tensor in (*language.model.parameters(), *language.model.buffers())])
    cp = make_context(config, world, language)
    trainer = Trainer(config, world, language, make_engine(job.objective(language), config, world), cp)
    world.at("loading the checkpoint")
    if saved is not None:
        checkpoint.load(saved, trainer.engine)
    if world.rank == 0:
        begin(job, saved is None)
    return trainer


def check_ranks(config: Config, ranks: int, shortest: int) -> None:
    """Raises ValueError where so many ranks cannot be dealt out to the replicas of a stage, whose shortest sequences
    have so many tokens."""
    replicas, context = config.data_parallel, ranks // config.data_parallel
    if ranks % replicas:
        raise ValueError(
            f"data_parallel is {replicas} over {ranks} ranks, which leaves {ranks % replicas} over; start a multiple "
            "of it, or set another data_parallel"
        )
    if context > shortest:
        raise ValueError(
            f"the first sequences have {shortest} tokens for {context} ranks; start fewer, or set data_parallel or "
            "recall.pairs higher"
        )
    if isinstance(config.ulysses, int) and context % config.ulysses:
        raise ValueError(
            f"ulysses is {config.ulysses} and a sequence has {context} rank{'s' if context > 1 else ''}, which it "
            'does not divide; set a divisor of them, or "auto", in the config (of a run that is resumed: config.toml '
            "in its folder)"
        )


def begin(job: Job, afresh: bool) -> None:
    """Makes the run's directory this job's. From here on a restarted attempt goes on with what it finds there."""
    job.locks.callback(resume.lock(job.run).release)
    if afresh:
        checkpoint.discard(job.run)
    resume.take_over(job.run, job.attempt)


def train(job: Job, trainer: Trainer, stop: StopSignal) -> bool:
    """Runs the remaining steps and saves. False if a signal ended the run early. Raises FloatingPointError,
    and saves nothing, once the loss is not a number."""
    config, world, progress = job.config, trainer.world, job.progress
    with job.locks, _open_report(job, trainer) if world.rank == 0 else nullcontext() as report:
        before, asked, done = trainer.counters(), False, 0
        if report and job.done:
            report.say(f"all steps were done before the restart: step {progress['step']}")
        while not job.done and not asked:
            _enter_stage(job, trainer, report)
            record, asked = _step(job, trainer, stop, report, done)
            done += 1
            if report:
                report.add(record)
            if config.save_every and progress["step"] % config.save_every == 0:
                _save(job, trainer)
        saved = _save(job, trainer)
        world.at("the summary")
        ranks = world.gather(RankSummary(world.peak_memory(), trainer.counters().since(before), world.device_name))
        answers = recall(trainer, job.task) if job.done and isinstance(job.task, RecallTask) else []
        if report:
            report.summarize(ranks, answers)
            report.say(f"saved {saved}" if job.done else f"saved {saved}; go on with --resume {job.run}")
    return job.done


def _save(job: Job, trainer: Trainer) -> Path:
    world, settings = trainer.world, resume.settings_of(job.config)
    world.step = None
    world.at(f"saving after step {job.progress['step']}")
    try:
        return checkpoint.save(job.run, trainer.engine, job.progress, settings, job.good, world)
    except OSError as error:
        raise OSError(
            f"step {job.progress['step']} could not be saved: {error}; {checkpoint.remaining(job.run)}; make room, or "
            f"mend that, and go on with --resume {job.run}"
        ) from None


def _open_report(job: Job, trainer: Trainer) -> Report:
    config, world = job.config, trainer.world
    world.at("counting bytes")
    report = Report(job.run, config, job.task.baseline(config.tokens()), job.progress["step"])
    if world.size > 1:
        heads = f", heads split over {trainer.cp.ulysses} neighbours" if trainer.cp.ulysses > 1 else ""
        report.say(f"{world.size} ranks: {world.replicas} x {world.size // world.replicas} (data x context){heads}")
    if config.hf:
        report.say(f"{type(trainer.model).__name__} of {config.hf}: masks are the model's own")
        if said := huggingface.advice(trainer.model, config.seqlen):
            report.say(f"warning: {said}")
    for said in leaks(config.masks, config.seqlen):
        report.say(f"warning: {said}")
    report.say(trainer.cp.describe())
    return report


def _foretell(trainer: Trainer, samples: Sequence[Sample], report: Report | None) -> Forecast | None:
    """Says what memory a step will take of the rank that takes most, where the ranks can tell."""
    forecast, said = foretold(trainer, samples)
    if report:
        report.say(said)
    return forecast


def _enter_stage(job: Job, trainer: Trainer, report: Report | None) -> None:
    """Where the next step is one of another stage, which is said."""
    stage = job.stage
    if stage == trainer.config:
        return
    trainer.world.at(f"going on with {stage.seqlen} tokens")
    trainer.enter(stage)
    if report:
        cp, world = trainer.cp, trainer.world
        among = f", {world.replicas} x {world.size // world.replicas} ranks (data x context)" if world.size > 1 else ""
        report.say(
            f"from step {job.progress['step'] + 1} on: sequences of {stage.seqlen:,} tokens{among}, "
            f"layout {cp.q_layout.name}, schedule {cp.schedule}"
        )


def _step(
    job: Job, trainer: Trainer, stop: StopSignal, report: Report | None, done: int
) -> tuple[Record, bool]:  # fmt: skip
    """One step, with `progress` moved on; and whether any rank was asked to stop. Before the first that this process
    has `done` it is said what memory a step is planned to take, and behind one that is like those to come what it took.
    """
    config, world, progress = job.config, trainer.world, job.progress
    step, position = progress["step"], progress["position"]  # steps done before this one
    begin, before = time.perf_counter(), trainer.counters()
    world.step = step + 1
    world.at("reading data")
    samples = job.samples(world)
    settled = done == trainer.engine.settles
    forecast = _foretell(trainer, samples, None if done else report) if done == 0 or settled else None
    lr = config.optimizer.lr_at(step, config.steps) * job.task.rate(progress["length"])
    written = traced(job.run, step + 1, trainer.cp, world.rank, world.device) if config.traces(step) else nullcontext()
    watch = settled and not (config.traces(step) and config.device == "cpu")  # profiles do not nest
    with written, compared(trainer, forecast, watch) as memory:
        found = trainer.step(samples, lr, stop.number != 0, config.watches_logits(step))
        seconds = time.perf_counter() - begin
    if not math.isfinite(found.loss) or not math.isfinite(found.norm):
        raise FloatingPointError(
            f"the loss of step {step + 1} is {found.loss}, its gradient's norm {found.norm}; "
            f"{checkpoint.remaining(job.run)}; resume with a lower optimizer.lr"
        )
    for line in memory if report else ():
        report.say(line)  # type: ignore[union-attr]
    job.move(world, found)
    record = Record(
        step=step + 1,
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
        max_logit=found.max_logit,
    )
    return record, found.asked
