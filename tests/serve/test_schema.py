"""What a request may say: texts that can be spoken; a prompt is listened to as far as it can be."""

import pytest

from mmrag import shipped
from mmrag.model.vocabulary import Vocabulary
from serve import schema
from serve.errors import ApiError
from serve.forms import TranscriptionForm
from serve.settings import read

VOCABULARY = Vocabulary.load(shipped.find(shipped.TINY) / "lm")
SETTINGS = read({})


def texts(*given, most=10):
    return schema.bounded_texts(given, most, "texts", SETTINGS.limits, VOCABULARY)


def phrases(context, prompt):
    """What a request with this context and prompt listens for."""
    form = TranscriptionForm(file=None, context=context, prompt=prompt)
    return [one.text for one in form.phrases(SETTINGS, VOCABULARY)]


def test_texts_keep_the_writing_of_who_sent_them():
    assert texts("Renée  Dubois", " ", "A1C\0", "5-HTP") == ["Renée Dubois", "A1C", "5-HTP"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---", "texts: nothing to listen for in '---'"),
        ("日本", "texts: '日本' cannot be spoken: this model has no letters for '日', '本'"),
    ],
)
def test_a_text_that_cannot_be_spoken_is_refused_by_name(text, message):
    with pytest.raises(ApiError) as refused:
        texts("rome", text)
    assert (refused.value.status, refused.value.param) == (400, "texts")
    assert refused.value.message == message


@pytest.mark.parametrize("part", ["---", "😀", "日" * 500, "x" * 5000, "日本 tower", ""])
def test_what_a_prompt_holds_besides_names_is_passed_over(part):
    assert phrases(["rome"], f"Renée Dubois, {part}\nMira Kapoor;") == [
        "rome",
        "Renée Dubois",
        "Mira Kapoor",
    ]


def test_too_many_names_in_a_prompt_are_the_prompts_fault():
    most = SETTINGS.limits.phrases
    names = ",".join(f"name {number}" for number in range(most))
    assert len(phrases([], names)) == most
    with pytest.raises(ApiError) as refused:
        phrases(["rome"], names)
    assert (refused.value.status, refused.value.param) == (400, "prompt")


@pytest.mark.parametrize("text", ["---", "日本"])
def test_in_a_context_nothing_is_passed_over(text):
    with pytest.raises(ApiError) as refused:
        phrases([text], "Mira Kapoor")
    assert (refused.value.status, refused.value.param) == (400, "context[]")
