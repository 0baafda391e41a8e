"""An action that fails on one process only ends on all of them with an error, and none waits for another."""

import os

import pytest
import torch.distributed
from processes import start, text, wait

from glalm.config.strict import RunError
from glalm.train.collectives import gather_or_raise, run_on_rank_0


def check_errors_of_one_rank() -> int:
    """Run on each of two processes: rank 1 fails first, then rank 0, then neither."""
    torch.distributed.init_process_group("gloo")
    rank = int(os.environ["RANK"])

    def fail_on(failing_rank: int) -> int:
        if rank == failing_rank:
            raise OSError(f"no space on rank {rank}")
        return rank

    for failing_rank in (1, 0):
        expected = OSError if rank == failing_rank else RunError
        message = f"no space on rank {failing_rank}"
        with pytest.raises(
            expected, match=message if expected is OSError else f"rank {failing_rank}: OSError: {message}"
        ):
            gather_or_raise(lambda failing_rank=failing_rank: fail_on(failing_rank))
    with pytest.raises(OSError if rank == 0 else RunError, match="no space on rank 0"):
        run_on_rank_0(lambda: fail_on(0))
    assert gather_or_raise(lambda: 10 * rank) == [0, 10]
    assert run_on_rank_0(lambda: f"from rank {rank}") == "from rank 0"
    print("all collectives agreed")
    torch.distributed.destroy_process_group()
    return 0


def test_error_of_one_rank_is_raised_on_every_rank(tmp_path):
    log = tmp_path / "log"
    assert wait(start(check_errors_of_one_rank, log=log, world=2)) == [0, 0], text(log) + text(log, 1)
    assert all("all collectives agreed" in text(log, rank) for rank in (0, 1))
