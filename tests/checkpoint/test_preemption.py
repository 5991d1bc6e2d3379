"""A signal leads to one more checkpoint, and then to the end that it would have been."""

import os
import signal

import pytest
from processes import in_child

from torch_s3 import CheckpointManager


@pytest.fixture
def run(tmp_path):
    return CheckpointManager(f"file://{tmp_path}/run")


def _train(run, at, steps=5, **settings):
    """Count to ``steps``, with a signal within step ``at``."""
    state = {}
    with run.on_preemption(lambda: (state["step"], dict(state)), **settings) as preemption:
        for step in range(steps):
            state["half"] = step
            if step == at:
                signal.raise_signal(signal.SIGTERM)
            state["step"] = step
            preemption.check()


def test_sigterm_saves_the_whole_state_and_ends_the_process(run):
    assert in_child(lambda: _train(run, at=3)) == -signal.SIGTERM
    assert run.steps() == [3]
    assert run.load().state == {"step": 3, "half": 3}


def test_signal_after_the_last_check_saves_at_the_blocks_end(run):
    def train():
        with run.on_preemption(lambda: (8, {"step": 8})):
            signal.raise_signal(signal.SIGTERM)

    assert in_child(train) == -signal.SIGTERM
    assert run.steps() == [8]


def test_without_a_signal_nothing_is_saved_and_the_handler_is_put_back(run):
    before = signal.getsignal(signal.SIGTERM)
    _train(run, at=None)

    assert run.steps() == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_handler_of_before_decides_how_it_ends(run, monkeypatch):
    def leave(number, frame):
        os._exit(7)

    def train():
        signal.signal(signal.SIGTERM, leave)
        _train(run, at=1)

    assert in_child(train) == 7
    assert run.steps() == [1]


def test_process_that_ignores_the_signal_goes_on_and_saves_once(run):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _train(run, at=1)
        assert run.steps() == [1]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_exception_saves_nothing_for_the_state_may_be_half(run):
    def train():
        with run.on_preemption(lambda: (1, {})):
            signal.raise_signal(signal.SIGTERM)
            raise ZeroDivisionError

    assert in_child(train) == -signal.SIGTERM
    assert run.steps() == []


def test_second_signal_is_met_at_once(run):
    def train():
        with run.on_preemption(lambda: (1, {})) as preemption:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            preemption.check()

    assert in_child(train) == -signal.SIGTERM
    assert run.steps() == []


def test_save_that_fails_ends_the_process_too(run):
    assert in_child(lambda: _fails(run)) == -signal.SIGTERM
    assert run.steps() == []


def _fails(run):
    with run.on_preemption(lambda: 1 / 0) as preemption:
        signal.raise_signal(signal.SIGTERM)
        preemption.check()


def test_save_under_way_is_waited_for_and_its_step_not_saved_again(run):
    def train():
        with run.on_preemption(lambda: (4, {"step": 4})) as preemption:
            run.save_async(4, {"step": 4})
            signal.raise_signal(signal.SIGTERM)
            preemption.check()

    assert in_child(train) == -signal.SIGTERM
    assert run.steps() == [4]
    assert run.load().state == {"step": 4}


def test_rank_that_saves_nothing_ends_when_it_is_told(run):
    def train():
        with run.on_preemption(None) as preemption:
            assert not preemption.requested
            preemption.finish()  # another rank had the signal

    assert in_child(train) == -signal.SIGTERM
    assert run.steps() == []


def test_other_signals_may_be_named(run):
    def train():
        with run.on_preemption(lambda: (1, {}), signals=[signal.SIGUSR1]) as preemption:
            signal.raise_signal(signal.SIGUSR1)
            preemption.check()

    assert in_child(train) == -signal.SIGUSR1
    assert run.steps() == [1]
