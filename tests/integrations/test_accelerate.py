"""accelerate's mesh and FSDP2 plugin, in a loop of one's own and under Trainer: parameters after steps are those of one
process; and what accelerate would do to the same axis is off, or refused."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from transformers import Trainer, TrainingArguments

from ringattn.integrations import accelerate
from ringattn.integrations.accelerate import context_parallel, loss_scale
from ringattn.integrations.transformers import ShardedTrainerMixin
from ringattn.loss import IGNORED
from ringattn.testing import run_processes
from tests.support.hf_models import VOCABULARY, build, configs
from tests.support.pages import blocks, everything

SEQLEN, STEPS, RATE = 21, 3, 0.1
ROUNDING = 4e-6  # of Transformers' fp32 loss and softmax, by steps


class Rows(Dataset):
    """Samples with unequal numbers of targets."""

    def __len__(self) -> int:
        return 2 * STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(3, VOCABULARY, (SEQLEN,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(SEQLEN) < 5 * index % 13, IGNORED)}


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return (Rows()[index] for index in range(len(Rows())))


def as_devices(rank: int, world: int) -> None:
    """Has accelerate take CPUs for devices: where they are CPUs to it, it has no FSDP and no ParallelismConfig."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used: the group is there
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), **where)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Gemma3DecoderLayer"]
    )


def accelerator_of(world: int, context: int, **others: Any) -> Accelerator:
    sizes = ParallelismConfig(dp_shard_size=world // context, cp_size=context)
    return Accelerator(parallelism_config=sizes, fsdp_plugin=plugin(), **others)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in model.named_parameters()
    }


def one_process(accumulated: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Steps of `2 * accumulated` samples."""
    model = build(configs()["gemma3"])
    optimizer, losses = torch.optim.SGD(model.parameters(), RATE), []
    for batch in DataLoader(Rows(), 2 * accumulated):
        optimizer.zero_grad()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, whole(model)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    moved = whole(build(configs()["gemma3"]))
    for name, weights in expected.items():
        bound = ROUNDING * float(weights.abs().max()) + 1e-12
        torch.testing.assert_close(found[name], weights, rtol=0, atol=bound)
    assert any(not torch.allclose(moved[name], weights, atol=1e-3) for name, weights in expected.items())


def own_loop(rank: int, world: int, context: int, code: str) -> dict[str, Tensor]:
    """The page's loop."""
    as_devices(rank, world)
    config = configs()["gemma3"]  # with windows, which accelerate's own refuses
    model = build(config)
    names = everything() | vars(accelerate) | {"config": config, "model": model, "seqlen": SEQLEN, "plugin": plugin()}
    names |= {"Accelerator": Accelerator, "ParallelismConfig": ParallelismConfig}
    names |= {"data": world // context, "context": context, "loader": DataLoader(Rows(), 2 * context // world)}
    exec(code, names | {"optimizer": torch.optim.SGD(model.parameters(), RATE)})
    return whole(model)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2)])
def test_steps_equal_one_process(data: int, context: int) -> None:
    _, parameters = one_process()
    code, _ = blocks("docs/engines.md")["Accelerate"]
    for weights in run_processes(own_loop, data * context, context, code):
        same(weights, parameters)


class Sharded(ShardedTrainerMixin, Trainer):
    pass


def trained(rank: int, world: int, context: int, folder: Path, code: str) -> tuple[list[float], dict[str, Tensor]]:
    as_devices(rank, world)
    sizes = ParallelismConfig(dp_shard_size=world // context, cp_size=context)
    arguments = TrainingArguments(
        folder, use_cpu=True, max_steps=STEPS // 2 + 1, per_device_train_batch_size=2 * context // world, optim="sgd",
        gradient_accumulation_steps=2, learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        train_sampling_strategy="sequential", parallelism_config=sizes, fsdp=True,
        fsdp_config={"transformer_layer_cls_to_wrap": ["Gemma3DecoderLayer"]},
    )  # fmt: skip
    as_devices(rank, world)  # Trainer's arguments have begun it anew
    config = configs()["gemma3"]
    names = everything() | {"config": config, "model": build(config), "seqlen": SEQLEN, "rows": Rows(), "sizes": sizes}
    names |= {"arguments": arguments, "ShardedTrainer": Sharded}
    exec(code, names)
    trainer = names["trainer"]
    assert trainer.accelerator.is_fsdp2 and trainer.accelerator.parallelism_config.cp_size == 1
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, whole(trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2)])
def test_trainer_equals_one_process(data: int, context: int, tmp_path: Path) -> None:
    losses, parameters = one_process(accumulated=2)
    _, code = blocks("docs/engines.md")["Accelerate"]
    for found, weights in run_processes(trained, data * context, context, tmp_path, code):
        assert found == pytest.approx(losses, abs=6e-5)  # Trainer logs five digits
        same(weights, parameters)


def refusals(rank: int, world: int) -> list[str]:
    found = []

    def refused(
        kind: type[Exception], sizes: dict[str, int], told: dict[str, int] | None = None, **others: Any
    ) -> None:
        AcceleratorState._reset_state()
        as_devices(rank, world)  # the accelerator before has changed that
        accelerator = Accelerator(parallelism_config=ParallelismConfig(**sizes), fsdp_plugin=plugin(), **others)
        for name, size in (told or {}).items():
            setattr(accelerator.parallelism_config, name, size)
        if told == {}:
            accelerator.prepare(DataLoader(Rows()))
        with pytest.raises(kind) as caught:
            context_parallel(accelerator, SEQLEN)
        found.append(str(caught.value))

    refused(ValueError, {"dp_shard_size": 2})
    refused(NotImplementedError, {"cp_size": 2}, {"tp_size": 2})
    refused(NotImplementedError, {"cp_size": 2}, {"sp_size": 2})
    refused(ValueError, {"cp_size": 2}, {})  # prepared before
    dispatching = DataLoaderConfiguration(dispatch_batches=True)
    refused(ValueError, {"cp_size": 2}, dataloader_config=dispatching)
    return found


def streamed(rank: int, world: int) -> list[list[int]]:
    """The first tokens of the batches that a rank reads of a stream, by accelerators one after the other."""
    as_devices(rank, world)
    read = []
    for _ in range(2):
        accelerator = accelerator_of(world, 2)
        cp = context_parallel(accelerator, SEQLEN)
        loader = accelerator.prepare(DataLoader(Stream(), 1))
        assert cp.world_size == 2 and context_parallel(accelerator, SEQLEN).world_size == 2
        read.append([int(batch["input_ids"][0, 0]) for batch in loader])
    return read


def test_what_accelerate_would_do_itself_is_refused() -> None:
    texts = ("the axes dp_shard and no cp", "tp_size=2", "sp_size=2", "prepare() came first", "dispatch_batches=True")
    for found in run_processes(refusals, 2):
        for text, expected in zip(found, texts, strict=False):
            assert expected in text


@pytest.mark.slow
def test_ranks_of_a_context_read_the_same_batches_of_a_stream() -> None:
    samples = [int(row["input_ids"][0]) for row in Stream()]
    for rank, read in enumerate(run_processes(streamed, 4)):
        assert read == [samples[rank // 2 :: 2]] * 2


def test_one_process_needs_no_mesh() -> None:
    assert run_processes(alone, 1) == [(1, 1)]


def alone(rank: int, world: int) -> tuple[int, int]:
    accelerator = Accelerator(cpu=True)
    return context_parallel(accelerator, SEQLEN).world_size, loss_scale(accelerator)
