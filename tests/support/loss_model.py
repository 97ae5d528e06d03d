"""A decoder without its attention, samples for it, and its loss on one process."""

import torch
import torch.nn.functional as F
from torch import nn

from ringattn.loss import shift_labels, token_mean

S, VOCABULARY, WIDTH = 61, 37, 8
CU = (0, 3, 3, 4, 20, 41, S)


class Model(nn.Module):
    """A decoder without its attention: the loss is all that is asked about. The head is tied, and softcapped."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embed, self.linear = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype), nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def hidden(self, tokens):
        return torch.tanh(self.linear(self.embed(tokens)))

    def head(self, rows):
        return 5 * torch.tanh(F.linear(rows, self.embed.weight) / 5)


def make_model():
    torch.manual_seed(1)
    return Model()


def samples(number, seed=0):
    """Tokens and labels ``[number, S]``, later samples with fewer targets, none of them in the first 35 positions of
    the second: the ranks that hold these in a contiguous layout have no target."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (number, S), generator=generator)
    labels = shift_labels(tokens, cu_seqlens=CU)
    keep = torch.rand(number, S, generator=generator) < torch.linspace(0.9, 0.1, number)[:, None]
    keep[1::2, :35] = False
    return tokens, labels.masked_fill(~keep, -100)


def one_process(model, tokens, labels):
    """The mean over all targets of all samples at once, by torch's own mean."""
    loss = F.cross_entropy(model.head(model.hidden(tokens)).flatten(0, 1), labels.flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def whole_logits(hidden, head, labels, **how):
    return token_mean(head(hidden), labels, **how)


def assert_same(found, expected, tolerance=1e-12):
    (loss, gradients), (right, right_gradients) = found, expected
    torch.testing.assert_close(loss, right, rtol=tolerance, atol=0)
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in gradients.items():
        scale = float(right_gradients[name].abs().max())
        torch.testing.assert_close(gradient, right_gradients[name], rtol=0, atol=tolerance * scale, msg=name)
