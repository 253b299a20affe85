import ctypes
import os
import signal
import threading
import time

import pytest

from fvq_jax.runtime import interrupt as module
from fvq_jax.runtime.interrupt import Interrupt


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", Interrupt.SIGNALS)
def test_inside_a_signal_is_only_noted_and_afterwards_all_is_as_before(number):
    before = [signal.getsignal(each) for each in Interrupt.SIGNALS]
    with Interrupt() as interrupt:
        assert interrupt.signal is None
        send(number)
        assert interrupt.signal is number
    assert [signal.getsignal(each) for each in Interrupt.SIGNALS] == before


def test_a_second_signal_of_the_same_kind_ends_what_is_stuck():
    with Interrupt() as interrupt:
        send(signal.SIGINT)
        assert interrupt.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_follows_is_said_while_the_main_thread_is_busy_outside_python(monkeypatch):
    """As it is when it compiles: no handler of Python runs until it is back."""
    said, (wait, go_on) = [], os.pipe()
    monkeypatch.setattr(module.logging, "warning", lambda text, *args: said.append(text % args))

    def send_and_listen():
        signal.pthread_kill(
            threading.get_ident(), signal.SIGTERM
        )  # to this thread: it disturbs no call of the main one
        deadline = time.monotonic() + 20
        while not said and time.monotonic() < deadline:
            time.sleep(0.01)
        heard.extend(said)
        os.write(go_on, b"x")

    heard = []
    with Interrupt("it ends soon") as interrupt:
        thread = threading.Thread(target=send_and_listen)
        thread.start()
        ctypes.CDLL(None).read(wait, ctypes.create_string_buffer(1), 1)
        thread.join()
        assert heard == ["SIGTERM: it ends soon"]
        assert interrupt.signal is signal.SIGTERM
        send(signal.SIGINT)
    assert len(said) == 1  # once is enough
    assert signal.set_wakeup_fd(-1) == -1
