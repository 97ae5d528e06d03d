"""What a check is asked to do, and the data it runs on: the same in every process, from the settings alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ringattn.loss import IGNORED
from ringattn.validation import check_names

DTYPES = {"float64": torch.float64, "float32": torch.float32}
PROBES = 12  # tokens perturbed one at a time, spread over the sequence


class SubjectError(ValueError):
    """The model cannot be checked as it is; the text says what the factory or the command must change."""


@dataclass(frozen=True)
class Settings:
    """One check of ``model``, a ``module:function`` (see :mod:`ringattn.check`).

    ranks: processes the sequence is sharded over. seqlen: tokens of a row. documents: of unequal length, packed into
    each row. layout: of the sharded context. batch: rows. vocab: of the token ids; None asks the model. seed: of
    weights and tokens. dtype: of the sharded run; the single process computes in float64. timeout: seconds for each
    of the two runs. ulysses: ranks of the sharded context's head axis.

    Raises ``ValueError`` for a value outside its range.
    """

    model: str
    ranks: int = 2
    seqlen: int = 96
    documents: int = 3
    layout: str = "auto"
    batch: int = 1
    vocab: int | None = None
    seed: int = 0
    dtype: str = "float64"
    timeout: float = 120.0
    ulysses: int = 1

    def __post_init__(self) -> None:
        if self.model.count(":") != 1 or not all(self.model.split(":")):
            raise ValueError(f"--model {self.model!r}: must be module:function, e.g. training.models:make")
        for name, least in (("ranks", 2), ("documents", 1), ("batch", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least {least}")
        if self.vocab is not None and self.vocab < 2:
            raise ValueError(f"--vocab {self.vocab}: must be at least 2, or one token could not become another")
        if self.ulysses < 1 or self.ranks % self.ulysses:
            raise ValueError(f"--ulysses {self.ulysses}: must divide the {self.ranks} ranks")
        least = max(2 * self.ranks, 4 * self.documents)
        if self.seqlen < least:
            raise ValueError(
                f"--seqlen {self.seqlen} with {self.ranks} ranks and {self.documents} documents: must be at least "
                f"{least}, two tokens a rank and four a document"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype {self.dtype!r}: choose from {', '.join(DTYPES)}")
        check_names(self.layout, "auto", "auto")
        if not self.timeout > 0:
            raise ValueError(f"--timeout {self.timeout}: must be a positive number of seconds")

    @property
    def cu_seqlens(self) -> tuple[int, ...]:
        """Bounds of the documents, off the even ones, so that no border of shards is one of documents."""
        n, odd = self.documents, self.seqlen // (5 * self.documents) + 1
        inner = (i * self.seqlen // n + (odd if i % 2 else -odd) for i in range(1, n))
        return (0, *inner, self.seqlen)

    @property
    def document_of(self) -> Tensor:
        """int64 ``[seqlen]``: the document of each token."""
        lengths = torch.tensor(self.cu_seqlens).diff()
        return torch.arange(self.documents).repeat_interleave(lengths)

    @property
    def probes(self) -> list[int]:
        """The tokens to perturb: spread evenly, and the first and last of each document."""
        even = torch.linspace(0, self.seqlen - 1, PROBES).round().long().tolist()
        firsts, lasts = self.cu_seqlens[:-1], (b - 1 for b in self.cu_seqlens[1:])
        return sorted({*even, *firsts, *lasts})

    def tokens(self, vocab: int) -> Tensor:
        """int64 ``[batch, seqlen]``."""
        draw = torch.Generator().manual_seed(self.seed)
        return torch.randint(vocab, (self.batch, self.seqlen), generator=draw)

    def labels(self, tokens: Tensor) -> Tensor:
        """The tokens, not shifted; -100 in the first third of the row (a prompt, so that ranks hold unequal numbers
        of targets) and at the first token of each document (nothing predicts it)."""
        labels = tokens.clone()
        labels[:, : self.seqlen // 3] = IGNORED
        labels[:, list(self.cu_seqlens[:-1])] = IGNORED
        return labels
