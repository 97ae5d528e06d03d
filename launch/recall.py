"""Does the ring carry information? Questions of the recall task at full length, asked of the trained model twice: as it
is, and with attention cut where one rank's tokens end and the next one's begin."""

from dataclasses import dataclass, replace

import numpy as np

from launch.tasks import RecallTask
from launch.training import Trainer


@dataclass(frozen=True, slots=True)
class Answers:
    """The share of `count` questions that were answered right, and how they were asked."""

    name: str
    right: float
    count: int


def recall(trainer: Trainer, task: RecallTask) -> list[Answers]:
    """Asks new questions on all ranks; nothing is learnt. Called by every rank."""
    borders = np.cumsum([0, *trainer.cp.replace(seqlen=task.seqlen).q_layout.sizes])
    whole = _ask(trainer, task, (0, task.seqlen), f"recall at {task.seqlen:,} tokens")
    cut = _ask(trainer, task, tuple(borders.tolist()), "the same with the ring cut")
    return [whole, cut] if len(borders) > 2 else [whole]


def _ask(trainer: Trainer, task: RecallTask, cu_seqlens: tuple[int, ...], name: str) -> Answers:
    fresh, world = RecallTask(task.config, task.seqlen, task.seed + 1), trainer.world
    right, count, position = 0, 0, 0
    while count < task.config.questions:
        sample = replace(fresh.sample(position + world.replica, task.seqlen), cu_seqlens=cu_seqlens)
        answered, asked = trainer.answer(sample)
        right, count, position = right + answered, count + asked, position + world.replicas
    return Answers(name, right / count, count)
