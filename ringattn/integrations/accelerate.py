"""The `cp` axis of accelerate's mesh as a context, beside accelerate's FSDP2 plugin.

accelerator = Accelerator(parallelism_config=ParallelismConfig(dp_shard_size=2, cp_size=2), fsdp_plugin=plugin)
cp = context_parallel(accelerator, seqlen)  # before accelerator.prepare()
register(cp, model)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # all ranks of a context read the same batch
share = token_mean(logits, labels, group=accelerator.torch_device_mesh["dp_cp"])  # of a shard: cp.shard, shard_batch
accelerator.backward(share * loss_scale(accelerator))
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from torch.distributed.device_mesh import DeviceMesh

from ringattn.context import ContextParallel

if TYPE_CHECKING:
    from accelerate import Accelerator

AXIS = "cp"


def context_parallel(accelerator: Accelerator, seqlen: int, **settings: Any) -> ContextParallel:
    """The context of the ranks that share this one's sequence: those of the `cp` axis of accelerate's mesh.

    From then on accelerate takes them for ranks that FSDP2 shards parameters over, and no more: it puts no hooks on
    the model, `maybe_context_parallel` does nothing (and says so), and `accelerator.parallelism_config` names them in
    `dp_shard_size`. Its mesh stays as it is, and so does its data loading: the ranks of a context read the same batch,
    also of an `IterableDataset`, whose batches accelerate would else deal out rank by rank.

    Args:
        accelerator: made with a `parallelism_config` of `cp_size` ranks and an FSDP2 plugin, or of one process.
        seqlen: tokens of the whole sequence.
        settings: of :class:`ContextParallel`.

    Raises:
        ValueError: a mesh without the axis, no FSDP2, a model that was prepared before, `dispatch_batches=True`; and
            what `ContextParallel` refuses.
        NotImplementedError: `sp_size` or `tp_size` above 1.
    """
    return ContextParallel(take_axis(accelerator), seqlen, **settings)


def loss_scale(accelerator: Accelerator) -> int:
    """What to multiply this rank's share of the loss by before `accelerator.backward()`, whose FSDP2 averages gradients
    over all ranks where shares are to be summed: their number.

    `backward()` itself divides by `gradient_accumulation_steps` once more, so that a step is the mean of its micro-
    batches; where shares have been divided by the targets of all of them, multiply by these steps, too.
    """
    return accelerator.num_processes


def take_axis(accelerator: Accelerator) -> DeviceMesh | None:
    """The `cp` axis of accelerate's mesh, None of one process; accelerate then leaves its ranks alone (see
    :func:`context_parallel`, also for what it raises). A second time it is the same axis."""
    if accelerator.num_processes == 1:
        return None
    _check(accelerator)
    config, loading = accelerator.parallelism_config, accelerator.dataloader_config
    ours = copy.copy(config)  # not the user's, of which other accelerators may be made
    ours.dp_shard_size, ours.cp_size = config.dp_shard_size * config.cp_size, 1
    accelerator.state.parallelism_config = ours
    loading.dispatch_batches = False
    return accelerator.torch_device_mesh[AXIS]


def _check(accelerator: Accelerator) -> None:
    config, mesh = accelerator.parallelism_config, accelerator.torch_device_mesh
    for name, size, instead in (
        ("sp_size", config.sp_size, f"DeepSpeed would attend by itself; give cp_size={config.sp_size} and sp_size=1"),
        ("tp_size", config.tp_size, "matrices that are split, too, were never tried here; leave it 1"),
    ):
        if size > 1:
            raise NotImplementedError(f"{name}={size}: {instead}")
    axes = () if mesh is None else mesh.mesh_dim_names
    if AXIS not in axes:
        raise ValueError(
            f"accelerate's mesh has the axes {', '.join(axes) or 'of nothing'} and no {AXIS}; make Accelerator with "
            f"parallelism_config=ParallelismConfig(dp_shard_size=..., cp_size=...), whose product is "
            f"{accelerator.num_processes} ranks"
        )
    if not accelerator.is_fsdp2:
        raise ValueError(
            f"accelerate runs {accelerator.distributed_type.value}, which does not add up gradients over the {AXIS} "
            "axis; pass fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2)"
        )
    if hasattr(accelerator, "_cp_context"):
        raise ValueError(
            "accelerator.prepare() came first, with hooks of accelerate's own context parallelism; make the context "
            "before it"
        )
    if accelerator.dispatch_batches:
        raise ValueError(
            f"dispatch_batches=True gives every rank a batch of its own, but those of the {AXIS} axis share one; leave "
            "it out"
        )
