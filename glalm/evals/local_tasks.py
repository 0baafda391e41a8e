"""The harness's tasks on data of one's own: DATA_DIR/TASK/SPLIT.jsonl, or .json, .parquet, .txt (WikiText's form).

SPLIT is train, validation (or valid) or test, alone or between . - or _ (test-00000-of-00001.parquet). Rows have the
columns of the task's data set on the hub. For the tasks in ROWS they may also be in the form of MosaicML's evaluation
suites, from which the columns are made again, so that prompts and metrics stay the harness's own. The folder wikitext2
stands for wikitext: in its tokenised text rare words are <unk>, so that its perplexity is not that of the raw text.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import zip_longest
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


def find_files(data_dir: Path, task: str) -> dict[str, list[Path]]:
    """The files of each split that DATA_DIR/TASK has. A file SPLIT.jsonl is all of that split."""
    folders = [data_dir / name for name in FOLDERS.get(task, (task,))]
    files = [p for folder in folders for p in sorted(folder.rglob("*")) if p.suffix in SUFFIXES]
    found = {}
    for split, names in SPLITS.items():
        exact = [p for p in files if p.stem in names]
        if matching := exact[:1] or [p for p in files if {*re.split(r"[._-]", p.stem)} & {*names}]:
            found[split] = matching
    return found


def load(data_dir: str, task: str, **_) -> datasets.DatasetDict:
    """What the harness would have from the hub."""
    files = find_files(Path(data_dir), task)
    rows = {split: [row for path in paths for row in read_rows(path, task)] for split, paths in files.items()}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(found) for split, found in rows.items()})


def read_rows(path: Path, task: str) -> Iterator[dict]:
    if path.suffix == ".parquet":
        rows = pyarrow.parquet.read_table(path).to_pylist()
    elif path.suffix == ".txt":
        rows = [{"page": page} for page in wikitext_pages(path.read_text(encoding="utf-8"))]
    else:
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if path.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
    for row in rows:
        yield ROWS[task](row) if task in ROWS and row.keys() & {"query", "context_options"} else row


def checksums(data_dir: Path, task: str) -> dict[str, str]:
    """Of the files that the task's data is in: {path in DATA_DIR: sha256}. Where none are its own, as with a group or a
    tag of tasks, of all files."""
    files = [path for paths in find_files(data_dir, task).values() for path in paths]
    files = files or [path for path in sorted(data_dir.rglob("*")) if path.suffix in SUFFIXES]
    return {str(path.relative_to(data_dir)): file_sha256(path) for path in files}


CUSTOM = f"custom_dataset: !function {__name__}.load"


@lru_cache(maxsize=1)
def all_tasks() -> TaskManager:
    """The harness's own. It reads thousands of files to know them, for seconds."""
    return TaskManager()


def task_manager(data_dir: str | None, folder: Path) -> TaskManager:
    """The harness's tasks; those of which DATA_DIR has a folder read from there. `folder`: for the configs that say so,
    which has to stay."""
    tasks = all_tasks()
    if data_dir is None:
        return tasks
    for name in {*(path.name for path in Path(data_dir).iterdir()), *FOLDERS}:
        entry, files = tasks.task_index.get(name), find_files(Path(data_dir), name)
        if not (entry and entry.yaml_path and files):
            continue
        kwargs = {"data_dir": data_dir, "task": name}
        config = {"include": str(entry.yaml_path), "task": name, "dataset_kwargs": kwargs}
        keys = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
        config |= {key: None for key, split in keys.items() if split not in files}
        reader = f"class: !function {__name__}.{CLASSES[name].__name__}" if name in CLASSES else CUSTOM
        lines = [f"{key}: {json.dumps(value)}" for key, value in config.items()]
        (folder / f"{name}.yaml").write_text("\n".join([*lines, reader, ""]))
    local = TaskManager(include_defaults=False, include_path=[folder])
    local.task_index.update({name: entry for name, entry in tasks.task_index.items() if name not in local.task_index})
    return local


