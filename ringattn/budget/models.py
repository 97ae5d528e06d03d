"""Models by name, or by the config.json that Transformers keeps beside their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ringattn.arguments.values import LARGEST, flag, integer, integers, listed, number, path, shown
from ringattn.budget.model_shape import AttentionShape, Latent, LayerShape, MLPShape, ModelShape
from ringattn.geometry.layouts import named

SHIPPED = Path(__file__).parent / "shapes"
LARGEST_FILE = 1 << 22  # bytes of JSON
WIDEST = 1 << 24  # entries of a width, rows of a vocabulary
DEEPEST = 10_000  # layers
KINDS = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class Family:
    """What a `model_type` of Transformers has that Llama has not.

    windows: which layers have the config's `sliding_window` where no `layer_types` says so: "none", "all", "late"
        (those from `max_window_layers` on) or "most" (all but each `pattern`-th). With `use_sliding_window` false none.
    pattern: of "most"; `sliding_window_pattern` where a config has it.
    biases: of q, k and v, and of the output; None: both as `attention_bias` says.
    experts: the config's names of their number and of their inner width; None: there are none.
    defaults: of what the family's published configs leave out.
    """

    windows: str = "none"
    pattern: int = 0
    biases: tuple[bool, bool] | None = None
    norms: str | None = None
    layer_norms: int = 2
    experts: tuple[str, str] | None = None
    sinks: bool = False
    latent: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)


PLAIN = (False, False)
SWITCHED = {"use_sliding_window": False}
DEEPSEEK = Family(latent=True, experts=("n_routed_experts", "moe_intermediate_size"))
TIED = {"tie_word_embeddings": True}
GEMMA3 = Family(
    windows="most", pattern=6, norms="head", layer_norms=4,
    defaults={
        **TIED, "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096,
        "max_position_embeddings": 131_072,
    },
)  # fmt: skip

FAMILIES = {
    "llama": Family(),
    "mistral": Family(windows="all", biases=PLAIN),
    "ministral": Family(windows="all", biases=PLAIN),
    "mixtral": Family(windows="all", biases=PLAIN, experts=("num_local_experts", "intermediate_size")),
    "phi3": Family(windows="all", biases=PLAIN),
    "qwen2": Family(windows="late", biases=(True, False), defaults=SWITCHED),
    "qwen3": Family(windows="late", norms="head", defaults=SWITCHED),
    "qwen3_moe": Family(
        windows="all", norms="head", experts=("num_experts", "moe_intermediate_size"), defaults=SWITCHED
    ),
    "olmo2": Family(norms="width"),
    "olmo3": Family(windows="most", pattern=4, norms="width"),
    "gemma": Family(defaults=TIED),
    "gemma2": Family(windows="most", pattern=2, layer_norms=4, defaults=TIED),
    "gemma3_text": GEMMA3,
    "gpt_oss": Family(
        windows="most", pattern=2, sinks=True, experts=("num_local_experts", "intermediate_size"),
        defaults={"attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
}  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts")  # one name for the other, as Transformers 5 writes them
NESTED = {"gemma3": "gemma3_text"}  # of a model of several parts, and of its `text_config` where that says none


def shipped() -> list[str]:
    """Names of the shapes that come along."""
    return sorted(file.stem for file in SHIPPED.glob("*.json"))


def model(name_or_path: str) -> ModelShape:
    """The shape of a model by its name (`shipped`), or by the path of a config.json or of its directory. ValueError
    for what is neither, with the nearest name."""
    given = path("model", name_or_path)
    return from_config(file_of(given), given)


def file_of(name_or_path: str) -> Path:
    """The config.json that `model` reads for a name or path, and raises the same for."""
    given = path("model", name_or_path)
    if given not in shipped():
        if given and Path(given).exists():
            return Path(given) / "config.json" if Path(given).is_dir() else Path(given)
        if given.endswith(".json") or "/" in given or "\\" in given:
            raise ValueError(
                f"model={given!r}: there is no such file; a shape that comes along is {', '.join(shipped())}"
            )
    return SHIPPED / f"{named('model', given, shipped())}.json"


def from_config(config: Mapping[str, Any] | str | Path, name: str | None = None) -> ModelShape:
    """The shape of the model that a Transformers config.json describes, given as a dict or by its path. Of a model of
    several parts, that of its text model. ValueError for one that cannot be read, a `model_type` that is not known,
    a field that is missing, or one that cannot be right."""
    if not isinstance(config, Mapping):
        return from_config(_read(Path(path("config", config))), name or str(config))
    label = name or _label(config)
    kind = config.get("model_type")
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return from_config({"model_type": NESTED.get(str(kind)), **text}, label)
    if kind is None:
        raise ValueError(f"{label}: model_type is missing: must be one of {', '.join(FAMILIES)}")
    family = FAMILIES[named(f"{label}: model_type", kind, list(FAMILIES))]
    return _Reader(label, {**family.defaults, **{k: v for k, v in config.items() if v is not None}}, family).model()


class _Reader:
    """A config's fields, each looked at when it is read."""

    def __init__(self, label: str, config: Mapping[str, Any], family: Family) -> None:
        self.label, self.config, self.family = label, config, family

    def model(self) -> ModelShape:
        width, windows = self.size("hidden_size"), self.windows(self.size("num_hidden_layers", DEEPEST))
        attention = {window: self.attention(width, window) for window in dict.fromkeys(windows)}
        sparse = [self.is_sparse(i) for i in range(len(windows))]
        mlps = {kind: self.experts() if kind else self.dense() for kind in dict.fromkeys(sparse)}
        pairs = list(zip(windows, sparse, strict=True))
        layers = {pair: LayerShape(attention[pair[0]], mlps[pair[1]]) for pair in dict.fromkeys(pairs)}
        return ModelShape(
            self.label,
            width,
            self.size("vocab_size"),
            tuple(layers[pair] for pair in pairs),
            self.flag("tie_word_embeddings"),
            self.family.layer_norms,
            self.size("max_position_embeddings", LARGEST) if "max_position_embeddings" in self.config else None,
            self.rope(),
        )

    def windows(self, layers: int) -> list[int | None]:
        """Of each layer."""
        if self.family.windows == "none" or not self.config.get("sliding_window") or not self.switched():
            return [None] * layers
        window, kinds = self.size("sliding_window", LARGEST), self.config.get("layer_types")
        if kinds is not None:
            return [window if kind == KINDS[0] else None for kind in self.layer_types(kinds, layers)]
        match self.family.windows:
            case "all":
                return [window] * layers
            case "late":
                first = self.size("max_window_layers", DEEPEST, 0)
                return [window if i >= first else None for i in range(layers)]
        pattern = self.size("sliding_window_pattern", DEEPEST, default=self.family.pattern)
        return [window if (i + 1) % pattern else None for i in range(layers)]

    def switched(self) -> bool:
        return "use_sliding_window" not in self.config or self.flag("use_sliding_window")

    def layer_types(self, kinds: Any, layers: int) -> list[Any]:
        found = listed(f"{self.label}: layer_types", kinds, "names of kinds of layers")
        if len(found) != layers:
            self.refuse("layer_types", f"has {len(found)} entries, and num_hidden_layers is {layers}: give one a layer")
        for kind in found:
            if kind not in KINDS:
                self.refuse("layer_types", f"has {shown(kind)}: what is known is {' and '.join(KINDS)}")
        return found

    def attention(self, width: int, window: int | None) -> AttentionShape:
        heads = self.size("num_attention_heads")
        bias, output_bias = self.family.biases or (self.flag("attention_bias"),) * 2
        if self.family.latent:
            low = {name: self.size(name) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim")}
            q_rank = self.size("q_lora_rank") if "q_lora_rank" in self.config else None
            latent = Latent(q_rank, low["kv_lora_rank"], low["qk_rope_head_dim"])
            key = low["qk_nope_head_dim"] + latent.rope_dim
            value = self.size("v_head_dim")
            return AttentionShape(heads, heads, key, value, window, bias, output_bias, latent=latent)
        kv_heads = self.size("num_key_value_heads", default=heads)
        if heads % kv_heads:
            self.refuse(
                "num_attention_heads", f"is {heads}, no multiple of num_key_value_heads, {kv_heads}: change one"
            )
        if "head_dim" not in self.config and width % heads:
            self.refuse("hidden_size", f"is {width}, no multiple of num_attention_heads, {heads}: give head_dim")
        size = self.size("head_dim", default=width // heads)
        family = self.family
        return AttentionShape(heads, kv_heads, size, size, window, bias, output_bias, family.norms, family.sinks)

    def is_sparse(self, i: int) -> bool:
        """Whether layer `i` has experts."""
        if self.family.experts is None:
            return False
        dense = self.config.get("mlp_only_layers", ())
        step = self.size("decoder_sparse_step", DEEPEST, default=1)
        first = self.size("first_k_dense_replace", DEEPEST, 0, default=0)
        return i >= first and (i + 1) % step == 0 and i not in integers(f"{self.label}: mlp_only_layers", dense)

    def dense(self) -> MLPShape:
        return MLPShape(self.size("intermediate_size"), bias=self.flag("mlp_bias"))

    def experts(self) -> MLPShape:
        assert self.family.experts is not None
        number, inner = self.family.experts
        number = next((name for name in (number, *EXPERTS) if name in self.config), number)
        experts, active = self.size(number), self.size("num_experts_per_tok")
        if active > experts:
            self.refuse("num_experts_per_tok", f"is {active}, and {number} is {experts}: must be at most so many")
        one = self.size(inner)
        shared = self.size("n_shared_experts", 1 << 10, 0, default=0) * one
        return MLPShape(one, True, experts, active, shared, self.flag("mlp_bias"))

    def rope(self) -> dict[str, Any]:
        """As Transformers 5 writes it, out of what earlier versions did."""
        scaling = self.config.get("rope_parameters", self.config.get("rope_scaling", {}))
        if not isinstance(scaling, Mapping):
            self.refuse("rope_scaling", f"is {shown(scaling)}: must be an object")
        theta = {name: self.config[name] for name in ("rope_theta",) if name in self.config}
        found = {"rope_type": "default", **theta, **scaling}
        for each in [value for value in scaling.values() if isinstance(value, Mapping)] or [found]:
            for name, least in (("factor", 1e-6), ("original_max_position_embeddings", 1)):
                if name in each:
                    number(f"{self.label}: {name}", each[name], least, LARGEST)
        return dict(scaling) if any(isinstance(value, Mapping) for value in scaling.values()) else found

    def size(self, name: str, most: int = WIDEST, least: int = 1, default: int | None = None) -> int:
        value = self.config.get(name, default)
        if value is None:
            self.refuse(name, f"is missing: a config.json of model_type {self.config['model_type']!r} must have it")
        return integer(f"{self.label}: {name}", value, least, most)

    def flag(self, name: str) -> bool:
        return flag(f"{self.label}: {name}", self.config.get(name, False))

    def refuse(self, name: str, text: str) -> NoReturn:
        raise ValueError(f"{self.label}: {name} {text}")


def _read(file: Path) -> dict[str, Any]:
    """The object in a config.json, or in the one of a directory."""
    file = file / "config.json" if file.is_dir() else file
    try:
        if file.stat().st_size > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE:,} bytes")
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it is {shown(found)}, no object")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read: {error}; give the path of a model's config.json") from None
    return found


def _label(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    return str(config.get("_name_or_path") or (classes[0] if isinstance(classes, list) and classes else "config"))
