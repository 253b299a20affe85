import io
import sys

import pytest
from absl import logging

from fvq_jax.training.progress import Progress

FIGURES = {"loss": "0.1235", "usage": "50.0%", "images/s": "321.0"}


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def log_lines(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda message, *arguments: lines.append(message % arguments))
    return lines


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_without_a_terminal_is_a_line_per_logged_step(log_lines, capsys):
    clock = Clock()
    with Progress(100, 0, clock=clock) as progress:
        clock.now += 50.0  # compilation
        progress.update(9)
        progress.update(10, FIGURES)
        clock.now += 5.0
        progress.update(20, {"loss": "0.1000", "usage": "100.0%", "images/s": "320.0"})
    assert log_lines == [
        "step 10/100, loss 0.1235, usage 50.0%, images/s 321.0, ETA 07:30",
        "step 20/100, loss 0.1000, usage 100.0%, images/s 320.0, ETA 00:40",
    ]
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_of_a_resumed_run_counts_only_its_own_steps(log_lines):
    clock = Clock()
    progress = Progress(100, 80, clock=clock)
    clock.now += 10.0
    progress.update(90, {"loss": "1.0000"})
    assert log_lines == ["step 90/100, loss 1.0000, ETA 00:10"]


def test_progress_on_a_terminal_is_a_bar_on_standard_error(log_lines, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, 40) as progress:
        progress.update(50, FIGURES)
    assert "40/100" in terminal.getvalue()
    last = terminal.getvalue().split("\r")[-1]
    for part in ("50%", "50/100", "loss=0.1235", "usage=50.0%", "images/s=321.0"):
        assert part in last
    assert log_lines == []
    assert capsys.readouterr().out == ""


def test_progress_of_other_processes_is_silent(log_lines, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress(100, 0, active=False) as progress:
        progress.update(10, FIGURES)
    assert terminal.getvalue() == ""
    assert log_lines == []
