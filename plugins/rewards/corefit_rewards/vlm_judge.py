"""Reward `vlm_judge`: a vision-language model is asked for a number, over an OpenAI-style chat completions endpoint."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from attrs import field, frozen, validators

from corefit.errors import ConfigError, plain, short_repr
from corefit.types import ROUNDING, Meta
from corefit_rewards.frames import FrameReward
from corefit_rewards.http import ServiceError, check_reachable, check_url, post_json, shown
from corefit_rewards.packages import require
from corefit_rewards.pixels import encoded, pixels, scored

if TYPE_CHECKING:
    from torch import Tensor

QUESTION = """\
The picture was generated from the prompt below. How well does it show what the prompt asks for, and how good is it as \
a picture? Answer with one number from {low} to {high}, where {high} is best, and with nothing else.

Prompt: {prompt}"""
ONLY_A_NUMBER = r"\A\s*([+-]?\d+(?:\.\d+)?)\s*\Z"
PLACE = re.compile(r"{(\w+)}")
"""A place in the question where something is filled in."""
FILLED = ("prompt", "low", "high")
OURS = frozenset({"model", "messages", "stream", "n"})
"""Fields of a request that cannot be set by `options`."""


def _check_question(_: object, __: object, question: str) -> None:
    if not question.strip():
        raise ValueError("'question' is blank; write what the model is asked, or leave the key out")
    for name in PLACE.findall(question):
        if name not in FILLED:
            raise ValueError(
                f"'question' has a place for {name!r}; what is filled in is {{{'}, {'.join(FILLED)}}}, in braces"
            )


def _check_answer(_: object, __: object, answer: str) -> None:
    try:
        groups = re.compile(answer).groups
    except re.error as error:
        raise ValueError(f"'answer' is not a regular expression: {error}") from None
    if groups != 1:
        raise ValueError(f"'answer' must have one group, in parentheses, for the number; it has {groups}")


def _check_scale(_: object, __: object, scale: tuple[float, float]) -> None:
    if not scale[0] < scale[1] or not all(abs(end) < 1e9 for end in scale):
        raise ValueError(f"'scale' must be the worst and the best number, such as [0, 10], not {list(scale)}")


def _check_variable(_: object, __: object, name: str) -> None:
    if name and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError(
            "'token_env' must be the name of an environment variable, such as \"OPENAI_API_KEY\", not the key itself: "
            "pipeline.toml is copied into the run's folder"
        )


def _check_options(_: object, __: object, options: Mapping[str, Any]) -> None:
    if wrong := sorted(OURS & options.keys()):
        raise ValueError(f"'options' must not have {wrong[0]!r}, which corefit sets")


@frozen(slots=False, kw_only=True)
class VlmJudge(FrameReward):
    """Asks a vision-language model for a number, and scores that number.

    The model is behind an endpoint in the form of OpenAI's chat completions, as vLLM, SGLang, Ollama and many others
    serve it. An answer that is no number of the scale is asked for again; if no answer is, the run stops with the
    prompt, and never scores 0.
    """

    concurrent: ClassVar[bool] = True

    url: str = field(validator=lambda _, __, url: check_url(url), metadata=ROUNDING)
    """The endpoint's address up to the version, such as "http://127.0.0.1:8000/v1"."""
    model: str = field(validator=validators.min_len(1))
    """The name of the model, as the endpoint knows it."""
    question: str = field(default=QUESTION, validator=_check_question)
    """What the model is asked about each picture. {prompt}, {low} and {high} stand for the prompt and the ends of the
    scale. By default it is asked for one number that judges both fit to the prompt and quality."""
    scale: tuple[float, float] = field(default=(0.0, 10.0), validator=_check_scale)
    """The worst and the best number. The score is the number as it is answered; an answer outside is refused."""
    answer: str = field(default=ONLY_A_NUMBER, validator=_check_answer)
    """A regular expression that finds the number in the answer, in its one group, such as 'Score: ([0-9.]+)'. By
    default the answer must be a number and nothing else. If it is found several times, all must be equal."""
    token_env: str = field(default="", validator=_check_variable, metadata=ROUNDING)
    """The environment variable that holds the key that the endpoint asks for; empty for none."""
    form: Literal["png", "jpeg"] = "png"
    """How pictures are sent: as PNG, which is exact, or as JPEG of quality 95, which is smaller."""
    options: Mapping[str, Any] = field(factory=lambda: {"temperature": 0, "max_tokens": 64}, validator=_check_options)
    """Further fields of the request. By default the model answers without sampling, in at most 64 tokens."""
    timeout: float = field(default=60.0, validator=[validators.gt(0), validators.le(86_400)], metadata=ROUNDING)
    """Seconds that one answer may take."""
    retries: int = field(default=6, validator=[validators.ge(0), validators.le(100)], metadata=ROUNDING)
    """How often a request is sent again when the endpoint cannot be reached, is too slow, is overloaded (status 429) or
    has an error of its own (status 500 and above), with growing pauses: half a minute in all for 6."""
    attempts: int = field(default=3, validator=[validators.ge(1), validators.le(100)], metadata=ROUNDING)
    """How often a question is asked until the answer is a number of the scale. All but the first have a `seed`."""
    parallel: int = field(default=8, validator=[validators.ge(1), validators.le(1000)], metadata=ROUNDING)
    """How many requests are sent at once."""

    def check(self) -> None:
        """Raise CorefitError unless httpx is installed, the key is set and something answers at the address."""
        require("httpx")
        check_reachable(f"{self._base}/models", headers=self._headers())

    def score_pictures(self, pictures: Tensor, prompts: Sequence[str], meta: Sequence[Meta]) -> Tensor:
        """Return the numbers [B] that the model answers."""
        return scored(pictures, lambda rows: self._answers(pixels(pictures[rows]), [prompts[row] for row in rows]))

    def _answers(self, pictures: Any, prompts: Sequence[str]) -> list[float]:
        """Ask about each of several pictures [B, H, W, 3]; the first failure ends the others."""
        headers = self._headers()
        with ThreadPoolExecutor(self.parallel, "vlm_judge") as pool:
            asked = [pool.submit(self._ask, *each, headers) for each in zip(pictures, prompts, strict=True)]
            try:
                return [each.result() for each in asked]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _ask(self, picture: Any, prompt: str, headers: Mapping[str, str]) -> float:
        """Return the number that the model answers; ServiceError names the prompt."""
        request = self._request(picture, prompt)
        said = ""
        for attempt in range(self.attempts):
            try:
                content = post_json(
                    f"{self._base}/chat/completions",
                    request if attempt == 0 else {**request, "seed": attempt},
                    timeout=self.timeout,
                    retries=self.retries,
                    headers=headers,
                )
            except ServiceError as error:
                raise ServiceError(f"vlm_judge could not score {short_repr(prompt)}: {error}") from None
            said = _text(content)
            number = None if said is None else parsed(said, self.answer, *self.scale)
            if number is not None:
                return number
        heard = "no complete text" if said is None else plain(short_repr(said))
        raise ServiceError(
            f"vlm_judge could not score {short_repr(prompt)}: {self.model} at {shown(self._base)} answered {heard}, "
            f"asked {self.attempts} times; expected is a number from {self.scale[0]:g} to {self.scale[1]:g}, as "
            "'answer' finds it: change 'question' or 'answer', or raise 'max_tokens' in 'options'"
        )

    def _request(self, picture: Any, prompt: str) -> dict[str, Any]:
        """Return the body of the request for an answer about a picture [H, W, 3]."""
        filled = {"prompt": prompt, "low": f"{self.scale[0]:g}", "high": f"{self.scale[1]:g}"}
        text = PLACE.sub(lambda found: filled[found[1]], self.question)
        data = base64.b64encode(encoded(picture, self.form)).decode()
        shown_first = {"type": "image_url", "image_url": {"url": f"data:image/{self.form};base64,{data}"}}
        message = {"role": "user", "content": [shown_first, {"type": "text", "text": text}]}
        return {**self.options, "model": self.model, "messages": [message]}

    def _headers(self) -> Mapping[str, str]:
        if not self.token_env:
            return {}
        key = os.environ.get(self.token_env, "").strip()
        if not key:
            raise ConfigError(f"'token_env' names the environment variable {self.token_env}, which is not set; set it")
        return {"Authorization": f"Bearer {key}"}

    @property
    def _base(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions")


def parsed(text: str, answer: str, low: float, high: float) -> float | None:
    """Return the number that the expression `answer` finds in a text; None unless it is one number of the scale."""
    try:
        numbers = {float(found) for found in re.findall(answer, text)}
    except ValueError:
        return None
    return number if len(numbers) == 1 and low <= (number := numbers.pop()) <= high else None


def _text(content: Any) -> str | None:
    """Return the text of the first choice of an answer; None if it has none, or one that was cut off."""
    try:
        choice = content["choices"][0]
        text, end = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        return None
    return text if isinstance(text, str) and end != "length" else None
