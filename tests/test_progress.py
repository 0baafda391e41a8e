import errno
import io
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from glalm import progress
from glalm.cli import exit_on_error
from glalm.progress import IgnoreOSErrors, ProgressBar, format_seconds, run_command, show_log

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "hours, text",
    [(0.02, "72 s"), (0.3, "18 minutes"), (1.4, "84 minutes"), (5.46, "5.5 hours"), (1234, "1,234.0 hours")],
)
def test_durations_are_in_readable_units(hours, text):
    assert format_seconds(3600 * hours) == text


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


def test_without_a_terminal_a_line_appears_now_and_then(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr("glalm.progress.time.monotonic", lambda: now)
    with ProgressBar(line_seconds=15) as bar:
        bar.start_task("perplexity", total=8)
        for done in range(1, 9):
            now += 5
            bar.update(completed=done, status=f"{done} tokens")
    lines = ["perplexity started", "perplexity: 38%  3 tokens", "perplexity: 75%  6 tokens"]
    assert capsys.readouterr().err.splitlines() == lines


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


@given(st.text(), st.sampled_from(["ascii", "latin-1", "utf-8"]), st.sampled_from(["strict", "surrogateescape"]))
@settings(deadline=None, max_examples=50)
def test_a_text_that_the_encoding_lacks_stops_nothing(text, encoding, errors):
    content = io.BytesIO()
    stream = io.TextIOWrapper(content, encoding, errors, newline="")
    guarded = IgnoreOSErrors(stream)
    guarded.write(text)
    guarded.flush()
    try:
        expected = text.encode(encoding, errors)
    except UnicodeEncodeError:
        expected = text.encode(encoding, "backslashreplace")
    assert content.getvalue() == expected


def test_a_command_goes_on_when_nobody_reads_what_it_prints(tmp_path):
    """As in `script | head -n 1`: the reader closes the pipe, and the command prints more than a pipe holds."""
    code = f"""
import sys
from pathlib import Path
from rich.console import Console
from glalm.progress import ProgressBar, protect_output, run_command
def main():
    for i in range(20_000):
        print("line", i)
    sys.stderr.writelines(["both ", "streams"] * 20_000)
    Console().print("by rich")
    with ProgressBar() as bar:
        bar.log("a message")
    Path({str(tmp_path / "done")!r}).touch()
    return 3
protect_output()
run_command(main)
"""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, stdout=write, stderr=write, cwd=ROOT, timeout=60)
    os.close(write)
    assert (tmp_path / "done").exists() and done.returncode == 3


def test_log_is_shown_on_stderr(capsys):
    show_log()  # A second call does not print twice.
    logging.getLogger("glalm.train").info("Resumed [at] 100%.")
    logging.getLogger("glalm.train").warning("%s was set aside.", "step_4")
    logging.getLogger("another").info("Not shown.")
    assert capsys.readouterr().err == "Resumed [at] 100%.\nwarning: step_4 was set aside.\n"


def test_log_ignores_a_stderr_that_cannot_be_written(monkeypatch):
    with open(os.devnull) as unwritable:
        monkeypatch.setattr(sys, "stderr", unwritable)
        logging.getLogger("glalm").warning("Nobody reads this.")


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ctrl_c_is_one_line_and_exit_code_130(capsys):
    with pytest.raises(SystemExit) as script:
        run_command(interrupt)
    with pytest.raises(SystemExit) as hydra_command, exit_on_error():
        interrupt()
    assert script.value.code == hydra_command.value.code == 130
    line = "Interrupted. The same command, run again, resumes from what was saved, or starts from the beginning.\n"
    assert capsys.readouterr().err == line * 2


def test_ctrl_c_that_another_error_hides_is_the_same(capsys):
    """OmegaConf fails so in its `finally`, if Ctrl-C comes before its `old` has a value."""

    def fail():
        try:
            interrupt()
        finally:
            raise UnboundLocalError("old")

    with pytest.raises(SystemExit) as script:
        run_command(fail)
    assert script.value.code == 130 and capsys.readouterr().err.startswith("Interrupted.")
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)
