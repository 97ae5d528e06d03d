"""What README tells users to do with losses, gradients and seeds, where it matters: no targets, parameters with a row
for each token, gradients on some ranks only, dropout that is computed again, samples in their order."""

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

import ringattn as ra
from ringattn.integrations.fsdp import data_context_mesh, shard_model
from ringattn.integrations.transformers import ShardedTrainerMixin, register, shard_batch
from ringattn.testing import run_processes

S = 12


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=2, vocab_size=64,
        intermediate_size=16, **changes,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def without_targets(rank: int, world: int, fsdp: bool) -> list[float]:
    mesh = data_context_mesh("cpu", context=world)
    cp, model = ra.ContextParallel(mesh["cp"], S), llama()
    register(cp, model)
    if fsdp:
        shard_model(model, mesh, layers=model.model.layers)
    ids = torch.zeros(1, S, dtype=torch.int64)
    batch = shard_batch(cp, {"input_ids": ids, "labels": torch.full_like(ids, -100)})
    count = ra.loss.count_targets(batch["shift_labels"], mesh["dp", "cp"]).clamp(min=1)
    loss = model(**batch, use_cache=False, num_items_in_batch=count).loss
    loss.backward()
    grads = [p.grad.to_local() if fsdp else p.grad for p in model.parameters() if p.grad is not None]
    return [float(loss), *(float(g.abs().max()) for g in grads if g.numel())]


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_batch_without_targets_is_a_loss_of_zero(fsdp: bool) -> None:
    for numbers in run_processes(without_targets, 2, fsdp):
        assert len(numbers) > 10 and set(numbers) == {0.0}


class Positioned(nn.Module):
    """A position table, a parameter of all tokens, and one that only the first rank uses."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(S, 4, dtype=torch.float64, generator=generator))
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.float64, generator=generator))
        self.some = nn.Parameter(torch.randn(4, dtype=torch.float64, generator=generator))
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, cp: ra.ContextParallel, grad: str) -> torch.Tensor:
        x = torch.tanh(cp.shard(self.table, dim=0, grad=grad) @ self.weight)
        if cp.rank == 0:
            x = x + self.some
        return x.square().sum() / S


def norms(rank: int, world: int, grad: str) -> list[torch.Tensor | None]:
    model, cp = Positioned(), ra.ContextParallel(dist.group.WORLD, S)
    model(cp, grad).backward()
    ra.loss.sum_gradients(model.parameters(), dist.group.WORLD, whole=[model.table] if grad == "whole" else [])
    return [None if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("grad", ["whole", "share"])
def test_gradients_of_both_kinds_are_summed_once(grad: str, world: int) -> None:
    table, weight = Positioned().table.detach(), Positioned().weight.detach()
    leaves = [table.clone().requires_grad_(), weight.clone().requires_grad_(), Positioned().some]

    rows = run_processes(rows_of, world)[0]
    x = torch.tanh(leaves[0] @ leaves[1])
    x = x + torch.zeros_like(x).index_add(0, rows, leaves[2].expand(len(rows), 4))
    (x.square().sum() / S).backward()

    for found in run_processes(norms, world, grad):
        for a, b in zip(found[:3], leaves, strict=True):
            torch.testing.assert_close(a, b.grad)
        assert found[3] is None


def rows_of(rank: int, world: int) -> torch.Tensor:
    return ra.ContextParallel(dist.group.WORLD, S).position_ids


def test_a_gradient_is_whole_or_a_share() -> None:
    with pytest.raises(ValueError, match="grad='sum'"):
        ra.ContextParallel(None, S).shard(torch.zeros(S), dim=0, grad="sum")


def dropped(rank: int, world: int) -> list[list[torch.Tensor]]:
    """Gradients of two steps, with and without checkpointing, and of the second alone in a context of its own."""
    runs = []
    for checkpointing, steps in ((False, (1, 2)), (True, (1, 2)), (False, (2,))):
        model = llama(attention_dropout=0.5).train()
        cp = ra.ContextParallel(dist.group.WORLD if world > 1 else None, S)
        ring = register(cp, model)
        if checkpointing:
            model.gradient_checkpointing_enable()
        batch = shard_batch(cp, {"input_ids": torch.arange(S)[None], "labels": torch.arange(S)[None]})
        for step in steps:
            model.zero_grad()
            ring.seed = step
            model(**batch, use_cache=False, num_items_in_batch=torch.tensor(S)).loss.backward()
        ra.loss.sum_gradients(model.parameters(), dist.group.WORLD if world > 1 else None)
        runs.append([p.grad for p in model.parameters()])
    return runs


def test_dropout_follows_the_step() -> None:
    (one,) = run_processes(dropped, 1)
    for runs in (one, *run_processes(dropped, 2)):
        for run in runs:
            for a, b in zip(run, one[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


class Sharded(ShardedTrainerMixin, Trainer):
    pass


def train(rank: int, world: int, folder: str, strategy: str) -> list[list[int]] | str:
    """The samples in the order they were read, with a save on the way."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used: the group is there
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), **where)
    model = llama()
    ring = register(ra.ContextParallel(dist.group.WORLD, S), model)
    arguments = TrainingArguments(
        folder, use_cpu=True, max_steps=3, per_device_train_batch_size=1, save_steps=1, report_to="none",
        train_sampling_strategy=strategy, disable_tqdm=True,
    )  # fmt: skip
    rows = [{"input_ids": [n] * S, "labels": [n] * S} for n in range(6)]
    try:
        trainer = Sharded(model, arguments, train_dataset=rows, ring=ring)
    except NotImplementedError as error:
        return str(error)
    read = []
    inner = trainer.training_step

    def noting(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        read.append(int(inputs["input_ids"][0, 0]))
        return inner(model, inputs, *args, **kwargs)

    trainer.training_step = noting
    trainer.train()
    return read


def test_trainer_keeps_the_order_saves_and_goes_on(tmp_path: Any) -> None:
    assert run_processes(train, 2, str(tmp_path), "sequential") == [[0, 1, 2]] * 2
    for text in run_processes(train, 2, str(tmp_path), "group_by_length"):
        assert "train_sampling_strategy='group_by_length'" in text
