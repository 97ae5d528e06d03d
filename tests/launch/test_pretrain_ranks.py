"""The main job over data x context ranks: either engine, accumulation, Transformers models, document lengths, and
recall, which nothing but the ring can answer."""

import dataclasses
import itertools
import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import Phi3Config

from launch.config import LengthsConfig, ModelConfig, OptimizerConfig, RecallConfig
from launch.data import open_text
from launch.processes import World
from launch.recall import recall
from launch.run import prepare, start
from launch.tasks import RecallTask
from launch.verify import verify
from ringattn.loss import IGNORED
from ringattn.testing import run_processes
from tests.support.grids import mostly_slow
from tests.support.hf_models import SIZES, hf_file
from tests.support.pretrain import (
    NOWHERE,
    TINY,
    config_file,
    largest_difference,
    records_of,
    refusal,
    run_until,
    tiny,
    world_of,
)


def two_steps(rank: int, world_size: int, config: Any, gradients_of: int) -> tuple[list[float], dict[str, np.ndarray]]:
    """The losses of two steps, and the gradients of one of them."""
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    world = world_of(rank, world_size)
    trainer = start(job, world)
    apart = world_size > 1 and config.engine == "fsdp"
    assert all(isinstance(parameter, DTensor) == apart for parameter in trainer.model.parameters())
    assert getattr(trainer.model, "is_activation_checkpointing", config.recompute) == config.recompute
    losses, gradients = [], {}
    for step in range(2):
        found = trainer.step(job.samples(world), 1e-3, False)
        losses.append(found.loss)
        if step == gradients_of:
            gradients = {name: whole.numpy().copy() for name, whole in trainer.engine.gradients().items()}
        job.move(world, found)
    return losses, gradients


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize(("data", "context"), [(2, 1), (2, 2), (1, 3)])
def test_any_mesh_and_engine_trains_as_one_process(engine: str, data: int, context: int, text: Path) -> None:
    """Four sequences a step, however they are dealt; gradients after clipping, in the second step."""
    alone = tiny(text, accumulate=4, lengths=LengthsConfig(median=30))
    losses, gradients = two_steps(0, 1, alone, 1)
    assert losses[0] != losses[1]
    config = dataclasses.replace(alone, accumulate=4 // data, data_parallel=data, engine=engine, loss_chunks=3)
    for found, found_gradients in run_processes(two_steps, data * context, config, 1):
        assert found == pytest.approx(losses, rel=1e-12)
        assert largest_difference(found_gradients, gradients) < 1e-9  # AdamW divides by small numbers


FAMILIES = list(itertools.product(("llama", "gemma2", "gpt-oss", "deepseek-v3"), ("ddp", "fsdp")))


@pytest.mark.parametrize("model", mostly_slow(FAMILIES, [FAMILIES[at] for at in (0, 3, 5, 6)]), ids="-".join)
def test_transformers_models_train_as_one_process(model: tuple[str, str], text: Path, tmp_path: Path) -> None:
    family, engine = model
    changes = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    file = hf_file(family, tmp_path, **changes)
    alone = tiny(text, model=None, masks=(), hf=file, accumulate=2, recompute=True)
    losses, gradients = two_steps(0, 1, alone, 0)
    for found, found_gradients in run_processes(two_steps, 2, dataclasses.replace(alone, engine=engine), 0):
        assert found == pytest.approx(losses, rel=2e-6)  # Transformers' softmax and norms are in fp32
        still = {name for name, gradient in gradients.items() if not gradient.any()}  # a router that has no choice
        assert not any(found_gradients[name].any() for name in still)
        moving = [{n: g for n, g in of.items() if n not in still} for of in (found_gradients, gradients)]
        assert largest_difference(*moving) < 2e-5


def verified(rank: int, world_size: int, config: Any) -> tuple[bool, str]:
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    comparison = verify(job, start(job, world_of(rank, world_size)))
    return comparison.passed, str(comparison)


def test_verify_compares_sharded_parameters(text: Path, tmp_path: Path) -> None:
    config = tiny(text, model=None, masks=(), hf=hf_file("gemma3", tmp_path), engine="fsdp", data_parallel=2)
    config = dataclasses.replace(config, dtype="float32", accumulate=2)
    for passed, said in run_processes(verified, 4, config):
        assert passed and "over 2 ranks" in said, said
    for passed, said in run_processes(verified, 2, config):  # a rank a sequence
        assert passed and "replicated and single-rank step are equal" in said, said
        assert "no attention was sharded, so none was compared" in said


def test_a_run_goes_on_over_another_mesh_and_engine(text: Path, tmp_path: Path) -> None:
    whole_run, parts = tmp_path / "whole", tmp_path / "parts"
    config = tiny(text, accumulate=2)
    assert run_until(0, 1, config, whole_run, False, -1)
    over = dataclasses.replace(config, accumulate=1, data_parallel=2, engine="fsdp")
    assert run_processes(run_until, 4, over, parts, False, 2) == [False] * 4
    assert run_processes(run_until, 2, dataclasses.replace(config, engine="fsdp"), parts, True, 4) == [False] * 2
    assert run_until(0, 1, config, parts, True, -1)
    expected, found = records_of(whole_run), records_of(parts)
    for name in ("loss", "grad_norm", "lr", "position", "tokens"):
        assert [r[name] for r in found] == pytest.approx([r[name] for r in expected], rel=1e-9), name
    assert {record["tokens"] for record in found} == {2 * TINY.seqlen}  # once, and not once a rank


def test_a_run_keeps_its_model(text: Path, tmp_path: Path) -> None:
    file = hf_file("llama", tmp_path)
    config = tiny(text, model=None, masks=(), hf=file)
    run_until(0, 1, config, tmp_path / "run", False, 1)
    hf_file("llama", tmp_path, rms_norm_eps=0.5)
    assert "has changed since" in refusal("--resume", tmp_path / "run")


def test_a_model_with_tied_embeddings_goes_on(text: Path, tmp_path: Path) -> None:
    file = hf_file("llama", tmp_path, tie_word_embeddings=True)
    config = tiny(text, model=None, masks=(), hf=file, steps=4)
    assert run_until(0, 1, config, tmp_path / "whole", False, -1)
    sharded = dataclasses.replace(config, engine="fsdp")
    assert run_processes(run_until, 2, sharded, tmp_path / "parts", False, 2) == [False] * 2
    assert run_until(0, 1, config, tmp_path / "parts", True, -1)
    expected, found = records_of(tmp_path / "whole"), records_of(tmp_path / "parts")
    assert [r["loss"] for r in found] == pytest.approx([r["loss"] for r in expected], rel=2e-6)


def test_verify_takes_a_router_without_a_choice(text: Path, tmp_path: Path) -> None:
    """Its gradient is zero but for rounding."""
    config = tiny(text, model=None, masks=(), hf=hf_file("gpt-oss", tmp_path), dtype="float32")
    for passed, said in run_processes(verified, 2, config):
        assert passed, said


# -- document lengths -------------------------------------------------------------------------------


def test_documents_have_the_lengths_asked_for(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes(2_000_000))
    lengths = LengthsConfig(median=500, sigma=0.8)
    data = open_text([str(tmp_path / "text")], 4096, 0, lengths)
    sample = data.sample(0, 1_000_000)
    found = np.diff(sample.cu_seqlens)
    assert np.median(found) == pytest.approx(500, rel=0.05)
    assert np.log(found).std() == pytest.approx(0.8, rel=0.05)
    again, later = (data.sample(position, 1_000_000).cu_seqlens for position in (0, 1_000_000))
    assert again == sample.cu_seqlens != later
    assert (sample.labels[0, np.array(sample.cu_seqlens[1:]) - 1] == IGNORED).all()


def test_lengths_keep_documents_apart(text: Path) -> None:
    """A change in one document moves nothing in the next."""
    config = tiny(text, documents=False, lengths=LengthsConfig(median=40))
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    trainer = start(job, World())
    sample = job.samples(World())[0]
    edge = sample.cu_seqlens[1]
    changed = sample.tokens.copy()
    changed[0, :edge] = 1
    outputs = []
    for tokens in (sample.tokens, changed):
        (inputs,) = trainer._inputs([dataclasses.replace(sample, tokens=tokens)])
        outputs.append(job.language.hidden(inputs))
    torch.testing.assert_close(outputs[0][:, edge:], outputs[1][:, edge:], rtol=0, atol=1e-13)
    assert (outputs[0][:, :edge] != outputs[1][:, :edge]).any()


# -- recall -----------------------------------------------------------------------------------------

RECALL = dataclasses.replace(
    TINY,
    name="recall",
    masks=("sliding_window(1)", "causal()"),
    documents=False,
    layout="contiguous",
    dtype="float32",
    seqlen=64,
    steps=2000,
    recall=RecallConfig(pairs=2, keys=4, values=4, tokens=512, enough=0.97),
    model=ModelConfig(d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, rope_base=1e12),
    optimizer=OptimizerConfig(lr=5e-3, warmup=10, final_lr=1.0, weight_decay=0.01),
)


def test_questions_are_at_the_end_and_answers_at_the_beginning() -> None:
    task = RecallTask(RecallConfig(pairs=3, keys=5, values=7, tokens=80), 40, seed=0)
    sample = task.sample(11, 40)
    assert sample.tokens.shape == (2, 40) and task.sample(11, 100).tokens.shape == (1, 100)
    assert (sample.tokens == task.sample(11, 40).tokens).all() and (sample.tokens != task.sample(12, 40).tokens).any()
    for tokens, labels in zip(sample.tokens, sample.labels, strict=True):
        told = dict(zip(tokens[0:6:2], tokens[1:6:2], strict=True))
        assert len(told) == 3 and set(told) <= set(range(1, 6)) and set(told.values()) <= set(range(6, 13))
        assert not tokens[6:34].any()
        asked = np.flatnonzero(labels != IGNORED)
        assert asked.tolist() == [34, 36, 38]
        assert [told[key] for key in tokens[asked]] == labels[asked].tolist() == tokens[asked + 1].tolist()


def test_sequences_grow_once_answers_are_right() -> None:
    task = RecallTask(RecallConfig(pairs=2), 20, seed=0)
    progress = {"length": task.length(0, task.seqlen), "accuracy": 0.0}
    lengths = []
    for _ in range(3):
        task.learn(progress, 0.9, 1000)
        assert not task.learnt(progress)
        lengths.append(progress["length"])
        task.learn(progress, 1.0, 1000)
    assert lengths == [8, 16, 20] and task.learnt(progress)
    progress["accuracy"] = 0.0
    task.learn(progress, 1.0, 4)  # few answers do not show much
    assert not task.learnt(progress)


def recalled(rank: int, world_size: int, config: Any, run: Path) -> tuple[bool, list[tuple[float, int]]]:
    job = prepare(config, run, go_on=False, overwrite=False)
    world = world_of(rank, world_size)
    trainer = start(job, world)

    class Never:
        number = 0

    from launch.run import train

    done = train(job, trainer, Never())  # type: ignore[arg-type]
    if rank == 0:
        with pytest.raises(ValueError, match="nothing left to learn"):
            longer = dataclasses.replace(config, steps=config.steps + 1)
            start(prepare(longer, run, go_on=True, overwrite=False), World())
    assert isinstance(job.task, RecallTask)
    return done, [(answers.right, answers.count) for answers in recall(trainer, job.task)]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_recall_is_learnt_and_lost_when_the_ring_is_cut(engine: str, tmp_path: Path) -> None:
    config = dataclasses.replace(RECALL, engine=engine)
    ranks = run_processes(recalled, 2, config, tmp_path / "run", timeout=100)
    assert ranks[0] == ranks[1]
    done, ((right, count), (cut, _)) = ranks[0]
    assert done and count >= 200
    assert right > 0.9 and cut < 0.5  # a guess: 0.25


def more_ranks_than_tokens(rank: int, world_size: int) -> None:
    config = dataclasses.replace(RECALL, recall=RecallConfig(pairs=1))
    job = prepare(config, NOWHERE, go_on=False, overwrite=False)
    with pytest.raises(ValueError, match="first sequences have 4 tokens for 5 ranks"):
        start(job, world_of(rank, world_size))


def test_sequences_begin_with_a_token_for_each_rank() -> None:
    run_processes(more_ranks_than_tokens, 5)


# -- bad input --------------------------------------------------------------------------------------


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def test_bad_settings_are_refused(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(before: str, after: str, *arguments: object) -> str:
        file = config_file(tmp_path, before, after, tiny(text))
        return refusal("--config", file, "--out", tmp_path / "run", *arguments)

    steps = ("steps = 6", "steps = 6")
    assert "unknown engine 'fdsp' (did you mean 'fsdp'?)" in said(*steps, "--engine", "fdsp")
    assert "data_parallel is 2 over 1 ranks" in said(*steps, "--data-parallel", 2)
    assert "accumulate is 0; it must be" in said(*steps, "--accumulate", 0)
    assert "--model gpt2: give hf:" in said(*steps, "--model", "gpt2")
    assert f"hf:{tmp_path}/none.json" in said(*steps, "--model", f"hf:{tmp_path}/none.json")
    assert "the data has 256; set a larger vocab_size" in said(
        *steps, "--model", "hf:" + hf_file("llama", tmp_path / "small", vocab_size=61)
    )
    dynamic = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}
    for changes, reason in (
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu' (did you mean 'silu'?); it must be one of"),
        ({"hidden_size": 33}, "not a multiple of the number of attention heads"),
        (dynamic, "rope_type 'dynamic'"),
    ):
        file = Path(hf_file("llama", tmp_path / "wrong"))
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        assert reason in said(*steps, "--model", f"hf:{file}")
    dropping = Phi3Config(**SIZES | {"vocab_size": 256}, resid_pdrop=0.1)
    dropping.save_pretrained(tmp_path / "phi3")
    assert "drops at random" in said(*steps, "--model", f"hf:{tmp_path}/phi3/config.json")
    (tmp_path / "config.json").write_text('{"model_type": "no-such"}')
    assert "--model hf:" in said(*steps, "--model", f"hf:{tmp_path}/config.json")
    with monkeypatch.context() as without:
        for name in [name for name in sys.modules if name.startswith("ringattn.integrations.transformers")]:
            without.delitem(sys.modules, name)
        without.setattr("importlib.metadata.version", missing)
        assert "pip install 'ringattn[hf]'" in said(*steps, "--model", "hf:" + hf_file("llama", tmp_path / "small"))
    assert "lengths.median is 1; it must be a whole number from 2" in said("[model]", "[lengths]\nmedian = 1\n[model]")
    assert "leave out data, documents" in said("[model]", "[recall]\n[model]")
    alone = config_file(tmp_path, 'layout = "contiguous"', 'layout = "zigzag"', RECALL)
    assert "layout is 'zigzag'" in refusal("--config", alone, "--out", tmp_path / "run")
