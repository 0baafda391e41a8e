"""The protocol of an evaluator, and the context in which it runs: its processes, its progress, its partial results."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from glalm.data.files import DamagedFile
from glalm.evals.eval_model import EvalModel
from glalm.evals.options import EvalConfig
from glalm.evals.result_files import read_json, write_json
from glalm.kernels.context_parallel import ContextShard
from glalm.train.collectives import gather_or_raise, rank_and_world_size

logger = logging.getLogger(__name__)


class EvalContext:
    """The processes that share one evaluation, its progress, and the results that an interrupted evaluation saved.

    All ranks must call `gather`, `run_on_rank_0` and `load_or_compute` in the same order.

    Where processes share each text, they form groups of neighbours. Those of a group compute the same results.

    Attributes:
        shard: The part of each text that this process reads, if processes share them, else None.
        advance: Called with the number of units (see Evaluator.unit) that this rank's group has finished.
    """

    def __init__(self, shard: ContextShard | None = None):
        self.rank, self.world_size = rank_and_world_size()
        self.shard = shard
        self.advance: Callable[[float], object] = lambda units: None
        self._partial_results: dict[str, Any] = {}
        self._partial_path: Path | None = None

    @property
    def group_size(self) -> int:
        """The number of processes that share each text."""
        return 1 if self.shard is None else self.shard.size

    @property
    def groups(self) -> int:
        """The number of groups of processes, which read different texts."""
        return self.world_size // self.group_size

    def map(self, function: Callable[[Any], Any], items: Iterable) -> list:
        """Return function(item) of all items on every rank, each computed by one group."""
        return self.gather([function(item) for item in self.share(items)])

    def share(self, items: Iterable) -> list:
        """Return the share of this rank's group of the items: one of `groups`, in turn."""
        return list(items)[self.rank // self.group_size :: self.groups]

    def gather(self, results: list) -> list:
        """Return the results of all groups' shares on every rank, in the order of the items that `share` divided."""
        shares = self._gather_or_raise(lambda: results)[:: self.group_size]
        gathered: list[Any] = [None] * sum(map(len, shares))
        for group, share in enumerate(shares):
            gathered[group :: self.groups] = share
        return gathered

    def run_on_rank_0(self, action: Callable[[], Any]) -> Any:
        """Run `action` on rank 0 only, and return its result on every rank."""
        return self._gather_or_raise(lambda: action() if self.rank == 0 else None)[0]

    def load_or_compute(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return the result that an interrupted evaluation saved under `name`, or else compute and save it.

        The result must be JSON. All ranks call `compute`, which must return the same on each.
        """
        if name not in self._partial_results:
            results = self._partial_results | {name: compute()}
            if self._partial_path is not None and self.rank == 0:
                write_json(self._partial_path, results)
            # A result that cannot be saved is not kept, or none after it could be saved either.
            self._partial_results = results
        return self._partial_results[name]

    def use_partial_results(self, path: Path, inputs: dict) -> None:
        """Load the partial results at `path`, if they are of the same `inputs`, and save all further ones there.

        A damaged file is ignored, with a warning.
        """

        def load() -> dict | None:
            try:
                return read_json(path)
            except DamagedFile as error:
                logger.warning(f"{error} It is ignored: what was saved of an interrupted evaluation is computed again.")
                return None

        saved = self.run_on_rank_0(load) or {}
        self._partial_results = saved if saved.get("inputs") == inputs else {"inputs": inputs}
        self._partial_path = path

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Where the block raises on one rank, raise RunError on the others: when they next wait for that rank, or here.

        Without this, an error between two collective calls would leave the other ranks waiting.
        """
        try:
            yield
            self._gather_or_raise(lambda: None)
        except Exception as error:
            if not getattr(error, "is_on_all_ranks", False):
                with suppress(Exception):
                    self._gather_or_raise(partial(_raise, error))
                error.is_on_all_ranks = True
            raise

    def _gather_or_raise(self, action: Callable[[], Any]) -> list:
        try:
            return gather_or_raise(action)
        except Exception as error:
            error.is_on_all_ranks = True  # A mark on the error itself, because a caller may handle it and continue.
            raise


def _raise(error: Exception) -> None:
    raise error


class Evaluator:
    """One kind of measurement of one model.

    The constructor of a subclass opens and checks its inputs, and raises ConfigError where they do not fit.

    Attributes:
        settings: Everything that the results depend on besides the model, as JSON. An evaluation that finished with
            equal settings is not repeated.
        total_units: Units of work of all ranks together, for the progress bar.
        unit: What the progress bar counts.
        shares_texts: Whether processes can share each text. Then `run` scores all text by
            `score_tokens(..., shard=context.shard)`.
    """

    unit = "tokens"
    shares_texts = False
    settings: dict
    total_units: int

    def __init__(self, model: EvalModel, config: EvalConfig):
        self.model = model
        self.config = config

    def run(self, context: EvalContext) -> dict | list:
        """Return the results, as JSON. All ranks call it, and those of rank 0 are written."""
        raise NotImplementedError

    def summarize(self, results: Any) -> list[str]:
        """Return the lines that the console shows of the results."""
        raise NotImplementedError

    def metrics(self, results: Any) -> dict[str, float | None]:
        """Return the few numbers of the results that training logs as metrics and a model card lists."""
        return {}

    def plot_results(self, record: dict, folder: Path) -> list[Path]:
        """Draw the figures of `record`, the content of eval/NAME.json, into `folder`. Return their paths."""
        return []


def missing_tasks(results: Any) -> dict[str, str]:
    """Return {task: reason} of what an evaluator could not do although it did the rest."""
    return results.get("missing", {}) if isinstance(results, dict) else {}
