"""Rows of tokens for Transformers models."""

import torch
from torch import Tensor

from ringattn.loss import IGNORED
from tests.support.hf_models import VOCABULARY

SEQLEN = 45
ROUNDING = 2e-6  # of Transformers' fp32 loss and softmax


class Rows(torch.utils.data.Dataset):
    """Rows of tokens, whose labels are ever more ignored: the first rows have all targets, the last hardly any."""

    def __init__(self, count: int = 8) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, VOCABULARY, (count, SEQLEN), generator=generator)
        self.labels = self.ids.clone()
        for row in range(count):
            self.labels[row, : row * 6] = IGNORED

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[row], "labels": self.labels[row]}
