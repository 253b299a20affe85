import os
import signal

import pytest

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
