"""What callers send is used or refused by name: fields, parameters, methods."""

import openai
import pytest
import requests
from application import TRANSCRIBE, Handle, client, made, served
from openai import OpenAI

from mmrag.speech import cutting


@pytest.fixture
def listed(second, monkeypatch):
    """`listed(**fields)`: the phrases that a request with these fields listens for."""

    def ask(**fields):
        asked = []

        async def phrases(texts, tenant, spoken):
            asked.extend(one.text for one in texts)
            raise TimeoutError

        app = made(retriever=Handle(phrases=phrases))
        client(app).post(TRANSCRIBE, files=second, data=fields)
        return asked

    return ask


@pytest.mark.parametrize("name", ["context", "context[]", "keywords", "keywords[]"])
def test_phrases_come_under_every_name_that_clients_use(listed, name):
    assert listed(**{name: ["priya raghavan", "mira kapoor"]}) == ["priya raghavan", "mira kapoor"]
    assert listed(**{name: "priya raghavan"}) == ["priya raghavan"]


@pytest.mark.parametrize("name", ["context[]", "keywords[]"])
def test_digits_capitals_hyphens_and_accents_are_listened_for_as_they_are_given(listed, name):
    forms = ["A1C", "O'Brien-Smith", "Zoë", "5-HTP"]
    assert listed(**{name: forms}) == forms
    assert listed(prompt=", ".join(forms)) == forms


def test_phrases_of_several_names_are_listened_for_together(listed):
    fields = {"context": "one", "context[]": "two", "keywords[]": "three", "prompt": "four, five"}
    assert listed(**fields) == ["one", "two", "three", "four", "five"]


@pytest.mark.parametrize("brackets", ["", "[]"])
def test_lists_come_with_brackets_or_without(second, brackets):
    fields = {f"include{brackets}": "retrieval"}
    assert client(made()).post(TRANSCRIBE, files=second, data=fields).json()["words"] == []
    fields = {"response_format": "verbose_json", f"timestamp_granularities{brackets}": "word"}
    shown = client(made()).post(TRANSCRIBE, files=second, data=fields).json()
    assert "words" in shown and "segments" not in shown


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"promt": "a name"}, "promt", "unknown"),
        ({"contexts[]": "a"}, "contexts[]", "unknown"),
        ({"known_speaker_names[]": "a"}, "known_speaker_names[]", "unsupported_value"),
        ({"known_speaker_references": "a"}, "known_speaker_references", "unsupported_value"),
        ({"response_format": "diarized_json"}, "response_format", "unsupported_value"),
        ({"include[]": "speakers"}, "include[]", "unsupported_value"),
        ({"include": "retrieval", "include[]": "all"}, "include[]", "unsupported_value"),
        ({"include": "logprobs", "response_format": "text"}, "include[]", "unsupported_value"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy", "unsupported_value"),
        ({"chunking_strategy": "[" * 5000}, "chunking_strategy", "unsupported_value"),
        ({"language": ["en", "en"]}, "language", "unsupported_value"),
        ({"stream": "true", "response_format": "srt"}, "stream", "unsupported_value"),
        ({"include": "retrieval", "response_format": "vtt"}, "include[]", "unsupported_value"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities[]", "unsupported_value"),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_its_name(second, refused, fields, param, code):
    answer = client(made()).post(TRANSCRIBE, files=second, data=fields)
    assert param.removesuffix("[]") in refused(answer, 400, code, param)


@pytest.mark.parametrize("language", ["en", "EN", "en-US", "en_GB", "en-Latn-US", "English"])
def test_neither_a_region_nor_a_name_changes_a_language(second, language):
    for name in ("language", "languages[]", "languages"):
        answer = client(made()).post(TRANSCRIBE, files=second, data={name: language})
        assert answer.status_code == 200, answer.text


def test_a_language_that_is_not_understood_is_refused_under_both_names(second, refused):
    for name, param in [("language", "language"), ("languages[]", "languages[]")]:
        answer = client(made()).post(TRANSCRIBE, files=second, data={name: "xx-US"})
        assert "understands en" in refused(answer, 400, "unsupported_language", param)


def test_a_form_of_recordings_has_no_fields_that_nobody_reads(second, refused):
    for path, fields, param, code in [
        ("/v1/datastores", {"name": "a", "text": "b", "texts": "c"}, "texts", "unknown"),
        ("/v1/datastores", {"name": ["a", "b"], "text": "b"}, "name", "unsupported_value"),
        ("/v1/datastores/a/entries", {"name": "a", "text": "b"}, "name", "unknown"),
    ]:
        answer = client(made()).post(path, files=second, data=fields)
        refused(answer, 400, code, param)
    as_text = {"name": (None, "a"), "text": (None, "b"), "file": (None, "no file")}
    refused(client(made()).post("/v1/datastores", files=as_text), 422, "value_error", "file")


def test_a_parameter_that_no_route_knows_is_refused_by_its_name(refused):
    for path in ("/v1/models?limit=3", "/v1/datastores/a/entries?limit=3&offset=4"):
        param = "offset" if "offset" in path else "limit"
        assert repr(param) in refused(client(made()).get(path), 400, "unknown", param)


def test_a_parameter_given_twice_is_refused_and_nothing_is_deleted(refused):
    deleted = []

    async def remove(*arguments):
        deleted.append(arguments)
        return 1, 0

    app = client(made(retriever=Handle(remove=remove)))
    answer = app.delete("/v1/datastores/a/entries?document=one&document=two")
    assert "more than once" in refused(answer, 400, "unsupported_value", "document")
    assert not deleted


def test_too_many_in_a_form_is_said_of_the_field_that_was_sent(second, refused):
    fields = {"name": "a", "text": ["b"] * 4}
    answer = client(made(texts=3)).post("/v1/datastores", data=fields, files=second)
    assert "4 are too many, at most 3" in refused(answer, 400, None, "text")
    fields = {"context[]": ["b"] * 1_002}
    answer = client(made(phrases=1_001, upload_mb=1)).post(TRANSCRIBE, files=second, data=fields)
    assert "1002 are too many, at most 1001" in refused(answer, 400, None, "context[]")


def test_texts_have_a_length_together(second, refused):
    body = {"name": "a", "texts": ["a word " * 10, "b"]}
    answer = client(made(texts_length=50)).post("/v1/datastores", json=body)
    assert "70 characters in all, at most 50" in refused(answer, 400, None, "texts")
    fields = {"context[]": ["a word " * 10, "b"]}
    answer = client(made(texts_length=50)).post(TRANSCRIBE, files=second, data=fields)
    assert "at most 50 in a request" in refused(answer, 400, None, "context[]")


PATHS = {
    "/": "GET",
    "/healthz": "GET",
    "/page/page.js": "GET",
    "/v1/models": "GET",
    "/v1/models/mmrag": "GET",
}


@pytest.mark.parametrize("path", PATHS)
def test_head_says_what_get_says_without_the_body(path):
    with served(made()) as url:
        got, head = requests.get(url + path, timeout=10), requests.head(url + path, timeout=10)
    assert head.status_code == got.status_code == 200 and head.content == b""
    for name in ("Content-Type", "Content-Length", "Content-Security-Policy"):
        assert head.headers[name] == got.headers[name]


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/", {"GET"}),
        ("/healthz", {"GET"}),
        ("/page/page.js", {"GET"}),
        ("/v1/models/mmrag", {"GET"}),
        (TRANSCRIBE, {"POST"}),
        ("/v1/datastores", {"GET", "POST"}),
        ("/v1/datastores/a/entries", {"GET", "POST", "DELETE"}),
    ],
)
def test_options_names_the_methods_of_a_path(path, methods):
    answer = client(made()).options(path)
    assert (answer.status_code, answer.content) == (204, b"")
    more = {"HEAD"} if "GET" in methods else set()
    assert set(answer.headers["Allow"].split(", ")) == methods | more | {"OPTIONS"}


