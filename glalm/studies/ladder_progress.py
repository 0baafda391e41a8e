"""What each run of a ladder does now: written by the process that runs it, and shown by the one that waits."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from glalm.evals.result_files import read_json, write_json
from glalm.progress import ProgressBar, format_seconds
from glalm.train.metrics import read_last_row

if TYPE_CHECKING:
    from glalm.studies.ladder import LadderRun

PROGRESS_SECONDS = 2.0
PROGRESS_PERCENT = 5
# The bar averages over this time, because the end of an evaluation is a large step.
SPEED_SECONDS = 1800.0


@dataclass(frozen=True)
class RunStatus:
    """What a run does, or how it ended without being complete. It is in FOLDER/NAME.status.json.

    A file reaches the waiting process from every launcher, and before the launcher returns.
    """

    state: Literal["training", "evaluating", "stopped", "failed"]
    reason: str = ""  # of a failure

    def write(self, run: "LadderRun") -> None:
        write_json(status_path(run), asdict(self))


def read_status(run: "LadderRun") -> RunStatus | None:
    """Return the status of a run, or None if it has not started, or is complete."""
    content = read_json(status_path(run))
    return RunStatus(**content) if content else None


def clear_status(run: "LadderRun") -> None:
    status_path(run).unlink(missing_ok=True)


def status_path(run: "LadderRun") -> Path:
    return run.config.folder.with_name(f"{run.config.name}.status.json")


def log_path(run: "LadderRun") -> Path:
    """Return the file of what a run prints."""
    return run.config.folder.with_name(f"{run.config.name}.log")


# --------------------------------------------------------------------------------------------------- while all run


@contextmanager
def show_progress(runs: "list[LadderRun]") -> Iterator[None]:
    """Show each run's end, how much of the runs' work is done, and how long the rest will take.

    On a terminal this is a bar, elsewhere a line whenever PROGRESS_PERCENT more is done.
    """
    ended = threading.Event()
    with ProgressBar(speed_seconds=SPEED_SECONDS) as bar:
        watcher = threading.Thread(target=watch_runs, args=(runs, bar, ended), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


def watch_runs(runs: "list[LadderRun]", bar: ProgressBar, ended: threading.Event) -> None:
    total = sum(run.work for run in runs)
    first = sum(trained_tokens(run) for run in runs)
    start = time.monotonic()
    shown = first
    finished: dict[str, str] = {}
    bar.start_task(f"{len(runs)} runs", total=total, completed=first)
    is_last = False
    while not is_last:
        is_last = ended.wait(PROGRESS_SECONDS)
        for run in runs:
            if run.config.name not in finished and (end := describe_end(run)):
                finished[run.config.name] = end
                bar.log(f"{len(finished)}/{len(runs)} {run.config.name}: {end}")
        done, total, states = measure_progress(runs)
        status = f"{done / max(total, 1):.0%} of the work{states}"
        bar.update(completed=done, total=total, status=status)
        if not bar.is_drawn and done < total and done - shown >= total * PROGRESS_PERCENT / 100:
            shown = done
            left = (time.monotonic() - start) * (total - done) / (done - first)
            bar.log(f"{status}; about {format_seconds(left)} left")


def describe_end(run: "LadderRun") -> str | None:
    """Return how a run has ended: its perplexity, or why it failed. None: it has not, or was stopped."""
    if run.is_complete():
        record = run.results("perplexity")
        return f"perplexity {record['results']['perplexity']:.2f}" if record else "complete"
    status = read_status(run)
    return f"failed, see {log_path(run)}\n  {status.reason}" if status and status.state == "failed" else None


def measure_progress(runs: "list[LadderRun]") -> tuple[float, float, str]:
    """Return how much of the runs' work is done, how much there is, and what they do: "; 1 training, 1 evaluating".

    Of a failed run's work only what is done counts.
    """
    done = 0.0
    total = 0.0
    states: Counter[str] = Counter()
    for run in runs:
        is_complete = run.is_complete()
        status = read_status(run)
        work_done = run.work if is_complete else trained_tokens(run)
        has_failed = status is not None and status.state == "failed" and not is_complete
        done += work_done
        total += work_done if has_failed else run.work
        if status is not None:
            states[status.state] += 1
    parts = [f"{states[state]} {state}" for state in ("training", "evaluating") if states[state]]
    return done, total, f"; {', '.join(parts)}" if parts else ""


def trained_tokens(run: "LadderRun") -> int:
    """Return the tokens that a run has been trained on, by its metrics.jsonl."""
    row = read_last_row(run.config.folder / "metrics.jsonl")
    return run.config.tokens_at(row["step"]) if row else 0


# ------------------------------------------------------------------------------------------------------ at the end


def summarize_end(runs: "list[LadderRun]", reasons: list[str | None] | None, interrupted: str = "stopped") -> list[str]:
    """Return lines that say which runs are not complete and why. There are none if all are complete.

    Args:
        reasons: What the launcher returned for each run, or None if it was interrupted.
        interrupted: What the runs that had started do after that.
    """
    failures: dict[str, str] = {}
    lines = []
    states: Counter[str] = Counter()
    for run, reason in zip(runs, reasons or [None] * len(runs), strict=True):
        if run.is_complete():
            continue
        status = read_status(run)
        if status and status.state == "failed":
            reason = status.reason
        elif status is None and reasons is None:
            states["not started"] += 1
            continue
        elif status and status.state == "stopped":
            states["stopped"] += 1
            continue
        elif reasons is None:
            states[interrupted] += 1
            continue
        [first_line, *_] = (reason or "it ended without a result").splitlines()
        failures[run.config.name] = first_line
        where = f", see {log_path(run)}" if log_path(run).exists() else ""
        lines.append(f"{run.config.name}: {first_line}{where}")
    order = dict.fromkeys((interrupted, "stopped", "not started"))
    counts = [f"{states[state]} {state}" for state in order if states[state]]
    if failures:
        counts.append(f"{len(failures)} failed ({', '.join(failures)})")
    if counts:
        lines.append(f"Runs: {', '.join(counts)}. The same command resumes.")
    return lines
