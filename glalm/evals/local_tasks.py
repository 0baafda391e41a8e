"""Local data of lm-evaluation-harness's tasks: DATA_DIR/TASK/SPLIT.jsonl, .json, .parquet or .txt (WikiText).

SPLIT is train, validation (or valid) or test, alone or between . - or _ (test-00000-of-00001.parquet). Rows have the
columns of the task's data set on the hub. For the tasks in ROW_CONVERTERS, rows may also be in the form of MosaicML's
evaluation suites; they are converted to the hub's columns, so that prompts and metrics remain the harness's own. The
folder wikitext2 also serves the task wikitext; in its tokenized text rare words are <unk>, so its perplexity is not
that of the raw text.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import chain, zip_longest
from pathlib import Path

import datasets
import pyarrow.parquet
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks.fda import task as fda
from lm_eval.tasks.squad_completion import task as squad
from lm_eval.tasks.swde import task as swde

from glalm.config.strict import ConfigError
from glalm.data.files import file_sha256

SPLITS = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}
SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
FOLDERS = {"wikitext": ("wikitext", "wikitext2")}


def find_task_files(data_dir: Path, task: str) -> dict[str, list[Path]]:
    """Return the files of each split in DATA_DIR/TASK. If one is called SPLIT.jsonl, it is the entire split."""
    folders = [data_dir / name for name in FOLDERS.get(task, (task,))]
    files = [path for path in chain(*(sorted(folder.rglob("*")) for folder in folders)) if path.suffix in SUFFIXES]
    found = {}
    for split, names in SPLITS.items():
        exact = [path for path in files if path.stem in names]
        if matching := exact[:1] or [path for path in files if {*re.split(r"[._-]", path.stem)} & {*names}]:
            found[split] = matching
    return found


def load_task_data(data_dir: str, task: str, **_) -> datasets.DatasetDict:
    """Return the task's data as the harness would load it from the hub."""
    splits = {}
    for split, paths in find_task_files(Path(data_dir), task).items():
        rows = chain.from_iterable(read_rows(path, task) for path in paths)
        splits[split] = datasets.Dataset.from_list(list(rows))
    return datasets.DatasetDict(splits)


def read_rows(path: Path, task: str) -> Iterator[dict]:
    """Yield the rows of a file in the hub's columns."""
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".txt":
        rows = [{"page": page} for page in split_wikitext(path.read_text(encoding="utf-8"))]
    elif path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))
    else:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    for row in rows:
        is_suite_row = task in ROW_CONVERTERS and row.keys() & {"query", "context_options"}
        yield ROW_CONVERTERS[task](row) if is_suite_row else row


def checksum_files(data_dir: str | None, task: str) -> dict[str, str] | str:
    """Return {path in DATA_DIR: SHA-256} of the task's files; of all files for a group or a tag, which has none.

    Without a DATA_DIR, the data is the hub's: return "hub".
    """
    if data_dir is None:
        return "hub"
    files = list(chain(*find_task_files(Path(data_dir), task).values()))
    files = files or [path for path in sorted(Path(data_dir).rglob("*")) if path.suffix in SUFFIXES]
    return {str(path.relative_to(data_dir)): file_sha256(path) for path in files}


@lru_cache(maxsize=1)
def load_harness_tasks() -> TaskManager:
    """Return the harness's own tasks. It takes seconds to read thousands of files for that."""
    return TaskManager()


def build_task_manager(data_dir: str | None, folder: Path) -> TaskManager:
    """Return the harness's tasks, of which those with a folder in DATA_DIR read their data there.

    Args:
        folder: Where the configs of those tasks are written. It must exist as long as the manager is used.
    """
    tasks = load_harness_tasks()
    if data_dir is None:
        return tasks
    for name in {*(path.name for path in Path(data_dir).iterdir()), *FOLDERS}:
        entry = tasks.task_index.get(name)
        files = find_task_files(Path(data_dir), name)
        if entry and entry.yaml_path and files:
            config = format_task_config(name, entry.yaml_path, data_dir, files)
            (folder / f"{name}.yaml").write_text(config)
    local = TaskManager(include_defaults=False, include_path=[folder])
    local.task_index.update({name: entry for name, entry in tasks.task_index.items() if name not in local.task_index})
    return local


def format_task_config(name: str, included: Path, data_dir: str, files: dict[str, list[Path]]) -> str:
    """Return the YAML of a task that is the harness's own one, the file `included`, but for where its data is."""
    source = {"data_dir": data_dir, "task": name}
    config = {"include": str(included), "task": name, "dataset_kwargs": source}
    for key, split in (("training_split", "train"), ("validation_split", "validation"), ("test_split", "test")):
        if split not in files:
            config[key] = None
    if name in LOCAL_CLASSES:
        reader = f"class: !function {__name__}.{LOCAL_CLASSES[name].__name__}"
    else:
        reader = f"custom_dataset: !function {__name__}.{load_task_data.__name__}"
    lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
    return "\n".join([*lines, reader, ""])


