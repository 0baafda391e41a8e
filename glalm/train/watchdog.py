"""Ends a run of which a process has died, failed or hangs, on all processes and within a set time, and says which."""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta

from torch import distributed

from glalm.train.collectives import gather_or_raise

EXIT = 70  # the exit code of the processes that are ended here
VERDICT = "verdict"
BEGINNING = {"alive": 0, "beats": 0, "signs": 0, "where": "starting", "failed": None, "done": False}


class Watchdog:
    """Each process calls `beat` as it comes to a new part of its work, all of them alike, and `alive` in the midst of
    one, as often as it likes; a thread of each tells rank 0 of it.

    A process that calls neither for `seconds`, or one whose thread is silent (it was killed, or its machine has
    gone), or that left the context by an exception: rank 0 says so to all, and each ends at once, with exit code EXIT,
    even when it waits in a collective. When several stand still, those that came least far are named: the others wait
    for them. When rank 0 is the one, the others notice that its store is gone or stands still.
    seconds: None leaves hangs alone. One process watches itself.
    """

    def __init__(self, seconds: float | None, rank: int = 0, world: int = 1, tick: float = 0.5):
        self.seconds, self.rank, self.world = seconds or float("inf"), rank, world
        self.tick = min(tick, self.seconds / 10)
        self.silence = max(10 * self.tick, min(self.seconds, 60.0))  # a thread may be kept waiting by a busy machine
        here = f"process {os.getpid()} on {socket.gethostname()}"
        self._status = {**BEGINNING, "here": here}
        self._seen: dict[int, tuple[dict, float, float]] = {}  # status, when it last was alive, when it last beat
        self._failed_at: float | None = None
        self._over = threading.Event()
        self._store = self._connect() if world > 1 else None
        self._answered = time.monotonic()
        loops = [self._watch] + ([self._watch_store] if self.rank else [])
        self._threads = [threading.Thread(target=loop, name="glalm-watchdog", daemon=True) for loop in loops]

    def beat(self, where: str) -> None:
        """where: what this process does from here on, as in "rank 1 hangs: WHERE"."""
        self._status |= {"beats": self._status["beats"] + 1, "where": where}

    def alive(self, *_) -> None:
        """It goes on. No beat: processes are told apart by how many of these they have made."""
        self._status["signs"] += 1

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if error is not None and self.world > 1:
            # It stays until rank 0 has told the others, which would else see no more than a broken connection.
            self._status["failed"] = f"{kind.__name__}: {error}"
            self._over.wait(2 * self.silence)
        self._status["done"] = True
        if self.world > 1:
            self._over.wait(10 * self.tick if self.rank else self.silence)
        self._over.set()

    def _connect(self) -> distributed.TCPStore:
        """A store of its own: torch's is blocked by whoever waits for something in it."""
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        given = {"world_size": None, "timeout": timedelta(seconds=self.silence), "wait_for_workers": False}
        if self.rank == 0:
            store = distributed.TCPStore(host, 0, is_master=True, **given)
        [port, *_] = gather_or_raise(lambda: store.port if self.rank == 0 else None)
        return store if self.rank == 0 else distributed.TCPStore(host, port, is_master=False, **given)

    # ---------------------------------------------------------------------------------------------------- the thread

    def _watch(self) -> None:
        while not self._over.wait(self.tick):
            self._status["alive"] += 1
            try:
                verdict = self._judge() if self.rank == 0 else self._report()
                self._answered = time.monotonic()
            except RuntimeError as error:  # of the store
                if self._status["done"]:
                    return self._over.set()
                verdict = f"rank 0 has died: its store does not answer ({str(error).splitlines()[0]})"
            failed = self._status["failed"]
            if verdict and failed and failed in verdict and "has died" not in verdict:
                return self._over.set()  # it ends by its own error, which the others know now
            if verdict:
                self._end(verdict)

    def _watch_store(self) -> None:
        """A store whose process is stopped, not dead, keeps `_report` waiting for ever."""
        while not self._over.wait(self.tick):
            if (waited := time.monotonic() - self._answered) > self.silence:
                self._end(f"rank 0 has died or hangs: its store does not answer for {waited:.0f} s")

    def _report(self) -> str | None:
        """Tells rank 0 how far this process is: what rank 0 says of the run."""
        self._store.set(str(self.rank), json.dumps(self._status))
        if not self._store.check([VERDICT]):
            return None
        said = json.loads(self._store.get(VERDICT))
        if said["over"]:
            self._over.set()
        self._note(0, said)
        return said["verdict"] or "; ".join(self._silent(self.silence, {0: self._seen[0]}))

    def _judge(self) -> str | None:
        """What rank 0 makes of all statuses; it tells the others."""
        self._note(0, self._status)
        others = [str(rank) for rank in range(1, self.world)]
        if others and self._store.check(others):
            statuses = map(json.loads, self._store.multi_get(others))
        else:  # not all of them have begun
            statuses = ({**BEGINNING, "here": self._status["here"]} for _ in others)
        for rank, status in zip(others, statuses, strict=True):
            self._note(int(rank), status)
        verdict = self._failure() or self._stands_still(self._seen)
        over = all(status["done"] for status, *_ in self._seen.values())
        if self._store is not None:
            self._store.set(VERDICT, json.dumps({**self._status, "verdict": verdict, "over": over}))
        if (verdict or over) and self.world > 1:
            time.sleep((5 if verdict else 2) * self.tick)  # for the others to read it, while there is a store
        if over:
            self._over.set()
        return verdict

    def _note(self, rank: int, status: dict) -> None:
        now = time.monotonic()
        before, alive, beat = self._seen.get(rank, (None, now, now))
        alive = alive if before and before["alive"] == status["alive"] else now
        moved = before is None or any(before[name] != status[name] for name in ("beats", "signs"))
        beat = now if moved else beat
        self._seen[rank] = (dict(status), alive, beat)

    def _failure(self) -> str | None:
        """After a process has failed: whether because of another that is silent, which takes a while to know."""
        failed = [f"rank {r} failed: {s['failed']} ({s['here']}, {s['where']})"
                  for r, (s, *_) in self._seen.items() if s["failed"]]  # fmt: skip
        if not failed:
            return None
        self._failed_at = self._failed_at or time.monotonic()
        silent = self._silent(5 * self.tick, self._seen)
        if silent or time.monotonic() > self._failed_at + 8 * self.tick:
            return "; ".join([*silent, *failed])
        return None

    def _silent(self, limit: float, seen: dict) -> list[str]:
        now = time.monotonic()
        return [f"rank {r} has died or hangs: no sign of life for {now - alive:.0f} s ({s['here']}, {s['where']})"
                for r, (s, alive, _) in seen.items() if now - alive > limit and not s["done"]]  # fmt: skip

    def _stands_still(self, seen: dict) -> str | None:
        now = time.monotonic()
        if silent := self._silent(self.silence, seen):
            return "; ".join(silent)
        least = min((s["beats"] for s, *_ in seen.values() if not s["done"]), default=0)
        return "; ".join(
            f"rank {r} hangs: {s['where']} for {now - beat:.0f} s ({s['here']})"
            for r, (s, _, beat) in seen.items()
            if s["beats"] == least and now - beat > self.seconds and not s["done"]
        )

    def _end(self, verdict: str) -> None:
        try:
            print(f"rank {self.rank} ends the run: {verdict}", file=sys.stderr, flush=True)
            if f"rank {self.rank} hangs" in verdict:
                faulthandler.dump_traceback(all_threads=True)
        finally:  # also where the log is on a full disk
            os._exit(EXIT)
