"""An adapter reads the windows that a row may see, in any order, and is silent until it learns."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from random_models import perturb

from mmrag.config import CrossAttention, LanguageModel
from mmrag.model.cross_attention import GATE_GAIN, Adapter, IdentityLinear, Memory, Windows
from mmrag.model.lm import LM
from mmrag.records import Passages
from mmrag.retrieval.window_cache import WindowCache

VOCABULARY, WIDTH, WINDOW = 23, 16, 4
WINDOWS, ROWS, TIME = 6, 3, 7
BLOCKS = {1: [0, 1, 2], 2: [1], 3: [2]}
"""`every` -> the layers, of three, that a block follows."""
FOREVER = 99


def shape(**changes):
    fields = {"width": WIDTH, "layers": 3, "heads": 4, "kv_heads": 2, "feed_forward": 24}
    return LanguageModel(**{**fields, "tied": False, **changes})


def settings(**changes):
    fields = {
        "every": 3,
        "heads": 2,
        "head_width": 8,
        "window": WINDOW,
        "encoder_layers": 2,
        "encoder_heads": 2,
        "encoder_feed_forward": 24,
    }
    return CrossAttention(**{**fields, **changes})


def enlarged(build, seed):
    """What `build` makes, with weights large enough for every one to matter, gates open."""
    torch.manual_seed(seed)
    return perturb(build()).eval().requires_grad_(False)


def random_lm(seed=0):
    return enlarged(lambda: LM(shape(), VOCABULARY), seed)


def random_adapter(seed=1, **changes):
    return enlarged(lambda: Adapter(settings(**changes), shape()), seed)


def shut(adapter):
    """The same adapter before its gates have learnt anything."""
    with torch.no_grad():
        for block in adapter.blocks:
            block.gate.weight.zero_()
    return adapter


def draw_ids(rows=ROWS, time=TIME, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, time), generator=generator)


def draw_windows(index=((0, 1, 2), (3, 4, -1), (5, 0, 3)), since=0, until=FOREVER, seed=0):
    """Six windows of one to four tokens; each row may read some of them."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.tensor(index)
    lengths = torch.tensor([4, 3, 1, 4, 2, 3])
    return Windows(
        tokens=torch.randint(0, VOCABULARY, (WINDOWS, WINDOW), generator=generator),
        present=torch.arange(WINDOW) < lengths[:, None],
        keys=torch.randn(WINDOWS, WINDOW, WIDTH, generator=generator),
        index=index,
        since=torch.full_like(index, since) if isinstance(since, int) else torch.tensor(since),
        until=torch.full_like(index, until) if isinstance(until, int) else torch.tensor(until),
    )


def memory_of(adapter, lm, windows, start=0, time=TIME):
    return adapter.memory(windows, lm.embedding, torch.full((len(windows.index),), start), time)


def logits(lm, ids, memory=None):
    """(B, T, V)."""
    return lm(ids, memory=memory).logits.unflatten(0, ids.shape)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("every", BLOCKS)
def test_an_untrained_adapter_leaves_the_model_as_it_is_bit_for_bit(every):
    lm, ids = random_lm(), draw_ids()
    plain = lm(ids)
    for adapter in (Adapter(settings(every=every), shape()), shut(random_adapter(every=every))):
        read = lm(ids, memory=memory_of(adapter, lm, draw_windows()))
        for name in ("logits", "keys", "states", "hidden"):
            assert torch.equal(getattr(read, name), getattr(plain, name))


