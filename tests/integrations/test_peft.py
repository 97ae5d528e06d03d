"""Adapters of PEFT on sharded sequences: whatever is frozen, the gradients of what is trained equal those of one
process, and what nobody wants does not move."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import ringattn
from ringattn.integrations.transformers import ShardedTrainerMixin, masks_of, register, shard_batch
from ringattn.loss import sum_gradients
from ringattn.planning.program import Row
from ringattn.testing import run_processes
from tests.support.hf_models import build, configs
from tests.support.rows import ROUNDING, SEQLEN, Rows

# PEFT 0.21 asks Transformers 5.24 by a name that is deprecated
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

QV = ["q_proj", "v_proj"]
CASES: dict[str, dict[str, Any]] = {
    "q and v": dict(target_modules=QV),
    "every linear layer, gemma": dict(target_modules="all-linear", family="gemma3"),
    "q and v from the embeddings on": dict(target_modules=QV, inputs=True),
    "recomputed": dict(target_modules=QV, recompute=False),
    "recomputed, reentrant": dict(target_modules=QV, inputs=True, recompute=True),
    "the last layer": dict(target_modules=QV, layers_to_transform=[1]),
    "k of the first layer": dict(target_modules=["k_proj"], layers_to_transform=[0]),
}


def adapted(family: str = "llama", inputs: bool = False, recompute: bool | None = None, **lora: Any) -> nn.Module:
    """A small model with adapters that are not zero. ``inputs``: embeddings are given gradients, as checkpointing that
    is reentrant asks for; ``recompute``: whether it is, None for none."""
    torch.manual_seed(0)  # the same adapters on every rank
    model = get_peft_model(build(configs()[family]), LoraConfig(r=2, init_lora_weights=False, **lora))
    if inputs:
        model.enable_input_require_grads()
    if recompute is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": recompute})
    return model.train()


def gradients(cp: ringattn.ContextParallel, model: nn.Module) -> dict[str, Tensor]:
    """Those of the adapters after one step on this rank's tokens, not yet summed."""
    register(cp, model)
    batch = shard_batch(cp, {"input_ids": Rows(1).ids, "labels": Rows(1).ids})
    model(**batch, use_cache=False, num_items_in_batch=torch.tensor(SEQLEN - 1)).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def alone(case: dict[str, Any]) -> dict[str, Tensor]:
    """The same of one process, with Transformers' own attention."""
    model = adapted(**{**case, "recompute": None})
    model(input_ids=Rows(1).ids, labels=Rows(1).ids, use_cache=False).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and found
    assert all("lora" in name for name in found)
    largest = max(float(x.abs().max()) for x in expected.values())
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=ROUNDING * largest, msg=name)


def every_case(rank: int, world: int) -> list[tuple[dict[str, Tensor], dict[str, int]]]:
    found = []
    for case in CASES.values():
        model = adapted(**case)
        cp = ringattn.ContextParallel(dist.group.WORLD, SEQLEN, mask=masks_of(model.config))
        before = cp.traffic()["received"].get("backward grad", 0)
        grads = gradients(cp, model)
        moved = cp.traffic()["received"].get("backward grad", 0) - before
        sum_gradients(model.parameters(), dist.group.WORLD)
        # of both layers, if k and v had gradients in both
        whole = 2 * cp.program(cp.masks[0]).tokens(Row.GRAD) * 2 * (8 + 8) * 8
        found.append((grads, {"moved": moved, "whole": whole}))
    return found


@pytest.mark.slow
def test_adapters_over_processes() -> None:
    expected = [alone(case) for case in CASES.values()]
    # Of the bytes of dK and dV in two layers: below the first adapter nothing wants any. Where layers are recomputed
    # Transformers gives the embeddings gradients, too.
    share = {
        "q and v": 3 / 4, "q and v from the embeddings on": 1.0, "recomputed": 1.0, "recomputed, reentrant": 1.0,
        "the last layer": 1 / 4, "k of the first layer": 3 / 4,
    }  # fmt: skip
    for ranks in run_processes(every_case, 2, timeout=200):
        for (name, (found, bytes_)), truth in zip(zip(CASES, ranks, strict=True), expected, strict=True):
            check(found, truth)
            if name in share:
                assert bytes_["moved"] == share[name] * bytes_["whole"], name


def train(rank: int, world: int, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, not used: the group is there
    from transformers import Trainer, TrainingArguments

    class ShardedTrainer(ShardedTrainerMixin, Trainer):
        pass

    model = adapted(target_modules=QV)
    arguments = TrainingArguments(
        output_dir=str(folder / str(rank)), use_cpu=True, max_steps=2, logging_steps=1, report_to=[],
        disable_tqdm=True, learning_rate=1e-2, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    ring = register(ringattn.ContextParallel(dist.group.WORLD, SEQLEN, mask=masks_of(model.config)), model)
    trainer = ShardedTrainer(model, arguments, train_dataset=Rows(), ring=ring)
    trainer.train()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], trained


@pytest.mark.slow
def test_trainer_trains_adapters_as_one_process(tmp_path: Path) -> None:
    (losses, trained), *_ = run_processes(train, 1, tmp_path / "1", timeout=200)
    for mine, adapters in run_processes(train, 2, tmp_path / "2", timeout=200):
        assert len(mine) == 2 and mine == pytest.approx(losses, rel=1e-5)
        for name, x in trained.items():
            torch.testing.assert_close(adapters[name], x, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["q and v", "the last layer"])
def test_adapters_on_one_rank(name: str) -> None:
    model = adapted(**CASES[name])
    cp = ringattn.ContextParallel(None, SEQLEN, mask=masks_of(model.config))
    check(gradients(cp, model), alone(CASES[name]))
    wanted = [call.program.wanted.inputs for call in cp.binding.known(cp.masks[0])]
    first = {"q and v": (True, False, True), "the last layer": (False, False, False)}
    second = {"q and v": (True, True, True), "the last layer": (True, False, True)}
    assert wanted == [first[name], second[name]]
