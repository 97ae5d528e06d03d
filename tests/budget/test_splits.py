"""What `ringattn plan` says can be done: commands and configs that the job takes, of the memory that it plans."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import ringattn as ra
from launch.budget import step_of
from launch.config import Config, load
from ringattn import budget
from ringattn.budget.models import file_of
from ringattn.budget.splits import Split, splits
from ringattn.cli.main import app
from ringattn.comm.planning_rank import PlanningRank
from ringattn.planning.hardware import memory_of

ASKED = ["--model", "qwen3-0.6b", "--seqlen", "64K", "--gpus", "2"]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    return result.output


# bytes a parameter that lie on a rank of the job all the time: whole, and in parts over all ranks
LIE = {"none": (16, 0), "fsdp": (0, 12), "zero1": (4, 12), "zero2": (4, 12)}
ENGINES = {"none": ("ddp", None), "fsdp": ("fsdp", None), "zero1": ("deepspeed", 1), "zero2": ("deepspeed", 2)}


def own_plan(split: Split, config: Config) -> int:
    """Bytes that the job itself plans for a split, by its config, with what lies there all the time, and the positions,
    which it does not count."""
    attention, world = split.setup.model.layers[0].attention, split.setup.world
    shape = ra.Shape(attention.num_heads, attention.num_kv_heads, attention.head_dim, dtype=config.dtype)
    rank = PlanningRank(0, world // config.data_parallel, device="NVIDIA H100")
    how: Any = {"layout": config.layout, "schedule": config.schedule, "ulysses": config.ulysses}
    cp = ra.ContextParallel(rank, config.seqlen, shape=shape, **how)
    language: Any = None  # asked for the decoder's vocabulary alone
    whole, parts = LIE[split.setup.shard]
    lying = split.setup.model.parameters * (whole + parts / world) + 8 * cp.local_seqlen
    return step_of(config, language, cp, world).peak.bytes + int(lying)


@pytest.mark.parametrize(("shard", "gpus"), [("none", 2), ("fsdp", 2), ("fsdp", 1), ("zero1", 2), ("zero2", 2)])
def test_configs_are_taken_by_the_job_which_plans_the_same_memory(shard: str, gpus: int, tmp_path: Path) -> None:
    found = splits("qwen3-0.6b", "16K", gpus=gpus, shard=shard)
    assert {split.recompute for split in found} == {"none", "attention"} and {split.batch for split in found} == {1}
    for way in ("none", False), ("attention", False), ("attention", True):
        split = next(s for s in found if (s.recompute, s.offload, s.ulysses, s.data) == (*way, 1, 1))
        (tmp_path / "config.toml").write_text(split.settings)
        config = load(tmp_path / "config.toml")
        assert config.device == "cuda" and config.hf == str(file_of("qwen3-0.6b"))
        assert (config.engine, config.deepspeed and config.deepspeed.stage) == ENGINES[shard]
        assert abs(own_plan(split, config) - split.memory) < 1 << 10, way  # parts are rounded up


def test_zero_3_has_its_stage(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(splits("qwen3-0.6b", "16K", gpus=2, shard="zero3")[0].settings)
    config = load(tmp_path / "config.toml")
    assert config.deepspeed is not None and config.deepspeed.stage == 3


def test_what_the_job_does_not_do_is_refused_for_it() -> None:
    for arguments in ("--token-chunks", "16"), ("--mask", "full()"), ("--optimizer", "muon"):
        said = run("split", *ASKED, *arguments, code=2)
        assert f"{arguments[0][2:].replace('-', '_')}=" in said and "launch.pretrain" in said and "--own-loop" in said


def test_loops_of_ones_own_get_calls_that_plan_the_row() -> None:
    found = splits("qwen3-0.6b", "16K", gpus=2, own_loop=True, token_chunks=4, mask="sliding_window(99) & causal()")
    assert {split.batch for split in found} == {1, 2, 4} and "full" in {split.recompute for split in found}
    for split in found[:2]:
        assert not split.command and not split.settings
        names: dict[str, Any] = {"budget": budget, "ringattn": ra}
        plan, mesh, context = split.call.splitlines()
        exec(plan, names)
        assert names["plan"].peak == split.memory and f"data={split.data}" in mesh
        assert "mask=[(ringattn.sliding_window(99, 0) & ringattn.causal())]" in context
    assert "not with launch.pretrain" in run("split", *ASKED, "--own-loop")


def test_no_value_is_cut_and_both_commands_say_the_same() -> None:
    said, best = run("split", *ASKED), splits("qwen3-0.6b", "64K", gpus=2)[0]
    assert "…" not in said and all(value in said for value in best.row())
    assert "2 x H100 of 80.00 GB" in said and "estimates" in said.splitlines()[0]
    assert max(map(len, said.split("the first")[0].splitlines()[1:])) <= 80
    planned = next(line for line in said.splitlines() if line.startswith("planned as"))
    table = run(*planned.removeprefix("planned as ringattn plan ").split())
    assert f"{best.memory / 1e9:,.2f} GB" in table and "H100 of 80.00 GB" in table


def test_free_changes_together_come_before_dearer_ones_alone() -> None:
    over = budget.plan("llama3-8b", "1M", loss_chunks=8)
    assert [change.settings for change in over.changes] == [
        {"loss_chunks": 64, "token_chunks": 16}, {"offload": True}, {"nodes": 2},
    ]  # fmt: skip
    for change in over.changes:
        assert budget.plan("llama3-8b", "1M", **{"loss_chunks": 8} | change.settings).peak == change.peak
    said = run("memory", "--model", "llama3-8b", "--seqlen", "1M", "--loss-chunks", "8", code=1)
    assert "\n    --loss-chunks 64 --token-chunks 16: " in said and "\n    --offload: " in said


def test_memory_is_the_devices_own() -> None:
    sizes = {"H100": 80, "H200": 141, "B200": 180, "NVIDIA A100-SXM4-40GB": 40, "A100": 80, "NVIDIA H100 80GB HBM3": 80}
    assert {name: memory_of(name) // 10**9 for name in sizes} == sizes
    assert "2 x B200 of 180.00 GB" in run("memory", *ASKED, "--device", "B200")
    assert budget.plan("qwen3-0.6b", "64K", device="H200").setup.memory == 141 * 10**9
    for name in "memory", "reserve":
        said = run("memory", *ASKED, f"--{name}", "80", code=2)
        assert said.startswith(f"error: {name}='80'") and '"80GB"' in said
