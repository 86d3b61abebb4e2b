"""MLflow: the server or store that MLFLOW_TRACKING_URI names, else a store in the run's folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping, Sequence

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from rlhf3d.observability.samples import Kind, Sample
from rlhf3d.observability.trackers.protocol import COLUMNS, RunFacts, table_rows

PARAMS_A_CALL = 100
"""What a server takes at once; of metrics it takes 1,000."""
METRICS_A_CALL = 1000


class MLflow:
    """See `Tracker`."""

    def __init__(self, facts: RunFacts) -> None:
        # It tells of each table that it makes, on the terminal, which is the run's.
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            store = facts.local("mlflow").resolve()
            uri, artifacts = f"sqlite:///{store / 'mlflow.db'}", (store / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        known = facts.known_id("mlflow")
        if known is not None:
            self._run = known
            self._client.update_run(known, status="RUNNING")
        else:
            self._run = self._new_run(facts, artifacts)
        facts.keep_id("mlflow", self._run)
        # Parameters cannot change: what a resume changed is in this file.
        self._client.log_dict(self._run, dict(facts.config), "config.yaml")
        tags = [RunTag(f"version.{name}", text) for name, text in facts.versions.items()]
        self._client.log_batch(self._run, tags=tags)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        now = int(time.time() * 1000)
        found = [Metric(name, value, now, step) for name, value in metrics.items()]
        for start in range(0, len(found), METRICS_A_CALL):
            self._client.log_batch(self._run, metrics=found[start : start + METRICS_A_CALL])

    def samples(self, step: int, rows: Sequence[Sample], kind: Kind) -> None:
        """See `Tracker`."""
        # As `mlflow.log_table` writes it, which needs pandas and reads the former file back.
        table = {"columns": list(COLUMNS), "data": table_rows(step, rows)}
        self._client.log_dict(self._run, table, f"samples/{kind}/step_{step}.json")

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)

    def _new_run(self, facts: RunFacts, artifacts: str | None) -> str:
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", facts.project)
        experiment = self._client.get_experiment_by_name(project)
        if experiment is None:
            number = self._client.create_experiment(project, artifact_location=artifacts)
        else:
            number = experiment.experiment_id
        run: str = self._client.create_run(number, run_name=facts.name).info.run_id
        params = [Param(name, str(value)) for name, value in facts.config.items()]
        for start in range(0, len(params), PARAMS_A_CALL):
            self._client.log_batch(run, params=params[start : start + PARAMS_A_CALL])
        return run


track = MLflow
