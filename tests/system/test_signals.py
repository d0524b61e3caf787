"""Signals: at once, after the step, and not twice for one Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from corefit.system import signals as module
from corefit.system.signals import Signals

ASKING = module.stop_signals()
pytestmark = pytest.mark.usefixtures("stays")


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def stays(monkeypatch):
    """The tests' own output is not that of a terminal which is gone."""
    monkeypatch.setattr(module, "leave_terminal", lambda: None)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.mark.parametrize("number", ASKING)
def test_outside_training_a_signal_ends_the_run_at_once(said, number):
    def run() -> None:
        with Signals(said.append).handled():
            send(number)
            pytest.fail("the signal was not heard")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert said == []


@pytest.mark.parametrize("number", ASKING)
def test_in_training_the_first_signal_requests_a_stop_and_the_second_stops_at_once(said, number):
    signals = Signals(said.append)

    def run() -> None:
        with signals.handled(), signals.training():
            send(number)
            assert signals.stop_requested
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


def test_hangup_and_a_scheduler_s_warning_are_heard_where_there_are_such():
    assert [number.name for number in ASKING] == [name for name in module.NAMES if hasattr(signal, name)]
    assert {signal.SIGINT, signal.SIGTERM} <= set(ASKING)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this platform has no SIGHUP")
def test_nohup_is_heeded(said):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals(said.append).handled():
            send(signal.SIGHUP)
            said.append("went on")
    finally:
        signal.signal(signal.SIGHUP, former)
    assert said == ["went on"]


def test_a_stop_is_requested_even_where_nothing_can_be_printed():
    def say(text: str) -> None:
        raise OSError("the terminal is gone")

    signals = Signals(say)
    with pytest.raises(KeyboardInterrupt), signals.handled(), signals.training():
        send()
    assert signals.stop_requested


def test_an_ending_process_ignores_further_signals():
    former = {number: signal.getsignal(number) for number in ASKING}
    try:
        module.ignore()
        for number in ASKING:
            send(number)
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


GONE = """\
import os, sys, time
from corefit.system.signals import Signals

asked = Signals(print)
with open(sys.argv[1], "w") as log, asked.handled():
    try:
        with asked.training():
            print("here", flush=True)
            while not asked.stop_requested:
                time.sleep(0.01)
            print("the next step's line", flush=True)
            log.write("checkpoint")
    except KeyboardInterrupt:
        log.write(" stopped")
"""
"""A process of a terminal: what it has to say when the terminal is gone must not end it."""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this platform has no terminals of its own")
def test_a_run_whose_terminal_is_gone_stops_in_order(tmp_path):
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", GONE, str(tmp_path / "log")]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    assert os.read(ours, 4) == b"here"
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    process.wait(timeout=60)
    assert (tmp_path / "log").read_text() == "checkpoint stopped"


def test_launched_processes_take_a_second_signal_for_an_echo(monkeypatch):
    """One process on one node, too: its launcher passes on what SLURM has sent to both."""
    monkeypatch.delenv("RANK", raising=False)
    assert [module.echo(1), module.echo(2)] == [0.0, module.ECHO]
    monkeypatch.setenv("RANK", "0")
    assert module.echo(1) == module.ECHO
