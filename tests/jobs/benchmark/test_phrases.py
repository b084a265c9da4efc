"""The measurements of shortlists, with few phrases and the shipped model."""

import pytest

from jobs.benchmark import phrases
from jobs.benchmark.phrases import LENGTHS, Sizes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    sizes = Sizes(clips=6, phrases=(60, 120), spoken=12)
    return phrases.measure(tmp_path_factory.mktemp("phrases"), sizes)


def test_what_was_said_is_looked_for_in_lists_of_every_size(results):
    assert [one["phrases"] for one in results["shortlists"]] == [60, 120]
    for one in results["shortlists"]:
        recalls = [one["recall"][length] for length in LENGTHS]
        assert recalls == sorted(recalls) and recalls[-1] == 1, "300 of 120 are all of them"
        assert one["said"] >= 6 and 0 < one["ms"] <= one["p95_ms"]


def test_transcripts_are_compared_without_with_all_and_with_a_shortlist(results):
    ways = {one["way"]: one for one in results["transcripts"]}
    assert list(ways) == ["none", "search", "shortlist"]
    assert ways["shortlist"]["entity_recall"] > ways["none"]["entity_recall"]
    for one in ways.values():
        rate, low, high = one["wer"]
        assert low <= rate <= high


def test_a_target_is_judged_only_at_its_own_size(results, capsys):
    assert [results[key] for key in ("recall", "entity_recall", "ms", "spotted")] == [None] * 4
    phrases.show(results)
    shown = capsys.readouterr().out
    assert shown.count("not measured") == 4 and "the 10 likeliest read" in shown


def test_what_is_said_is_spotted_and_found_in_the_transcripts(results):
    alone, *listed = results["spots"]
    assert (alone["phrases"], alone["recall"], alone["others"]) == (0, 0, 0)
    for one, size in zip(listed, (60, 120), strict=True):
        assert one["phrases"] == size and one["recall"] > 0.5 and one["others"] < 2
        assert one["entity_recall"] > alone["entity_recall"] and 0 < one["ms"] <= one["p95_ms"]
