"""Making an engine whose gradients are those of one process, and the one factor that this takes.

DeepSpeed divides the sum of gradients by the number of ranks. A rank's share of the loss (:mod:`ringattn.loss`) is its
part of the sum over all targets, already divided by their count, so it is multiplied by the ranks again. Told nothing
of sequences, DeepSpeed does so at every ZeRO stage; told of them, at each stage in another way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import deepspeed
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.pipe import PipelineModule
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ringattn.arguments.values import shown
from ringattn.integrations.deepspeed.agreement import agree, digest, weights_of
from ringattn.integrations.deepspeed.compiling import compile_nothing
from ringattn.integrations.deepspeed.settings import check_settings

# arguments of deepspeed.initialize that would make it divide gradients otherwise, or feed the ranks of a context apart
REFUSED = {
    "mpu": "DeepSpeed would divide gradients by the data parallel ranks at ZeRO 0 to 2 and by all at 3; leave it out, "
    "as ringattn's groups are none of its business",
    "mesh_param": "DeepSpeed would sum gradients over one axis of the mesh alone; leave it out",
    "training_data": "DeepSpeed would deal other samples to each rank of a context; read them with a DataLoader whose "
    "sampler goes by mesh['dp'] (ringattn.integrations.transformers.replica_sampler)",
    "config_params": "give the config as the second argument",
}


def initialize(model: nn.Module, config: Mapping[str, Any] | str, **options: Any) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize` for a model whose sequences are sharded: ZeRO 0 to 3 over all ranks, data x context.

    A call of all ranks. It starts `torch.distributed` where it has not begun, as DeepSpeed does.

    Args:
        model: the same weights on every rank.
        config: DeepSpeed's, or the path of its JSON file. `gradient_clipping` is 1.0 unless set.
        options: of `deepspeed.initialize`: `optimizer`, `model_parameters`, `lr_scheduler`, ...

    Returns `(engine, optimizer, None, lr_scheduler)`. Train with :func:`backward` and `engine.step()`.

    Raises `ValueError`, on all ranks, with the value, the reason and the remedy, where loss or gradients would be
    wrong: for arguments and settings that tell DeepSpeed of sequence or other parallelism, models of pipeline stages
    or experts, what an earlier engine has left in the process, and ranks that differ in config or weights.
    """
    compile_nothing()
    deepspeed.init_distributed(verbose=False)

    def facts() -> dict[str, str]:
        _check_options(options)
        return _facts(model, read(config))

    agree("deepspeed.initialize", facts)
    engine, optimizer, _, scheduler = deepspeed.initialize(model=model, config=dict(read(config)), **options)
    return engine, optimizer, None, scheduler


def read(config: Any) -> Mapping[str, Any]:
    """The config as a table, from a file if it is a path."""
    try:
        found: Mapping[str, Any] = config if isinstance(config, Mapping) else deepspeed.load_ds_config(str(config))
    except ValueError as error:
        raise ValueError(f"config={shown(config)}: must be a dict or the path of a JSON file ({error})") from None
    return found


def loss_scale(engine: Any, *, scale_wrt_gas: bool = True) -> int:
    """What to multiply a rank's share of the loss by before `engine.backward(share * scale, scale_wrt_gas=...)`: the
    number of ranks, and with `scale_wrt_gas` (DeepSpeed's default) the micro-batches of a step, by which DeepSpeed then
    divides. Shares of a step divide by one count, that of all its micro-batches (`ringattn.loss.count_targets`).

    Clipping, and the loss scale of fp16, are DeepSpeed's and need no other factor.

    Raises `ValueError` for an engine that divides gradients by other than the ranks.
    """
    ranks = dist.get_world_size()
    told = {
        "sequence_parallel_size": (engine.sequence_parallel_size, 1),
        "seq_dp_world_size": (engine.seq_dp_world_size, ranks),
        "gradient_average": (engine.gradient_average, True),
    }
    for name, (found, right) in told.items():
        if found != right:
            raise ValueError(
                f"an engine whose {name} is {found}, and not {right}, divides gradients by other than the {ranks} "
                "ranks; make it with ringattn.integrations.deepspeed.initialize"
            )
    return ranks * (engine.gradient_accumulation_steps() if scale_wrt_gas else 1)


def backward(engine: Any, share: Tensor, *, retain_graph: bool = False) -> None:
    """Backward of this rank's share of the loss: after the last micro-batch of a step gradients are those of the mean
    over all targets, on every rank. Call it in the place of `engine.backward`, before `engine.step()`."""
    scaled = share * loss_scale(engine, scale_wrt_gas=False)
    engine.backward(scaled, retain_graph=retain_graph, scale_wrt_gas=False)


def check_trainer(trainer: Any) -> None:
    """Refuses for Transformers' Trainer what :func:`initialize` refuses: Trainer makes its engine itself, later. A call
    of all ranks; see there."""

    def facts() -> dict[str, str]:
        ranks = getattr(trainer.accelerator.parallelism_config, "sp_size", 1)
        if ranks > 1:
            raise ValueError(
                f"sp_size={ranks} of accelerate's ParallelismConfig: it gives DeepSpeed an mpu, by which gradients are "
                "divided otherwise, and attention of its own; leave it out"
            )
        return _facts(trainer.model, trainer.accelerator.state.deepspeed_plugin.deepspeed_config)

    agree("Trainer with deepspeed=", facts)


def _facts(model: nn.Module, config: Mapping[str, Any]) -> dict[str, str]:
    """What the ranks must have alike. Raises what this rank refuses."""
    check_settings(config, dist.get_world_size())
    _check_model(model)
    _check_process()
    parameters = [(name, tuple(p.shape), str(p.dtype)) for name, p in model.named_parameters()]
    return {"config": digest(config), "parameters": digest(parameters), "weights": weights_of(model)}


def _check_options(options: Mapping[str, Any]) -> None:
    for name, why in REFUSED.items():
        if options.get(name) is not None:
            raise ValueError(f"{name}={shown(options[name])}: {why}")


def _check_model(model: nn.Module) -> None:
    if isinstance(model, PipelineModule):
        raise ValueError(
            f"{type(model).__name__} has pipeline stages, which send activations of one shape and divide losses "
            "themselves; give a plain module"
        )
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            raise ValueError(
                f"{name} is a deepspeed.moe.layer.MoE, whose experts' gradients are summed over other ranks, which was "
                "never tried with a context; take a layer whose experts are on every rank"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} is a DTensor, sharded by FSDP or tensor parallelism: give DeepSpeed a plain model"
            )


def _check_process() -> None:
    """DeepSpeed keeps what an engine was told of its ranks for the rest of the process."""
    for name in ("mesh_device", "mpu"):
        if getattr(groups, name) is not None:
            raise ValueError(
                f"deepspeed.utils.groups.{name} is set, by an earlier engine of this process, and every later one "
                "divides gradients by it; start a new process, or call deepspeed.comm.destroy_process_group() and "
                "begin anew"
            )
