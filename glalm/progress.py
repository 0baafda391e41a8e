"""What every command shows: its progress bar, its console, and how it ends when it is interrupted.

Output never affects the work: a command continues even if its output cannot be written.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NoReturn, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

INTERRUPTED = "Interrupted. The same command, run again, resumes from what was saved, or starts from the beginning."


LINE_SECONDS = 15.0  # between the lines of a long task where no bar is drawn


class IgnoreOSErrors:
    """A text stream that drops what it cannot write, and escapes characters that its encoding lacks.

    A closed terminal or pipe, or a log file on a full disk, must not stop a run: the console is only a view of its
    record.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def protect_output() -> None:
    """Let this process continue where its standard output or error cannot be written, as in `glalm eval | head`."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, IgnoreOSErrors):
            setattr(sys, name, IgnoreOSErrors(stream))


class StderrHandler(logging.Handler):
    """Print log records on stderr, warnings with their level before them, and never fail.

    The stream is looked up for each record, because `protect_output` and tests replace it.
    """

    def emit(self, record: logging.LogRecord) -> None:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        with suppress(OSError):
            print(f"{level}{record.getMessage()}", file=sys.stderr, flush=True)


def show_log() -> None:
    """Show what the package logs on stderr, from the level INFO on. Without this, logging shows warnings only."""
    logger = logging.getLogger("glalm")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, StderrHandler) for handler in logger.handlers):
        logger.addHandler(StderrHandler())


def run_command(main: Callable[[], int | None]) -> NoReturn:
    """Run the `main` of a command and exit with its code, or with 130 and one line after Ctrl-C."""
    show_log()
    try:
        code = main()
    except (KeyboardInterrupt, Exception) as error:
        # Where Ctrl-C comes within a `try`, its `finally` may fail, as OmegaConf's does, and hide it.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, KeyboardInterrupt):
            cause = cause.__context__
        if cause is None:
            raise
        print(INTERRUPTED, file=sys.stderr)
        code = 130
    sys.exit(code)


def format_seconds(seconds: float) -> str:
    """Return a duration as 40 s, 12 minutes or 5.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:,.1f} hours"


class ProgressBar:
    """A progress bar on stderr, and the console on which messages appear above it. Use it as a context manager.

    The bar is only drawn on a terminal. Messages are always printed, unless `quiet`.

    Args:
        quiet: Show neither the bar nor any message, as on all ranks but the first.
        speed_seconds: The time left follows from the speed in this time. Choose more where work is done in large steps.
        line_seconds: Where no bar is drawn, print a line when a task starts, and then at this interval. None: the
            caller prints its own.
    """

    def __init__(self, quiet: bool = False, speed_seconds: float = 30.0, line_seconds: float | None = None):
        # Markup is off, because an error's text may contain brackets.
        self.console = Console(
            file=IgnoreOSErrors(sys.stderr), quiet=quiet, markup=False, highlight=False, soft_wrap=True
        )
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[status]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
            speed_estimate_period=speed_seconds,
        )
        self._task = None
        self._line_seconds = None if self.is_drawn else line_seconds
        self._last_line = 0.0

    def __enter__(self) -> "ProgressBar":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    @property
    def is_drawn(self) -> bool:
        """Whether the bar is drawn, so that a caller need not print its status as well."""
        return not self._progress.disable

    @property
    def completed(self) -> float:
        """Units of the current task that are done."""
        return self._progress.tasks[-1].completed

    @property
    def speed(self) -> float:
        """Units of the current task that were done per second since it started."""
        task = self._progress.tasks[-1]
        return (task.completed - task.fields["first"]) / task.elapsed if task.elapsed else 0.0

    def start_task(self, description: str, total: float, completed: float = 0) -> None:
        """Add a bar for a task of `total` units, of which an interrupted run may have `completed` some already."""
        self._task = self._progress.add_task(description, total=total, completed=completed, first=completed, status="")
        if self._line_seconds is not None:
            self.log(f"{description} started")
            self._last_line = time.monotonic()

    def update(
        self,
        completed: float | None = None,
        advance: float | None = None,
        status: str | None = None,
        total: float | None = None,
    ) -> None:
        """Move the current task's bar to `completed` of `total` units, or by `advance`, and show `status` beside it."""
        fields = {} if status is None else {"status": status}
        self._progress.update(self._task, completed=completed, advance=advance, total=total, **fields)
        if self._line_seconds is not None and time.monotonic() - self._last_line >= self._line_seconds:
            task = self._progress.tasks[-1]
            self.log(f"{task.description}: {task.percentage:.0f}%  {task.fields['status']}".rstrip())
            self._last_line = time.monotonic()

    def log(self, message: str) -> None:
        """Print a message above the bar."""
        self.console.print(message)