def test_a_path_that_leads_nowhere_has_no_methods(refused):
    refused(client(made()).options("/v1/nothing"), 404)
    assert client(made()).head("/v1/nothing").status_code == 404
    assert client(made()).head(TRANSCRIBE).status_code == 405


def test_openais_client_retrieves_the_model_by_its_id_and_by_others(refused):
    with served(made()) as url:
        models = OpenAI(base_url=f"{url}/v1", api_key="none").models
        [listed] = models.list().data
        assert models.retrieve("mmrag") == listed and "whisper-1" in listed.aliases
        alias = models.retrieve("whisper-1")
        assert (alias.id, alias.root, alias.aliases) == ("whisper-1", "mmrag", listed.aliases)
        with pytest.raises(
            openai.NotFoundError, match=r"no model 'whisper-2'.*'whisper-1'"
        ) as wrong:
            models.retrieve("whisper-2")
        assert (wrong.value.code, wrong.value.param) == ("model_not_found", "model")


def test_aliases_are_a_setting_and_may_hold_slashes(second, refused):
    app = made(settings={"aliases": ["Systran/faster-whisper-small"]})
    with served(app) as url:
        found = OpenAI(base_url=f"{url}/v1", api_key="none").models.retrieve(
            "Systran/faster-whisper-small"
        )
        assert found.root == "mmrag"
    asked = client(app).post
    model = {"model": "Systran/faster-whisper-small"}
    assert asked(TRANSCRIBE, files=second, data=model).status_code == 200
    for name in ("whisper-1", "gpt-4o-transcribe-diarize"):
        answer = asked(TRANSCRIBE, files=second, data={"model": name})
        message = refused(answer, 404, "model_not_found", "model")
        assert "this is 'mmrag', which also answers to 'Systran/faster-whisper-small'" in message
        assert ("no diarization" in message) == ("diarize" in name)


