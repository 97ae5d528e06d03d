"""Masks in words: what a picture's title says can be given to the command that drew it."""

import pytest

import ringattn as ra
from ringattn.arguments.values import LARGEST
from ringattn.geometry.mask_words import CHARACTERS, words_of
from ringattn.mask_text import parse_mask
from tests.support.cases import ALL

WRITTEN = {
    "bigbird(64, 3, 1, 2)": ra.bigbird(64, 3, 1, 2),
    "bigbird(64, 5, 0, 2, seed=7, causal=False)": ra.bigbird(64, 5, 0, 2, seed=7, causal=False),
    "(sliding_window(1023) | global_tokens(4)) & causal()": ra.longformer(1023, 4),
    "sliding_window(3, None) | global_tokens([5])": ra.sliding_window(3, None) | ra.global_tokens([5]),
    "documents([0, 4, 9], [0, 5, 9])": ra.documents([0, 4, 9], [0, 5, 9]),
    "causal() - (strided(3) - dilated(2, 4)) - full()": ra.causal() - (ra.strided(3) - ra.dilated(2, 4)) - ra.full(),
    "(causal() | full()) & (chunked(8) & prefix_lm(2))": (ra.causal() | ra.full()) & (ra.chunked(8) & ra.prefix_lm(2)),
    f"bigbird(3, 1, {-(-LARGEST // 3)}, 0)": ra.bigbird(3, 1, LARGEST, 0),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_words_are_the_constructors(text: str) -> None:
    assert words_of(WRITTEN[text]) == text and parse_mask(text) == WRITTEN[text]


@pytest.mark.parametrize("name", sorted(ALL))
def test_words_are_read_back_to_an_equal_mask(name: str) -> None:
    mask = ALL[name][0]
    assert parse_mask(words_of(mask)) == mask
    assert parse_mask(words_of(ra.full() - mask | mask)) == ra.full() - mask | mask


def test_long_masks_are_whole_while_they_can_be_read_and_show_what_they_leave_out() -> None:
    many = ra.documents(range(700)) & ra.causal()
    assert len(words_of(many)) <= CHARACTERS and parse_mask(words_of(many)) == many
    assert words_of(ra.documents(range(5001))) == "documents([0, 1, 2, ... 5001 numbers ..., 5000])"
    several = ra.sliding_window(0)
    for left in range(1, 60):
        several = several | ra.sliding_window(left)
    assert parse_mask(words_of(several)) == several, "no brackets that the reader would count as masks"
    for left in range(60, 100):
        several = several | ra.sliding_window(left)
    assert words_of(several).endswith("... (100 masks)") and len(words_of(several)) < 200


def test_a_text_may_have_line_breaks() -> None:
    assert parse_mask("causal()\n  & documents([0,\n 5])") == ra.causal() & ra.documents([0, 5])
