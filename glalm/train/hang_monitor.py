"""End a process in which native code holds the interpreter's lock (GIL) and does not return.

No thread of such a process can run Python, so another process watches it: this file, run as a script. It ends the
process through libc alone, with the exit code and the stack of any other hang.
"""

import ctypes
import faulthandler
import functools
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.5  # at most
STACK_SIGNAL = getattr(signal, "SIGRTMAX", 0)  # macOS has none.
SIGEV_THREAD = 2
CLOSE_SECONDS = 5.0


_read_by_libc: list[ctypes.Structure | ctypes.Array] = []


class SigEvent(ctypes.Structure):
    """struct sigevent of <signal.h>."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("function", ctypes.c_void_p),
        ("padding", ctypes.c_char * 40),
    )


class AioControlBlock(ctypes.Structure):
    """struct aiocb of <aio.h>, with more than enough space for libc's own fields at the end."""

    _fields_ = (
        ("file", ctypes.c_int),
        ("opcode", ctypes.c_int),
        ("priority", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("event", SigEvent),
        ("internal", ctypes.c_char * 256),
    )


class HangMonitor:
    """Watch this process from another one, which ends it if `report` is not called for a while.

    Time in which this process is stopped (SIGSTOP), or both are, does not count. Only on Linux.

    Args:
        seconds: How long `report` may not be called.
        exit_code: With which this process then ends, after the stacks of its threads were printed to stderr.
        name: How the message calls this process.
    """

    def __init__(self, seconds: float, exit_code: int, name: str):
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)
        request_exit = open_exit_pipe(exit_code)
        reports, self._reports = os.pipe()
        os.set_blocking(self._reports, False)
        arguments = [*map(str, (os.getpid(), reports, request_exit, seconds)), name]
        # The monitor has a session of its own, so that Ctrl-C and Ctrl-Z in a terminal do not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(reports, request_exit),
            start_new_session=True,
        )
        os.close(reports)

    def report(self, phase: str) -> None:
        """Tell the monitor that this process runs Python, and what it does."""
        with suppress(OSError):  # Somebody has killed or stopped the monitor.
            os.write(self._reports, f"{phase}\n".encode())

    def close(self) -> None:
        """Stop watching. This process ends here if the monitor is ending it."""
        os.close(self._reports)
        self._reports = -1  # The system may give the number to another file.
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:  # Somebody has stopped the monitor.
            self._process.kill()
            self._process.wait()


@functools.cache  # libc's thread waits as long as the process lives, and libc has few such threads.
def open_exit_pipe(exit_code: int) -> int:
    """Return a pipe that ends this process with `exit_code` when a byte is written to it, even if Python cannot run.

    libc waits for the byte in a thread of its own (POSIX asynchronous I/O), which then calls _exit(exit_code).
    """
    exit_request, request_exit = os.pipe()
    end = ctypes.cast(ctypes.CDLL(None)._exit, ctypes.c_void_p)
    event = SigEvent(value=exit_code, notify=SIGEV_THREAD, function=end)
    buffer = ctypes.create_string_buffer(1)
    request = AioControlBlock(file=exit_request, buffer=ctypes.addressof(buffer), length=1, event=event)
    _read_by_libc.extend((request, buffer))
    library = ctypes.CDLL("librt.so.1", use_errno=True)  # Newer versions of glibc have the function in libc itself.
    if library.aio_read(ctypes.byref(request)):
        raise OSError(ctypes.get_errno(), "aio_read")
    return request_exit


def watch(pid: int, reports: int, request_exit: int, limit: float, name: str) -> None:
    """End the process `pid` if nothing is written to `reports` for `limit` seconds; return when it has ended."""
    poll = min(POLL_SECONDS, limit / 10)
    silence = 0.0
    phase = "starting"
    while True:
        before = time.monotonic()
        if select.select([reports], [], [], poll)[0]:
            content = os.read(reports, 2**16)
            if not content:
                return
            phase = content.decode().splitlines()[-1]
            silence = 0.0
            time.sleep(poll)  # However short the steps are, the monitor takes no time of a core.
        elif os.getppid() != pid:
            return  # A process that it forked still holds the pipe.
        elif not is_stopped(pid):
            silence += min(time.monotonic() - before, 2 * poll)
        if silence > limit:
            print(
                f"{name} ends the run: it hangs, {phase} for {silence:.0f} s, in code that holds Python's lock (GIL)",
                file=sys.stderr,
                flush=True,
            )
            os.kill(pid, STACK_SIGNAL)
            time.sleep(1)  # The process prints its stacks.
            os.write(request_exit, b"x")
            return


def is_stopped(pid: int) -> bool:
    """Return whether a signal or a debugger has stopped the process."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except (OSError, IndexError):
        return False
    return state in "tT"


if __name__ == "__main__":
    pid, reports, request_exit = map(int, sys.argv[1:4])
    watch(pid, reports, request_exit, limit=float(sys.argv[4]), name=sys.argv[5])
