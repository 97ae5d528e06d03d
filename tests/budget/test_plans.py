"""Plans of memory: formulas that are the numbers, what fits and how far, what is refused and how it is said."""

import ast
import json
import re
import time

import pytest
from typer.testing import CliRunner

from ringattn import budget
from ringattn.budget.splits import splits as splits_of
from ringattn.cli.main import app
from tests.support.clock import patience

SMALL = {"gpus": 2, "memory": "24GB", "recompute": "full", "loss_chunks": 256}


@pytest.fixture(scope="module")
def small() -> budget.Plan:
    return budget.plan("qwen3-0.6b", "64K", **SMALL)


def test_every_number_is_its_formula(small: budget.Plan) -> None:
    """What is printed with the values put in is what was added up."""
    for item in small.items:
        numbers = item.formula.split(" = ")[-1].replace(",", "").replace(" x ", " * ")
        value = eval(compile(ast.parse(numbers.replace(" / ", " / "), mode="eval"), "formula", "eval"))
        assert abs(value * item.count - item.bytes) <= item.count * 2**10, item  # quotients are rounded up
    assert sum(item.bytes for item in small.items) == small.peak
    assert re.search(rf"^sum: {small.peak:,}$", small.explain(), re.M)
    assert small.headroom == small.setup.memory - small.peak - small.reserve and small.fits


@pytest.mark.parametrize(
    "change",
    [
        {"recompute": "none"}, {"loss_chunks": 1}, {"gpus": 1}, {"batch": 2}, {"shard": "none"}, {"dtype": "float32"},
    ],
    ids=str,
)  # fmt: skip
def test_what_takes_more_is_seen(small: budget.Plan, change: dict[str, object]) -> None:
    assert budget.plan("qwen3-0.6b", "64K", **SMALL | change).peak > small.peak


@pytest.mark.parametrize(
    "change", [{"offload": True}, {"token_chunks": 8}, {"optimizer": "adamw8bit"}, {"offload_states": "all"}], ids=str
)
def test_what_saves_is_seen(small: budget.Plan, change: dict[str, object]) -> None:
    assert budget.plan("qwen3-0.6b", "64K", **SMALL | change).peak < small.peak


def test_the_longest_fits_and_a_step_more_does_not(small: budget.Plan) -> None:
    assert budget.plan("qwen3-0.6b", small.longest, **SMALL).fits
    assert not budget.plan("qwen3-0.6b", small.longest + 64 * 2048, **SMALL).fits


def test_changes_make_it_fit_the_cheapest_first(small: budget.Plan) -> None:
    over = budget.plan("qwen3-0.6b", small.longest * 2, **SMALL)
    assert not over.fits and over.changes
    for change in over.changes:
        assert budget.plan("qwen3-0.6b", small.longest * 2, **SMALL | change.settings).fits


@pytest.mark.slow
def test_a_thousand_gpus_are_planned() -> None:
    begin = time.monotonic()
    found = budget.plan("llama3-70b", "16M", nodes=128)
    assert found.fits and found.longest > found.setup.seqlen and found.placed.layout == "zigzag"
    assert time.monotonic() - begin < patience(10)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "llama3-9b"], "did you mean 'llama3-8b'"),
        (["--model", "llama3-8b", "--memory", "0GB"], "must be a positive size"),
        (["--model", "llama3-8b", "--ulysses", "3"], "must divide them"),
        (["--model", "llama3-8b", "--data", "3"], "must divide them"),
        (["--model", "llama3-8b", "--shard", "fsdpp"], "did you mean 'fsdp'"),
        (["--model", "llama3-8b", "--mask", "causl()"], "causal"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "memory", "--seqlen", "64K", *arguments])
    assert result.exit_code == 2 and said in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_command_warns_of_positions_and_plans_splits() -> None:
    said = CliRunner().invoke(app, ["plan", "memory", "--model", "qwen3-0.6b", "--seqlen", "64K", "--gpus", "2"])
    assert said.exit_code == 0 and "warning: qwen3-0.6b: 65,536 tokens" in said.output
    splits = CliRunner().invoke(app, ["plan", "split", "--model", "qwen3-0.6b", "--seqlen", "64K", "--gpus", "2"])
    assert splits.exit_code == 0 and "torchrun --nnodes 1 --nproc-per-node 2" in splits.output
    assert "--engine fsdp" in splits.output and "\nseqlen = 65536\n" in splits.output


def test_numbers_are_explained_and_written_as_json() -> None:
    asked = ["plan", "memory", "--model", "qwen3-0.6b", "--seqlen", "16K", "--gpus", "2", "--shard", "zero3"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert sum(item["bytes"] for item in found["items"]) == found["peak"] and found["fits"]
    lines = CliRunner().invoke(app, [*asked, "--explain"]).output
    assert f"sum: {found['peak']:,}" in lines
    assert all(f"{item['name']}: " in lines and f"{item['bytes']:,}" in lines for item in found["items"])
    best = splits_of("qwen3-0.6b", "16K", gpus=2, shard="zero3")[0]
    assert "--engine deepspeed" in best.command
