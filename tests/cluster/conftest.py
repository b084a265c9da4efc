"""What tests of MLflow share: the session's store, under names of their own."""

from pathlib import Path

import pytest

from mmrag.config import Experiment, Tracking


@pytest.fixture
def tracking(experiment: Experiment, tmp_path: Path) -> Tracking:
    """The session's store, under a name of this test's own."""
    return Tracking(uri=experiment.tracking.uri, experiment=tmp_path.name)
