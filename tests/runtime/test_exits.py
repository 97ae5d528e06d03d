"""A script that uses the library and ends, ends with exit code 0: nothing of ours keeps a destroyed group alive."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.exits import DESTROY, HELD, USE, exit_codes


def test_right_runs_end_as_such(tmp_path: Path) -> None:
    assert exit_codes(("gloo", "exception"), 2, tmp_path) == [[0, 0]] * 2


@pytest.mark.parametrize("first", ["import ringattn", pytest.param("import torch", marks=pytest.mark.slow)])
def test_what_calls_import_keeps_no_group(first: str) -> None:
    """The library itself imported before the group is made, or after that; nothing else imported before."""
    script = f"""
{first}
import sys
import torch
import torch.distributed as dist

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import ringattn

{USE}
cp = ringattn.ContextParallel(dist.group.WORLD, 64)
use(cp)
assert "torch._dynamo" not in sys.modules, "a call does not import it, but an optimizer would, and an operator:"
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False):
    use(cp)
assert "torch._dynamo" in sys.modules
{DESTROY}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert not ended.returncode, ended.stderr


@pytest.mark.slow
@pytest.mark.timeout(320)
@pytest.mark.parametrize("world", [2, 3, 4])
def test_whatever_is_held_processes_end_as_such(world: int, tmp_path: Path, soak: bool) -> None:
    here = HELD if soak or world == 2 else HELD[world % 2 :: 2]  # of three processes one half, of four the other
    runs = here * (3 if soak else 1)
    assert exit_codes(runs, world, tmp_path) == [[0] * world] * len(runs)
