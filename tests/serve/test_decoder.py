"""The decoder by itself: a list that is too long to be read whole is shortened for each clip."""

import asyncio

import pytest
import torch

from mmrag import shipped
from mmrag.recogniser import Recogniser
from mmrag.retrieval.phrases import speak
from mmrag.retrieval.segment import join
from mmrag.retrieval.shortlist import Shortlist
from serve.decoder import SHORTLIST, Decoder
from serve.messages import DecodeRequest, DecodeResult, PhraseList
from serve.settings import read

NAMES = ("aoibheann khan", "granit xhaka", "siobhan o'connor", "reece magann")
DEFAULTS = {
    "knn": {"k": 4, "weight": 0.5, "temperature": 20},
    "both": {"k": 4, "weight": 0.1, "temperature": 20},
    "attention": {"k": 4, "stride": 1, "whole": 3},
}

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
        decoder = Decoder(read({"model": shipped.TINY, "retrieval_defaults": DEFAULTS}))
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
