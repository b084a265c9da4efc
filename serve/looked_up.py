"""What a datastore and a request's phrases offer a clip: neighbours that vote, windows that are
read, phrases that are spotted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from mmrag.config import RetrievalMode, Spotting
from mmrag.decoding.boost import Boost
from mmrag.decoding.spotting import Favoured
from mmrag.decoding.tune import Tuned
from mmrag.model.contract import TextVocabulary
from mmrag.records import Retriever
from mmrag.retrieval import terms
from mmrag.retrieval.datastore import Datastore
from mmrag.retrieval.display import Display
from mmrag.retrieval.interpolation import Retrieval
from mmrag.retrieval.memory import AttentionSource
from mmrag.retrieval.phrases import Phrases
from mmrag.retrieval.segment import Segment
from mmrag.retrieval.shortlist import Shortlist
from mmrag.retrieval.weights import Weights
from mmrag.retrieval.window_cache import WindowCache
from serve.messages import ResolvedDatastore
from serve.settings import RetrievalDefaults


@dataclass(frozen=True)
class RetrievalSources:
    """What one datastore or list offers a clip."""

    source: Retriever | None
    votes: dict[RetrievalMode, Retrieval]
    """How neighbours vote, by mode."""
    attention: AttentionSource | None
    phrases: Callable[[], Phrases] | None = None
    """What may be made a shortlist of; None where that is no list of phrases alone."""
    many: bool = False
    """Whether they are too many to be read whole."""
    display: Display = field(default_factory=Display)
    """How its entries are written."""
    favoured: Favoured | None = None
    """Phrases that are spotted."""
    boost: Boost | None = None
    """Those of them that a clip says."""

    def given(self, shortlist: Shortlist, text: str, mode: RetrievalMode) -> RetrievalSources:
        """What is offered to a clip whose transcript without it is `text`."""
        vote, attention = shortlist.given(text, self.votes.get(mode), self.attention)
        return replace(self, votes={mode: vote} if vote else {}, attention=attention)


def favour(
    found: ResolvedDatastore | None,
    listed: Segment | None,
    vocabulary: TextVocabulary,
    settings: Spotting,
) -> Favoured:
    """The phrases and terms of a datastore, and a request's phrases, to be spotted; the request's
    wording counts."""
    own = []
    if found is not None and found.spotted is not None:
        own = terms.listed(Datastore.open(found.spotted), vocabulary)
    given = [one.entry for one in own]
    if listed is not None:
        given += listed.wordings.values()
    return Favoured(given, vocabulary, settings, terms.places(own))


def offer(
    source: Retriever,
    settings: ResolvedDatastore | Tuned | RetrievalDefaults,
    cache: WindowCache | None,
    whole: np.ndarray | None,
    weights: Weights | None,
) -> RetrievalSources:
    """What is searched and read as `settings` say."""
    kinds = {"knn": settings.knn, "both": settings.both}
    votes = {kind: Retrieval(source, knn, weights) for kind, knn in kinds.items()}
    return RetrievalSources(
        source,
        votes,
        cache and AttentionSource(cache, settings.attention, source, whole, weights),
    )
