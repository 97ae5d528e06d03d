"""Masks whose tables hold tiles of every kind: many, strided, scattered, and of steps that share rows."""

import ringattn as ra

MASKS = {
    "full": ra.full(),
    "causal": ra.causal(),
    "window": ra.sliding_window(9),
    "documents and window": ra.documents((0, 3, 40, 61, 120)) & ra.sliding_window(12),
    "scattered globals": ra.sliding_window(5) | ra.global_tokens([1, 7, 30, 31, 77]),
    "longformer": ra.longformer(6, [2, 9, 50, 51, 118]),
    "bigbird": ra.bigbird(8, 3, 1, 2),
    "chunked": ra.chunked(11),
    "strided": ra.strided(7),
    "dilated": ra.dilated(3, 5),
    "steps within steps": ra.strided(6) | (ra.dilated(2, 9) & ra.causal()),
}
SEQLEN = 120
