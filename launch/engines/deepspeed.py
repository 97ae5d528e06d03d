"""DeepSpeed's ZeRO over all ranks, data and context: a part of AdamW's moments (stage 1), of the gradients too (2), of
the parameters too (3) on each rank. A checkpoint holds whole tensors, so any engine goes on from it."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from launch.engines.base import MODEL, OPTIMIZER, Part, Read, weights_of

if TYPE_CHECKING:
    from launch.config import Config
    from launch.language import Inputs, Objective
    from launch.processes import World

MOMENTS = ("exp_avg", "exp_avg_sq")
MOST_IN_BUCKET = 500_000_000  # as DeepSpeed has it


class Deepspeed:
    """See `Engine`. Sums of gradients, moments and weights are fp32."""

    name: ClassVar[str] = "deepspeed"

    def __init__(self, objective: "Objective", config: "Config", world: "World") -> None:
        os.environ.setdefault("DS_ACCELERATOR", world.device.type)  # read when DeepSpeed is first asked for it
        os.environ.setdefault("LOCAL_RANK", "0")  # which mpiexec and Slurm call otherwise, and DeepSpeed insists on
        try:
            from deepspeed import utils, zero

            from ringattn.integrations.deepspeed import initialize, loss_scale
        except ImportError as error:
            raise ValueError(f"engine is 'deepspeed', but {error}; or set another engine") from None
        self.utils, self.zero, self.model, self.world = utils, zero, objective.model, world
        self.stage = 1 if config.deepspeed is None else config.deepspeed.stage
        settings, betas = config.optimizer, config.optimizer.betas
        optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.lr,
            betas=(betas[0], betas[1]),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        table = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": config.accumulate,
            "gradient_clipping": 0.0 if settings.clip == float("inf") else settings.clip,
            "zero_optimization": {"stage": self.stage, "reduce_bucket_size": bucket_of(self.model)},
            "steps_per_print": 2**62,  # the job has its own report
        }
        self.engine, self.optimizer, *_ = initialize(objective, table, optimizer=optimizer)
        self.loss_scale = float(loss_scale(self.engine, scale_wrt_gas=False))
        self.settles = 1 if self.stage == 3 else 0  # the first step finds out in which order parameters are wanted
        self._moments()

    def __call__(self, inputs: "Inputs") -> tuple[Tensor, Tensor]:
        found: tuple[Tensor, Tensor] = self.engine(inputs)
        return found

    def summing(self, last: bool) -> AbstractContextManager[None]:
        """DeepSpeed's own switch, which stays as it is set."""
        self.engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """DeepSpeed's, which divides by the ranks alone."""
        self.engine.backward(loss, scale_wrt_gas=False)

    def zero_grad(self) -> None:
        """Drops also what DeepSpeed keeps of a backward without a step, as it does where a gradient overflows."""
        self.engine.zero_grad()
        self.optimizer.zero_grad()
        if self.stage < 3:
            self.optimizer.micro_step_id = -1
            for kept in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
                kept.update(dict.fromkeys(kept))

    def step(self, lr: float) -> float:
        """DeepSpeed clips, and does not look whether the norm is finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def weights(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return {name: self._whole(tensor) for name, tensor in self.model.state_dict(keep_vars=True).items()}

    def gradients(self) -> dict[str, Tensor]:
        """Zeros of those that have none."""
        found = {name: self.utils.safe_get_full_grad(p) for name, p in self.model.named_parameters()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def state(self) -> Iterator[tuple[str, Part]]:
        """Whole tensors, gathered one after the other."""
        for name, tensor in weights_of(self.model).items():
            yield MODEL + name, _shared(self._whole(tensor))
        flats = self._moments()
        for name, parameter in self.model.named_parameters():
            yield f"{OPTIMIZER}{name}.step", _shared(flats[0]["step"].detach().clone())
            for what in MOMENTS:
                whole = self.utils.safe_get_full_optimizer_state(parameter, what)
                yield f"{OPTIMIZER}{name}.{what}", _shared(whole.detach())

    @torch.no_grad()
    def load(self, read: Read) -> None:
        """Every rank reads whole tensors and keeps its part."""
        for name, tensor in weights_of(self.model).items():
            self._take(tensor, _read_whole(read, MODEL + name, _shape(tensor)))
        flats, steps = self._moments(), [torch.zeros(())]
        for name, parameter in self.model.named_parameters():
            steps.append(read(f"{OPTIMIZER}{name}.step", (), ()))
            for what in MOMENTS:
                self._take(parameter, _read_whole(read, f"{OPTIMIZER}{name}.{what}", _shape(parameter)), what)
        for flat in flats:
            flat["step"].copy_(torch.stack(steps).max())  # one for all parameters of a part

    def held(self) -> int:
        """Parameters whole or in parts, AdamW's own and its moments; of stage 3 also what small parameters are gathered
        to, the bucket, and the parts of the gradients."""
        optimizer, whole = self.optimizer, 0
        tensors = [x for state in self._moments() for x in state.values()]
        if self.stage < 3:
            tensors += [*optimizer.bit16_groups_flat, *optimizer.single_partition_of_fp32_groups]
        else:
            tensors += [*optimizer.fp16_partitioned_groups_flat, *optimizer.fp32_partitioned_groups_flat]
            tensors += [optimizer.grad_partitions_flat_buffer, *(b.buffer for b in optimizer.ipg_buckets.values())]
            whole = sum(p.ds_numel * p.element_size() for p in optimizer.persistent_parameters)
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
        return sum(storages.values()) + whole

    def _whole(self, tensor: Tensor) -> Tensor:
        if not hasattr(tensor, "ds_id"):
            return tensor.detach()
        with self.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()

    def _take(self, tensor: Any, whole: Tensor, moment: str = "") -> None:
        """Puts this rank's part of a weight, and of the fp32 weight that AdamW updates, or of a moment in its place."""
        whole = whole.to(self.world.device)
        if not hasattr(tensor, "ds_id"):
            if moment:
                self.utils.safe_set_full_optimizer_state(tensor, whole, moment)
                return
            tensor.copy_(whole)
            self.utils.safe_set_full_fp32_param(tensor, whole)  # of a parameter
            return
        part: Tensor = tensor.ds_tensor  # of one dim, the last rank's filled up
        numbers = pad(whole.flatten(), (0, part.numel() * self.world.size - whole.numel()))
        own = numbers.narrow(0, part.numel() * self.world.rank, part.numel())
        if moment:
            self.utils.safe_set_local_optimizer_state(tensor, own, moment)
            return
        with self.zero.GatheredParameters([tensor], modifier_rank=0):
            if self.world.rank == 0:
                tensor.copy_(whole)
        self.utils.safe_set_local_fp32_param(tensor, own)

    def _moments(self) -> list[dict[str, Tensor]]:
        """AdamW's state of this rank's parts, which it makes at the first step; until then it is zeros here."""
        optimizer = self.optimizer
        parts = optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups
        states = optimizer.optimizer.state
        for part in parts:
            if not states[part]:
                states[part]["step"] = torch.zeros((), dtype=torch.float32, device=part.device)
                states[part].update({what: torch.zeros_like(part) for what in MOMENTS})
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()
        return [states[part] for part in parts]


def bucket_of(model: nn.Module) -> int:
    """Numbers of the buffer in which gradients are summed, which DeepSpeed makes as large for a small model too."""
    return min(MOST_IN_BUCKET, sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()))


def _shared(whole: Tensor) -> Part:
    return Part(tuple(whole.shape), (0,) * whole.ndim, whole, shared=True)


def _shape(tensor: Any) -> tuple[int, ...]:
    """That of the whole tensor."""
    return tuple(tensor.ds_shape if hasattr(tensor, "ds_id") else tensor.shape)


def _read_whole(read: Read, name: str, shape: tuple[int, ...]) -> Tensor:
    return read(name, (0,) * len(shape), shape)
