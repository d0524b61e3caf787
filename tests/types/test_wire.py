"""The wire format of reward services: what is sent arrives, and what is not as described is refused."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import pytest
import torch
from PIL import Image

from corefit.types import wire
from corefit.types.wire import Answer, Health, Malformed, Result, Sample

ROOM = 1 << 20


def sent(media: torch.Tensor) -> list[Sample | Result]:
    """What arrives of media [B, ...], with a prompt and metadata each."""
    n = len(media)
    _, content = wire.write_request(media, [f"prompt {i}" for i in range(n)], [{"n": i} for i in range(n)])
    return wire.read_request(json.dumps(content).encode(), ROOM)


@pytest.mark.parametrize("shape", [(3, 5, 7), (3, 1, 5, 7), (3, 4, 5, 7)], ids=["picture", "clip of one frame", "clip"])
def test_media_arrive_rounded_to_8_bits_and_in_their_layout(shape):
    media = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    for number, (one, original) in enumerate(zip(sent(media), media, strict=True)):
        assert isinstance(one, Sample)
        assert torch.equal(one.media, (original * 255).round().to(torch.uint8))
        assert (one.prompt, one.meta) == (f"prompt {number}", {"n": number})


def test_media_outside_of_0_to_1_are_clamped_and_not_wrapped():
    (one,) = sent(torch.tensor([-0.5, 2.0, 0.5]).reshape(1, 3, 1, 1))
    assert isinstance(one, Sample)
    assert one.media.flatten().tolist() == [0, 255, 128]


def test_equal_samples_have_ids_of_their_own():
    ids, _ = wire.write_request(torch.zeros(3, 3, 2, 2), ["same"] * 3, [{}] * 3)
    assert len(set(ids)) == 3


def test_ids_tell_samples_apart_so_that_an_answer_to_others_is_noticed():
    ids = [wire.write_request(torch.full((1, 3, 2, 2), level), ["same"], [{}])[0] for level in (0.1, 0.2)]
    assert ids[0] != ids[1]


def test_metadata_that_json_lacks_are_refused_with_the_prompt():
    for meta in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises(Malformed, match="the metadata of 'a sky' cannot be sent as JSON"):
            wire.write_request(torch.zeros(1, 3, 2, 2), ["a sky"], [meta])


def png(mode: str = "RGB", size: tuple[int, int] = (2, 2)) -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def request(**sample: Any) -> bytes:
    good = {"id": "a", "prompt": "", "meta": {}}
    return json.dumps({"format": 1, "samples": [{**good, **sample}, {**good, "id": "z", "picture": png()}]}).encode()


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"picture": "###"}, "not a whole PNG"),
        ({"picture": png()[:40]}, "not a whole PNG"),
        ({"picture": base64.b64encode(b"BM not a png").decode()}, "not a whole PNG"),
        ({"picture": 3}, "not a text in base64"),
        ({"picture": png("L")}, "is L, not RGB"),
        ({"picture": png(size=(2000, 2000))}, "too many pixels"),
        ({"frames": []}, "at least one picture"),
        ({"frames": [png(), png(size=(3, 2))]}, "several sizes"),
    ],
)
def test_a_picture_that_cannot_be_read_is_an_error_of_its_sample_alone(sample, said):
    bad, good = wire.read_request(request(**sample), ROOM)
    assert isinstance(bad, Result)
    assert said in bad.error
    assert isinstance(good, Sample) or "pixels" in said  # the room of a request is one for all its pictures


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"format": 2, "samples": [1]}', "format is 2, not 1"),
        (b'{"format": 1}', "samples is not a list"),
        (b'{"format": 1, "samples": []}', "at least one"),
        (b'{"format": 1, "samples": [NaN]}', "NaN is not a number"),
        (request(picture=png(), id=5), "id is not a text"),
        (request(picture=png(), id="z"), "two samples have the same id"),
        (request(picture=png(), prompt=None), "prompt is not a text"),
        (request(picture=png(), meta=[]), "meta is not an object"),
        (request(picture=png(), frames=[png()]), "either picture or frames"),
        (request(), "either picture or frames"),
    ],
)
def test_a_request_that_is_not_as_described_is_refused_as_a_whole(body, said):
    with pytest.raises(Malformed, match=said):
        wire.read_request(body, ROOM)


def test_an_answer_arrives_to_the_last_bit():
    answer = Answer("v1", [Result("a", score=1 / 3), Result("b", error="no"), Result("c", score=0.0)])
    assert wire.read_answer(json.loads(wire.write_answer(answer)), ["a", "b", "c"]) == answer


SCORE = {"id": "a", "score": 0.5}
WRONG_ANSWERS: dict[str, Any] = {
    "not a JSON object": [SCORE],
    "version is not a text": {"results": [SCORE]},
    "results is not a list": {"version": "v", "results": {"a": 0.5}},
    "there are 0 results for 1 samples": {"version": "v", "results": []},
    "there are 2 results for 1 samples": {"version": "v", "results": [SCORE, SCORE]},
    "is not an object": {"version": "v", "results": [0.5]},
    "id is 'b', not 'a'": {"version": "v", "results": [{**SCORE, "id": "b"}]},
    "either score or error": {"version": "v", "results": [{"id": "a"}]},
    "score is '0.5'": {"version": "v", "results": [{"id": "a", "score": "0.5"}]},
    "score is True": {"version": "v", "results": [{"id": "a", "score": True}]},
    "score is None": {"version": "v", "results": [{"id": "a", "score": None}]},
    "score is nan": {"version": "v", "results": [{"id": "a", "score": float("nan")}]},
    "score is inf": {"version": "v", "results": [{"id": "a", "score": float("inf")}]},
    "error is not a text": {"version": "v", "results": [{"id": "a", "error": ""}]},
}


@pytest.mark.parametrize("said", WRONG_ANSWERS)
def test_an_answer_that_is_not_as_described_is_refused(said):
    with pytest.raises(Malformed, match=said):
        wire.read_answer(WRONG_ANSWERS[said], ["a"])


def test_what_a_service_says_about_itself_arrives():
    health = Health("bright", "v1", {"gain": 2.0}, ready=False)
    assert wire.read_health(json.loads(wire.write_health(health))) == health


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": 0}, "format is 0"),
        ({"name": ""}, "name is not a text"),
        ({"version": 3}, "version is not a text"),
        ({"ready": "yes"}, "ready is neither"),
        ({"keys": []}, "keys is not an object"),
    ],
)
def test_another_kind_of_service_is_noticed(changed, said):
    content = json.loads(wire.write_health(Health("bright", "v1", {})))
    with pytest.raises(Malformed, match=said):
        wire.read_health({**content, **changed})
