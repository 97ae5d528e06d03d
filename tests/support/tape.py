"""CUDA graphs on the CPU: what is captured is a tape of operators with the very tensors they were given, and a replay
runs them again, host code left out. So an input that moved and was not copied, a result that escaped, or a decision
that took a value along shows as wrong numbers."""

import math
from contextlib import ExitStack

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")  # what a stream that is captured forbids


def tensors(tree):
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


class Tape(TorchDispatchMode):
    """As `torch.cuda.CUDAGraph`. What operators make while it is captured is poisoned: only a replay computes it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.ops, self.made = device, [], []

    def capture_begin(self, pool, capture_error_mode):
        assert capture_error_mode == "thread_local" and not self.device.capturing
        self.device.capturing = True
        self.__enter__()

    def capture_end(self):
        assert self.device.capturing
        self.device.capturing = False
        self.__exit__(None, None, None)
        for x in self.made:
            if x.is_floating_point():
                x.fill_(math.nan)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name() in WAITS:
            return NotImplemented  # an error where it was called
        known = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        self.made += [x for x in tensors(out) if x.untyped_storage().data_ptr() not in known]
        self.ops.append((func, args, kwargs, out))
        return out

    def __deepcopy__(self, memo):
        raise TypeError("cannot copy a graph")

    def replay(self):
        self.device.replays += 1
        for func, args, kwargs, out in self.ops:
            for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Taping:
    """A device that captures on the CPU. ``queue``: the stream that calls are made on, None while it is captured."""

    def __init__(self):
        self.queue, self.capturing, self.replays, self.graphs, self.pools = 1, False, 0, 0, 0

    def refuse(self, device, transport):
        return None

    def name(self, device):
        return device.type

    def stream(self, device):
        return self.queue

    def aside(self, device):
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(False))  # as memory of graphs has no mode
        stack.enter_context(torch.no_grad())
        return stack

    def graph(self):
        self.graphs += 1
        return Tape(self)

    def pool(self):
        self.pools += 1
        return self.pools

    def unowned(self, tensor):
        return tensor


def taped(cp):
    """The context, whose calls are captured on tapes."""
    cp._shared.graphs.device = Taping()
    return cp


def series(cp):
    """What the context's graphs know of calls so far, by the name of the loop."""
    return [one for call in cp.binding._prepared.values() for one in cp.binding.graphs._known.get(call, {}).values()]


def captured(cp):
    """What is captured now."""
    return list(cp.binding.graphs._kept.values())
