"""The README's commands, run in their order on this package's own source."""

import contextlib
import faulthandler
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from glalm.__main__ import COMMANDS, main, refuse_urls

ROOT = Path(__file__).parent.parent


def run(*args: str, code: int = 0) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_command_runs_where_stderr_is_no_file(monkeypatch):
    """As in a notebook, or where a program keeps what its commands print."""
    monkeypatch.setattr(faulthandler, "is_enabled", lambda: False)
    monkeypatch.setattr(sys, "argv", ["glalm", "train", "no_such_key=1"])
    with contextlib.redirect_stderr(io.StringIO()) as printed, pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "unknown key no_such_key" in printed.getvalue()


@pytest.mark.slow
def test_from_text_to_report(tmp_path):
    data, name = tmp_path / "a set", "a run"
    run("scripts/prepare_data.py", "--out", str(data), "--vocab-size", "400", "glalm", "tests")
    model = ["model.vocab_size=400", "model.hidden_size=32", "model.num_hidden_layers=2", "model.intermediate_size=32"]
    where = [f'name="{name}"', f"runs_dir={tmp_path}"]
    train = ["data.seq_len=32", "train.steps=6", "train.batch_size=8", "train.eval_every=6", "optim.warmup_steps=2"]
    evals = ["evals=[extrapolation]", "extrapolation.max_length=320", "extrapolation.split=train"]
    train += [f"train_evals.{option}" for option in evals]
    text = run("train.py", *where, f'data.path="{data}"', *model, *train)
    assert "extrapolation/10x" in (tmp_path / name / "metrics.jsonl").read_text()
    assert "step 6/6" in text and "val perplexity" in text

    lengths = ["extrapolation.max_length=320", "extrapolation.split=train", "extrapolation.documents=4"]
    text = run("eval.py", *where, *lengths, "generate.tokens=5")
    folder = tmp_path / name
    prompts = json.loads((folder / "eval" / "generate.json").read_text())["settings"]["prompts"]
    sources = [path.read_text() for top in ("glalm", "tests") for path in (ROOT / top).rglob("*.py")]
    assert len(prompts) == 2 and all(f"--- {prompt}" in text for prompt in prompts)
    assert all(any(source.startswith(prompt) for source in sources) for prompt in prompts)
    assert {p.name for p in (folder / "eval").iterdir()} == {"perplexity.json", "extrapolation.json", "generate.json"}
    result = json.loads((folder / "eval" / "extrapolation.json").read_text())
    assert result["results"]["contexts"]["stateful"]["ratios"]["10"]["documents"] == 4
    assert (folder / "plots" / "extrapolation.png").read_bytes().startswith(b"\x89PNG")

    text = run("scripts/report.py", str(folder))
    for wanted in (
        "validation perplexity",
        "10x",
        "tokens/s",
        "extrapolation.png",
        "metrics.jsonl",
        "step_6",
        "report.html",
    ):
        assert wanted in text
    assert "Length generalization" in (folder / "report.html").read_text()
    run("scripts/plot.py", "ratios", str(folder), str(folder), "--out", str(tmp_path / "two"))
    assert (tmp_path / "two.svg").is_file() and (tmp_path / "two.png").is_file()

    text = run("eval.py", *where, "extrapolation.max_length=16", code=1)
    assert "extrapolation.max_length=16 is under the training length 32" in text

    damaged = folder / "checkpoints" / "step_6" / "training.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    text = run("train.py", *where, f'data.path="{data}"', *model, *train)
    assert f"{damaged} is damaged" in text and "set aside as step_6.damaged" in text and "Traceback" not in text


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains(command):
    assert f"glalm {command}" in run("-m", "glalm", command, "--help")


