"""Plans of memory: formulas that are the numbers, what fits and how far, what is refused and how it is said."""

import json
import re
import time
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import ceil

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


ODD = {"gpus": 3, "ulysses": 3, "loss_chunks": 7, "token_chunks": 5, "batch": 3}


@pytest.mark.parametrize("settings", [SMALL, ODD], ids=["even", "odd"])
def test_every_number_is_its_formula(settings: dict[str, object]) -> None:
    """What is printed with the values put in is what was added up."""
    found = budget.plan("qwen3-0.6b", "64K", **settings)
    for item in found.items:
        numbers = item.formula.split(" = ")[-1].replace(",", "").replace(" x ", " * ")
        exact = re.sub(r"\b(\d+)\b", r"Fraction(\1)", numbers)
        assert eval(exact, {"Fraction": Fraction, "ceil": ceil}) * item.count == item.bytes, item
    assert sum(item.bytes for item in found.items) == found.peak
    assert re.search(rf"^sum: {found.peak:,}$", found.explain(), re.M)
    assert found.headroom == found.setup.memory - found.peak - found.reserve


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


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        (("4K", "64K"), {}),
        (("16K", "128K"), {"memory": "40GB"}),
        (("4K", "1M"), {"mask": "causal() & sliding_window(2000)"}),
        (("8K",), {"gpus": 1, "memory": "12GB"}),
    ],
    ids=str,
)
def test_the_longest_fits_and_a_step_more_does_not(lengths: Sequence[str], settings: dict[str, object]) -> None:
    """Wherever the search begins: layout and buffers are others at other lengths."""
    plans = [budget.plan("llama3-8b", length, **settings) for length in lengths]
    (longest,) = {found.longest for found in plans}
    step = 1024 * plans[0].setup.context
    assert not longest or budget.plan("llama3-8b", longest, **settings).fits
    assert not budget.plan("llama3-8b", longest + step, **settings).fits


def test_a_mask_with_a_length_of_its_own_has_no_longer_one() -> None:
    documents = {"mask": "causal() & documents([0, 4096, 8192])"}
    assert budget.plan("llama3-8b", "8K", **documents).longest == 8192
    assert budget.plan("llama3-8b", "8K", **documents, memory="8GB").longest == 0


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
        (["--model", ""], "model='' is unknown"),
        (["--model", "llama3-8b", "--loss-chunks", "0"], "must be a positive whole number"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["plan", "memory", "--seqlen", "64K", *arguments])
    assert result.exit_code == 2 and said in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1


def test_splits_refuse_what_they_cannot_show() -> None:
    asked = ["plan", "split", "--model", "qwen3-0.6b", "--seqlen", "64K", "--show", "0"]
    result = CliRunner().invoke(app, asked)
    assert result.exit_code == 2 and result.output == "error: --show=0: must be at least 1\n"


def test_the_command_warns_of_positions_and_plans_splits() -> None:
    said = CliRunner().invoke(app, ["plan", "memory", "--model", "qwen3-0.6b", "--seqlen", "64K", "--gpus", "2"])
    assert said.exit_code == 0 and "warning: qwen3-0.6b: 65,536 tokens" in said.output
    splits = CliRunner().invoke(app, ["plan", "split", "--model", "qwen3-0.6b", "--seqlen", "64K", "--gpus", "2"])
    assert splits.exit_code == 0 and "torchrun --nnodes 1 --nproc-per-node 2" in splits.output
    assert '\nengine = "fsdp"\n' in splits.output and "\nseqlen = 65536\n" in splits.output


def test_numbers_are_explained_and_written_as_json() -> None:
    asked = ["plan", "memory", "--model", "qwen3-0.6b", "--seqlen", "16K", "--gpus", "2", "--shard", "zero3"]
    found = json.loads(CliRunner().invoke(app, [*asked, "--json"]).output)
    assert sum(item["bytes"] for item in found["items"]) == found["peak"] and found["fits"]
    lines = CliRunner().invoke(app, [*asked, "--explain"]).output
    assert f"sum: {found['peak']:,}" in lines
    assert all(f"{item['name']}: " in lines and f"{item['bytes']:,}" in lines for item in found["items"])
    best = splits_of("qwen3-0.6b", "16K", gpus=2, shard="zero3")[0]
    assert 'engine = "deepspeed"' in best.settings and "[deepspeed]\nstage = 3" in best.settings


