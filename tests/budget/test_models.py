"""Shapes of models: parameters to the last one, windows layer by layer, and configs that cannot be right."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import ringattn
from benchmarks import published
from ringattn.budget import ModelShape, from_config, model, reach
from ringattn.budget.models import FAMILIES, shipped
from ringattn.integrations.transformers import beyond_positions

# What huggingface.co says on each model's page; of gpt-oss what its weights hold before they are quantised.
PUBLISHED = {
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3-405b": 405_853_388_800,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_241_732_096,
    "gpt-oss-20b": 20_914_757_184,
}
SMALL = {
    "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "intermediate_size": 36, "vocab_size": 60, "max_position_embeddings": 128, "sliding_window": 8,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
LATENT = {"kv_lora_rank": 14, "qk_rope_head_dim": 4, "qk_nope_head_dim": 10, "v_head_dim": 6, "n_routed_experts": 4}
CASES = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}],
    "mistral": [{}, {"sliding_window": None}],
    "ministral": [{}],
    "mixtral": [{"num_local_experts": 4, **EXPERTS}],
    "phi3": [{"head_dim": None, "pad_token_id": 0}],
    "qwen2": [{"head_dim": None}, {"head_dim": None, "use_sliding_window": True, "max_window_layers": 3}],
    "qwen3": [{}, {"attention_bias": True, "use_sliding_window": True, "max_window_layers": 1}],
    "qwen3_moe": [
        {"num_experts": 4, "mlp_only_layers": [1], **EXPERTS},
        {"num_experts": 4, "decoder_sparse_step": 2, "use_sliding_window": True, **EXPERTS},
    ],
    "olmo2": [{"head_dim": None, "attention_bias": True}],
    "olmo3": [{"head_dim": None}],
    "gemma": [{}],
    "gemma2": [{}],
    "gemma3_text": [{"num_hidden_layers": 7}],
    "gpt_oss": [{"num_local_experts": 4, **EXPERTS}],
    "deepseek_v2": [{"q_lora_rank": None, "n_shared_experts": 2, **LATENT, **EXPERTS}],
    "deepseek_v3": [{"q_lora_rank": 8, "attention_bias": True, "first_k_dense_replace": 3, **LATENT, **EXPERTS}],
}


def small(kind: str, changes: dict[str, object]) -> object:
    found = {**SMALL, **changes}
    return CONFIG_MAPPING[kind](**{name: value for name, value in found.items() if name != "head_dim" or value})


def test_every_family_is_tried() -> None:
    assert set(CASES) == set(FAMILIES)


@pytest.mark.parametrize("kind", CASES)
def test_parameters_are_those_of_transformers(kind: str) -> None:
    for changes in CASES[kind]:
        config = small(kind, changes)
        with torch.device("meta"):
            right = AutoModelForCausalLM.from_config(config)
        shape = from_config(json.loads(json.dumps(config.to_dict())))
        assert shape.parameters == sum(x.numel() for x in right.parameters()), changes
        assert [shape.layer(layer) for layer in shape.layers] == [
            sum(x.numel() for x in layer.parameters()) for layer in right.model.layers
        ]
        assert shape.tied == (right.lm_head.weight is right.model.embed_tokens.weight)
        looked_up = 0 if shape.tied else shape.embedding
        experts = shape.parameters - shape.active_parameters
        matrices = sum(x.numel() for x in right.parameters() if x.ndim > 1)
        vectors = sum(layer.mlp.experts * layer.mlp.bias for layer in shape.layers)  # kept as matrices, one an expert
        assert matrices - looked_up - experts >= shape.matmuls >= matrices - looked_up - experts - 100 * vectors


@pytest.mark.parametrize("kind", [kind for kind in CASES if FAMILIES[kind].windows != "none"])
def test_windows_are_those_of_transformers(kind: str) -> None:
    for changes in CASES[kind]:
        config = small(kind, changes)
        with torch.device("meta"):
            right = AutoModelForCausalLM.from_config(config)
        found = [layer.attention.window for layer in from_config(config.to_dict()).layers]
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * len(found)
        window = config.sliding_window
        assert found == [window if kind == "sliding_attention" else None for kind in types], changes
        older = {name: value for name, value in config.to_dict().items() if name != "layer_types"}
        assert [layer.attention.window for layer in from_config(older).layers] == found
        assert len(right.model.layers) == len(found)


@pytest.mark.parametrize("name", shipped())
def test_shapes_that_come_along(name: str) -> None:
    shape = model(name)
    assert shape.parameters == PUBLISHED.get(name, shape.parameters)
    assert shape.name == name and reach(shape, shape.max_positions) is None
    source = json.loads((Path(ringattn.__file__).parent / "budget" / "shapes" / f"{name}.json").read_text())["_source"]
    assert "huggingface.co/" in source


def test_what_was_published_rounded() -> None:
    """Gemma 3's text model without its embedding, arXiv:2503.19786, table 1; what computes a token of DeepSeek-V3,
    arXiv:2412.19437, and of gpt-oss-20b, without its embedding, and its MLPs, arXiv:2508.10925, table 1."""
    gemma, oss = model("gemma3-27b"), model("gpt-oss-20b")
    assert round((gemma.parameters - gemma.embedding) / 1e6) == 25_600
    assert [layer.attention.window for layer in gemma.layers[:7]] == [1024] * 5 + [None, 1024]
    assert Counter(layer.attention.window for layer in gemma.layers) == {1024: 52, None: 10}
    assert round(model("deepseek-v3").parameters / 1e9) == 671
    assert int(model("deepseek-v3").active_parameters / 1e9) == 37
    assert round((oss.active_parameters - oss.embedding) / 1e9, 2) == 3.61
    assert round(model("qwen3-30b-a3b").active_parameters / 1e9, 1) == 3.4  # "3.3B", cut off
    assert sum(oss.parts.values()) == oss.parameters and round(oss.parts["experts"] / 1e9, 2) == 19.12


WIDTHS = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 8, "num_hidden_layers": 2}
PLAIN = {"model_type": "llama", **WIDTHS}
MIXED = {"model_type": "gemma2", **WIDTHS, "sliding_window": 4}
MOE = {"model_type": "mixtral", **WIDTHS}
WRONG = [
    (WIDTHS, "model_type is missing: must be one of llama, mistral,"),
    ({**PLAIN, "model_type": "lama"}, "model_type='lama' is unknown: choose from llama, .*did you mean 'llama'"),
    ({**PLAIN, "model_type": ["llama"]}, "model_type=.* is unknown"),
    *(
        ({k: v for k, v in PLAIN.items() if k != name}, f"{name} is missing: a config.json of .*'llama'")
        for name in WIDTHS
    ),
    ({**PLAIN, "hidden_size": None}, "hidden_size is missing"),
    ({**PLAIN, "hidden_size": 0}, "hidden_size=0: must be at least 1"),
    ({**PLAIN, "num_hidden_layers": -1}, "num_hidden_layers=-1: must be at least 1"),
    ({**PLAIN, "num_hidden_layers": 1 << 40}, "num_hidden_layers=.*: must be at most 10000"),
    ({**PLAIN, "vocab_size": True}, "vocab_size=True: must be an integer"),
    ({**PLAIN, "intermediate_size": "8"}, "intermediate_size='8': must be an integer"),
    ({**PLAIN, "vocab_size": 8.5}, "vocab_size=8.5: must be an integer"),
    ({**PLAIN, "num_key_value_heads": 3}, "num_attention_heads is 2, no multiple of num_key_value_heads, 3"),
    ({**PLAIN, "num_attention_heads": 3}, "hidden_size is 8, no multiple of num_attention_heads, 3: give head_dim"),
    ({**PLAIN, "tie_word_embeddings": 1}, "tie_word_embeddings=1: must be True or False"),
    ({**PLAIN, "rope_scaling": "yarn"}, "rope_scaling is 'yarn': must be an object"),
    ({**PLAIN, "rope_parameters": {"rope_type": "yarn", "factor": -1}}, "factor=-1: must be a number"),
    ({**MIXED, "layer_types": ["full_attention"]}, "layer_types has 1 entries, and num_hidden_layers is 2"),
    ({**MIXED, "layer_types": ["full_attention", "mamba"]}, "layer_types has 'mamba': what is known is sliding"),
    ({**MIXED, "sliding_window": -4}, "sliding_window=-4: must be at least 1"),
    (MOE, "num_local_experts is missing"),
    ({**MOE, "num_local_experts": 2, "num_experts_per_tok": 3}, "num_experts_per_tok is 3, and num_local_experts is 2"),
    ({"model_type": "deepseek_v3", **WIDTHS}, "kv_lora_rank is missing"),
    ({"model_type": "gemma3", "text_config": {"hidden_size": 0}}, "hidden_size=0"),
]


@pytest.mark.parametrize("config, said", WRONG)
def test_configs_that_cannot_be_right_are_refused(config: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=f"^config: {said}"):
        from_config(config)


def test_names_and_paths(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model='lama3-8b' is unknown: choose from deepseek-v3, .*mean 'llama3-8b'"):
        model("lama3-8b")
    with pytest.raises(ValueError, match="there is no such file"):
        model(str(tmp_path / "absent.json"))
    with pytest.raises(ValueError, match="model=3: must be a path"):
        model(3)
    with pytest.raises(ValueError, match=r"config.json cannot be read: .*No such file"):
        model(str(tmp_path))
    file = tmp_path / "config.json"
    for text in ("", "[1]", "{", "[" * 100_000, "\udcff"):
        file.write_text(text, errors="surrogateescape")
        with pytest.raises(ValueError, match=r"config.json cannot be read: .*give the path"):
            model(str(tmp_path))
    file.write_text(json.dumps(PLAIN))
    assert model(str(tmp_path)).layers == model(str(file)).layers == from_config(PLAIN).layers
    file.write_text(json.dumps({**PLAIN, "hidden_size": 0}))
    with pytest.raises(ValueError, match=r"config.json: hidden_size=0"):
        model(str(file))


def test_a_model_of_several_parts_is_its_text_model() -> None:
    """As google/gemma-3-4b-it writes it, with what it leaves out."""
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    rope = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    whole = {"model_type": "gemma3", "text_config": {**text, **rope}, "vision_config": {"hidden_size": 1152}}
    shape = from_config(whole)
    with torch.device("meta"):
        right = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3_text"](**text))
    assert shape.parameters == sum(x.numel() for x in right.parameters())


def test_reach_says_what_the_integration_says() -> None:
    for kind, changes in {"llama": {}, "gemma3_text": {}, "gpt_oss": CASES["gpt_oss"][0]}.items():
        config = small(kind, changes)
        config.architectures = ["config"]
        shape = from_config(config.to_dict())
        lengths = (128, 129, 128 * 33)
        assert [reach(shape, n) for n in lengths] == [beyond_positions(config, n) for n in lengths]
        assert reach(shape, 128 * 1025) is not None
    assert reach(model("qwen3-8b"), 40_960) is None
    said = reach(model("qwen3-8b"), 1 << 20)
    assert said.startswith("qwen3-8b: 1,048,576 tokens a sequence, and max_position_embeddings is 40,960")
    assert '"rope_type": "yarn", "factor": 26.0' in said
    assert reach(from_config(PLAIN), 1 << 30) is None  # nothing is said of its positions


def test_models_of_published_runs_are_known() -> None:
    runs = json.loads((Path(__file__).parent / "published.json").read_text())["runs"]
    shapes = {run["name"]: read(run["model"]) for run in runs}
    assert len(shapes) == len(runs) == 22 and sum(run["figure"] for run in runs) == 11
    assert all(run["sources"] and run["unknown"] and run["settings"]["batch"] == 1 for run in runs)
    assert shapes["oomb-qwen2.5-7b-1"].parameters == 7_615_616_512  # its page at huggingface.co


@pytest.mark.slow
def test_six_published_figures_are_planned_within_15_percent() -> None:
    found = {row["name"]: row["ratio"] for row in published.published() if row["reproduced"] and row["figure"]}
    trl = "trl-qwen3-0.6b-1m", "trl-qwen3-8b-1m", "trl-qwen3-30b-a3b-1m", "trl-qwen3-0.6b-4m"
    assert {*trl, "alst-llama3-8b-8", "upipe-llama3-8b-16"} <= set(found), found


def read(named: str | dict[str, object]) -> ModelShape:
    return model(named) if isinstance(named, str) else from_config(named)
