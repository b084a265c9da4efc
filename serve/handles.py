"""Calls between deployments, whatever their size.

Where Serve is optimized for throughput it sends a call's arguments and its result by value, as gRPC
messages of at most 4 MiB. A call by reference is a call of the replica's actor instead: what is
large lies in Ray's object store, which both machines read it from, and `ObjectRef`s in arguments
are counted, so that an object lives until the last holder drops it. (Sent by value, a reference
would keep its object for ever.)
"""

from __future__ import annotations

from ray.serve.handle import DeploymentHandle

BY_VALUE_BYTES = 1_000_000
"""The most that is sent by value: it costs less then, and pickling adds little."""


def by_reference(handle: DeploymentHandle) -> DeploymentHandle:
    """The same deployment, called by reference."""
    return handle.options(_by_reference=True)


class SizedHandle:
    """A deployment that is called by value with what is small, and else by reference."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._small, self._large = handle, by_reference(handle)

    def of(self, size: int | None) -> DeploymentHandle:
        """The handle for arguments and results of `size` bytes; None: nobody knows."""
        return self._large if size is None or size > BY_VALUE_BYTES else self._small
