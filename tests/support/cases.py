"""Masks with an independent definition each: a predicate on positions, written from the contract."""

import numpy as np

import ringattn as ra

SEQLEN = 29
CU = (0, 3, 3, 10, 17, SEQLEN)


def same_document(q, k, bounds=CU):
    return np.searchsorted(bounds, q, "right") == np.searchsorted(bounds, k, "right")


# name: (mask, predicate)
SIMPLE = {
    "full": (ra.full(), lambda q, k: (q >= 0) & (k >= 0)),
    "causal": (ra.causal(), lambda q, k: k <= q),
    "window": (ra.sliding_window(5), lambda q, k: (q - 5 <= k) & (k <= q)),
    "two_sided": (ra.sliding_window(3, 4), lambda q, k: (q - 3 <= k) & (k <= q + 4)),
    "right_only": (ra.sliding_window(None, 2), lambda q, k: k <= q + 2),
    "left_only": (ra.sliding_window(2, None), lambda q, k: k >= q - 2),
    "global_count": (ra.global_tokens(3), lambda q, k: (q < 3) | (k < 3)),
    "global_scattered": (
        ra.global_tokens([1, 4, 5, 11]),
        lambda q, k: np.isin(q, [1, 4, 5, 11]) | np.isin(k, [1, 4, 5, 11]),
    ),
    "prefix": (ra.prefix_lm(7), lambda q, k: (k <= q) | (k < 7)),
    "chunked": (ra.chunked(6), lambda q, k: q // 6 == k // 6),
    "strided": (ra.strided(3), lambda q, k: (q - k) % 3 == 0),
    "dilated": (ra.dilated(2, 3), lambda q, k: np.isin(q - k, [0, 2, 4, 6])),
}
DOCUMENTS = {"documents": (ra.documents(CU), same_document)}
COMBINED = {
    "documents_causal": (ra.documents(CU) & ra.causal(), lambda q, k: same_document(q, k) & (k <= q)),
    "documents_window_globals": (
        (ra.documents(CU) & ra.sliding_window(4)) | ra.global_tokens(2),
        lambda q, k: (same_document(q, k) & (q - 4 <= k) & (k <= q)) | (q < 2) | (k < 2),
    ),
    "longformer": (
        ra.longformer(4, [2, 9, 20]),
        lambda q, k: ((q - 4 <= k) | np.isin(q, [2, 9, 20]) | np.isin(k, [2, 9, 20])) & (k <= q),
    ),
    "longformer_both": (
        ra.longformer(3, 2, causal=False),
        lambda q, k: ((q - 3 <= k) & (k <= q + 3)) | (q < 2) | (k < 2),
    ),
    "causal_minus_window": (ra.causal() - ra.sliding_window(2), lambda q, k: (k <= q) & ~(q - 2 <= k)),
    "full_minus_strided": (ra.full() - ra.strided(3), lambda q, k: (q - k) % 3 != 0),
    "documents_or_strided": (ra.documents(CU) | ra.strided(2), lambda q, k: same_document(q, k) | ((q - k) % 2 == 0)),
}
ALL = SIMPLE | DOCUMENTS | COMBINED


def dense(predicate, q_len=SEQLEN, kv_len=SEQLEN, q_offset=0):
    """The predicate as a bool array ``[q_len, kv_len]``."""
    q, k = np.arange(q_len)[:, None] + q_offset, np.arange(kv_len)[None, :]
    return np.broadcast_to(predicate(q, k), (q_len, kv_len))
