"""Calls of deployments whose replica, or whose result, is lost."""

import asyncio

import pytest
from application import Handle
from ray.exceptions import ActorDiedError, ObjectLostError
from ray.serve.exceptions import DeploymentUnavailableError

from mmrag.config import ConfigError
from serve import pipeline
from serve.messages import Unavailable
from serve.pipeline import ATTEMPTS, Pipeline
from serve.settings import read

LOST = [ActorDiedError(), ObjectLostError("00", None, ""), DeploymentUnavailableError(None)]


class Losing:
    """Answers once it has raised each of `errors`."""

    def __init__(self, *errors):
        self.errors = list(errors)

    async def encode(self, wave):
        if self.errors:
            raise self.errors.pop(0)
        return f"heard {wave}"


@pytest.fixture
def call(monkeypatch):
    """`call(losing)`: what its call is answered, without waiting between attempts."""
    monkeypatch.setattr(pipeline, "PAUSE_SECONDS", 0)

    def run(losing):
        encoder = Handle(encode=losing.encode)
        calls = Pipeline(read({}), encoder, Handle(), Handle())
        return asyncio.run(calls.call(encoder.encode, "a wave"))

    return run


@pytest.mark.parametrize("lost", LOST, ids=lambda error: type(error).__name__)
def test_a_call_that_was_lost_is_made_again(call, lost):
    assert call(Losing(lost)) == "heard a wave"


def test_one_that_is_lost_time_and_again_says_that_it_may_succeed_later(call):
    losing = Losing(*[LOST[0]] * (ATTEMPTS + 1))
    with pytest.raises(Unavailable, match="try again"):
        call(losing)
    assert len(losing.errors) == 1


def test_what_is_wrong_with_the_request_is_raised_at_once(call):
    losing = Losing(ConfigError("no"), LOST[0])
    with pytest.raises(ConfigError):
        call(losing)
    assert len(losing.errors) == 1
