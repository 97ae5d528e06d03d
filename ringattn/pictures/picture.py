"""A picture in the hand: what a notebook shows by itself, a terminal as text, and files of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ringattn.arguments.values import path as path_of
from ringattn.arguments.values import shown
from ringattn.pictures.page import page
from ringattn.pictures.png import png
from ringattn.pictures.scene import Scene
from ringattn.pictures.svg import svg
from ringattn.pictures.text import text

WRITERS: dict[str, Callable[[Scene], str | bytes]] = {".svg": svg, ".html": page, ".png": png, ".txt": text}


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """Shows itself in a notebook; printed, it is text. :meth:`save` writes it."""

    scene: Scene

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it as what the name ends with: ``.svg``; ``.html``, one page with zoom that needs no network;
        ``.png``, with matplotlib; ``.txt``.

        Raises ``ValueError`` for another ending, for a folder that is not there, and for ``.png`` without matplotlib.
        """
        target = writable(path)
        made = WRITERS[target.suffix.lower()](self.scene)
        try:
            target.write_bytes(made if isinstance(made, bytes) else made.encode())
        except OSError as error:
            raise ValueError(f"path={shown(str(target))}: cannot be written ({error.strerror}); name another") from None

    def _repr_html_(self) -> str:
        return svg(self.scene)

    def __repr__(self) -> str:
        return text(self.scene)


def writable(path: str | os.PathLike[str]) -> Path:
    """A path that a picture may be written to.

    Raises as :meth:`Picture.save` does.
    """
    target = Path(path_of("path", path))
    if target.suffix.lower() not in WRITERS:
        raise ValueError(f"path={shown(str(target))}: must end with one of {', '.join(WRITERS)}")
    if not target.parent.is_dir():
        raise ValueError(f"path={shown(str(target))}: the folder {target.parent} is not there; make it first")
    return target
