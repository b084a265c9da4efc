"""The keys and values of the tokens read so far, in pages that rows refer to and never move.

One pool is allocated once. A row is a table of pages (PagedAttention, arXiv 2309.06180): a token is
written where its row stands, and nothing that was written is copied when rows join, leave or
change places. A row that is chosen twice shares its full pages and copies the one being written.
The tables are the host's; a step's indices go to the device together. Knows no layers but their
number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

PAGE = 16
"""Tokens in a page."""
SPARE = 0
"""The page that nobody owns: a place in a table that is not used."""


class OutOfPages(RuntimeError):
    """A pool has fewer free pages than its rows are about to fill."""


class PagePool:
    """Pages of keys and values for all rows of an engine, or for one batch."""

    def __init__(
        self,
        layers: int,
        heads: int,
        width: int,
        tokens: int,
        like: Tensor,
        growing: bool = False,
    ) -> None:
        """Room for `tokens`, in `heads` of `width` each, on the device and in the format of `like`.

        A `growing` one is enlarged, and copied, where it would be out of pages.
        """
        pages = self.pages_for(tokens) + 1
        shape = (pages, heads, PAGE, width)
        self.layers = [(like.new_zeros(shape), like.new_zeros(shape)) for _ in range(layers)]
        """Keys and values (P, H, PAGE, width) of each layer, apart: a compiled layer that writes
        into views of one tensor would be handed all of it."""
        self.device = like.device
        self.copied_bytes = 0
        """What rows that were chosen twice have cost, so far."""
        self._growing = growing
        self._owners = np.zeros(pages, np.int32)
        self._owners[SPARE] = 1
        self._free = np.arange(pages - 1, SPARE, -1)
        """A stack; its last `free` are next."""
        self.free = pages - 1
        """Pages that nobody owns."""

    @property
    def pages(self) -> int:
        """All of them that rows may own."""
        return len(self._owners) - 1

    @staticmethod
    def pages_for(tokens: int) -> int:
        """Pages that so many tokens of one row take."""
        return -(-tokens // PAGE)

    def take(self, count: int) -> np.ndarray:
        """So many pages (count,), owned once; OutOfPages if there are fewer."""
        if count > self.free:
            if not self._growing:
                raise OutOfPages(f"{count} pages of {PAGE} tokens needed, {self.free} are free")
            self._grow(max(count - self.free, self.pages))
        self.free -= count
        taken = self._free[self.free : self.free + count].copy()
        self._owners[taken] = 1
        return taken

    def share(self, pages: np.ndarray) -> None:
        """Each of `pages`, which may repeat, has one owner more."""
        np.add.at(self._owners, pages, 1)

    def give_back(self, pages: np.ndarray) -> None:
        """Each of `pages`, which may repeat, has one owner less; one without any is free."""
        np.subtract.at(self._owners, pages, 1)
        freed = np.unique(pages)
        freed = freed[self._owners[freed] == 0]
        self._free[self.free : self.free + len(freed)] = freed
        self.free += len(freed)

    def copy(self, sources: np.ndarray) -> np.ndarray:
        """New pages with what `sources` (N,) hold."""
        taken = self.take(len(sources))
        old, new = torch.from_numpy(np.stack((sources, taken))).to(self.device)
        for kept in itertools.chain(*self.layers):
            kept[new] = kept[old]
            self.copied_bytes += len(taken) * kept[0].nbytes
        return taken

    def _grow(self, pages: int) -> None:
        before = len(self._owners)
        self.layers = [
            tuple(torch.cat((kept, kept.new_zeros(pages, *kept.shape[1:]))) for kept in layer)
            for layer in self.layers
        ]
        self._owners = np.concatenate((self._owners, np.zeros(pages, np.int32)))
        grown = np.empty(len(self._owners), self._free.dtype)
        grown[: self.free] = self._free[: self.free]
        grown[self.free : self.free + pages] = np.arange(before + pages - 1, before - 1, -1)
        self._free, self.free = grown, self.free + pages


@dataclass(frozen=True)
class StepPlan:
    """Where a step of one token a row writes and reads: R rows, N pages that they hold together."""

    positions: Tensor
    """(R,) of the tokens."""
    written: Tensor
    """(2, R) the page and the place in it that a token goes to."""
    read: Tensor
    """(3, N) pages, the row that reads each, and how many tokens of it there are."""
    parts: Tensor
    """(R, most) a row's places among the N; those of another row behind its last."""
    present: Tensor
    """(R, most) bool: which of `parts` are its own."""


@dataclass(frozen=True)
class ReadPlan:
    """Where up to T tokens a row are written, and what they attend to."""

    positions: Tensor
    """(B, T) of the tokens."""
    written: Tensor
    """(3, M) of the M tokens that are no padding: the page, the place in it, and their number among
    the B x T."""
    tables: Tensor | None
    """(B, n) the rows' pages; None where no row had read anything before."""
    mask: Tensor | None
    """(B, 1, T, n x PAGE) bool: which of the pages' tokens each sees; None likewise."""

    def packed(self, x: Tensor) -> Tensor:
        """x (B, T, ...) without its padding: (M, ...)."""
        return x.flatten(0, 1)[self.written[2]]

    def padded(self, x: Tensor) -> Tensor:
        """x (M, ...) with zeros where there is padding: (B, T, ...)."""
        if len(x) == self.positions.numel():
            return x.unflatten(0, self.positions.shape)
        whole = x.new_zeros(self.positions.numel(), *x.shape[1:])
        return whole.index_copy(0, self.written[2], x).unflatten(0, self.positions.shape)


