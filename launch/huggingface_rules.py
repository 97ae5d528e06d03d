"""What a Transformers config.json must not say to this job. Transformers itself takes almost anything, and fails later
and elsewhere: in the first step, or by training a model that is no number."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.rules import SIZE, Rule, check, integer, nearest, number, one_of

LARGEST_FILE = 16 << 20
LAYERS = 1_000

ABSENT = Rule(
    lambda value: value is None,
    "absent, so leave it out: weights are random here, and no code of a config is run",
    None,
)
# by the end of a key's name, the first that fits; null is Transformers' default and stays its affair
RULES: tuple[tuple[str, Rule], ...] = (
    (r"quantization_config|auto_map|adapter.*", ABSENT),
    (r"num_hidden_layers|n_layers?|num_layers", integer(1, LAYERS, 2)),
    (r"first_k_dense_replace|num_nextn_predict_layers|n_shared_experts", integer(0, SIZE, 1)),
    (r"hidden_size|n_embd|d_model|(.*_)?intermediate_size|n_inner|vocab_size", integer(1, 2**24, 256)),
    (r"num_(attention|key_value)_heads|num_heads|n_heads?|(.*_)?head_dim|.*_lora_rank", integer(1, SIZE, 8)),
    (r"num_(local_|routed_)?experts|n_routed_experts|num_experts_per_tok|n_group|topk_group", integer(1, SIZE, 2)),
    (r"max_position_embeddings|n_positions", integer(1, 2**40, 4096)),
    (r"sliding_window|attention_chunk_size", integer(0, 2**40, 1024)),
    (r".*(norm|norm_epsilon)_eps|.*layer_norm_epsilon|norm_epsilon", number(0, 1, 1e-6, above=True, below=True)),
    (r"rope_theta|rope_local_base_freq|rotary_emb_base", number(1, math.inf, 10000.0)),
    (r"(final|attn)_logit_softcapping|query_pre_attn_scalar|factor", number(0, math.inf, 30.0, above=True)),
    (r".*(dropout|_pdrop)", number(0, 1, 0.0, below=True)),
    (r"initializer_range", number(0, 1000, 0.02)),
)


def read(path: Path) -> dict[str, Any]:
    """The settings in a config file. Raises ValueError with the value, the rule and the remedy for those that cannot
    work, wherever they are in it."""
    if not path.is_file():
        raise ValueError("no such file; give the path of a config.json")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path.stat().st_size:,} bytes are no config; it must be a config.json")
    try:
        settings = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is no JSON ({error}); it must be a config.json of Transformers") from None
    if not isinstance(settings, dict):
        raise ValueError(f"it holds a {type(settings).__name__}; it must be a config.json of Transformers")
    for where, table in _tables(settings, ""):
        _check_table(table, where)
    return settings


def _tables(value: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield where, value
        for name, entry in value.items():
            yield from _tables(entry, f"{where}{name}.")


def _check_table(table: dict[str, Any], where: str) -> None:
    for name, value in table.items():
        if value is None:
            continue
        rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
        if rule is None and type(value) in (int, float):
            rule = number(-1e30, 1e30, 1)
        check(table, {name: rule} if rule else {}, where)
    _check_names(table, where)
    _check_shares(table, where)


def _check_names(table: dict[str, Any], where: str) -> None:
    from transformers.activations import ACT2FN
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = ("default", *ROPE_INIT_FUNCTIONS)
    known = {"hidden_act": ACT2FN, "hidden_activation": ACT2FN, "activation_function": ACT2FN, "rope_type": rope}
    if "rope" in where:
        known["type"] = rope
    for name, names in known.items():
        value = table.get(name)
        if value is not None and (not isinstance(value, str) or value not in names):
            close = nearest(value, names) if isinstance(value, str) else ""
            raise ValueError(f"{where}{name} is {value!r}{close}; it must be one of {one_of(names)}")


def _check_shares(table: dict[str, Any], where: str) -> None:
    """Numbers that must go together."""
    heads, kv_heads = table.get("num_attention_heads"), table.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(
            f"{where}num_attention_heads is {heads}, no multiple of num_key_value_heads {kv_heads}; every KV head must "
            "serve as many query heads: change one of them"
        )
    chosen = table.get("num_experts_per_tok")
    for name in ("num_local_experts", "n_routed_experts", "num_experts"):
        if chosen and table.get(name) and chosen > table[name]:
            raise ValueError(
                f"{where}num_experts_per_tok is {chosen} of {name} {table[name]}; it must be at most as many: set fewer"
            )
