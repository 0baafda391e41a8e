import errno
import io

import pytest
from rich.console import Console

from glalm import progress
from glalm.progress import IgnoreOSErrors, ProgressBar


def test_messages_are_printed_as_they_are(capsys):
    with ProgressBar() as bar:
        bar.log("an error of x[0]: " + "long " * 50)
    assert capsys.readouterr().err == "an error of x[0]: " + "long " * 50 + "\n"


def test_quiet_shows_nothing(capsys):
    with ProgressBar(quiet=True) as bar:
        bar.start_task("reading", 10)
        bar.update(completed=5, status="half")
        bar.log("hidden")
    assert capsys.readouterr().err == "" and not bar.is_drawn


def test_a_terminal_shows_the_current_task(monkeypatch):
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=120)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    with ProgressBar() as bar:
        bar.start_task("reading", 10)
        bar.update(completed=10)
        bar.start_task("tokenising", 100, completed=40)
        bar.update(advance=10, status="3 documents")
        assert (bar.is_drawn, bar.completed) == (True, 50)
        assert bar.speed > 0
    assert "tokenising" in terminal.getvalue() and "3 documents" in terminal.getvalue()


def test_a_stream_that_cannot_be_written_stops_nothing(monkeypatch):
    class ClosedTerminal(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stderr", ClosedTerminal())
    with ProgressBar() as bar:
        bar.log("lost")
    with pytest.raises(OSError, match="Input/output error"):
        ClosedTerminal().write("x")
    assert IgnoreOSErrors(ClosedTerminal()).write("x") is None
