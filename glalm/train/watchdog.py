"""End a run on all processes, within a set time, when one of them has died, failed or hangs, and name that process."""

import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

from torch import distributed

from glalm.train.collectives import rank_and_world_size, run_on_rank_0
from glalm.train.flight_recorder import write_flight_record
from glalm.train.hang_monitor import HangMonitor

WATCHDOG_EXIT_CODE = 70
VERDICT_KEY = "verdict"
REPORT_INTERVAL = 0.5  # Seconds between two reports, at most.
MAX_DELAY = 5  # Intervals between two turns of a thread that count at most: in more, the process was not scheduled.
MAX_SILENCE = 60.0  # Seconds until a process without a sign of life counts as dead, at most.


@dataclass
class Status:
    """What a process tells rank 0 about itself."""

    process: str = "not started"  # "process 4711 on node3"
    ticks: int = 0  # counted by the watchdog's thread: the process lives
    phases: int = 0  # counted by `begin_phase`: how far its training has come
    heartbeats: int = 0  # counted by `heartbeat`: it makes progress within its phase
    phase: str = "starting"
    failure: str | None = None  # the exception with which it left the context
    is_done: bool = False


@dataclass
class Observation:
    """The latest status of a process, and when it changed, in seconds for which this process was awake."""

    status: Status
    lived_at: float
    progressed_at: float


