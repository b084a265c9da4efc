"""kNN-LM as a hook says what the engine's steps say, as far as its index finds the same."""

import numpy as np
import pytest
import torch
from plain_retrieval import retrieve

from jobs.benchmark import decoded, hooked, keys
from jobs.benchmark.hooked import HookedLM
from jobs.benchmark.keys import SyntheticKeys
from mmrag import shipped
from mmrag.config import KNN, Index
from mmrag.decoding.decode import decode
from mmrag.recogniser import Recogniser
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.retrievers import LocalRetriever

SOME = KNN(k=16, weight=0.6, temperature=5.3)


@pytest.fixture(scope="module")
def recogniser():
    return Recogniser.load(shipped.find(shipped.TINY))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("keys") / "store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys, "SENTENCES", 200)
        patch.setattr(hooked, "CHUNK", 1000)
        SyntheticKeys(shipped.TINY, seed=0).write(place, 2500, seed=0)
        yield Datastore.open(place)


@pytest.fixture(scope="module")
def every_key(store):
    return LocalRetriever.build(store, Index(kind="flat", shards=1), seed=0)


@pytest.fixture
def hook(recogniser, store, tmp_path):
    index, tokens = hooked.flat(store, print), hooked.values(store, tmp_path / "values")
    return HookedLM(recogniser.lm, recogniser.vocabulary, index, tokens, SOME)


def test_a_step_over_every_key_gives_the_engines_distribution(recogniser, store, every_key, hook):
    queries = store.keys(0, 2500)[::250] + np.float32(0.3)
    allowed = torch.from_numpy(recogniser.vocabulary.transcript_ids())
    logits = torch.randn(len(queries), len(allowed), generator=torch.manual_seed(0))
    lm_logp = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
    _, found = retrieve(lm_logp, torch.from_numpy(queries), Retrieval(every_key, SOME))
    lm_logp[0, torch.from_numpy(found.tokens[0, :3]).long()] = -torch.inf  # no votes for these
    lm_logp[1, torch.from_numpy(found.tokens[1]).long()] = -torch.inf  # nobody has a vote here
    ours, _ = retrieve(lm_logp, torch.from_numpy(queries), Retrieval(every_key, SOME))
    theirs = torch.stack(
        [hook.mixed(*row) for row in zip(lm_logp, torch.from_numpy(queries), strict=True)]
    )
    torch.testing.assert_close(theirs.exp(), ours.exp(), atol=1e-5, rtol=1e-4)
    assert (theirs - lm_logp).nan_to_num().abs().amax(1)[2:].min() > 0.1  # neighbours were heard


def test_it_transcribes_as_the_engine_does_clip_by_clip(recogniser, every_key, hook):
    clips = decoded.spoken_clips(recogniser, 4)
    speech, limits = [clip.speech for clip in clips], [clip.limit for clip in clips]
    given = recogniser.lm, recogniser.vocabulary, speech, limits, decoded.DECODE
    alone, ours = (
        [h.choices for h in decode(*given, r)] for r in (None, Retrieval(every_key, SOME))
    )
    ours, alone = ([[one.token for one in h] for h in each] for each in (ours, alone))
    assert [hook.generate(clip.speech, clip.limit) for clip in clips] == ours != alone
    assert not recogniser.lm.blocks[-1].feed_forward_norm._forward_hooks


def test_its_codes_find_neighbours_and_are_made_once(store, tmp_path):
    file, told = tmp_path / "ivfpq.faiss", []
    index = hooked.ivfpq(store, file, told.append)
    assert (index.nlist, index.pq.M, index.nprobe) == (2500 // 39, 64, 32)
    queries = store.keys(0, 2500)[::100]
    distances, nearest = hooked.flat(store, print).search(queries, 16)
    assert distances[:, 0].max() < 1e-3 and (nearest[:, 0] == np.arange(0, 2500, 100)).all()
    assert 0.5 < decoded._recall(index, queries, nearest) <= 1
    again = hooked.ivfpq(store, file, told.append)
    assert again.nprobe == 32 and len(told) == 2 and "there already" in told[1]
    np.testing.assert_array_equal(again.search(queries, 16)[1], index.search(queries, 16)[1])
