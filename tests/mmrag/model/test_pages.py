import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import LanguageModel
from mmrag.model.lm import LM, Block
from mmrag.model.pages import PAGE, OutOfPages, PagedCache, PagePool

VOCABULARY = 30


def random_lm(**changes):
    fields = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward": 24}
    torch.manual_seed(0)
    lm = LM(LanguageModel(**fields, tied=False, **changes), VOCABULARY).eval()
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.copy_(torch.randn_like(parameter) / 3)
    return lm


def ids_of(rng, count):
    return rng.integers(0, VOCABULARY, count).tolist()


def padded(rows):
    width = max(len(row) for row in rows)
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=3e-5, rtol=1e-4)


def everything_is_free(pool):
    return pool.free == pool.pages and sorted(pool._free[: pool.free]) == list(
        range(1, pool.pages + 1)
    )


@pytest.mark.parametrize("stepped", [False, True])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_rows_that_join_leave_and_repeat_read_as_if_alone(stepped, seed):
    """Arrivals, beams and departures at random, in a pool with little to spare."""
    rng, lm = np.random.default_rng(seed), random_lm()
    lm.block_step = Block.step if stepped else None
    pool = lm.pool(40 * PAGE)
    cache, texts = lm.cache([], 6 * PAGE, pool), []
    for _ in range(8):
        if rng.random() < 0.5 and len(texts) < 4:
            new = [ids_of(rng, rng.integers(1, 3 * PAGE)) for _ in range(rng.integers(1, 3))]
            fresh = lm.cache([None] * len(new), 6 * PAGE, pool)
            cut = [int(rng.integers(0, len(text) + 1)) for text in new]  # read in two chunks
            for start, stop in zip(([0] * len(new), cut), (cut, map(len, new)), strict=True):
                parts = [t[a:b] for t, a, b in zip(new, start, stop, strict=True)]
                if any(parts):
                    lm(padded(parts), fresh, torch.tensor([len(part) for part in parts]))
            cache, texts = cache.join(fresh), texts + new
        if texts and rng.random() < 0.7:
            rows = rng.integers(0, len(texts), rng.integers(1, 5)).tolist()
            cache, texts = cache.select(rows), [list(texts[row]) for row in rows]
        if texts:
            chosen = ids_of(rng, len(texts))
            output = lm(torch.tensor(chosen)[:, None], cache)
            texts = [[*text, token] for text, token in zip(texts, chosen, strict=True)]
            for row, text in enumerate(texts):
                alone = lm(torch.tensor([text]))
                close(output.logits[row], alone.logits[-1])
                close(output.keys[row, -1], alone.keys[0, -1])
                close(output.states[row, -1], alone.states[0, -1])
    assert cache.lengths.tolist() == [len(text) for text in texts]
    cache.release()
    assert everything_is_free(pool)


@pytest.mark.parametrize("prompt", [PAGE + 3, 20 * PAGE + 3])
def test_bytes_copied_do_not_depend_on_the_prompt(prompt):
    lm = random_lm()
    cache = lm.cache([None], prompt + 4)
    lm(torch.zeros(1, prompt, dtype=torch.long), cache)
    page = 2 * 2 * 2 * PAGE * 4 * 4  # layers, keys and values, heads, tokens, width, bytes
    beams = cache.select([0, 0, 0, 0])
    assert beams.pool.copied_bytes == 3 * page
    lm(torch.zeros(4, 1, dtype=torch.long), beams)
    moved = beams.select([3, 2, 1, 0])
    kept = moved.select([0, 1])
    both = kept.join(lm.cache([None], prompt, kept.pool))
    assert both.pool.copied_bytes == 3 * page, "changing places, leaving and joining copy nothing"


def test_a_full_page_is_shared_without_a_copy():
    lm = random_lm()
    cache = lm.cache([None], 4 * PAGE)
    lm(torch.zeros(1, 2 * PAGE, dtype=torch.long), cache)
    used = cache.pool.pages - cache.pool.free
    beams = cache.select([0, 0, 0])
    assert (beams.pool.copied_bytes, beams.pool.pages - beams.pool.free) == (0, used)


def test_a_pool_without_enough_pages_says_so_and_keeps_what_it_has():
    lm = random_lm()
    pool = lm.pool(2 * PAGE)
    cache = lm.cache([None, None], 3 * PAGE, pool)
    lm(torch.zeros(2, PAGE, dtype=torch.long), cache)
    with pytest.raises(OutOfPages, match="2 pages of 16 tokens needed, 0 are free"):
        lm(torch.zeros(2, 1, dtype=torch.long), cache)
    assert cache.lengths.tolist() == [PAGE, PAGE]
    cache = cache.select([1])
    assert pool.free == 1
    lm(torch.zeros(1, 1, dtype=torch.long), cache)


def test_a_growing_pool_keeps_what_was_written():
    lm, rng = random_lm(), np.random.default_rng(0)
    ids = torch.tensor([ids_of(rng, 3 * PAGE)])
    cache = lm.cache([None], 3 * PAGE, lm.pool(PAGE, growing=True))
    parts = [lm(part, cache).logits for part in ids.split(7, 1)]
    close(torch.cat(parts), lm(ids).logits)
    assert cache.pool.pages >= 3


def test_rows_of_two_pools_do_not_join():
    lm = random_lm()
    with pytest.raises(ValueError, match="two pools"):
        lm.cache([None], 4).join(lm.cache([None], 4))


def test_pages_have_the_dtype_of_the_weights():
    pool = random_lm().bfloat16().pool(5)
    assert {kept.dtype for layer in pool.layers for kept in layer} == {torch.bfloat16}
    assert pool.pages == 1


def test_what_a_step_reads_grows_by_pages_and_not_by_the_longest_row():
    pool = PagePool(1, 1, 4, 100 * PAGE, torch.zeros(1))
    cache = PagedCache(pool, 3, 40 * PAGE)
    cache.plan(30 * PAGE, [30 * PAGE, 1, PAGE])
    plan = cache.step()
    assert plan.read.shape == (3, 31 + 1 + 2)
    assert plan.read[2].sum() == 30 * PAGE + 1 + 2 + PAGE + 1
    assert plan.present.sum(1).tolist() == [31, 1, 2]


def test_padding_is_not_computed():
    """Of prompts of different length, maps see the tokens alone."""
    lm, seen = random_lm(), []
    hook = lm.blocks[0].feed_forward.register_forward_hook(lambda _, x, __: seen.append(x[0].shape))
    cache = lm.cache([None] * 3, 40)
    lm(torch.zeros(3, 30, dtype=torch.long), cache, torch.tensor([30, 2, 7]))
    hook.remove()
    assert seen == [(39, 16)]