class Watchdog:
    """Watch the processes of a run. Use it as a context manager around the training.

    Every process calls `begin_phase` at each new part of its work, all of them in the same order, and `heartbeat` as
    often as it likes within a part. A thread of each process reports this to rank 0.

    Rank 0 ends the run if a process called neither for `hang_seconds`, if a process's thread is silent (the process was
    killed, or its machine is down), or if a process left the context by an exception. Then every process exits at once
    with WATCHDOG_EXIT_CODE, even from within a collective. If several processes hang, those in the earliest phase are
    named, because the others wait for them, and before them any whose thread is silent. If rank 0 itself dies or hangs,
    the others notice that its store is gone or does not change.

    Time in which a process was not scheduled (SIGSTOP, a suspended machine, a frozen container) does not count. A
    HangMonitor ends a process whose threads cannot run.

    Args:
        hang_seconds: None tolerates hangs.
        folder: Where each process of several writes its last collectives when the run is ended.
    """

    def __init__(self, hang_seconds: float | None, folder: Path | None = None):
        self._folder = folder
        self._start_time = time.time()
        self.rank, self.world_size = rank_and_world_size()
        self.hang_seconds = hang_seconds or math.inf
        self.interval = min(REPORT_INTERVAL, self.hang_seconds / 10)
        # A busy machine may delay a living process's thread, hence at least ten intervals.
        self.silence_limit = max(10 * self.interval, min(self.hang_seconds, MAX_SILENCE))
        self._status = Status(process=f"process {os.getpid()} on {socket.gethostname()}")
        self._observations: dict[int, Observation] = {}
        self._first_failure_at: float | None = None
        self._is_over = threading.Event()
        self._store = self._connect() if self.world_size > 1 else None
        self._awake_seconds = 0.0
        self._store_answered_at = 0.0
        self._monitor: HangMonitor | None = None
        loops = [self._count_seconds, self._watch]
        if self.rank:
            loops.append(self._watch_store)
        self._threads = [threading.Thread(target=loop, name="glalm-watchdog", daemon=True) for loop in loops]

    def begin_phase(self, phase: str) -> None:
        """Report a new part of the work, as in "rank 1 hangs: PHASE for 1800 s"."""
        self._status.phase = phase
        self._status.phases += 1
        if self._monitor:
            self._monitor.report(phase)

    def heartbeat(self, *_) -> None:
        """Report progress within the current phase. The arguments are ignored, so that this can be any callback."""
        self._status.heartbeats += 1

    def __enter__(self) -> "Watchdog":
        if self.hang_seconds < math.inf and sys.platform == "linux":
            name = f"rank {self.rank} ({self._status.process})"
            self._monitor = HangMonitor(self.hang_seconds, WATCHDOG_EXIT_CODE, name)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self.world_size > 1:
            # Stay until rank 0 has told the others the reason. Otherwise they would only see a broken connection.
            self._status.failure = f"{kind.__name__}: {error}"
            self._is_over.wait(2 * self.silence_limit)
        self._status.is_done = True
        if self.world_size > 1:
            self._is_over.wait(10 * self.interval if self.rank else self.silence_limit)
        self._is_over.set()
        self._threads[0].join()

    def _connect(self) -> distributed.TCPStore:
        """Open a store of our own, because a wait for a key blocks every other access to torch's store."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        timeout = timedelta(seconds=self.silence_limit)
        open_store = partial(distributed.TCPStore, host, timeout=timeout, wait_for_workers=False)
        store = open_store(port=0, is_master=True) if self.rank == 0 else None
        port = run_on_rank_0(lambda: store.port if store else 0)
        return store or open_store(port=port, is_master=False)

    def _count_seconds(self) -> None:
        """Advance the clock by which all times here are measured, and report to the monitor that this process runs."""
        previous = time.monotonic()
        while not self._is_over.wait(self.interval):
            now = time.monotonic()
            self._awake_seconds += min(now - previous, MAX_DELAY * self.interval)
            previous = now
            if self._monitor:
                self._monitor.report(self._status.phase)
        if self._monitor:
            self._monitor.close()

    def _watch(self) -> None:
        while not self._is_over.wait(self.interval):
            self._status.ticks += 1
            try:
                diagnosis = self._judge_all() if self.rank == 0 else self._report_to_rank_0()
                self._store_answered_at = self._awake_seconds
            except RuntimeError as error:  # The store does not answer.
                if self._status.is_done:
                    self._is_over.set()
                    return
                diagnosis = f"rank 0 has died: its store does not answer ({str(error).splitlines()[0]})"
            failure = self._status.failure
            if diagnosis and failure and failure in diagnosis and "has died" not in diagnosis:
                # The others know now that this process failed. It ends by its own exception.
                self._is_over.set()
                return
            if diagnosis:
                self._exit(diagnosis)

    def _watch_store(self) -> None:
        """Notice a rank 0 that is stopped but not dead, whose store makes `_report_to_rank_0` wait forever."""
        while not self._is_over.wait(self.interval):
            waited = self._awake_seconds - self._store_answered_at
            if waited > self.silence_limit:
                self._exit(f"rank 0 has died or hangs: its store does not answer for {waited:.0f} s")

    def _report_to_rank_0(self) -> str:
        """Send this process's status to rank 0. Return why the run must end, or nothing."""
        assert self._store is not None  # There are other processes.
        self._store.set(str(self.rank), json.dumps(asdict(self._status)))
        if not self._store.check([VERDICT_KEY]):
            return ""
        verdict = json.loads(self._store.get(VERDICT_KEY))
        if verdict["is_over"]:
            self._is_over.set()
        self._observe(0, Status(**verdict["rank_0"]))
        return verdict["diagnosis"] or "; ".join(self._find_silent(self.silence_limit, [0]))

    def _judge_all(self) -> str:
        """Collect all processes' statuses, on rank 0, and tell the others the verdict. Return why the run must end."""
        self._observe(0, self._status)
        others = [str(rank) for rank in range(1, self.world_size)]
        statuses: list[dict] = [{}] * len(others)
        if self._store is not None and self._store.check(others):
            statuses = [json.loads(report) for report in self._store.multi_get(others)]
        for rank, status in enumerate(statuses, 1):
            self._observe(rank, Status(**status))
        diagnosis = self._diagnose()
        is_over = all(observation.status.is_done for observation in self._observations.values())
        if self._store is not None:
            verdict = {"rank_0": asdict(self._status), "diagnosis": diagnosis, "is_over": is_over}
            self._store.set(VERDICT_KEY, json.dumps(verdict))
        if (diagnosis or is_over) and self.world_size > 1:
            # Keep the store open until the others have read the verdict.
            time.sleep((5 if diagnosis else 2) * self.interval)
        if is_over:
            self._is_over.set()
        return diagnosis

    def _observe(self, rank: int, status: Status) -> None:
        now = self._awake_seconds
        seen = self._observations.setdefault(rank, Observation(replace(status), now, now))
        if seen.status.ticks != status.ticks:
            seen.lived_at = now
        if (seen.status.phases, seen.status.heartbeats) != (status.phases, status.heartbeats):
            seen.progressed_at = now
        seen.status = replace(status)  # A copy, because this process's own status changes.

    def _diagnose(self) -> str:
        """Return which processes have failed, have died or hang, or nothing."""
        now = self._awake_seconds
        failed = [
            f"rank {rank} failed: {seen.status.failure} ({seen.status.process}, {seen.status.phase})"
            for rank, seen in self._observations.items()
            if seen.status.failure
        ]
        # The others may fail or hang because a process died, which takes a few intervals to notice.
        silent = self._find_silent(5 * self.interval, self._observations)
        if failed:
            self._first_failure_at = self._first_failure_at or now
            is_clear = silent or now > self._first_failure_at + 8 * self.interval
            return "; ".join([*silent, *failed]) if is_clear else ""
        if dead := self._find_silent(self.silence_limit, self._observations):
            return "; ".join(dead)
        running = {rank: seen for rank, seen in self._observations.items() if not seen.status.is_done}
        earliest = min((seen.status.phases for seen in running.values()), default=0)
        hanging = [
            f"rank {rank} hangs: {seen.status.phase} for {now - seen.progressed_at:.0f} s ({seen.status.process})"
            for rank, seen in running.items()
            if seen.status.phases == earliest and now - seen.progressed_at > self.hang_seconds
        ]
        return "; ".join([*silent, *hanging]) if hanging else ""

    def _find_silent(self, limit: float, ranks: Iterable[int]) -> list[str]:
        """Name those of `ranks` whose threads have been silent for more than `limit` seconds."""
        silent = []
        for rank in ranks:
            seen = self._observations[rank]
            seconds = self._awake_seconds - seen.lived_at
            if seconds > limit and not seen.status.is_done:
                where = f"{seen.status.process}, {seen.status.phase}"
                silent.append(f"rank {rank} has died or hangs: no sign of life for {seconds:.0f} s ({where})")
        return silent

    def _exit(self, diagnosis: str) -> None:
        """End this process at once. Before, write its last collectives, and name the files of all ranks so far."""
        try:
            records: list[Path] = []
            if self._folder is not None and self.world_size > 1:
                records = write_flight_record(self._folder, self.rank, self._start_time)
            written = f". Last collectives: {', '.join(map(str, records))}" if records else ""
            print(f"rank {self.rank} ends the run: {diagnosis}{written}", file=sys.stderr, flush=True)
            if f"rank {self.rank} hangs" in diagnosis:
                faulthandler.dump_traceback(all_threads=True)
        finally:  # Exit even if standard error is on a full disk.
            os._exit(WATCHDOG_EXIT_CODE)
