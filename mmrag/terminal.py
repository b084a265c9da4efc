"""What a command owes whoever started it: how far it is, an end without a traceback, whatever their
terminal.

Knows nothing of what the command does.
"""

from __future__ import annotations

import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

INTERRUPTED, NOBODY_READS = 130, 141
"""Exit statuses as a shell gives them: 128 and the number of the signal."""
LINE_SECONDS = 10.0
"""Where standard error is no terminal to draw a bar on, a line is printed this often."""


@contextmanager
def command(name: str) -> Iterator[None]:
    """A command's whole run: interrupted, it says so in one line and exits with 130; where nobody
    reads on (`| head`), it ends without a word; what the terminal cannot show, it escapes."""
    escape_unprintable()
    try:
        yield
        _flush()
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        _leave(INTERRUPTED)
    except BrokenPipeError:
        _leave(NOBODY_READS)
    except SystemExit as leaving:
        try:
            _flush()
        except BrokenPipeError:
            _leave(leaving.code if isinstance(leaving.code, int) and leaving.code else NOBODY_READS)
        raise


def escape_unprintable() -> None:
    r"""Write \u escapes for what the encoding of standard output lacks, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        if not isinstance(stream, io.TextIOWrapper):
            continue
        narrow = codecs.lookup(stream.encoding).name != "utf-8"
        if stream.errors == "strict" or (stream.errors == "surrogateescape" and narrow):
            stream.reconfigure(errors="backslashreplace")


def shows(text: str) -> bool:
    """Whether standard output can say `text` as it stands."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def progress(
    title: str, unit: str = "sentences", before: str = "mmrag: "
) -> Iterator[Callable[[int, int | None], None]]:
    """Shows on standard error how far something is that calls what is yielded with (done, all).

    All is None where nobody knows yet. `before` begins each line, where there is no terminal to
    draw a bar on.
    """
    shown = Console(stderr=True)
    if shown.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=shown, transient=True) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = spoke = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal spoke
        now = time.monotonic()
        last = done == total and now - started >= LINE_SECONDS
        if last or now - spoke >= LINE_SECONDS:
            spoke = now
            of_all = "" if total is None else f"/{total}"
            print(f"{before}{title}: {done}{of_all} {unit}", file=sys.stderr, flush=True)

    yield tell


@contextmanager
def status_line() -> Iterator[Callable[[str], None]]:
    """Shows on standard error, if that is a terminal, the last line that what is yielded was called
    with. An empty one leaves its place to others, and so does the end, unless all of it took longer
    than LINE_SECONDS."""
    shown = Console(stderr=True)
    if not shown.is_terminal:
        yield lambda line: None
        return
    own = {"redirect_stdout": False, "redirect_stderr": False}  # results are none of its business
    with Live(console=shown, transient=True, auto_refresh=False, **own) as live:
        started = time.monotonic()
        yield lambda line: live.update(Text(line, "dim", no_wrap=True), refresh=True)
        live.transient = time.monotonic() - started < LINE_SECONDS


def _flush() -> None:
    """Let a closed pipe show now, while it can be answered."""
    if sys.stdout is not None:  # whoever started us may have closed it
        sys.stdout.flush()


def _leave(status: int) -> None:
    """Exit; what is still to be written goes nowhere, or Python would fail once more at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    raise SystemExit(status) from None
