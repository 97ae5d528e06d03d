"""The example to read first: three tokens, two ranks, the numbers of a calculation by hand; and the scripts of
`examples/`: each is imported and called as its own last lines do, and one is started as README says."""

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ringattn
from ringattn.testing import run_processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def test_three_tokens_on_two_ranks():
    q = torch.tensor([[0.06, 0.08], [0.14, 0.24], [0.22, 0.40]]).view(1, 3, 1, 2)
    k = torch.tensor([[0.04, 0.08], [0.12, 0.20], [0.20, 0.32]]).view(1, 3, 1, 2)
    v = torch.tensor([[0.03, 0.03], [0.11, 0.11], [0.19, 0.19]]).view(1, 3, 1, 2)

    def one_rank(transport):
        cp = ringattn.ContextParallel(transport, seqlen=3, mask=ringattn.full())
        out = ringattn.attention(cp.shard(q), cp.shard(k), cp.shard(v), cp=cp)
        return cp.unshard(out)

    for out in ringattn.Loopback(2).run(one_rank):
        expected = torch.tensor([0.1105, 0.1115, 0.1125]).view(1, 3, 1, 1).expand(1, 3, 1, 2)
        assert torch.allclose(out, expected, atol=5e-5)


def losses(rank: int, world_size: int, name: str) -> list[float]:
    return runpy.run_path(str(EXAMPLES / name))["main"](5)


@pytest.mark.parametrize("name", ["train.py", "llama.py"])
def test_an_example_trains_alike_on_any_number_of_ranks(name: str) -> None:
    (alone,) = run_processes(losses, 1, name)
    assert alone[-1] < alone[0] - 0.1
    for found in run_processes(losses, 2, name):
        assert found == pytest.approx(alone, rel=1e-5)  # fp32 sums in another order, and five steps


def test_the_example_without_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "look.py"))["main"](str(tmp_path / "look.html"))
    said = capsys.readouterr().out
    assert "pairs that each rank computes" in said and "qwen3-0.6b, 131,072 tokens on 8 x H100 of 80.00 GB" in said
    assert "balanced, exchange" in (tmp_path / "look.html").read_text()


def test_readme_names_every_example() -> None:
    named = re.findall(r"examples/(\w+\.py)", (ROOT / "README.md").read_text())
    assert sorted(named) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_an_example_starts_as_readme_says() -> None:
    (line,) = re.findall(r"^torchrun.* examples/train\.py", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    command = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(step \d+: loss \d\.\d+\n){3}", done.stdout)
