"""One training step over sharded sequences: shard the samples, run the model with each layer's mask through
`ringattn.attention`, and sum loss and gradients over the ranks. A single process runs the same lines."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import ringattn
from launch.config import Config
from launch.data import Sample
from launch.engines import Engine
from launch.flop import model_flop
from launch.language import Inputs, Language, Masks
from launch.processes import World
from ringattn.loss import count_targets


def make_context(config: Config, world: World, language: Language) -> ringattn.ContextParallel:
    """The context of a run, over the processes that share a sequence."""
    return ringattn.ContextParallel(
        world.ring(config.transport),
        config.seqlen,
        mask=language.distinct,
        layout=config.layout,
        schedule=config.schedule,
        ulysses=config.ulysses if world.size > 1 else 1,  # the one rank that `verify` compares with has no neighbours
        kernel=config.kernel,
        shape=attention_shape(config, language),
        options=ringattn.Options(timeout=config.timeout, offload=config.offload),
    )


def attention_shape(config: Config, language: Language) -> ringattn.Shape:
    """The shape of the job's attention calls, of one row."""
    return replace(language.shape, dtype=config.dtype)


@dataclass(frozen=True, slots=True)
class Counters:
    """What a rank has done so far: bytes received for attention, the fewest the masks allow it to receive,
    seconds attention spent waiting for other ranks, and the model's FLOP (see `launch.flop`; 0 where it is not
    known)."""

    received: int
    required: int
    waited: float
    flop: int = 0

    def since(self, earlier: "Counters") -> "Counters":
        """The difference to an earlier count."""
        return Counters(
            self.received - earlier.received,
            self.required - earlier.required,
            self.waited - earlier.waited,
            self.flop - earlier.flop,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step found, the same on every rank: the mean loss (nats a target), the norm of its gradient before
    clipping, the share of the targets guessed right (0 where none are counted), their number, whether any rank was
    asked to stop, and the largest logit of attention where it was asked for."""

    loss: float
    norm: float
    accuracy: float
    targets: int
    asked: bool
    max_logit: float | None = None


@dataclass(slots=True)
class Trainer:
    """The model and what it is trained with. `config` has the settings of the stage; `engine` has the parameters; `cp`
    is the context of the latest sample."""

    config: Config
    world: World
    language: Language
    engine: Engine
    cp: ringattn.ContextParallel
    required: int = 0
    flop: int = 0
    past: Counters = Counters(0, 0, 0.0)  # of contexts over other groups of ranks

    @property
    def model(self) -> nn.Module:
        """The model itself."""
        return self.language.model

    def counters(self) -> Counters:
        """Totals since the start of the process."""
        traffic = self.cp.traffic()
        received = self.past.received + sum(traffic["received"].values())
        return Counters(received, self.required, self.past.waited + traffic["wait_seconds"], self.flop)

    def enter(self, config: Config) -> None:
        """Goes on with the settings of another stage of the run. Collective."""
        before, self.config = self.config, config
        if (config.data_parallel, config.ulysses) == (before.data_parallel, before.ulysses):
            self.cp = self.cp.replace(seqlen=config.seqlen, mask=self.language.distinct)
            return
        self.past = self.counters()
        self.world.split(config.data_parallel)
        self.cp = make_context(config, self.world, self.language)

    def loss_and_gradients(self, samples: Sequence[Sample], asked: bool = False, logits: bool = False) -> Outcome:
        """The outcome of the samples of all ranks, but for the norm; the gradient of its loss is added to the
        engine's, and is that of one process on every rank. `samples` are this replica's, one micro-batch each;
        `asked` is whether this rank was asked to stop, `logits` whether the largest one is wanted."""
        self.world.at("dealing out the samples")
        largest: list[Tensor] | None = [] if logits else None
        inputs = [replace(one, largest=largest) for one in self._inputs(samples)]
        # they stay on the device: a step waits for it once, at the sum
        shares, right = torch.zeros((), device=self.world.device), torch.zeros((), device=self.world.device)
        for index, one in enumerate(inputs):
            with self.engine.summing(last=index == len(inputs) - 1):
                self.world.at("forward")
                with ringattn.offloaded(self.config.offload):
                    share, guessed = self.engine(one)
                self.world.at("backward and the sum of gradients")
                self.engine.backward(share * self.engine.loss_scale)
            shares, right = shares + share.detach(), right + guessed
        self.world.at("the sum of losses")
        loss, total, stop = self.world.sum_([shares, right, asked])
        targets = int(inputs[0].count)
        found = Outcome(loss, 0.0, total / max(1, targets), targets, stop > 0)
        return replace(found, max_logit=self.world.largest(torch.stack(largest).amax())) if largest else found

    @torch.no_grad()
    def answer(self, sample: Sample) -> tuple[int, int]:
        """How many targets of the replicas' samples are guessed right, and how many there are."""
        (inputs,) = self._inputs([sample])
        _, right = self.engine(inputs)
        return int(self.world.sum_([right])[0]), int(inputs.count)

    def _inputs(self, samples: Sequence[Sample]) -> list[Inputs]:
        """This rank's part of the samples, with one count of targets for all of them on all ranks."""
        device = self.world.device
        placed = [(sample, *self._context_of(sample)) for sample in samples]
        shards = [
            [cp.shard(torch.from_numpy(rows).to(device), dim=1) for rows in (sample.tokens, sample.labels)]
            for sample, cp, _ in placed
        ]
        count = count_targets([labels for _, labels in shards], self.world.group)
        return [
            Inputs(tokens, labels, cp, masks, count)
            for (tokens, labels), (_, cp, masks) in zip(shards, placed, strict=True)
        ]

    def _context_of(self, sample: Sample) -> tuple[ringattn.ContextParallel, Masks]:
        """The context and the layers' masks for one sample, which count as what this rank does."""
        self.cp, masks = self.context_for(sample)
        self.required += self._least_bytes(masks) * len(sample.tokens)
        self.flop += self._flop(masks) * len(sample.tokens)
        return self.cp, masks

    def context_for(self, sample: Sample) -> tuple[ringattn.ContextParallel, Masks]:
        """The context and the layers' masks for one sample: of its length, and with its documents kept apart."""
        masks, distinct, seqlen = self.language.masks, self.language.distinct, sample.tokens.shape[1]
        if len(sample.cu_seqlens) > 2:
            documents = ringattn.documents(sample.cu_seqlens)
            masks = tuple(mask & documents for mask in masks)
            distinct = tuple(mask & documents for mask in distinct)
        if distinct != self.cp.masks or seqlen != self.cp.seqlen:
            return self.cp.replace(seqlen=seqlen, mask=distinct), masks
        return self.cp, masks

    def _flop(self, masks: Masks) -> int:
        """The model's FLOP of this rank's part of one row, the heads of a split counted as if they were even."""
        pairs = sum(int(self.cp.plans[mask].work[self._place]) for mask in masks) // self.cp.ulysses
        return model_flop(self.language, self.cp.local_seqlen, pairs)

    @property
    def _place(self) -> int:
        """Of this rank in its ring, whose ranks plans count."""
        return self.cp.rank // self.cp.ulysses

    def _least_bytes(self, masks: Masks) -> int:
        """Bytes this rank must move for one row: the K/V its queries need from other ranks once in forward and once
        in backward, and the gradients of that K/V sent home; where heads are split, this rank's part of what those
        need that compute with the same tokens."""
        shape = attention_shape(self.config, self.language)
        tokens = sum(int(self.cp.plans[mask].received[self._place]) for mask in masks)
        return tokens * (shape.forward.token + shape.backward.token) // self.cp.ulysses

    def step(self, samples: Sequence[Sample], lr: float, stop: bool, logits: bool = False) -> Outcome:
        """Trains on the samples. Where any rank was asked to stop, all of them stop together."""
        self.engine.zero_grad()
        found = self.loss_and_gradients(samples, stop, logits)
        if not math.isfinite(found.loss):
            return replace(found, norm=math.nan)  # the caller stops; the parameters are those of the step before
        self.world.at("the gradient's norm and the optimizer")
        return replace(found, norm=self.engine.step(lr))
