"""`ocr`: what is read, against what should be read, and what is refused."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from signs import FONTS, TEXTS, sign, signs

from corefit.errors import ConfigError, DataError
from corefit.testing import check_reward
from corefit_rewards import packages
from corefit_rewards.ocr import Ocr, edit_distance, in_reading_order, normalized, quoted, similarity

pytest.importorskip("rapidocr_onnxruntime")

NOTHING = [{}]


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    return Ocr(threads=2)


def asked(texts):
    return [f'a street with a sign that says "{text}", photograph' for text in texts]


def test_there_are_two_hundred_signs():
    assert len(TEXTS) == len(set(TEXTS)) == 200
    assert {len(text.split()) for text in TEXTS} == {1, 2, 3, 4}


def test_clean_signs_are_read_and_others_are_not(ocr):
    """Every eighth of the signs, the fonts by turns; the slow test has all of them."""
    texts = TEXTS[3::8][:24]
    media = torch.stack([sign(text, FONTS[n % len(FONTS)], n) for n, text in enumerate(texts)])
    meta = NOTHING * len(texts)
    assert float(ocr.score(media, asked(texts), meta).mean()) > 0.9
    some = slice(0, 8)
    assert float(ocr.score(media[some], asked(texts[1:9]), meta[some]).mean()) < 0.3


@pytest.mark.slow
@pytest.mark.parametrize("font", FONTS)
def test_two_hundred_signs_in_each_font(ocr, font):
    media, meta = signs(TEXTS, font), NOTHING * len(TEXTS)
    clean = ocr.score(media, asked(TEXTS), meta).mean()
    shuffled = ocr.score(media, asked(TEXTS[100:] + TEXTS[:100]), meta).mean()
    print(f"{font}: clean {clean:.3f}, shuffled {shuffled:.3f}")
    assert clean > 0.9
    assert shuffled < 0.3


def test_keeps_the_rules_of_rewards(ocr):
    media = torch.stack([sign("Exit", "DejaVuSans", 0, 96), sign("Taxi", "DejaVuSans", 1, 96)])
    check_reward(ocr, media, asked(["Exit", "Taxi"]), [{}, {}])


def test_scores_do_not_depend_on_the_number_of_threads(ocr):
    texts = TEXTS[:2]
    media = signs(texts, "DejaVuSerif")
    assert torch.equal(
        Ocr(threads=1).score(media, asked(texts), NOTHING * 2), ocr.score(media, asked(texts), NOTHING * 2)
    )


def test_an_empty_picture_scores_nothing(ocr):
    assert ocr.score(torch.ones(1, 3, 64, 64), asked(["Exit"]), NOTHING).tolist() == [0]


def test_two_batches_at_once(ocr):
    """Rewards that are `concurrent` are called in other threads."""
    found: list[list[float]] = []
    media = signs(["Exit"], "DejaVuSans")

    def scored():
        found.append(ocr.score(media, asked(["Exit"]), NOTHING).tolist())

    threads = [threading.Thread(target=scored) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1.0], [1.0]]


def test_a_failure_of_the_reader_is_raised(monkeypatch):
    """Never a score of 0."""
    monkeypatch.setattr("corefit_rewards.ocr._engine", lambda confidence: lambda picture, **keys: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Ocr().score(torch.ones(1, 3, 32, 32), asked(["Exit"]), NOTHING)


def strip(text: str):
    """A picture [3, 32, 96] that is one line of text."""
    return sign(text, "DejaVuSans", 0, 128)[:, 48:80, 16:112]


@pytest.fixture(scope="module")
def strips():
    """Pictures of "Taxi", of "Exit" and of nothing."""
    return torch.stack([strip("Taxi"), strip("Exit"), torch.ones(3, 32, 96)])


@pytest.mark.parametrize(
    ("keys", "scores"),
    [
        ({}, [1, 0.75, 0]),
        ({"strict": True}, [0, 0, 0]),
        ({"confidence": 1}, [0, 0, 0]),  # unsure lines count as not read
    ],
)
def test_a_picture_that_is_one_line_is_read_without_looking_for_lines(keys, scores, strips):
    one_line = Ocr(detect=False, threads=1, **keys)
    assert one_line.score(strips, asked(["Tax", "Exif", "Exit"]), NOTHING * 3).tolist() == scores


def test_strict_allows_nothing_but_spaces_and_case_to_differ(strips):
    strict = Ocr(detect=False, threads=1, strict=True)
    assert strict.score(strips[:2], asked(["TA XI", "exit"]), NOTHING * 2).tolist() == [1, 1]


def test_clips(ocr):
    blank = torch.ones(3, 96, 96)
    clip = torch.stack([sign("Exit", "DejaVuSans", 0, 96), blank], dim=1)[None]
    assert ocr.score(clip, asked(["Exit"]), NOTHING).tolist() == [0.5]
    for pool, score in {"first": 1.0, "min": 0.0, "max": 1.0}.items():
        assert Ocr(threads=1, pool=pool).score(clip, asked(["Exit"]), NOTHING).tolist() == [score], pool


# what should be read


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign "Open"', "Open"),
        ("a sign “Open”, sunny", "Open"),
        ("a sign „Open“", "Open"),
        ('"One" above "Two"', "One"),
        ("it's a \"Cat's Cafe\"", "Cat's Cafe"),
        ("an 'Open' sign", None),
        ("nothing", None),
        ('only one " quote', None),
    ],
)
def test_quotes(prompt, text):
    assert quoted(prompt) == text


@pytest.mark.parametrize("prompt", ["a red circle", 'a sign ""', 'a sign "  "', 'half a "quote'])
def test_a_prompt_without_text_is_refused_by_name(prompt):
    with pytest.raises(DataError, match="has no text in double quotes") as caught:
        Ocr().score(torch.ones(1, 3, 8, 8), [prompt], NOTHING)
    assert repr(prompt) in str(caught.value)


def test_the_metadata_may_hold_the_text(ocr):
    media = signs(["Exit"], "DejaVuSans")
    assert ocr.score(media, ["a door"], [{"text": "EXIT"}]).tolist() == [1]
    assert ocr.score(media, ['a door "Exit"'], [{"text": "Quiz"}])[0] < 0.5
    assert Ocr(target="words").score(media, ["a door"], [{"words": "exit"}]).tolist() == [1]


@pytest.mark.parametrize("value", ["", "  ", None, 3, ["Exit"]])
def test_wrong_metadata_is_refused(value):
    with pytest.raises(DataError, match="the metadata 'text' of the prompt 'a door' is"):
        Ocr().score(torch.ones(1, 3, 8, 8), ["a door"], [{"text": value}])


# the score


@pytest.mark.parametrize(
    ("read", "target", "score"),
    [
        ("hello world", "Hello World", 1),
        ("HELLOWORLD", "hello world", 1),
        ("xx hello world yy", "Hello World", 1),  # contained
        ("helo world", "Hello World", 0.9),
        ("", "Hello", 0),
        ("completely different and much longer", "abc", 0),  # at most as many errors as letters
        ("don’t", "don't", 1),
        ("SALE！", "sale!", 1),  # full-width, as readers of Chinese write
        ("abcd", "abxy", 0.5),
    ],
)
def test_similarity(read, target, score):
    assert similarity(read, target) == pytest.approx(score)


words = st.text("abc", max_size=8)


@given(words, words, words)
def test_edit_distance_is_a_metric(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


@pytest.mark.parametrize(
    ("a", "b", "d"), [("kitten", "sitting", 3), ("flaw", "lawn", 2), ("", "abc", 3), ("ab", "ba", 2)]
)
def test_edit_distances(a, b, d):
    assert edit_distance(a, b) == d


@given(st.text(max_size=20), st.text(min_size=1, max_size=20).filter(normalized))
def test_scores_are_shares(read, target):
    assert 0 <= similarity(read, target) <= 1


def test_lines_are_read_from_top_to_bottom_and_words_from_left_to_right():
    def box(x, y, width=10, height=10):
        return [[x, y], [x + width, y], [x + width, y + height], [x, y + height]]

    words = [(box(50, 2), "two"), (box(0, 5), "one"), (box(30, 31), "four"), (box(0, 33, height=14), "three")]
    assert [text for _, text in in_reading_order(words)] == ["one", "two", "three", "four"]
    assert in_reading_order([]) == []


# what is missing


def test_a_missing_package_is_said(monkeypatch):
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rapidocr-onnxruntime.*pip install 'corefit\[rewards\]'"):
        Ocr().check()


@pytest.mark.parametrize("keys", [{"threads": 0}, {"confidence": 1.5}, {"frames": 0}])
def test_keys_have_bounds(keys):
    with pytest.raises(ValueError, match=next(iter(keys))):
        Ocr(**keys)
