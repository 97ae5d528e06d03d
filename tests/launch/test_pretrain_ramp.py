"""Runs whose sequences grow: each token is read once, and a run that is stopped goes on with other lengths, other
replicas, another engine and another number of processes as if nothing had happened."""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from launch.config import CONFIGS, Config, RecallConfig, StageConfig, load
from launch.processes import World
from launch.run import prepare, start
from launch.tables import dump
from ringattn.testing import run_processes
from tests.support.pretrain import TINY, config_file, records_of, refusal, run_until, tiny

RAMP = (StageConfig(steps=2, seqlen=96, accumulate=4), StageConfig(steps=3, seqlen=150))


def ramped(text: Path, **changes: Any) -> Config:
    """Four sequences of 96 tokens, two of 150, two of 257."""
    return tiny(text, accumulate=2, steps=8, ramp=RAMP, **changes)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records_of(run)]


def rounding(text: Path, alone: Sequence[float], folder: Path) -> float:
    """By how much two runs may differ that add up the same terms in other orders: as a run in fp32 differs from the
    same in fp64, in units of the dtype; with a factor, since the sums of several ranks are longer."""
    single = folder / "fp32"
    run_until(0, 1, ramped(text, dtype="float32"), single, False, -1)
    worst = max(abs(a - b) / b for a, b in zip(losses(single), alone, strict=True))
    return 64 * worst * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps


def test_each_token_is_read_once_at_any_length(text: Path, tmp_path: Path) -> None:
    config, run = ramped(text), tmp_path / "run"
    assert run_until(0, 1, config, run, False, -1)
    records = records_of(run)
    assert [record["seqlen"] for record in records] == [96] * 2 + [150] * 3 + [257] * 3
    sizes = [4 * 96] * 2 + [2 * 150] * 3 + [2 * 257] * 3
    assert [record["tokens"] for record in records] == sizes
    assert [record["position"] for record in records] == np.cumsum([0, *sizes[:-1]]).tolist()
    assert config.tokens() == sum(sizes) and config.tokens(first=4) == sum(sizes[4:])
    assert dataclasses.replace(config, steps=4).tokens(first=1) == sum(sizes[1:4])
    job = prepare(config, tmp_path / "other", go_on=False, overwrite=False)
    stream, read = job.task.text, []
    for _ in range(config.steps):
        read += [sample.tokens[0] for sample in job.samples(World())]
        tokens = sum(map(len, read))
        job.settle(step=job.progress["step"] + 1, position=tokens)
    assert np.array_equal(np.concatenate(read), stream.read(0, sum(sizes))[0])


