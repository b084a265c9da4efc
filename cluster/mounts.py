"""What kind of file system a file lies on, as Linux lists them; nothing on it is touched."""

from __future__ import annotations

import os
import re
from pathlib import Path

MOUNTS = Path("/proc/self/mountinfo")
MOST_BYTES = 2**20
"""Of the list that are read: a container host has hundreds of lines."""
NETWORK = re.compile(
    r"nfs4?|cifs|smb3|smbfs|9p|afs|ceph|glusterfs|lustre|gpfs|beegfs|wekafs|pvfs2|ocfs2|gfs2"
    r"|fuse\.(sshfs|ceph|glusterfs|s3fs|gcsfuse|rclone|juicefs|blobfuse2?|mountpoint-s3|seaweedfs)"
)
"""Kinds whose files other machines may write at the same time."""


def network(path: Path) -> str | None:
    """The kind of network file system that an absolute path lies on; None for a disk, and where
    nothing tells."""
    try:
        with MOUNTS.open("rb") as stream:
            lines = os.fsdecode(stream.read(MOST_BYTES)).splitlines()
    except OSError:  # another operating system
        return None
    kind, longest = None, -1
    for line in lines:
        fields, dash, about = line.partition(" - ")
        where = fields.split(" ")
        if not dash or len(where) < 5:
            continue
        root = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), where[4]))
        if path.is_relative_to(root) and len(root.parts) >= longest:  # the last one hides the rest
            kind, longest = about.split(" ")[0], len(root.parts)
    return kind if kind and NETWORK.fullmatch(kind) else None
