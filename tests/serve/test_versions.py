"""Which version of a registered model is served while its alias moves; Ray Serve is feigned."""

import asyncio
from types import SimpleNamespace

import pytest
from ray.serve.schema import ApplicationStatus

from mmrag.config import ConfigError
from serve.operations import replacement
from serve.operations.replacement import Models
from serve.settings import read

GIVEN = {"model": "models:/m@production", "model_check_s": 0.01, "ingress.drain_s": 0.3}


class Cluster:
    """A registry whose alias can be moved, and the applications that were started."""

    def __init__(self):
        self.version, self.broken, self.started = 1, set(), []
        self.status = {"app": ApplicationStatus.RUNNING}

    def pinned(self, settings):
        return settings.model_copy(update={"model": f"models:/m/{self.version}"})

    def described(self, settings):
        self.started.append(settings.model)
        if settings.model in self.broken:
            raise ValueError("damaged")

    def run(self, settings, application):
        self.status[application] = ApplicationStatus.RUNNING

    def delete(self, application, _blocking=True):
        self.status.pop(application, None)

    @property
    def versions(self):
        return sorted(name.split("-")[1] for name in self.status if name != "app")


@pytest.fixture
def cluster(monkeypatch):
    made = Cluster()
    context = SimpleNamespace(app_name="app")

    def status():
        found = {name: SimpleNamespace(status=one) for name, one in made.status.items()}
        return SimpleNamespace(applications=found)

    feigned = SimpleNamespace(
        get_replica_context=lambda: context, status=status, delete=made.delete
    )
    monkeypatch.setattr(replacement, "serve", feigned)
    monkeypatch.setattr(replacement, "pinned", made.pinned)
    monkeypatch.setattr(replacement, "described", made.described)
    monkeypatch.setattr(replacement, "_run", made.run)
    monkeypatch.setattr(replacement, "POLL_SECONDS", 0.01)
    return made


async def models():
    made = Models.__new__(Models)
    await made.__init__(read(GIVEN))
    return made


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_the_old_version_ends_when_no_ingress_has_a_request_with_it(cluster):
    async def run():
        owner = await models()
        old = await owner.current("ingress")
        cluster.version = 2
        await until(lambda: owner._served.model == "models:/m/2")
        for _ in range(5):
            new = await owner.current("ingress", frozenset({old.application, "new"}))
            await asyncio.sleep(0.02)
        both = cluster.versions
        await owner.current("ingress", frozenset({new.application}))
        await until(lambda: cluster.versions == ["v2"])
        return old.model, new.model, both

    assert asyncio.run(run()) == ("models:/m/1", "models:/m/2", ["v1", "v2"])


def test_an_ingress_that_stays_with_the_old_one_keeps_it_no_longer_than_a_request_may_take(cluster):
    async def run():
        owner = await models()
        old = await owner.current("ingress")
        cluster.version = 2
        await until(lambda: owner._served.model == "models:/m/2")
        async with asyncio.timeout(10):
            while cluster.versions != ["v2"]:
                await owner.current("ingress", frozenset({old.application}))
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_version_that_cannot_be_loaded_is_tried_again_less_and_less_often(cluster):
    async def run():
        owner = await models()
        cluster.version = 2
        cluster.broken.add("models:/m/2")
        await until(lambda: cluster.started.count("models:/m/2") == 3)
        [(_, pause)] = owner._given_up.values()
        served = await owner.current("ingress")
        cluster.broken.clear()
        await until(lambda: owner._served.model == "models:/m/2")
        return pause, served.model, owner._given_up

    assert asyncio.run(run()) == (pytest.approx(0.08), "models:/m/1", {})


def test_whoever_takes_its_place_finds_what_is_served(cluster):
    async def run():
        first = await models()
        for task in first._tasks:
            task.cancel()
        second = await models()
        return first._served == second._served

    assert asyncio.run(run()) and cluster.started == ["models:/m/1"]


@pytest.mark.parametrize(("state", "left"), [("DELETING", []), ("DEPLOYING", ["v1"])])
def test_versions_end_with_the_service_and_not_with_a_replica(cluster, state, left):
    async def run():
        owner = await models()
        cluster.status["app"] = ApplicationStatus(state)
        await owner.__del__()

    asyncio.run(run())
    assert cluster.versions == left


@pytest.mark.parametrize("model", ["mmrag:tiny", "models:/m/3"])
def test_only_an_alias_can_be_watched(model):
    with pytest.raises(ConfigError, match="only the alias of a registered model can be moved"):
        read(GIVEN | {"model": model})
