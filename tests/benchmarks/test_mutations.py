"""The mutation runner, on a tree of one module: its verdicts, and that it leaves the tree alone."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mutations.py"
MODULE = """\
def divide(a, b):
    if b == 0:
        raise ValueError("b is 0")
    return a / b


def double(a):
    return 2 * a
"""
TESTS = """\
import pytest
from arithmetic import divide, double


def test_divide():
    with pytest.raises(ValueError, match="b is 0"):
        divide(1, 0)


def test_double():
    assert double(0) == 0


@pytest.fixture
def doubled():
    return double(1)


def test_with_fixture(doubled):
    assert doubled == 2
"""


def entry(name: str, old: str, new: str, test: str, file: str = "arithmetic.py") -> str:
    values = {"name": name, "file": file, "old": old, "new": new}
    lines = [f"{key} = '''{value}'''" for key, value in values.items()]
    return "\n".join(["[[mutation]]", *lines, f'tests = ["test_arithmetic.py::{test}"]\n'])


@pytest.fixture
def tree(tmp_path) -> Path:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "arithmetic.py").write_text(MODULE)
    (tree / "test_arithmetic.py").write_text(TESTS)
    (tree / ".gitignore").write_text("ignored.py\n")
    (tree / "ignored.py").write_text("raise RuntimeError('this file must not be copied')\n")
    (tree / "conftest.py").write_text(
        "from pathlib import Path\n\ndef pytest_configure():\n    assert not Path('ignored.py').exists()\n"
    )
    subprocess.run(["git", "init", "--quiet"], cwd=tree, check=True)
    return tree


def run(tree: Path, *entries: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    table = tree.parent / "table.toml"
    table.write_text("\n".join(entries))
    command = [sys.executable, str(SCRIPT), "--tree", str(tree), "--table", str(table), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


GUARD = '    if b == 0:\n        raise ValueError("b is 0")\n'


@pytest.mark.slow
def test_verdicts(tree):
    done = run(
        tree,
        entry("no check of the divisor", GUARD, "", "test_divide"),
        entry("double is the square", "2 * a", "a * a", "test_double"),
        entry("double fails in a fixture", "2 * a", "2 * undefined", "test_with_fixture"),
        entry("double never ends", "    return 2 * a", "    while True: pass", "test_double"),
        options=("--timeout", "10"),
    )
    assert done.returncode == 1, done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:6]]
    assert [row[:3] for row in rows[:2]] == [
        ["no check of the divisor", "caught", "test_divide"],
        ["double is the square", "SURVIVED", "1 tests passed"],
    ]
    assert rows[2][1] == "BROKEN" and "could not be set up" in rows[2][2]
    assert rows[3][1:3] == ["caught", "(no result after 10 s)"]
    assert done.stdout.splitlines()[-1] == "2 of 4 caught"
    assert (tree / "arithmetic.py").read_text() == MODULE


def test_all_caught_is_success(tree):
    done = run(tree, entry("no check of the divisor", GUARD, "", "test_divide"))
    assert done.returncode == 0 and "1 of 1 caught" in done.stdout


@pytest.mark.parametrize(
    "mutation, message",
    [
        (entry("m", "return 3 * a", "", "test_double"), "the old text occurs 0 times in arithmetic.py"),
        (entry("m", "return", "", "test_double"), "the old text occurs 2 times in arithmetic.py"),
        (entry("m", "2 * a", "2 *", "test_double"), "arithmetic.py would not be valid Python"),
        (entry("m", "2 * a", "a", "test_double", file="gone.py"), "gone.py does not exist"),
        (
            entry("m", "2 * a", "a", "test_double").replace("test_arithmetic", "test_gone"),
            "test_gone.py does not exist",
        ),
    ],
)
def test_mutation_that_does_not_fit_is_found_without_running_tests(tree, mutation, message):
    done = run(tree, mutation, options=("--check",))
    assert done.returncode == 1 and message in done.stdout


def test_failing_tests_are_found_before_any_mutation(tree):
    (tree / "test_arithmetic.py").write_text(TESTS.replace("double(0) == 0", "double(0) == 1"))
    done = run(tree, entry("double is the square", "2 * a", "a * a", "test_double"))
    assert done.returncode == 1 and "Without a mutation the tests fail already: ['test_double']" in done.stdout


def test_name_that_no_test_has_is_broken(tree):
    done = run(tree, entry("m", "2 * a", "a", "test_gone"), options=("--skip-unmutated",))
    assert done.returncode == 1 and "| m | BROKEN | pytest ended with 4" in done.stdout


def test_table_fits_the_code():
    """An entry whose code has changed must be corrected with it."""
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
