"""How far a model's positions reach, as its config says."""

from typing import Any

from ringattn.budget.positions import beyond
from ringattn.integrations.transformers.structure import describe_model


class PositionWarning(UserWarning):
    """A sequence is longer than its model's positions reach."""


def beyond_positions(config: Any, seqlen: int) -> str | None:
    """What is to be said of sequences of `seqlen` tokens, with the setting to write into the config, or None where they
    are within `max_position_embeddings`, or within what a scaled RoPE is stretched to: `factor` times
    `original_max_position_embeddings` (Transformers' rope parameters)."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return beyond(describe_model(config), limit, rope, seqlen) if isinstance(limit, int) else None
