"""The settings of a training run: frozen dataclasses read from a TOML file, where an unknown key, a wrong
type or a value that cannot work is refused before anything else happens. The effective settings are written
back as TOML into the run's directory, so that a run can be resumed from its directory alone."""

import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from launch.rules import COUNT, SEED, SIZE, Rule, check, integer, number, shown

CONFIGS = Path(__file__).parent / "configs"
DTYPES = ("float32", "float64", "bfloat16")
RESIDUALS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")
ENGINES = ("ddp", "fsdp")
TRANSPORTS = ("auto", "mpi")

LARGEST_FILE = 1 << 20  # bytes of TOML

MODEL = {
    **dict.fromkeys(("d_model", "num_heads", "num_kv_heads", "d_ff"), integer(1, SIZE, 8)),
    "num_layers": integer(1, 10_000, 2),
    "head_dim": Rule(
        lambda dim: type(dim) is int and 2 <= dim <= SIZE and dim % 2 == 0,
        f"a whole number from 2 to {SIZE}, even because RoPE rotates pairs",
        64,
    ),
    "rope_base": number(1, math.inf, 10000.0),
}
OPTIMIZER = {
    "lr": number(0, math.inf, 1e-3, above=True),
    "warmup": integer(0, COUNT, 10),
    "final_lr": number(0, 1, 0.1),
    "weight_decay": number(0, math.inf, 0.1),
    "betas": Rule(
        lambda betas: len(betas) == 2 and all(0 <= beta < 1 for beta in betas),
        "two numbers, each at least 0 and below 1",
        [0.9, 0.95],
    ),
    "clip": Rule(lambda clip: clip > 0, "a number above 0, inf for none", 1.0),
}
LENGTHS = {"median": integer(2, COUNT, 1000), "sigma": number(0, 8, 1.0)}
RECALL = {
    "pairs": integer(1, SIZE, 4),
    "keys": integer(1, 254, 16),
    "values": integer(2, 254, 16),
    "tokens": integer(1, 2**30, 2048),
    "enough": number(0, 1, 0.98, above=True, below=True),
    "questions": integer(1, COUNT, 200),
}
JOB = {
    "name": Rule(
        lambda name: (
            name.isprintable() and not name.startswith(".") and not set(name) & set("/\\") and 0 < len(name) <= 80
        ),
        "1 to 80 printable characters, without / and \\ and without a dot in front, because it names a directory",
        "my-run",
    ),
    "seqlen": integer(2, COUNT, 4096),
    "save_every": integer(0, COUNT, 100),
    "seed": integer(0, SEED),
    "steps": integer(1, COUNT, 100),
    "data_parallel": integer(1, SIZE),
    "accumulate": integer(1, SIZE),
    "loss_chunks": integer(1, COUNT, 8),
    "token_chunks": integer(1, COUNT, 8),
    "timeout": number(1, 10**6, 300.0),
    "ulysses": Rule(
        lambda ranks: ranks == "auto" or (type(ranks) is int and 1 <= ranks <= SIZE),
        f'a whole number from 1 to {SIZE}, or "auto"',
        1,
    ),
    "masks": Rule(lambda masks: len(masks) <= 10_000, "a list of at most 10,000 masks", ["causal()"]),
}

KINDS = {
    int: "int, a whole number, for instance 1",
    float: "float, a number, for instance 0.1",
    str: 'str, text in quotes, for instance "x"',
    bool: "bool, one of true and false",
}

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
        check(_values(self), MODEL, "model.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"model.num_heads is {self.num_heads}, no multiple of model.num_kv_heads {self.num_kv_heads}: "
                "every KV head must serve as many query heads; change one of them"
            )


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
        check(_values(self), OPTIMIZER, "optimizer.")
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay!r} at optimizer.lr {self.lr!r}; AdamW multiplies "
                "weights by 1 - lr * weight_decay, which must be above 0: set a smaller one, for instance 0.1"
            )

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
        check(_values(self), LENGTHS, "lengths.")


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
        check(_values(self), RECALL, "recall.")
        if self.keys < self.pairs:
            raise ValueError(
                f"recall.keys is {self.keys} for recall.pairs {self.pairs}; each pair takes a key: set more"
            )


