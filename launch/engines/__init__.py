"""How the parameters of a run lie on its ranks, and who updates them: one file an engine, found by its name."""

from typing import TYPE_CHECKING

from launch.engines.base import MODEL, OPTIMIZER, Engine, Part, Read, weights_of
from launch.engines.ddp import Ddp
from launch.engines.deepspeed import Deepspeed
from launch.engines.fsdp import Fsdp
from launch.engines.plain import Plain

if TYPE_CHECKING:
    from launch.config import Config
    from launch.language import Objective
    from launch.processes import World

__all__ = ["ENGINES", "MODEL", "NAMES", "OPTIMIZER", "Engine", "Part", "Read", "make_engine", "weights_of"]

ENGINES: tuple[type[Engine], ...] = (Ddp, Fsdp, Deepspeed)
NAMES = tuple(engine.name for engine in ENGINES)


def make_engine(objective: "Objective", config: "Config", world: "World") -> Engine:
    """The config's engine. A single process has all parameters to itself, whatever the engine."""
    if world.mesh is None:
        return Plain(objective, config, world)
    return next(engine for engine in ENGINES if engine.name == config.engine)(objective, config, world)
