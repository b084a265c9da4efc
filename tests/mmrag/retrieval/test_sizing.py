import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrag.config import Index
from mmrag.retrieval import scalar, sizing

AUTO = Index(kind="auto", shards=1)


def test_what_the_settings_name_is_left_as_it_is():
    for kind in ("flat", "ivfsq", "ivfpq"):
        settings = Index(kind=kind, shards=3, lists=7)
        assert sizing.chosen(settings, 10**7, 256)[0] == settings


def test_few_keys_are_compared_one_by_one():
    settings, why = sizing.chosen(AUTO, sizing.FLAT_ENTRIES, 256)
    assert settings.kind == "flat" and "20,000 keys" in why
    assert sizing.chosen(AUTO, sizing.FLAT_ENTRIES + 1, 256)[0].kind == "ivfsq"


@given(
    entries=st.integers(sizing.FLAT_ENTRIES + 1, 10**9),
    width=st.sampled_from([64, 192, 256, 768, 1024, 4096]),
    memory=st.integers(9, 400),
)
def test_lists_codes_and_probes_keep_to_what_was_asked_for(entries, width, memory):
    settings = Index(kind="auto", shards=1, entry_bytes=memory)
    chosen, why = sizing.chosen(settings, entries, width)
    assert (chosen.kind == "ivfsq") == (width + sizing.ID_BYTES <= memory)
    assert 3.7 * np.sqrt(entries) <= chosen.lists <= 16 * np.sqrt(entries)
    assert chosen.probes / chosen.lists * entries <= sizing.MOST_SCANNED + entries / chosen.lists
    assert f"{entries:,} keys in {chosen.lists:,} lists" in why
    longer = scalar.code_bytes(width, chosen.scalar_bits)
    if chosen.kind == "ivfsq":
        assert longer == width
        assert f"{width} bytes, 8 bits each: {width + sizing.ID_BYTES} of {memory} bytes" in why
        return
    assert chosen.code_bytes + longer + sizing.ID_BYTES <= memory
    turned = sizing.TURNED_DIMENSIONS * chosen.code_bytes
    assert turned <= width if chosen.turned else width % chosen.code_bytes == 0


@pytest.mark.parametrize(
    ("width", "memory", "code", "turned", "bits"),
    [
        (384, 336, 96, False, 4),
        (256, 200, 64, False, 4),
        (192, 136, 96, False, 0),
        (256, 136, 128, False, 0),
        (256, 40, 32, False, 0),
        (4096, 136, 128, True, 0),
        (256, 24, 16, True, 0),
    ],
)
def test_wide_keys_are_turned_into_what_their_codes_hold(width, memory, code, turned, bits):
    settings = Index(kind="auto", shards=1, entry_bytes=memory)
    chosen, why = sizing.chosen(settings, 10**6, width)
    assert (chosen.code_bytes, chosen.turned, chosen.scalar_bits) == (code, turned, bits)
    assert ("after a rotation" in why) == turned
    assert (f"and again in {width * bits // 8}, {bits} bits each" in why) == bool(bits)


@pytest.mark.parametrize(("memory", "kept"), [(336, "CHOSEN"), (263, "CHOSEN"), (136, "RERANKED")])
def test_what_is_tried_next_grows_one_thing_at_a_time_as_far_as_it_may(memory, kept):
    auto = Index(kind="auto", shards=1, entry_bytes=memory)
    settings, _ = sizing.chosen(auto, 10**6, 256)
    assert settings.rerank == getattr(sizing, kept)
    seen = [settings]
    while wider := sizing.wider(seen[-1], 10**6):
        for one in wider:
            changed = {name for name, value in one if value != getattr(seen[-1], name)}
            assert len(changed) == 1 and changed <= {"probes", "refine", "rerank"}
            assert all(getattr(one, name) > getattr(seen[-1], name) for name in changed)
        seen.append(wider[0])
    assert seen[-1].rerank == getattr(sizing, f"MOST_{kept}")
    assert seen[-1].probes == sizing.probes(sizing.MOST_SCANNED, settings.lists, 10**6)
    refined = settings.kind == "ivfpq" and settings.scalar_bits > 0
    assert (seen[-1].refine == sizing.MOST_REFINED) == refined


def test_of_several_shards_each_begins_with_fewer_codes():
    alone, _ = sizing.chosen(AUTO, 10**6, 192)
    one_of_four, _ = sizing.chosen(AUTO.model_copy(update={"shards": 4}), 10**6, 192)
    assert one_of_four.lists == alone.lists and 2 * one_of_four.probes == alone.probes
