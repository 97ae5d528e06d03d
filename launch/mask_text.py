"""Masks in a config: the library's own as text, but for documents, whose borders come from the data."""

from collections.abc import Iterator, Sequence

import ringattn
from launch.rules import shown
from ringattn import mask_text


def parse_mask(text: str) -> ringattn.Mask:
    """The mask that `text` describes; see `ringattn.mask_text`."""
    return mask_text.parse_mask(text, {"documents": "documents come from the text; set documents = true"})


def leaks(masks: Sequence[str], seqlen: int) -> Iterator[str]:
    """What is to be said of masks under which a token sees the next one, which it is to predict."""
    for text in dict.fromkeys(masks):
        mask = parse_mask(text)
        pairs = mask.area(seqlen, seqlen)
        ahead = pairs - (mask & ringattn.causal()).area(seqlen, seqlen)
        if ahead:
            yield (
                f"mask {shown(text)} lets tokens see later ones ({ahead:,} of its {pairs:,} pairs), and each token is "
                "to predict the next: a loss that falls then says what was read off, not what was learnt. For a "
                f"language model write {shown(f'({text}) & causal()')}"
            )
