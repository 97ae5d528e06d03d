"""How far a model's positions reach. Attention is exact at any length, but RoPE turns positions behind
`max_position_embeddings` by angles that the model has never met in training."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from ringattn.budget.model_shape import ModelShape

UNLIMITED = 1 << 62


def reach(shape: ModelShape, seqlen: int) -> str | None:
    """`beyond` of a model's shape; None where its positions are not known."""
    return None if shape.max_positions is None else beyond(shape.name, shape.max_positions, shape.rope, seqlen)


def beyond(name: str, limit: int, rope: Mapping[str, Any], seqlen: int) -> str | None:
    """What is to be said of sequences of `seqlen` tokens, with the setting to write into the config, or None where they
    are within `max_position_embeddings`, `limit`, or within what a scaled RoPE is stretched to: `factor` times
    `original_max_position_embeddings` (Transformers' rope parameters)."""
    if seqlen <= max(limit, *(_reach(each, limit) for each in _each(rope))):
        return None
    said = f"{name}: {seqlen:,} tokens a sequence, and max_position_embeddings is {limit:,}"
    otherwise = f'with weights that start at random, "max_position_embeddings": {seqlen}'
    if not rope:
        return f"{said}: there are no more positions; set, {otherwise}"
    how = "its RoPE is scaled to less" if any(_reach(each, limit) for each in _each(rope)) else "its RoPE not scaled"
    stretched = _stretched(rope, limit, seqlen)
    furthest = max(_reach(each, limit) for each in _each(stretched))
    setting = f'"max_position_embeddings": {furthest}, "rope_parameters": {json.dumps(stretched)}'
    return f"{said}, {how}; set {setting} in its config.json, or, {otherwise}"


def _each(parameters: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of all kinds of layers, or of each."""
    return [value for value in parameters.values() if isinstance(value, dict)] or [parameters]


def _reach(parameters: Mapping[str, Any], limit: int) -> int:
    """Positions that a scaled RoPE is made for; 0 for one that is not scaled."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return 0
    if kind in ("dynamic", "longrope"):  # follow the length; Transformers' ring refuses them
        return UNLIMITED
    return math.floor(parameters.get("factor", 1.0) * parameters.get("original_max_position_embeddings", limit))


def _stretched(parameters: Mapping[str, Any], limit: int, seqlen: int) -> dict[str, Any]:
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