def test_a_ramp_stopped_anywhere_goes_on_to_the_last_bit(text: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_until(0, 1, ramped(text), whole, False, -1)
    for stop, resume in ((1, False), (3, True), (-1, True)):  # between two stages, and within one
        run_until(0, 1, ramped(text), parts, resume, stop)
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_a_ramp_goes_on_over_other_processes_engines_and_replicas(text: Path, tmp_path: Path) -> None:
    """2 ranks, then 4 with four replicas, one and two, then 3; each leaves off within a stage."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    config = ramped(text)
    run_until(0, 1, config, whole, False, -1)
    alone = losses(whole)
    first = dataclasses.replace(config, layout="zigzag")
    run_processes(run_until, 2, first, parts, False, 1)
    # in one run from four replicas to one, and to two
    dealt = (StageConfig(2, 96, data_parallel=4, accumulate=1), StageConfig(3, 150, data_parallel=1))
    second = dataclasses.replace(config, engine="fsdp", ramp=dealt, data_parallel=2)
    second = dataclasses.replace(second, ramp=(dealt[0], dataclasses.replace(dealt[1], accumulate=2)), accumulate=1)
    run_processes(run_until, 4, second, parts, True, 5)
    run_processes(run_until, 3, dataclasses.replace(config, layout="contiguous"), parts, True, -1)
    for name in ("seqlen", "tokens", "position"):
        assert [r[name] for r in records_of(parts)] == [r[name] for r in records_of(whole)], name
    found, bound = losses(parts), rounding(text, alone, tmp_path)
    worst = max(abs(a - b) / b for a, b in zip(found, alone, strict=True))
    assert worst < bound < 1e-9


def test_lengths_may_change_at_a_resume_and_the_text_may_not(text: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    config = tiny(text, steps=2)
    run_until(0, 1, config, run, False, -1)
    longer = dataclasses.replace(config, steps=3, seqlen=500)
    job = prepare(longer, run, go_on=True, overwrite=False)
    capsys.readouterr()
    start(job, World())
    assert capsys.readouterr().out.splitlines() == [
        "from here on: seqlen = 500, not 257",
        "from here on: steps = 3, not 2",
    ]
    assert job.samples(World())[0].tokens.shape == (1, 500) and job.progress["position"] == 2 * 257
    job.locks.close()
    recalls = dataclasses.replace(TINY, documents=False, layout="contiguous", recall=RecallConfig(), steps=2)
    run_until(0, 1, recalls, tmp_path / "recall", False, -1)
    path = config_file(tmp_path, "seqlen = 257", "seqlen = 300", dataclasses.replace(recalls, steps=4))
    assert "made with seqlen = 257, not 300" in refusal("--config", path, "--resume", tmp_path / "recall")


def test_a_ramp_survives_writing(text: Path, tmp_path: Path) -> None:
    config = ramped(text)
    (tmp_path / "copy.toml").write_text(dump(config))
    assert load(tmp_path / "copy.toml") == config


def test_what_the_page_of_the_job_says_to_add_to_a_config(tmp_path: Path) -> None:
    (added,) = re.findall(
        r"```toml\n(.*?)```", (CONFIGS.parents[1] / "docs" / "pretraining.md").read_text(), flags=re.DOTALL
    )
    assert len([line for line in added.splitlines() if line]) <= 10
    base = (CONFIGS / "cpu-128k.toml").read_text()
    top, ramp = added.split("\n\n", 1)
    (tmp_path / "added.toml").write_text(f'{top}\n{base}schedule = "wsd"\n{ramp}')
    config = load(tmp_path / "added.toml")
    assert [stage.seqlen for _, stage in config.stages()] == [8192, 32768, 131072]
    assert config.at(99).data_parallel == 2 and config.at(100).data_parallel == 1
    assert config.tensorboard and config.watches_logits(20) and config.traces(4) and not config.traces(5)
    assert dataclasses.replace(config, profile=(0, 0)).traces(0)  # as configs of an earlier version said it


@pytest.mark.parametrize(
    ("ramp", "said"),
    [
        ("steps = 2\nseqlen = 300", "ramp[0].seqlen is 300 and seqlen 257, which is the longest"),
        ("steps = 0\nseqlen = 30", "steps is 0; it must be a whole number from 1"),
        ("steps = 2\nseqlen = 4", "ramp[0]: loss_chunks is 8 for 4 tokens"),
        ("steps = 2\nseqlen = 30\naccumulate = 0", "ramp[0]: accumulate is 0"),
        ("steps = 2", "missing key ramp[0].seqlen"),
        ("steps = 2\nseqlen = 30\nlength = 3", "unknown key ramp[0].length"),
    ],
)
def test_ramps_that_are_refused(ramp: str, said: str, tmp_path: Path) -> None:
    assert said in refusal("--config", config_file(tmp_path, "[model]", f"[[ramp]]\n{ramp}\n\n[model]"))


def test_a_ramp_and_recall_are_refused_together() -> None:
    with pytest.raises(ValueError, match=r"leave out \[\[ramp\]\]"):
        dataclasses.replace(TINY, documents=False, layout="contiguous", recall=RecallConfig(), ramp=RAMP)


def test_the_ranks_of_every_stage_to_come_are_counted_at_the_start(text: Path, tmp_path: Path) -> None:
    config = tiny(text, ramp=(StageConfig(1, 100), StageConfig(1, 200, data_parallel=2)))
    with pytest.raises(ValueError, match="data_parallel is 2 over 1 ranks"):
        start(prepare(config, tmp_path / "run", go_on=False, overwrite=False), World())
    assert len(config.since(2)) == 1 and math.isfinite(config.at(10**9).seqlen)
