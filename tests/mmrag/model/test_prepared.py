import copy

import pytest
import torch

from mmrag.config import LanguageModel
from mmrag.model.lm import LM
from mmrag.model.prepared import PackedLinear, prepare

VOCABULARY = 50


def random_lm(dtype=torch.float32, **changes):
    fields = {"width": 32, "layers": 3, "heads": 4, "kv_heads": 2, "feed_forward": 48}
    torch.manual_seed(0)
    shape = LanguageModel(**{**fields, "tied": True, **changes})
    return LM(shape, VOCABULARY).eval().to(dtype)


def transcripts(lm, steps=12):
    """Logits of steps of several rows that leave and are chosen twice, greedily."""
    ids = torch.randint(0, VOCABULARY, (4, 20), generator=torch.Generator().manual_seed(0))
    cache, seen = lm.cache([None] * 4, 60), []
    with torch.inference_mode():
        output = lm(ids, cache, torch.tensor([20, 3, 17, 9]))
        token = output.logits.unflatten(0, (4, -1))[:, -1].argmax(-1)
        for step in range(steps):
            output = lm(token[:, None], cache)
            token = output.logits.argmax(-1)
            seen.append(output.logits)
            rows = {2: [0, 0, 1, 3], 5: [3, 1], 8: [1]}.get(step)
            if rows:
                cache, token = cache.select(rows), token[rows]
    return seen


@pytest.mark.parametrize("changes", [{}, {"tied": False, "qkv_bias": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_say_what_the_weights_said(dtype, changes):
    lm = random_lm(dtype, **changes)
    expected = transcripts(copy.deepcopy(lm))
    made = prepare(lm, str(dtype).removeprefix("torch."), compiled=False)
    assert not made.compiled
    assert isinstance(lm.blocks[0].attention.qkv, PackedLinear)
    exact = dtype == torch.float32
    for got, own in zip(transcripts(lm), expected, strict=True):
        torch.testing.assert_close(got, own, atol=1e-5 if exact else 0.02, rtol=1e-4)


def test_a_format_that_onednn_lacks_is_multiplied_as_it_is():
    lm = random_lm(torch.float16)
    expected = transcripts(copy.deepcopy(lm))
    prepare(lm, compiled=False)
    for got, own in zip(transcripts(lm), expected, strict=True):
        torch.testing.assert_close(got, own, atol=0.02, rtol=1e-3)


def test_int8_weights_are_near():
    lm = random_lm()
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    expected = lm.embedding.weight @ x.T
    prepare(lm, "int8", compiled=False)
    assert (lm.head(x).T - expected).norm() < 0.02 * expected.norm()
    assert transcripts(lm)[-1].isfinite().all()


def test_auto_leaves_exact_what_is_not_bfloat16_and_says_what_it_measured_where_it_is():
    lm = random_lm()
    assert prepare(lm, "auto", compiled=False).compute == "float32"
    assert prepare(random_lm(torch.bfloat16), compiled=False).compute == "bfloat16"
    made = prepare(random_lm(torch.bfloat16), "auto", compiled=False)
    assert set(made.matrices_ms) == {"float32", "bfloat16"}
    assert made.compute == min(made.matrices_ms, key=made.matrices_ms.get)
    assert str(made).startswith(f"{made.compute}, eager (float32 ")


def test_a_model_is_prepared_once():
    lm = random_lm()
    prepare(lm, compiled=False)
    with pytest.raises(ValueError, match="prepared already"):
        prepare(lm)


def test_without_a_compiler_steps_stay_eager_unless_they_have_to_be_compiled(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "/nonexistent"))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    lm = random_lm()
    expected = transcripts(copy.deepcopy(lm))
    eager = copy.deepcopy(lm)
    made = prepare(eager, rows=2)
    assert not made.compiled and "No working C++ compiler" in made.refused
    assert str(made) == f"float32, eager, since nothing can be compiled here: {made.refused}"
    with pytest.raises(RuntimeError, match="No working C"):
        prepare(lm, rows=2, compiled=True)
    for got, own in zip(transcripts(eager), expected, strict=True):
        torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_step_says_what_the_eager_one_says_and_is_compiled_at_most_three_times():
    from torch._dynamo.utils import counters

    lm = random_lm()
    expected = transcripts(copy.deepcopy(lm))
    counters.clear()
    made = prepare(lm, "float32", rows=4, compiled=True)
    assert made.compiled
    for got, own in zip(transcripts(lm), expected, strict=True):
        torch.testing.assert_close(got, own, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] <= 4, "a graph, and at most 3 more"
    assert not counters["graph_break"]
