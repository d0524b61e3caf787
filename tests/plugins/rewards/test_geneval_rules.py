"""GenEval's rules, without networks: boxes, thresholds, numbers, colors and positions."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from corefit.errors import DataError
from corefit_rewards.geneval_rules import (
    COLORS,
    RELATIONS,
    Clause,
    Found,
    Wanted,
    class_name,
    is_correct,
    most_certain,
    relations,
    share,
    shared_area,
    wanted,
)

KNOWN = {"dog", "cat", "computer mouse", "tv remote", "airplane", "couch"}


def at(x: float, y: float, score: float = 0.95, size: float = 10) -> Found:
    """An object around a center."""
    return Found((x - size / 2, y - size / 2, x + size / 2, y + size / 2), score)


def of(tag, include, exclude=(), prompt="a photo") -> Wanted:
    return wanted(prompt, {"tag": tag, "include": include, "exclude": list(exclude), "prompt": prompt}, KNOWN)


def painted(*colors):
    """A judge of colors that gives the objects these colors, in the order of their certainty."""
    return lambda name, found: colors[: len(found)]


def never(name, found):
    raise AssertionError("no color is asked for")


# metadata


def test_lines_of_evaluation_metadata_are_read():
    """One line of each kind, as GenEval's create_prompts.py writes it."""
    lines = [
        '{"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": "a photo of a dog"}',
        '{"tag": "two_object", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}], "prompt": "p"}',
        '{"tag": "counting", "include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}], '
        '"prompt": "a photo of three cats"}',
        '{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "p"}',
        '{"tag": "position", "include": [{"class": "dog", "count": 1}, '
        '{"class": "cat", "count": 1, "position": ["left of", 0]}], "prompt": "p"}',
        '{"tag": "color_attr", "include": [{"class": "dog", "count": 1, "color": "red"}, '
        '{"class": "tv remote", "count": 1, "color": "blue"}], "prompt": "p"}',
    ]
    read = [wanted("p", json.loads(line), KNOWN) for line in lines]
    assert [one.tag for one in read] == ["single_object", "two_object", "counting", "colors", "position", "color_attr"]
    assert read[2] == Wanted("counting", [Clause("cat", 3)], [Clause("cat", 4)])
    assert read[4].include == [Clause("dog", 1), Clause("cat", 1, "", "left of", 0)]
    assert read[5].include == [Clause("dog", 1, "red"), Clause("tv remote", 1, "blue")]


def test_keys_without_a_value_count_as_missing():
    """Columns of Arrow have all keys in all rows."""
    entry = {"class": "dog", "count": 1, "color": None, "position": None}
    assert of("single_object", [entry]).include == [Clause("dog", 1)]
    assert wanted("p", {"tag": "x", "include": [entry], "exclude": None}, KNOWN).exclude == []


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("mouse", "computer mouse"),
        ("computer mouse", "computer mouse"),
        ("remote", "tv remote"),
        ("aeroplane", "airplane"),
        ("Sofa", "couch"),
        ("potted_plant", "potted plant"),
        ("dog", "dog"),
    ],
)
def test_names_of_classes(name, same):
    assert class_name(name) == same


DOG = {"class": "dog", "count": 1}


@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, 'have no "tag"'),
        ({"tag": 3, "include": [DOG]}, 'have no "tag"'),
        ({"tag": "x"}, 'have no "include"'),
        ({"tag": "x", "include": []}, 'have no "include"'),
        ({"tag": "x", "include": "dog"}, "where a list of objects is expected"),
        ({"tag": "x", "include": DOG}, "where a list of objects is expected"),
        ({"tag": "x", "include": [{"count": 1}]}, "ask for the class None"),
        (
            {"tag": "x", "include": [{"class": "unicorn", "count": 1}]},
            "'unicorn', which the detector does not",
        ),
        ({"tag": "x", "include": [{"class": "dogs", "count": 1}]}, "did you mean 'dog'"),
        ({"tag": "x", "include": [DOG], "exclude": [{"class": "unicorn", "count": 1}]}, "the class 'unicorn'"),
        ({"tag": "x", "include": [{"class": "dog", "count": 0}]}, "have the count 0 of 'dog'"),
        ({"tag": "x", "include": [{"class": "dog", "count": True}]}, "have the count True"),
        ({"tag": "x", "include": [{"class": "dog", "count": "1"}]}, "have the count '1'"),
        ({"tag": "x", "include": [{**DOG, "color": "mauve"}]}, "have the color 'mauve', which is none of red, orange"),
        ({"tag": "x", "include": [{**DOG, "position": ["left of", 0]}]}, "the number of an earlier entry"),
        ({"tag": "x", "include": [DOG, {**DOG, "position": ["near", 0]}]}, "have the position"),
        ({"tag": "x", "include": [DOG, {**DOG, "position": ["above", -1]}]}, "have the position"),
        ({"tag": "x", "include": [DOG, {**DOG, "position": "above"}]}, "have the position"),
    ],
)
def test_wrong_metadata_are_refused_by_name(meta, said):
    with pytest.raises(DataError) as caught:
        wanted("a photo of something", meta, KNOWN)
    assert said in str(caught.value)
    assert "'a photo of something'" in str(caught.value)


