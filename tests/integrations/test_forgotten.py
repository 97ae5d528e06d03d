"""A model that was not registered is noticed, once; one that is, and calls of a user's own, are left alone."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

import ringattn
from ringattn.integrations.transformers import ShardedTrainerMixin, register, shard_batch
from ringattn.testing import run_processes
from tests.support.hf_models import build, configs
from tests.support.rows import SEQLEN, Rows

STEPS = 4


def said_in(way: str) -> list[str]:
    """What a loop of some steps is warned of."""
    model, cp = build(configs()["llama"]), ringattn.ContextParallel(dist.group.WORLD, SEQLEN)
    if way == "nothing travels":
        cp = cp.replace(mask=ringattn.documents([0, (SEQLEN + 1) // 2, SEQLEN]), layout="contiguous")
    if way == "registered":
        register(cp, model)
    if way == "registered without its model":
        register(cp)
    whole = {"input_ids": Rows(1).ids}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "cut ahead":
            batches = [shard_batch(cp, whole) for _ in range(STEPS)]
            assert len(batches) == STEPS
        for _ in range(STEPS if way != "cut ahead" else 0):
            batch = shard_batch(cp, whole)
            if way in ("a call of one's own", "nothing travels"):
                q = torch.zeros(1, cp.local_seqlen, 1, 4)
                ringattn.attention(q, q, q, cp=cp)
            else:
                model(**batch, use_cache=False).logits.sum().backward()
    return [str(one.message) for one in caught]


def loops(rank: int, world_size: int) -> dict[str, list[str]]:
    ways = (
        "not registered",
        "registered without its model",
        "cut ahead",
        "a call of one's own",
        "nothing travels",
        "registered",
    )
    return {way: said_in(way) for way in ways}


def test_a_loop_whose_model_was_forgotten_is_told_once() -> None:
    for said in run_processes(loops, 2):
        for way in ("not registered", "registered without its model"):
            (text,) = said.pop(way)
            assert "no layer has asked for attention" in text and "call register(cp, model)" in text
        assert not any(said.values())
    (said,) = run_processes(loops, 1)  # where a rank's own tokens are all
    assert not any(said.values())


class Sharded(ShardedTrainerMixin, Trainer):
    pass


def test_trainer_refuses_a_model_that_was_forgotten(tmp_path: Any) -> None:
    model, cp = build(configs()["llama"]), ringattn.ContextParallel(None, SEQLEN)
    ring = register(cp)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM attends with '\w+', each rank to its own.*register\(cp, "):
        Sharded(model, arguments, train_dataset=Rows(), ring=ring)
    model.set_attn_implementation("ringattn")
    Sharded(model, arguments, train_dataset=Rows(), ring=ring)
