"""What the job needs of a language model, whoever wrote it, and the loss of a shard as one module."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import ringattn
from ringattn.loss import IGNORED, linear_token_mean

Masks = tuple[ringattn.Mask, ...]


def check_memory(parameters: int) -> None:
    """Raises ValueError where the weights alone are more than this machine holds: each rank makes all of them. (With
    FSDP only they are held whole; gradients and moments take three times as much in all.)"""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed, there = 4 * parameters * ranks, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"the model has {parameters:,} parameters, in fp32 and on {ranks} ranks {needed / 2**30:,.0f} GiB; it must "
            f"fit this machine's {there / 2**30:,.0f} GiB: set a smaller width, or fewer layers or ranks"
        )


@dataclass(frozen=True, slots=True)
class Inputs:
    """One micro-batch on one rank: int64 tokens and labels [rows, local_seqlen], labels shifted before they were
    sharded; the context and each layer's mask; `count` targets on all ranks in all micro-batches of the step."""

    tokens: Tensor
    labels: Tensor
    cp: ringattn.ContextParallel
    masks: Masks
    count: Tensor


@dataclass(frozen=True, slots=True)
class Language:
    """A model as the job sees it.

    layers: what is gathered one at a time where parameters are sharded. hidden: from a shard to what the head takes,
    [rows, local_seqlen, width]. head: logits of rows of it, [tokens, vocabulary]. masks: of each layer in order;
    `distinct` are the same without repeats, the widest first. shape: of a layer's attention, but for its dtype.
    matmuls: parameters that every token is multiplied with, the embedding's not among them; None where that is not
    known (experts).
    """

    model: nn.Module
    layers: Sequence[nn.Module]
    hidden: Callable[[Inputs], Tensor]
    head: Callable[[Tensor], Tensor]
    masks: Masks
    distinct: Masks
    shape: ringattn.Shape
    vocabulary: int
    matmuls: int | None = None


class Objective(nn.Module):
    """`objective(inputs)` is this rank's share of the mean loss, in nats, and how many targets the model would have
    guessed right (0 unless `guesses`: that takes the targets' logits once more). All of the model runs inside, so
    that wrappers which gather parameters around `forward` have them there; `autocast`: to bfloat16."""

    def __init__(self, language: Language, chunks: int, guesses: bool, autocast: bool = False) -> None:
        super().__init__()
        self.model = language.model
        self.language, self.chunks, self.guesses, self.autocast = language, chunks, guesses, autocast

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        with torch.autocast(inputs.tokens.device.type, torch.bfloat16, enabled=self.autocast):
            return self._share(inputs)

    def _share(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        hidden, head = self.language.hidden(inputs), self.language.head
        share = linear_token_mean(hidden, head, inputs.labels, count=inputs.count, chunks=self.chunks)
        right = torch.zeros_like(inputs.count)
        if self.guesses:
            with torch.no_grad():
                wanted = inputs.labels != IGNORED
                right = (head(hidden[wanted]).argmax(-1) == inputs.labels[wanted]).sum()
        return share, right