@pytest.mark.parametrize("every", BLOCKS)
def test_an_open_gate_changes_every_position_that_sees_a_window(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    plain = logits(lm, ids)
    changed = (logits(lm, ids, memory_of(adapter, lm, draw_windows())) - plain).abs().amax(-1)
    assert (changed > 1e-3).all()


@pytest.mark.parametrize("every", BLOCKS)
def test_a_row_that_sees_no_window_is_the_plain_model_whatever_the_gates(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    for blind in (
        {"index": ((-1, -1, -1), (3, 4, -1), (5, 0, 3))},
        {"since": ((5, 5, 5), (0, 0, 0), (0, 0, 0)), "until": ((5, 4, 0), (9, 9, 9), (9, 9, 9))},
    ):
        read = logits(lm, ids, memory_of(adapter, lm, draw_windows(**blind)))
        plain = logits(lm, ids)
        assert torch.equal(read[0], plain[0])
        assert not torch.equal(read[1:], plain[1:])


@pytest.mark.parametrize("every", BLOCKS)
def test_a_memory_is_read_after_every_nth_layer(every):
    lm, adapter = random_lm(), random_adapter(every=every)
    assert adapter.layers == BLOCKS[every]
    assert len(adapter.blocks) == len(BLOCKS[every])
    read = lm(draw_ids(), memory=memory_of(adapter, lm, draw_windows()))
    assert read.attention.shape == (len(BLOCKS[every]), ROWS, TIME, 3 * WINDOW)
    assert lm(draw_ids()).attention is None


@pytest.mark.parametrize("every", BLOCKS)
def test_each_block_is_what_it_is_by_hand(every):
    """Softmax over one null score and the visible tokens, head by head in float64."""
    lm, adapter = random_lm(), random_adapter(every=every)
    windows = draw_windows(since=((0, 2, 1), (0, 3, 0), (4, 0, 0)))
    memory = memory_of(adapter, lm, windows)
    torch.manual_seed(5)
    x, key = torch.randn(2, ROWS, TIME, WIDTH)
    encoded = [
        adapter.encoder(lm.embedding(windows.tokens), windows.keys, windows.present)[n]
        for n in (0, 1)
    ]
    for layer, block in zip(BLOCKS[every], adapter.blocks, strict=True):
        got, attention = memory.read(layer, x, key)
        for row in range(ROWS):
            for time in range(TIME):
                seen = [
                    (column * WINDOW + place, int(window), place)
                    for column, window in enumerate(windows.index[row])
                    if window >= 0 and windows.since[row, column] <= time
                    for place in range(WINDOW)
                    if windows.present[window, place]
                ]
                mixed, shares = [], torch.zeros(3 * WINDOW, dtype=torch.float64)
                for head in range(2):
                    cut = slice(head * 8, head * 8 + 8)
                    q = block.match(key[row, time])[cut].double()
                    keys = [block.null.weight[0, cut].double()]
                    keys += [block.match(encoded[0][w, p])[cut].double() for _, w, p in seen]
                    values = [block.value(encoded[1][w, p])[cut].double() for _, w, p in seen]
                    shared = torch.tensor([float(q @ k) / math.sqrt(8) for k in keys]).softmax(0)
                    mixed.append(sum((s * v for s, v in zip(shared[1:], values, strict=True)), 0))
                    for share, (column, *_) in zip(shared[1:], seen, strict=True):
                        shares[column] += share / 2
                said = block.out(torch.cat(mixed).float())
                gate = math.tanh(GATE_GAIN * float(block.gate.weight))
                close(got[row, time], x[row, time] + gate * said)
                close(attention[row, time].double(), shares)


@pytest.mark.parametrize("every", BLOCKS)
def test_neighbours_in_another_order_say_the_same(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    since, until = ((0, 2, 1), (0, 3, 0), (4, 0, 0)), ((9, 9, 3), (2, 9, 0), (9, 9, 9))
    windows = draw_windows(since=since, until=until)
    expected = logits(lm, ids, memory_of(adapter, lm, windows))
    for order in ([2, 0, 1], [1, 0, 2], [2, 1, 0]):
        turned = replace(
            windows, **{n: getattr(windows, n)[:, order] for n in ("index", "since", "until")}
        )
        close(logits(lm, ids, memory_of(adapter, lm, turned)), expected)


def test_windows_in_another_order_and_windows_that_no_row_reads_make_no_difference():
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=1)
    windows, moved = draw_windows(index=((0, 1, 3), (3, 4, -1), (5, 0, 3))), [3, 5, 0, 4, 1]
    other = replace(
        windows,
        **{n: getattr(windows, n)[moved] for n in ("tokens", "present", "keys")},
        index=torch.tensor([[moved.index(i) if i >= 0 else -1 for i in r] for r in windows.index]),
    )
    expected = logits(lm, ids, memory_of(adapter, lm, windows))
    close(logits(lm, ids, memory_of(adapter, lm, other)), expected)


@pytest.mark.parametrize("every", BLOCKS)
def test_what_is_padding_changes_nothing(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    windows = draw_windows()
    expected = logits(lm, ids, memory_of(adapter, lm, windows))
    columns = torch.full((ROWS, 2), -1)
    masked = {
        "tokens of a short window": replace(
            windows,
            tokens=windows.tokens.where(windows.present, 7),
            keys=windows.keys.where(windows.present[..., None], 50.0),
        ),
        "windows that are none": replace(
            windows,
            index=torch.cat((windows.index, columns), 1),
            since=torch.cat((windows.since, columns), 1),
            until=torch.cat((windows.until, columns), 1),
        ),
        "a window without a token": replace(
            windows,
            tokens=torch.cat((windows.tokens, windows.tokens[:1])),
            present=torch.cat((windows.present, torch.zeros(1, WINDOW, dtype=torch.bool))),
            keys=torch.cat((windows.keys, windows.keys[:1])),
            index=torch.cat((windows.index, columns[:, :1] + WINDOWS + 1), 1),
            since=torch.cat((windows.since, columns[:, :1]), 1),
            until=torch.cat((windows.until, columns[:, :1] + FOREVER), 1),
        ),
    }
    for what, padded in masked.items():
        got = logits(lm, ids, memory_of(adapter, lm, padded))
        assert got.isfinite().all(), what
        close(got, expected)


def test_a_window_is_seen_since_its_first_position_until_its_last():
    """Positions count from where the transcript starts in what is read."""
    lm, ids, adapter, start = random_lm(), draw_ids(), random_adapter(), 2
    since, until = [[1, 0, 3]] * ROWS, [[3, 2, FOREVER]] * ROWS
    windows = draw_windows(index=[[0, 1, 3]] * ROWS, since=since, until=until)
    memory = memory_of(adapter, lm, windows, start, time=TIME - start)
    read = lm(ids, memory=memory)
    [attention] = read.attention.unflatten(-1, (3, WINDOW)).sum(-1)
    for row in range(ROWS):
        for time in range(TIME - start):
            for column in range(3):
                seen = since[row][column] <= time < until[row][column]
                assert (attention[row, time, column] > 0) == seen
    assert torch.equal(logits(lm, ids, memory)[:, :start], logits(lm, ids)[:, :start])
    assert memory.visible.any(-1)[0].all(), "every later position sees something"
    assert (logits(lm, ids, memory)[:, start:] != logits(lm, ids)[:, start:]).any(-1).all()


def test_each_row_starts_where_its_own_transcript_does():
    lm, adapter, time = random_lm(), random_adapter(every=1), 3
    ids, windows = draw_ids(), draw_windows(since=((0, 1, 2), (1, 0, 0), (0, 2, 0)))
    starts = torch.tensor([1, 4, 2])
    together = logits(lm, ids, adapter.memory(windows, lm.embedding, starts, time))
    for row, start in enumerate(starts.tolist()):
        own = replace(
            windows, **{n: getattr(windows, n)[[row]] for n in ("index", "since", "until")}
        )
        memory = adapter.memory(own, lm.embedding, starts[[row]], time)
        close(together[[row]], logits(lm, ids[[row]], memory))
        assert torch.equal(together[row, :start], logits(lm, ids)[row, :start])
        assert not torch.equal(together[row, start], logits(lm, ids)[row, start])


def test_positions_past_the_end_of_what_is_read_change_nothing():
    """A micro-batch's longest transcript may reach past the end of another row."""
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=1)
    exact = memory_of(adapter, lm, draw_windows(), start=TIME - 2, time=2)
    longer = memory_of(adapter, lm, draw_windows(), start=TIME - 2, time=5)
    expected = logits(lm, ids, exact)
    close(logits(lm, ids, longer), expected)
    assert not torch.equal(expected, logits(lm, ids))


@pytest.mark.parametrize("every", BLOCKS)
def test_reading_through_a_cache_is_reading_at_once(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    start = 2
    memory = memory_of(adapter, lm, draw_windows(), start, time=TIME - start)
    whole = lm(ids, memory=memory)
    cache = lm.cache([None] * ROWS, TIME)
    last = torch.full((ROWS,), start)
    outputs = [lm(ids[:, : start + 1], cache, memory=memory.at(last))]
    for place in range(start + 1, TIME):
        step = memory.at(torch.zeros_like(last))
        outputs.append(lm(ids[:, place : place + 1], cache, memory=step))
    for name in ("keys", "states", "hidden"):
        close(torch.cat([getattr(one, name) for one in outputs], 1), getattr(whole, name))
    parts = [o.logits.unflatten(0, (ROWS, -1)) for o in outputs]
    close(torch.cat(parts, 1), whole.logits.unflatten(0, (ROWS, TIME)))
    close(torch.cat([one.attention for one in outputs], 2), whole.attention)


@pytest.mark.parametrize("every", BLOCKS)
def test_attention_sums_to_one_with_what_goes_to_the_vector_that_says_nothing(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    windows = draw_windows()
    attention = lm(ids, memory=memory_of(adapter, lm, windows)).attention
    total = attention.sum(-1)
    assert (attention >= 0).all() and (total > 0).all() and (total < 1 + 1e-6).all()
    present = windows.present[windows.index.clamp(min=0)] & (windows.index >= 0)[..., None]
    assert not attention.masked_fill(present.flatten(1)[None, :, None], 0).any()
    with torch.no_grad():
        for block in adapter.blocks:
            block.null.weight.fill_(0)
            block.match.weight.fill_(0)
    even = lm(ids, memory=memory_of(adapter, lm, windows)).attention
    counts = present.sum((1, 2))
    close(even.sum(-1), (counts / (counts + 1))[None, :, None].expand_as(total))


def test_rows_of_a_memory_are_selected_and_may_repeat():
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=1)
    windows = draw_windows(since=((0, 2, 1), (0, 3, 0), (4, 0, 0)))
    starts = torch.tensor([0, 3, 1])
    memory = adapter.memory(windows, lm.embedding, starts, TIME)
    rows = torch.tensor([2, 0, 2, 1])
    whole = logits(lm, ids, memory)
    close(logits(lm, ids[rows], memory.select(rows)), whole[rows])


def test_windows_move_as_a_whole():
    moved = draw_windows().to(torch.device("meta"))
    assert {getattr(moved, name).device.type for name in moved.__dataclass_fields__} == {"meta"}


class Shelf:
    """The windows of a batch by their number, as a datastore would hand them out."""

    def __init__(self, windows):
        self.windows = windows

    def passages(self, entries):
        own = self.windows
        tokens = own.tokens[entries].numpy().astype(np.int32)
        return Passages(tokens, own.keys[entries].numpy(), own.present[entries].numpy())


@pytest.mark.parametrize("every", BLOCKS)
def test_what_is_read_while_training_is_what_is_read_while_transcribing(every):
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter(every=every)
    windows = draw_windows()
    taught = memory_of(adapter, lm, windows)
    cache = WindowCache(adapter, lm, Shelf(windows))
    rows = [np.array([e for e in row if e >= 0]) for row in windows.index.tolist()]
    encoded, numbers = cache.gather(rows)
    assert numbers[0].tolist() == [0] * 4 + [1] * 3 + [2] + [-1] * 3
    assert numbers[1].tolist() == [0] * 4 + [1] * 2 + [-1] * 5
    assert numbers[2].tolist() == [0] * 3 + [1] * 4 + [2] * 4
    packed = Memory(
        adapter,
        encoded.transpose(1, 2),
        (numbers >= 0)[:, None].expand(-1, TIME, -1),
        taught.start,
    )
    one, other = lm(ids, memory=taught), lm(ids, memory=packed)
    close(one.logits, other.logits)
    shares = one.attention.unflatten(-1, (3, WINDOW)).sum(-1)
    summed = torch.zeros_like(shares).scatter_add_(
        -1, numbers.clamp(min=0)[None, :, None].expand_as(other.attention), other.attention
    )
    close(shares, summed)


def test_a_map_starts_as_a_multiple_of_the_identity():
    torch.testing.assert_close(IdentityLinear(4, 6, 2.0).weight, 2 * torch.eye(6, 4))
    assert IdentityLinear(4, 4).bias is None
    block = Adapter(settings(), shape()).blocks[0]
    key = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block.match(key), 2 * key), "one projection is for queries and keys"
    assert torch.equal(block.out(block.value(key)), key)


def test_a_gate_that_opens_a_little_passes_more_than_that():
    gate = Adapter(settings(), shape()).blocks[0].gate
    x = torch.ones(3)
    assert not gate(x).any()
    with torch.no_grad():
        gate.weight.fill_(0.01)
    torch.testing.assert_close(gate(x), torch.full((3,), math.tanh(0.01 * GATE_GAIN)))
    assert gate(x.bfloat16()).dtype == torch.bfloat16


def test_the_order_of_a_windows_tokens_and_their_keys_matter():
    lm, ids, adapter = random_lm(), draw_ids(), random_adapter()
    windows = draw_windows()
    expected = logits(lm, ids, memory_of(adapter, lm, windows))
    for changed in (
        replace(windows, tokens=windows.tokens.flip(1), keys=windows.keys.flip(1)),
        replace(windows, keys=windows.keys.flip(1)),
        replace(windows, tokens=(windows.tokens + 1) % VOCABULARY),
    ):
        got = logits(lm, ids, memory_of(adapter, lm, changed))
        assert (got - expected).abs().max() > 1e-2


def test_a_window_is_encoded_without_regard_to_those_beside_it():
    lm, adapter, windows = random_lm(), random_adapter(every=1), draw_windows()
    embedded = lm.embedding(windows.tokens)
    together = adapter.encode(embedded, windows.keys, windows.present)
    assert together.shape == (WINDOWS, 3, 2, 2, WINDOW, 8)
    for number, length in enumerate(windows.present.sum(1).tolist()):
        alone = adapter.encode(
            embedded[[number], :length],
            windows.keys[[number], :length],
            torch.ones(1, length, dtype=torch.bool),
        )
        close(together[[number], ..., :length, :], alone)


def test_a_model_of_half_precision_reads_keys_of_any():
    lm, adapter = random_lm().bfloat16(), random_adapter(every=1).bfloat16()
    windows = replace(draw_windows(), keys=draw_windows().keys.half())
    read = lm(draw_ids(), memory=memory_of(adapter, lm, windows))
    assert read.states.dtype == torch.bfloat16
    exact = random_lm()(
        draw_ids(), memory=memory_of(random_adapter(every=1), random_lm(), draw_windows())
    )
    correlation = torch.corrcoef(torch.stack((read.logits.flatten(), exact.logits.flatten())))
    assert correlation[0, 1] > 0.95