@dataclass(frozen=True, slots=True)
class Config:
    """One run.

    masks: texts in the library's mask algebra, one per layer, repeated over the depth. model, or hf: the built-in
    decoder, or the path of a Transformers config.json, whose masks are its own. documents: no token sees another
    document; lengths: cut the text into such. engine: ddp (parameters on every rank) or fsdp (sharded over all ranks).
    layout, schedule, ulysses, kernel: of the context (`ringattn.ContextParallel`): how a sequence lies over its ranks,
    how K/V travels (double_ring where the launcher tells of several nodes), over how many neighbours heads are split
    ("auto": by cost), and what computes.
    transport: what attention's messages go over, auto (shared memory, gloo or NCCL) or mpi, where mpiexec has started
    the ranks; all else goes over gloo or NCCL. data_parallel: replicas of the context; the other ranks share each
    sequence. accumulate: samples of a replica in a step. loss_chunks: the logits of a shard are computed in so many
    pieces. timeout: seconds that a rank waits for another, anywhere, before it says for whom and ends. dtype: float32
    or float64 is the dtype of everything, bfloat16 means autocast over fp32 parameters; residual: what is held of a
    token between layers then.
    recompute: a layer keeps its input and attention's result, and computes the rest again in backward. token_chunks:
    all of a layer but attention is computed, and again in backward, in so many pieces of a shard's tokens. offload:
    what backward needs of the layers is meanwhile in pinned memory of a GPU's host (true), or in files of a directory
    (its path); with recompute the decoder's layers then put away their q, k and v, too, and compute the rest again.
    share_gpus: more ranks of one machine than it has GPUs share these, over sockets, which is slow: for tests."""

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
    residual: str = "float32"
    recompute: bool = False
    token_chunks: int = 1
    offload: bool | str = False
    share_gpus: bool = False
    layout: str = "auto"
    schedule: str = "auto"
    ulysses: int | str = 1
    transport: str = "auto"
    kernel: str = "auto"
    save_every: int = 0
    timeout: float = 300.0
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        check(_values(self), JOB)
        for name in ("loss_chunks", "token_chunks"):
            if getattr(self, name) > self.seqlen:
                raise ValueError(
                    f"{name} is {getattr(self, name)} for {self.seqlen} tokens; it is a number of chunks: set at most "
                    "as many as tokens, for instance 8"
                )
        if (self.model is None) == (not self.hf):
            given = "neither" if self.model is None else f"both, hf = {shown(self.hf)},"
            raise ValueError(
                f"{given} of [model] and hf is given; give either a table [model], which --model hf:PATH replaces, "
                "or hf, the path of a Transformers config.json"
            )
        if self.model is not None and not self.masks:
            raise ValueError('masks is empty; name at least one, for instance masks = ["causal()"]')
        if self.hf and self.masks:
            raise ValueError(f"masks are given, but those of {shown(self.hf)} are its own; leave masks out")
        if self.recall and (self.documents or self.lengths or self.data):
            raise ValueError("[recall] makes its own sequences; leave out data, documents and [lengths]")
        if self.recall and self.layout != "contiguous":
            raise ValueError(
                f"layout is {self.layout!r}; [recall] wants its pairs on the first rank and its questions on the last: "
                'set layout = "contiguous"'
            )
        if self.recall and self.recall.pairs * 4 > self.seqlen:
            raise ValueError(
                f"recall.pairs {self.recall.pairs} take {4 * self.recall.pairs} tokens of {self.seqlen}; set fewer, or "
                "a larger seqlen"
            )
        if self.model is not None:
            check_heads(self.ulysses, self.model.num_heads)
        check_choice("device", self.device, DEVICES)
        check_choice("dtype", self.dtype, DTYPES)
        self._check_how()
        check_choice("engine", self.engine, ENGINES)
        check_choice("transport", self.transport, TRANSPORTS)

    def _check_how(self) -> None:
        """How the built-in decoder's layers are computed, and on whose GPU."""
        if self.share_gpus and self.device != "cuda":
            raise ValueError(f'share_gpus is set with device {self.device!r}; leave it out, or set device = "cuda"')
        if self.offload is True and self.device != "cuda":
            raise ValueError(
                f"offload is true with device {self.device!r}, which has no other memory: give the path of a directory"
            )
        check_choice("residual", self.residual, RESIDUALS)
        if self.residual != "float32" and self.dtype != "bfloat16":
            raise ValueError(
                f"residual is {self.residual!r} with dtype {self.dtype!r}, which is that of everything; leave it out, "
                'or set dtype = "bfloat16"'
            )
        if self.hf and (self.token_chunks != 1 or self.residual != "float32"):
            raise ValueError(
                f"token_chunks and residual are of the decoder in [model]; {shown(self.hf)} has layers of its own: "
                "leave them out"
            )

    @property
    def keeps_documents_apart(self) -> bool:
        """Cutting text into documents is for keeping them apart."""
        return self.documents or self.lengths is not None


