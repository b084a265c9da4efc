"""A transcript in the format that was asked for, and a stream's events: OpenAI's, ours on top.

Values in, bodies out; what runs and what is sent when is for `transcriptions`.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse, PlainTextResponse, Response

from mmrag.model.contract import TextVocabulary
from mmrag.records import Word
from serve import captions, languages, schema
from serve.forms import TranscriptionForm
from serve.messages import DecodeResult
from serve.pipeline import TranscribedSegment
from serve.settings import Settings

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""How a vocabulary of bytes writes the beginning of a letter."""


def token_logprobs(
    result: DecodeResult, vocabulary: TextVocabulary, before: str = ""
) -> list[schema.Logprob]:
    """What each token of a segment adds to the transcript, and its log-probability.

    Joined, the tokens are `before` (a blank behind an earlier segment) and the text; none where
    there is no text.
    """
    if not result.text:
        return []
    found, sent, last = [], "", len(result.tokens) - 1
    for place, logp in enumerate(result.logps):
        text = vocabulary.decode(result.tokens[: place + 1])
        whole = place == last or not text.endswith(UNFINISHED)
        added = text[len(sent) :] if whole and text.startswith(sent) else ""
        token = before + added if added else ""
        before, sent = "" if added else before, sent + added
        found.append(schema.Logprob(token=token, bytes=list(token.encode()), logprob=logp))
    return found


