"""Files at any fsspec URL: `s3://`, `gs://`, `memory://`; what is local stays a Path.

A `Url` has the few methods of a Path that readers need, so `located(name) / "lm.jsonl"` is read the
same wherever it lies. Which library answers follows from the scheme; credentials are that library's
own business (the environment, its files) and are never part of a URL. What is lastingly wrong with
one object is FileNotFoundError or PermissionError; a storage that does not answer is StorageError.
"""

from __future__ import annotations

import errno
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec

SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://")
PACKAGES = {
    **dict.fromkeys(("s3", "s3a"), "mmrag[s3]"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss"), "adlfs"),
}
"""Scheme -> what to install where its library is not."""
LOCAL = "file"
CREDENTIALS = re.compile(r"expired|signature|access key|security token", re.IGNORECASE)
"""In what is said of a refusal: it is not of this object alone."""
UNPRINTED = re.compile(r"[\x00-\x1f\x7f]")
BLOCK_BYTES = 4 * 2**20
"""What is read at once of an object that is read piece by piece."""
BLOCKS = 8
"""Pieces of one object that are in memory."""
READ_BYTES = 2**16
TRANSFERS = 8
"""Objects that are copied at once."""


class StorageError(OSError):
    """A storage does not answer, or its library is missing; the message names the URL."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.strerror = message  # what is shown of an OSError that names its file


@dataclass(frozen=True, order=True)
class Url:
    """A file or folder at a URL. ValueError for one that holds a password or climbs (`..`)."""

    text: str
    """All of it, without a slash at its end."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", self.text.rstrip("/"))
        if not (scheme := SCHEME.match(self.text)) or scheme[1] == LOCAL:
            raise ValueError(f"{self} is no URL of a storage")
        host, *names = self._rest.split("/")
        if "::" in self.text or not host:
            raise ValueError(f"{self} is not the URL of one storage and a name in it")
        if "@" in host:
            raise ValueError(
                f"{scheme[0]}{host.rpartition('@')[2]}: a user or a password in a URL would end up "
                "in logs: leave it out, and give the credentials as the storage's own library "
                "takes them (environment variables, its own files)"
            )
        if wrong := [name for name in names if not _sound(name)]:
            raise ValueError(f"{self}: {wrong[0]!r} is no name of an object")

    def __str__(self) -> str:
        """As it may be shown: what follows a `?` may be a signature."""
        return self.text.partition("?")[0] if self.scheme.startswith("http") else self.text

    @property
    def scheme(self) -> str:
        """`s3` of `s3://…`."""
        return self.text.partition("://")[0]

    @property
    def name(self) -> str:
        """What follows the last slash; empty for a bucket."""
        return str(self)[len(self.scheme) + 3 :].partition("/")[2].rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """As of a Path."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """As of a Path."""
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Url:
        """The folder that it lies in; of a bucket the bucket itself."""
        return Url(self.text.rpartition("/")[0]) if "/" in self._rest else self

    def __truediv__(self, name: str | PurePosixPath) -> Url:
        """What goes by `name` below it; ValueError for a name that leads elsewhere."""
        name = str(name)
        if name.startswith("/") or SCHEME.match(name):
            raise ValueError(f"{name!r} does not lie below {self}")
        return Url(f"{self.text}/{name}")

    def absolute(self) -> Url:
        """Itself: a URL is never relative."""
        return self

    def as_posix(self) -> str:
        """All of it, as a manifest has it."""
        return self.text

    def is_relative_to(self, other: Path | Url) -> bool:
        """Whether it lies below `other`."""
        return isinstance(other, Url) and f"{self.text}/".startswith(f"{other.text}/")

    def relative_to(self, other: Path | Url) -> PurePosixPath:
        """Its name below `other`; ValueError if it does not lie there."""
        if not self.is_relative_to(other):
            raise ValueError(f"{self} does not lie below {other}")
        return PurePosixPath(self.text[len(other.text) + 1 :])

    def exists(self) -> bool:
        """Whether anything goes by that name. PermissionError, StorageError."""
        return self._kind() is not None

    def is_file(self) -> bool:
        """Whether it is one object. PermissionError, StorageError."""
        return self._kind() == "file"

    def is_dir(self) -> bool:
        """Whether there are objects below it. PermissionError, StorageError."""
        return self._kind() == "directory"

    def open(self, mode: str = "rb") -> BinaryIO:
        """Read it, piece by piece: a few blocks are in memory, whatever its size.

        Raises FileNotFoundError, PermissionError or StorageError, here or where it is read.
        """
        if mode != "rb":
            raise ValueError(f"{self}: is opened to read bytes, not {mode!r}")
        return io.BufferedReader(_Reading(self), READ_BYTES)

    def read_bytes(self) -> bytes:
        """All of it at once."""
        with _asking(self):
            return _filesystem(self).cat_file(self.text)

    def write_bytes(self, content: bytes) -> None:
        """Write all of it at once: who reads finds the old content or the new."""
        with _asking(self):
            _filesystem(self).pipe_file(self.text, content)

    def unlink(self, missing_ok: bool = False) -> None:
        """Remove one object."""
        try:
            with _asking(self):
                _filesystem(self).rm_file(self.text)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def listing(self) -> tuple[dict[str, int], list[str]]:
        """The objects below it, by their names from here, and their bytes, in order; and names
        that no local file could have, as they could climb out of a directory."""
        with _asking(self):
            store = _filesystem(self)
            root = store._strip_protocol(self.text).rstrip("/") + "/"
            found = store.find(self.text, detail=True)
        sizes, unsound = {}, []
        for path, about in sorted(found.items()):
            if about["type"] != "file" or path.endswith("/") or not path.startswith(root):
                continue  # a folder's own mark, as consoles make them; and `self` as one object
            name = path.removeprefix(root)
            if all(map(_sound, name.split("/"))):
                sizes[name] = int(about["size"] or 0)
            else:
                unsound.append(name)
        return sizes, unsound

    @property
    def _rest(self) -> str:
        """What follows the scheme."""
        return self.text.partition("://")[2]

    def _kind(self) -> str | None:
        try:
            with _asking(self):
                return _filesystem(self).info(self.text)["type"]
        except FileNotFoundError:
            return None


Location = Path | Url
"""Where something lies."""


def located(place: Location | str) -> Location:
    """A URL's `Url`, else a Path; ValueError for a URL that is none of a storage."""
    if isinstance(place, Url):
        return place
    text = str(place)
    scheme = SCHEME.match(text)
    if scheme is None:
        return Path(place)
    return Path(text.removeprefix(scheme[0])) if scheme[1] == LOCAL else Url(text)


