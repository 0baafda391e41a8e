"""Keep a record of each process's last collectives, and write it into the run's folder when the run hangs.

torch's flight recorder keeps it in memory: which collective, of which shape, from which line, and whether it started
and ended. Between ranks that wait for each other, the records differ where the hang began. Read them by
`python -m torch.distributed.flight_recorder.fr_trace runs/NAME -p flight_record_rank_`.
"""

import threading
from collections.abc import MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import distributed
from torch._C import _distributed_c10d

PREFIX = "flight_record_rank_"
DUMP_SECONDS = 10.0
# The variables of torch that switch on its recorder, and NCCL's dump at torch's own timeout. The first name of each is
# that of torch 2.11 and later, and the other an older one, which torch still reads.
SETTINGS = {
    ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"): "2000",
    ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1",
}
DUMP_PATH = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def enable_flight_recorder(folder: Path, environ: MutableMapping[str, str]) -> None:
    """Switch on torch's flight recorder, with its files in the run's `folder`. What the user has set stays.

    Call it before the process group is initialized.
    """
    for names, value in {**SETTINGS, DUMP_PATH: str(folder.absolute() / PREFIX)}.items():
        if not any(name in environ for name in names):
            environ[names[0]] = value


def write_flight_record(folder: Path, rank: int, since: float) -> list[Path]:
    """Write the last collectives of this process to `folder`.

    Args:
        folder: The run's folder.
        rank: The process's rank.
        since: The time at which the run started. Older records are those of earlier starts.

    Returns:
        The records of all ranks that have been written so far, by their processes or by torch. Empty if that took
        longer than DUMP_SECONDS or failed: the disk may be full, or be what the run hangs at.
    """
    records = []

    def write() -> None:
        # NCCL's collectives are in a recorder of their own. On CPUs gloo's count, also in a build of torch with CUDA.
        recorder: Any = _distributed_c10d  # Its stubs declare neither function.
        uses_nccl = distributed.is_initialized() and "nccl" in str(distributed.get_backend_config())
        dump = recorder._dump_nccl_trace if uses_nccl else recorder._dump_fr_trace
        with suppress(OSError):
            (folder / f"{PREFIX}{rank}").write_bytes(dump())
            written = [path for path in folder.glob(f"{PREFIX}*") if path.stat().st_mtime >= since]
            records.extend(sorted(written))

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(DUMP_SECONDS)
    return records
