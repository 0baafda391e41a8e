"""Compare the speed of our scoring of lm-evaluation-harness's tasks with that of its HFLM, on the same model.

    python benchmarks/bench_harness.py MODEL_FOLDER DATA_DIR [--tasks piqa] [--limit 200] [--batch-sizes 16 64]

The table also shows the largest difference of the log-likelihoods. HFLM runs at every batch size, and the fastest
counts.
"""

import argparse
import logging
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # As in glalm/cli.py, for both.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data_dir")
    parser.add_argument("--tasks", nargs="+", default=["piqa", "hellaswag", "winogrande", "arc_easy", "lambada_openai"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--batch-tokens", type=int)
    args = parser.parse_args()
    logging.disable(logging.WARNING)

    import datasets
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from glalm.evals.evaluator import EvalContext
    from glalm.evals.harness import HarnessLM
    from glalm.evals.inputs import open_eval_model
    from glalm.evals.local_tasks import build_task_manager
    from glalm.evals.options import EvalConfig, HarnessConfig

    datasets.disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = open_eval_model(EvalConfig(checkpoint=args.model), device)
    options = HarnessConfig(batch_tokens=args.batch_tokens)
    ours = HarnessLM(model, options, 2048, EvalContext())
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    theirs = {
        n: HFLM(pretrained=model.causal_lm, tokenizer=tokenizer, max_length=2048, batch_size=n)
        for n in args.batch_sizes
    }
    with TemporaryDirectory() as folder:
        tasks = build_task_manager(args.data_dir, Path(folder)).load(args.tasks)["tasks"]
    print(f"{model.name}, {model.precision}, {device}")
    print("task             requests     ours/s     HFLM/s  (batch)    ratio   largest difference in nats")
    for name, task in tasks.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=args.limit, rank=0, world_size=1)
        requests = task.instances
        answers, seconds = time_requests(ours, requests, device.type)
        timings = {n: time_requests(lm, requests, device.type) for n, lm in theirs.items()}
        best_batch = min(timings, key=lambda n: timings[n][1])
        expected, best_seconds = timings[best_batch]
        difference = max(abs(a[0] - b[0]) for a, b in zip(answers, expected, strict=True))
        rates = f"{len(requests) / seconds:>10.1f} {len(requests) / best_seconds:>10.1f}  ({best_batch:>5})"
        print(f"{name:<16} {len(requests):>8} {rates} {best_seconds / seconds:>8.2f} {difference:>12.2g}", flush=True)


def time_requests(lm, requests: list, device_type: str) -> tuple[list, float]:
    """Return the answers and the seconds that they took.

    On a CPU these are seconds of processor time, since other programs may use it too.
    """
    clock = time.process_time if device_type == "cpu" else time.perf_counter
    lm.loglikelihood(requests[:8], disable_tqdm=True)  # Warm up.
    start_time = clock()
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    return answers, clock() - start_time


if __name__ == "__main__":
    main()
