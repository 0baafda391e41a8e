"""The comparison of two checkouts: its measurements at tiny sizes, its verdicts, and what it does with failures."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TREE = Path(__file__).parents[2]
SCRIPT = TREE / "benchmarks" / "compare_trees.py"


@pytest.fixture(scope="module")
def compare_trees(load_benchmark):
    return load_benchmark("compare_trees")


@pytest.fixture
def visit(compare_trees, tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    return compare_trees.Visit(TREE, folder, smoke=True, deadline=time.monotonic() + 300)


@pytest.mark.slow
def test_table_and_record_of_a_whole_comparison(tmp_path):
    record = tmp_path / "record.json"
    command = [sys.executable, str(SCRIPT), str(TREE), str(TREE), "--smoke", "--only", "loader", "--out", str(record)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| row | old | new | new/old | old/old |" in done.stdout
    content = json.loads(record.read_text())
    [row] = content["rows"]
    assert row["row"] == "loader, 2 workers, tokens/s" and min(row["old"], row["new"], row["old_again"]) > 0
    assert content["failures"] == [] and content["environment"]["new"]["package"] == str(TREE / "glalm/__init__.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, expected",
    [
        ("kernels", ["chunk_gla on the host, forward, us", "chunk_gla on the host, both passes, us"]),
        ("training_340m", ["training 340m, tokens/s", "training 340m, first step, s"]),
        ("run", ["train.py, the host's time a step, ms", "train.py, whole run, s", "train.py, peak host memory, MiB"]),
        ("checkpoint", ["checkpoint, training waits, s", "checkpoint, complete after, s"]),
        ("decoding", ["decoding, batch 1, tokens/s"]),
    ],
)
def test_measurement_fits_the_commands_of_this_tree(compare_trees, visit, monkeypatch, name, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    values = compare_trees.MEASUREMENTS[name].measure(visit)
    assert set(expected) <= set(values)
    assert all(value > 0 for value in values.values())


@pytest.mark.parametrize(
    "name, first, new, again, worse",
    [
        ("step, ms", 100.0, 100.9, 100.0, False),  # less than 1 %
        ("step, ms", 100.0, 102.0, 100.5, True),
        ("step, ms", 100.0, 102.0, 105.0, False),  # less than the noise
        ("step, ms", 100.0, 50.0, 100.0, False),
        ("speed, tokens/s", 100.0, 98.0, 100.5, True),
        ("speed, tokens/s", 100.0, 150.0, 100.0, False),
        ("step, ms", 100.0, None, 100.0, False),  # a failure, which the table reports by itself
    ],
)
def test_only_a_loss_beyond_the_noise_is_worse(compare_trees, name, first, new, again, worse):
    assert compare_trees.Row(name, first, new, again).is_worse() is worse


def test_failed_command_is_named_and_the_others_are_measured(compare_trees, visit, tmp_path, monkeypatch, capsys):
    def fail(_):
        return visit.run(write_script(tmp_path, "raise SystemExit('no such kernel')"))

    monkeypatch.setattr(
        compare_trees,
        "MEASUREMENTS",
        {
            "broken": compare_trees.Measurement(fail, 1),
            "sound": compare_trees.Measurement(lambda _: {"sound, ms": 1.0}, 1),
        },
    )
    comparison = compare_trees.compare({"old": visit, "new": visit, "again": visit}, ["broken", "sound"])
    assert [row.name for row in comparison.rows] == ["sound, ms"]
    assert len(comparison.failures) == 3 and "script.py ended with 1: no such kernel" in comparison.failures[1]
    compare_trees.print_table(comparison)
    assert "FAILED: broken, new: MeasurementError" in capsys.readouterr().out


def test_command_past_its_time_is_killed_with_its_children(compare_trees, tmp_path):
    script = write_script(tmp_path, "import subprocess, time; subprocess.Popen(['sleep', '60']); time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(compare_trees.MeasurementError, match="ended with -9"):
        compare_trees.run_command([sys.executable, str(script)], dict(os.environ), tmp_path, timeout=1.0)
    assert time.monotonic() - start < 30


def test_peak_memory_is_the_commands_own(tmp_path):
    """A process of its own calls it, as on the command line: a child's peak begins with the memory of its parent."""
    script = write_script(tmp_path, "block = bytearray(200 * 2**20); print('done')")
    call = (
        "import os, pathlib, sys, compare_trees; "
        f"result = compare_trees.run_command([sys.executable, {str(script)!r}], dict(os.environ), pathlib.Path(), 60); "
        "print(result.output.strip(), result.peak_mib)"
    )
    done = subprocess.run([sys.executable, "-c", call], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    output, peak_mib = done.stdout.split()
    assert output == "done" and 200 < float(peak_mib) < 300


def test_package_of_another_tree_is_refused(compare_trees, visit, tmp_path):
    visit.tree = tmp_path
    with pytest.raises(compare_trees.MeasurementError, match="imports"):
        compare_trees.probe_environment(visit)


def write_script(folder: Path, content: str) -> Path:
    script = folder / "script.py"
    script.write_text(content)
    return script
