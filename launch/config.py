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
        if self.lr <= 0 or self.clip <= 0:
            raise ValueError(f"optimizer.lr {self.lr} and optimizer.clip {self.clip} must be above 0")
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
class Config:
    """One run. `masks` are texts in the library's mask algebra, one per layer, repeated over the depth;
    `dtype` float32 or float64 is the dtype of everything, bfloat16 means autocast over fp32 parameters."""

    name: str
    seqlen: int
    steps: int
    masks: tuple[str, ...]
    model: ModelConfig
    optimizer: OptimizerConfig
    documents: bool = False
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
        for name, least in (("seqlen", 2), ("steps", 1), ("save_every", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.masks:
            raise ValueError('masks is empty; name at least one, for instance masks = ["causal()"]')
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)


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
    values = asdict(config)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if key not in tables]
    for table, entries in tables.items():
        lines += ["", f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in entries.items())]
    return "\n".join(lines) + "\n"


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
