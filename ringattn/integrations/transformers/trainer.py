"""Transformers' Trainer over sharded sequences, by its public methods alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from ringattn.comm.sums import sum_over
from ringattn.integrations.accelerate import take_axis
from ringattn.integrations.transformers.data import ShardingCollator, replica_sampler
from ringattn.integrations.transformers.forgotten import check_registered
from ringattn.integrations.transformers.ring import LARGEST_SEED, Ring

SAMPLING = ("random", "sequential")


def _check_whole(trainer: Any) -> None:
    """Raises NotImplementedError for what would take a shard for a whole sequence."""
    asked = {
        "compute_metrics": (trainer.compute_metrics, "would see the logits of one shard of each sequence"),
        "label_smoothing_factor": (trainer.args.label_smoothing_factor, "would shift labels that are shifted already"),
        "compute_loss_func": (
            trainer.compute_loss_func,
            "would see one shard, and labels that are shifted already; override compute_loss() for such a one",
        ),
        "neftune_noise_alpha": (trainer.args.neftune_noise_alpha, "would draw noise by the length of a shard"),
    }
    for name, (value, why) in asked.items():
        if value:
            raise NotImplementedError(f"{name} {why}; leave it out")


def _leave_axis_alone(trainer: Any, ring: Ring) -> None:
    """Has accelerate not attend itself over the axes of a `parallelism_config`, or raises as `take_axis` does."""
    config = trainer.accelerator.parallelism_config
    if config is None or config.non_data_parallel_size == 1:
        return
    axis = take_axis(trainer.accelerator)
    if axis is not None and axis.size() != ring.cp.world_size:
        raise ValueError(
            f"cp_size={axis.size()} of parallelism_config, but the context has {ring.cp.world_size} ranks; make it on "
            "parallelism_config.get_device_mesh(arguments.device.type)['cp']"
        )


class ReplicaLoader(DataLoader):
    """A loader whose sampler is told the epoch, as Trainer tells it the loader."""

    def set_epoch(self, epoch: int) -> None:
        """Passes the epoch on, so that every epoch is shuffled anew."""
        assert isinstance(self.sampler, DistributedSampler)
        self.sampler.set_epoch(epoch)


class ShardedTrainerMixin:
    """Put it before `Trainer`: `class MyTrainer(ShardedTrainerMixin, Trainer)`; everything else is Trainer's own.

    All ranks of a context group read the same samples and keep their tokens. Trainer counts the targets of all ranks
    and divides by them, so loss and gradients are those of a single process (leave `average_tokens_across_devices` on).

    Args:
        ring: what `register(cp)` returned.
        data: the 1-D mesh of the data axis (`mesh["dp"]`); None where all ranks are one context group.
        multiple: fill packed sequences up to a multiple of so many tokens.
        args, kwargs: Trainer's own.

    With FSDP2 (`fsdp=True`) and a `parallelism_config` of `cp_size` ranks, make the context on its mesh,
    `parallelism_config.get_device_mesh(arguments.device.type)["cp"]`: accelerate then shards parameters over data x
    context and leaves attention alone (`ringattn.integrations.accelerate`, also for what is refused).

    `evaluate()` gives the exact mean over all targets of what is read; where samples do not fill all replicas,
    `DistributedSampler` repeats some.

    Raises `NotImplementedError` for what would take a shard for a whole sequence (`compute_metrics`, `predict()`, label
    smoothing, `compute_loss_func`, NEFTune), and for a `train_sampling_strategy` that orders samples by their length.
    Raises `ValueError` for a model that is not registered. With `deepspeed=` it raises `ValueError` for settings that
    `ringattn.integrations.deepspeed.initialize` refuses.
    """

    def __init__(
        self, *args: Any, ring: Ring, data: DeviceMesh | None = None, multiple: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        trainer: Any = self
        _check_whole(trainer)
        check_registered(trainer.model)
        _leave_axis_alone(trainer, ring)
        ranks = ring.cp.world_size * (1 if data is None else data.size())
        if trainer.args.world_size != ranks:
            raise ValueError(
                f"{trainer.args.world_size} processes, but {ring.cp.world_size} ranks of the context times "
                f"{1 if data is None else data.size()} of the data axis; pass data=mesh['dp'] of the mesh whose 'cp' "
                "the context was made on"
            )
        if not trainer.args.average_tokens_across_devices:
            raise ValueError("average_tokens_across_devices=False makes a mean of means over shards; leave it on")
        if trainer.args.train_sampling_strategy not in SAMPLING:
            raise NotImplementedError(
                f"train_sampling_strategy={trainer.args.train_sampling_strategy!r}: ranks of a context read the same "
                f"samples, in the order of {' or '.join(SAMPLING)}; choose one of these"
            )
        if trainer.is_deepspeed_enabled:
            from ringattn.integrations.deepspeed import check_trainer

            check_trainer(trainer)
        self._ring, self._data, self._multiple = ring, data, multiple
        self._micro_batch = -1, 0  # the step, and how many of its micro-batches have begun
        self._targets = 0  # of the last batch
        self._evaluated: list[tuple[float, int]] = []  # batch by batch: the loss times the targets, and these

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """See `Trainer`. Dropout in attention follows the step and its micro-batch, so that it goes on where a run that
        is resumed was."""
        trainer: Any = self
        step = trainer.state.global_step
        self._micro_batch = step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0
        self._ring.seed = hash((trainer.args.seed, *self._micro_batch)) & LARGEST_SEED
        return super().training_step(*args, **kwargs)  # type: ignore[misc]

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """See `Trainer`. A step without any target has a loss of 0."""
        self._targets = 0 if num_items_in_batch is None else int(num_items_in_batch)
        if num_items_in_batch is not None:
            num_items_in_batch = torch.as_tensor(num_items_in_batch).clamp(min=1)
        return super().compute_loss(model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)  # type: ignore[misc]

    def get_total_train_batch_size(self, args: Any) -> int:
        """See `Trainer`. The ranks of a context are no replicas: they read the same samples."""
        return super().get_total_train_batch_size(args) // self._ring.cp.world_size  # type: ignore[misc]

    def get_train_dataloader(self) -> DataLoader:
        """See `Trainer`."""
        trainer: Any = self
        if trainer.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        return self._loader(
            trainer.train_dataset,
            trainer.args.train_batch_size,
            trainer.args.dataloader_drop_last,
            shuffle=trainer.args.train_sampling_strategy == "random",
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """See `Trainer`."""
        trainer: Any = self
        chosen = trainer.eval_dataset if eval_dataset is None else eval_dataset
        chosen = trainer.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        if chosen is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        return self._loader(chosen, trainer.args.eval_batch_size, False, False)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        """See `Trainer`."""
        raise NotImplementedError(
            "predict() would return the logits of one shard of each sequence; call the model yourself and cp.unshard "
            "its logits, or evaluate() for the loss"
        )

    def _loader(self, dataset: Any, batch_size: int, drop_last: bool, shuffle: bool) -> DataLoader:
        args: Any = self.args  # type: ignore[attr-defined]
        seed = args.seed if args.data_seed is None else args.data_seed
        return ReplicaLoader(
            dataset,
            batch_size,
            sampler=replica_sampler(dataset, self._data, shuffle=shuffle, seed=seed, drop_last=drop_last),
            collate_fn=ShardingCollator(self._ring.cp, self.data_collator, multiple=self._multiple),  # type: ignore[attr-defined]
            drop_last=drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `Trainer`. The loss alone: logits are those of a shard."""
        loss, *_ = super().prediction_step(model, inputs, True, ignore_keys)  # type: ignore[misc]
        if loss is not None:
            self._evaluated.append((float(loss) * self._targets, self._targets))
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """See `Trainer`, whose loss would be a mean over batches, however many targets are in each."""
        self._evaluated = []
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)  # type: ignore[misc]
        arguments: Any = self.args  # type: ignore[attr-defined]
        totals = torch.tensor(self._evaluated, dtype=torch.float64, device=arguments.device).view(-1, 2).sum(0)
        if totals[1]:  # of a model that does not divide by their number there is none
            loss, targets = sum_over(totals, dist.group.WORLD if dist.is_initialized() else None).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = loss / targets
        return output
