"""Options of the command line that say what is listened for and looked up: phrases, a datastore.

What they name is opened in the process that transcribes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmrag import cached, shipped, terminal
from mmrag.entry_options import SPEAKING, refuse_speaking, speaking
from mmrag.retrieval.wording import Entry, read_entries
from mmrag.storage import Location, located

if TYPE_CHECKING:
    from mmrag.config import KNN, RetrievedAttention
    from mmrag.decoding.spotting import Favoured
    from mmrag.recogniser import AnyRecogniser
    from mmrag.retrieval.datastore import Datastore
    from mmrag.retrieval.phrases import Phrases
    from mmrag.retrieval.shortlist import Shortlist

RETRIEVALS = ("none", "spotting", "knn", "cross_attention", "both")
SHORTLIST = 10
"""As in `retrieval.shortlist`."""


def add_lookup(command: Any) -> None:
    """Options of what is looked up, and how."""
    command.add_argument(
        "--datastore",
        metavar="DIR",
        help="datastore to look things up in: a directory, or a name in MODELS/datastores; with "
        "--url, a name that the endpoint knows",
    )
    command.add_argument(
        "--phrases",
        type=Path,
        metavar="FILE",
        help="phrases to listen for, one a line (names, drugs, products), or as JSON objects of "
        "text, display_as, pronunciations, weight and language",
    )
    command.add_argument(
        "--shortlist",
        type=int,
        metavar="N",
        help="of very many phrases, listen in each segment for the N that sound most like what was "
        "heard without them; with a datastore, for those of its documents whose names do; 0: for "
        f"all (default: {SHORTLIST} of more phrases than are read whole); not with spotting, which "
        "goes through all phrases",
    )
    command.add_argument(
        "--retrieval",
        choices=RETRIEVALS,
        help="phrases, and unusual words of a datastore's sentences, are spotted in the letters "
        "that are heard, and favoured (spotting); or neighbours vote (knn), the adapter reads them "
        "(cross_attention), or both: phrases are spoken by a synthesizer once for that, and "
        "remembered; default: spotting where the encoder spells (mmrag:small) and there is "
        "something to spot, else cross_attention with phrases and knn with a datastore; with "
        "--url, as the endpoint likes",
    )
    command.add_argument(
        "--weight", type=float, help="kNN weight (default: as tuned, else the model's own)"
    )


def found_by(options: argparse.Namespace, recogniser: AnyRecogniser) -> dict[str, Any]:
    """What `transcribe` is given to look things up in. ValueError for options that do not go
    together, or with the models."""
    if options.shortlist is not None and options.shortlist < 0:
        raise ValueError(f"--shortlist {options.shortlist}: a number of phrases, or 0 for all")
    if options.retrieval is not None:
        _refuse_unused(options, options.retrieval)
    if options.phrases is not None and options.datastore is None:
        return _phrases(options, recogniser)
    refuse_speaking(options, "goes with --phrases alone")
    if options.phrases is not None:
        return _datastore(options, recogniser, _beside(options, recogniser))
    if options.datastore is None:
        if options.retrieval not in (None, "none"):
            raise ValueError(f"--retrieval {options.retrieval} needs a --datastore or --phrases")
        return {}
    return _datastore(options, recogniser)


def _datastore(
    options: argparse.Namespace, recogniser: AnyRecogniser, beside: Sequence[Entry] = ()
) -> dict[str, Any]:
    """A datastore whose phrases and terms are spotted, or that is searched as it was tuned, and
    phrases that are spotted beside it."""
    from mmrag.retrieval import terms
    from mmrag.retrieval.datastore import Datastore
    from mmrag.retrieval.display import Display

    datastore = Datastore.open(_place(options.datastore, _below(options.models)))
    datastore.require(recogniser.keyed_by)
    if options.retrieval == "none":
        return {}
    wanted = recogniser.spells and options.retrieval in (None, "spotting")
    own = terms.listed(datastore, recogniser.vocabulary) if wanted else []
    listed = [one.entry for one in own]
    spots = bool(listed) and _spots(options, listed, recogniser)
    mode = options.retrieval or ("spotting" if spots else "knn")
    _refuse_unused(options, mode)
    if mode == "spotting" and recogniser.spells and datastore.entries and not listed:
        raise ValueError(
            f"--retrieval spotting: {datastore} has neither phrases nor unusual words to spot"
        )
    written = (*beside, *datastore.wordings().values())
    display = Display.of(written, recogniser.vocabulary.spoken)
    if mode == "spotting":
        refuse_speaking(options, f"goes with --retrieval {', '.join(RETRIEVALS[2:])}")
        every, places = [*listed, *beside], terms.places(own)
        return {"favoured": _spotted(options, every, recogniser, places), "display": display}
    found = _searched(options, datastore, mode, recogniser)
    if beside:
        found["favoured"] = _spotted(options, beside, recogniser)
    return {**found, "display": display}


def _searched(
    options: argparse.Namespace, datastore: Datastore, mode: str, recogniser: AnyRecogniser
) -> dict[str, Any]:
    from mmrag.retrieval.index import saved_shards
    from mmrag.retrieval.interpolation import Retrieval
    from mmrag.retrieval.memory import AttentionSource
    from mmrag.retrieval.phrases import Phrases
    from mmrag.retrieval.retrievers import LocalRetriever
    from mmrag.retrieval.weights import Weights

    retriever = LocalRetriever.load(saved_shards(datastore.directory), datastore)
    weights = Weights.of(datastore)
    found: dict[str, Any] = {"source": retriever}
    knn, read = _tuned(options, datastore, mode)
    if mode in ("knn", "both"):
        found["retrieval"] = Retrieval(retriever, knn, weights)
    if mode in ("cross_attention", "both"):
        cache = recogniser.window_cache(retriever)
        found["attention"] = AttentionSource(cache, read, retriever, weights=weights)
    if options.shortlist:
        found["shortlist"] = _shortlist(Phrases(datastore), options.shortlist)
    return found


def _phrases(options: argparse.Namespace, recogniser: AnyRecogniser) -> dict[str, Any]:
    """The phrases of a file."""
    from mmrag.contents import check
    from mmrag.retrieval.display import Display

    if options.retrieval == "none":
        return {}
    every = read_entries(options.phrases)
    check(every, recogniser)
    spots = _spots(options, every, recogniser)
    read = recogniser.adapter is not None and options.weight is None
    mode = options.retrieval or ("spotting" if spots else "cross_attention" if read else "knn")
    _refuse_unused(options, mode)
    display = Display.of(every, recogniser.vocabulary.spoken)
    listed = [one for one in every if one.weight > 0]
    if not listed and every:
        return {"display": display}
    if mode == "spotting":
        refuse_speaking(options, f"goes with --retrieval {', '.join(RETRIEVALS[2:])}")
        return {"favoured": _spotted(options, listed, recogniser), "display": display}
    return {"display": display, **_spoken(options, listed, mode, recogniser)}


def _beside(options: argparse.Namespace, recogniser: AnyRecogniser) -> list[Entry]:
    """The phrases of a file that are spotted beside a datastore."""
    from mmrag.contents import check

    every = read_entries(options.phrases)
    check(every, recogniser)
    if options.retrieval != "none" and not _spots(options, every, recogniser):
        raise ValueError(
            "--datastore and --phrases go together where phrases are spotted: by an encoder that "
            "spells (mmrag:small), none of them in IPA, without --shortlist and --weight"
        )
    return every


def _spots(options: argparse.Namespace, listed: Sequence[Entry], recogniser: AnyRecogniser) -> bool:
    """Whether phrases are spotted where nobody says how they are listened for: unless something was
    said that is for others, or one of them is pronounced in IPA, which no letter stands for."""
    from mmrag.decoding.spotting import spells_all

    asked = options.shortlist, options.weight, *(getattr(options, name) for name in SPEAKING)
    given = any(one is not None for one in asked)
    return recogniser.spells and spells_all(listed) and not given


def _spotted(
    options: argparse.Namespace,
    listed: Sequence[Entry],
    recogniser: AnyRecogniser,
    places: Mapping[str, tuple[str, str]] | None = None,
) -> Favoured:
    from mmrag.config import Spotting
    from mmrag.decoding.spotting import Favoured

    if not recogniser.spells:
        raise ValueError("--retrieval spotting needs an encoder that spells: mmrag:small has one")
    return Favoured(listed, recogniser.vocabulary, Spotting(), places)


def _spoken(
    options: argparse.Namespace, listed: Sequence[Entry], mode: str, recogniser: AnyRecogniser
) -> dict[str, Any]:
    """Phrases as a small datastore that is read whole."""
    import numpy as np

    from mmrag.decoding.tune import default
    from mmrag.retrieval.interpolation import Retrieval
    from mmrag.retrieval.memory import AttentionSource
    from mmrag.retrieval.phrases import Phrases, remember
    from mmrag.retrieval.retrievers import SubsetRetriever
    from mmrag.retrieval.weights import Weights

    if mode != "knn" and recogniser.adapter is None:
        recogniser.window_cache(None)  # says why there is none
    voices = speaking(options)
    models = recogniser.lm, recogniser.vocabulary, recogniser.keyed_by
    say = recogniser.synthesizer(speaking=voices)
    with terminal.progress("speaking the phrases") as progress:
        kept = cached.directory("spoken phrases") / "phrases"
        datastore = remember(kept, listed, *models, say, progress, voices)
    retriever = SubsetRetriever(datastore, np.arange(datastore.entries))
    found: dict[str, Any] = {"source": retriever}
    weights = Weights.of(datastore)
    settings = default(_below(options.models), datastore)
    if mode in ("knn", "both"):
        knn = settings.both if mode == "both" else settings.knn
        found["retrieval"] = Retrieval(retriever, _weighed(options, knn), weights)
    phrases = Phrases(datastore)
    if mode in ("cross_attention", "both"):
        cache, whole = recogniser.window_cache(retriever), phrases.first_mentions()
        found["attention"] = AttentionSource(cache, settings.attention, retriever, whole, weights)
    many = len(listed) > settings.attention.whole
    most = options.shortlist if options.shortlist is not None else many * SHORTLIST
    if most:
        found["shortlist"] = _shortlist(phrases, most)
    return found


def _refuse_unused(options: argparse.Namespace, mode: str) -> None:
    """ValueError for what that way of retrieval has no use for."""
    uses = {"weight": ("knn", "both"), "shortlist": ("knn", "cross_attention", "both")}
    for name, ways in uses.items():
        if getattr(options, name) is not None and mode not in ways:
            raise ValueError(f"--{name} does not go with --retrieval {mode}")


def _shortlist(phrases: Phrases, most: int) -> Shortlist:
    from mmrag.corpora.voices.espeak import Synthesizer
    from mmrag.retrieval.shortlist import Shortlist

    return Shortlist.of(phrases, Synthesizer().pronounce, most)


def _tuned(
    options: argparse.Namespace, datastore: Datastore, mode: str
) -> tuple[KNN, RetrievedAttention]:
    """Settings as `jobs.tune` chose them for this datastore, or plain ones, with a word of it."""
    from mmrag.config import as_dict
    from mmrag.decoding.tune import default, tuned
    from mmrag.recogniser import is_whisper

    foreign = is_whisper(options.models)  # its checkpoint holds nothing of ours
    below = datastore.directory.parent.parent if foreign else _below(options.models)
    plain = default(below, datastore)
    found = tuned(below, datastore.directory) or plain
    knn = found.both if mode == "both" else found.knn
    if found is plain:
        where = datastore.directory
        print(f"mmrag: {where} is not tuned (jobs.tune): {as_dict(knn)}", file=sys.stderr)
    return _weighed(options, knn), found.attention or plain.attention


def _weighed(options: argparse.Namespace, knn: KNN) -> KNN:
    if options.weight is None:
        return knn
    return type(knn)(**knn.model_dump() | {"weight": options.weight})  # checks it


def _place(given: str, models: Location) -> Location:
    """Where a datastore lies: the one of that name that came with the models, or as it is said."""
    place, own = located(given), models / "datastores"
    bare = isinstance(place, Path) and (isinstance(own, Path) or place.name == given)
    return own / place if bare and (own / place).is_dir() else place


def _below(models: str) -> Location:
    """The directory of models, in which datastores and what was tuned for them are."""
    return shipped.find(models)