@pytest.mark.parametrize(
    "arguments",
    [
        ("prepare", "--out", "s3://bucket/out", "--tokenizer", "s3://bucket/tokenizer.json", "stdlib"),
        ("prepare", "--out=gs://bucket/out", "--staging", "s3://bucket/staging", "stdlib"),
        ("prepare", "--out", "data/demo", "--duplicates", "s3://bucket/duplicates", "stdlib"),
        ("prepare", "inspect", "s3://bucket/set"),
        ("deduplicate", "--out", "s3://bucket/duplicates", "stdlib"),
        ("tokenizer", "--out", "s3://bucket/tokenizer.model", "stdlib"),
        ("train", "data.path=s3://bucket/data"),
        ("train", "train.resume_from='s3://bucket/runs/step_1'"),
        ("eval", "text=https://example.org/x.txt"),
        ("export", "runs/mine", "--out", "s3://bucket/model"),
    ],
)
def test_urls_are_refused(arguments, monkeypatch, capsys, tmp_path):
    """They would be read, or made, as local folders of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["glalm", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert "is a URL" in error and "Mount the bucket" in error
    assert not any(tmp_path.iterdir())


def test_only_values_are_taken_for_urls():
    refuse_urls(["hf:cerebras/SlimPajama-627B", "generate.prompts=['see https://a.org']", "C:/data", "a=b", "name=a:b"])
    refuse_urls(["hydra.sweeper.storage=sqlite:///study.db", "--out", "s3/bucket"])


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("train.py", "data.path=nowhere"), ("eval.py",), ("scripts/export_hf.py", "-h")])
def test_interrupt_while_importing_shows_no_traceback(arguments, tmp_path):
    """Ctrl-C at random moments of two seconds. A command that was faster ends with its own code.

    In its first half second a busy machine may still start Python, which shows its own traceback.
    """
    moments = random.Random(arguments[0])
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        time.sleep(0.5 + moments.random() * 2)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert "Traceback" not in output, output
        assert process.returncode in (130, -signal.SIGINT, 0, 1, 2)


def test_interrupt_is_an_exception_again_when_the_command_runs(monkeypatch):
    handlers = []
    module = SimpleNamespace(report_runs=lambda: handlers.append(signal.getsignal(signal.SIGINT)))

    def import_module(_):
        handlers.append(signal.getsignal(signal.SIGINT))
        return module

    monkeypatch.setattr("glalm.__main__.import_module", import_module)
    monkeypatch.setattr(sys, "argv", ["glalm"])
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit):
            main("report")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert handlers == [signal.SIG_DFL, signal.default_int_handler]


def test_unknown_command_is_refused_with_the_nearest():
    assert "glalm has no command trian; did you mean train?" in run("-m", "glalm", "trian", code=2)


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["trian"], 2)])
def test_a_closed_pipe_ends_no_command_with_a_traceback(arguments, code):
    """As in `glalm --help | head -n 1`, here with a reader that has closed the pipe before anything is printed."""
    command = [sys.executable, "-m", "glalm", *arguments]
    read, write = os.pipe()
    os.close(read)
    stdout, stderr = (write, subprocess.PIPE) if code == 0 else (subprocess.PIPE, write)
    done = subprocess.run(command, stdout=stdout, stderr=stderr, cwd=ROOT, timeout=300)
    os.close(write)
    assert done.returncode == code and not done.stdout and not done.stderr


def test_clone_has_a_script_for_each_command():
    scripts = {ROOT / "train.py", ROOT / "eval.py", *(ROOT / "scripts").glob("*.py")}
    expected = {f'    main("{command}")' for command in COMMANDS}
    assert {path.read_text().splitlines()[-1] for path in scripts} == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "argument, message",
    [
        ("train.stpes=3", "unknown key train.stpes; did you mean train.steps?"),
        (
            "parallel=ddq",
            f"parallel=ddq is not a file of {ROOT / 'configs/parallel'}; did you mean ddp? choices: ddp, fsdp2, hsdp",
        ),
        ("parallel=x", f"parallel=x is not a file of {ROOT / 'configs/parallel'}; choices: ddp, fsdp2, hsdp"),
    ],
)
def test_wrong_config_prints_one_line(argument, message):
    assert run("train.py", argument, code=2) == f"ConfigError: {message}\n"


MISSPELT = [
    ("train.py", "model.hiden_size=64", "did you mean model.hidden_size?"),
    ("train.py", "model.mamba2.grups=1", "did you mean model.mamba2.groups?"),
    ("train.py", "train_evals.needle.sampels=1", "did you mean train_evals.needle.samples?"),
    ("train.py", "modle=gla_tiny", "did you mean model?"),
    ("train.py", "model=gla_tniy", "did you mean gla_tiny?"),
    ("eval.py", "extrapolation.max_lenght=64", "did you mean extrapolation.max_length?"),
    ("scripts/ladder.py", "retension", "did you mean retention?"),
    ("scripts/ladder.py", "train.stpes=3", "did you mean train.steps?"),
]
# Run a command in this process, then print which of two slow libraries it has imported.
RUN_AND_LIST_IMPORTS = """
import runpy, sys
sys.argv.pop(0)
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("imported:", sorted({"transformers", "accelerate"} & sys.modules.keys()))
"""


def cpu_seconds(*args: str) -> float:
    """Return the processor time of a Python process, which other processes on the machine hardly change."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.slow
@pytest.mark.parametrize("script, argument, message", MISSPELT)
def test_misspelt_key_is_refused_before_slow_imports(script, argument, message):
    text = run("-c", RUN_AND_LIST_IMPORTS, script, argument, code=2)
    assert message in text and "imported: []" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "commands, library",
    [
        ("report plot prepare deduplicate tokenizer slurm ladder scaling mqar", "torch"),
        ("report plot prepare deduplicate tokenizer slurm", "hydra"),
        ("ladder scaling mqar train eval", "matplotlib"),
        ("train eval", "transformers"),
    ],
)
def test_commands_start_without_slow_imports(commands, library):
    load = f"import sys; from glalm.__main__ import load_command; [load_command(name) for name in {commands.split()}]"
    assert run("-c", f"{load}; print({library!r} in sys.modules)") == "False\n"


@pytest.mark.slow
def test_misspelt_key_is_refused_within_twice_the_time_of_importing_torch_and_hydra():
    imports = min(cpu_seconds("-c", "import torch, hydra") for _ in range(3))
    assert min(cpu_seconds("train.py", "model.hiden_size=64") for _ in range(3)) <= 2 * imports


@pytest.mark.slow
def test_sweep_continues_after_a_wrong_config(token_folder, tmp_path):
    """It ends with the exit code of a wrong config."""
    where = ["-m", f"hydra.sweep.dir={tmp_path}", f"runs_dir={tmp_path}", f"data.path={token_folder}"]
    small = ["model.vocab_size=320", "model.hidden_size=32", "model.num_hidden_layers=1", "data.seq_len=16"]
    points = ["name=w${optim.warmup_steps}", "train.steps=2", "optim.warmup_steps=1,9,0", "train.batch_size=2"]
    text = run("train.py", *where, *small, *points, code=2)
    assert text.count("Trained to step 2") == 2 and "optim.warmup_steps=9 is longer than train.steps=2" in text


def test_config_file_that_is_not_yaml_is_named(tmp_path, monkeypatch):
    from glalm import cli
    from glalm.config.strict import ConfigError

    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("model:\n  layers: [gla, attention\nseed: 1\n")
    monkeypatch.setattr(cli, "CONFIGS", tmp_path)
    with pytest.raises(ConfigError, match=r"experiment/mine\.yaml is not YAML: (.|\n)*line 2"):
        cli.check_config_files()
