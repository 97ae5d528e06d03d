"""The settings of a training run: frozen dataclasses read from a TOML file, where an unknown key, a wrong
type or a value that cannot work is refused before anything else happens. The effective settings are written
back as TOML into the run's directory, so that a run can be resumed from its directory alone."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from launch import engines
from launch.rates import OptimizerConfig
from launch.rules import COUNT, SEED, SIZE, Rule, check, check_choice, integer, nearest, number, shown
from launch.tables import build, parse

CONFIGS = Path(__file__).parent / "configs"
DTYPES = ("float32", "float64", "bfloat16")
RESIDUALS = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")
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
DEEPSPEED = {"stage": integer(1, 3, 1)}
LENGTHS = {"median": integer(2, COUNT, 1000), "sigma": number(0, 8, 1.0)}
RECALL = {
    "pairs": integer(1, SIZE, 4),
    "keys": integer(1, 254, 16),
    "values": integer(2, 254, 16),
    "tokens": integer(1, 2**30, 2048),
    "enough": number(0, 1, 0.98, above=True, below=True),
    "questions": integer(1, COUNT, 200),
}
STAGE = {
    "steps": integer(1, COUNT, 100),
    "seqlen": integer(2, COUNT, 4096),
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
    "max_logit": integer(0, COUNT, 10),
    "profile": Rule(
        lambda steps: steps == () or (len(steps) == 2 and 0 <= steps[0] <= steps[1]),
        "two whole numbers, the first and the last step to trace, counted from 1",
        [3, 5],
    ),
    "masks": Rule(lambda masks: len(masks) <= 10_000, "a list of at most 10,000 masks", ["causal()"]),
}


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
class DeepspeedConfig:
    """What engine "deepspeed" is told, and no other: the stage of ZeRO. (Stage 0 is what ddp does.)"""

    stage: int = 1

    def __post_init__(self) -> None:
        check(_values(self), DEEPSPEED, "deepspeed.")


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
class StageConfig:
    """Steps at the beginning of a run, behind those of the stages before, with sequences of another length. What is not
    given is as in the rest of the run, which follows the last stage with the run's own settings."""

    steps: int
    seqlen: int
    data_parallel: int | None = None
    accumulate: int | None = None
    ulysses: int | str | None = None

    def __post_init__(self) -> None:
        check(_values(self), STAGE, "ramp: ")

    @property
    def changes(self) -> dict[str, Any]:
        """What it puts in the place of the run's settings."""
        return {name: value for name, value in _values(self).items() if name != "steps" and value is not None}