# objects that count


def test_thresholds_are_exclusive_and_order_is_by_certainty():
    found = [at(0, 0, 0.3), at(1, 0, 0.5), at(2, 0, 0.31), at(3, 0, 0.9)]
    assert [one.score for one in most_certain(found, 0.3, 16, 1.0)] == [0.9, 0.5, 0.31]
    assert most_certain(found, 0.9, 16, 1.0) == []


def test_at_most_so_many_objects_count():
    found = [at(50 * n, 0, 0.5 + n / 100) for n in range(20)]
    kept = most_certain(found, 0.3, 16, 1.0)
    assert [one.score for one in kept] == sorted((one.score for one in found), reverse=True)[:16]


def test_overlapping_objects_are_one_only_below_an_overlap_of_1():
    found = [at(0, 0, 0.9), at(0, 0, 0.8), at(1, 0, 0.7), at(100, 0, 0.6)]
    assert len(most_certain(found, 0.3, 16, 1.0)) == 4
    assert [one.score for one in most_certain(found, 0.3, 16, 0.5)] == [0.9, 0.6]
    assert [one.score for one in most_certain(found, 0.3, 16, 0.99)] == [0.9, 0.7, 0.6]


def test_objects_are_cut_off_before_overlaps_are_dropped():
    """As published: of the two most certain, the second overlaps, and the third does not take its place."""
    found = [at(0, 0, 0.9), at(0, 0, 0.8), at(100, 0, 0.7)]
    assert [one.score for one in most_certain(found, 0.3, 2, 0.5)] == [0.9]


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((0, 0, 9, 9), (0, 0, 9, 9), 1),
        ((0, 0, 9, 9), (10, 0, 19, 9), 0),
        ((0, 0, 9, 9), (5, 0, 14, 9), 50 / 150),
        ((0, 0, 9, 9), (0, 0, 4, 9), 0.5),
        ((0, 0, 9, 9), (9, 9, 18, 18), 1 / 199),  # edges belong to boxes, as published
    ],
)
def test_shared_area(one, other, expected):
    assert shared_area(one, other) == pytest.approx(expected)
    assert shared_area(other, one) == pytest.approx(expected)


# positions


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-50, 0, {"left of"}),
        (50, 0, {"right of"}),
        (0, -50, {"above"}),
        (0, 50, {"below"}),
        (50, 50, {"right of", "below"}),
        (-50, 50, {"left of", "below"}),
        (0, 0, set()),
        (2, 0, set()),  # two boxes of 10 must be 0.1 * 20 = 2 apart
        (1.9, -1.9, set()),
        (2.002, 0, set()),  # 0.002 clear, but 0.001 of the distance
        (5, 0, {"right of"}),  # 3 of 5
        (4, 0, set()),  # 2 of 4 is not more than a half
        (4.01, 0, {"right of"}),
    ],
)
def test_relations(x, y, expected):
    assert relations(at(x, y).box, at(0, 0).box, 0.1) == expected


