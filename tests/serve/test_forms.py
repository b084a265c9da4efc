"""What callers send is used or refused by name: fields, parameters, methods."""

import openai
import pytest
import requests
from application import TRANSCRIBE, Handle, client, made, served
from openai import OpenAI


@pytest.fixture
def listed(second, monkeypatch):
    """`listed(**fields)`: the phrases that a request with these fields listens for."""

    def ask(**fields):
        asked = []

        async def phrases(texts):
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
        ({"known_speaker_names[]": "a"}, "known_speaker_names[]", "unknown"),
        ({"include[]": "logprobs"}, "include[]", "unsupported_value"),
        ({"include": "retrieval", "include[]": "logprobs"}, "include[]", "unsupported_value"),
        ({"chunking_strategy": "server_vad"}, "chunking_strategy", "unsupported_value"),
        ({"chunking_strategy[type]": "server_vad"}, "chunking_strategy[type]", "unknown"),
        ({"language": ["en", "en"]}, "language", "unsupported_value"),
        ({"stream": "true", "response_format": "srt"}, "stream", "unsupported_value"),
        ({"include": "retrieval", "response_format": "vtt"}, "include[]", "unsupported_value"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities[]", "unsupported_value"),
    ],
)
def test_a_field_that_is_not_served_is_refused_by_its_name(second, refused, fields, param, code):
    answer = client(made()).post(TRANSCRIBE, files=second, data=fields)
    assert param.removesuffix("[]") in refused(answer, 400, code, param)


def test_openais_client_may_send_its_own_fields(second):
    with served(made()) as url:
        create = OpenAI(base_url=f"{url}/v1", api_key="none").audio.transcriptions.create
        assert create(model="mmrag", chunking_strategy="auto", **second).text == "a word"
        with pytest.raises(openai.BadRequestError, match="logprobs") as wrong:
            create(model="mmrag", include=["logprobs"], **second)
        assert wrong.value.param == "include[]"
        with pytest.raises(openai.BadRequestError, match="chunking_strategy"):
            create(model="mmrag", chunking_strategy={"type": "server_vad"}, **second)


@pytest.mark.parametrize("language", ["en", "EN", "en-US", "en_GB", "en-Latn-US"])
def test_a_region_does_not_change_a_language(second, language):
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


def test_openais_client_retrieves_the_model_by_its_id(refused):
    with served(made()) as url:
        models = OpenAI(base_url=f"{url}/v1", api_key="none").models
        assert models.retrieve("mmrag") == models.list().data[0]
        with pytest.raises(openai.NotFoundError, match="no model 'whisper-1'") as missing:
            models.retrieve("whisper-1")
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
