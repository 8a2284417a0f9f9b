"""Writers for services that track experiments: MLflow, Weights & Biases, Trackio. Each needs the extra of its name."""

import math
import re
from collections.abc import Sequence
from posixpath import normpath
from typing import Any

from runner.config.identity import flatten
from runner.metrics.lines import TIME
from runner.metrics.service import Point, ServiceWriter
from runner.metrics.writer import WriterContext

# Limits of MLflow: metrics and parameters in a request, characters of a parameter and of a name.
_METRICS, _PARAMS, _LONGEST, _LONGEST_NAME = 1000, 100, 500, 250
_NOT_IN_NAME = re.compile(r"[^\w./ :-]")  # characters that MLflow refuses in a name
_STATUSES = ("finished", "failed", "running")
_RUN = "hydra_runner.id"  # the tag of a run in MLflow by which an attempt finds a run that an earlier attempt began


class MLflowWriter(ServiceWriter):
    """Writes to an MLflow server, or to a store of MLflow's in files.

    By default ``tracking_uri`` is MLFLOW_TRACKING_URI, and ``experiment`` is the name of the experiment here.
    """

    def __init__(self, context: WriterContext, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        super().__init__(context)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri)
        self._experiment = experiment or context.experiment
        self._id = ""

    def open(self, id: str | None) -> str:  # noqa: A002
        self._id = id or self._find() or self._create()
        self._client.update_run(self._id, status="RUNNING")
        return self._id

    def send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_mlflow_name(tag), value, int(point.time * 1000), point.step)
            for point in points
            for tag, value in point.values.items()
        ]
        for first in range(0, len(metrics), _METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + _METRICS])

    def close(self, status: str) -> None:
        self._client.update_run(self._id, status=status.upper() if status in _STATUSES else "KILLED")

    def _find(self) -> str | None:
        """The run of an attempt that was killed before it could note the run's id."""
        runs = self._client.search_runs([self._group()], f"tags.`{_RUN}` = '{self.context.id}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _create(self) -> str:
        from mlflow.entities import Param

        run = self._client.create_run(self._group(), run_name=self.context.run, tags={_RUN: self.context.id})
        values = flatten(self.context.hyperparameters).items()
        params = [Param(_mlflow_name(key), str(value)[:_LONGEST]) for key, value in values]
        for first in range(0, len(params), _PARAMS):
            self._client.log_batch(run.info.run_id, params=params[first : first + _PARAMS])
        return str(run.info.run_id)

    def _group(self) -> str:
        """The id of MLflow's experiment."""
        experiment = self._client.get_experiment_by_name(self._experiment)
        return str(experiment.experiment_id if experiment else self._client.create_experiment(self._experiment))


def _mlflow_name(name: str) -> str:
    """A name that MLflow takes: ``acc_1`` for ``acc@1``. It refuses all points of a request because of one name."""
    return normpath(_NOT_IN_NAME.sub("_", name)).lstrip("./")[:_LONGEST_NAME] or "_"


class WandbWriter(ServiceWriter):
    """Writes to Weights & Biases, under the id of the run here. ``options`` are for ``wandb.init``, such as ``mode:
    offline``: ``wandb sync`` then sends its folders.
    """

    def __init__(self, context: WriterContext, project: str | None = None, **options: Any) -> None:
        super().__init__(context)
        import wandb

        self._wandb = wandb
        self._options = {"project": project or context.experiment, **options}
        self._run: Any = None

    def open(self, id: str | None) -> str:  # noqa: A002
        context, settings = self.context, self._wandb.Settings(console="off", disable_git=True, x_disable_stats=True)
        facts = {"id": id or context.id, "name": context.run, "config": dict(context.hyperparameters)}
        self._run = self._wandb.init(**{"resume": "allow", "settings": settings, **facts, **self._options})
        return str(self._run.id)

    def send(self, points: Sequence[Point]) -> None:
        for point in points:
            self._run.log({**point.values, TIME: point.time}, step=point.step)

    def close(self, status: str) -> None:
        self._run.finish(exit_code=0 if status in ("finished", "running") else 1)


class TrackioWriter(ServiceWriter):
    """Writes to Trackio. ``options`` are for ``trackio.init``, such as ``space_id``."""

    def __init__(self, context: WriterContext, project: str | None = None, **options: Any) -> None:
        super().__init__(context)
        import trackio

        self._trackio = trackio
        hardware = {"auto_log_gpu": False, "auto_log_cpu": False, "embed": False}
        self._options = {"project": project or context.experiment, **hardware, **options}
        self._name = ""

    def open(self, id: str | None) -> str:  # noqa: A002
        self._name = id or f"{self.context.run}-{self.context.id[:6]}"
        return self._name

    def send(self, points: Sequence[Point]) -> None:
        """Resumes the run and finishes it: Trackio, which sends in a thread, has written everything only then."""
        config = dict(self.context.hyperparameters)
        run = self._trackio.init(**{"name": self._name, "config": config, "resume": "allow", **self._options})
        for point in points:
            values = {tag: value if math.isfinite(value) else str(value) for tag, value in point.values.items()}
            run.log({**values, TIME: point.time}, step=point.step)
        run.finish()
