"""Where a run begins: at its start, or at its newest whole checkpoint; and what must not have changed since."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from launch import checkpoint
from launch.board import Attempt
from launch.checkpoint import Saved
from launch.config import Config, check_profile
from launch.processes import World
from launch.rules import shown
from launch.tasks import Progress

if TYPE_CHECKING:
    from launch.run import Job

# the loss curve would break without a word; a Transformers config is compared by its text
FIXED = ("model", "masks", "documents", "lengths", "recall", "seed")
MARK, LOCK = "job.json", ".lock"


def settings_of(config: Config) -> dict[str, Any]:
    """A config as JSON holds it."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return settings


def began_here(run: Path, attempt: Attempt) -> bool:
    """Whether the job that the launcher has begun anew has written to `run` before: what it did is then gone on with,
    whatever it was started with."""
    try:
        mark = json.loads((run / MARK).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return bool(attempt.restarts and mark == {"job": attempt.launch})


def lock(run: Path) -> FileLock:
    """Keeps `run` from other jobs, until this process ends. Raises ValueError if one has it. Nothing where the file
    system knows no locks."""
    run.mkdir(parents=True, exist_ok=True)
    held = FileLock(run / LOCK, timeout=0)
    try:
        held.acquire()
    except Timeout:
        raise ValueError(f"another job is at work in {run}; wait for its end, or set --out") from None
    except NotImplementedError:
        print(f"{run} lies on a file system without locks: see that no other job writes there", flush=True)
    return held


def take_over(run: Path, attempt: Attempt) -> None:
    """Marks `run` as this job's."""
    checkpoint.write_durably(run / MARK, json.dumps({"job": attempt.launch}).encode())


def point(job: "Job", world: World) -> Saved | None:
    """The checkpoint to go on from, the same on every rank, or None for the start. Raises ValueError where none is
    whole or it is of another run; rank 0 says what is skipped, and what else has changed."""
    if not job.resume:
        return None
    saved, skipped = checkpoint.choose(job.run, world)
    if saved is None and not job.restarted:
        reasons = "; ".join(skipped) or "there is none"
        raise ValueError(f"no whole checkpoint under {job.run}: {reasons}; start a new run with --out or --overwrite")
    notes = skipped
    if saved is not None:
        checked = saved
        world.together(lambda: check(job, checked))
        notes = notes + changes(saved, job.config)
    if world.rank == 0:
        for note in notes:
            print(note, flush=True)
    return saved


def check(job: "Job", saved: Saved) -> None:
    """Raises ValueError unless `job` is what the checkpoint is of, and has something left to do."""
    path, config, fresh, there = saved.path, job.config, job.progress, saved.progress
    checkpoint.check_fit(saved, job.language.model)
    _check_text_and_model(path, there, fresh, config)
    before, now = saved.manifest.settings, settings_of(config)
    # recall grows its sequences up to `seqlen`, and has learnt something of them
    for name in FIXED if config.recall is None else (*FIXED, "seqlen"):
        if name in before and before[name] != now[name]:
            raise ValueError(
                f"checkpoint {path} was made with {_difference(name, before[name], now[name])}; resume with that, or "
                "start a new run with --out"
            )
    if job.restarted:
        return
    if there["step"] >= config.steps:
        raise ValueError(
            f"checkpoint {path} is of step {there['step']}, and {config.steps} are asked for; ask for more with --steps"
        )
    check_profile(config)
    if job.task.learnt(there):
        raise ValueError(f"{job.run} has nothing left to learn; start a new run with --out")


def _check_text_and_model(path: Path, saved: Progress, fresh: Progress, config: Config) -> None:
    if saved["text"] != fresh["text"]:
        raise ValueError(
            f"checkpoint {path} stands at byte {saved['position']:,} of a text other than this one (its files, "
            "their sizes or the seed differ); give the same --data, or start a new run with --out"
        )
    if saved["model"] != fresh["model"]:
        raise ValueError(f"checkpoint {path} is of a model whose config {config.hf} has changed since; restore it")


def changes(saved: Saved, config: Config) -> list[str]:
    """What may change in the middle of a run and did, a line each."""
    before, now = saved.manifest.settings, settings_of(config)
    names = [name for name in now if name in before and name not in FIXED and before[name] != now[name]]
    return [f"from here on: {said}" for name in names if (said := _difference(name, now[name], before[name]))]


def _difference(name: str, was: Any, now: Any) -> str:
    """Of tables only the entries that differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        entries = [key for key in now if was.get(key) != now[key]]
        return ", ".join(_difference(f"{name}.{key}", was.get(key), now[key]) for key in entries)
    return f"{name} = {shown(was)}, not {shown(now)}"
