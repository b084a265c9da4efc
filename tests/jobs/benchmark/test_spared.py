"""What retrieval costs a decoding engine, measured small with the shipped model."""

from dataclasses import replace

import pytest

from jobs.benchmark import keys, read, spared
from mmrag.config import Synthesize, Workers
from mmrag.corpora import synthetic

COUNTS = {"lm": 1, "adapter": 1, "mentions": 1, "dev": 1, "text": 0, "everyday_share": 0.2}


@pytest.fixture(autouse=True)
def few_sentences(monkeypatch):
    """Synthetic entries of few sentences; a corpus that holds as few."""

    def planned(test):
        settings = Synthesize(test=4, workers=Workers(count=1, num_cpus=1), **COUNTS)
        made = synthetic.plan(settings, 1)
        return {**made, "datastore": made["datastore"][:8], "test": made["test"][:test]}

    monkeypatch.setattr(keys, "SENTENCES", 40)
    monkeypatch.setattr(spared, "_planned", planned)


@pytest.mark.slow
def test_a_rule_that_spares_nothing_searches_once_a_token_and_changes_no_transcript(
    tmp_path, monkeypatch
):
    rules = {name: spared.RULES[name] for name in (spared.NEVER, spared.SPARING)}
    monkeypatch.setattr(spared, "RULES", rules)
    reading = {name: spared.READING[name] for name in (spared.NEVER, "4 tokens")}
    monkeypatch.setattr(spared, "READING", reading)
    found = spared.searched(tmp_path, True, lambda _: None)
    (never, sparing), (always, fourth) = found["searches"], found["reads"]
    assert always["searches_per_token"] == 1.0 and always["changed"] == 0
    assert fourth["searches_per_token"] < 0.8, "less where nothing shuts the gate"
    assert never["rule"] == spared.NEVER and never["clips"] == 4
    assert never["searches_per_token"] == 1.0 and never["changed"] == 0
    assert sparing["searches_per_token"] < 0.8
    for row in (never, sparing, always, fourth):
        rate, low, high = row["wer"]
        assert 0 <= low <= rate <= high


@pytest.mark.slow
def test_reading_is_measured_beside_reading_nothing(tmp_path, monkeypatch):
    small = replace(read.QUICK, clips=4, rows=4, entries=600, listed=20, repeats=1)
    monkeypatch.setattr(read, "QUICK", small)
    found = read.overheads(tmp_path, True, lambda _: None)
    certain = found["reading"].pop(read.SPARED)
    assert found["reading"] == {read.LIST: 1.0, read.SEARCHED: 1.0}, "no gate is shut"
    assert 0 < certain < 1
    for field in ("cross_attention_overhead", "cross_attention_overhead_datastore"):
        assert found[f"decode.{field}"]["median"] > 0
    assert list(found["read_for"]) == [str(stride) for stride in (1, *read.STRIDES)]
    assert all(one["median"] > 0 for one in found["read_for"].values())