def check_task(tasks: TaskManager, name: str, data_dir: str | None) -> None:
    """Raise ConfigError where the harness has no task, group or tag of that name, or DATA_DIR lacks a task's data.

    So it does of a task whose split has a name of its own, such as MNLI's validation_matched.
    """
    entry = tasks.task_index.get(name)
    if entry is None:
        near = [other for other in sorted(tasks.task_index) if other.startswith(name[:4])][:6]
        hint = f"; some of similar names: {', '.join(near)}" if near else ""
        raise ConfigError(f"harness has no task {name}{hint}")
    config = entry.cfg or {}
    is_task = "output_type" in config or "class" in config
    if data_dir is None or not is_task:
        return
    split = config.get("test_split") or config.get("validation_split") or "validation"
    if split not in SPLITS:
        raise ConfigError(
            f"its split {split} cannot be read from data_dir={data_dir}, only train, validation and test can; leave "
            "data_dir out to read it from the hub"
        )
    if split not in find_task_files(Path(data_dir), name):
        path = LOCAL_CLASSES[name].DATASET_PATH if name in LOCAL_CLASSES else config.get("dataset_path")
        source = " ".join(filter(None, (path, config.get("dataset_name"))))
        raise ConfigError(
            f"no data: put the split {split} of the data set {source} at "
            f"{os.path.join(data_dir, name, split)}.jsonl or .parquet (one row a question, the hub's columns)"
        )


# ----------------------------------------------------------------------- rows of MosaicML's suites to the hub's columns


def convert_choices(row: dict, question: str) -> dict:
    """Convert a row of ARC, whose queries begin with "Question: ", or of OpenBookQA. `question` is that column."""
    letters = "ABCDEFGH"[: len(row["choices"])]
    return {
        question: row["query"].removeprefix("Question: "),
        "choices": {"text": row["choices"], "label": list(letters)},
        "answerKey": letters[row["gold"]],
    }


def convert_hellaswag(row: dict) -> dict:
    activity, _, context = row["query"].partition(": ")
    return {
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",  # The harness would capitalize it, and the suite's text is already joined.
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


def convert_boolq(row: dict) -> dict:
    passage, _, question = row["query"].rpartition("\nQuestion: ")
    passage = passage.removeprefix("Passage: ")
    return {"passage": passage, "question": question.removesuffix("?"), "label": row["gold"]}


def convert_copa(row: dict) -> dict:
    premise, _, connector = row["query"].rpartition(", ")
    question = {"because": "cause", "therefore": "effect"}[connector]
    first, second = row["choices"]
    return {"premise": premise + ".", "question": question, "choice1": first, "choice2": second, "label": row["gold"]}


def convert_winogrande(row: dict) -> dict:
    """Divide two contexts that end in the options at the space before their first difference.

    The harness scores the joined text, so it does not matter how much of a context counts as the option.
    """
    first, second = (option.split(" ") for option in row["context_options"])
    n = next(i for i, (a, b) in enumerate(zip_longest(first, second)) if a != b)
    return {
        "sentence": " ".join([*first[:n], "_", row["continuation"]]),
        "option1": " ".join(first[n:]),
        "option2": " ".join(second[n:]),
        "answer": str(row["gold"] + 1),
    }


ROW_CONVERTERS: dict[str, Callable[[dict], dict]] = {
    "arc_easy": partial(convert_choices, question="question"),
    "arc_challenge": partial(convert_choices, question="question"),
    "openbookqa": partial(convert_choices, question="question_stem"),
    "hellaswag": convert_hellaswag,
    "boolq": convert_boolq,
    "copa": convert_copa,
    "winogrande": convert_winogrande,
}


def split_wikitext(text: str) -> list[str]:
    """Return the documents of WikiText's single text, each from its " = Title = " to the next."""
    return [page for page in re.split(r"(?m)^(?= = [^=].* = $)", text) if page.strip()]


# ------------------------------------------------------------------- tasks that the harness has as classes, not configs


class LocalTask(ConfigurableTask):
    """Replaces the download from the hub."""

    def __init__(self, config: dict):
        self._dataset_kwargs = config["dataset_kwargs"]
        super().__init__()

    def download(self, dataset_kwargs: dict | None = None, **_) -> None:
        self.dataset = load_task_data(**self._dataset_kwargs)


class FDA(LocalTask, fda.FDA):
    pass


class SWDE(LocalTask, swde.SWDE):
    pass


class SQUADCompletion(LocalTask, squad.SQUADCompletion):
    pass


LOCAL_CLASSES = {"fda": FDA, "swde": SWDE, "squad_completion": SQUADCompletion}
