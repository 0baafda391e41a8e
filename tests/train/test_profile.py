import dataclasses
import gzip
import json

import pytest
import torch

from glalm.config.stages import StageConfig
from glalm.config.strict import ConfigError
from glalm.train.profile import Profiler


@pytest.mark.parametrize("start, recorded", [(0, 2), (3, 1), (4, 0)])
def test_requested_steps_are_traced(run_config, change, caplog, start, recorded):
    config = change(run_config, **{"train.profile_steps": (3, 4)})
    Profiler(config, torch.device("cpu"), rank=0, step=start)
    assert ("train.profile_steps=[3,4] is over, as the run resumes after step 4" in caplog.text) == (recorded == 0)
    with Profiler(config, torch.device("cpu"), rank=1, step=start) as profiler:
        for step in range(start + 1, 7):
            torch.ones(4, 4) @ torch.ones(4, 4)
            profiler.advance(step)
    trace = config.folder / "profile" / "rank_1.json.gz"
    assert trace.exists() == (recorded > 0)
    if recorded:
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        assert sum(event["name"] == "aten::mm" for event in events) == recorded


def test_run_that_ends_while_profiled_writes_its_trace(run_config, change):
    config = change(run_config, **{"train.profile_steps": (1, 9)})
    with Profiler(config, torch.device("cpu"), rank=0, step=0):
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert (config.folder / "profile" / "rank_0.json.gz").exists()


def test_nothing_is_profiled_by_default(run_config):
    with Profiler(run_config, torch.device("cpu"), rank=0, step=0) as profiler:
        profiler.advance(1)
    assert not run_config.folder.exists()


def test_steps_after_the_last_one_are_refused(run_config, change):
    """Those of a run with smaller batches than now before it was resumed, and of one with stages, are not."""
    late = change(run_config, **{"train.profile_steps": (7, 8)})
    with pytest.raises(ConfigError, match=r"train\.profile_steps=\[7,8\] begins after the run's last step, 6; choose"):
        Profiler(late, torch.device("cpu"), rank=0, step=0)
    longer = change(late, train=dataclasses.replace(late.train, steps=None, tokens=6 * 4 * 16))
    longer.resume_at(step=5, tokens=5 * 2 * 16, milestones=[(0, 0, 2, 16)])
    Profiler(longer, torch.device("cpu"), rank=0, step=5)
    stages = {"all": StageConfig(tokens=8 * 4 * 16)}
    staged = change(late, train=dataclasses.replace(late.train, steps=None, stages=stages))
    Profiler(staged, torch.device("cpu"), rank=0, step=0)


def test_memory_snapshot_needs_a_gpu(run_config, change):
    config = change(run_config, **{"train.profile_steps": (1, 2)})
    config.train.memory_snapshot = True
    with pytest.raises(ConfigError, match=r"train\.memory_snapshot=true needs a CUDA device"):
        Profiler(config, torch.device("cpu"), rank=0, step=0)
