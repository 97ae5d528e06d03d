"""Transports: how tensors travel between ranks, and how ranks make sure that they do the same thing.

``MPITransport`` is here too, and starts MPI when it is first asked for.
"""

from typing import TYPE_CHECKING

from ringattn.comm.agreement import agree
from ringattn.comm.calls import TORN, CallLog, CallMismatch, PeerError, together, told
from ringattn.comm.label import Kind, Label
from ringattn.comm.loopback import Loopback, LoopbackTransport
from ringattn.comm.meeting import Meeting
from ringattn.comm.planning_rank import PlanningRank
from ringattn.comm.process_group import ProcessGroupTransport
from ringattn.comm.shared_memory import SharedMemoryTransport, transport_over
from ringattn.comm.subset import Subset
from ringattn.comm.transport import Allocator, Homeward, Pending, Solo, Transport, empty
from ringattn.comm.watch import Unwaited, Watch, Watching

__all__ = [
    "TORN",
    "Allocator",
    "CallLog",
    "CallMismatch",
    "Homeward",
    "Kind",
    "Label",
    "Loopback",
    "LoopbackTransport",
    "Meeting",
    "PeerError",
    "Pending",
    "PlanningRank",
    "ProcessGroupTransport",
    "SharedMemoryTransport",
    "Solo",
    "Subset",
    "Transport",
    "Unwaited",
    "Watch",
    "Watching",
    "agree",
    "empty",
    "together",
    "told",
    "transport_over",
]

if TYPE_CHECKING:
    from ringattn.comm.mpi import MPITransport as MPITransport
else:

    def __getattr__(name):
        """What wants a package of its own."""
        if name == "MPITransport":
            from ringattn.comm.mpi import MPITransport

            return MPITransport
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
