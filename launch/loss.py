"""The loss: the exact mean over the targets of all ranks, also where a rank holds none."""

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.data import IGNORED
from launch.processes import World


def share_of_token_mean(logits: Tensor, labels: Tensor, world: World) -> Tensor:
    """This rank's share of the mean cross-entropy in nats over all ranks' targets: local sum / global
    count. The shares of all ranks add up to the mean, and so do their gradients; a mean of local means
    would not, because ranks hold unequal numbers of targets.

    Args:
        logits: [batch, local_seqlen, vocabulary], any float dtype; computed in at least fp32.
        labels: int64 [batch, local_seqlen], already shifted, -100 where there is no target.
        world: over which targets are counted.
    """
    count = (labels != IGNORED).sum()
    world.sum_([count])
    wide = logits if logits.dtype == torch.float64 else logits.float()
    total = F.cross_entropy(wide.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / count.clamp(min=1)
