"""How far a model's positions reach. Attention is exact at any length, but RoPE turns positions behind
`max_position_embeddings` by angles that the model has never met in training."""

import json
import math
from typing import Any

from ringattn.integrations.transformers.structure import describe_model

UNLIMITED = 1 << 62


class PositionWarning(UserWarning):
    """A sequence is longer than its model's positions reach."""


def beyond_positions(config: Any, seqlen: int) -> str | None:
    """What is to be said of sequences of `seqlen` tokens, with the setting to write into the config, or None where they
    are within `max_position_embeddings`, or within what a scaled RoPE is stretched to: `factor` times
    `original_max_position_embeddings` (Transformers' rope parameters)."""
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(limit, int) or seqlen <= max(limit, *(_reach(each, limit) for each in _each(found))):
        return None
    said = f"{describe_model(config)}: {seqlen:,} tokens a sequence, and max_position_embeddings is {limit:,}"
    otherwise = f'with weights that start at random, "max_position_embeddings": {seqlen}'
    if not found:
        return f"{said}: there are no more positions; set, {otherwise}"
    how = "its RoPE is scaled to less" if any(_reach(each, limit) for each in _each(found)) else "its RoPE not scaled"
    stretched = _stretched(found, limit, seqlen)
    reach = max(_reach(each, limit) for each in _each(stretched))
    setting = f'"max_position_embeddings": {reach}, "rope_parameters": {json.dumps(stretched)}'
    return f"{said}, {how}; set {setting} in its config.json, or, {otherwise}"


def _each(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of all kinds of layers, or of each."""
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _reach(parameters: dict[str, Any], limit: int) -> int:
    """Positions that a scaled RoPE is made for; 0 for one that is not scaled."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return 0
    if kind in ("dynamic", "longrope"):  # follow the length; `check_layers` refuses them
        return UNLIMITED
    return math.floor(parameters.get("factor", 1.0) * parameters.get("original_max_position_embeddings", limit))


def _stretched(parameters: dict[str, Any], limit: int, seqlen: int) -> dict[str, Any]:
    """The same with YaRN (Peng et al., 2023, arXiv:2309.00071); layers with a window need none."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {
            kind: _stretched(value, limit, seqlen) if kind == "full_attention" else value
            for kind, value in parameters.items()
        }
    trained = parameters.get("original_max_position_embeddings", limit)
    kept = {"rope_theta": parameters["rope_theta"]} if "rope_theta" in parameters else {}
    factor = float(math.ceil(seqlen / trained))
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained, **kept}
