"""What the log says of errors: where they arose and of what kind, and what they quote only where
that is asked for: a message may hold what somebody said or wrote.

Ray Serve logs whatever a deployment raises, foreseen or not.
"""

from __future__ import annotations

import logging
import traceback

from serve.settings import Logs

log = logging.getLogger("ray.serve")


class WithoutQuotes(logging.Filter):
    """Leaves of an exception its kinds and its places in the code."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Every record passes."""
        error = record.exc_info and record.exc_info[1]
        if error:
            record.msg = f"{record.getMessage()} {places(error)}"
            record.args, record.exc_info, record.exc_text = (), None, None
        return True


def install(settings: Logs) -> None:
    """Let this process log so, unless the settings ask for what is quoted."""
    known = any(isinstance(one, WithoutQuotes) for one in log.filters)
    if not settings.transcripts and not known:
        log.addFilter(WithoutQuotes())


def places(error: BaseException) -> str:
    """The kinds of an error and its causes, and where the first of them arose."""
    kinds, one = [], error
    while one is not None and len(kinds) < 5:
        kinds.append(type(one).__name__)
        one = one.__cause__ or one.__context__
    frames = traceback.format_list(traceback.extract_tb(error.__traceback__))
    return f"{' from '.join(kinds)}\n{''.join(frames)}".rstrip()
