"""What the tests of the main job share."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A directory of short documents, of 3,600 bytes in all."""
    root = tmp_path / "text"
    root.mkdir()
    generator = np.random.default_rng(0)
    for index, length in enumerate((40, 700, 1, 300, 999, 60, 1500)):
        (root / f"{index}.txt").write_bytes(generator.integers(97, 110, length, dtype=np.uint8).tobytes())
    return root
