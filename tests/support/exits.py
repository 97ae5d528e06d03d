"""Scripts that use the library and end: their ranks' exit codes."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

USE = """
def use(cp):
    q, k, v = (torch.randn(1, cp.local_seqlen, 2, 8, requires_grad=True) for _ in range(3))
    out = ringattn.attention(q, k, v, cp=cp)
    out.sum().backward()
    return cp.unshard(out.detach())
"""
DESTROY = """
from pathlib import Path

dist.destroy_process_group()
# one that is left may meet the end of the interpreter, which aborts the process
threads = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
assert not any("gloo" in name for name in threads), threads
"""
# Every rank is forked where the imports are done, and then ends as an interpreter does.
SCRIPT = f"""
import os
import sys

import torch
import torch._dynamo  # what the first call of each rank would import
import torch.distributed as dist

import ringattn
from ringattn.comm import ProcessGroupTransport

world, folder, backend, *runs = sys.argv[1:]


def forked(world):
    '''In each of that many children its rank; in their parent, once they have ended, None.'''
    children = []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            return rank
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)


for number, held in enumerate(runs):
    if (rank := forked(int(world))) is not None:
        break
else:
    sys.exit()

if backend == "nccl":
    from ringattn.testing import share_gpus

    share_gpus(rank)
    torch.set_default_device("cuda")
dist.init_process_group(backend, init_method="file://%s/%d" % (folder, number), rank=rank, world_size=int(world))


{USE}

if held != "nothing":
    # over NCCL a refusal is heard where calls are compared
    cp = ringattn.ContextParallel(dist.group.WORLD, 64, options=ringattn.Options(compare_every=1))
    use(cp)
else:
    dist.barrier()  # a rank that ends while another still connects fails that one's init_process_group
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
        if rank == 1:
            ringattn.attention(*[torch.randn(1, 3, 2, 8)] * 3, cp=cp)
        use(cp)
    except ValueError as error:
        sys.kept = error
    else:
        raise AssertionError("rank 1 refuses, and so all do")
{DESTROY}if held != "nothing":
    try:
        use(cp)
    except RuntimeError as error:
        assert "has been destroyed" in str(error), error
    else:
        raise AssertionError("a context ends with its group")
sys.exit(0)
"""
HELD = ("global", "closure", "model", "graph", "gloo", "exception", "nothing")


def exit_codes(held: Sequence[str], world: int, folder: Path, backend: str = "gloo") -> list[list[int]]:
    """Those of all ranks, for each run with something held."""
    ranks = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(world), str(folder), backend, *held],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        lines = ranks.communicate(timeout=300)[0].splitlines()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(ranks.pid, signal.SIGKILL)
    return [list(map(int, line.split())) for line in lines]
