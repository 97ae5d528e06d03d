"""Small random models of Transformers' families, whose every feature shows: windows shorter than the sequence, caps
that bend, scales that are not the default, sinks that take probability."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen3Config,
)

VOCABULARY = 61
WINDOW = 7
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
MIXED = ["sliding_attention", "full_attention"]
MLA = dict(q_lora_rank=12, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=6)
EXPERTS = dict(n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, moe_intermediate_size=16)


def configs() -> dict[str, PreTrainedConfig]:
    """A fresh config of every family."""
    gemma = dict(sliding_window=WINDOW, query_pre_attn_scalar=3, layer_types=MIXED)
    mla = {**SIZES, **MLA, **EXPERTS, "num_key_value_heads": 4, "first_k_dense_replace": 1}
    del mla["head_dim"]
    return {
        "llama": LlamaConfig(**SIZES),
        "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
        "qwen3": Qwen3Config(**SIZES),
        "gemma2": Gemma2Config(**SIZES, **gemma, attn_logit_softcapping=1.5),
        "gemma3": Gemma3TextConfig(**SIZES, **gemma),
        "gpt-oss": GptOssConfig(
            **SIZES, sliding_window=WINDOW, layer_types=MIXED, num_local_experts=2, num_experts_per_tok=1
        ),
        "deepseek-v3": DeepseekV3Config(**mla),
    }


FAMILIES = tuple(configs())


def build(config: PreTrainedConfig, attention: str = "eager") -> nn.Module:
    """The model in fp64, the same for every call, with no parameter left at zero or at one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, experts_implementation="eager"
        ).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train()


def hf_file(family: str, folder: Path, **changes: Any) -> str:
    """The config.json of a small model over bytes."""
    config = configs()[family]
    config.update({"vocab_size": 256, "dtype": None, **changes})
    config.save_pretrained(folder)
    return str(folder / "config.json")
