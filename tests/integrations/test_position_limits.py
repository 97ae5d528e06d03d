"""Sequences longer than a model's positions: what is said is the setting that mends it."""

import json
import re
import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

import ringattn
from ringattn.integrations.transformers import PositionWarning, beyond_positions, register
from tests.support.hf_models import MIXED, SIZES

SHORT = {**SIZES, "max_position_embeddings": 16}


def setting(said: str) -> dict[str, object]:
    """What is to be written, out of what is said."""
    return json.loads(re.search(r'"rope_parameters": (\{.*\}) in its', said)[1])


def test_a_context_beyond_the_positions_is_said_once_with_the_setting() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHORT))
    with pytest.warns(PositionWarning, match=r"40 tokens a sequence, and max_position_embeddings is 16, its RoPE not"):
        register(ringattn.ContextParallel(None, 40), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        register(ringattn.ContextParallel(None, 16), model)


def test_what_is_said_helps() -> None:
    said = beyond_positions(LlamaConfig(**SHORT), 40)
    expected = {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}
    assert setting(said) == expected and said.endswith('"max_position_embeddings": 40')
    assert 'set "max_position_embeddings": 48, "rope_parameters"' in said  # else Transformers warns of the factor
    mended = LlamaConfig(**{**SHORT, "max_position_embeddings": 48}, rope_parameters=expected)
    assert beyond_positions(LlamaConfig(**SHORT, rope_parameters=expected), 48) is None
    assert beyond_positions(mended, 40) is None and beyond_positions(mended, 48) is None
    again = beyond_positions(mended, 49)
    assert "its RoPE is scaled to less" in again and setting(again)["factor"] == 4.0
    ids = torch.arange(40)[None]
    plain, stretched = (AutoModelForCausalLM.from_config(config) for config in (LlamaConfig(**SHORT), mended))
    stretched.load_state_dict(plain.state_dict())
    assert not torch.allclose(plain(input_ids=ids).logits, stretched(input_ids=ids).logits)
    assert beyond_positions(LlamaConfig(**SHORT, rope_parameters={"rope_type": "linear", "factor": 2.5}), 40) is None


def test_layers_with_a_window_keep_their_angles() -> None:
    config = Gemma3TextConfig(**SHORT, sliding_window=8, layer_types=MIXED)
    found = setting(beyond_positions(config, 64))
    assert found["full_attention"]["factor"] == 4.0 and found["sliding_attention"]["rope_type"] == "default"
    config.rope_parameters = found
    assert beyond_positions(config, 64) is None


def test_learned_positions_have_an_end() -> None:
    said = beyond_positions(GPT2Config(n_positions=16), 40)
    assert "there are no more positions" in said and "rope" not in said
