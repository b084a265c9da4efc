"""What tenants may have at a time, here and at every other replica, and what they have used."""

import asyncio
import itertools
import json
from contextlib import nullcontext, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError

from serve.access.accounting import Accounting
from serve.access.keys import Caller
from serve.access.ledger import GONE_SECONDS, Ledger
from serve.access.places import Places
from serve.access.quotas import Quotas
from serve.access.tenants import Tenant
from serve.access.usage import Others, Report, Used
from serve.errors import ApiError, headers
from serve.settings import TenantQuotas


class Clock:
    """Seconds, as a test says."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def caller(name="acme", **quotas):
    return Caller(Tenant(name, TenantQuotas(**quotas)))


def code(call, *arguments):
    """The code of the refusal."""

    def tried():
        with call(*arguments) or nullcontext():
            pass

    with pytest.raises(ApiError) as refused:
        tried()
    assert refused.value.status == 429
    return refused.value.code


@pytest.mark.parametrize("what", ["request", "session"])
def test_so_many_at_a_time_and_no_more(clock, what):
    quotas, acme, globex = Quotas(clock), caller(**{f"{what}s": 2}), caller("globex")
    begin = getattr(quotas, what)
    with begin(acme), begin(globex):
        with begin(acme):
            assert code(begin, acme) == f"quota_{what}s"
            with begin(globex):  # nobody else is in its way
                pass
        with begin(acme):
            pass
    with begin(acme), begin(acme):
        pass


def test_a_request_that_fails_is_no_longer_in_flight(clock):
    quotas, acme = Quotas(clock), caller(requests=1)
    for _ in range(3):
        with pytest.raises(KeyError), quotas.request(acme):
            raise KeyError
    with quotas.request(acme):
        pass


def test_without_quotas_there_is_no_end(clock):
    quotas = Quotas(clock)
    for _ in range(100):
        quotas.audio(caller(), 1e6)
    assert quotas.headers(caller()) == {}


def test_audio_comes_back_as_the_minute_passes(clock):
    quotas, acme = Quotas(clock), caller(audio_seconds=60)
    quotas.audio(acme, 40)
    with pytest.raises(ApiError, match=r"20 s are left, and this has 30 s") as refused:
        quotas.audio(acme, 30)
    assert refused.value.code == "quota_audio_seconds"
    assert headers(refused.value)["Retry-After"] == "10"
    quotas.audio(caller("globex", audio_seconds=60), 60)
    clock.now += 10
    quotas.audio(acme, 30)
    assert code(quotas.audio, acme, 1) == "quota_audio_seconds"


def test_more_than_a_minutes_audio_comes_in_at_once_and_is_waited_for_afterwards(clock):
    quotas, acme = Quotas(clock), caller(audio_seconds=60)
    quotas.audio(acme, 600)
    clock.now += 539
    assert code(quotas.audio, acme, 1) == "quota_audio_seconds"
    clock.now += 2
    quotas.audio(acme, 1)
    assert code(quotas.audio, acme, 600) == "quota_audio_seconds", "only when none is missing"


def test_a_caller_is_told_what_is_left(clock):
    quotas, acme = Quotas(clock), caller(audio_seconds=120, requests=3)
    quotas.audio(acme, 20)
    with quotas.request(acme):
        assert quotas.headers(acme) == {
            "x-ratelimit-limit-requests": "3",
            "x-ratelimit-remaining-requests": "2",
            "x-ratelimit-reset-requests": "0s",
            "x-ratelimit-limit-audio-seconds": "120",
            "x-ratelimit-remaining-audio-seconds": "100",
            "x-ratelimit-reset-audio-seconds": "10s",
        }


def exchange(ledger, **replicas):
    """Every replica reports, and hears of the others."""
    for name, quotas in replicas.items():
        report = quotas.report()
        quotas.told(report, ledger.report(name, next(NUMBERS), report))


NUMBERS = itertools.count()


def test_replicas_hear_of_each_others_requests(clock):
    ledger, one, two = Ledger(None, clock), Quotas(clock), Quotas(clock)
    acme = caller(requests=2)
    with one.request(acme), one.request(acme):
        with two.request(acme):  # within the second
            pass
        exchange(ledger, one=one, two=two)
        assert code(two.request, acme) == "quota_requests"
        with two.request(caller("globex", requests=2)):
            pass
    exchange(ledger, one=one, two=two)
    with two.request(acme):
        pass


def test_a_replica_that_is_gone_has_nothing_in_flight(clock):
    ledger, one, two, acme = Ledger(None, clock), Quotas(clock), Quotas(clock), caller(requests=1)
    with one.request(acme):
        exchange(ledger, one=one, two=two)
        assert code(two.request, acme) == "quota_requests"
        clock.now += GONE_SECONDS + 1
        exchange(ledger, two=two)
        with two.request(acme):
            pass


def test_replicas_share_one_minute_of_audio(clock):
    ledger, one, two = Ledger(None, clock), Quotas(clock), Quotas(clock)
    acme = caller(audio_seconds=60)
    one.audio(acme, 30)
    exchange(ledger, one=one, two=two)
    two.audio(acme, 20)
    exchange(ledger, two=two, one=one)
    assert code(one.audio, acme, 11) == code(two.audio, acme, 11) == "quota_audio_seconds"
    clock.now += 30
    exchange(ledger, one=one, two=two)
    one.audio(acme, 40)
    exchange(ledger, one=one, two=two)
    assert code(two.audio, acme, 1) == "quota_audio_seconds"


def test_a_ledger_that_was_started_again_learns_what_is_missing(clock):
    one, two, acme = Quotas(clock), Quotas(clock), caller(audio_seconds=60)
    one.audio(acme, 60)
    exchange(Ledger(None, clock), one=one)
    exchange(Ledger(None, clock), one=one, two=two)
    assert code(one.audio, acme, 1) == code(two.audio, acme, 1) == "quota_audio_seconds"


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0.1, 90), st.floats(0, 40)), max_size=30))
def test_replicas_that_exchange_after_each_upload_are_as_one(uploads):
    clock, acme = Clock(), caller(audio_seconds=60)
    alone, ledger = Quotas(clock), Ledger(None, clock)
    three = {name: Quotas(clock) for name in ("a", "b", "c")}
    for which, seconds, pause in uploads:
        answers = []
        for quotas in (alone, list(three.values())[which]):
            try:
                quotas.audio(acme, seconds)
                answers.append(None)
            except ApiError as error:
                answers.append(error.message)
        assert answers[0] == answers[1]
        exchange(ledger, **three)
        exchange(ledger, **three)
        clock.now += pause


@given(st.lists(st.tuples(st.floats(0.1, 90), st.floats(0, 40), st.booleans()), max_size=30))
def test_a_replica_alone_is_exact_whenever_it_reports(uploads):
    clock, acme = Clock(), caller(audio_seconds=60)
    alone, reporting, ledger = Quotas(clock), Quotas(clock), Ledger(None, clock)
    for seconds, pause, reports in uploads:
        answers = []
        for quotas in (alone, reporting):
            try:
                quotas.audio(acme, seconds)
                answers.append(None)
            except ApiError as error:
                answers.append(error.message)
        assert answers[0] == answers[1]
        clock.now += pause
        if reports:
            exchange(ledger, one=reporting)


def test_usage_is_there_after_a_restart(tmp_path, clock):
    for day in range(3):
        quotas = Quotas(clock)
        with quotas.request(caller()):
            quotas.audio(caller(), 1.5)
            quotas.tokens(caller(), 7)
        report = quotas.report()
        assert report.used == {"acme": Used(1, 0, 1.5, 7)}
        Ledger(tmp_path).report("one", day, Report(used=report.used, day=f"2026-11-{day // 2:02}"))
    assert Ledger(tmp_path).usage("acme") == {
        "2026-11-01": Used(1, 0, 1.5, 7),
        "2026-11-00": Used(2, 0, 3.0, 14),
    }
    assert Ledger(tmp_path).usage("globex") == {}


def test_a_report_that_is_made_again_counts_once_even_after_a_restart(tmp_path):
    report = Report(used={"acme": Used(requests=1)}, day="2026-11-27")
    for ledger in (Ledger(tmp_path), Ledger(tmp_path)):
        for _ in range(2):
            ledger.report("one", 5, report)
    assert ledger.usage("acme") == {"2026-11-27": Used(requests=1)}
    ledger.report("one", 6, report)
    ledger.report("two", 1, report)
    assert ledger.usage("acme") == {"2026-11-27": Used(requests=3)}


def test_usage_keeps_so_many_days_and_replicas(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    monkeypatch.setattr("serve.access.ledger.KEPT_DAYS", 40)
    for number in range(45):
        day = f"{2000 + number // 300}-{number % 300:03}"
        ledger.report(f"replica {number}", 1, Report(used={"acme": Used(1)}, day=day))
    assert len(ledger.usage("acme")) == 40
    assert len(json.loads((tmp_path / "acme.json").read_text())["reports"]) == 32


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"days": {"x": {"tea": 1}}, "reports": {}}'])
def test_a_damaged_record_is_put_aside(tmp_path, caplog, damage):
    (tmp_path / "acme.json").write_text(damage)
    ledger = Ledger(tmp_path)
    ledger.report("one", 1, Report(used={"acme": Used(1)}, day="2026-11-27"))
    assert ledger.usage("acme") == {"2026-11-27": Used(1)}
    assert (tmp_path / "acme.unreadable").read_text() == damage and "put aside" in caplog.text


class Flaky:
    """A ledger whose answers get lost, as a test says."""

    def __init__(self, lost):
        self.ledger, self.lost = Ledger(None), iter(lost)

    async def report(self, *report) -> Others:
        lost = next(self.lost, None)
        if lost == "before":
            raise ActorDiedError()
        told = self.ledger.report(*report)
        if lost == "after":
            raise TimeoutError
        return told

    async def usage(self, tenant):
        return self.ledger.usage(tenant)


@given(st.lists(st.sampled_from([None, "before", "after"]), max_size=12))
def test_usage_counts_once_whatever_gets_lost(lost):
    async def run():
        quotas = Quotas()
        accounting = Accounting(quotas, Flaky(lost))
        for number in range(len(lost)):
            quotas.tokens(caller(), number)
            with suppress(ActorDiedError, TimeoutError):
                await accounting.exchange()
        await accounting.exchange()  # what was not answered, as it was
        return await accounting.usage("acme")

    expected = sum(range(len(lost)))
    assert sum(used.tokens for used in asyncio.run(run()).values()) == expected


def take_all(places, tenant):
    """As many as the tenant gets."""
    count = 0
    while places.has_room(tenant):
        places.take(tenant)
        count += 1
    return count


def test_a_tenant_alone_has_every_place():
    places = Places(16, lambda: 1)
    assert take_all(places, "acme") == 16 == places.taken
    assert not places.has_room("globex")


def test_a_tenant_with_much_leaves_room_for_others():
    places = Places(16, lambda: 2)
    assert take_all(places, "acme") == 12
    assert take_all(places, "globex") == 4


@pytest.mark.parametrize("total", [2, 3, 16, 33])
def test_the_others_reach_their_share_as_places_become_free(total):
    places = Places(total, lambda: 3)
    had, own = take_all(places, "acme"), take_all(places, "globex")
    for _ in range(had):  # whatever becomes free, both want it, and acme asks first
        places.leave("acme")
        had -= 1
        for tenant in ("acme", "globex"):
            if places.has_room(tenant):
                places.take(tenant)
                had, own = had + (tenant == "acme"), own + (tenant == "globex")
    assert own >= total // 2 and had >= 1


@given(
    st.integers(1, 40),
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=200),
)
def test_there_are_never_more_places_than_there_are(total, steps):
    places, held = Places(total, lambda: 3), dict.fromkeys("abc", 0)
    for tenant, begins in steps:
        if begins and places.has_room(tenant):
            places.take(tenant)
            held[tenant] += 1
        elif not begins and held[tenant]:
            places.leave(tenant)
            held[tenant] -= 1
        assert places.taken == sum(held.values()) <= total
        if not places.taken:
            assert all(places.has_room(one) for one in "abc")
