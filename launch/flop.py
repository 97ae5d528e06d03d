"""Model FLOP utilisation: the part of the devices' peak that a run makes use of (Chowdhery et al., 2022,
arXiv:2204.02311, appendix B). What is computed a second time in backward does not count."""

from __future__ import annotations

from launch.language import Language

# Dense bf16 FLOP/s by words of a device's name, from the vendor's datasheets: H100 SXM, H200 SXM and GH200 989 TFLOP/s
# (without sparsity), A100 312, B200 (HGX) 2,250.
PEAKS = {"h100": 989e12, "h200": 989e12, "gh200": 989e12, "a100": 312e12, "b200": 2250e12}
# Cards of those names with other clocks, or more than one of them.
OTHERS = ("pcie", "nvl", "gb200", "mig")


def model_flop(language: Language, tokens: int, pairs: int) -> int:
    """FLOP of one forward and backward pass, exactly: ``6 * matmuls * tokens + 6 * (head_dim + v_head_dim) * num_heads
    * pairs``. A parameter of a linear map is multiplied and added once for each token forward and twice backward; an
    attending pair's two products take ``2 * (head_dim + v_head_dim)`` a head forward and twice that backward. ``pairs``
    is the sum of the masks' areas over the layers. 0 where the model's linear maps are not known."""
    if language.matmuls is None:
        return 0
    shape = language.shape
    return 6 * language.matmuls * tokens + 6 * (shape.head_dim + shape.values) * shape.num_heads * pairs


def peak(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device, by the name its driver gives it; None where it is not known."""
    words = device.lower().replace("-", " ").split()
    if any(word in OTHERS for word in words):
        return None
    return next((PEAKS[word] for word in words if word in PEAKS), None)
