"""Signals: at once, after the step, and not twice for one Ctrl-C."""

from __future__ import annotations

import os
import signal

import pytest

from corefit.signals import Signals


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_outside_training_a_signal_ends_the_run_at_once(said, number):
    def run() -> None:
        with Signals(said.append).handled():
            send(number)
            pytest.fail("the signal was not heard")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert said == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_in_training_the_first_asks_and_the_second_ends(said, number):
    signals = Signals(said.append)

    def run() -> None:
        with signals.handled(), signals.training():
            send(number)
            assert signals.asked
            assert said == ["stopping after this step; once more to stop now"]
            send(number)
            pytest.fail("the second signal was not heard")

    with pytest.raises(KeyboardInterrupt):
        run()


def test_an_echo_is_not_a_second_one(said):
    signals = Signals(said.append, echo=60)

    def run() -> None:
        with signals.handled(), signals.training():
            send(signal.SIGINT)
            send(signal.SIGTERM)
            said.append("went on")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert said[1:] == ["went on"]
    signals._since -= 100  # a minute later
    with pytest.raises(KeyboardInterrupt), signals.handled():
        send()


def test_a_request_that_came_after_the_last_step_ends_the_run_too(said):
    signals = Signals(said.append)
    with pytest.raises(KeyboardInterrupt), signals.handled(), signals.training():
        send()
    signals = Signals(said.append)
    with signals.handled(), signals.training():
        pass


def test_an_error_in_training_is_not_hidden_by_a_request(said):
    signals = Signals(said.append)

    def run() -> None:
        with signals.handled(), signals.training():
            send()
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        run()


def test_the_former_handlers_come_back(said):
    before = signal.getsignal(signal.SIGTERM)
    with Signals(said.append).handled():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
