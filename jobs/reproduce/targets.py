"""What was wished for beside what was measured: of retrieval, and of people and new voices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jobs.reproduce.lab import OWN
from jobs.reproduce.rows import DETECTED, Row, Transcripts
from mmrag.score import Difference, paired_difference, word_error_rate

Target = tuple[str, str, str, str]
"""What, how good it is wished to be, how good it is, and whether that is enough."""
RETRIEVAL = {"everyday", "domain", "dynamic_context", "wrong_datastore"}
"""Tasks that the targets of retrieval look at."""
HEARING = {"everyday", "domain", "sentences", "people", "unsaid_phrases", "end_to_end"}
"""Tasks of an experiment that asks what a person can expect."""
LISTS = {100: 0.9, 2000: 0.8}
"""Phrases of a list -> the share of its names that are to be heard."""


def targets(rows: Sequence[Row], heard: Transcripts) -> list[Target]:
    """Those that the tasks which were measured tell of; none for a model of others."""
    tasks = {row["task"] for row in rows}
    if not rows or rows[0].get("model", OWN) != OWN:
        return []
    if tasks >= HEARING:
        return list(hearing(rows, heard))
    return retrieval(rows, heard) if tasks >= RETRIEVAL else []


def hearing(rows: Sequence[Row], heard: Transcripts) -> Iterator[Target]:
    """How well speech is heard that no stage has met, what helps, what harms, and what is known of
    it."""
    by: dict[str, list[Row]] = {}
    for row in rows:
        by.setdefault(row["task"], []).append(row)
    for title, tasks in {
        "held-out voices, sentences of the grammar": ("everyday", "domain"),
        "held-out voices, real sentences": ("sentences",),
    }.items():
        rate, count = _pooled(heard, tasks)
        yield _at_most(f"WER of {title} ({count})", rate, 0.1)
    for row in by["people"]:
        if "/test" in row["setting"] and "and over" in row["setting"]:
            yield _at_most(f"WER of {row['setting']} ({row['utterances']})", row["wer"], 0.35)
    yield from _names(by["domain"])
    for count, wanted in LISTS.items():
        measured = [row for row in by.get("dynamic_context", ()) if row["phrases"] == count]
        if measured:
            yield _recalled(
                f"{count:,} phrases, the names among them: entity recall", measured, wanted
            )
    unsaid = [row for row in by["unsaid_phrases"] if row["phrases"] in (100, None)]
    yield _harm("100 phrases, none of them said: WER against no list", unsaid)
    if wrong := [r for r in by.get("wrong_datastore", ()) if r["setting"] is None]:
        yield _harm("the wrong datastore: WER against none", wrong)
    yield from _sure(by["end_to_end"])
    seconds = [
        sum(r[key] for r in by["end_to_end"]) for key in ("decode_seconds", "seconds_of_audio")
    ]
    time = seconds[0] / seconds[1]
    yield ("time on one core, × real time", "≤ 0.1", f"{time:.3f}", _reached(time <= 0.1))


def _pooled(heard: Transcripts, tasks: Sequence[str]) -> tuple[float, int]:
    """WER without retrieval over all utterances of some tasks, and how many they are."""
    pairs = [
        said
        for (task, point, _), said in heard.items()
        if task in tasks and point.split()[0] == "none"
    ]
    references, texts = zip(*pairs, strict=True)
    return word_error_rate(references, texts, resamples=1).rate, len(pairs)


def _at_most(title: str, rate: float, wanted: float) -> Target:
    return (title, f"≤ {wanted:.0%}", f"{rate:.1%}", _reached(rate <= wanted))


def _names(domain: Sequence[Row]) -> Iterator[Target]:
    """A multi-modal datastore against none, in each of its modes."""
    [plain] = [row for row in domain if row["mode"] == "none"]
    stored = [row for row in domain if row["datastore"] == "multimodal"]
    lower = {row["mode"]: 1 - row["wer"] / plain["wer"] if plain["wer"] else 0.0 for row in stored}
    told = ", ".join(f"{mode} {share:.0%}" for mode, share in lower.items())
    title = "names, multi-modal datastore: WER against none"
    yield (title, "≥ 50 % lower, by one of them", told, _reached(max(lower.values()) >= 0.5))
    yield _recalled("names, multi-modal datastore: entity recall", stored, 0.8)


def _recalled(title: str, rows: Sequence[Row], wanted: float) -> Target:
    """The entity recall of each mode; one of them has to reach what is wanted."""
    found = {row["mode"]: row["entity_recall"] for row in rows if row["mode"] != "prompt"}
    told = ", ".join(f"{mode} {share:.2f}" for mode, share in found.items())
    return (title, f"≥ {wanted}, by one of them", told, _reached(max(found.values()) >= wanted))


def _harm(title: str, rows: Sequence[Row]) -> Target:
    """What each mode adds to the WER without: none of them more than a hundredth; of a list, what
    is used where nobody asks for another."""
    [right] = [row["wer"] for row in rows if row["mode"] == "none"]
    told = {row["mode"]: row["wer"] for row in rows if row["mode"] != "none"}
    measured = ", ".join(
        f"{mode} {rate / right - 1:+.1%}" if right else f"{mode} {right:.1%} → {rate:.1%}"
        for mode, rate in told.items()
    )
    usual = {mode: rate for mode, rate in told.items() if mode == "spotting"} or told
    reached = all(rate <= 1.01 * right for rate in usual.values())
    wanted = "≤ 1 % worse" if usual is told else f"≤ 1 % worse, {', '.join(usual)}"
    return (title, wanted, measured, _reached(reached))


def _sure(rows: Sequence[Row]) -> Iterator[Target]:
    """The shares of bad and of good transcripts that are marked as unclear, of all groups."""
    shares: Mapping[str, tuple[str, str, float]] = {
        "bad": ("with more than half of their words wrong", "≥ 90 %", 0.9),
        "good": ("with at most a tenth of them wrong", "≤ 5 %", 0.05),
    }
    for which, (title, wanted, limit) in shares.items():
        judged = [row for row in rows if row.get(f"{which}_unclear") is not None]
        count = sum(row[which] for row in judged)
        if not count:
            continue
        share = sum(row[which] * row[f"{which}_unclear"] for row in judged) / count
        enough = share >= limit if which == "bad" else share <= limit
        yield (
            f"transcripts {title} ({count}): marked as unclear",
            wanted,
            f"{share:.1%}",
            _reached(enough),
        )


def retrieval(rows: Sequence[Row], heard: Transcripts) -> list[Target]:
    """Each target with what was measured, and whether it is reached."""

    def wer(task: str, mode: str, datastore: str | None = None, phrases: int | None = None):  # noqa: ANN202
        wanted = (task, mode, datastore, phrases)
        for row in rows:
            if (row["task"], row["mode"], row["datastore"], row["phrases"]) == wanted:
                return row["wer"]
        raise ValueError(f"the results lack {wanted}")

    plain, multimodal = wer("domain", "none"), wer("domain", "knn", "multimodal")
    text, spoken = wer("domain", "knn", "text"), wer("domain", "knn", "spoken")
    lower = 1 - multimodal / plain if plain else 0.0
    difference = _difference(heard, "multimodal", "text")
    closed = (text - spoken) / (text - multimodal) if text > multimodal else float("nan")
    hundred = [wer("dynamic_context", "knn", "spoken", 100)] + [
        wer("dynamic_context", mode, None, 100) for mode in ("boost", "prompt")
    ]
    right, wrong = wer("wrong_datastore", "none"), wer("wrong_datastore", "knn", "wrong")
    everyday = wer("everyday", "none")
    return [
        ("WER of everyday sentences", "≤ 10 %", f"{everyday:.1%}", _reached(everyday <= 0.1)),
        (
            "WER with a multi-modal datastore against none",
            "≥ 50 % lower",
            f"{lower:.0%} lower ({plain:.1%} → {multimodal:.1%})",
            _reached(multimodal <= 0.5 * plain),
        ),
        (
            "multi-modal against text-only datastore",
            "lower, interval clear of zero",
            f"{100 * difference.delta:+.1f} points "
            f"({100 * difference.low:+.1f} to {100 * difference.high:+.1f})",
            _reached(difference.high < 0),
        ),
        (
            "datastore spoken from text alone: share of the gap between text-only and multi-modal",
            "≥ 80 %",
            f"{closed:.0%}",
            _reached(text - spoken >= 0.8 * (text - multimodal) > 0),
        ),
        (
            "kNN-LM, boosting, prompting with 100 phrases",
            "kNN-LM ahead",
            ", ".join(f"{rate:.1%}" for rate in hundred),
            _reached(hundred[0] < min(hundred[1:])),
        ),
        (
            "WER with the wrong datastore against none",
            "≤ 2 % worse",
            f"{wrong / right - 1:+.1%}" if right else f"{right:.1%} → {wrong:.1%}",
            _reached(wrong <= 1.02 * right),
        ),
        *(_attention_targets(rows) if any(r["mode"] == "cross_attention" for r in rows) else ()),
    ]


def _attention_targets(rows: Sequence[Row]) -> list[Target]:
    """The targets of cross-attention."""
    by = {(r["task"], r["mode"], r["datastore"], r["phrases"]): r for r in rows}
    lists = {r["phrases"]: r for r in rows if r["mode"] == "cross_attention" and r["phrases"]}
    lists = {n: by["dynamic_context", "cross_attention", "spoken", n] for n in sorted(lists)}
    plain, hundred = by["dynamic_context", "none", None, None], lists[100]
    least, most = lists[min(lists)], lists[max(lists)]
    tasks = (("domain", "multimodal", None), ("dynamic_context", "spoken", 100))

    def rates(mode: str) -> list[float]:
        return [by[task, mode, store, count]["wer"] for task, store, count in tasks]

    knn, read, both = (rates(mode) for mode in ("knn", "cross_attention", "both"))
    right = by["wrong_datastore", "none", None, None]["wer"]
    told = {m: by["wrong_datastore", m, "wrong", None]["wer"] for m in ("cross_attention", "both")}
    time = [r["decode_seconds"] / r["seconds_of_audio"] for r in (hundred, plain)]
    silent = [r for r in rows if r["task"] == "no_speech" and r["setting"] == DETECTED]
    targets = [
        (
            "100 phrases: cross-attention against none",
            "≥ 50 % lower",
            f"{1 - hundred['wer'] / plain['wer']:.0%} lower",
            _reached(hundred["wer"] <= 0.5 * plain["wer"]),
        ),
        (
            "100 phrases: entity recall of cross-attention",
            "≥ 90 %",
            f"{hundred['entity_recall']:.1%}",
            _reached(hundred["entity_recall"] >= 0.9),
        ),
        (
            "cross-attention against kNN-LM, domain and 100 phrases",
            "ahead on both",
            ", ".join(f"{a:.1%} against {b:.1%}" for a, b in zip(read, knn, strict=True)),
            _reached(all(a < b for a, b in zip(read, knn, strict=True))),
        ),
        (
            "both against the better of the two, domain and 100 phrases",
            "at least as good",
            ", ".join(f"{a:.1%}" for a in both),
            _reached(all(c <= min(a, b) for a, b, c in zip(knn, read, both, strict=True))),
        ),
        (
            f"cross-attention with {max(lists)} phrases against {min(lists)}",
            "≤ 10 % worse",
            f"{most['wer'] / least['wer'] - 1:+.0%}",
            _reached(most["wer"] <= 1.1 * least["wer"]),
        ),
        (
            "the wrong datastore, cross-attention and both, against none",
            "≤ 1 % worse",
            ", ".join(f"{rate / right - 1:+.1%}" for rate in told.values()),
            _reached(all(rate <= 1.01 * right for rate in told.values())),
        ),
        (
            "decoding time with 100 phrases, cross-attention against none",
            "≤ 1.3 ×",
            f"{time[0] / time[1]:.1f} ×",
            _reached(time[0] <= 1.3 * time[1]),
        ),
    ]
    if silent:
        targets.append(
            (
                "clips in which nobody speaks, without a word",
                "≥ 98 %",
                ", ".join(f"{r['empty']:.0%}" for r in silent),
                _reached(all(r["empty"] >= 0.98 for r in silent)),
            )
        )
    return targets


def _difference(heard: Transcripts, a: str, b: str) -> Difference:
    """WER with datastore `a` minus that with `b`, paired over the domain's utterances."""
    texts: dict[str, dict[str, tuple[str, str]]] = {a: {}, b: {}}
    for (task, point, utterance), said in heard.items():
        for name in (a, b):
            if task == "domain" and point.split()[:2] == ["knn", name]:
                texts[name][utterance] = said
    order = sorted(texts[a])
    references = [texts[a][one][0] for one in order]
    heard_a, heard_b = ([texts[name][one][1] for one in order] for name in (a, b))
    return paired_difference(references, heard_a, heard_b, resamples=2000)


def _reached(yes: bool) -> str:
    return "yes" if yes else "no"
