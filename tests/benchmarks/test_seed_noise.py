import json
import math
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def script(load_benchmark):
    return load_benchmark("seed_noise")


def write_run(folder: Path, identity: dict, *rows: dict) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"identity": identity}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_noise_is_the_deviation_over_seeds(script, tmp_path, capsys, monkeypatch):
    runs = [
        write_run(tmp_path / str(seed), {"seed": seed, "optim.lr": 1}, {"step": 1, "val_loss": 9}, row)
        for seed, row in enumerate(
            {"step": 2, "val_loss": value, "tokens_per_second": 7, "acc": None if value == 3 else 1}
            for value in (1.0, 2.0, 3.0)
        )
    ]
    noise = script.measure_noise(runs)
    assert noise == {"val_loss": (2.0, 1.0, pytest.approx(2 * math.sqrt(2)))}
    monkeypatch.setattr("sys.argv", ["seed_noise.py", *map(str, runs)])
    script.main()
    assert "| val_loss | 2 | 1 | 2.8 |" in capsys.readouterr().out


def test_runs_that_differ_in_more_than_their_seeds_are_refused(script, tmp_path):
    one, other = (write_run(tmp_path / str(lr), {"seed": lr, "optim.lr": lr}, {"step": 1}) for lr in (1, 2))
    with pytest.raises(ValueError, match=r"differ in optim\.lr, not in their seeds alone"):
        script.measure_noise([one, other])
    with pytest.raises(ValueError, match="two runs or more"):
        script.measure_noise([one])
    twin = write_run(tmp_path / "twin", {"seed": 1, "optim.lr": 1}, {"step": 1})
    for runs in ([one, twin], [one, one]):
        with pytest.raises(ValueError, match="have one seed, 1"):
            script.measure_noise(runs)
    killed = write_run(tmp_path / "killed", {"seed": 4, "optim.lr": 1}, {"step": 7})
    with pytest.raises(ValueError, match=r"ended at step 1 and .*killed at step 7\. To resume"):
        script.measure_noise([one, killed])
    empty = write_run(tmp_path / "empty", {"seed": 3, "optim.lr": 1})
    with pytest.raises(ValueError, match="has no metrics"):
        script.measure_noise([one, empty])
