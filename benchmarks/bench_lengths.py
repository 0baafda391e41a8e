"""Measure the training speed and the memory of mixers at equal tokens a step, by size and length of the sequences.

    python benchmarks/bench_lengths.py --json rows.json --models gla attention mamba    on one GPU
    python benchmarks/bench_lengths.py --json rows.json more.json --figure speed.png    draw the rows of all files
    python benchmarks/bench_lengths.py --json rows.json more.json --costs               and the dry run's estimates
    python benchmarks/bench_lengths.py --json rows.json more.json --mfu                 and the table that it reads

A model is a mixer of configs/model, or LIBRARY:MIXER, such as fla:gla or llama:attention, for another library's, as
bench_training.py trains it. Each size trains on the same number of tokens a step at every length, so that longer
sequences are fewer. New rows are added to the first file as they are measured. The same command measures the rows that
it lacks. To compare models to a percent, measure them on the same GPU: those of one host differ by 1 to 2 %.
"""

import argparse
import json
from operator import itemgetter
from pathlib import Path

from bench_training import Row, compose_run_config, measure_in_process, print_header, print_row

from glalm.data.files import write_json
from glalm.model.decoder import model_cost
from glalm.train.environment import describe_environment
from glalm.train.estimate import ASSUMED_GPUS, estimate_hours_and_memory
from glalm.train.memory import GIB

MIXERS = ["attention", "gla", "retention", "deltanet", "gated_deltanet", "kda", "mamba", "mamba2"]
STEP_TOKENS = {"tiny": 128, "340m": 65_536, "1b3": 32_768}
LABELS = {"attention": "Transformer++", "gla": "GLA", "retention": "RetNet", "deltanet": "DeltaNet"}
LABELS |= {"gated_deltanet": "Gated DeltaNet", "kda": "KDA", "mamba": "Mamba", "mamba2": "Mamba-2"}


def measure_rows(options: argparse.Namespace, record: dict, path: Path) -> None:
    """Measure the rows that `record` lacks, and write it after each. Rows that failed are measured again."""
    record["rows"] = [row for row in record["rows"] if "error" not in row]
    known = {(row["model"], row["size"], row["T"]) for row in record["rows"]}
    print_header()
    for size in options.sizes:
        for model in options.models:
            for T in options.lengths:
                if (model, size, T) in known:
                    continue
                batch = STEP_TOKENS[size] // T
                result = measure_row(model, f"{size}:{batch}x{T}", options)
                print_row(f"{size}, {batch} x {T}", model, result)
                record["rows"].append({"model": model, "size": size, "batch": batch, "T": T, **result})
                write_json(path, record)


def measure_row(model: str, label: str, options: argparse.Namespace) -> dict:
    """Return the measurements of a row of bench_training.py, or {"error": ...}."""
    library, mixer = split_name(model)
    changes = [f"model={mixer}_{label.partition(':')[0]}", *options.set]
    arguments = {"set": changes, "steps": options.steps, "warmup": options.warmup, "accumulation": 1}
    arguments |= {"tiny": False, "profile": False, "estimate": False}
    return measure_in_process(library, label, argparse.Namespace(**arguments))


def split_name(model: str) -> tuple[str, str]:
    """Return the library of a model, one of bench_training.MODELS, and its mixer."""
    library, _, mixer = model.rpartition(":")
    return library or "glalm", mixer


def label_of(model: str) -> str:
    library, mixer = split_name(model)
    name = LABELS.get(mixer, mixer)
    return name if library == "glalm" else f"{name}, {library}"


# ----------------------------------------------------------------------------------------------------------- results


def print_table(rows: list[dict]) -> None:
    """Print tokens/s and GiB, a line for each model and a column for each size and length."""
    columns = sorted({(row["size"], row["T"]) for row in rows}, key=lambda each: (-len(each[0]), each))
    found = {(row["model"], row["size"], row["T"]): row for row in rows}
    print(
        f"\n| tokens/s (peak GiB) | {' | '.join(f'{size}, {T:,}' for size, T in columns)} |\n|-{'|-' * len(columns)}|"
    )
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [format_cell(found.get((model, *column))) for column in columns]
        print(f"| {label_of(model)} | {' | '.join(cells)} |")


def format_cell(row: dict | None) -> str:
    if row is None or "error" in row:
        return "" if row is None else "failed"
    peak = f" ({row['peak_memory_gib']:.1f})" if row["peak_memory_gib"] is not None else ""
    return f"{row['tokens_per_second'] / 1e3:.1f}k{peak}"


