"""FSDP2 over data x context: loss and every gradient of one process, both recipes, checkpointing counted in bytes,
and a checkpoint that goes on over other ranks."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ringattn
from ringattn.integrations.checkpointing import keep_attention
from ringattn.integrations.fsdp import data_context_mesh, loss_scale, shard_model
from ringattn.integrations.transformers import masks_of, register, shard_batch
from ringattn.loss import IGNORED, count_targets, sum_over
from ringattn.testing import run_processes
from tests.support.hf_models import VOCABULARY, build, configs

SEQLEN = 45
ROUNDING = 2e-6  # of Transformers' fp32 loss and softmax


def rows(seed: int = 1) -> tuple[Tensor, Tensor]:
    """Two rows whose first tokens, a whole rank's, are no targets."""
    ids = torch.randint(3, VOCABULARY, (2, SEQLEN), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, : SEQLEN // 2 + 2] = IGNORED
    labels[1, 30:] = IGNORED
    return ids, labels


def sharded_model(family: str, mesh: Any, **options: Any) -> tuple[nn.Module, ringattn.ContextParallel]:
    config = configs()[family]
    model = build(config)
    cp = ringattn.ContextParallel(mesh["cp"], SEQLEN, mask=masks_of(config), layout="contiguous")
    register(cp, model)
    return shard_model(model, mesh, model.model.layers, **options), cp  # type: ignore[union-attr, arg-type]


def backward(model: nn.Module, cp: Any, mesh: Any, gradients: str = "sum", seed: int = 1) -> float:
    ids, labels = rows(seed)
    size, index = mesh["dp"].size(), mesh["dp"].get_local_rank()
    batch = shard_batch(cp, {"input_ids": ids[index::size], "labels": labels[index::size]})
    count = count_targets(batch["shift_labels"], mesh["dp", "cp"])
    share = model(**batch, use_cache=False, num_items_in_batch=count).loss
    (share * loss_scale(mesh, gradients)).backward()
    return float(sum_over(share, mesh["dp", "cp"]))


def one_step(rank: int, world_size: int, family: str, data: int, gradients: str) -> tuple[float, dict[str, Tensor]]:
    mesh = data_context_mesh("cpu", data=data)
    model, cp = sharded_model(family, mesh, gradients=gradients)
    loss = backward(model, cp, mesh, gradients)
    return loss, {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("gradients", ["sum", "average"])
@pytest.mark.parametrize(("data", "context"), [(1, 2), (2, 2), (1, 3), (1, 4)])
def test_loss_and_gradients_equal_one_process(data: int, context: int, gradients: str) -> None:
    model, (ids, labels) = build(configs()["gemma3"]), rows()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    for found, grads in run_processes(one_step, data * context, "gemma3", data, gradients):
        assert found == pytest.approx(float(loss.detach()), rel=ROUNDING)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                bound = ROUNDING * float(parameter.grad.abs().max()) + 1e-12
                torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=bound)


# -- checkpointing ----------------------------------------------------------------------------------


def ring_passes(rank: int, world_size: int, how: str) -> float:
    """How often K/V was received in a step, counted in the bytes of one pass."""
    mesh = data_context_mesh("cpu")
    model, cp = sharded_model("llama", mesh)
    if how != "none":
        contexts = {"context_fn": keep_attention()} if how == "attention" else {}
        model.activation_checkpointing_enable({"use_reentrant": False, **contexts})  # type: ignore[operator]
    with torch.no_grad():
        model(**{k: v for k, v in shard_batch(cp, {"input_ids": rows()[0]}).items()}, use_cache=False)
    one = cp.traffic()["received"]["forward kv"]
    backward(model, cp, mesh)
    received = cp.traffic()["received"]
    return (received["forward kv"] - one + received["backward kv"]) / max(one, 1)  # rank 0 needs nothing


def test_selective_checkpointing_keeps_attention() -> None:
    last = {how: run_processes(ring_passes, 2, how)[-1] for how in ("none", "attention", "all")}
    assert last == {"none": 2, "attention": 2, "all": 3}


# -- tensor x context -----------------------------------------------------------------------------------

COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


def split_heads_and_sequence(rank: int, world_size: int, family: str) -> tuple[float, dict[str, Tensor], int]:
    """One step with each matrix over two ranks and each sequence over two others."""
    mesh = data_context_mesh("cpu", context=2, tensor=2)
    config = configs()[family]
    model = build(config)
    for layer in model.model.layers:  # type: ignore[union-attr]
        styles = {name: ColwiseParallel() for name in COLUMNS} | {name: RowwiseParallel() for name in ROWS}
        for name, module in layer.named_modules():
            style = styles.get(name.rpartition(".")[2])
            if style is not None:
                parallelize_module(module, mesh["tp"], style)
    cp = ringattn.ContextParallel(mesh["cp"], SEQLEN, mask=masks_of(config))
    register(cp, model)
    shard_model(model, mesh, model.model.layers)  # type: ignore[union-attr, arg-type]
    loss = backward(model, cp, mesh)
    heads = model.model.layers[0].self_attn.q_proj.weight.to_local().numel()  # type: ignore[union-attr]
    return loss, {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}, heads


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tensor_parallel_layers_attend_in_a_context(family: str) -> None:
    model, (ids, labels) = build(configs()[family]), rows()
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    for found, grads, numbers in run_processes(split_heads_and_sequence, 4, family):
        assert found == pytest.approx(float(loss.detach()), rel=ROUNDING)
        assert numbers * 4 == model.model.layers[0].self_attn.q_proj.weight.numel()  # type: ignore[union-attr]
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                bound = ROUNDING * float(parameter.grad.abs().max()) + 1e-12
                torch.testing.assert_close(grads[name], parameter.grad, rtol=0, atol=bound)


# -- mixed precision, distributed checkpoints, wrong sizes ----------------------------------------------


def in_bfloat16(rank: int, world_size: int) -> tuple[float, bool]:
    mesh = data_context_mesh("cpu")
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, cp = sharded_model("llama", mesh, mp_policy=policy)
    loss = backward(model, cp, mesh)
    return loss, all(bool(p.grad.to_local().isfinite().all()) for p in model.parameters())


def test_mixed_precision() -> None:
    model, (ids, labels) = build(configs()["llama"]), rows()
    with torch.no_grad():
        exact = float(model(input_ids=ids, labels=labels, use_cache=False).loss)
        rounded = float(model.bfloat16()(input_ids=ids, labels=labels, use_cache=False).loss)
    for loss, finite in run_processes(in_bfloat16, 2):
        assert finite and abs(loss - exact) <= 2 * abs(rounded - exact) + 1e-3


def steps(rank: int, world_size: int, data: int, path: Path, first: int, last: int) -> list[float]:
    """Trains from step `first` to `last`; goes on from the checkpoint, and leaves one."""
    mesh = data_context_mesh("cpu", data=data)
    model, cp = sharded_model("llama", mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if first:
        weights, state = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    losses = []
    for step in range(first, last):
        optimizer.zero_grad()
        losses.append(backward(model, cp, mesh, seed=step))
        optimizer.step()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)
    return losses


def test_a_checkpoint_goes_on_over_other_ranks(tmp_path: Path) -> None:
    whole = run_processes(steps, 1, 1, tmp_path / "whole", 0, 5)[0]
    parts = [
        run_processes(steps, 4, 2, tmp_path / "parts", 0, 2)[0],
        run_processes(steps, 2, 1, tmp_path / "parts", 2, 4)[0],
        run_processes(steps, 3, 1, tmp_path / "parts", 4, 5)[0],
    ]
    assert list(itertools.chain(*parts)) == pytest.approx(whole, rel=ROUNDING)
    assert whole[0] != whole[1]


def sizes(rank: int, world_size: int) -> list[Any]:
    found: list[Any] = []
    for asked in ({"data": 3}, {"data": 1, "context": 1}, {"tensor": 4}, {"context": -1}):
        with pytest.raises(ValueError, match=r"over 2 ranks|2 ranks; leave") as caught:
            data_context_mesh("cpu", **asked)
        found.append(str(caught.value))
    mesh = data_context_mesh("cpu", data=2)
    with pytest.raises(ValueError, match="sum, average"):
        loss_scale(mesh, "mean")
    return [mesh["dp"].size(), mesh["cp"].size(), mesh["dp", "cp"].size(), loss_scale(mesh, "average")]


def test_wrong_sizes_are_refused() -> None:
    assert run_processes(sizes, 2) == [[2, 1, 2, 2]] * 2
    assert not dist.is_initialized()


def different_weights(rank: int, world_size: int) -> None:
    mesh = data_context_mesh("cpu")
    model = build(configs()["llama"])
    with torch.no_grad():
        model.model.norm.weight[3] += rank  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match="seed every rank alike"):
        shard_model(model, mesh, model.model.layers)  # type: ignore[union-attr, arg-type]


def test_different_weights_are_refused() -> None:
    run_processes(different_weights, 2)
