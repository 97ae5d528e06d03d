"""What a run trains on: text, or recall over the length of the sequence. A task gives the sample at any position of an
endless stream, so that a run goes on exactly where it stopped, on any number of ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from launch.config import Config, RecallConfig
from launch.data import Sample, Text, open_text
from ringattn.loss import IGNORED

Progress = dict[str, Any]  # step, position (of the stream, in tokens), digests of text and model, length, accuracy
COUNTED = 1 << 28  # bytes of a text that the others wait for while they are counted
LATEST = 128  # answers that the running accuracy looks back on


class Task(Protocol):
    """`digest` tells tasks apart; `least_vocabulary` token ids are used; `guesses`: whether answers are counted."""

    digest: str
    least_vocabulary: int
    guesses: bool

    def sample(self, position: int, length: int) -> Sample:
        """Rows of `length` tokens at a position of the stream."""

    def baseline(self, tokens: int) -> tuple[str, float]:
        """What a model reaches that ignores context, in nats a target, over the first `tokens`; and its name."""

    def size(self, length: int) -> int:
        """Tokens of a sample: how far the next one lies behind it in the stream."""

    def length(self, reached: int, seqlen: int) -> int:
        """Of the sequences of a step whose stage has `seqlen`, where those before had `reached`, 0 if there were
        none."""

    def rate(self, length: int) -> float:
        """What the learning rate is multiplied by at a length."""

    def learn(self, progress: Progress, accuracy: float, answers: int) -> None:
        """Notes a step's share of right answers in `progress`."""

    def learnt(self, progress: Progress) -> bool:
        """Whether there is nothing left to learn."""


class TextTask:
    """Bytes of files, every one predicted from those before it."""

    least_vocabulary, guesses = 256, False

    def __init__(self, text: Text, apart: bool) -> None:
        self.text, self.apart, self.digest = text, apart, text.digest

    def sample(self, position: int, length: int) -> Sample:
        """See `Text.sample`; attention crosses the borders of documents unless they are kept apart."""
        sample = self.text.sample(position, length)
        return sample if self.apart else replace(sample, cu_seqlens=(0, length))

    def size(self, length: int) -> int:
        """One row."""
        return length

    def baseline(self, tokens: int) -> tuple[str, float]:
        """The entropy of the bytes that are read."""
        read, counted = min(self.text.size, tokens), min(self.text.size, tokens, COUNTED)
        of = "" if counted == read else f" of the first {COUNTED >> 20} MiB"
        return f"unigram entropy{of}", self.text.unigram_entropy(0, counted)

    def length(self, reached: int, seqlen: int) -> int:
        """That of the stage."""
        return seqlen

    def rate(self, length: int) -> float:
        """All steps are of one size."""
        return 1.0

    def learn(self, progress: Progress, accuracy: float, answers: int) -> None:
        """Nothing is counted."""

    def learnt(self, progress: Progress) -> bool:
        """Text never is."""
        return False


class RecallTask:
    """Pairs of a key and a value, filling, and then every key again in another order, each followed by its value,
    which is to be predicted (multi-query associative recall; Arora et al., 2023, arXiv:2312.04927). Sharded
    contiguously over two or more ranks, the pairs lie on the first and the questions on the last."""

    guesses = True

    def __init__(self, config: RecallConfig, seqlen: int, seed: int) -> None:
        self.config, self.seqlen, self.seed = config, seqlen, seed
        self.digest = f"recall {config.pairs} {config.keys} {config.values} {seed}"
        self.least_vocabulary = 1 + config.keys + config.values  # 0 fills

    def sample(self, position: int, length: int) -> Sample:
        """Rows of pairs, filling and questions."""
        config, rows = self.config, self.size(length) // length
        draw = np.random.default_rng((self.seed, position))
        keys = draw.permuted(np.tile(np.arange(config.keys), (rows, 1)), axis=1)[:, : config.pairs] + 1
        values = draw.integers(config.values, size=(rows, config.pairs)) + 1 + config.keys
        order = draw.permuted(np.tile(np.arange(config.pairs), (rows, 1)), axis=1)
        asked, answers = np.take_along_axis(keys, order, 1), np.take_along_axis(values, order, 1)
        tokens = np.zeros((rows, length), dtype=np.int64)
        labels = np.full((rows, length), IGNORED, dtype=np.int64)
        end = 2 * config.pairs
        tokens[:, 0:end:2], tokens[:, 1:end:2] = keys, values
        tokens[:, -end::2], tokens[:, -end + 1 :: 2] = asked, answers
        labels[:, -end::2] = answers
        return Sample(tokens, labels, (0, length))

    def size(self, length: int) -> int:
        """As many rows as make up `tokens` tokens, at least one."""
        return max(1, self.config.tokens // length) * length

    def baseline(self, tokens: int) -> tuple[str, float]:
        """Of a guess among all values."""
        return f"a guess among {self.config.values} values", math.log(self.config.values)

    def length(self, reached: int, seqlen: int) -> int:
        """At first pairs and questions, nothing between them; longer ones are made by `learn`."""
        return max(reached, 4 * self.config.pairs)

    def rate(self, length: int) -> float:
        """The root of the number of questions: the fewer there are in a step, the noisier its gradient (the rule for
        Adam in Malladi et al., 2022, arXiv:2205.10287)."""
        first = self.length(0, self.seqlen)
        return math.sqrt(self.size(length) // length / (self.size(first) // first))

    def learn(self, progress: Progress, accuracy: float, answers: int) -> None:
        """Twice the length once enough of the latest answers are right."""
        progress["accuracy"] += min(1.0, answers / LATEST) * (accuracy - progress["accuracy"])
        if progress["accuracy"] >= self.config.enough and progress["length"] < self.seqlen:
            progress.update(length=min(2 * progress["length"], self.seqlen), accuracy=0.0)

    def learnt(self, progress: Progress) -> bool:
        """Enough answers are right at the full length."""
        return progress["length"] == self.seqlen and progress["accuracy"] >= self.config.enough


def make_task(config: Config) -> Task:
    """The task of a run. Raises ValueError for text that is missing or too short."""
    if config.recall is not None:
        return RecallTask(config.recall, config.seqlen, config.seed)
    text = open_text(config.data, config.seqlen, config.seed, config.lengths)
    return TextTask(text, config.keeps_documents_apart)
