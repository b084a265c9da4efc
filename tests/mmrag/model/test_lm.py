import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import perturb
from torch.nn import functional

from mmrag.config import LanguageModel
from mmrag.model.lm import LM, parameter_count

VOCABULARY = 23


def shape(**changes):
    fields = {
        "width": 16,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "feed_forward": 24,
        "tied": False,
        "rope_theta": 100.0,
    }
    return LanguageModel(**{**fields, **changes})


def random_lm(seed=0, **changes):
    """A model whose weights are large enough for every one of them to matter."""
    torch.manual_seed(seed)
    lm = LM(shape(**changes), VOCABULARY)
    return perturb(lm).eval().requires_grad_(False)


def draw_ids(rows, time, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (rows, time), generator=generator)


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def cached(lm, ids, chunks, capacity=None):
    """Logits (T, V), keys and hidden (T, D) of one row, read in chunks of these sizes."""
    cache = lm.cache([None] * 1, capacity or len(ids))
    outputs, start = [], 0
    for size in chunks:
        outputs.append(lm(ids[None, start : start + size], cache))
        start += size
    assert cache.lengths.tolist() == [len(ids)]
    logits = torch.cat([output.logits for output in outputs])
    return (logits, *(torch.cat([getattr(o, n)[0] for o in outputs]) for n in ("keys", "hidden")))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.booleans())
def test_reading_through_a_cache_in_any_chunks_is_reading_at_once(chunks, biased):
    lm = random_lm(qkv_bias=biased)
    ids = draw_ids(1, sum(chunks))
    whole = lm(ids)
    for got, expected in zip(
        cached(lm, ids[0], chunks, capacity=40),
        (whole.logits, whole.keys[0], whole.hidden[0]),
        strict=True,
    ):
        close(got, expected)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_reading_token_by_token_is_reading_at_once(kv_heads):
    lm, ids = random_lm(kv_heads=kv_heads), draw_ids(1, 9)
    close(cached(lm, ids[0], [1] * 9)[0], lm(ids).logits)


