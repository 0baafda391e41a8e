"""Remove one guarantee at a time from a copy of the project and check that a test notices.

    python benchmarks/mutations.py                           every mutation of benchmarks/mutations.toml
    python benchmarks/mutations.py --only "no read-back"     those whose name contains the words
    python benchmarks/mutations.py --check                   only check that each mutation still fits the code

A mutation is a table entry: a name, a file, a text that occurs in it exactly once, the text that replaces it, and the
tests that have to fail then. The working tree is never changed: its files are copied to a temporary folder. First all
the named tests must pass there; then each mutation is applied by itself, and its tests are run up to the first failure.

The result is a table with one of these verdicts for each mutation:

    caught      a named test failed, or did not end in time
    SURVIVED    all named tests passed, so no test protects the guarantee
    BROKEN      the text does not fit the file, or the tests could not be run: correct the mutation

The exit code is 1 unless every mutation was caught.
"""

import argparse
import ast
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CAUGHT, SURVIVED, BROKEN = "caught", "SURVIVED", "BROKEN"
TABLE = Path(__file__).with_suffix(".toml")


@dataclass(frozen=True)
class Mutation:
    """One guarantee less. `tests` are arguments of pytest, relative to the root of the tree."""

    name: str
    file: str
    old: str
    new: str
    tests: list[str]

    def replace_in(self, content: str) -> str:
        """Return the mutated content of the file. Raises ValueError if the mutation does not fit it."""
        occurrences = content.count(self.old)
        if occurrences != 1:
            raise ValueError(f"the old text occurs {occurrences} times in {self.file}")
        mutated = content.replace(self.old, self.new)
        try:
            ast.parse(mutated)
        except SyntaxError as error:
            raise ValueError(f"{self.file} would not be valid Python: {error}") from error
        return mutated

    @contextlib.contextmanager
    def applied(self, tree: Path) -> Iterator[None]:
        """Mutate the tree's file while entered. Raises ValueError if the file or a test does not exist or fit."""
        path = tree / self.file
        for needed in (self.file, *(test.partition("::")[0] for test in self.tests)):
            if not (tree / needed).exists():
                raise ValueError(f"{needed} does not exist")
        original = path.read_text()
        path.write_text(self.replace_in(original))
        try:
            yield
        finally:
            path.write_text(original)


@dataclass(frozen=True)
class PytestRun:
    """The outcome of one call of pytest. `failures` are the names of failed tests; `problem` says why there is none."""

    passed: int
    failures: list[str]
    problem: str | None
    seconds: float


@dataclass(frozen=True)
class Verdict:
    mutation: Mutation
    outcome: str
    detail: str
    seconds: float


def read_mutations(table: Path) -> list[Mutation]:
    entries = tomllib.loads(table.read_text())["mutation"]
    mutations = [Mutation(**entry) for entry in entries]
    names = [mutation.name for mutation in mutations]
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"{table}: these names occur more than once: {', '.join(sorted(repeated))}")
    return mutations


def copy_tree(tree: Path, target: Path) -> None:
    """Copy the files that git tracks, and new ones that it does not ignore."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        source = tree / name
        if source.is_file():  # git still lists a file that was deleted and not committed
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def run_tests(tree: Path, tests: list[str], timeout: float) -> PytestRun:
    """Run pytest in the tree up to the first failure, on the tree's own package."""
    report = tree / "mutation-report.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",  # A mutated file must not be mistaken for the compiled original.
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, cwd=tree, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            stop_group(process.pid)  # Fault tests can leave processes behind when they fail.
            process.wait()
        seconds = time.perf_counter() - start
        output.seek(0)
        last_lines = " / ".join(output.read().strip().splitlines()[-3:])
    if code is None:
        return PytestRun(0, [f"(no result after {timeout:.0f} s)"], None, seconds)
    if code not in (0, 1):
        return PytestRun(0, [], f"pytest ended with {code}: {last_lines}", seconds)
    cases = [*ElementTree.parse(report).iter("testcase")]
    failures = [case.get("name", "?") for case in cases if case.find("failure") is not None]
    unsuccessful = {"failure", "error", "skipped"}
    passed = [case for case in cases if unsuccessful.isdisjoint(child.tag for child in case)]
    problem = None
    if code == 1 and not failures:
        problem = f"a test could not be set up: {last_lines}"
    if code == 0 and not passed:
        problem = "every test was skipped"
    return PytestRun(len(passed), failures, problem, seconds)


