"""The Ray engine writes the set that the local one does, whatever dies. A real Ray runs here, with two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from folder_contents import read_contents

from glalm.prepare import engine, pipeline, units
from glalm.prepare.deduplication import deduplicate
from glalm.prepare.pipeline import prepare_data
from glalm.prepare.set_folder import JOURNAL
from glalm.prepare.signature_store import SignatureStore
from glalm.prepare.writer import SetWriter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, texts):
    """A folder of two files of lines, some of which are bad, and of small files."""
    folder = tmp_path_factory.mktemp("sources") / "text"
    folder.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {i} {texts[i % 60]}"}) for i in range(2000)]
        (folder / f"{name}.jsonl").write_text("\n{\n".join(lines))
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def settings(prepared, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", 100_000)
    tokenizer = str(prepared / "tokenizer.model")
    return {"tokenizer": tokenizer, "on_error": "skip", "shard_tokens": 300_000, "progress": False}


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of two nodes with a CPU each, on this machine."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.second_node = cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


@pytest.mark.slow
def test_a_killed_driver_and_a_killed_node_leave_no_trace(cluster, sources, settings, tmp_path, monkeypatch):
    out = tmp_path / "ray"
    script = (
        "from glalm.prepare import pipeline, units\nunits.UNIT_BYTES = 100_000\n"
        f"pipeline.prepare_data([{str(sources)!r}], {str(out)!r}, engine='ray', address={cluster.address!r}, "
        f"commit_seconds=0, **{settings!r})"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    while driver.poll() is None and not (out / JOURNAL).exists():
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    assert driver.wait() == -signal.SIGKILL
    position = json.loads((out / JOURNAL).read_bytes())["cursor"]
    assert position["input"] < 62  # It was killed before the end.

    import ray

    batches = 0
    is_killed = False
    add_batch = SetWriter.add_batch
    run_unit = engine.run_unit
    notes = tmp_path / "nodes"

    def note_node(*args):  # This function travels to the nodes, because it is nested.
        with open(notes, "a") as file:
            file.write(ray.get_runtime_context().get_node_id() + "\n")
        yield from run_unit(*args)

    def kill_node(self, *args):
        nonlocal batches, is_killed
        batches += 1
        if not is_killed and cluster.second_node.node_id in notes.read_text():
            cluster.remove_node(cluster.second_node, allow_graceful=False)
            is_killed = True
        elif not is_killed:
            time.sleep(0.2)  # Its first process takes seconds to start, in which the other node could do all.
        add_batch(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SetWriter, "add_batch", kill_node)
        patch.setattr(engine, "run_unit", note_node)
        prepare_data([sources], out, engine="ray", address=cluster.address, **settings)
    assert batches > 10 and is_killed and len(set(notes.read_text().split())) == 2  # Both nodes had a part in it.
    prepare_data([sources], tmp_path / "local", workers=1, **settings)
    assert read_contents(out) == read_contents(tmp_path / "local")


@pytest.mark.slow
def test_duplicates_are_those_of_the_local_engine_though_a_node_dies(cluster, sources, tmp_path, monkeypatch):
    pytest.importorskip("datasketch")
    monkeypatch.setattr(units, "UNIT_BYTES", 100_000)
    batches = 0
    add = SignatureStore.add

    def kill_node(self, *args):
        nonlocal batches
        batches += 1
        if batches == 3:
            cluster.remove_node(cluster.second_node, allow_graceful=False)
        add(self, *args)

    deduplicate([sources], tmp_path / "local", threshold=0.5, workers=1, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(SignatureStore, "add", kill_node)
        options = {"engine": "ray", "address": cluster.address, "progress": False}
        report = deduplicate([sources], tmp_path / "ray", threshold=0.5, **options)
    assert batches > 10 and report["sources"]["text"]["near duplicate"] > 1000
    for name in ("duplicates.jsonl", "inputs.jsonl", "report.json"):
        assert (tmp_path / "ray" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.slow
def test_errors_are_those_of_the_local_engine(cluster, sources, settings, tmp_path):
    with_ray = {**settings, "engine": "ray", "address": cluster.address}
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON.*--on-error skip"):
        prepare_data([sources], tmp_path / "set", **{**with_ray, "on_error": "stop"})
    (tmp_path / "x.parquet").write_bytes((sources / "a.jsonl").read_bytes())
    with pytest.raises(ValueError, match="damaged"):
        prepare_data([tmp_path / "x.parquet"], tmp_path / "other", **{**with_ray, "on_error": "stop"})
    with pytest.raises(ValueError, match=r"There is no Ray cluster at 127\.0\.0\.1:1: "):
        prepare_data([sources], tmp_path / "set", **{**with_ray, "address": "127.0.0.1:1"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "dask"}, "--engine dask must be local or ray"),
        ({"address": "auto"}, "--address auto is that of a Ray cluster. Add --engine ray"),
        ({"engine": "ray", "workers": 2}, "--workers 2 is for --engine local"),
    ],
)
def test_options_that_do_not_fit_the_engine_are_refused(corpus, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        prepare_data([corpus], tmp_path / "set", vocab_size=400, progress=False, **options)


def test_without_ray_its_extra_is_named(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"needs the package ray\. Install it: pip install"):
        prepare_data([corpus], tmp_path / "set", vocab_size=400, progress=False, engine="ray")
    assert not (tmp_path / "set").exists()


def make_ray(resources, error=None):
    """A module like ray, of a cluster with these resources, or to which no process can connect."""

    def init(**options):
        if error:
            raise error

    names = {"is_initialized": lambda: False, "init": init, "shutdown": lambda: None}
    return SimpleNamespace(**names, cluster_resources=lambda: resources)


@pytest.mark.parametrize(
    ("address", "ray", "message"),
    [
        (None, make_ray({"memory": 1.0}), r"The Ray cluster has no CPUs.*ray start --num-cpus"),
        (None, make_ray({}, RuntimeError("no shared memory")), r"Ray cannot start on this machine: no shared memory\."),
        ("auto", make_ray({}, ConnectionError("none found")), r"There is no Ray cluster at auto: none found.*--head"),
        ("auto", make_ray({}, RuntimeError("Version mismatch")), r"cluster at auto cannot be used: Version mismatch\."),
    ],
)
def test_a_cluster_that_cannot_be_used_is_explained(monkeypatch, address, ray, message):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with pytest.raises(ValueError, match=message), engine.connect_to_ray(address):
        pass


def test_a_tokenizer_is_loaded_where_its_folder_is_not(prepared, hugging_face):
    for path in (prepared / "tokenizer.model", hugging_face):
        files = engine._read_tokenizer(path)
        if path.is_dir():
            files[f"{path.name}/a/b/notes.txt"] = b"The folder a has no file of its own."
        loaded = engine._load_tokenizer(str(path), tuple(files.items()))
        assert not loaded.exists()
        tokenizer = engine.open_tokenizer(loaded, str(path))
        assert tokenizer.encode("river") == pipeline.Tokenizer(path).encode("river")