def test_rows_padded_on_the_right_are_read_as_if_alone():
    """Prompts of different length, then chunks of different length, whatever the padding is."""
    lm = random_lm()
    cache = lm.cache([None] * 3, 16)
    ids = draw_ids(3, 14)
    read = [0, 0, 0]
    for step, lengths in enumerate([(5, 2, 0), (1, 1, 3), (1, 4, 2), (1, 1, 1)]):
        width = max(lengths)
        batch = draw_ids(3, width, seed=50 + step)  # padding: any ids at all
        for row, length in enumerate(lengths):
            batch[row, :length] = ids[row, read[row] : read[row] + length]
        output = lm(batch, cache, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            if not length:
                continue
            alone = lm(ids[row : row + 1, : read[row] + length])
            close(output.logits.view(3, width, -1)[row, :length], alone.logits[read[row] :])
            close(output.keys[row, :length], alone.keys[0, read[row] :])
            read[row] += length
        assert cache.lengths.tolist() == read


def test_a_whole_padded_batch_needs_no_cache_to_be_read_row_by_row():
    lm, ids = random_lm(), draw_ids(2, 7)
    padded = lm(ids).keys
    close(padded[1, :4], lm(ids[1:, :4]).keys[0])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_a_selected_cache_goes_on_as_the_rows_it_was_taken_from(rows):
    lm, ids = random_lm(), draw_ids(3, 6)
    lengths = torch.tensor([6, 3, 4])
    cache = lm.cache([None] * 3, 8)
    lm(ids, cache, lengths)
    following = draw_ids(len(rows), 2, seed=1)
    got = lm(following, cache.select(torch.tensor(rows))).logits.view(len(rows), 2, -1)
    for index, row in enumerate(rows):
        again = torch.cat((ids[row, : lengths[row]], following[index]))
        close(got[index], lm(again[None]).logits[-2:])


def test_logits_are_computed_only_where_asked_and_are_the_same_there():
    lm, ids = random_lm(), draw_ids(2, 5)
    at = torch.tensor([[0, 1, 0, 0, 1], [0, 0, 0, 1, 0]]).bool()
    whole, some = lm(ids), lm(ids, at=at)
    close(some.logits, whole.logits.view(2, 5, -1)[at])
    assert torch.equal(some.keys, whole.keys)
    assert lm(ids, at=torch.zeros_like(at)).logits.shape == (0, VOCABULARY)


def test_the_key_is_the_normalised_input_of_the_last_feed_forward():
    lm, ids = random_lm(tied=True), draw_ids(2, 5)
    output, last = lm(ids), lm.blocks[-1]
    inputs = []
    last.feed_forward_norm.register_forward_hook(lambda _, given, result: inputs.append(given[0]))
    lm(ids)
    [stream] = inputs
    scale = stream.square().mean(-1, keepdim=True).add(lm.config.norm_eps).rsqrt()
    key = stream * scale * last.feed_forward_norm.weight
    close(output.keys, key)
    gate, up, down = (getattr(last.feed_forward, name).weight for name in ("gate", "up", "down"))
    final = stream + (functional.silu(key @ gate.T) * (key @ up.T)) @ down.T
    close(output.hidden, lm.norm(final))
    close(output.logits, output.hidden.flatten(0, 1) @ lm.embedding.weight.T)


@pytest.mark.parametrize(("kv_heads", "biased"), [(4, False), (2, True), (1, False)])
def test_attention_is_what_the_forward_pass_mixes_values_by(kv_heads, biased):
    lm, ids = random_lm(kv_heads=kv_heads, qkv_bias=biased, layers=3), draw_ids(2, 7)
    weights = lm.attention(ids, last=7)
    assert weights.shape == (3, 2, 4, 7, 7)
    close(weights.sum(-1), torch.ones(3, 2, 4, 7))
    assert not weights.triu(1).any(), "a position looks at a later one"
    x = lm.embedding(ids)
    for block, looks in zip(lm.blocks, weights, strict=True):
        layer = block.attention
        values = layer.v(block.attention_norm(x)).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        mixed = looks @ values.repeat_interleave(4 // kv_heads, dim=1)
        x = x + layer.out(mixed.transpose(1, 2).flatten(2))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    close(x, lm(ids).states)


def test_attention_of_the_last_positions_is_the_end_of_everyones():
    lm, ids = random_lm(), draw_ids(2, 6)
    whole = lm.attention(ids, last=6)
    for last in (1, 4):
        close(lm.attention(ids, last), whole[:, :, :, -last:])
    for last in (0, 7):
        with pytest.raises(ValueError, match=f"the last {last} of 6 positions"):
            lm.attention(ids, last)


def test_a_cache_too_small_is_an_error_and_says_how_much_is_needed():
    lm = random_lm()
    cache = lm.cache([None], 6)
    lm(draw_ids(1, 4), cache)
    with pytest.raises(ValueError, match="7 tokens in a cache of 6"):
        lm(draw_ids(1, 3), cache)
    assert cache.lengths.tolist() == [4]
    lm(draw_ids(1, 2), cache)


def test_logits_are_float32_and_keys_keep_the_dtype_of_the_weights():
    lm, ids = random_lm().bfloat16(), draw_ids(1, 6)
    output = lm(ids)
    assert (output.logits.dtype, output.keys.dtype) == (torch.float32, torch.bfloat16)
    steps = cached(lm, ids[0], [3, 1, 1, 1])[0]
    torch.testing.assert_close(steps, output.logits, atol=0.1, rtol=0.05)


def test_a_tied_head_is_the_embedding():
    tied, untied = random_lm(tied=True), random_lm(tied=False)
    assert tied.head is None
    assert sum(p.numel() for p in untied.parameters()) == (
        sum(p.numel() for p in tied.parameters()) + VOCABULARY * 16
    )


@pytest.mark.parametrize("changes", [{}, {"tied": True}, {"qkv_bias": True}, {"head_width": 6}])
def test_parameters_are_counted_without_being_made(changes):
    lm = random_lm(**changes)
    assert parameter_count(lm.config, VOCABULARY) == sum(p.numel() for p in lm.parameters())


def test_the_large_preset_of_the_paper_has_6_8_billion_parameters():
    config = LanguageModel(
        width=4096, layers=32, heads=32, kv_heads=32, feed_forward=11008, tied=False
    )
    assert round(parameter_count(config, 5 + 32_000 + 2000) / 1e7) == 675


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_processors_logits():
    lm, ids = random_lm(), draw_ids(3, 9)
    expected = lm(ids).logits
    got = lm.cuda()(ids.cuda()).logits.cpu()
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def learned(lm, ids, targets, **saving):
    """The loss of the next token and the gradient it leaves, by what is kept in between."""
    lm.checkpointed, lm.loss_chunk = saving.get("checkpointed"), saving.get("loss_chunk")
    lm.zero_grad()
    lm.requires_grad_(True)
    output = lm(ids, targets=targets)
    output.loss.backward()
    return output, {name: weight.grad.clone() for name, weight in lm.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointed", [1, 2, 3, 5])
def test_activations_that_are_computed_again_leave_the_same_gradients(tied, checkpointed):
    lm = random_lm(layers=3, tied=tied)
    ids = draw_ids(2, 7)
    targets = draw_ids(1, 14, seed=1).flatten()
    kept, wanted = learned(lm, ids, targets)
    again, gradients = learned(lm, ids, targets, checkpointed=checkpointed, loss_chunk=4)
    for name in ("keys", "states", "hidden", "loss"):
        close(getattr(again, name), getattr(kept, name))
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


def test_the_loss_is_that_of_the_logits():
    lm, ids = random_lm(), draw_ids(2, 5)
    at = torch.tensor([[True, False, True, True, False], [False, True, True, False, True]])
    targets = draw_ids(1, int(at.sum()), seed=1).flatten()
    output = lm(ids, at=at, targets=targets)
    assert output.logits.shape == (0, VOCABULARY)
    close(output.loss, functional.cross_entropy(lm(ids, at=at).logits, targets, reduction="sum"))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointed", [None, 1])
def test_layers_are_compiled_whole(checkpointed):
    """fullgraph: a break would be an error; rows and times of any number share the graphs."""
    torch._dynamo.reset()
    lm = random_lm(layers=2)
    expected = {}
    for rows, time in ((2, 6), (3, 9), (4, 5)):
        targets = draw_ids(1, rows * time, seed=1).flatten()
        expected[rows, time] = learned(lm, draw_ids(rows, time), targets)[1]
    for block in lm.blocks:
        block.compile(fullgraph=True, dynamic=True)
    for (rows, time), wanted in expected.items():
        targets = draw_ids(1, rows * time, seed=1).flatten()
        saving = {"checkpointed": checkpointed, "loss_chunk": 8}
        for name, gradient in learned(lm, draw_ids(rows, time), targets, **saving)[1].items():
            torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
