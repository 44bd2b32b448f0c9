"""Ctrl-C while a text is generated: noted first, raised by `check`, at once the second time."""

import os
import signal
import threading

import pytest

from specdec.interrupt import Interrupts


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_ctrl_c_waits_for_check():
    done = []
    with Interrupts() as interrupts:
        interrupts.check()
        ctrl_c()
        done.append("the round goes on")
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
        interrupts.check()
    assert done


def test_the_second_one_does_not_wait():
    with Interrupts() as interrupts:
        ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()


def test_the_handler_from_before_is_back_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


def test_what_nobody_checked_goes_to_the_handler_from_before():
    with pytest.raises(KeyboardInterrupt), Interrupts():
        ctrl_c()
    with Interrupts() as outer:
        with Interrupts():
            ctrl_c()
        with pytest.raises(KeyboardInterrupt):
            outer.check()


def test_other_threads_have_no_signals_and_work_all_the_same():
    failures = []

    def run():
        try:
            with Interrupts() as interrupts:
                interrupts.check()
        except BaseException as error:
            failures.append(error)

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_ctrl_c_that_is_not_pythons_own_stays_as_it_is(handler):
    """A job in the background of a script ignores it: it is meant for others."""
    before = signal.signal(signal.SIGINT, handler)
    try:
        with Interrupts() as interrupts:
            assert signal.getsignal(signal.SIGINT) is handler
            if handler is signal.SIG_IGN:
                ctrl_c()
            interrupts.check()
        assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_python_did_not_install_stays(monkeypatch):
    """getsignal has no name for it."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *a: pytest.fail("replaced"))
    with Interrupts() as interrupts:
        interrupts.check()
