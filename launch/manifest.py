"""What a checkpoint says of itself, as JSON: the run's progress and settings, its files with their checksums, and where
the parts of each tensor lie. Whatever it says is checked before it is used: nothing in it is ever executed."""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.tasks import Progress

NAME = "manifest.json"
FORMAT = 1
LARGEST = 1 << 28  # bytes
KINDS: Mapping[str, type] = {
    "step": int,
    "position": int,
    "text": str,
    "model": str,
    "length": int,
    "accuracy": float,
}
FILE = re.compile(r"rank-\d{5}\.safetensors")


class Damaged(ValueError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a tensor: the file that holds it, where in the tensor it begins, and its shape."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Manifest:
    """`files`: bytes and SHA-256 of each; `tensors`: shape and pieces of each."""

    progress: Progress
    settings: dict[str, Any]
    files: dict[str, tuple[int, str]]
    tensors: dict[str, tuple[tuple[int, ...], tuple[Piece, ...]]]


def dump(manifest: Manifest) -> str:
    """JSON, with a checksum of its own."""
    body = {
        "format": FORMAT,
        "progress": manifest.progress,
        "settings": manifest.settings,
        "files": manifest.files,
        "tensors": {
            name: [shape, [[piece.file, piece.offsets, piece.sizes] for piece in pieces]]
            for name, (shape, pieces) in manifest.tensors.items()
        },
    }
    return json.dumps({"sha256": _digest(body), "body": body})


def load(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder, whose files are there in full length. Raises Damaged."""
    path = folder / NAME
    try:
        if not path.is_file():
            raise Damaged(f"it has no {NAME}, so it was not finished, or is of another version")
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path.stat().st_size:,} bytes")
        whole = json.loads(path.read_bytes())
        body = whole["body"]
        if body["format"] != FORMAT or whole["sha256"] != _digest(body):
            raise ValueError("its checksum does not fit")
        manifest = Manifest(
            {name: _of_kind(body["progress"][name], kind) for name, kind in KINDS.items()},
            _of_kind(body["settings"], dict),
            {_file(name): (_size(size), _of_kind(digest, str)) for name, (size, digest) in body["files"].items()},
            {name: (_shape(shape), _pieces(shape, pieces)) for name, (shape, pieces) in body["tensors"].items()},
        )
        for piece in (piece for _, pieces in manifest.tensors.values() for piece in pieces):
            if piece.file not in manifest.files:
                raise ValueError(f"it names no file {piece.file}")
    except Damaged:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OSError) as error:
        said = " ".join(str(error).split())[:100] or type(error).__name__
        raise Damaged(f"its {NAME} is damaged ({said})") from None
    for name, (size, _) in manifest.files.items():
        if not (folder / name).is_file():
            raise Damaged(f"its {name} is missing")
        there = (folder / name).stat().st_size
        if there != size:
            raise Damaged(f"its {name} has {there:,} of {size:,} bytes")
    return manifest


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _of_kind(value: Any, kind: type) -> Any:
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63):
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value


def _size(value: Any) -> int:
    return int(_of_kind(value, int))


def _file(name: str) -> str:
    if not FILE.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a file")
    return name


def _shape(sizes: Any) -> tuple[int, ...]:
    return tuple(_size(size) for size in _of_kind(sizes, list))


def _pieces(shape: Any, pieces: Any) -> tuple[Piece, ...]:
    whole, found = _shape(shape), tuple(Piece(_file(f), _shape(o), _shape(s)) for f, o, s in _of_kind(pieces, list))
    for piece in found:
        ends = [offset + size for offset, size in zip(piece.offsets, piece.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, whole, strict=True)):
            raise ValueError("a piece reaches beyond its tensor")
    if sum(math.prod(piece.sizes) for piece in found) != math.prod(whole):
        raise ValueError("pieces do not make up their tensor")
    return found
