"""The numbers of metrics.jsonl for TensorBoard."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLUSH = 10  # seconds until what was written can be seen


def check_tensorboard() -> None:
    """Raises ValueError where the package is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ValueError(
            "tensorboard is set, and its package is not installed; pip install -e '.[launch,tensorboard]', or leave it "
            "out"
        )


class Scalars:
    """Writes into `folder`. `first`: the step, counted from 1, that a run begins or goes on with; what lies there of it
    and of later ones is of a run that is dropped, and no longer shown."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        if first == 1:
            for old in folder.glob("events.out.tfevents.*"):
                old.unlink()
        self.writer = SummaryWriter(str(folder), purge_step=first, flush_secs=FLUSH)

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Every number of a step under its name."""
        for name, value in values.items():
            if value is not None and name not in ("step", "start"):
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes out what is left."""
        self.writer.close()
