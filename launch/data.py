"""Bytes of real text as training sequences: files in a fixed shuffled order, read as one endless stream
from which step n takes its bytes; every file is a document. Nothing is kept in memory but the list of
files, so a corpus may be larger than the machine."""

import hashlib
import os
import random
import stat
import sysconfig
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from launch.config import LengthsConfig
from launch.rules import shown
from ringattn.loss import IGNORED

VOCABULARY = 256
LOOK, LOOKS = 4096, 1024  # bytes that tell a text from another: how many at a place, and at how many places
# Not the library's own sources, missing on some systems, or (pydoc_data) one generated file as long as six steps.
LIBRARY_SKIPS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "pydoc_data"}


@dataclass(frozen=True, slots=True)
class Sample:
    """Packed sequences. `tokens` and `labels` are int64 [rows, seqlen]; `labels[row, i]` is the token after position
    i, or -100 where none is asked for; `cu_seqlens` are the borders, from 0 to seqlen, that attention does not
    cross in any row."""

    tokens: np.ndarray
    labels: np.ndarray
    cu_seqlens: tuple[int, ...]


class Text:
    """Files as one stream of bytes that starts again when it is over."""

    def __init__(self, files: Sequence[Path], seed: int, lengths: LengthsConfig | None = None) -> None:
        self.files = list(files)
        self.seed, self.lengths = seed, lengths
        random.Random(seed).shuffle(self.files)
        sizes = np.array([path.stat().st_size for path in self.files], dtype=np.int64)
        self.ends = np.cumsum(sizes)
        self.size = int(self.ends[-1])
        self.digest = self._digest(sizes)

    def _digest(self, sizes: np.ndarray) -> str:
        """Of names and sizes in order, and of what is read at evenly spaced places: all of a text of 4 MiB."""
        listing = "\n".join(f"{path.name} {size}" for path, size in zip(self.files, sizes, strict=True))
        digest = hashlib.sha256(listing.encode(errors="surrogateescape"))
        for start in range(0, self.size, max(LOOK, -(-self.size // LOOKS))):
            digest.update(self.read(start, min(LOOK, self.size - start))[0].tobytes())
        return digest.hexdigest()[:16]

    def read(self, position: int, length: int) -> tuple[np.ndarray, list[int]]:
        """uint8 [length] from absolute byte `position` on, and where in it files end."""
        pieces: list[np.ndarray] = []
        ends: list[int] = []
        filled = 0
        while filled < length:
            at = (position + filled) % self.size
            index = int(np.searchsorted(self.ends, at, side="right"))
            left = int(self.ends[index]) - at
            count = min(left, length - filled)
            pieces.append(self._piece(index, at, count))
            filled += count
            if count == left:
                ends.append(filled)
        return np.concatenate(pieces), ends

    def _piece(self, index: int, at: int, count: int) -> np.ndarray:
        start = int(self.ends[index - 1]) if index else 0
        if not self.files[index].is_file():  # a pipe in its place would be waited for
            raise ValueError(f"{self.files[index]} is gone while it was being read; restore it and resume")
        piece = np.fromfile(self.files[index], dtype=np.uint8, count=count, offset=at - start)
        if piece.size != count:
            raise ValueError(f"{self.files[index]} became shorter while it was being read; restore it and resume")
        return piece

    def sample(self, position: int, seqlen: int) -> Sample:
        """The packed sequence of `seqlen` bytes at absolute byte `position`."""
        data, ends = self.read(position, seqlen)
        tokens = data.astype(np.int64)
        borders = sorted({0, seqlen, *ends, *self._cuts(position, seqlen)})
        labels = np.append(tokens[1:], IGNORED)
        labels[np.array(borders[1:]) - 1] = IGNORED
        return Sample(tokens[None], labels[None], tuple(borders))

    def _cuts(self, position: int, seqlen: int) -> list[int]:
        """Where documents of random lengths end in the sequence at `position`; the same each time it is read."""
        if self.lengths is None:
            return []
        draw = np.random.default_rng((self.seed, position))
        count = 2 * seqlen // self.lengths.median + 16
        cuts: list[int] = [0]
        while cuts[-1] < seqlen:
            lengths = np.exp(draw.normal(np.log(self.lengths.median), self.lengths.sigma, count))
            cuts += (cuts[-1] + np.clip(lengths, 1, seqlen).astype(np.int64).cumsum()).tolist()
        return [cut for cut in cuts if 0 < cut < seqlen]

    def unigram_entropy(self, position: int, length: int) -> float:
        """Entropy in nats of the byte frequencies of that stretch: what a model reaches that ignores
        context."""
        counts = np.zeros(VOCABULARY, dtype=np.int64)
        for start in range(position, position + length, 1 << 24):
            piece, _ = self.read(start, min(1 << 24, position + length - start))
            counts += np.bincount(piece, minlength=VOCABULARY)
        shares = counts[counts > 0] / counts.sum()
        return float(-(shares * np.log(shares)).sum())


def open_text(paths: Sequence[str], seqlen: int, seed: int, lengths: LengthsConfig | None = None) -> Text:
    """The text of `paths` (files, or directories searched for files), or of the standard library's sources
    where there are none. Raises ValueError naming what is missing, empty, unreadable or too little for one
    sequence."""
    files = [file for path in paths for file in _files(Path(path))] if paths else _standard_library()
    unreadable = [file for file in files if not os.access(file, os.R_OK)]
    if unreadable:
        raise ValueError(f"data {shown(str(unreadable[0]))} cannot be read; check its permissions")
    text = Text(files, seed, lengths)
    if text.size < seqlen:
        raise ValueError(
            f"the text has {text.size:,} bytes in {len(files)} files, one sequence takes {seqlen:,}; "
            "give more with --data, or set a smaller seqlen"
        )
    return text


KINDS = {
    stat.S_ISFIFO: "a pipe",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISSOCK: "a socket",
}


def _files(path: Path) -> list[Path]:
    name = shown(str(path))
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # the latter of a zero byte in the name
        said = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"data {name} does not exist, or is out of reach ({said}); give an existing file or directory"
        ) from None
    for is_kind, kind in KINDS.items():
        if is_kind(mode):
            raise ValueError(f"data {name} is {kind}, which cannot be read twice; give a file or a directory of files")
    if not stat.S_ISDIR(mode):
        if not path.stat().st_size:
            raise ValueError(f"data file {name} is empty; give a file with text in it")
        return [path]
    try:
        found = [file for file in _walk(path) if not file.name.startswith(".") and _holds_text(file)]
    except OSError as error:
        raise ValueError(
            f"{error.filename} in the data cannot be read ({error.strerror}); check its permissions"
        ) from None
    if not found:
        raise ValueError(f"data directory {name} holds no file with text in it; give one that does")
    return found


def _walk(path: Path, skipped: Collection[str] = ()) -> list[Path]:
    """All that lies below a directory, in order, but for what lies in folders of these names. Raises OSError for one
    that cannot be looked into."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    found = []
    for folder, folders, names in os.walk(path, onerror=refuse):
        folders[:] = [name for name in folders if name not in skipped]
        found += [Path(folder, name) for name in names]
    return sorted(found)


def _holds_text(file: Path) -> bool:
    try:
        found = file.stat()
    except FileNotFoundError:  # a link to nothing
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size > 0


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    found = [path for path in _walk(root, LIBRARY_SKIPS) if path.suffix == ".py" and path.stat().st_size]
    if not found:
        raise ValueError(f"no Python sources under {root}; give text with --data")
    return found