def is_url(text: str) -> bool:
    """Whether a text names a place as a URL does."""
    return SCHEME.match(text) is not None


def beside(root: Location, name: str) -> Location:
    """What a file in `root` means by `name`: relative to it, or a URL, or (locally) absolute.

    ValueError for a local file that is named by one at a URL: whoever may write there must not
    choose what is read here.
    """
    if isinstance(root, Path):
        return located(name) if is_url(name) else root / name
    found = located(name) if is_url(name) else root / name
    if isinstance(found, Path):
        raise ValueError(f"a file of this machine, {name}, is named by one at {root}")
    return found


def download(folder: Url, names: Iterable[str], directory: Path) -> None:
    """Copy objects below `folder`, as `files` names them, to the same names below `directory`."""

    def copy(name: str) -> None:
        aim = directory / name
        aim.parent.mkdir(parents=True, exist_ok=True)
        with _asking(folder / name):
            _filesystem(folder).get_file((folder / name).text, str(aim))

    _all(copy, names)


def upload(directory: Path, names: Iterable[str], folder: Url) -> None:
    """Copy files below `directory` to the same names below `folder`."""

    def copy(name: str) -> None:
        with _asking(folder / name):
            _filesystem(folder).put_file(str(directory / name), (folder / name).text)

    _all(copy, names)


def _all(copy: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(TRANSFERS, thread_name_prefix="transfer") as pool:
        for _ in pool.map(copy, names):
            pass


def _sound(name: str) -> bool:
    """Whether a part of an object's name can be one of a file's."""
    return name not in ("", ".", "..") and not UNPRINTED.search(name)


def _filesystem(url: Url) -> fsspec.AbstractFileSystem:
    try:
        return _connected(url.scheme, os.getpid())
    except ImportError as error:
        package = PACKAGES.get(url.scheme)
        advice = f"pip install {package}" if package else str(error)
        raise StorageError(f"{url}: the library for {url.scheme}:// is missing: {advice}") from None
    except ValueError:
        raise StorageError(f"{url}: no library knows {url.scheme}://") from None


@cache
def _connected(scheme: str, process: int) -> fsspec.AbstractFileSystem:
    """One for all threads; listings are not kept, as others write there too."""
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=True)


@contextmanager
def _asking(url: Url) -> Iterator[None]:
    """What a storage's library raises, in words that name the URL."""
    try:
        yield
    except StorageError:
        raise
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise FileNotFoundError(errno.ENOENT, "no such object", str(url)) from None
    except PermissionError as error:
        if CREDENTIALS.search(str(error)):
            raise StorageError(f"{url}: the credentials are not accepted: {_told(error)}") from None
        raise PermissionError(errno.EACCES, "access is refused", str(url)) from None
    except Exception as error:  # each library has its own
        reason = ": ".join(filter(None, (type(error).__name__, _told(error))))
        raise StorageError(f"{url}: the storage does not answer: {reason}") from error


def _told(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).splitlines() or [""])[0][:200]


class Positioned(io.RawIOBase):
    """A file of a known `size`, bytes, that is read from wherever one goes."""

    size: int

    def __init__(self) -> None:
        super().__init__()
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        # A broken header sends a library anywhere, and it takes no exception for an answer.
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        return self._position


class _Reading(Positioned):
    """An object as a file: blocks of it, asked for when they are needed, the last few kept."""

    def __init__(self, url: Url) -> None:
        super().__init__()
        self._url = url
        with _asking(url):
            self._store = _filesystem(url)
            try:
                about = self._store.info(url.text)
            except PermissionError:  # which does not say why, where reading it does
                self._store.cat_file(url.text, start=0, end=1)
                raise
            if about["type"] != "file":
                raise IsADirectoryError(url.text)
        size = about.get("size")
        self._known = None if size is None else int(size)
        self._block = lru_cache(BLOCKS)(self._fetch)

    def readinto(self, buffer: bytearray) -> int:
        view = memoryview(buffer).cast("B")
        if self._position >= self.size or not view:
            return 0
        number, start = divmod(self._position, BLOCK_BYTES)
        data = self._block(number)[start : start + len(view)]
        if not data:  # it has become shorter since it was asked about
            raise StorageError(f"{self._url}: changed while it was read")
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    @property
    def size(self) -> int:
        """Bytes; where the storage does not say, as many as there are."""
        if self._known is None:
            content = self._url.read_bytes()
            self._known, self._block = len(content), lambda number: content[number * BLOCK_BYTES :]
        return self._known

    def _fetch(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        with _asking(self._url):
            return self._store.cat_file(
                self._url.text, start=start, end=min(start + BLOCK_BYTES, self._known)
            )
