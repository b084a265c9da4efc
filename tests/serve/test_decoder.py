"""The decoder by itself: a list that is too long to be read whole is shortened for each clip."""

import asyncio

import pytest
import torch

from mmrag import contents, shipped
from mmrag.corpora.voices.espeak import Synthesizer
from mmrag.recogniser import Recogniser
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.index import saved_shards
from mmrag.retrieval.phrases import speak
from mmrag.retrieval.retrievers import LocalRetriever
from mmrag.retrieval.segment import join
from mmrag.retrieval.shortlist import Shortlist
from serve.decoder import SHORTLIST, Decoder
from serve.messages import (
    DecodeRequest,
    DecodeResult,
    InvalidRequest,
    PhraseList,
    ResolvedDatastore,
)
from serve.settings import read

NAMES = ("aoibheann khan", "granit xhaka", "siobhan o'connor", "reece magann")
DEFAULTS = {
    "knn": {"k": 4, "weight": 0.5, "temperature": 20},
    "both": {"k": 4, "weight": 0.1, "temperature": 20},
    "attention": {"k": 4, "stride": 1, "whole": 3},
}
GIVEN = {"model": shipped.TINY, "retrieval_defaults": DEFAULTS, "decoder.compiled": False}

pytestmark = pytest.mark.ray


class Ready:
    """A value that is awaited, as often as one likes."""

    def __init__(self, value):
        self.value = value

    def __await__(self):
        yield from ()
        return self.value


@pytest.mark.parametrize("listed", [NAMES, NAMES[:3]])
def test_only_a_list_too_long_to_be_read_is_shortened(ray_cluster, wave, monkeypatch, listed):
    models = Recogniser.load(shipped.find(shipped.TINY))
    [units] = models.encode([torch.from_numpy(wave("please call siobhan o'connor now"))])
    parts = speak(listed, models.lm, models.vocabulary, models.synthesizer())
    phrases, shortened = PhraseList("names", Ready(join(list(parts)))), []
    given = Shortlist.given

    def watched(self, text, *ways):
        shortened.append((self.most, text))
        return given(self, text, *ways)

    monkeypatch.setattr(Shortlist, "given", watched)

    async def heard():
        decoder = Decoder(read(GIVEN))
        plain = await decoder.transcribe(DecodeRequest(units))
        for mode in ("cross_attention", "knn"):
            request = DecodeRequest(units, mode=mode, phrases=phrases)
            found = await decoder.transcribe(request)
            assert "siobhan o'connor" in found.text
            *deltas, whole = [part async for part in decoder.stream(request)]
            assert isinstance(whole, DecodeResult) and whole.text == "".join(deltas) == found.text
        return plain.text

    plain = asyncio.run(heard())
    assert shortened == ([(SHORTLIST, plain)] * 4 if listed == NAMES else [])


def test_the_sounds_of_a_datastore_are_looked_up_once_a_version(
    ray_cluster, tmp_path, wave, monkeypatch
):
    models = Recogniser.load(shipped.find(shipped.TINY))
    [units] = models.encode([torch.from_numpy(wave("please call siobhan o'connor now"))])
    contents.create(tmp_path / "names", NAMES, models, spoken=False)
    pronounced, shortened = [], []
    pronounce, given = Synthesizer.pronounce, Shortlist.given

    def watched(self, texts):
        pronounced.append(list(texts))
        return pronounce(self, texts)

    def noted(self, *arguments):
        shortened.append((self.most, len(self.phrases.names)))
        return given(self, *arguments)

    monkeypatch.setattr(Synthesizer, "pronounce", watched)
    monkeypatch.setattr(Shortlist, "given", noted)
    settings = read(GIVEN)
    ways = settings.retrieval_defaults

    def resolved(key, directory=tmp_path / "names"):
        store = Datastore.open(tmp_path / "names")
        retriever = LocalRetriever.load(saved_shards(store.directory), store)
        found = key, "uid", retriever, ways.knn, ways.both, ways.attention, None, directory
        return ResolvedDatastore(*found)

    async def heard():
        decoder = Decoder(settings)

        async def ask(found, **more):
            request = DecodeRequest(units, mode="cross_attention", datastore=found, **more)
            assert "siobhan o'connor" in (await decoder.transcribe(request)).text

        first = resolved("first")
        await asyncio.gather(*(ask(first) for _ in range(3)))
        assert [texts for texts in pronounced if len(texts) > 1] == [list(NAMES)]
        assert shortened == [(SHORTLIST, len(NAMES))] * 3
        await ask(first, shortlist=2)
        await ask(first, shortlist=0)
        assert shortened[3:] == [(2, len(NAMES))]
        contents.add(tmp_path / "names", ["wojciech nowak"], models)
        await ask(resolved("second"))
        assert shortened[4:] == [(SHORTLIST, len(NAMES) + 1)]
        assert ["wojciech nowak"] in pronounced
        assert [texts for texts in pronounced if len(texts) > 1] == [list(NAMES)]
        with pytest.raises(InvalidRequest, match="shortlist: it is made of"):
            await ask(resolved("no phrases", None), shortlist=2)

    asyncio.run(heard())
