"""DeepSpeed's ZeRO over sharded sequences: every rank counts as data parallel, and gives its share of the loss.

engine, *_ = initialize(model, "zero3.json", optimizer=optimizer)
share = ringattn.loss.token_mean(engine(tokens), labels, group=dist.group.WORLD)
backward(engine, share)
engine.step()
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

WORKS_WITH = ("0.19", "0.20")  # from, and below


def _check_version() -> None:
    remedy = f"versions from {WORKS_WITH[0]} and below {WORKS_WITH[1]} work: pip install 'ringattn[deepspeed]'"
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise ImportError(f"ringattn.integrations.deepspeed needs the package deepspeed; {remedy}") from None
    if not Version(WORKS_WITH[0]) <= Version(found) < Version(WORKS_WITH[1]):
        raise ImportError(
            f"deepspeed {found}: how it divides gradients, and what it drops of attention, is known of others only; "
            f"{remedy}"
        )


_check_version()

from ringattn.integrations.deepspeed.compiling import compile_nothing  # noqa: E402
from ringattn.integrations.deepspeed.engine import backward, check_trainer, initialize, loss_scale  # noqa: E402
from ringattn.integrations.deepspeed.layer import RingDistributedAttention  # noqa: E402
from ringattn.integrations.deepspeed.settings import check_settings  # noqa: E402

__all__ = [
    "RingDistributedAttention",
    "backward",
    "check_settings",
    "check_trainer",
    "compile_nothing",
    "initialize",
    "loss_scale",
]