numbers = st.floats(-100, 100).map(lambda x: round(x, 1))
boxes = st.tuples(numbers, numbers, st.floats(1, 50), st.floats(1, 50)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(boxes, boxes, st.sampled_from([0.0, 0.1, 0.5]))
def test_relations_are_those_of_the_formula(one, other, threshold):
    """clear = max(|d| - t (w_a + w_b), 0) sign(d); a relation holds if clear / |distance| is more than a half."""
    found = relations(one, other, threshold)
    assert found == {OPPOSITE[name] for name in relations(other, one, threshold)}
    dx = (one[0] + one[2]) / 2 - (other[0] + other[2]) / 2
    dy = (one[1] + one[3]) / 2 - (other[1] + other[3]) / 2
    wide, high = one[2] - one[0] + other[2] - other[0], one[3] - one[1] + other[3] - other[1]
    x, y = max(abs(dx) - threshold * wide, 0), max(abs(dy) - threshold * high, 0)
    far = math.hypot(dx, dy) / 2
    assert found <= {"left of" if dx < 0 else "right of", "above" if dy < 0 else "below"}
    if max(x, y) > 2e-3 and min(abs(x - far), abs(y - far)) > 1e-6:
        assert bool({"left of", "right of"} & found) == (x > far)
        assert bool({"above", "below"} & found) == (y > far)


# scores, over all cases


def both(objects, what, colors=never):
    return (
        is_correct(objects, what, colors, 0.1),
        is_correct(objects, what, colors, 0.1, strict=True),
        share(objects, what, colors, 0.1),
    )


@pytest.mark.parametrize(("there", "asked"), itertools.product(range(5), range(1, 4)))
def test_counting(there, asked):
    objects = {"cat": [at(50 * n, 0) for n in range(there)]} if there else {}
    more = {"class": "cat", "count": asked + 1}
    what = of("counting", [{"class": "cat", "count": asked}], [more])
    part = max(0.0, 1 - abs(asked - there) / asked)
    assert both(objects, what) == (there == asked, there == asked, pytest.approx(part))
    without = of("single_object", [{"class": "cat", "count": asked}])
    assert both(objects, without) == (there >= asked, there == asked, pytest.approx(part))


@pytest.mark.parametrize(("dogs", "cats"), itertools.product(range(3), repeat=2))
def test_two_objects(dogs, cats):
    objects = {"dog": [at(0, 0)] * dogs, "cat": [at(0, 0)] * cats}
    what = of("two_object", [DOG, {"class": "cat", "count": 1}])
    part = ((dogs == 1) + (cats == 1)) / 2
    assert both(objects, what) == (dogs >= 1 and cats >= 1, dogs == cats == 1, part)


@pytest.mark.parametrize("color", COLORS)
def test_one_color(color):
    what = of("colors", [{**DOG, "color": "red"}])
    right = color == "red"
    assert both({"dog": [at(0, 0)]}, what, painted(color)) == (right, right, (1 + right) / 2)


def test_colors_of_the_most_certain_objects_count():
    what = of("colors", [{**DOG, "color": "red"}])
    two = {"dog": [at(0, 0, 0.9), at(50, 0, 0.8)]}
    assert both(two, what, painted("red", "blue")) == (True, False, 0)
    assert both(two, what, painted("blue", "red")) == (False, False, 0)


@pytest.mark.parametrize("colors", itertools.product(("red", "blue"), repeat=2))
def test_several_objects_of_a_color(colors):
    what = of("colors", [{"class": "dog", "count": 2, "color": "red"}])
    number = colors.count("red")
    objects = {"dog": [at(0, 0), at(50, 0)]}
    assert both(objects, what, painted(*colors)) == (number == 2, number == 2, (1 + number / 2) / 2)


def test_no_object_has_no_color():
    what = of("colors", [{**DOG, "color": "red"}])
    assert both({}, what, never) == (False, False, 0)


@pytest.mark.parametrize(("dog", "cat"), itertools.product(("red", "blue"), repeat=2))
def test_colors_belong_to_their_objects(dog, cat):
    what = of("color_attr", [{**DOG, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}])
    given_colors = {"dog": [dog], "cat": [cat]}
    objects = {"dog": [at(0, 0)], "cat": [at(50, 0)]}
    right = (dog == "red", cat == "blue")
    expected = (all(right), all(right), (2 + sum(right)) / 4)
    assert both(objects, what, lambda name, found: given_colors[name]) == expected


@pytest.mark.parametrize(("asked", "is_at"), itertools.product(RELATIONS, RELATIONS))
def test_positions(asked, is_at):
    places = {"left of": (-50, 0), "right of": (50, 0), "above": (0, -50), "below": (0, 50)}
    what = of("position", [DOG, {"class": "cat", "count": 1, "position": [asked, 0]}])
    right = asked == is_at
    assert both({"dog": [at(0, 0)], "cat": [at(*places[is_at])]}, what) == (right, right, (2 + right) / 3)


def test_a_position_needs_its_target():
    what = of("position", [DOG, {"class": "cat", "count": 1, "position": ["left of", 0]}])
    assert both({"cat": [at(0, 0)]}, what) == (False, False, pytest.approx(1 / 3))
    assert both({"dog": [at(0, 0)]}, what) == (False, False, pytest.approx(1 / 3))


def test_every_object_must_be_beside_every_target():
    what = of("position", [{"class": "dog", "count": 2}, {"class": "cat", "count": 2, "position": ["left of", 0]}])
    dogs = [at(100, 0), at(200, 0)]
    assert both({"dog": dogs, "cat": [at(0, 0), at(20, 0)]}, what) == (True, True, 1)
    assert both({"dog": dogs, "cat": [at(0, 0), at(150, 0)]}, what) == (False, False, pytest.approx(2 / 3))


def test_a_wrong_color_leaves_a_position_unjudged():
    what = of("x", [DOG, {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]}])
    objects = {"dog": [at(100, 0)], "cat": [at(0, 0)]}
    assert both(objects, what, painted("red")) == (True, True, 1)
    assert both(objects, what, painted("blue")) == (False, False, pytest.approx(2 / 3))


def test_excluded_objects():
    what = of("x", [DOG], [{"class": "cat", "count": 1}])
    assert both({"dog": [at(0, 0)]}, what) == (True, True, 1)
    assert is_correct({"dog": [at(0, 0)], "cat": [at(0, 0)]}, what, never, 0.1) is False


found = st.lists(st.tuples(numbers, numbers).map(lambda p: at(*p)), max_size=4)
clauses = st.lists(
    st.tuples(st.sampled_from(["dog", "cat"]), st.integers(1, 3), st.sampled_from(["", "red"])), min_size=1, max_size=3
)


@given(st.fixed_dictionaries({"dog": found, "cat": found}), clauses)
def test_shares_are_from_0_to_1_and_strict_is_strictest(objects, asked):
    what = Wanted("x", [Clause(*each) for each in asked])
    correct, strict, part = both(objects, what, lambda name, found: ["red"] * len(found))
    assert 0 <= part <= 1
    assert correct or not strict
    assert (part == 1) == strict
