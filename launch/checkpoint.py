"""Checkpoints with torch.distributed.checkpoint: parameters, optimizer state and the position in the text,
independent of the number of ranks. Each is a directory of its own that counts only when complete, so a
crash while saving loses nothing; older ones are removed afterwards."""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from launch.config import nearest

COMPLETE = ".metadata"  # written last
NO_PROGRESS: dict[str, Any] = {"step": 0, "position": 0, "text": "", "model": "", "length": 0, "accuracy": 0.0}


def latest(run: Path) -> Path | None:
    """The newest complete checkpoint of a run's directory."""
    found = sorted(path.parent for path in (run / "checkpoint").glob(f"step-*/{COMPLETE}"))
    return found[-1] if found else None


def save(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> Path:
    """Writes the checkpoint of `progress["step"]`; called by every rank."""
    path = run / "checkpoint" / f"step-{progress['step']:08d}"
    distributed = dist.is_initialized()
    if not (path / COMPLETE).exists():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations inside the writer
            dcp.save(_state(model, optimizer, progress), checkpoint_id=path, no_dist=not distributed)
    if not distributed or dist.get_rank() == 0:
        for older in path.parent.glob("step-*"):
            if older != path:
                shutil.rmtree(older)
    return path


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> None:
    """Fills model, optimizer and `progress` from a checkpoint that `check_fit` has passed; called by every
    rank."""
    state = _state(model, optimizer, progress)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        text = f"checkpoint {path} is damaged ({_reason(error)}); start a new run with --out or --overwrite"
        raise ValueError(text) from None
    progress.update(state["progress"])


def _reason(error: BaseException) -> str:
    """The end of an error's text, which may hold tracebacks of other ranks, as one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split(". ")[0]


def read_progress(path: Path) -> dict[str, Any]:
    """Step, position and text of a checkpoint, read by this rank alone. Raises ValueError if it is no
    checkpoint of this job."""
    state = {"progress": dict(NO_PROGRESS)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=path, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # the latter is a BaseException
        raise ValueError(f"{path} is no readable checkpoint of this job: {_reason(error)}") from None
    return state["progress"]


def check_fit(path: Path, model: nn.Module) -> None:
    """Raises ValueError naming every tensor that the checkpoint lacks, that the model lacks, or whose
    shape differs; reads only the index, nothing is changed."""
    index = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    prefix = "model."
    saved = {
        key.removeprefix(prefix): tuple(entry.size)
        for key, entry in index.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}  # tied ones under both names
    wrong = [
        f"{name} is {list(saved[name])} there and {list(shape)} in the model"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    wrong += [f"{name} is missing there{nearest(name, saved)}" for name in wanted if name not in saved]
    wrong += [f"{name} is not in the model" for name in saved if name not in wanted]
    if wrong:
        raise ValueError(
            f"checkpoint {path} does not fit the model: {'; '.join(wrong)}. "
            "Resume with the config the run was started with"
        )


def _state(model: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]) -> dict[str, Any]:
    """The tensors to save, or to load into. AdamW makes its state at the first step; until then it is zeros
    here."""
    for parameter in model.parameters():
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    moments = {name: dict(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    return {"model": model.state_dict(), "optimizer": moments, "progress": dict(progress)}
