"""The fixtures that all tests share do what they say."""

import torch


def test_poison_is_poison(poison: None) -> None:
    assert torch.empty(5).isnan().all()
    assert torch.empty_like(torch.zeros(2, dtype=torch.float64)).isnan().all()
