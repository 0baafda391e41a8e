"""The blocks of docs/journey_cluster.md, as typed, with the wheel installed, and stand-ins for Slurm's programs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "journey_cluster.md"
# What makes the page's model and run small, and its steps many.
SMALL = """\
model.hidden_size=32 model.num_hidden_layers=2 model.num_heads=2 model.intermediate_size=48 data.seq_len=32
train.batch_size=4 train.batch_tokens=null train.micro_batch_size=1 train.steps=60 train.tokens=null
train.checkpoint.every=5 train.eval_every=60 train.eval_sequences=4 train.log_every=5 optim.warmup_steps=2
optim.warmup_tokens=null track=none
"""
# Two nodes of one process each. The job's script is the first argument that is no option.
SBATCH = """#!/bin/bash
while [[ "$1" = --* ]]; do
    [ "$1" = --wrap ] && exec bash -c "$2" > slurm-77.out 2>&1
    shift
done
export SLURM_JOB_ID=77 SLURM_JOB_NODELIST=n[1-2] SLURM_NTASKS=2 SLURM_NNODES=2 SLURM_CPUS_PER_TASK=1
export SLURM_JOB_NAME=glalm
bash "$@" $SMALL > glalm-77.log 2>&1
"""
SRUN = f"""#!{sys.executable}
# Starts the tasks. In the first start of the job it kills the second task when there is a checkpoint, as a lost node.
import os, pathlib, subprocess, sys, time
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + len(options):]
count = 1 if "--ntasks=1" in options else 2
place = lambda i: os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}}
tasks = [subprocess.Popen(command, env=place(i)) for i in range(count)]
loses_node = count == 2 and not pathlib.Path("lost").exists()
while None in [task.poll() for task in tasks]:
    if loses_node and list(pathlib.Path("runs/big/checkpoints").glob("step_*")):
        pathlib.Path("lost").touch()
        tasks[1].kill()
        loses_node = False
    time.sleep(0.02)
sys.exit(max(code if code >= 0 else 128 - code for code in [task.returncode for task in tasks]))
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo localhost || echo "$@" >> scontrol.log
"""


@pytest.mark.slow
def test_cluster(installed, tmp_path):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    prefix = installed(tmp_path, "python", "-c", "import sys; print(sys.prefix)").strip()
    environment |= {"PATH": f"{programs}:{prefix}/bin:{environment['PATH']}", "SMALL": " ".join(SMALL.split())}
    environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}

    def run(command: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    documents = [{"text": f"Document {n} is about the number {n * n}. " * 20} for n in range(200)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, documents)))
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    commands = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    # The others ask Slurm, follow the log, and stop the job.
    typed = [command for command in commands if command.split()[0] in ("glalm", "sbatch")]
    template, prepare, inspect, submit_prepare, dry_run, submit, report, submit_eval = typed
    for command in (template, submit_prepare.replace("32000", "300"), prepare.replace("32000", "300"), inspect):
        done = run(command)
        assert done.returncode == 0, done.stderr
    assert prepare in submit_prepare and "is ready" in (tmp_path / "slurm-77.out").read_text()
    planned = run(f"{dry_run} $SMALL train.assumed_gpus=2")
    assert planned.returncode == 0 and "H100" in planned.stdout, planned.stdout + planned.stderr
    assert (
        "WARNING: the model has embeddings for 32,000 tokens" in planned.stdout and "at 2.5 an hour" in planned.stdout
    )
    mistyped = run(f"{dry_run} $SMALL train.assumed_gpus=2 data.path=data/corpsu")
    assert mistyped.returncode == 2 and "data/corpsu/manifest.json is missing" in mistyped.stderr

    log = tmp_path / "glalm-77.log"
    assert run(submit).returncode == 137, log.read_text()  # A process was killed.
    assert "ends the run: rank 1 has died" in log.read_text()
    assert (tmp_path / "scontrol.log").read_text() == "requeue 77\n"
    assert run(submit).returncode == 0, log.read_text()  # Slurm starts the job again.
    assert "resuming after step" in log.read_text() and "Trained to step 60" in log.read_text()
    rows = [json.loads(line) for line in (tmp_path / "runs/big/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, *range(5, 61, 5)]
    assert run(report).returncode == 0 and (tmp_path / "runs/big/report.html").is_file()
    short = "name=big extrapolation.max_length=64 generate.tokens=4"
    assert run(submit_eval.replace("name=big", short)).returncode == 0, (tmp_path / "slurm-77.out").read_text()
    assert (tmp_path / "runs/big/eval/perplexity.json").is_file()

    assert run(submit.replace("parallel=hsdp", "paralel=hsdp")).returncode == 2
    assert "did you mean parallel?" in log.read_text()
