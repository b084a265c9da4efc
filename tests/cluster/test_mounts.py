from pathlib import Path

import pytest

from cluster import mounts

LISTED = r"""
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
23 22 0:21 / /proc rw - proc proc rw
40 22 0:45 / /mnt/mmrag rw,relatime shared:9 - nfs4 10.0.0.2:/export rw,vers=4.2
41 40 254:2 / /mnt/mmrag/scratch rw - xfs /dev/nvme1n1 rw
42 22 0:46 / /mnt/two\040words rw - fuse.s3fs s3fs rw
43 22 0:47 / /data rw - ext4 /dev/vdb rw
44 22 0:48 / /data rw - cifs //host/share rw
a line of another shape
"""


@pytest.fixture(autouse=True)
def listed(tmp_path, monkeypatch):
    (tmp_path / "mountinfo").write_text(LISTED)
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/somebody/mlflow.db", None),
        ("/mnt/mmrag/runs/mlflow.db", "nfs4"),
        ("/mnt/mmrag/scratch/mlflow.db", None),
        ("/mnt/mmrag2/mlflow.db", None),
        ("/mnt/two words/mlflow.db", "fuse.s3fs"),
        ("/data/mlflow.db", "cifs"),
    ],
)
def test_the_nearest_mount_says_what_a_file_lies_on(path, kind):
    assert mounts.network(Path(path)) == kind


def test_where_nothing_is_listed_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(mounts, "MOUNTS", tmp_path / "none")
    assert mounts.network(Path("/mnt/mmrag/mlflow.db")) is None