def _values(settings: Any) -> dict[str, Any]:
    return {entry.name: getattr(settings, entry.name) for entry in fields(settings)}


def check_heads(ulysses: int | str, heads: int) -> None:
    """Raises ValueError where a rank would have no head to compute."""
    if isinstance(ulysses, int) and ulysses > heads:
        raise ValueError(
            f"ulysses is {ulysses} and the model has {heads} query heads, of which each rank computes some; set at "
            f'most {heads}, or "auto"'
        )


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ValueError naming the nearest of `choices` unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"unknown {what} {shown(value)}{nearest(value, choices)}; known: {', '.join(choices)}")


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
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"{path.stat().st_size:,} bytes are no config; give a file of at most {LARGEST_FILE:,}")
        return _build(Config, _parse(path.read_text(encoding="utf-8-sig")), "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8 text; save the config as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parse(text: str) -> dict[str, Any]:
    """TOML. Raises ValueError with the line, what is wrong with it, and the rule."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        lines = text.splitlines()
        line = lines[int(found[1]) - 1] if found and int(found[1]) <= len(lines) else ""
        raise ValueError(
            f"{shown(line.strip())} is no TOML: {error}; a key or table is given once, as key = value, text in quotes: "
            "correct that line"
        ) from None
    except (RecursionError, ValueError) as error:  # the latter of a number with thousands of digits
        raise ValueError(f"is no TOML that can be read: {error}; use fewer brackets, or shorter numbers") from None


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
        key = shown(unknown[0])[1:-1]
        raise ValueError(f"unknown key {where}{key}{nearest(unknown[0], hints)}; known: {', '.join(hints)}")
    arguments = {key: _convert(value, hints[key], f"{where}{key}") for key, value in values.items()}
    required = [f.name for f in fields(cls) if f.default is f.default_factory]  # type: ignore[arg-type]
    missing = [name for name in required if name not in arguments]
    if missing:
        raise ValueError(f"missing key {where}{missing[0]}; it has no default: set it")
    return cls(**arguments)


def _convert(value: Any, hint: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # X | None: TOML has no None, so a value is an X; or X | Y
        kinds = typing.get_args(hint)
        hint = type(value) if type(value) in kinds else kinds[0]
    if isinstance(hint, type) and hasattr(hint, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {shown(value)}; it must be a table: write [{where}] and its keys below it")
        return _build(hint, value, f"{where}.")
    if isinstance(hint, types.GenericAlias):
        if not isinstance(value, list):
            raise ValueError(f"{where} is {shown(value)}; it must be a list: put it in brackets")
        item = typing.get_args(hint)[0]
        return tuple(_convert(entry, item, f"{where}[{i}]") for i, entry in enumerate(value))
    if hint is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {shown(value)}; it must be {KINDS[hint]}")
    return value
