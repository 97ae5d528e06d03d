"""Training under DeepSpeed's ZeRO over data x context, and the same steps of one process."""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import ringattn
from ringattn.integrations.fsdp import data_context_mesh
from ringattn.integrations.transformers import register, shard_batch
from ringattn.loss import IGNORED
from tests.support.hf_models import VOCABULARY, build, configs

SEQLEN = 45
ACCUMULATED = 2  # micro-batches of a step
CLIP = 0.3
BOUNDS = [(0, SEQLEN), (0, 17, 30, SEQLEN)]  # a sample is one document, or three packed ones
SGD = dict(lr=0.5, momentum=0.9)


@dataclass(frozen=True)
class Sample:
    """One row of tokens, its labels (some of no target) and the bounds of its documents."""

    ids: Tensor
    labels: Tensor
    bounds: tuple[int, ...]

    def batch(self) -> dict[str, Any]:
        """As a collator makes it."""
        cu = torch.tensor(self.bounds, dtype=torch.int32)
        return {"input_ids": self.ids, "labels": self.labels, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu}


def samples(step: int, data: int) -> list[list[Sample]]:
    """Those of a step: by micro-batch, then by replica, with unequal numbers of targets."""
    draw = torch.Generator().manual_seed(step)

    def one(micro: int, replica: int) -> Sample:
        ids = torch.randint(3, VOCABULARY, (1, SEQLEN), generator=draw)
        labels = ids.clone()
        labels[:, : 5 + 13 * replica + 7 * micro] = IGNORED
        return Sample(ids, labels, BOUNDS[(step + micro + replica) % 2])

    return [[one(micro, replica) for replica in range(data)] for micro in range(ACCUMULATED)]


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small Llama, the same on every call."""
    return build(configs()["llama"]).to(dtype)


@dataclass
class Run:
    """Losses of the steps, gradients of the first (before clipping) and weights after the last."""

    losses: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]

    def error(self, other: "Run") -> tuple[float, float]:
        """Of gradients and weights, each parameter's relative to its own norm, the largest."""
        pairs = ((self.gradients, other.gradients), (self.weights, other.weights))
        first, second = (max(float((a[k] - b[k]).norm() / b[k].norm()) for k in b) for a, b in pairs)
        return first, second


def alone(data: int, steps: int, dtype: torch.dtype = torch.float64, clip: float = CLIP) -> Run:
    """One process, each document by itself."""
    model = model_of(dtype)
    optimizer, found = torch.optim.SGD(model.parameters(), **SGD), Run([], {}, {})
    for step in range(steps):
        total, count = torch.zeros((), dtype=torch.float64), 0
        for sample in (sample for micro in samples(step, data) for sample in micro):
            for a, b in zip(sample.bounds, sample.bounds[1:], strict=False):
                logits = model(input_ids=sample.ids[:, a:b], use_cache=False).logits[0, :-1]
                targets = sample.labels[0, a + 1 : b]
                part = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
                part.backward()
                total, count = total + part.detach(), count + int((targets != IGNORED).sum())
        for parameter in model.parameters():
            parameter.grad /= count
        if not step:
            found.gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(float(total) / count)
    found.weights = {name: p.detach().double() for name, p in model.named_parameters()}
    return found


def begin(rank: int, world_size: int) -> None:
    """What DeepSpeed wants of a process before it is imported."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # asked for, not used: the group is there
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


def settings(stage: int, **changes: Any) -> dict[str, Any]:
    """A config of DeepSpeed's."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": ACCUMULATED,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        **changes,
    }


def engine_of(mesh: DeviceMesh, config: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The engine of a model that attends over the context axis; and its context."""
    from ringattn.integrations.deepspeed import initialize

    model, cp = model_of(dtype), ringattn.ContextParallel(mesh["cp"], SEQLEN)
    register(cp, model)
    engine, *_ = initialize(model, config, optimizer=torch.optim.SGD(model.parameters(), **SGD))
    return engine, cp


def step(
    engine: Any, cp: ringattn.ContextParallel, mesh: DeviceMesh, number: int, whole: bool = False
) -> Iterator[Any]:
    """One step: yields the loss of all, once gradients are there. whole: by `engine.backward` and its own division."""
    from ringattn.integrations.deepspeed import backward, loss_scale

    mine = [micro[mesh["dp"].get_local_rank()] for micro in samples(number, mesh["dp"].size())]
    batches = [shard_batch(cp, sample.batch()) for sample in mine]
    count = ringattn.loss.count_targets([batch["shift_labels"] for batch in batches], mesh["dp", "cp"])
    total = torch.zeros(())
    for index, batch in enumerate(batches):
        share = engine(**batch, use_cache=False, num_items_in_batch=count).loss
        total += share.detach().float()
        engine.backward(share * loss_scale(engine)) if whole else backward(engine, share)
        if index == len(batches) - 1:
            yield float(ringattn.loss.sum_over(total, mesh["dp", "cp"]))
        engine.step()


def gradients(engine: Any) -> dict[str, Tensor]:
    """Whole, on every rank."""
    from deepspeed.utils import safe_get_full_grad

    return {name: safe_get_full_grad(p).double() for name, p in engine.module.named_parameters()}


def weights(engine: Any) -> dict[str, Tensor]:
    """Whole, on every rank, those that the optimizer holds."""
    from deepspeed.utils import safe_get_full_fp32_param

    zero = bool(engine.zero_optimization_stage())
    found = {name: safe_get_full_fp32_param(p) if zero else p for name, p in engine.module.named_parameters()}
    return {name: weight.detach().double() for name, weight in found.items()}


def train(mesh: DeviceMesh, config: dict[str, Any], steps: int, whole: bool = False) -> Run:
    """Some steps from the start."""
    engine, cp = engine_of(mesh, config)
    found = Run([], {}, {})
    for number in range(steps):
        for loss in step(engine, cp, mesh, number, whole):
            found.losses.append(loss)
            found.gradients = found.gradients or gradients(engine)
    found.weights = weights(engine)
    engine.destroy()
    return found


def mesh_of(context: int) -> DeviceMesh:
    """Data x context."""
    return data_context_mesh("cpu", context=context)


def world() -> dist.ProcessGroup:
    """All ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group
