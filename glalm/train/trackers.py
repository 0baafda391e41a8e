"""Send a run's metrics, sampled texts and figures to Weights & Biases, TensorBoard or MLflow, through Accelerate.

metrics.jsonl and the files beside it are the record of a run. A tracker is a view of them, whose errors never stop a
run.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from glalm.config.strict import flatten_tree

if TYPE_CHECKING:  # Importing Accelerate takes seconds.
    from accelerate.tracking import GeneralTracker

    from glalm.config.run import RunConfig

INSTALL = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow-skinny"}


class RunTracker:
    """The tracker of `config.track`, in which a resumed run continues. Its first error ends it with a message.

    Args:
        folder: The run's folder. TensorBoard's files, and those of the others without a server, are in it.
        run_id: The run's id in Weights & Biases, and a tag of it in MLflow.
        start_step: The last step that is not repeated. TensorBoard hides what an earlier process logged after it. None
            for an evaluation, which adds texts and figures of any step to the finished run.
        log_message: Called with the message of an error.
        enabled: False on processes that log nothing.
    """

    def __init__(
        self,
        folder: Path,
        config: "RunConfig",
        run_id: str,
        start_step: int | None,
        log_message: Callable[[str], object],
        enabled: bool,
    ):
        self._library = config.track.tracker if enabled else "none"
        self._log_message = log_message
        self._is_training = start_step is not None
        self._tracker: GeneralTracker | None = None
        if self._library == "none":
            return
        start = {"wandb": start_wandb, "tensorboard": start_tensorboard, "mlflow": start_mlflow}[self._library]
        with self._stop_at_error():
            self._tracker = start(folder, config, run_id, start_step)

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        with self._stop_at_error():
            if self._tracker:
                self._tracker.log(values, step=step)

    def log_text(self, name: str, text: str, step: int) -> None:
        """Log a text, such as sampled continuations, under `name`."""
        with self._stop_at_error():
            if self._library == "tensorboard" and self._tracker:
                self._tracker.tracker.add_text(name, text, global_step=step)
            elif self._library == "mlflow" and self._tracker:
                import mlflow

                mlflow.log_text(text, f"{name}/step_{step}.txt")
            elif self._tracker:
                row = [step, text]
                self._tracker.log_table(name, columns=["step", "text"], data=[row], step=self._wandb_step(step))

    def log_figure(self, name: str, path: Path, step: int) -> None:
        """Log the PNG file at `path` under `name`."""
        with self._stop_at_error():
            if self._library == "mlflow" and self._tracker:
                self._tracker.log_artifact(str(path), f"{name}/step_{step}")
            elif self._library == "tensorboard" and self._tracker:
                from matplotlib.image import imread

                self._tracker.log_images({name: imread(path)[None, :, :, :3]}, step=step, dataformats="NHWC")
            elif self._tracker:
                self._tracker.log_images({name: [str(path)]}, step=self._wandb_step(step))

    def finish(self) -> None:
        with self._stop_at_error():
            if self._tracker:
                self._tracker.finish()

    def _wandb_step(self, step: int) -> int | None:
        """Return the step for wandb, which refuses steps before the last that was logged."""
        return step if self._is_training else None

    @contextmanager
    def _stop_at_error(self) -> Iterator[None]:
        """Turn an error into a message, after which nothing more is logged."""
        try:
            yield
        except Exception as error:  # Trackers raise errors of their own, of their client and of the network.
            self._tracker = None
            advice = f" Install it with pip install {INSTALL[self._library]}." if isinstance(error, ImportError) else ""
            self._log_message(
                f"warning: stopped logging to {self._library}: {error}.{advice} metrics.jsonl has all metrics."
            )


def start_wandb(folder: Path, config: "RunConfig", run_id: str, start_step: int | None) -> "GeneralTracker":
    """Start or continue a run of Weights & Biases."""
    import wandb
    from accelerate.tracking import WandBTracker

    # Without a login, wandb would ask for one on the terminal. The run is recorded offline instead, to sync later.
    is_online = not config.track.offline and wandb.login(prompt=False)
    mode = "online" if is_online else "offline"
    settings = {"name": config.name, "id": run_id, "resume": "allow", "dir": folder, "mode": mode}
    # A run of a sweep that stopped logging at an error is still open, and wandb would log to it.
    tracker = WandBTracker(config.track.project, **settings, reinit="finish_previous")
    tracker.start()
    tracker.store_init_configuration(dataclasses.asdict(config))
    return tracker


def start_tensorboard(folder: Path, config: "RunConfig", run_id: str, start_step: int | None) -> "GeneralTracker":
    """Start or continue the files in the run's folder, which `tensorboard --logdir` shows."""
    from accelerate.tracking import TensorBoardTracker

    first_step = None if start_step is None else start_step + 1
    tracker = TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=first_step)
    tracker.start()
    tracker.store_init_configuration(list_settings(config))
    return tracker


def start_mlflow(folder: Path, config: "RunConfig", run_id: str, start_step: int | None) -> "GeneralTracker":
    """Start or continue a run on the server that MLFLOW_TRACKING_URI names, or else in the run's folder."""
    import mlflow
    from accelerate.tracking import MLflowTracker

    with suppress(Exception):  # A run of a sweep that stopped logging at an error is still open.
        mlflow.end_run()
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    if server and not config.track.offline:
        mlflow.set_tracking_uri(server)
    else:
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        mlflow.set_tracking_uri((folder / "mlflow").resolve().as_uri())
    # MLflow has changed the variable, and the next run of a sweep would take its value for the user's.
    os.environ["MLFLOW_TRACKING_URI"] = server
    # MLflow chooses the ids of its runs itself.
    found = mlflow.search_runs(
        experiment_names=[config.track.project], filter_string=f"tags.glalm = '{run_id}'", output_format="list"
    )
    settings = {"run_id": found[0].info.run_id} if found else {"run_name": config.name}
    tracker = MLflowTracker(config.track.project, tags={"glalm": run_id}, **settings)
    tracker.start()
    if not found:  # A parameter of a run cannot be written twice.
        tracker.store_init_configuration(list_settings(config))
    return tracker


def list_settings(config: "RunConfig") -> dict[str, str | int | float | bool]:
    """Return the values of a config by their dotted keys. Those that are not numbers become text."""
    settings = flatten_tree(dataclasses.asdict(config))
    return {key: value if isinstance(value, bool | int | float) else str(value) for key, value in settings.items()}
