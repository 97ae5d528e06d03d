"""The settings of a training run: frozen dataclasses read from a TOML file, where an unknown key, a wrong
type or a value that cannot work is refused before anything else happens. The effective settings are written
back as TOML into the run's directory, so that a run can be resumed from its directory alone."""

import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

CONFIGS = Path(__file__).parent / "configs"
DTYPES = ("float32", "float64", "bfloat16")
DEVICES = ("cpu", "cuda")
ENGINES = ("ddp", "fsdp")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes of the decoder. `d_ff` is the inner width of SwiGLU, in each of its two halves."""

    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    rope_base: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("d_model", "num_layers", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads is {self.num_heads}, no multiple of model.num_kv_heads {self.num_kv_heads}: "
                "every KV head must serve as many query heads; change one of them"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; RoPE rotates pairs, so it must be even")


@dataclass(frozen=True, slots=True)
class OptimizerConfig:
    """AdamW with a linear warm-up of `warmup` steps and a cosine down to `final_lr` of `lr` at the last
    step."""

    lr: float
    warmup: int
    final_lr: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf or not self.clip > 0:
            raise ValueError(f"optimizer.lr {self.lr} and optimizer.clip {self.clip} must be numbers above 0")
        if self.warmup < 0:
            raise ValueError(f"optimizer.warmup is {self.warmup}; it is a number of steps, 0 or more")
        if len(self.betas) != 2:
            raise ValueError(f"optimizer.betas is {list(self.betas)}; AdamW takes two")

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, steps - 1 - self.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        return self.lr * (self.final_lr + (1 - self.final_lr) * cosine)


@dataclass(frozen=True, slots=True)
class LengthsConfig:
    """Lengths of documents that the text is cut into before it is packed: log-normal, as those of crawled text are,
    half of them above `median` tokens; one in six is longer than `median * exp(sigma)`. Files stay apart too."""

    median: int
    sigma: float = 1.0

    def __post_init__(self) -> None:
        if self.median < 2 or self.sigma < 0:
            raise ValueError(f"lengths.median {self.median} must be at least 2, lengths.sigma {self.sigma} at least 0")


@dataclass(frozen=True, slots=True)
class RecallConfig:
    """The recall task instead of text: `pairs` of a key and a value begin the sequence, filling follows, and its end
    asks for the value of every key. Sequences grow from the shortest possible to `seqlen`, twice as long once
    `enough` of the answers are right; about `tokens` tokens a sample, in rows. After the run `questions` new ones are
    asked at full length, with the ring and with attention cut at the borders of the shards."""

    pairs: int = 4
    keys: int = 16
    values: int = 16
    tokens: int = 2048
    enough: float = 0.98
    questions: int = 200

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("keys", self.pairs), ("values", 2), ("tokens", 1), ("questions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"recall.{name} is {getattr(self, name)}; it must be at least {least}")
        if not 0 < self.enough < 1:
            raise ValueError(f"recall.enough is {self.enough}; it is a share of the answers, between 0 and 1")


@dataclass(frozen=True, slots=True)
class Config:
    """One run.

    masks: texts in the library's mask algebra, one per layer, repeated over the depth. model, or hf: the built-in
    decoder, or the path of a Transformers config.json, whose masks are its own. documents: no token sees another
    document; lengths: cut the text into such. engine: ddp (parameters on every rank) or fsdp (sharded over all ranks).
    data_parallel: replicas of the context; the other ranks share each sequence. accumulate: samples of a replica in a
    step. loss_chunks: the logits of a shard are computed in so many pieces. dtype: float32 or float64 is the dtype of
    everything, bfloat16 means autocast over fp32 parameters."""

    name: str
    seqlen: int
    steps: int
    optimizer: OptimizerConfig
    masks: tuple[str, ...] = ()
    model: ModelConfig | None = None
    hf: str = ""
    documents: bool = False
    lengths: LengthsConfig | None = None
    recall: RecallConfig | None = None
    engine: str = "ddp"
    data_parallel: int = 1
    accumulate: int = 1
    loss_chunks: int = 8
    data: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str = "float32"
    recompute: bool = False
    layout: str = "auto"
    schedule: str = "auto"
    kernel: str = "auto"
    save_every: int = 0
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        leasts = {"seqlen": 2, "save_every": 0, "seed": 0}
        leasts |= dict.fromkeys(("steps", "data_parallel", "accumulate", "loss_chunks"), 1)
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.loss_chunks > self.seqlen:
            raise ValueError(f"loss_chunks is {self.loss_chunks} for {self.seqlen} tokens; it is a number of chunks")
        if (self.model is None) == (not self.hf):
            raise ValueError("give either a table [model] or hf, the path of a Transformers config.json")
        if self.model is not None and not self.masks:
            raise ValueError('masks is empty; name at least one, for instance masks = ["causal()"]')
        if self.hf and self.masks:
            raise ValueError(f"masks are given, but those of {self.hf} are its own; leave masks out")
        if self.recall and (self.documents or self.lengths or self.data):
            raise ValueError("[recall] makes its own sequences; leave out data, documents and [lengths]")
        if self.recall and self.layout != "contiguous":
            raise ValueError(
                f"layout is {self.layout!r}; [recall] wants its pairs on the first rank and its questions on the last: "
                'set layout = "contiguous"'
            )
        if self.recall and self.recall.pairs * 4 > self.seqlen:
            raise ValueError(f"recall.pairs {self.recall.pairs} take {4 * self.recall.pairs} tokens of {self.seqlen}")
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("engine", self.engine, ENGINES)

    @property
    def keeps_documents_apart(self) -> bool:
        """Cutting text into documents is for keeping them apart."""
        return self.documents or self.lengths is not None


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError naming the nearest of `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}{nearest(value, choices)}; known: {', '.join(choices)}")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """' (did you mean ...?)' or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]!r}?)" if found else ""


def find_config(name: str) -> Path:
    """The file of a shipped config such as 'cpu-128k', or of a path that ends in .toml."""
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    if path.is_file():
        return path
    shipped = sorted(p.stem for p in CONFIGS.glob("*.toml"))
    raise ValueError(
        f"no config {name!r}{nearest(name, shipped)}; shipped: {', '.join(shipped)}; or give the path of a .toml file"
    )


def load(path: Path) -> Config:
    """Reads a TOML file. Raises ValueError naming the file for syntax, unknown or missing keys and bad
    values."""
    try:
        return _build(Config, tomllib.loads(path.read_text()), "")
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {error}") from None


def dump(config: Config) -> str:
    """TOML text from which `load` makes an equal config."""
    values = {key: value for key, value in asdict(config).items() if value is not None}
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in values.items() if key not in tables]
    for table, entries in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {_toml(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """A value as TOML, which is JSON but for infinity, characters beyond 16 bits and DEL."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    hints = typing.get_type_hints(cls)
    unknown = [key for key in values if key not in hints]
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}{nearest(unknown[0], hints)}; known: {', '.join(hints)}")
    arguments = {key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()}
    required = [f.name for f in fields(cls) if f.default is f.default_factory]  # type: ignore[arg-type]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ValueError(f"missing key {where}{missing[0]}")
    return cls(**arguments)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None: TOML has no None, so a value is an X
        hint = typing.get_args(hint)[0]
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {value!r}; it is a table, [{where}]")
        return _build(hint, value, f"{where}.")
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {value!r}; it is a list")
        item = typing.get_args(hint)[0]
        return tuple(_convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {value!r}; it must be {hint.__name__}")
    return value
