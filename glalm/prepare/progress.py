"""The bar that preparation shows: documents, tokens, tokens a second and the time left."""

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text


class PreparationBar:
    """Goes by the bytes of the input; on stderr. A context manager."""

    def __init__(self, enabled: bool = True):
        self._console = Console(stderr=True, highlight=False, soft_wrap=True, quiet=not enabled)
        time_left = TimeRemainingColumn(elapsed_when_finished=True)
        columns = (TextColumn("{task.description:<10}"), BarColumn(bar_width=10), _Counts(), time_left)
        self._bar = Progress(*columns, console=self._console, disable=not enabled)

    def __enter__(self) -> "PreparationBar":
        self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def start(self, description: str, total: int, completed: int = 0) -> None:
        """A new line, of `total` bytes."""
        self._task = self._bar.add_task(description, total=total, completed=completed, documents=0, tokens=0)

    def update(self, completed: int, documents: int, tokens: int = 0) -> None:
        """completed: bytes of the input so far. documents, tokens: how many more."""
        fields = self._bar.tasks[-1].fields
        more = {"documents": fields["documents"] + documents, "tokens": fields["tokens"] + tokens}
        self._bar.update(self._task, completed=completed, **more)

    def say(self, message: str) -> None:
        self._console.print(message)


class _Counts(ProgressColumn):
    def __init__(self):
        super().__init__(Column(no_wrap=True))

    def render(self, task: Task) -> Text:
        documents, tokens = task.fields["documents"], task.fields["tokens"]
        rate = tokens / task.elapsed if task.elapsed else 0
        shown = f"{documents:,} documents"
        return Text(f"{shown}  {tokens / 1e6:,.1f}M tokens  {rate / 1e6:.2f}M tokens/s" if tokens else shown)
