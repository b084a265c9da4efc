import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.config import Index
from mmrag.retrieval import sizing

AUTO = Index(kind="auto", shards=1)


def test_what_the_settings_name_is_left_as_it_is():
    for kind in ("flat", "ivfpq"):
        settings = Index(kind=kind, shards=3, lists=7)
        assert sizing.chosen(settings, 10**7, 256)[0] == settings


def test_few_keys_are_compared_one_by_one():
    settings, why = sizing.chosen(AUTO, sizing.FLAT_ENTRIES, 256)
    assert settings.kind == "flat" and "20,000 keys" in why
    assert sizing.chosen(AUTO, sizing.FLAT_ENTRIES + 1, 256)[0].kind == "ivfpq"


@given(
    entries=st.integers(sizing.FLAT_ENTRIES + 1, 10**9),
    width=st.sampled_from([64, 192, 256, 768, 1024, 4096]),
    memory=st.integers(9, 400),
)
def test_lists_codes_and_probes_keep_to_what_was_asked_for(entries, width, memory):
    settings = Index(kind="auto", shards=1, entry_bytes=memory)
    chosen, why = sizing.chosen(settings, entries, width)
    assert chosen.kind == "ivfpq"
    assert 3.7 * np.sqrt(entries) <= chosen.lists <= 16 * np.sqrt(entries)
    assert chosen.code_bytes + sizing.ID_BYTES <= memory
    turned = sizing.TURNED_DIMENSIONS * chosen.code_bytes
    assert turned <= width if chosen.turned else width % chosen.code_bytes == 0
    assert chosen.probes / chosen.lists * entries <= sizing.MOST_SCANNED + entries / chosen.lists
    assert f"{entries:,} keys in {chosen.lists:,} lists" in why


@pytest.mark.parametrize(
    ("width", "memory", "code", "turned"),
    [
        (192, 136, 96, False),
        (256, 136, 128, False),
        (256, 40, 32, False),
        (4096, 136, 128, True),
        (256, 24, 16, True),
    ],
)
def test_wide_keys_are_turned_into_what_their_codes_hold(width, memory, code, turned):
    settings = Index(kind="auto", shards=1, entry_bytes=memory)
    chosen, why = sizing.chosen(settings, 10**6, width)
    assert (chosen.code_bytes, chosen.turned) == (code, turned)
    assert ("after a rotation" in why) == turned


def test_what_is_tried_next_grows_one_thing_at_a_time_as_far_as_it_may():
    settings, _ = sizing.chosen(AUTO, 10**6, 256)
    seen = [settings]
    while wider := sizing.wider(seen[-1], 10**6):
        for one in wider:
            grown = {"probes": one.probes, "rerank": one.rerank}
            assert one == seen[-1].model_copy(update=grown)
            assert (one.probes > seen[-1].probes) != (one.rerank > seen[-1].rerank)
        seen.append(wider[0])
    assert seen[-1].rerank == sizing.MOST_RERANKED
    assert seen[-1].probes == sizing.probes(sizing.MOST_SCANNED, settings.lists, 10**6)
