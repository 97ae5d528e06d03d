"""What a run leaves behind for those who watch it: scalars for TensorBoard, traces of given steps."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import ringattn
from launch.config import Config
from launch.pretrain import app
from launch.run import prepare, start
from ringattn.testing import run_processes
from tests.support.pretrain import NOWHERE, config_file, records_of, refusal, run_until, tiny, world_of


def test_tensorboard_shows_what_the_metrics_hold_once(text: Path, tmp_path: Path) -> None:
    """Also the steps that a run does again, whose newest checkpoint was lost."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, config = tmp_path / "run", tiny(text, tensorboard=True, save_every=2)
    run_until(0, 1, config, run, False, 2)
    newest = run / "checkpoint" / "step-00000003"
    newest.rename(newest.with_name("lost"))
    run_until(0, 1, config, run, True, -1)
    found, records = EventAccumulator(str(run / "tensorboard")).Reload(), records_of(run)
    names = {name for name, value in records[0].items() if value is not None and name not in ("step", "start")}
    assert set(found.Tags()["scalars"]) == names | {"tokens_per_s"}
    for name in names:
        shown = found.Scalars(name)
        assert [one.step for one in shown] == list(range(1, 7))
        assert [one.value for one in shown] == pytest.approx([record[name] for record in records], rel=1e-6)


def test_tensorboard_without_its_package_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refusal("--config", config_file(tmp_path, "tensorboard = false", "tensorboard = true"))
    assert "tensorboard is set" in said and "pip install" in said


def trace(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["traceEvents"]


def traced(rank: int, world_size: int, config: Config, run: Path) -> None:
    run_until(rank, world_size, config, run, False, -1)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_steps_that_are_asked_for_leave_traces_of_every_rank(ranks: int, text: Path, tmp_path: Path) -> None:
    run, config = tmp_path / "run", tiny(text, steps=3, profile=(2, 2))
    run_processes(traced, ranks, config, run) if ranks > 1 else traced(0, 1, config, run)
    names = {f"step-2{kind}.rank{rank}.json" for kind in ("", "-attention") for rank in range(ranks)}
    assert {path.name for path in (run / "profile").iterdir()} == names
    for rank in range(ranks):
        calls = [e["name"] for e in trace(run / "profile" / f"step-2-attention.rank{rank}.json") if e["ph"] == "X"]
        assert calls.count("attention forward") == calls.count("attention backward") == 2  # layers
        operators = {event.get("name") for event in trace(run / "profile" / f"step-2.rank{rank}.json")}
        assert {"aten::mm", "Optimizer.step#AdamW.step"} <= operators


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("[3]", "profile is (3,); it must be two whole numbers"),
        ("[3, 2]", "profile is (3, 2); it must be two whole numbers"),
        ("[7, 9]", "profile is [7, 9] in 6 steps; set earlier ones, for instance [6, 6]"),
    ],
)
def test_steps_that_cannot_be_traced_are_refused(profile: str, said: str, tmp_path: Path) -> None:
    assert said in refusal("--config", config_file(tmp_path, "seed = 0", f"seed = 0\nprofile = {profile}"))


def test_the_command_s_options_are_settings(tmp_path: Path) -> None:
    file = config_file(tmp_path, "steps = 6", "steps = 5")
    assert "profile is [9, 12] in 5 steps" in refusal("--config", file, "--profile", 9, 12)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_prints_the_help(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0 and ("--resume" in result.output) == (rank == 0) == bool(result.output)


def stepped(rank: int, world_size: int, config: Config) -> tuple[float, list[float]]:
    """The largest logit that a step finds, and by hand those that this rank's layers compute on one process."""
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    world = world_of(rank, world_size)
    trainer, found = start(job, world), []

    def look(layer: Any, inputs: Any, qkv: Any) -> None:
        q, k = (x.detach() for x in qkv[:2])
        pairs = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(q.shape[2] // k.shape[2], dim=2))
        mask = trainer.language.masks[layer.index] & ringattn.documents(job.samples(world)[0].cu_seqlens)
        seen = mask.dense(config.seqlen, config.seqlen)
        found.append(float((pairs * q.shape[-1] ** -0.5)[..., seen].max()))

    if world_size == 1:
        for layer in trainer.model.layers:
            project = layer.project
            layer.project = lambda *inputs, layer=layer, project=project: project_and(look, layer, project, inputs)
    largest = trainer.step(job.samples(world), 1e-3, False, logits=True).max_logit
    job.locks.close()
    return largest, found


def project_and(look: Any, layer: Any, project: Any, inputs: Any) -> Any:
    qkv = project(*inputs)
    look(layer, inputs, qkv)
    return qkv


def test_the_largest_logit_is_that_of_all_layers_heads_and_ranks(text: Path) -> None:
    config = tiny(text)
    single, by_hand = stepped(0, 1, config)
    assert single == pytest.approx(max(by_hand), rel=2**-23)  # rounded to fp32
    assert len(by_hand) == 2 and by_hand[0] != by_hand[1]


@pytest.mark.slow
def test_ranks_agree_on_the_largest_logit(text: Path) -> None:
    single, _ = stepped(0, 1, tiny(text))
    for changes in ({}, {"recompute": True, "engine": "fsdp"}):
        for found, _ in run_processes(stepped, 3, tiny(text, **changes)):
            assert found == pytest.approx(single, rel=2**-23)


def test_the_largest_logit_is_in_the_metrics_of_the_steps_that_look_for_it(text: Path, tmp_path: Path) -> None:
    looking, blind = tmp_path / "looking", tmp_path / "blind"
    run_until(0, 1, tiny(text, steps=4, max_logit=3, recompute=True), looking, False, -1)
    run_until(0, 1, tiny(text, steps=4), blind, False, -1)
    assert [record["max_logit"] is not None for record in records_of(looking)] == [True, False, False, True]
    assert [record["loss"] for record in records_of(looking)] == [record["loss"] for record in records_of(blind)]
    run_until(0, 1, tiny(text, steps=5, max_logit=3), looking, True, -1)  # its metrics are read again
