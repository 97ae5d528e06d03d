"""One training step over a sharded sequence: shard the sample, run the model with each layer's mask through
`ringattn.attention`, and sum loss and gradients over the ranks. A single process runs the same lines."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import ringattn
from launch.config import Config
from launch.data import Sample
from launch.loss import share_of_token_mean
from launch.model import Decoder
from launch.processes import World

Masks = tuple[ringattn.Mask, ...]


def make_context(config: Config, world: World, masks: Masks) -> ringattn.ContextParallel:
    """The context of a run, over all of the world's processes."""
    return ringattn.ContextParallel(
        world.group,
        config.seqlen,
        mask=tuple(dict.fromkeys(masks)),
        layout=config.layout,
        schedule=config.schedule,
        kernel=config.kernel,
    )


@dataclass(frozen=True, slots=True)
class Counters:
    """What a rank has done so far: bytes received for attention, the fewest the masks allow it to receive,
    seconds spent waiting for other ranks."""

    received: int
    required: int
    waited: float

    def since(self, earlier: "Counters") -> "Counters":
        """The difference to an earlier count."""
        return Counters(
            self.received - earlier.received, self.required - earlier.required, self.waited - earlier.waited
        )


@dataclass(slots=True)
class Trainer:
    """The model and what it is trained with. `masks` are the layers' masks, repeated over the depth; `cp`
    is the context of the latest sample."""

    config: Config
    world: World
    model: Decoder
    optimizer: torch.optim.Optimizer
    masks: Masks
    cp: ringattn.ContextParallel
    required: int = 0

    def counters(self) -> Counters:
        """Totals since the start of the process."""
        traffic = self.cp.traffic()
        received = sum(traffic["received"].values())
        return Counters(received, self.required, self.world.waited + traffic["wait_seconds"])

    def masks_of(self, sample: Sample) -> Masks:
        """The layers' masks for one sample: with document masks the context is replaced by the sample's
        own."""
        if not self.config.documents:
            return self.masks
        documents = ringattn.documents(sample.cu_seqlens)
        masks = tuple(mask & documents for mask in self.masks)
        self.cp = self.cp.replace(mask=tuple(dict.fromkeys(masks)))
        return masks

    def loss_and_gradients(self, sample: Sample, extra: Sequence[Tensor] = ()) -> Tensor:
        """The mean loss over all targets; its gradients are added to the parameters' `.grad`. Both are
        summed over the ranks, together with the scalars in `extra`, so that every rank holds the same."""
        masks = self.masks_of(sample)
        self.required += self._least_bytes(masks)
        cp, device = self.cp, self.world.device
        tokens = torch.from_numpy(sample.tokens)[None].to(device)
        labels = torch.from_numpy(sample.labels)[None].to(device)  # shifted before they are sharded

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = ringattn.attention(q, k, v, cp=cp, mask=masks[layer % len(masks)])
            return out

        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            logits = self.model(cp.shard(tokens, dim=1), cp.position_ids.to(device), attend)
        share = share_of_token_mean(logits, cp.shard(labels, dim=1), self.world)
        share.backward()
        loss = share.detach()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        self.world.sum_([loss, *extra, *gradients])
        return loss

    def _least_bytes(self, masks: Masks) -> int:
        """Bytes this rank's part of a step must move: the K/V its queries need from other ranks once in
        forward and once in backward, and the gradients of that K/V sent home."""
        config, rank = self.config, self.world.rank
        element = {"bfloat16": 2, "float32": 4, "float64": 8}[config.dtype]
        numbers = 2 * config.model.num_kv_heads * config.model.head_dim  # of one token's K and V
        layers = (masks[layer % len(masks)] for layer in range(config.model.num_layers))
        tokens = sum(int(self.cp.plans[mask].received[rank]) for mask in layers)
        return tokens * numbers * (2 * element + max(4, element))

    def step(self, sample: Sample, lr: float, stop: bool) -> tuple[float, float, bool]:
        """Trains on one sample. Returns the loss (nats a byte), the norm of its gradient before clipping, and
        whether any rank was asked to stop, in which case all of them stop together."""
        self.optimizer.zero_grad()
        asked = torch.tensor(float(stop), device=self.world.device)
        loss = self.loss_and_gradients(sample, extra=(asked,))
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return float(loss), float(norm), bool(asked)
