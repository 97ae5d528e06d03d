"""The `triton` kernel: lists of tiles in one launch, forward and backward. Triton is imported when it computes."""

from ringattn.kernels.triton_tiles.kernel import Triton

__all__ = ["Triton"]
