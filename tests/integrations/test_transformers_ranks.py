"""Transformers over real processes: data x context, a plain loop and Trainer, against one process."""

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh

import ringattn
from ringattn.integrations.fsdp import data_context_mesh, shard_model
from ringattn.integrations.transformers import (
    ShardedTrainerMixin,
    ShardingCollator,
    masks_of,
    register,
    replica_sampler,
)
from ringattn.loss import IGNORED, count_targets, sum_over
from ringattn.testing import run_processes
from tests.support.hf_models import build, configs
from tests.support.rows import ROUNDING, SEQLEN, Rows


def loop(rank: int, world_size: int, family: str, data: int) -> tuple[float, dict[str, Tensor], int]:
    """One step of a plain loop: 4 rows over the data axis, each row over the context axis."""
    mesh = init_device_mesh("cpu", (data, world_size // data), mesh_dim_names=("dp", "cp"))
    config, rows = configs()[family], Rows(4)
    cp = ringattn.ContextParallel(mesh["cp"], SEQLEN, mask=masks_of(config))
    model = build(config)
    register(cp, model)
    sampler = replica_sampler(rows, mesh["dp"], shuffle=False)
    batch = ShardingCollator(cp)([rows[index] for index in sampler])
    count = count_targets(batch["shift_labels"], mesh)
    share = model(**batch, use_cache=False, num_items_in_batch=count).loss
    share.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        gradients[name] = gradient
    return float(sum_over(share, mesh)), gradients, int(count)


@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2), (1, 3), (1, 4)])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_plain_loop_equals_one_process(family: str, data: int, context: int) -> None:
    rows, model = Rows(4), build(configs()[family])
    count = int((rows.labels[:, 1:] != IGNORED).sum())
    loss = model(input_ids=rows.ids, labels=rows.labels, use_cache=False).loss
    loss.backward()
    for found, gradients, counted in run_processes(loop, data * context, family, data):
        assert counted == count
        assert found == pytest.approx(float(loss.detach()), rel=ROUNDING)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                expected = parameter.grad
                bound = ROUNDING * float(expected.abs().max()) + 1e-12
                torch.testing.assert_close(gradients[name], expected, rtol=0, atol=bound)


def save(rank: int, world_size: int, folder: Path) -> bool:
    """As README has it: what is saved of a sharded model is the model."""
    model = build(configs()["llama"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    shard_model(model, data_context_mesh("cpu"), layers=model.model.layers)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    saved = type(model).from_pretrained(folder, dtype="auto").state_dict()
    return saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)


def test_a_sharded_model_is_saved_whole(tmp_path: Path) -> None:
    assert run_processes(save, 2, tmp_path) == [True, True]


REFUSED = {"label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0}

# -- Trainer ------------------------------------------------------------------------------------------


def train(rank: int, world_size: int, folder: Path, data: int, options: dict[str, Any]) -> tuple[list[Any], Any, float]:
    """The log of a short training with accumulation and clipping, the loss of an evaluation, and what it should be."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}  # asked for, not used: the group is there
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), **where)
    from transformers import Trainer, TrainingArguments

    class ShardedTrainer(ShardedTrainerMixin, Trainer):
        pass

    mesh = init_device_mesh("cpu", (data, world_size // data), mesh_dim_names=("dp", "cp"))
    config = configs()["gemma3"]
    model = build(config)
    ring = register(ringattn.ContextParallel(mesh["cp"], SEQLEN, mask=masks_of(config)), model)
    arguments = TrainingArguments(
        output_dir=str(folder / str(rank)),
        use_cpu=True,
        max_steps=3,
        per_device_train_batch_size=4 // data // 2,
        per_device_eval_batch_size=4 // data // 2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_grad_norm=0.5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **options,
    )
    for name, value in REFUSED.items():
        setattr(arguments, name, value)
        with pytest.raises(NotImplementedError, match=name):
            ShardedTrainer(model, arguments, train_dataset=Rows(), ring=ring, data=mesh["dp"] if data > 1 else None)
        setattr(arguments, name, 0)
    trainer = ShardedTrainer(
        model, arguments, train_dataset=Rows(), eval_dataset=Rows(4), ring=ring, data=mesh["dp"] if data > 1 else None
    )
    figures = trainer.train().metrics
    samples = figures["train_samples_per_second"] * figures["train_runtime"]
    assert samples == pytest.approx(3 * 4, rel=0.2), "each is read by all ranks of a context, and counts once"
    with pytest.raises(NotImplementedError, match="predict"):
        trainer.predict(Rows(4))
    log = [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return log, trainer.evaluate()["eval_loss"], by_hand(trainer.model.eval())


def by_hand(model: torch.nn.Module) -> float:
    """The loss of all targets of the rows that are evaluated, on one process."""
    rows = Rows(4)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        return float(model(input_ids=rows.ids, labels=rows.labels, use_cache=False).loss)


def test_trainer_equals_one_process(tmp_path: Path) -> None:
    layouts: list[tuple[int, int, dict[str, Any]]] = [(1, 1, {}), (1, 2, {}), (2, 2, {"gradient_checkpointing": True})]
    found = []
    for data, context, options in layouts:
        ranks = run_processes(train, data * context, tmp_path, data, options, timeout=100)
        assert all(rank == ranks[0] for rank in ranks)
        found.append(ranks[0])
    log, evaluated, expected = found[0]
    assert evaluated == pytest.approx(expected, rel=1e-5)
    assert len(log) == 3 and log[0][0] != log[1][0]
    for other, other_evaluated, _ in found[1:]:
        for one, two in itertools.chain(zip(log, other, strict=True)):
            assert two == pytest.approx(one, rel=1e-5)
        assert other_evaluated == pytest.approx(evaluated, rel=1e-5)