def test_the_optimizers_step_can_be_the_peak() -> None:
    """A short sequence of a wide model: AdamW's list of roots, and Newton-Schulz of the largest matrix, which is the
    MLP's, 12,288 x 4,096."""
    tiny = {"gpus": 2, "memory": "141GB", "loss_chunks": 64}
    fused, roots = (budget.plan("qwen3-8b", "2K", optimizer=name, **tiny) for name in ("adamw", "adamw_foreach"))
    held = roots.setup.model.parameters * 4 // 2
    temporaries = {item.name: item.bytes for item in roots.items if item.kind == "optimizer's temporaries"}
    assert roots.moment == "optimizer's step" and temporaries == {"roots of second moments": held}
    assert fused.peak < roots.peak and all(item.kind != "optimizer's temporaries" for item in fused.items)
    muon = budget.plan("qwen3-8b", "2K", optimizer="muon", **tiny).step.moments[-1]
    matrix, square = 12288 * 4096, 4096 * 4096
    found = sum(x.size.value for x, _ in muon.alive if x.kind == "optimizer's temporaries")
    assert found == 2 * (2 * matrix + 2 * square) + 2 * 4 * matrix


def test_the_reserve_is_assumed_unless_it_is_given(small: budget.Plan) -> None:
    assert "reserve (assumed): context and NCCL + memory / 25" in small.explain() and "reserve (assumed)" in str(small)
    given = budget.plan("qwen3-0.6b", "64K", reserve="3GB", **SMALL)
    assert given.reserve == 3 * 10**9 and "reserve: reserve = 3,000,000,000" in given.explain()
    assert "assumed" not in str(given) + given.explain()
    asked = ["plan", "memory", "--model", "qwen3-0.6b", "--seqlen", "64K", "--gpus", "2", "--explain"]
    assert "reserve (assumed)" in CliRunner().invoke(app, asked).output
    assert "reserve: reserve = 1,000 " in CliRunner().invoke(app, [*asked, "--reserve", "1KB"]).output


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mask": 5}, "must be text"), ({"device": None}, "choose from H100"), ({"device": "H1000"}, "'H100'"),
        ({"offload": "yes"}, "True or False"), ({"reserve": -1}, "a size such as"), ({"gpu": 8}, "'gpus'"),
        ({"loss_chunks": 10**9}, "at most as many"), ({"token_chunks": 10**6}, "at most as many"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings_name_value_and_rule(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}.*{said}"):
        budget.plan("qwen3-0.6b", "64K", **settings)


def test_zero_takes_what_its_source_says() -> None:
    """Beside the same layers: a bucket while gradients are made; from stage 2 on no gradient outside of it; with stage
    3 all parameters of above 100,000 numbers, and before the last is there the message in which they come."""
    none = budget.plan("qwen3-0.6b", "4K", gpus=2, shard="none", dtype="float32", loss_chunks=64).step
    numbers = none.model.parameters
    one, two, three = (replace(none, zero=(stage, 2, 500_000_000)) for stage in (1, 2, 3))
    ends = [{m.name: m.bytes for m in step.moments}["embedding, backward"] for step in (none, one, two, three)]
    parted = sum(x.size.value // 4 for x in three.weights if x.size.value > 400_000)
    assert sum(x.size.value for x in one.weights) == 4 * numbers and parted < numbers
    assert ends[1] - ends[0] == 4 * 500_000_000
    full = 4 * 500_000_000 + 2 * numbers  # the bucket's copy while it is summed, and the own part of what was
    assert ends[1] - ends[2] == 4 * numbers - full
    coming = [m for m in three.moments if m.name == "layer 3, forward"]
    names = {x.name: x.size.value for x, _ in coming[0].alive if x.kind == "parameters gathered"}
    assert names == {"message of parameters": 4 * 50_000_000, "parameters of all layers": 4 * parted}
    assert ends[2] - ends[3] == 4 * 500_000_000 + 2 * numbers - 4 * parted
