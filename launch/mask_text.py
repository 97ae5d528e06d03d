"""Masks in a config: the library's own as text, but for documents, whose borders come from the data."""

import ringattn
from ringattn import mask_text


def parse_mask(text: str) -> ringattn.Mask:
    """The mask that `text` describes; see `ringattn.mask_text`."""
    return mask_text.parse_mask(text, {"documents": "documents come from the text; set documents = true"})