class PagedCache:
    """Keys and values of B independent rows: what `DecoderCache` asks for."""

    def __init__(self, pool: PagePool, rows: int, capacity: int) -> None:
        """Rows that have read nothing, of at most `capacity` tokens each."""
        self.pool = pool
        self.capacity = capacity
        self.tables = np.full((rows, 1), SPARE)
        self.read = np.zeros(rows, np.int64)
        """Tokens that each row has read."""

    @property
    def lengths(self) -> Tensor:
        """(B,) tokens read, on the host."""
        return torch.from_numpy(self.read)

    def select(self, rows: Tensor | Sequence[int]) -> PagedCache:
        """The cache of `rows` (R,), which may repeat; this one's rows end here."""
        chosen = np.asarray(rows, np.int64)
        tables, read = self.tables[chosen], self.read[chosen]
        self.pool.share(tables[tables != SPARE])
        twice = np.ones(len(chosen), bool)
        twice[np.unique(chosen, return_index=True)[1]] = False
        begun = np.flatnonzero(twice & (read % PAGE > 0))
        if len(begun):
            last = read[begun] // PAGE
            sources = tables[begun, last]
            tables[begun, last] = self.pool.copy(sources)
            self.pool.give_back(sources)
        self.release()
        return self._of(tables, read)

    def join(self, other: PagedCache) -> PagedCache:
        """The rows of both, which end here; ValueError unless they are of one pool."""
        if other.pool is not self.pool:
            raise ValueError("rows of two pools")
        width = max(self.tables.shape[1], other.tables.shape[1])
        tables = np.concatenate((_widened(self.tables, width), _widened(other.tables, width)))
        read = np.concatenate((self.read, other.read))
        self.capacity = max(self.capacity, other.capacity)
        both = self._of(tables, read)
        for one in (self, other):
            one._forget()
        return both

    def release(self) -> None:
        """Give all pages back: the rows end."""
        self.pool.give_back(self.tables[self.tables != SPARE])
        self._forget()

    def step(self) -> StepPlan:
        """Make room for one token a row, and move on."""
        positions = self.read
        self._reserve(positions + 1)
        rows = np.arange(len(positions))
        held = self.read // PAGE + 1
        first = held.cumsum() - held
        owners = np.repeat(rows, held)
        inside = np.arange(len(owners)) - first[owners]
        pages = self.tables[owners, inside]
        counts = np.minimum(positions[owners] + 1 - inside * PAGE, PAGE)
        most = max(2, int(held.max()))  # 0 and 1 would be shapes of their own to a compiler
        numbers = np.arange(most)
        present = numbers < held[:, None]
        parts = np.where(present, first[:, None] + numbers, 0)
        written = np.stack((self.tables[rows, positions // PAGE], positions % PAGE))
        read = np.stack((pages, owners, counts))
        if read.shape[1] < 2:
            read = np.concatenate((read, np.array([[SPARE], [0], [0]])), 1)
        device = self.pool.device
        moved = _together(device, positions, written, read, parts, present)
        self.read = positions + 1
        return StepPlan(*moved[:4], moved[4].bool())

    def plan(self, time: int, lengths: Tensor | Sequence[int] | None = None) -> ReadPlan:
        """Make room for `time` tokens a row, the last of them padding where `lengths` (B,) says so,
        and move on."""
        start = self.read
        if isinstance(lengths, Tensor):
            lengths = lengths.tolist()
        new = np.full(len(start), time) if lengths is None else np.asarray(lengths, np.int64)
        self._reserve(start + new)
        at = np.arange(time)
        positions = start[:, None] + at
        source = np.flatnonzero(at < new[:, None])
        row, own = source // time, positions.reshape(-1)[source]
        written = np.stack((self.tables[row, own // PAGE], own % PAGE, source))
        self.read = start + new
        if not start.any():
            moved = _together(self.pool.device, positions, written)
            return ReadPlan(*moved, None, None)
        seen = np.arange(self.tables.shape[1] * PAGE)
        device = self.pool.device
        moved = _together(device, positions, written, self.tables)
        mask = torch.from_numpy(seen).to(device) <= moved[0][..., None]
        return ReadPlan(*moved, mask[:, None])

    def _reserve(self, lengths: np.ndarray) -> None:
        """Pages for rows of `lengths` (B,); ValueError for one beyond the capacity."""
        if len(lengths) and lengths.max() > self.capacity:
            raise ValueError(f"{lengths.max()} tokens in a cache of {self.capacity}")
        held, wanted = -(-self.read // PAGE), -(-lengths // PAGE)
        more = wanted - held
        total = int(more.sum())
        if not total:
            return
        self.tables = _widened(self.tables, int(wanted.max()))
        rows = np.repeat(np.arange(len(more)), more)
        inside = np.arange(total) - (more.cumsum() - more)[rows]
        self.tables[rows, held[rows] + inside] = self.pool.take(total)

    def _of(self, tables: np.ndarray, read: np.ndarray) -> PagedCache:
        made = PagedCache(self.pool, 0, self.capacity)
        made.tables, made.read = tables, read
        return made

    def _forget(self) -> None:
        self.tables, self.read = self.tables[:0], self.read[:0]


def write(pages: tuple[Tensor, Tensor], written: Tensor, keys: Tensor, values: Tensor) -> None:
    """Put the keys and values (M, H, width) of M tokens where `written` (2, M) says, in a layer's
    `pages` (P, H, PAGE, width) of both."""
    torch.ops.mmrag.write_pages(*pages, written, keys, values)


def _write_pages(
    kept_keys: Tensor, kept_values: Tensor, written: Tensor, keys: Tensor, values: Tensor
) -> None:
    for kept, new in ((kept_keys, keys), (kept_values, values)):
        kept.transpose(1, 2).index_put_((written[0], written[1]), new.to(kept.dtype))


_OPERATORS = torch.library.Library("mmrag", "FRAGMENT")
# An operator of its own: a compiler would turn an assignment in place into a copy of all pages.
_OPERATORS.define(
    "write_pages(Tensor(a!) kept_keys, Tensor(b!) kept_values, Tensor written, Tensor keys, "
    "Tensor values) -> ()"
)
for _device in ("CPU", "CUDA"):
    _OPERATORS.impl("write_pages", _write_pages, _device)
torch.library.register_fake("mmrag::write_pages", lambda *_: None, lib=_OPERATORS)


def attend_step(pages: tuple[Tensor, Tensor], queries: Tensor, plan: StepPlan) -> Tensor:
    """What one query a row (R, Q, width) reads in its own pages of a layer: (R, Q, width).

    Each page is read by itself, and what they say is weighed together (as in Flash-Decoding), so
    that a short row beside a long one costs no more than its own pages. To be compiled: the choice
    of the pages is then fused into the sums, and nothing is gathered. Q is a multiple of the heads.
    """
    read, owners, counts = plan.read.unbind()
    keys, values = (kept[read].float() for kept in pages)
    grouped = queries.float().unflatten(1, (keys.shape[1], -1))[owners]  # (N, H, G, width)
    scores = (grouped[:, :, :, None] * keys[:, :, None]).sum(-1) / queries.shape[-1] ** 0.5
    inside = torch.arange(PAGE, device=counts.device) < counts[:, None]
    scores = scores.masked_fill(~inside[:, None, None], -torch.inf)
    largest = scores.amax(-1)
    weights = (scores - largest[..., None]).exp()
    mixed = (weights[..., None] * values[:, :, None]).sum(-2)
    own = largest[plan.parts].masked_fill(~plan.present[..., None, None], -torch.inf)
    share = (own - own.amax(1, keepdim=True)).exp()
    total = (share * weights.sum(-1)[plan.parts]).sum(1)
    together = (share[..., None] * mixed[plan.parts]).sum(1) / total[..., None]
    return together.flatten(1, 2).to(queries.dtype)


def attend(pages: tuple[Tensor, Tensor], queries: Tensor, tables: Tensor, mask: Tensor) -> Tensor:
    """What queries (B, Q, T, width) read in their rows' pages (B, n) where `mask` says so, gathered
    first: for a chunk of a prompt, and for steps where nothing is compiled."""
    keys, values = (kept[tables].transpose(1, 2).flatten(2, 3).to(queries.dtype) for kept in pages)
    grouped = keys.shape[1] != queries.shape[1]
    return functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, enable_gqa=grouped
    )


def attend_causally(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    pages: tuple[Tensor, Tensor] | None,
    plan: ReadPlan | None,
) -> Tensor:
    """Write the keys and values (B, H, T, width) of T new tokens where `plan` says, if there is
    one; what their queries (B, Q, T, width) read there and among themselves."""
    if plan is not None:
        new = (one.transpose(1, 2).flatten(0, 1)[plan.written[2]] for one in (keys, values))
        write(pages, plan.written[:2], *new)
    if plan is not None and plan.tables is not None:
        return attend(pages, queries, plan.tables, plan.mask)
    grouped = keys.shape[1] != queries.shape[1]
    return functional.scaled_dot_product_attention(
        queries, keys, values, is_causal=True, enable_gqa=grouped
    )


def _widened(tables: np.ndarray, width: int) -> np.ndarray:
    missing = width - tables.shape[1]
    return np.pad(tables, ((0, 0), (0, missing)), constant_values=SPARE) if missing > 0 else tables


def _together(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Arrays of integers on a device, in one transfer."""
    flat = np.concatenate([one.reshape(-1).astype(np.int64) for one in arrays])
    moved = torch.from_numpy(flat).to(device)
    parts = moved.split([one.size for one in arrays])
    return [part.view(one.shape) for part, one in zip(parts, arrays, strict=True)]
