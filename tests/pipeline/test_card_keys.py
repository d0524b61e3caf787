"""The [card] table of a pipeline."""

from __future__ import annotations

import pytest

from corefit.pipeline.card import Card


def test_it_may_be_empty_and_hold_all():
    assert Card() == Card(title=None, tags=[])  # pyright: ignore[reportArgumentType]
    card = Card(title="T", license="cc-by-4.0", tags=["a"], author="me", base_model="org/model-1.5")  # pyright: ignore[reportArgumentType]
    assert card.tags == ("a",)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"title": "two\nlines"}, "'title' must be one line of text"),
        ({"tags": ["fine", " "]}, "'tags' must be one line of text"),
        ({"license": "my own words"}, "'license' must match regex"),
        ({"base_model": "models/of/mine"}, "'base_model' must match regex"),
        ({"base_model": "../base"}, "'base_model' must match regex"),
    ],
)
def test_what_it_refuses(keys, words):
    with pytest.raises(ValueError, match=words):
        Card(**keys)
