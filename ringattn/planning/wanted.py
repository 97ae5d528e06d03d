"""Which gradients somebody wants of a call: frozen parameters, adapters and first layers leave some out. What nobody
wants is not moved, and not computed where a kernel can leave it out."""

from __future__ import annotations

from typing import NamedTuple


class Wanted(NamedTuple):
    """The inputs whose gradients are wanted. Those of sinks follow from a rank's own rows, and are none of these."""

    q: bool = True
    k: bool = True
    v: bool = True
    bias: bool = False

    @staticmethod
    def of(names: str) -> Wanted:
        """That of some of the letters q, k and v."""
        return Wanted(*(name in names for name in "qkv"))

    @property
    def inputs(self) -> tuple[bool, bool, bool]:
        """Of q, k and v."""
        return self.q, self.k, self.v

    def key_columns(self, head_dim: int, v_head_dim: int) -> int:
        """Numbers of a key's gradients, of one head."""
        return self.k * head_dim + self.v * v_head_dim

    def __str__(self) -> str:
        names = [name for name, wanted in zip(self._fields, self, strict=True) if wanted]
        return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:]))) or "none"


ALL_WANTED, NONE_WANTED = Wanted(), Wanted(False, False, False)
