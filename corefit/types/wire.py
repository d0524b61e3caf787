"""The wire format of reward services: what a client sends, and what a service answers. Both sides use this module.

docs/plugins/reward-service.md describes the format for services in other languages. Everything is JSON; pictures are
PNG in base64. Nothing that is read here is executed or unpickled, and what is not exactly as described is refused.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from attrs import frozen

from corefit.errors import short_repr
from corefit.types.values import Meta

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
"""The number of this format; it changes when a service of the former format would be misunderstood."""
LONGEST_ERROR = 500
"""A result has at most this many characters of an error's message."""


class Malformed(ValueError):
    """A request or an answer is not as the format says; the message says where it differs."""


@frozen(eq=False)
class Sample:
    """A picture or a clip to score.

    id     its name in the request
    media  uint8 [3, H, W], of a clip [3, T, H, W]
    """

    id: str
    media: Tensor
    prompt: str
    meta: Meta


@frozen
class Result:
    """What became of a sample: its score, or the message of an error."""

    id: str
    score: float | None = None
    error: str = ""


@frozen
class Answer:
    """The results of a request, in the order of its samples, and the version of the reward that gave them."""

    version: str
    results: Sequence[Result]


@frozen
class Health:
    """What a service says about itself.

    name     the reward that it serves
    version  a text that differs where scores may differ: a hash of code, weights and keys
    keys     the keys of the reward, for people to read
    ready    False while requests would have to wait, for example until weights are loaded
    """

    name: str
    version: str
    keys: Mapping[str, Any]
    ready: bool = True


# requests


