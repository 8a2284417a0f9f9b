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

_MOST = 1000  # metrics that MLflow takes at a time ...
_PARAMS = 100  # ... and parameters, with ...
_LONGEST = 500  # ... so many characters; a name has ...
_LONGEST_NAME = 250
_NOT_IN_NAME = re.compile(r"[^\w./ :-]")  # of MLflow
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "running": "RUNNING"}
_RUN = "hydra_runner.id"  # the tag of a run in MLflow by which an attempt finds a run that an earlier one has begun


class MLflowWriter(ServiceWriter):
    """Writes to an MLflow server, or to a store of MLflow's in files.

    ``tracking_uri``: null: that of MLFLOW_TRACKING_URI. ``experiment``: null: the name of the experiment here.
    """

    def __init__(self, context: WriterContext, tracking_uri: str | None = None, experiment: str | None = None) -> None:
        super().__init__(context)
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri)
        self._experiment = experiment or context.experiment
        self._id = ""

    def open(self, id: str | None) -> str:  # noqa: A002
        self._id = id or self._began() or self._begin()
        self._client.update_run(self._id, status="RUNNING")
        return self._id

    def send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(_mlflow_name(tag), value, int(point.time * 1000), point.step)
            for point in points
            for tag, value in point.values.items()
        ]
        for first in range(0, len(metrics), _MOST):
            self._client.log_batch(self._id, metrics=metrics[first : first + _MOST])

    def close(self, status: str) -> None:
        self._client.update_run(self._id, status=_STATUS.get(status, "KILLED"))

    def _began(self) -> str | None:
        """The run that an attempt began and was killed before it could note its id."""
        runs = self._client.search_runs([self._group()], f"tags.`{_RUN}` = '{self.context.id}'", max_results=1)
        return runs[0].info.run_id if runs else None

    def _begin(self) -> str:
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
    """A name that MLflow takes: ``acc_1`` for ``acc@1``. It would refuse all points for the sake of one name."""
    return normpath(_NOT_IN_NAME.sub("_", name)).lstrip("./")[:_LONGEST_NAME] or "_"


class WandbWriter(ServiceWriter):
    """Writes to Weights & Biases, under the id of the run here. ``options``: those of ``wandb.init``, such as ``mode:
    offline``, whose folders ``wandb sync`` sends.
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
    """Writes to Trackio. ``options``: those of ``trackio.init``, such as ``space_id``."""

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
        """As a run that is resumed and finished: only then Trackio, which sends in a thread, has written all."""
        config = dict(self.context.hyperparameters)
        run = self._trackio.init(**{"name": self._name, "config": config, "resume": "allow", **self._options})
        for point in points:
            values = {tag: value if math.isfinite(value) else str(value) for tag, value in point.values.items()}
            run.log({**values, TIME: point.time}, step=point.step)
        run.finish()