def stop_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def judge(mutation: Mutation, tree: Path, timeout: float) -> Verdict:
    """Run the mutation's tests in the copied tree while it is mutated."""
    try:
        with mutation.applied(tree):
            run = run_tests(tree, mutation.tests, timeout)
    except ValueError as error:
        return Verdict(mutation, BROKEN, str(error), 0.0)
    if run.problem:
        return Verdict(mutation, BROKEN, run.problem, run.seconds)
    if run.failures:
        return Verdict(mutation, CAUGHT, run.failures[0], run.seconds)
    return Verdict(mutation, SURVIVED, f"{run.passed} tests passed", run.seconds)


def find_misfits(mutations: list[Mutation], tree: Path) -> list[Verdict]:
    """Apply each mutation without running its tests. Return a verdict for each one that does not fit the tree."""
    verdicts = []
    for mutation in mutations:
        try:
            with mutation.applied(tree):
                pass
        except ValueError as error:
            verdicts.append(Verdict(mutation, BROKEN, str(error), 0.0))
    return verdicts


def run_unmutated(mutations: list[Mutation], tree: Path, timeout: float) -> PytestRun:
    """Run every named test once, on the unchanged copy."""
    tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests)
    return run_tests(tree, list(tests), timeout)


def print_table(verdicts: list[Verdict]) -> None:
    print("| guarantee removed | verdict | first failed test | seconds |\n|-|-|-|-|")
    for verdict in verdicts:
        print(f"| {verdict.mutation.name} | {verdict.outcome} | {verdict.detail} | {verdict.seconds:.0f} |")
    caught = sum(verdict.outcome == CAUGHT for verdict in verdicts)
    print(f"{caught} of {len(verdicts)} caught")


def print_progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the checkout to copy (this one)")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"the mutations ({TABLE.name})")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="part of the mutations' names")
    parser.add_argument("--check", action="store_true", help="run no tests")
    parser.add_argument("--skip-unmutated", action="store_true", help="trust that the unmutated tests pass")
    parser.add_argument("--timeout", type=float, default=300, metavar="SECONDS", help="for one mutation's tests (300)")
    arguments = parser.parse_args()
    if not arguments.table.is_file():
        parser.error(f"{arguments.table} does not exist: name the table of mutations with --table FILE")
    mutations = [m for m in read_mutations(arguments.table) if any(words in m.name for words in arguments.only)]
    if not mutations:
        parser.error(f"{arguments.table} has no mutation with {arguments.only} in its name")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve()
        copy_tree(arguments.tree, tree)
        verdicts = find_misfits(mutations, tree)
        if verdicts or arguments.check:
            print_table(verdicts)
            return 1 if verdicts else 0
        if not arguments.skip_unmutated:
            unmutated = run_unmutated(mutations, tree, arguments.timeout * len(mutations))
            if unmutated.failures or unmutated.problem:
                print(f"Without a mutation the tests fail already: {unmutated.failures or unmutated.problem}")
                return 1
            print_progress(f"unmutated: {unmutated.passed} tests passed in {unmutated.seconds:.0f} s")
        for mutation in mutations:
            verdict = judge(mutation, tree, arguments.timeout)
            verdicts.append(verdict)
            print_progress(f"{verdict.outcome}: {mutation.name} ({verdict.seconds:.0f} s)")
    print_table(verdicts)
    return 0 if all(verdict.outcome == CAUGHT for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