def write_request(media: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> tuple[list[str], dict[str, Any]]:
    """Return the ids and the content of a request for media [B, 3, H, W], or clips [B, 3, T, H, W], in [0, 1].

    Media are rounded to 8 bits. Raises Malformed for metadata that JSON cannot hold.
    """
    import torch

    pixels = media.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    samples: list[dict[str, Any]] = []
    for number, (one, prompt, known) in enumerate(zip(pixels, prompts, meta, strict=True)):
        kind = {"picture": _png(one)} if one.ndim == 3 else {"frames": [_png(frame) for frame in one.unbind(1)]}
        content = {"prompt": prompt, "meta": dict(known), **kind}
        try:
            text = json.dumps(content, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise Malformed(f"the metadata of {prompt!r} cannot be sent as JSON ({error})") from None
        samples.append({"id": f"{number}-{hashlib.sha256(text.encode()).hexdigest()[:16]}", **content})
    return [sample["id"] for sample in samples], {"format": FORMAT, "samples": samples}


def read_request(body: bytes, most_pixels: int) -> list[Sample | Result]:
    """Return the samples of a request, in order; a sample whose picture cannot be read is a Result with the error.

    Raises Malformed if the request as a whole is not as described.

    most_pixels  pixels that all pictures together may have: PNG compresses one color a thousandfold, so the size of a
                 request does not bound what its pictures unpack to
    """
    try:
        content = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise Malformed(f"the request is not JSON ({error})") from None
    _require(isinstance(content, dict), "the request is not a JSON object")
    _require(content.get("format") == FORMAT, f"format is {short_repr(content.get('format'))}, not {FORMAT}")
    samples = content.get("samples")
    _require(isinstance(samples, list) and len(samples) > 0, "samples is not a list of at least one sample")
    room = [most_pixels]
    read = [_sample(number, sample, room) for number, sample in enumerate(samples)]
    _require(len({one.id for one in read}) == len(read), "two samples have the same id")
    return read


def _sample(number: int, sample: Any, room: list[int]) -> Sample | Result:
    """Read one sample; `room` holds the number of pixels that the request may still unpack to."""
    import torch

    where = f"samples[{number}]"
    _require(isinstance(sample, dict), f"{where} is not an object")
    name, prompt, meta = sample.get("id"), sample.get("prompt"), sample.get("meta", {})
    _require(isinstance(name, str) and 0 < len(name) <= 200, f"{where}.id is not a text of 1 to 200 characters")
    _require(isinstance(prompt, str), f"{where}.prompt is not a text")
    _require(isinstance(meta, dict), f"{where}.meta is not an object")
    _require(("picture" in sample) != ("frames" in sample), f"{where} needs either picture or frames")
    frames = sample.get("frames", [sample.get("picture")])
    try:
        _require(isinstance(frames, list) and len(frames) > 0, "frames is not a list of at least one picture")
        decoded = [_picture(frame, room) for frame in frames]
        _require(len({frame.shape for frame in decoded}) == 1, "its frames have several sizes")
    except Malformed as error:
        return Result(name, error=f"it cannot be read: {error}")
    return Sample(name, decoded[0] if "picture" in sample else torch.stack(decoded, 1), prompt, meta)


def _png(frame: Tensor) -> str:
    """Return uint8 [3, H, W] as PNG in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=1)
    return base64.b64encode(file.getvalue()).decode()


def _picture(text: Any, room: list[int]) -> Tensor:
    """Return a PNG in base64 as uint8 [3, H, W], and take its pixels from `room`."""
    import numpy as np
    import torch
    from PIL import Image

    _require(isinstance(text, str), "a picture is not a text in base64")
    try:
        with Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"]) as image:
            room[0] -= image.width * image.height
            _require(room[0] >= 0, "the pictures of the request have too many pixels")
            _require(image.mode == "RGB", f"a picture is {image.mode}, not RGB with 8 bits a channel")
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    except Malformed:
        raise
    except Exception as error:  # what Pillow raises for damaged files is not one family
        raise Malformed(f"a picture is not a whole PNG in base64 ({error})") from None


# answers


def write_answer(answer: Answer) -> bytes:
    """Return the body of an answer."""
    results = [
        {"id": one.id, "score": one.score} if one.score is not None else {"id": one.id, "error": _cut(one.error)}
        for one in answer.results
    ]
    return json.dumps({"version": answer.version, "results": results}, allow_nan=False).encode()


def read_answer(content: Any, ids: Sequence[str]) -> Answer:
    """Return the answer to a request with these ids; Malformed unless it has one result for each, in their order.

    content  the answer's JSON, decoded
    """
    _require(isinstance(content, dict), "it is not a JSON object")
    version, results = content.get("version"), content.get("results")
    _require(isinstance(version, str) and bool(version), "version is not a text")
    _require(isinstance(results, list), "results is not a list")
    _require(len(results) == len(ids), f"there are {len(results)} results for {len(ids)} samples")
    return Answer(version, [_result(number, one, ids[number]) for number, one in enumerate(results)])


def _result(number: int, result: Any, wanted: str) -> Result:
    where = f"results[{number}]"
    _require(isinstance(result, dict), f"{where} is not an object")
    _require(result.get("id") == wanted, f"{where}.id is {short_repr(result.get('id'))}, not {wanted!r}")
    _require(("score" in result) != ("error" in result), f"{where} needs either score or error")
    if "error" in result:
        error = result["error"]
        _require(isinstance(error, str) and bool(error), f"{where}.error is not a text")
        return Result(wanted, error=_cut(error))
    score = result["score"]
    number_like = isinstance(score, (int, float)) and not isinstance(score, bool)
    _require(number_like and abs(score) < 1e300, f"{where}.score is {short_repr(score)}, not a finite number")
    return Result(wanted, score=float(score))


# health


def write_health(health: Health) -> bytes:
    """Return the body of the answer to GET /health."""
    content = {"format": FORMAT, "name": health.name, "version": health.version, "ready": health.ready}
    return json.dumps({**content, "keys": health.keys}).encode()


def read_health(content: Any) -> Health:
    """Return what a service says about itself; Malformed if it is no reward service of this format.

    content  the answer's JSON, decoded
    """
    _require(isinstance(content, dict), "it is not a JSON object")
    _require(content.get("format") == FORMAT, f"format is {short_repr(content.get('format'))}, not {FORMAT}")
    name, version, ready = content.get("name"), content.get("version"), content.get("ready")
    _require(isinstance(name, str) and bool(name), "name is not a text")
    _require(isinstance(version, str) and bool(version), "version is not a text")
    _require(isinstance(ready, bool), "ready is neither true nor false")
    keys = content.get("keys", {})
    _require(isinstance(keys, dict), "keys is not an object")
    return Health(name, version, keys, ready)


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"{name} is not a number of JSON")


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise Malformed(problem)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_ERROR else f"{text[:LONGEST_ERROR]}..."
