"""What a session listens for, checked as the fields of the HTTP API are and named as the wire has
it."""

from __future__ import annotations

import json

from mmrag.model.vocabulary import Vocabulary
from serve.access.keys import Caller
from serve.errors import ApiError
from serve.forms import TranscriptionForm
from serve.pipeline import TranscriptionOptions
from serve.realtime.events import Refused, Session, Texts, Transcription
from serve.settings import Settings

PLACE = "session.audio.input.transcription"


def options(
    session: Session, caller: Caller, settings: Settings, vocabulary: Vocabulary
) -> TranscriptionOptions:
    """What the pipeline is asked for. Refused names the field that is not served."""
    asked = session.audio.input.transcription
    form = _form(asked)
    try:
        form.check(settings)
        return TranscriptionOptions(
            datastore=asked.datastore and caller.tenant.datastore(asked.datastore),
            tenant=caller.tenant.name,
            languages=form.language_codes,
            phrases=form.phrases(settings, vocabulary),
            shortlist=asked.shortlist,
            retrieval=asked.retrieval,
        )
    except ApiError as error:
        raise Refused.of(error, param=param(error.param)) from None


def param(name: str | None) -> str | None:
    """Where on the wire a field of the HTTP API stands."""
    return name and f"{PLACE}.{name.removesuffix('[]')}"


def _form(asked: Transcription) -> TranscriptionForm:
    """The same wishes as a form would have them."""
    return TranscriptionForm(
        file=None,
        model=asked.model,
        language=asked.language,
        languages=asked.languages,
        prompt=asked.prompt,
        keywords=_lines(asked.keywords),
        context=_lines(asked.context),
        datastore=asked.datastore,
        shortlist=asked.shortlist,
        retrieval=asked.retrieval,
    )


def _lines(texts: Texts | None) -> list[str] | None:
    """Entries as a form has them: an object as JSON."""
    return texts and [one if isinstance(one, str) else json.dumps(one) for one in texts]
