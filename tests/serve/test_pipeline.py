"""What a request is refused for before anything of it is transcribed."""

import pytest
from application import TRANSCRIBE, client, made


@pytest.mark.parametrize("stream", ["false", "true"])
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"retrieval": "both"}, "retrieval both needs a datastore or context"),
        ({"retrieval": "both", "context": "a"}, "retrieval both needs an adapter"),
        ({"retrieval": "cross_attention", "context": "a"}, "needs an adapter"),
        ({"retrieval": "spotting", "context": "a"}, "needs an encoder that spells"),
    ],
)
def test_a_way_that_the_model_has_not_is_refused_before_a_stream_begins(
    refused, second, stream, asked, message
):
    answer = client(made()).post(TRANSCRIBE, files=second, data={"stream": stream, **asked})
    assert message in refused(answer, 400, None, "retrieval")
