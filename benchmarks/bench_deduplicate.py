"""Measure recall, precision, time and memory of `glalm deduplicate` on documents of which the duplicates are known.

python benchmarks/bench_deduplicate.py --documents 1000000 --workers 2
python benchmarks/bench_deduplicate.py --documents 1000000 --workers 2 --kills 4     also kill and resume it
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

THRESHOLD = 0.8
NGRAM = 5
DUPLICATES = 0.4  # the share of the documents that are made from another one
VOCABULARY = 50_000
BINS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)
Words = list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0, help="of another run, of which the result must be the same")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="of the documents and results (default: a temporary one)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        start = time.perf_counter()
        nearest = write_documents(folder / "text.jsonl", args.documents, args.seed)
        size = (folder / "text.jsonl").stat().st_size
        made = time.perf_counter() - start
        print(f"{args.documents:,} documents, {size / 1e9:.2f} GB, made in {made:.0f} s", flush=True)
        start = time.perf_counter()
        peak = run_to_end(folder / "text.jsonl", folder / "out", args.workers)
        seconds = time.perf_counter() - start
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = usage.ru_utime + usage.ru_stime
        print(f"{seconds:.0f} s with {args.workers} workers, {cpu:.0f} s of CPU time")
        print(f"{peak / 2**30:.2f} GiB at most in memory, all processes together", flush=True)
        removed = read_removed(folder / "out")
        print_quality(nearest, removed)
        if args.kills:
            run_with_kills(folder, args.kills, args.workers + 1, seconds)
            lists = [(folder / name / "duplicates.jsonl").read_bytes() for name in ("out", "killed")]
            verdict = "the same list" if lists[0] == lists[1] else "ANOTHER LIST"
            print(f"killed {args.kills} times, with {args.workers + 1} workers: {verdict}")


# ----------------------------------------------------------------------------------------------- documents and truth


def write_documents(path: Path, count: int, seed: int) -> dict[int, float]:
    """Write documents in random order, and return for each that was made from another one, by its line, how near it is.

    That is its largest Jaccard index, by its sets of word 5-grams, with an earlier document of which no earlier one
    has a Jaccard index of THRESHOLD or more. Documents of different families share only runs of frequent words.
    """
    families = make_families(count, seed)
    lines = [(family, member) for family, members in enumerate(families) for member in range(len(members))]
    random.Random(seed).shuffle(lines)
    order: dict[int, list[tuple[int, int]]] = defaultdict(list)
    with open(path, "w") as file:
        for number, (family, member) in enumerate(lines, 1):
            file.write(json.dumps({"text": families[family][member]}) + "\n")
            order[family].append((number, member))
    nearest = {}
    for family, members in order.items():
        kept: list[set] = []
        for number, member in members if len(members) > 1 else ():
            shingles = find_shingles(families[family][member])
            similarity = max((len(shingles & other) / len(shingles | other) for other in kept), default=0.0)
            if kept:
                nearest[number] = similarity
            if similarity < THRESHOLD:
                kept.append(shingles)
    return nearest


def find_shingles(text: str) -> set[tuple[str, ...]]:
    """Return the runs of NGRAM words of a text in which words have letters only."""
    words = text.lower().replace(".", "").split()
    return {tuple(words[i : i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1))}


def make_families(count: int, seed: int) -> list[list[str]]:
    """Return `count` texts in families: an original of 10 to 5,000 words, and up to 4 that are made from it."""
    generator = np.random.default_rng(seed)
    pick = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = ["".join(pick.choices(letters, k=pick.randint(2, 9))) for _ in range(VOCABULARY)]
    frequencies = 1 / (np.arange(VOCABULARY) + 2.7)  # Zipf's law
    cumulative = np.cumsum(frequencies) / frequencies.sum()

    def draw(length: int) -> Words:
        return [vocabulary[i] for i in np.searchsorted(cumulative, generator.random(length))]

    families = []
    left = count
    while left:
        original = draw(int(np.clip(generator.lognormal(np.log(150), 0.75), 10, 5000)))
        members = [" ".join(original)]
        # A family has (1 - p) + p * 2.5 + ... documents; p gives DUPLICATES their share.
        if pick.random() < DUPLICATES / (1 - DUPLICATES) / 2.5:
            for _ in range(min(pick.randint(1, 4), left - 1)):
                members.append(change_text(original, pick, draw))
        families.append(members)
        left -= len(members)
    return families


def change_text(words: Words, pick: random.Random, draw: Callable[[int], Words]) -> str:
    """Return an edited copy: equal, with other case and punctuation, or of a random Jaccard index from 0.5 to 1."""
    kind = pick.choices(("copy", "style", "replace", "cut", "insert"), (1, 1, 4, 2, 2))[0]
    if kind == "copy":
        return " ".join(words)
    if kind == "style":
        return ". ".join(words).title() + "."
    jaccard = pick.uniform(0.5, 1)
    changed = list(words)
    if kind == "replace":
        # A word is in NGRAM shingles: k of n words that are far apart leave (n - 5k) / (n + 5k).
        edits = round(len(words) * (1 - jaccard) / (1 + jaccard) / NGRAM)
        for place, word in zip(pick.sample(range(len(words)), edits), draw(edits), strict=True):
            changed[place] = word
    elif kind == "cut":
        removed = round(len(words) * (1 - jaccard))
        start = pick.randint(0, len(words) - removed)
        del changed[start : start + removed]
    else:
        start = pick.randint(0, len(words))
        changed[start:start] = draw(round(len(words) * (1 / jaccard - 1)))
    return " ".join(changed)


# ------------------------------------------------------------------------------------------------------- measurements


def start_command(text: Path, out: Path, workers: int) -> subprocess.Popen:
    command = [sys.executable, "-m", "glalm", "deduplicate", "--out", str(out), "--workers", str(workers), str(text)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def run_to_end(text: Path, out: Path, workers: int) -> int:
    """Run the command, and return the most bytes of memory that its processes had together, mapped files included."""
    process = start_command(text, out, workers)
    peak = 0
    while process.poll() is None:
        peak = max(peak, measure_tree(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"glalm deduplicate failed with exit code {process.returncode}")
    return peak


def measure_tree(root: int) -> int:
    """Return the resident bytes of a process and its descendants."""
    parents = {}
    pages = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            pages[int(path.name)] = int((path / "statm").read_text().split()[1])
        except (OSError, ValueError):  # It has ended.
            continue
    tree = {root}
    while children := {pid for pid, parent in parents.items() if parent in tree} - tree:
        tree |= children
    return sum(pages.get(pid, 0) for pid in tree) * os.sysconf("SC_PAGE_SIZE")


def run_with_kills(folder: Path, kills: int, workers: int, seconds: float) -> None:
    """Run the command again, and kill it at equal distances on the way to its end."""
    for _ in range(kills):
        process = start_command(folder / "text.jsonl", folder / "killed", workers)
        time.sleep(seconds / (kills + 1))
        process.kill()
        process.wait()
    run_to_end(folder / "text.jsonl", folder / "killed", workers)


def read_removed(out: Path) -> set[int]:
    with open(out / "duplicates.jsonl") as file:
        return {json.loads(line)["record"] for line in file}


def print_quality(nearest: dict[int, float], removed: set[int]) -> None:
    """Print recall and precision at THRESHOLD, and which share of the documents was removed by Jaccard index."""
    true = {number for number, jaccard in nearest.items() if jaccard >= THRESHOLD}
    right = len(true & removed)
    print(f"{len(true):,} duplicates at a Jaccard index of {THRESHOLD} or more, {len(removed):,} removed")
    print(f"recall {right / len(true):.4f}, precision {right / len(removed):.4f}")
    made = Counter()
    found = Counter()
    for number, jaccard in nearest.items():
        index = int(np.digitize(jaccard, BINS))
        made[index] += 1
        found[index] += number in removed
    for index, low in enumerate(BINS[:-1], 1):
        if made[index]:
            share = found[index] / made[index]
            print(f"Jaccard index {low} to {min(BINS[index], 1)}: {made[index]:,} documents, {share:.2%} removed")


if __name__ == "__main__":
    main()
