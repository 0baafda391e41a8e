"""Requests a second of this project's scoring against lm-evaluation-harness's own HFLM, with the same model.

    python benchmarks/bench_harness.py MODEL_FOLDER DATA_DIR [--tasks piqa] [--limit 200] [--batch-sizes 16 64]

The log-likelihoods are compared as well. HFLM runs at each of the batch sizes; the best counts.
"""

import argparse
import logging
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as glalm/cli.py has it, for both


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

    from glalm.evals.eval_model import open_subject
    from glalm.evals.evaluator import Work
    from glalm.evals.harness import HarnessLM
    from glalm.evals.local_tasks import task_manager
    from glalm.evals.options import EvalConfig, HarnessConfig

    datasets.disable_progress_bars()
    subject = open_subject(
        EvalConfig(checkpoint=args.model), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    ours = HarnessLM(subject, subject.tokenizer, HarnessConfig(batch_tokens=args.batch_tokens), 2048, Work())
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    theirs = [
        (n, HFLM(pretrained=subject.model, tokenizer=tokenizer, max_length=2048, batch_size=n))
        for n in args.batch_sizes
    ]
    with TemporaryDirectory() as folder:
        tasks = task_manager(args.data_dir, Path(folder)).load(args.tasks)["tasks"]
    print(f"{subject.name}, {subject.precision}, {subject.device}")
    print("task             requests     ours/s     HFLM/s  (batch)    ratio   largest difference in nats")
    for name, task in tasks.items():
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests(limit=args.limit, rank=0, world_size=1)
        requests = task.instances
        found, seconds = timed(ours, requests, subject.device.type)
        runs = [(*timed(lm, requests, subject.device.type), n) for n, lm in theirs]
        expected, best, batch = min(runs, key=lambda run: run[1])
        apart = max(abs(a[0] - b[0]) for a, b in zip(found, expected, strict=True))
        rates = f"{len(requests) / seconds:>10.1f} {len(requests) / best:>10.1f}  ({batch:>5})"
        print(f"{name:<16} {len(requests):>8} {rates} {best / seconds:>8.2f} {apart:>12.2g}", flush=True)


def timed(lm, requests: list, device: str) -> tuple[list, float]:
    """Answers and seconds: of the processor where it does the work, since others may use it, else of the wall."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    lm.loglikelihood(requests[:8], disable_tqdm=True)  # warm
    begun = clock()
    return lm.loglikelihood(requests, disable_tqdm=True), clock() - begun


if __name__ == "__main__":
    main()
