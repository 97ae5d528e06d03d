"""Benchmarks: the one for GPUs runs where there is none, keeps what it has whatever ends it, and every result says what
it was made on."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

import ringattn
from benchmarks import common
from benchmarks.gpu.bare import Plain
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.cases import CASES
from benchmarks.gpu.figures import Bar, Figure, compared, judged
from benchmarks.gpu.runner import Case, run
from benchmarks.gpu.sizes import DRY
from ringattn.testing import InstantRank

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
BENCH = Bench(DRY, Plain())


def results() -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in RESULTS.iterdir()}


@pytest.mark.slow
def test_the_gpu_benchmark_runs_dry() -> None:
    """The same code at tiny sizes, every case and every kind of row, and no result of it."""
    before = results()
    command, environment = [sys.executable, "-m", "benchmarks.gpu", "--dry"], os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    for case in CASES:
        assert f"== {case.name}\n{{" in done.stdout, case.name
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {"ring", "exchange", "gather"} <= {row.get("schedule") for row in rows}
    assert not any(word in done.stdout for word in ("NaN", '"error"', "cut_off", "no time was left"))
    assert results() == before


def fails() -> dict[str, Any]:
    raise ArithmeticError("no such kernel")


def test_a_figure_that_fails_stands_in_the_result_and_the_rest_is_measured() -> None:
    def first(bench: Bench) -> Iterator[Figure]:
        yield {"n": 1}, lambda: {"ms": 1.0}
        yield {"n": 2}, fails
        yield {"n": 3}, lambda: {"ms": 3.0}

    def second(bench: Bench) -> Iterator[Figure]:
        yield {"n": 4}, lambda: {"ms": 4.0}

    kept: list[dict[str, Any]] = []
    cases = [Case("first", 1, first), Case("second", 1, second)]
    assert run(cases, BENCH, 60, keep=lambda result: kept.append(deepcopy(result)))
    rows = kept[-1]["cases"]["first"]["rows"]
    assert rows == [{"n": 1, "ms": 1.0}, {"n": 2, "error": "ArithmeticError: no such kernel"}, {"n": 3, "ms": 3.0}]
    assert kept[-1]["cases"]["second"]["rows"] == [{"n": 4, "ms": 4.0}]
    # after every row, so that a run that is killed keeps what it has
    assert [len(result["cases"]["first"]["rows"]) for result in kept] == [1, 2, 3, 3, 3]
    assert [result["done"] for result in kept] == [False] * 4 + [True]
    assert not run(cases[1:], BENCH, 60, keep=kept.append)


def test_what_there_is_no_time_for_is_said() -> None:
    def endless(bench: Bench) -> Iterator[Figure]:
        while True:
            yield {}, lambda: {"ms": 1.0}

    kept: list[dict[str, Any]] = []
    assert not run([Case("first", 1, endless), Case("second", 9, endless)], BENCH, 0.2, keep=kept.append)
    first, second = kept[-1]["cases"].values()
    assert len(first["rows"]) > 1 and "left out" in first["cut_off"]
    assert len(second["rows"]) > len(first["rows"])
    assert not run([Case("first", 1, endless), Case("second", 9, endless)], BENCH, -1, keep=kept.append)
    assert kept[-1]["cases"]["second"] == {"rows": [], "left_out": "no time was left"}


def test_a_result_is_whole_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    common.store("gpu-x", {"a": 1})
    with pytest.raises(TypeError):
        common.store("gpu-x", {"a": object()})
    assert json.loads((tmp_path / "gpu-x.json").read_text()) == {"a": 1}


def test_a_figure_stands_beside_the_bare_calls_and_its_bar() -> None:
    times = {"own forward": [2.0, 4.0], "bare forward": [1.0, 3.0], "own both": [6.0, 8.0], "bare both": [4.0, 6.0]}
    row = compared(
        times, {"forward": 3 * 10**9, "backward": 8 * 10**9}, {"both": Bar(0.7), "forward": Bar(2, "tflops")}
    )
    assert row["forward"] == {
        "ms": 3.0, "tflops": 1.0, "bare_tflops": 1.5, "ratio": 0.625, "bar": "tflops at least 2", "met": False,
    }  # fmt: skip
    assert row["backward"] == {"ms": 4.0, "tflops": 2.0, "bare_tflops": 2.667, "ratio": 0.75}
    assert row["both"]["ratio"] == 0.7083 and row["both"]["met"]
    assert not judged({"part": 0.09}, Bar(0.08, "part", at_most=True))["met"]


@pytest.mark.parametrize("schedule", ["ring", "exchange", "gather"])
def test_bare_calls_have_the_pairs_of_the_rank_and_no_more(schedule: str) -> None:
    rank, world, shard = 2, 4, 64
    cp = BENCH.context(InstantRank(rank, world), shard * world, layout="zigzag", schedule=schedule)
    program = cp.program(cp.masks[0])
    for turns in (program.forward, program.backward):
        pairs = 0
        for tile in BENCH.tiles(turns):
            q, k = torch.zeros(1, tile.nq, 1, 2), torch.zeros(1, tile.nk, 1, 2)
            _, lse = BENCH.bare.forward(q, k, k, tile.window)  # of equal scores: the logarithm of the number of keys
            pairs += tile.batch * tile.heads * round(float(lse.exp().sum()))
        assert pairs == DRY.heads * int(cp.plan.work[rank])


def test_bare_documents_see_their_own_document() -> None:
    q, k, v, dout = BENCH.tensors(24)
    bounds = [0, 5, 24]
    outs = [out for out, _ in BENCH.bare.documents(q, k, v, dout, bounds).forward()]  # type: ignore[attr-defined]
    mask = ringattn.documents(bounds) & ringattn.causal()
    expected = ringattn.testing.dense_attention(q, k, v, mask.dense(24, 24))[0]
    torch.testing.assert_close(torch.cat(outs, 1), expected)


def test_results_are_named_for_what_they_were_made_on() -> None:
    odd = [name for name in results() if not (name.endswith("-cpu.json") or name.startswith("gpu-"))]
    assert not odd, f"{odd}: NAME-cpu.json or gpu-CHIP.json"
