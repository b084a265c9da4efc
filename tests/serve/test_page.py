"""The page in a browser: a name is heard wrongly, added, and heard; the word says why. Words come
while they are spoken."""

import json
import shutil
from collections.abc import Iterator
from urllib.parse import urlsplit

import numpy as np
import pytest

SENTENCE = "please call priya raghavan tomorrow"
NAME = "priya raghavan"
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]

SPEAKING = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def chromium():
    """What starts Debian's Chromium, driven by Playwright, with these options."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("the page needs a browser: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield lambda *more: playwright.chromium.launch(executable_path=path, args=[*OPTIONS, *more])


@pytest.fixture(scope="module")
def browser(chromium):
    """One without a microphone."""
    browser = chromium()
    yield browser
    browser.close()


def watched(browser, complaints, hosts):
    """A new page; what it complains of, and whom it asks for anything, is added to those."""

    def hear(said):
        refused = said.text.startswith(
            "Failed to load resource"
        )  # said of every status from 400 on
        if said.type == "error" and not refused:
            complaints.append(said.text)

    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.set_default_timeout(20_000)
    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
    return page


@pytest.fixture
def page(browser, service) -> Iterator:
    """The page, which must not complain and must ask nobody but the service for anything."""
    complaints, hosts = [], set()
    page = watched(browser, complaints, hosts)
    page.goto(service.url)
    yield page
    page.close()
    assert complaints == []
    assert hosts - {""} == {urlsplit(service.url).netloc}


@pytest.fixture
def recording(clip, tmp_path):
    path = tmp_path / "recording.flac"
    path.write_bytes(clip(SENTENCE))
    return path


@pytest.fixture
def store(service):
    """The name of a datastore that the page makes; it goes when the test ends."""
    yield "colleagues"
    service.request("DELETE", "/v1/datastores/colleagues")


def transcribed(page):
    """The words of the transcript, once it is whole."""
    transcript = page.locator("#transcript")
    transcript.and_(page.locator("#transcript:not([aria-busy]):not(:empty)")).wait_for()
    return transcript.inner_text()


def test_a_name_is_added_on_the_page_and_the_next_transcript_has_it(
    page, service, recording, store, tmp_path
):
    page.set_input_files("#file", recording)
    page.click("#transcribe")
    before = transcribed(page)
    assert before.startswith("please call") and NAME not in before
    assert page.locator("#transcript .word").count() == 0, "nothing was looked up"

    page.fill("#names", f"{NAME}\nimogen varga")
    page.fill("#store-name", store)
    page.click("#add")
    page.locator("#again").wait_for()
    assert "2 names added" in page.inner_text("#status")
    assert page.input_value("#datastore") == store
    assert service.request("GET", f"/v1/datastores/{store}").json()["documents"] == 2

    page.click("#again")
    page.locator("#transcript .word").first.wait_for()
    assert transcribed(page) == SENTENCE
    assert page.inner_text("#previous-text") == before
    word = page.locator("#transcript .word", has_text="raghavan")
    word.click()
    evidence = page.inner_text("#evidence")
    assert "Why “raghavan”" in evidence and NAME in evidence
    assert "Language model alone" in evidence and "With retrieval" in evidence
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.keyboard.press("Escape")
    assert page.inner_text("#evidence") == ""


def test_without_retrieval_the_page_shows_what_the_model_hears_alone(
    page, service, recording, store
):
    service.create(store, NAME)
    page.reload()
    page.set_input_files("#file", recording)
    page.select_option("#datastore", store)
    for mode, hears in [("both", True), ("none", False), ("knn", True), ("cross_attention", True)]:
        page.select_option("#retrieval", mode)
        with page.expect_response("**/v1/audio/transcriptions") as answer:
            page.click("#transcribe")
        answer.value.finished()
        assert (transcribed(page) == SENTENCE) == hears, mode


def test_a_spotted_phrase_stands_behind_its_words_and_retrieval_behind_no_others(
    page, recording, service, store
):
    """As a model answers whose encoder spells: there, the sound changes words, too."""
    service.create(store, NAME)
    page.reload()
    given = {"entry": -1, "distance": None, "attention": None, "document": NAME, "utterance": ""}
    proof = {"probability": 0.1, "lm_probability": 0.01, "start": 0.0, "end": 0.5, "changed": True}
    words = [
        proof | {"word": word, "source": given | {"text": NAME} if word in NAME.split() else None}
        for word in SENTENCE.split()
    ]
    done = {"type": "transcript.text.done", "text": SENTENCE, "duration": 2.0, "words": words}
    sent = []

    def answer(route):
        sent.append(route.request.post_data_buffer)
        body = f"data: {json.dumps(done)}\n\n"
        route.fulfill(body=body, content_type="text/event-stream")

    page.route("**/v1/audio/transcriptions", answer)
    page.set_input_files("#file", recording)
    page.select_option("#datastore", store)
    assert page.input_value("#retrieval") == "auto"
    assert page.locator("#retrieval [value=spotting]").is_disabled(), "the tiny model cannot"
    page.click("#transcribe")
    assert transcribed(page) == SENTENCE
    assert b'name="retrieval"' not in sent[0] and b'name="datastore"' in sent[0]
    assert page.inner_text("#how").endswith(f"{store} (1 document)")
    assert page.locator("#transcript .word").all_inner_texts() == NAME.split()
    assert "2 changed by retrieval" in page.inner_text("#status")
    page.locator("#transcript .word").first.click()
    assert "It was spotted in what was heard" in page.inner_text("#evidence")
    assert "-1" not in page.inner_text("#evidence")


def test_words_that_are_unclear_are_grey_and_said_to_be(page, wave, write, tmp_path):
    path = tmp_path / "backwards.wav"
    path.write_bytes(write(wave(SENTENCE)[::-1].copy(), "WAV"))
    page.set_input_files("#file", path)
    page.click("#transcribe")
    words = transcribed(page).split()
    assert words and page.locator("#transcript .unclear").count() == len(words)
    assert "all unclear" in page.inner_text("#status")
    assert "unclear" in page.inner_text("#legend")


def test_what_cannot_be_read_is_said_and_the_page_goes_on(page, recording, tmp_path):
    (tmp_path / "no audio.wav").write_bytes(b"to whom it may concern")
    page.set_input_files("#file", tmp_path / "no audio.wav")
    page.click("#transcribe")
    page.locator("#alert:not(:empty)").wait_for()
    assert "cannot be read as audio" in page.inner_text("#alert")
    page.set_input_files("#file", recording)
    page.click("#transcribe")
    assert transcribed(page).startswith("please call")
    assert page.inner_text("#alert") == ""


def test_a_name_is_removed_on_the_page(page, service, recording, store):
    service.create(store, NAME, "imogen varga")
    page.reload()
    page.select_option("#datastore", store)
    page.click(f"button[aria-label='Remove {NAME}']")
    page.locator(f"#entries li[data-document='{NAME}']").wait_for(state="detached")
    left = service.request("GET", f"/v1/datastores/{store}/entries").json()["data"]
    assert [one["document"] for one in left] == ["imogen varga"]


def test_names_are_text_and_never_markup(page, service, store):
    evil = "<img src=x onerror=alert(1)>"
    service.create(store, evil)
    page.reload()
    page.select_option("#datastore", store)
    page.locator("#entries li").wait_for()
    assert evil in page.inner_text("#entries")
    assert page.locator("#entries img").count() == 0


def test_the_documentation_opens(browser, service):
    complaints, hosts = [], set()
    page = watched(browser, complaints, hosts)
    page.goto(f"{service.url}/docs")
    page.get_by_text("/v1/audio/transcriptions").first.wait_for()
    page.close()
    assert complaints == [] and hosts - {""} == {urlsplit(service.url).netloc}


@pytest.fixture(scope="module")
def talkative(chromium, tmp_path_factory):
    """A browser whose microphone hears a file again and again; called with the samples."""
    started = []

    def start(samples, write):
        path = tmp_path_factory.mktemp("microphone") / "spoken.wav"
        path.write_bytes(write(samples, "WAV"))
        started.append(chromium(*SPEAKING, f"--use-file-for-fake-audio-capture={path}"))
        return started[-1]

    yield start
    for browser in started:
        browser.close()


@pytest.fixture(scope="module")
def spoken(wave):
    """The sentence, and silence around it (T,)."""
    quiet = np.zeros(16_000, np.float32)
    return np.concatenate((quiet, wave(SENTENCE), quiet))


@pytest.fixture
def live(talkative, spoken, write, service) -> Iterator:
    """The page in a browser that hears the sentence; it must not complain."""
    complaints, hosts = [], set()
    browser = talkative(spoken, write)
    page = watched(browser, complaints, hosts)
    page.set_default_timeout(60_000)
    page.goto(service.url)
    yield page
    page.close()
    assert complaints == []
    assert hosts - {""} == {urlsplit(service.url).netloc}


def finish_recording(page):
    page.click("#record")
    page.locator("#heard:not([hidden])").wait_for()


def test_words_appear_while_somebody_speaks_and_a_name_is_heard_once_it_is_added(
    live, service, store, tmp_path
):
    live.click("#record")
    live.locator("#transcript [data-turn]").first.wait_for()
    assert "please" in live.inner_text("#transcript")
    assert NAME not in live.inner_text("#transcript"), "nobody has told it"
    assert live.locator("#heard").is_hidden(), "it goes on"
    live.fill("#names", NAME)
    live.fill("#store-name", store)
    live.click("#add")
    live.locator("#transcript [data-turn]", has_text=NAME).first.wait_for()
    live.locator("#status", has_text="1 name added").wait_for()
    live.screenshot(path=tmp_path / "live.png")
    finish_recording(live)
    turns = live.locator("#transcript [data-turn]").all_inner_texts()
    assert any(NAME in turn for turn in turns)
    said = live.locator("#spoken p").all_inner_texts()
    assert said == turns, "each turn is read aloud once, when it is whole"
    assert live.inner_text("#transcribe") == "Transcribe again"


def test_a_connection_that_breaks_is_made_again_and_no_word_is_lost(live):
    sockets = []

    def through(socket):
        sockets.append((socket, socket.connect_to_server()))

    live.route_web_socket("**/v1/realtime*", through)
    live.click("#record")
    live.locator("#transcript [data-turn]").first.wait_for()
    for socket in sockets[0]:
        socket.close(code=1012)
    live.locator("#status", has_text="The connection was lost").wait_for()
    live.locator("#status", has_text="Listening").wait_for()
    live.locator("#transcript [data-turn]").nth(1).wait_for()
    finish_recording(live)
    turns = live.locator("#transcript [data-turn]").all_inner_texts()
    assert len(sockets) == 2
    assert all(turn.startswith("please call") for turn in turns[:-1])


def test_where_the_server_takes_no_live_speech_the_recording_is_uploaded(live):
    live.route_web_socket("**/v1/realtime*", lambda socket: socket.close(code=1013))
    live.click("#record")
    live.locator("#status", has_text="the recording is kept").wait_for()
    live.wait_for_timeout(4000)
    live.click("#record")
    assert transcribed(live).startswith("please call")


@pytest.mark.parametrize(
    ("microphone", "told"),
    [
        ("undefined", "https pages and to localhost alone"),
        (
            "{getUserMedia: async () => { throw new DOMException('', 'NotAllowedError') }}",
            "refused",
        ),
        ("{getUserMedia: async () => { throw new DOMException('', 'NotFoundError') }}", "No micro"),
    ],
)
def test_why_there_is_no_microphone_is_said(page, service, microphone, told):
    value = f"Object.defineProperty(navigator, 'mediaDevices', {{value: {microphone}}})"
    page.add_init_script(value)
    page.goto(service.url)
    page.click("#record")
    page.locator("#alert", has_text=told).wait_for()
    assert page.inner_text("#record") == "Record" and page.locator("#record").is_enabled()
