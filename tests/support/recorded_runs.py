"""What MLflow has recorded, looked at with its own client."""

from mlflow import MlflowClient

from cluster.store import tracking_uri
from mmrag.config import Tracking


def only_run(tracking: Tracking, name: str):
    client = MlflowClient(tracking_uri=tracking_uri(tracking))
    experiment = client.get_experiment_by_name(tracking.experiment)
    runs = client.search_runs([experiment.experiment_id])
    [found] = [one for one in runs if one.info.run_name == name]
    return client, found