@dataclass
class Answer:
    """What one upload is answered with, of `seconds`; `transcribed` are its segments so far."""

    form: TranscriptionForm
    settings: Settings
    vocabulary: TextVocabulary
    seconds: float
    transcribed: list[TranscribedSegment] = field(default_factory=list)
    _segments: list[schema.Segment] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The transcript so far."""
        return " ".join(one.text for one in self._heard() if one.text)

    @property
    def tokens(self) -> int:
        """How many tokens were chosen for it."""
        return sum(len(one.tokens) for one in self._heard())

    def add(self, one: TranscribedSegment) -> None:
        """The next segment is complete."""
        self.transcribed.append(one)
        self._segments += self._cut(one)

    def response(self) -> Response:
        """The transcript."""
        kind = self.form.response_format
        if kind == "json":
            return JSONResponse(_shown(schema.Transcription, self._plain()))
        if kind == "verbose_json":
            fields = self._plain() | self._timed()
            fields["usage"] = self._duration()
            del fields["languages"]  # that type has `language`
            return JSONResponse(_shown(schema.VerboseTranscription, fields))
        if kind == "text":
            return PlainTextResponse(self.text + "\n")
        write = captions.srt if kind == "srt" else captions.vtt
        cues = [cue for one in self._heard() for cue in captions.cues(one.words)]
        media_type = "application/x-subrip" if kind == "srt" else "text/vtt"
        return PlainTextResponse(write(cues), media_type=media_type)

    def events(self, part: str | TranscribedSegment) -> Iterator[dict[str, Any]]:
        """What a stream tells of the next part of a transcript: text, or a segment that it ends.

        With log-probabilities, text is told when its segment is complete: they are known then.
        """
        if isinstance(part, str):
            if not self.form.logprobs:
                yield _shown(schema.Delta, {"delta": part})
            return
        before, known = " " if self.text else "", len(self._segments)
        self.add(part)
        if self.form.logprobs and part.result and part.result.text:
            logprobs = token_logprobs(part.result, self.vocabulary, before)
            fields = {"delta": before + part.result.text, "logprobs": logprobs}
            yield _shown(schema.Delta, fields)
        if self.form.response_format == "verbose_json":
            for one in self._segments[known:]:
                times = {"start": one.start, "end": one.end}
                yield _shown(schema.SegmentEvent, {"id": str(one.id), "text": one.text, **times})

    def done(self) -> dict[str, Any]:
        """The event that ends a stream."""
        fields = self._plain() | {"usage": self._tokens(), "duration": self.seconds}
        if self.form.response_format == "verbose_json":
            return _shown(schema.VerboseDone, fields | self._timed())
        return _shown(schema.Done, fields)

    def _plain(self) -> dict[str, Any]:
        """The transcript, and what was asked for besides."""
        counted = self._duration() if self.settings.usage == "duration" else self._tokens()
        codes = dict.fromkeys(self._codes())
        fields: dict[str, Any] = {
            "text": self.text,
            "usage": counted,
            "languages": [schema.Language(code=one) for one in codes],
        }
        if self.form.logprobs:
            said = [one for one in self._heard() if one.text]
            fields["logprobs"] = [
                logprob
                for number, one in enumerate(said)
                for logprob in token_logprobs(one, self.vocabulary, " " if number else "")
            ]
        if self.form.evidence:
            fields["words"] = [_word(word) for word in self._words()]
            missing = [one.missing_shards for one in self._heard()]
            fields["missing_shards"] = max(missing, default=0)
        return fields

    def _timed(self) -> dict[str, Any]:
        """What verbose_json has besides."""
        codes = Counter(self._codes()).most_common(1)
        code = codes[0][0] if codes else self.settings.languages[0]
        fields: dict[str, Any] = {
            "task": "transcribe",
            "language": languages.name(code),
            "duration": self.seconds,
        }
        if "segment" in self.form.granularities:
            fields["segments"] = self._segments
        if "word" in self.form.granularities and not self.form.evidence:
            fields["words"] = [
                schema.PlainWord(word=word.text, start=word.start, end=word.end)
                for word in self._words()
            ]
        return fields

    def _cut(self, one: TranscribedSegment) -> list[schema.Segment]:
        """A segment of the upload as segments of an answer: as long as subtitles."""
        if one.result is None:
            return []
        return [
            schema.Segment(
                id=number,
                seek=round(one.start * 100),
                start=cue.start,
                end=cue.end,
                text=cue.text,
                tokens=list(one.result.tokens_of(cue.first, cue.last)),
                temperature=self.form.temperature,
                avg_logprob=one.result.mean_logp,
                compression_ratio=len(cue.text) / len(zlib.compress(cue.text.encode())),
                no_speech_prob=0.0 if one.speech is None else 1 - one.speech,
                confidence=one.result.confidence,
                unclear=one.result.unclear,
            )
            for number, cue in enumerate(captions.cues(one.result.words), len(self._segments))
        ]

    def _heard(self) -> list[DecodeResult]:
        return [one.result for one in self.transcribed if one.result]

    def _words(self) -> list[Word]:
        return [word for one in self._heard() for word in one.words]

    def _codes(self) -> list[str]:
        """The language of each segment in which something is said, where that is known: the model
        found it out, or hears no other."""
        understood = self.settings.languages
        only = understood[0] if len(understood) == 1 else None
        found = [one.language or only for one in self._heard() if one.text]
        return [code for code in found if code]

    def _duration(self) -> schema.DurationUsage:
        return schema.DurationUsage(seconds=math.ceil(self.seconds))

    def _tokens(self) -> schema.TokenUsage:
        heard = sum(one.heard for one in self._heard())
        return schema.TokenUsage(
            input_tokens=heard,
            output_tokens=self.tokens,
            total_tokens=heard + self.tokens,
            input_token_details=schema.InputTokens(audio_tokens=heard),
        )


def _shown(kind: type[schema.BaseModel], fields: dict[str, Any]) -> dict[str, Any]:
    """A body as JSON, without the fields that nobody asked for."""
    unasked = kind.model_fields.keys() - fields.keys() - {"type", "task", "speaker"}
    return kind(**fields).model_dump(mode="json", exclude=unasked)


def _word(word: Word) -> schema.TimedWord:
    source = word.source and schema.Evidence(**vars(word.source))
    fields = vars(word) | {"source": source, "word": word.text}
    return schema.TimedWord(**{name: fields[name] for name in schema.TimedWord.model_fields})
