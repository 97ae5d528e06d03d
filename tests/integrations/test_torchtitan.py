"""torchtitan's trainer with attention over the `cp` axis of its mesh: loss and weights after steps are those of one
process, documents stay apart, and what would be wrong is refused."""

import importlib.util
import os
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ringattn.testing import run_processes

absent = importlib.util.find_spec("torchtitan") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(absent, reason="needs torchtitan 0.3, see docs/engines.md"),
]

VOCABULARY, SEQLEN, ROWS, STEPS = 61, 32, 4, 2
STARTS = ((0, 9, 20), (0,), (0, 9, 20), (0, 31))  # of documents, row by row
ROUNDING = 2e-5  # of an fp32 model's weights, by AdamW's division by small gradients


class Device(types.ModuleType):
    """What torchtitan asks of an accelerator, answered for a CPU."""

    set_device = reset_peak_memory_stats = empty_cache = synchronize = staticmethod(lambda *args: None)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_device_name = staticmethod(lambda *args: "CPU")
    get_device_properties = staticmethod(lambda *args: types.SimpleNamespace(total_memory=1))
    memory_stats = staticmethod(lambda *args: {})


def on_cpu() -> None:
    """Where torch sees no accelerator, torchtitan takes CUDA for one that is there; and torch 2.13 lacks a function
    that its trainer calls after the first step."""
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = lambda timeout, group: None
    from torchtitan.tools import utils

    utils.device_type, utils.device_module = "cpu", Device("cpu")
    os.environ["LOCAL_RANK"] = "0"


def config_of(folder: str, context: int, steps: int = STEPS) -> Any:
    from torchtitan.components.checkpoint import CheckpointManager
    from torchtitan.components.dataloader import BaseDataLoader
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.metrics import MetricsProcessor
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.components.tokenizer import BaseTokenizer
    from torchtitan.config import ParallelismConfig, TrainingConfig
    from torchtitan.models.llama3 import model_registry
    from torchtitan.trainer import Trainer

    class NoTokenizer(BaseTokenizer):
        @dataclass(kw_only=True, slots=True)
        class Config(BaseTokenizer.Config):
            pass

        def __init__(self, config: Config, **others: Any) -> None:
            super().__init__()

        encode = decode = get_vocab_size = lambda self, *args: None

    class Rows(BaseDataLoader):
        """Rows with documents that begin at `STARTS`, dealt over replicas."""

        @dataclass(kw_only=True, slots=True)
        class Config(BaseDataLoader.Config):
            pass

        def __init__(self, config: Config, dp_world_size: int, dp_rank: int, **others: Any) -> None:
            self.rows = slice(dp_rank, None, dp_world_size)

        def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
            generator = torch.Generator().manual_seed(3)
            places = torch.arange(SEQLEN)
            positions = torch.stack(
                [places - torch.tensor([max(s for s in x if s <= p) for p in places]) for x in STARTS]
            )
            while True:
                tokens = torch.randint(0, VOCABULARY, (ROWS, SEQLEN + 1), generator=generator)
                batch = {"input": tokens[self.rows, :-1], "positions": positions[self.rows]}
                yield batch, tokens[self.rows, 1:].contiguous()

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    spec = model_registry("debugmodel")
    spec.model.layers = spec.model.layers[:2]
    world = dist.get_world_size()
    return Trainer.Config(
        model_spec=spec,
        dump_folder=folder,
        tokenizer=NoTokenizer.Config(),
        dataloader=Rows.Config(),
        loss=CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size),
        optimizer=default_adamw(lr=1e-3),
        metrics=MetricsProcessor.Config(log_freq=1),
        checkpoint=CheckpointManager.Config(enable=False),
        training=TrainingConfig(
            local_batch_size=ROWS * context // world, seq_len=SEQLEN, steps=steps, disable_cuda_graphs=True,
            mixed_precision_param="float32", mixed_precision_reduce="float32",
        ),
        parallelism=ParallelismConfig(
            context_parallel_degree=context, data_parallel_shard_degree=world // context,
            spmd_backend="full_dtensor" if world > 1 else "spmd_types",
        ),
    )  # fmt: skip


def trained(
    rank: int, world: int, context: int, folder: str
) -> tuple[list[tuple[float, float]], dict[str, torch.Tensor]]:
    on_cpu()
    from ringattn.integrations.torchtitan import RingTrainer

    trainer = RingTrainer(config_of(folder, context))
    model = trainer.model_parts[0]
    start(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    logged: list[tuple[float, float]] = []  # losses, and norms of all gradients
    trainer.metrics_processor.log = lambda step, loss, most, norm, **others: logged.append((float(loss), float(norm)))
    trainer.train()
    return logged, {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in model.named_parameters()}


def start(model: torch.nn.Module) -> None:
    """Weights that do not depend on how they are sharded, as torchtitan's on CPUs do."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for weight in model.parameters():
            drawn = 0.05 * torch.randn(weight.shape, generator=generator) + (weight.ndim == 1)
            same = (
                distribute_tensor(drawn, weight.device_mesh, weight.placements)
                if isinstance(weight, DTensor)
                else drawn
            )
            weight.copy_(same)


@pytest.mark.parametrize("data", [1, 2])
def test_steps_equal_one_process(data: int, tmp_path: Path) -> None:
    ((logged, weights),) = run_processes(trained, 1, 1, str(tmp_path), timeout=100)
    world = 2 * data
    for found, theirs in run_processes(trained, world, 2, str(tmp_path), timeout=100):
        assert len(found) == STEPS
        for (loss, norm), (expected, of_one) in zip(found, logged, strict=True):
            assert norm == pytest.approx(of_one, rel=ROUNDING)
            # with torch 2.13 the loss is one of all ranks already when torchtitan sums it over them for its log
            assert loss / world == pytest.approx(expected, rel=ROUNDING)
        for name, weight in weights.items():
            torch.testing.assert_close(theirs[name], weight, rtol=0, atol=ROUNDING)