@dataclass(frozen=True, slots=True)
class Config:
    """One run of `steps` steps, the last of them over sequences of `seqlen` tokens.

    ramp: stages of shorter sequences before that (`StageConfig`), in tables [[ramp]].
    masks: texts in the library's mask algebra, one per layer, repeated over the depth; of those that let a token see
    later ones a run warns, as targets are the next tokens. model, or hf: the built-in decoder, or the path of a
    Transformers config.json, whose masks are its own. documents: no token sees another document; lengths: cut the text
    into such. engine: ddp (parameters on every rank), fsdp (sharded over all ranks) or deepspeed (ZeRO, see
    [deepspeed]).
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
    all of a layer but attention is computed, and again in backward, in so many pieces of a shard's tokens.
    tensorboard: the metrics are written for TensorBoard too. max_logit: in the first step and every so many-th behind
    it the largest logit of attention is among them, which costs another product of q and k there; 0 for never. profile:
    the first and the last step, as the metrics count them, of which each rank writes traces.
    offload: what backward needs of the layers is meanwhile in pinned memory of a GPU's host (true), or in files of a
    directory (its path); with recompute the decoder's layers then put away their q, k and v, too, and compute the rest
    again.
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
    ramp: tuple[StageConfig, ...] = ()
    engine: str = "ddp"
    deepspeed: DeepspeedConfig | None = None
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
    tensorboard: bool = False
    max_logit: int = 0
    profile: tuple[int, ...] = ()
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
        self._check_model()
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
        check_choice("engine", self.engine, engines.NAMES)
        if self.engine == "deepspeed" and self.dtype == "float64":
            raise ValueError(
                "engine is 'deepspeed' with dtype 'float64', but ZeRO keeps weights and sums in float32; set dtype = "
                '"float32", or another engine'
            )
        check_choice("transport", self.transport, TRANSPORTS)
        self._check_ramp()

    def _check_model(self) -> None:
        """One model, and the masks of its layers."""
        if (self.model is None) == (not self.hf):
            given = "neither" if self.model is None else f"both, hf = {shown(self.hf)},"
            raise ValueError(
                f"{given} of [model] and hf is given; give either a table [model], which --model hf:PATH replaces, "
                "or hf, the path of a Transformers config.json"
            )
        if self.model is not None and not self.masks:
            raise ValueError('masks is empty; name at least one, for instance masks = ["causal()"]')
        if self.model is not None and len(self.masks) > self.model.num_layers:
            raise ValueError(
                f"{len(self.masks)} masks for model.num_layers {self.model.num_layers}; a layer has one each, repeated "
                "over the depth: leave some out"
            )
        if self.hf and self.masks:
            raise ValueError(f"masks are given, but those of {shown(self.hf)} are its own; leave masks out")

    def _check_ramp(self) -> None:
        if self.ramp and self.recall:
            raise ValueError("[recall] makes its sequences longer by itself; leave out [[ramp]]")
        for index, stage in enumerate(self.ramp):
            if stage.seqlen > self.seqlen:
                raise ValueError(
                    f"ramp[{index}].seqlen is {stage.seqlen} and seqlen {self.seqlen}, which is the longest and comes "
                    f"last; set seqlen = {stage.seqlen}, or a shorter stage"
                )
            try:
                replace(self, ramp=(), **stage.changes)
            except ValueError as error:
                raise ValueError(f"ramp[{index}]: {error}") from None

    def stages(self) -> Iterator[tuple[int, "Config"]]:
        """The first step of each stage, and the settings it has; the last one's are the run's own, and have no end."""
        first = 0
        for stage in self.ramp:
            yield first, replace(self, ramp=(), **stage.changes)
            first += stage.steps
        yield first, replace(self, ramp=())

    def at(self, step: int) -> "Config":
        """The settings of the step that has so many behind it."""
        return self.since(step)[0]

    def since(self, step: int) -> list["Config"]:
        """Those of a step and of the stages behind it."""
        stages = list(self.stages())
        index = max(index for index, (first, _) in enumerate(stages) if first <= step)
        return [stage for _, stage in stages[index:]]

    def traces(self, step: int) -> bool:
        """Whether traces are asked for of the step that has so many behind it. (A 0 is of a config of an earlier
        version, which counted from there.)"""
        return bool(self.profile) and max(1, self.profile[0]) <= step + 1 <= max(1, self.profile[1])

    def watches_logits(self, step: int) -> bool:
        """Whether the step that has so many behind it looks for the largest logit."""
        return bool(self.max_logit) and step % self.max_logit == 0

    def tokens(self, first: int = 0) -> int:
        """Of all steps from `first` on."""
        begins, stages = zip(*self.stages(), strict=True)
        ends = [min(end, self.steps) for end in (*begins[1:], self.steps)]
        counts = [max(0, end - max(begin, first)) for begin, end in zip(begins, ends, strict=True)]
        return sum(count * stage.tokens_a_step for count, stage in zip(counts, stages, strict=True))

    @property
    def tokens_a_step(self) -> int:
        """Without the ramp."""
        return self.seqlen * self.data_parallel * self.accumulate

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
        if self.hf and (self.token_chunks != 1 or self.residual != "float32" or self.max_logit):
            raise ValueError(
                f"token_chunks, residual and max_logit are of the decoder in [model]; {shown(self.hf)} "
                "has layers of its own: leave them out"
            )

    @property
    def keeps_documents_apart(self) -> bool:
        """Cutting text into documents is for keeping them apart."""
        return self.documents or self.lengths is not None


def check_heads(ulysses: int | str, heads: int) -> None:
    """Raises ValueError where a rank would have no head to compute."""
    if isinstance(ulysses, int) and ulysses > heads:
        raise ValueError(
            f"ulysses is {ulysses} and the model has {heads} query heads, of which each rank computes some; set at "
            f'most {heads}, or "auto"'
        )


def check_profile(config: Config) -> None:
    """Raises ValueError where no step is traced. Apart from the other rules, for what is asked of a run that has its
    steps done already is another matter."""
    if config.profile and config.profile[0] > config.steps:
        raise ValueError(
            f"profile is {list(config.profile)} in {config.steps} step{'' if config.steps == 1 else 's'}; set earlier "
            f"ones, for instance [{config.steps}, {config.steps}], or leave it out"
        )


def _values(settings: Any) -> dict[str, Any]:
    return {entry.name: getattr(settings, entry.name) for entry in fields(settings)}


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
        return build(Config, parse(path.read_text(encoding="utf-8-sig")), "")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is no UTF-8 text; save the config as UTF-8") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
