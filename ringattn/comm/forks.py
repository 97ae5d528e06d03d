"""Which process groups are a forked process's own: what its parent had made at the fork is the parent's."""

from __future__ import annotations

import os
from weakref import WeakSet

import torch.distributed as dist
from torch.distributed import distributed_c10d

_inherited: WeakSet[dist.ProcessGroup] = WeakSet()


def _inherit() -> None:
    _inherited.update(distributed_c10d._world.pg_map)


os.register_at_fork(after_in_child=_inherit)


def check_own(group: object) -> None:
    """Raises RuntimeError for a group of the parent's, which a child would disturb."""
    if group in _inherited:
        raise RuntimeError(
            f"process {os.getpid()} was forked from one that had made this process group, which is its parent's alone: "
            "only the process that has made a group and its contexts can call them; a child (a DataLoader's worker) "
            "may shard"
        )