def print_costs(rows: list[dict], gpu: str) -> None:
    """Print what the dry run estimates for each row of our models on this kind of GPU beside what was measured."""
    print(f"\n| row | model | GiB | estimate | off by | step, ms | estimate | off by |\n{'|-' * 8}|")
    for row in rows:
        if split_name(row["model"])[0] != "glalm" or row.get("peak_memory_gib") is None:
            continue
        seconds, memory = estimate_costs(row, gpu)
        peak = row["peak_memory_gib"]
        step = row["step_ms"] / 1e3
        name = f"{row['size']}, {row['batch']} x {row['T']:,} | {label_of(row['model'])}"
        of_memory = f"{peak:.1f} | {memory:.1f} | {memory / peak - 1:+.1%}"
        of_time = f"{1e3 * step:.1f} | {1e3 * seconds:.1f} | {seconds / step - 1:+.1%}"
        print(f"| {name} | {of_memory} | {of_time} |", flush=True)


def estimate_costs(row: dict, gpu: str) -> tuple[float, float]:
    """Return the seconds of a step and the GiB of memory that the dry run estimates for a row on one GPU."""
    shape = Row(row["size"], row["batch"], row["T"])
    # The rows have no validation, for which the dry run adds memory where steps are CUDA graphs.
    changes = [f"train.assumed_gpu={gpu}", "train.cuda_graph=false"]
    config = compose_run_config(shape, row["model"], changes)
    hours, memory = estimate_hours_and_memory(config)
    assert hours is not None  # The speeds of all assumed GPUs are known.
    return 3600 * hours / config.steps, memory / GIB


def print_measurements(rows: list[dict]) -> None:
    """Print the MFU of each row of our models as glalm/train/measured_mfu.py has them."""
    measured: dict[str, list[str]] = {}
    for row in sorted(rows, key=lambda row: (row["model"], row["T"])):
        if split_name(row["model"])[0] == "glalm" and row.get("mfu") is not None:
            config = compose_run_config(Row(row["size"], row["batch"], row["T"]), row["model"], []).model
            parameters = round(model_cost(config, row["T"]).parameters / 1e6)
            measurement = f"Measurement({parameters}, {row['T']}, {row['mfu']:.3f})"
            measured.setdefault(row["model"], []).append(measurement)
    print()
    for mixer, measurements in measured.items():
        print(f'    "{mixer}": [{", ".join(measurements)}],')


def draw_figure(rows: list[dict], path: Path) -> None:
    """Draw speed and memory against the length of the sequences, for each size."""
    from matplotlib.figure import Figure

    from glalm.evals.plot import COLORS, MARKERS

    sizes = sorted({row["size"] for row in rows}, key=lambda size: (-len(size), size))
    figure = Figure(figsize=(9, 3.4 * len(sizes)), layout="constrained")
    for (speed, memory), size in zip(figure.subplots(len(sizes), 2, squeeze=False), sizes, strict=True):
        for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            line = [row for row in rows if (row["model"], row["size"]) == (model, size) and "error" not in row]
            if not line:
                continue
            line.sort(key=itemgetter("T"))
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)], "markersize": 4}
            style |= {"linestyle": "-" if split_name(model)[0] == "glalm" else ":", "label": label_of(model)}
            lengths = [row["T"] for row in line]
            speed.plot(lengths, [row["tokens_per_second"] / 1e3 for row in line], **style)
            if all(row["peak_memory_gib"] is not None for row in line):
                memory.plot(lengths, [row["peak_memory_gib"] for row in line], **style)
        for axes, quantity in ((speed, "thousand tokens/s"), (memory, "peak GiB")):
            axes.set_xscale("log", base=2)
            axes.set(xlabel=f"tokens of a sequence, {STEP_TOKENS[size]:,} a step", ylabel=quantity, ylim=(0, None))
            axes.set_title(f"{size}: {quantity}", fontsize=10)
            axes.grid(alpha=0.3)
        speed.legend(fontsize=7)
    figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------- command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, nargs="+", required=True, metavar="FILE", help="the first is written")
    parser.add_argument("--models", nargs="+", default=MIXERS, help="default: 8 mixers")
    parser.add_argument("--sizes", nargs="+", choices=STEP_TOKENS, default=["340m", "1b3"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32768], metavar="T")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="an override of our config")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="draw the rows, and measure nothing")
    parser.add_argument("--costs", choices=ASSUMED_GPUS, nargs="?", const="H200", help="what the dry run estimates")
    parser.add_argument("--mfu", action="store_true", help="print the rows as the dry run reads them")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    first, *others = options.json
    record = json.loads(first.read_text()) if first.exists() else {"environment": describe_environment(), "rows": []}
    if not (options.figure or options.costs or options.mfu):
        measure_rows(options, record, first)
    rows = [*record["rows"]]
    for path in others:
        rows += json.loads(path.read_text())["rows"]
    print_table(rows)
    if options.costs:
        print_costs(rows, options.costs)
    if options.mfu:
        print_measurements(rows)
    if options.figure:
        draw_figure(rows, options.figure)


if __name__ == "__main__":
    main()