@pytest.mark.parametrize(
    ("fields", "cut"),
    [
        ({}, None),
        ({"chunking_strategy": ""}, None),
        ({"chunking_strategy": "auto"}, None),
        ({"chunking_strategy": '"auto"'}, None),
        ({"chunking_strategy": '{"type": "server_vad"}'}, (0.5, 300, 200)),
        ({"chunking_strategy[type]": "server_vad"}, (0.5, 300, 200)),
        (
            {
                "chunking_strategy[type]": "server_vad",
                "chunking_strategy[threshold]": "0.4",
                "chunking_strategy[prefix_padding_ms]": "0",
                "chunking_strategy[silence_duration_ms]": "900",
            },
            (0.4, 0, 900),
        ),
    ],
)
def test_an_upload_is_cut_as_the_form_says_however_it_says_so(second, fields, cut, monkeypatch):
    asked = []
    turns = cutting.turns

    def watched(*arguments, **settings):
        settings.pop("overlap")
        asked.append(tuple(settings.values()))
        return turns(*arguments, **settings)

    monkeypatch.setattr(cutting, "turns", watched)
    assert client(made()).post(TRANSCRIBE, files=second, data=fields).status_code == 200
    assert asked == ([cut] if cut else [])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"chunking_strategy": '{"type": "semantic_vad"}'}, "chunking_strategy[type]"),
        ({"chunking_strategy[threshold]": "0.4"}, "chunking_strategy[type]"),
        (
            {"chunking_strategy": '{"type": "server_vad", "threshold": 2}'},
            "chunking_strategy[threshold]",
        ),
        (
            {"chunking_strategy": '{"type": "server_vad", "threshold": NaN}'},
            "chunking_strategy[threshold]",
        ),
        (
            {"chunking_strategy": '{"type": "server_vad", "eagerness": "low"}'},
            "chunking_strategy[eagerness]",
        ),
        (
            {
                "chunking_strategy[type]": "server_vad",
                "chunking_strategy[silence_duration_ms]": "-1",
            },
            "chunking_strategy[silence_duration_ms]",
        ),
        (
            {"chunking_strategy": "auto", "chunking_strategy[type]": "server_vad"},
            "chunking_strategy",
        ),
    ],
)
def test_a_way_to_cut_that_cannot_be_is_refused_by_the_part_that_is_wrong(
    second, refused, fields, param
):
    answer = client(made()).post(TRANSCRIBE, files=second, data=fields)
    assert param in refused(answer, 400, "unsupported_value", param)


def test_unknown_fields_may_be_named_in_a_header_of_the_answer(second, refused):
    app = client(made(settings={"unknown_fields": "warn"}))
    fields = {"temperature_inc": "0.2", "no_context": ["a", "b"], 'qu"\\é\n': "1"}
    for more in ({}, {"stream": "true"}):
        answer = app.post(TRANSCRIBE, files=second, data={**fields, **more})
        assert answer.status_code == 200 and "a word" in answer.text
        code, agent, text = answer.headers["Warning"].split(" ", 2)
        assert (code, agent) == ("299", "-")
        assert text.startswith('"') and text.endswith('"') and text.count('"') == 2
        assert "temperature_inc, no_context, qu" in text
    assert "Warning" not in app.post(TRANSCRIBE, files=second).headers
    many = {f"field{n}": "x" for n in range(100)}
    assert len(app.post(TRANSCRIBE, files=second, data=many).headers["Warning"]) < 300
    for name in ("known_speaker_names[]", "promt"):
        answer = app.post(TRANSCRIBE, files=second, data={name: "a", "language": "xx"})
        refused(
            answer,
            400,
            *{"promt": ("unsupported_language", "language")}.get(name, ("unsupported_value", name)),
        )


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "whisper-1", "language": "en", "prompt": "", "response_format": "json"},
        {"model": "gpt-4o-mini-transcribe", "language": "auto", "temperature": "0.0"},
        {"model": "", "language": "", "temperature": "", "response_format": "", "stream": ""},
        {"model": "whisper-1", "temperature": "0", "stream": "False", "chunking_strategy": ""},
    ],
)
def test_what_clients_in_use_send_is_taken(second, fields):
    """Voice assistants, agents and scripts that were written for other servers."""
    answer = client(made()).post(TRANSCRIBE, files=second, data=fields)
    assert answer.status_code == 200, answer.text


def test_hotwords_are_names_as_a_prompt_is(listed):
    fields = {"prompt": "mira kapoor", "hotwords": "priya raghavan, quentin ashdown"}
    assert listed(**fields) == ["mira kapoor", "priya raghavan", "quentin ashdown"]


def test_nothing_is_translated_and_the_answer_says_so(second, refused, monkeypatch):
    with served(made(upload_mb=2)) as url:
        translate = OpenAI(base_url=f"{url}/v1", api_key="none").audio.translations.create
        for file in (second["file"], ("a.wav", bytes(1_900_000))):
            with pytest.raises(openai.BadRequestError, match="nothing is translated here"):
                translate(model="whisper-1", file=file)
    asked = client(made())
    refused(asked.post("/v1/audio/translations", files=second), 400, "unsupported")
    monkeypatch.setenv("MMRAG_API_KEYS", "one")
    answer = client(made()).post("/v1/audio/translations", files=second)
    refused(answer, 401, "invalid_api_key")
