"""Sharded attention inside Hugging Face Transformers models, through its public registries.

ring = register(cp)  # under the name "ringattn"
model = AutoModelForCausalLM.from_config(config, attn_implementation="ringattn")
model(input_ids=cp.shard(tokens), position_ids=cp.position_ids[None], use_cache=False)
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

WORKS_WITH = ("5.0", "6")  # from, and below


def _check_version() -> None:
    try:
        found = version("transformers")
    except PackageNotFoundError:
        raise ImportError(
            "ringattn.integrations.transformers needs the package transformers: pip install 'ringattn[hf]'"
        ) from None
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"transformers {found} has no public attention and mask registries as ringattn knows them ({error}); "
            f"versions from {WORKS_WITH[0]} and below {WORKS_WITH[1]} work"
        ) from error


_check_version()

from ringattn.integrations.transformers.attention import register  # noqa: E402
from ringattn.integrations.transformers.data import ShardingCollator, replica_sampler, shard_batch  # noqa: E402
from ringattn.integrations.transformers.positions import PositionWarning, beyond_positions  # noqa: E402
from ringattn.integrations.transformers.ring import Ring  # noqa: E402
from ringattn.integrations.transformers.structure import layer_masks, masks_of, shape_of  # noqa: E402
from ringattn.integrations.transformers.trainer import ShardedTrainerMixin  # noqa: E402

__all__ = [
    "PositionWarning",
    "Ring",
    "ShardedTrainerMixin",
    "ShardingCollator",
    "beyond_positions",
    "layer_masks",
    "masks_of",
    "register",
    "replica_sampler",
    "shape_of",
    "shard_batch",
]