def check(tasks: TaskManager, name: str, data_dir: str | None) -> None:
    """Raises ConfigError if the harness has no task, group or tag of that name, or DATA_DIR lacks its data."""
    entry = tasks.task_index.get(name)
    if entry is None:
        near = [n for n in sorted(tasks.task_index) if n.startswith(name[:4])][:6]
        raise ConfigError(
            f"harness has no task {name}" + (f"; some of similar names: {', '.join(near)}" if near else "")
        )
    config = entry.cfg or {}
    if data_dir is None or not ("output_type" in config or "class" in config):
        return
    split = config.get("test_split") or config.get("validation_split") or "validation"
    if split not in find_files(Path(data_dir), name):
        path = CLASSES[name].DATASET_PATH if name in CLASSES else config.get("dataset_path")
        source = " ".join(filter(None, (path, config.get("dataset_name"))))
        raise ConfigError(
            f"no data: put the split {split} of the data set {source} at "
            f"{os.path.join(data_dir, name, split)}.jsonl or .parquet (one row a question, the hub's columns)"
        )


# --------------------------------------------------------------------------- rows of other forms, in the hub's columns


def _lettered(row: dict) -> dict:
    letters = "ABCDEFGH"[: len(row["choices"])]
    return {"choices": {"text": row["choices"], "label": list(letters)}, "answerKey": letters[row["gold"]]}


def _arc(row: dict) -> dict:
    return {"question": row["query"].removeprefix("Question: "), **_lettered(row)}


def _openbookqa(row: dict) -> dict:
    return {"question_stem": row["query"], **_lettered(row)}


def _hellaswag(row: dict) -> dict:
    activity, _, context = row["query"].partition(": ")
    return {
        "activity_label": activity,
        "ctx_a": context,
        "ctx_b": "",  # of which the harness would make the first letter a capital
        "endings": row["choices"],
        "label": str(row["gold"]),
    }


def _boolq(row: dict) -> dict:
    passage, _, question = row["query"].rpartition("\nQuestion: ")
    passage, question = passage.removeprefix("Passage: "), question.removesuffix("?")
    return {"passage": passage, "question": question, "label": row["gold"]}


def _copa(row: dict) -> dict:
    premise, _, connector = row["query"].rpartition(", ")
    question = {"because": "cause", "therefore": "effect"}[connector]
    first, second = row["choices"]
    return {"premise": premise + ".", "question": question, "choice1": first, "choice2": second, "label": row["gold"]}


def _winogrande(row: dict) -> dict:
    """Two contexts that end in the options, cut at a space: what they are called matters not, only the whole."""
    first, second = (option.split(" ") for option in row["context_options"])
    n = next(i for i, (a, b) in enumerate(zip_longest(first, second)) if a != b)
    sentence = " ".join([*first[:n], "_", row["continuation"]])
    options = {"option1": " ".join(first[n:]), "option2": " ".join(second[n:])}
    return {"sentence": sentence, **options, "answer": str(row["gold"] + 1)}


def wikitext_pages(text: str) -> list[str]:
    """The documents of WikiText's one text, each from its " = Title = " to the next."""
    return [page for page in re.split(r"(?m)^(?= = [^=].* = $)", text) if page.strip()]


ROWS: dict[str, Callable[[dict], dict]] = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
    "hellaswag": _hellaswag,
    "boolq": _boolq,
    "copa": _copa,
    "winogrande": _winogrande,
}


# ---------------------------------------------------------------- the harness's tasks that are classes, not configs


class _Local(ConfigurableTask):
    def __init__(self, config: dict):
        self._where = config["dataset_kwargs"]
        super().__init__()

    def download(self, dataset_kwargs: dict | None = None, **_) -> None:
        self.dataset = load(**self._where)


class FDA(_Local, fda.FDA):
    pass


class SWDE(_Local, swde.SWDE):
    pass


class SQUADCompletion(_Local, squad.SQUADCompletion):
    pass


CLASSES = {"fda": FDA, "swde": SWDE, "squad_completion": SQUADCompletion}
