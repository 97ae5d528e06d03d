"""Checkpoints: parameters, optimizer state and the position in the text, independent of the number of ranks. Each is a
folder that appears under its name only when all of it is on the disk; the last two are kept. Tensors are safetensors,
the rest is JSON: nothing that is read can run."""

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from launch import manifest
from launch.config import nearest
from launch.engines import MODEL, Engine, weights_of
from launch.manifest import Damaged, Manifest, Piece
from launch.processes import World
from launch.tasks import Progress

NO_PROGRESS: Progress = {"step": 0, "position": 0, "text": "", "model": "", "length": 0, "accuracy": 0.0}
KEPT = 2
Shape = tuple[int, ...]
Placed = tuple[Shape, Tensor]  # where a block begins in its tensor, and the block
STEP, SAVING = re.compile(r"step-([0-9]{8,})"), re.compile(r"saving-[0-9]{8,}")


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint whose manifest is whole."""

    path: Path
    manifest: Manifest

    @property
    def progress(self) -> Progress:
        """Step, position and what they belong to."""
        return dict(self.manifest.progress)


def find(run: Path) -> tuple[list[Saved], list[str]]:
    """A run's checkpoints, newest first, as far as their manifests tell; and why others do not count, a line each."""
    found, skipped = [], []
    for folder in sorted(_entries(run), key=lambda path: (len(path.name), path.name), reverse=True):
        try:
            if name := STEP.fullmatch(folder.name):
                found.append(Saved(folder, _load_manifest(folder, int(name[1]))))
            elif not SAVING.fullmatch(folder.name):
                skipped.append(f"{folder} is skipped: it is no checkpoint of this job")
        except Damaged as error:
            skipped.append(f"checkpoint {folder} is skipped: {error}")
    return found, skipped


def _load_manifest(folder: Path, step: int) -> Manifest:
    """That of a folder which is named for `step`; renamed, it might pass for a newer one. Raises Damaged."""
    found = manifest.load(folder)
    if found.progress["step"] != step:
        raise Damaged(f"it is that of step {found.progress['step']}, under another name")
    return found


def holds_any(run: Path) -> bool:
    """Whether there is anything that was a checkpoint."""
    return any(STEP.fullmatch(folder.name) for folder in _entries(run))


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run's directory, as far as its manifest tells."""
    found, _ = find(run)
    return found[0].path if found else None


def choose(run: Path, world: World) -> tuple[Saved | None, list[str]]:
    """The newest checkpoint that is whole to the last bit, the same on every rank, and why newer ones do not count.
    Every rank reads its part of the files."""
    found, skipped = find(run)
    everyone = world.tell([[str(saved.path) for saved in found], skipped])
    others = [rank for rank, (paths, _) in enumerate(everyone) if paths != everyone[0][0]]
    if others:
        raise ValueError(
            f"rank 0 finds the checkpoints {everyone[0][0]}, rank {others[0]} {everyone[others[0]][0]}; put {run} on a "
            "file system that all machines share"
        )
    for saved in found:
        damage = next((said for said in world.tell(_damage(saved, world.rank, world.size)) if said), None)
        if damage is None:
            return saved, skipped
        skipped.append(f"checkpoint {saved.path} is skipped: {damage}")
    return None, skipped


