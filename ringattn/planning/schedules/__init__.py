"""The schedules. A new one is a file and its place in ``SCHEDULES``."""

from ringattn.planning.schedules.base import Flow, Schedule, Step, Transfer, room_of
from ringattn.planning.schedules.double_ring import DOUBLE_RING
from ringattn.planning.schedules.exchange import EXCHANGE
from ringattn.planning.schedules.gather import GATHER, HEAD_CHUNKS
from ringattn.planning.schedules.ring import RING

SCHEDULES: tuple[Schedule, ...] = (RING, EXCHANGE, GATHER, DOUBLE_RING)


def by_name(name: str) -> Schedule:
    return next(schedule for schedule in SCHEDULES if schedule.name == name)


__all__ = ["HEAD_CHUNKS", "SCHEDULES", "Flow", "Schedule", "Step", "Transfer", "by_name", "room_of"]
