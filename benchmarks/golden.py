"""Show that a refactoring changed nothing: record what the package computes, and compare a later version with it.

    python benchmarks/golden.py record /tmp/golden.json        in the tree before the change
    python benchmarks/golden.py compare /tmp/golden.json       in the tree after it; exit code 1 on any difference

Both run the same tiny cases on the CPU with one thread: token shards, the data order, six steps of training for every
mixer and optimizer, two processes by DDP, FSDP2 and HSDP, resuming, evaluations, exports, and wrong commands. Numbers
are compared bit for bit, so a recording holds for one machine and one set of package versions: it depends on the CPU's
instruction set, and is not committed.

--only SECTION runs one section, and may be repeated. --tree runs another checkout, whose commands and keys must be
those that golden_interface.py names.

The cases are in golden_sections.py. What depends on names of the package is in golden_interface.py: a change that
renames a key or a result updates that file, and the recording from before it still serves.
"""

import argparse
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ABSENT = "(absent)"  # in place of a value that only the other recording has
# Libraries read these when they are imported, which the functions below do.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="disabled")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout to run")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, help_text in (("record", "write a recording"), ("compare", "compare this tree with a recording")):
        command = commands.add_parser(name, help=help_text)
        command.add_argument("path", type=Path, metavar="JSON")
        if name == "compare":
            command.add_argument("--verbose", action="store_true", help="show every difference")
        command.add_argument("--only", action="append", metavar="SECTION", help="one section; may be repeated")
    commands.add_parser("worker").add_argument("path", type=Path)  # one of the processes of the section "distributed"
    args = parser.parse_args()
    args.tree, args.path = args.tree.resolve(), args.path.resolve()
    import_tree(args.tree)
    if args.command == "worker":
        from golden_commands import run_worker

        run_worker(args.tree, args.path)
        return 0
    if args.command == "record":
        return record(args)
    return compare(args)


def import_tree(tree: Path) -> None:
    """Make this process, and those that it starts, import the package from `tree`."""
    sys.path.insert(0, str(tree))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])
    import torch

    import glalm

    if not Path(glalm.__file__).is_relative_to(tree):
        raise SystemExit(f"glalm was imported from {glalm.__file__}, not from {tree}")
    torch.set_num_threads(1)


def record(args: argparse.Namespace) -> int:
    """Record sections. Exit code 1 where a case failed that must succeed: such a recording proves little."""
    sections = record_sections(args.tree, args.only)
    args.path.write_text(json.dumps(sections, indent=1) + "\n")
    print(f"{args.path}: {sum(map(len, sections.values()))} cases")
    return int(print_failed(sections))


def compare(args: argparse.Namespace) -> int:
    """Print for each section how many cases it has, and whether they are equal or where they first differ."""
    reference = json.loads(args.path.read_text())
    sections = record_sections(args.tree, args.only)
    different = False
    print(f"{'section':<14}{'cases':>6}  result")
    for name, cases in sections.items():
        differences = list(find_differences(reference.get(name, {}), cases))
        different = different or bool(differences)
        print(f"{name:<14}{len(cases):>6}  {summarize_differences(differences)}")
        for difference in differences if args.verbose else []:
            print(f"  {describe_difference(*difference)}")
    failed = print_failed(sections)
    return int(different or failed)


def record_sections(tree: Path, only: list[str] | None) -> dict[str, dict[str, Any]]:
    """Run sections in two processes, and return {section: {case: what it gave}}.

    The processes are forks of this one, which has imported torch and transformers.
    """
    import transformers
    from golden_sections import SECTIONS, record_section

    transformers.utils.logging.disable_progress_bar()
    if unknown := set(only or ()) - set(SECTIONS):
        raise SystemExit(f"no section is called {min(unknown)}; there are {', '.join(SECTIONS)}")
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        futures = {name: pool.submit(record_section, name, tree) for name in only or SECTIONS}
        return {name: future.result() for name, future in futures.items()}


def print_failed(sections: dict[str, dict[str, Any]]) -> bool:
    """Print the cases that failed where they must not, and return whether there are any."""
    found = False
    for section, cases in sections.items():
        for name, case in cases.items():
            if isinstance(case, dict) and "failed" in case:
                print(f"failed: {section}, {name}: {case['failed']}")
                found = True
    return found


def find_differences(old: Any, new: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield (path, old value, new value) for every leaf that differs, or that only one side has."""
    if isinstance(old, list) and isinstance(new, list):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from find_differences(old.get(key, ABSENT), new.get(key, ABSENT), (*path, str(key)))
    elif json.dumps(old) != json.dumps(new):
        yield path, old, new


def summarize_differences(differences: list[tuple[tuple[str, ...], Any, Any]]) -> str:
    if not differences:
        return "equal"
    cases = len({path[0] for path, _, _ in differences})
    return f"{cases} differ, first: {describe_difference(*differences[0])}"


def describe_difference(path: tuple[str, ...], old: Any, new: Any) -> str:
    return f"{' / '.join(path)}: {json.dumps(old)[:100]} is now {json.dumps(new)[:100]}"


if __name__ == "__main__":
    sys.exit(main())