def _damage(saved: Saved, rank: int, size: int) -> str:
    """What is wrong with this rank's part of the files, or nothing."""
    for index, (name, (_, digest)) in enumerate(saved.manifest.files.items()):
        if index % size != rank:
            continue
        pieces = {key: p for key, (_, pieces) in saved.manifest.tensors.items() for p in pieces if p.file == name}
        try:
            with open(saved.path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"its {name} is damaged (its checksum does not fit)"
            with safetensors.safe_open(saved.path / name, framework="pt") as file:
                shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
        except (OSError, safetensors.SafetensorError) as error:
            return f"its {name} cannot be read ({' '.join(str(error).split())[:100]})"
        if shapes != {key: piece.sizes for key, piece in pieces.items()}:
            return f"its {name} does not hold what its manifest says"
    return ""


def check_fit(saved: Saved, model: nn.Module) -> None:
    """Raises ValueError naming every tensor that the checkpoint lacks, that the model lacks, or whose
    shape differs; nothing is changed."""
    index = saved.manifest.tensors
    there = {key.removeprefix(MODEL): shape for key, (shape, _) in index.items() if key.startswith(MODEL)}
    wanted = {name: tuple(tensor.shape) for name, tensor in weights_of(model).items()}
    wrong = [
        f"{name} is {list(there[name])} there and {list(shape)} in the model"
        for name, shape in wanted.items()
        if name in there and there[name] != shape
    ]
    wrong += [f"{name} is missing there{nearest(name, there)}" for name in wanted if name not in there]
    wrong += [f"{name} is not in the model" for name in there if name not in wanted]
    if wrong:
        raise ValueError(
            f"checkpoint {saved.path} does not fit the model: {'; '.join(wrong)}. "
            "Resume with the config the run was started with"
        )


def save(
    run: Path,
    engine: Engine,
    progress: Progress,
    settings: dict[str, Any],
    good: list[Path],
    world: World,
) -> Path:
    """Writes the checkpoint of `progress["step"]`, adds it to `good`, the whole ones, and keeps the last two of these;
    called by every rank. Raises FloatingPointError, and leaves what is there, if a number in it is not finite; OSError
    on every rank if any cannot write."""
    path = run / "checkpoint" / f"step-{progress['step']:08d}"
    if good and good[-1] == path:
        return path  # nothing has been done since
    saving = path.with_name(path.name.replace("step", "saving"))
    shapes, own = _own(engine, progress["step"], run, world)
    world.together(lambda: _begin(saving) if world.rank == 0 else None)
    written = world.together(lambda: _write(saving, own, world.rank))
    good.append(path)
    manifest_of = _assemble(written, shapes, progress, settings)
    world.together(lambda: _finish(saving, path, manifest_of, good) if world.rank == 0 else None)
    return path


def load(saved: Saved, engine: Engine) -> None:
    """Fills an engine from a checkpoint that `choose` and `check_fit` have passed."""
    with ExitStack() as opened:
        files = {
            name: opened.enter_context(safetensors.safe_open(saved.path / name, framework="pt"))
            for name in saved.manifest.files
        }

        def read(key: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
            if key not in saved.manifest.tensors:
                raise Damaged(f"checkpoint {saved.path} lacks {key}; start a new run with --out or --overwrite")
            pieces = saved.manifest.tensors[key][1]
            return _block(files, key, pieces, offsets, sizes)

        engine.load(read)


def discard(run: Path, keep: tuple[Path, ...] = ()) -> None:
    """Removes a run's checkpoints and what an interrupted save has left, but for some; nothing else that may lie
    there."""
    for folder in _entries(run):
        if folder not in keep and (STEP.fullmatch(folder.name) or SAVING.fullmatch(folder.name)):
            _remove(folder / manifest.NAME)  # first: half a checkpoint is none
            _remove(folder)


def write_durably(path: Path, data: bytes) -> None:
    """A file that is there in full, or as it was before, whenever the machine stops."""
    partial = path.with_name(path.name + ".partial")
    _remove(partial)  # a link would be followed, a pipe waited for
    with open(partial, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync(path.parent)


def _entries(run: Path) -> list[Path]:
    folder = run / "checkpoint"
    return [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()] if folder.is_dir() else []


def _remove(path: Path) -> None:
    """Whatever is there, if anything."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _begin(saving: Path) -> None:
    _remove(saving)
    saving.mkdir(parents=True)


def _write(saving: Path, own: Mapping[str, Placed], rank: int) -> list[Any]:
    """This rank's file; its name, length and checksum, and the pieces in it."""
    data = to_bytes({key: block.contiguous() for key, (_, block) in own.items()})
    name = f"rank-{rank:05d}.safetensors"
    write_durably(saving / name, data)
    pieces = {key: [offsets, list(block.shape)] for key, (offsets, block) in own.items()}
    return [name, len(data), hashlib.sha256(data).hexdigest(), pieces]


def _assemble(
    written: list[list[Any]], shapes: Mapping[str, Shape], progress: Progress, settings: dict[str, Any]
) -> Manifest:
    pieces: dict[str, list[Piece]] = {key: [] for key in shapes}
    for name, _, _, blocks in written:
        for key, (offsets, sizes) in blocks.items():
            pieces[key].append(Piece(name, tuple(offsets), tuple(sizes)))
    return Manifest(
        dict(progress),
        settings,
        {name: (size, digest) for name, size, digest, _ in written},
        {key: (shape, tuple(pieces[key])) for key, shape in shapes.items()},
    )


def _finish(saving: Path, path: Path, whole: Manifest, good: list[Path]) -> None:
    """The manifest, the name, and then the end of the oldest."""
    write_durably(saving / manifest.NAME, manifest.dump(whole).encode())
    _remove(path)  # one of the same step that was skipped
    saving.rename(path)
    _sync(path.parent)
    try:
        discard(path.parents[1], tuple(good[-KEPT:]))
    except OSError as error:  # no reason to end what has just been saved
        print(f"an older checkpoint stays: {error}", file=sys.stderr, flush=True)


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _own(engine: Engine, step: int, run: Path, world: World) -> tuple[dict[str, Shape], dict[str, Placed]]:
    """The shapes of all tensors, and where those blocks begin that this rank writes: its part of what lies in parts,
    and its share of what all ranks hold. Raises FloatingPointError for what is not finite on any rank."""
    shapes: dict[str, Shape] = {}
    own: dict[str, Placed] = {}
    finite: dict[str, Tensor] = {}
    for index, (key, part) in enumerate(engine.state()):
        shapes[key] = part.shape
        finite[key] = part.block.isfinite().all()
        if part.block.numel() and (index % world.size == world.rank or not part.shared):
            own[key] = (part.offsets, part.block.cpu())
    answers = torch.stack(list(finite.values())).tolist()
    bad = next((key for key, is_finite in zip(finite, answers, strict=True) if not is_finite), "")
    found = [(rank, key) for rank, key in enumerate(world.tell(bad)) if key]
    if found:
        rank, key = found[0]
        raise FloatingPointError(
            f"{key} is not finite on rank {rank} after {step} steps, which is not saved; {remaining(run)}; resume with "
            "a lower optimizer.lr"
        )
    return shapes, own


def remaining(run: Path) -> str:
    """What is there to go on from, in words."""
    last = latest(run)
    return "there is no checkpoint yet" if last is None else f"{last} is untouched"


def _block(
    files: Mapping[str, Any], key: str, pieces: Sequence[Piece], offsets: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """A block of a tensor, out of the pieces that have something of it."""
    block = None
    for piece in pieces:
        here, there = [], []
        for offset, size, begin, length in zip(piece.offsets, piece.sizes, offsets, sizes, strict=True):
            first, last = max(offset, begin), min(offset + size, begin + length)
            here.append(slice(first - begin, last - begin))
            there.append(slice(first - offset, last - offset))
        if any(cut.start >= cut.stop for cut in here):
            continue
        found = files[piece.file].get_slice(key)[tuple(there)] if there else files[piece.file].get_tensor(key)
        if list(found.shape) == list(sizes):
            return found
        if block is None:
            block = found.new_empty(tuple(sizes))
        block[tuple(here)] = found
    return torch.empty(tuple(sizes)) if block is None else block  # none of it: an empty one
