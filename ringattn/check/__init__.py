"""Checks a user's own sharded model against one process, on the CPU: what ``ringattn check --model`` runs. (Without a
model it runs :mod:`ringattn.check.machine`.)

The subject is a factory, named ``module:function`` and called on every rank with that rank's context, and in one more
process with a context of one rank::

    def make(cp):
        return Model(cp)  # an nn.Module, or (nn.Module, step)

**The model** takes ``model(tokens, position_ids)``, or ``model(input_ids=, position_ids=)`` if its ``forward`` has an
argument ``input_ids``: int64 ``[batch, local_seqlen]`` and ``[1, local_seqlen]``. It returns logits ``[batch,
local_seqlen, vocab]``, or an object with ``.logits``. It is put into ``eval()`` and fp64, and its weights are moved by
a little seeded noise, equal on all ranks.

**The masks** are those of ``cp.masks``: what the factory states as its attribute ``masks``, cut at this run's packed
documents. That is one mask for all layers, or a list with one for each attention layer, in order (repeats appear in
``cp.masks`` once). Without the attribute they come from the config of a Hugging Face model, and are causal otherwise.

**The step**, ``step(model, tokens, labels, cp)``, gets whole rows as a loader gives them, int64 ``[batch, seqlen]``,
labels not shifted and -100 without a target. It does all that the user's training does (shift, shard, forward, loss,
backward, reduction of gradients; no optimizer) and returns the loss of all ranks' tokens. Without one, a right step is
used. It may use ``torch.distributed``; the group is ``dist.group.WORLD``.
"""

from __future__ import annotations

import time

from ringattn.check.attended import compare_masks
from ringattn.check.gradients import compare_gradients
from ringattn.check.influence import compare_influence
from ringattn.check.layers import compare_layers
from ringattn.check.loss import compare_loss
from ringattn.check.observe import Truth, View, layer_masks, observe_sharded, observe_single
from ringattn.check.processes import CheckError, run_processes
from ringattn.check.report import Finding, Report
from ringattn.check.settings import Settings

__all__ = ["CheckError", "Finding", "Report", "Settings", "check"]


def check(settings: Settings) -> Report:
    """Runs the model of ``settings`` on one process and on ``settings.ranks``, and compares them.

    Raises :class:`CheckError` where a run could not be made.
    """
    start = time.monotonic()
    truth: Truth
    (truth,) = run_processes(observe_single, 1, settings, timeout=settings.timeout)
    views: list[View] = run_processes(
        observe_sharded, settings.ranks, settings, truth.stack, truth.vocab, truth.weights, timeout=settings.timeout
    )
    stated = layer_masks(truth.stack, settings)
    influence = compare_influence(settings, truth, views)
    findings = [*influence, compare_masks(settings, stated, truth.stack.each_layer, views[0].attended)]
    moves = not all(f.ok for f in influence)
    outputs, steps = compare_layers(settings, truth, views, moves)
    lost = compare_loss(settings, truth, views, steps.ok)
    findings += [outputs, steps, lost, compare_gradients(settings, truth, views, cause=not (steps.ok and lost.ok))]
    reference = "Transformers' own attention" if truth.independent else "the same module on one rank"
    return Report(settings, reference, tuple(findings), time.monotonic() - start)
