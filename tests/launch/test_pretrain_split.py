"""The main job with heads split, and with a ring of nodes: it trains as one process does, and says so."""

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import pytest

from launch.config import Config, load
from ringattn.testing import run_processes
from tests.support.pretrain import config_file, records_of, run_until, tiny


def trained(rank: int, world_size: int, config: Config, run: Path, a_node: int) -> str:
    """What a run prints whose launcher tells of so many ranks on each node."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank % a_node), LOCAL_WORLD_SIZE=str(a_node))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_until(rank, world_size, config, run, False, -1)
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "a_node", "changes", "words"),
    [
        (4, 4, {"ulysses": 2}, "4 ranks: 1 x 4 (data x context), heads split over 2 neighbours"),
        (2, 2, {"ulysses": "auto"}, "2 ranks: 1 x 2 (data x context)"),
        (4, 2, {"schedule": "double_ring"}, "schedule double_ring"),
    ],
)
def test_the_job_trains_as_one_process(
    world: int, a_node: int, changes: dict[str, Any], words: str, text: Path, tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    trained(0, 1, tiny(text, steps=3), alone, 1)
    (said, *_) = run_processes(trained, world, tiny(text, steps=3, **changes), run, a_node)
    assert words in said, said
    assert ("with what heads travel" in said) == ("ulysses" in changes)
    for name in ("loss", "grad_norm"):
        expected = [record[name] for record in records_of(alone)]
        assert [record[name] for record in records_of(run)] == pytest.approx(expected, rel=1e-9), name


def refused(rank: int, world_size: int, config: Config, run: Path) -> str:
    with pytest.raises(ValueError) as caught:
        run_until(rank, world_size, config, run, False, -1)
    return str(caught.value)


@pytest.mark.slow
def test_a_split_that_does_not_divide_a_sequence_s_ranks_is_refused_by_all(text: Path, tmp_path: Path) -> None:
    for said in run_processes(refused, 2, tiny(text, ulysses=4), tmp_path / "run"):
        assert "ulysses is 4 and a sequence has 2 ranks" in said


def test_a_config_keeps_its_split(text: Path, tmp_path: Path) -> None:
    for value in (2, "auto"):
        assert load(config_file(tmp_path, "", "", tiny(text, ulysses=value))).ulysses == value
