"""A script that uses the library and ends, ends with exit code 0: nothing of ours keeps a destroyed group alive."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys

import torch
import torch.distributed as dist

import ringattn
from ringattn.comm import ProcessGroupTransport

held, rank, world, path, backend = sys.argv[1:]
if backend == "nccl":
    from processes import share_gpus

    share_gpus(int(rank))
    torch.set_default_device("cuda")
dist.init_process_group(backend, init_method=f"file://{path}", rank=int(rank), world_size=int(world))


def use(cp):
    q, k, v = (torch.randn(1, cp.local_seqlen, 2, 8, requires_grad=True) for _ in range(3))
    out = ringattn.attention(q, k, v, cp=cp)
    out.sum().backward()
    return cp.unshard(out.detach())


if held != "nothing":
    # over NCCL a refusal is heard where calls are compared
    cp = ringattn.ContextParallel(dist.group.WORLD, 64, options=ringattn.Options(compare_every=1))
    use(cp)
if held == "closure":
    sys.kept = lambda: cp
elif held == "model":
    model = torch.nn.Linear(2, 2)
    model.register_forward_hook(lambda *_: cp)
elif held == "graph":
    graph = ringattn.attention(*(torch.randn(1, cp.local_seqlen, 2, 8, requires_grad=True) for _ in range(3)), cp=cp)
elif held == "gloo":
    cp = ringattn.ContextParallel(ProcessGroupTransport(dist.group.WORLD), 64)
    use(cp)
elif held == "exception":
    try:
        if rank == "1":
            ringattn.attention(*[torch.randn(1, 3, 2, 8)] * 3, cp=cp)
        use(cp)
    except ValueError as error:
        sys.kept = error
    else:
        raise AssertionError("rank 1 refuses, and so all do")
dist.destroy_process_group()
if held != "nothing":
    try:
        use(cp)
    except RuntimeError as error:
        assert "has been destroyed" in str(error), error
    else:
        raise AssertionError("a context ends with its group")
sys.exit(0)
"""
HELD = ("global", "closure", "model", "graph", "gloo", "exception", "nothing")


def exit_codes(held: str, world: int, folder: Path, backend: str = "gloo") -> list[int]:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    arguments = [sys.executable, "-c", SCRIPT, held]
    ranks = [
        subprocess.Popen([*arguments, str(rank), str(world), str(folder / "store"), backend], env=environment)
        for rank in range(world)
    ]
    try:
        return [rank.wait(120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize("held", ["gloo", "exception"])
def test_a_right_run_ends_as_one(held: str, tmp_path: Path) -> None:
    assert exit_codes(held, 2, tmp_path) == [0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("held", HELD)
def test_fifty_exits(held: str, world: int, tmp_path: Path) -> None:
    for number in range(3):  # of 7 things held, at 3 numbers of processes: 63 in all
        folder = tmp_path / str(number)
        folder.mkdir()
        assert exit_codes(held, world, folder) == [0] * world
