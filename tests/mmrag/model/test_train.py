import hashlib
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrag.config import CrossAttention, LanguageModel, Train
from mmrag.finite import Lost, NonFiniteLoss
from mmrag.model.cross_attention import Adapter, Windows
from mmrag.model.curriculum import Curriculum, TrainingError
from mmrag.model.epochs import Chosen
from mmrag.model.examples import Example, examples, speakable, unspeakable
from mmrag.model.lm import LM
from mmrag.model.loss import IGNORE, Objective
from mmrag.model.states import read_states
from mmrag.model.train import (
    StepLog,
    adamw,
    collate,
    learning_rate,
    precision,
    train,
    train_step,
)
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import Units, Utterance
from mmrag.speech.tokenized import Tokenized

SHAPE = LanguageModel(width=32, layers=1, heads=2, kv_heads=1, feed_forward=64, tied=True)
WORDS = ["light", "door", "radio", "lamp", "on", "off", "red", "blue"]
VOCABULARY = Vocabulary(SentencePieces.train(WORDS, 45), units=20)
MIXED = {"text": 1, "speech": 1, "speech_first": 2, "text_first": 1}


def recipe(**changes):
    fields = {
        "phases": [{"name": "only", "steps": 40, "mixture": {"speech_first": 1}}],
        "micro_batch_tokens": 120,
        "micro_batches": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "weight_decay": 0.01,
        "clip": 1.0,
        "ctc_weight": 0.5,
        "unit_dropout": 0.0,
        "precision": "fp32",
        "zero_stage": 0,
        "checkpoint_steps": 10,
        "log_steps": 10,
        "max_failures": 0,
        "workers": {"count": 1, "num_cpus": 1},
    }
    return Train(**{**fields, **changes})


def phase(mixture, steps=40, name="only"):
    return {"name": name, "steps": steps, "mixture": mixture}


def corpus(spoken=12, written=5, heard=3):
    """Utterances with text and units, then text alone, then units alone; of many lengths."""
    random = np.random.default_rng(0)

    def ids(first, stop, longest):
        return random.integers(first, stop, random.integers(1, longest)).tolist()

    def text():
        return ids(VOCABULARY.first_piece, VOCABULARY.first_unit, 12)

    def units():
        return ids(VOCABULARY.first_unit, VOCABULARY.size, 40)

    return [
        *(Example(text(), units()) for _ in range(spoken)),
        *(Example(text(), None) for _ in range(written)),
        *(Example([], units()) for _ in range(heard)),
    ]


DATA = corpus()


def objective_of(ctc_weight=0.5, shape=SHAPE):
    torch.manual_seed(0)
    return Objective(LM(shape, VOCABULARY.size), len(VOCABULARY.alphabet), ctc_weight)


def collated(chosen, dropout=0.0, seed=(0,), data=DATA):
    return collate(data, chosen, VOCABULARY, dropout, seed)


def walk(recipe, seed=0, data=DATA):
    curriculum = Curriculum(data, recipe, seed)
    return [curriculum.step(step) for step in range(recipe.steps)]


def stream(recipe, data=DATA):
    """Every chosen example in the order it is read."""
    return [one for _, batches in walk(recipe, data=data) for batch in batches for one in batch]


TWO_PHASES = recipe(phases=[phase({"text": 1}, 3, "text"), phase(MIXED, 9, "mixed")])


def test_text_that_the_vocabulary_cannot_write_is_not_trained_on():
    told = [
        Tokenized(Utterance(id=text or "none", text=text), None)
        for text in ("red light", "日本 light", None, "", "Renée 2")
    ]
    kept = list(speakable(told, VOCABULARY))
    assert [one.utterance.text for one in kept] == ["red light", None, "", "Renée 2"]
    assert len(examples(kept, VOCABULARY)) == 4
    [rejected] = unspeakable(told, VOCABULARY)
    assert rejected.source == "日本 light"
    assert "no letters for '日', '本'" in rejected.reason


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 3), st.lists(st.integers(0, 11), min_size=1, max_size=5))
def test_what_a_step_reads_follows_from_seed_and_step_alone(seed, order):
    walked = walk(TWO_PHASES, seed)
    curriculum = Curriculum(DATA, TWO_PHASES, seed)
    for step in order:  # as runs that stop anywhere and resume anywhere
        assert curriculum.step(step) == walked[step]


def test_another_seed_reads_in_another_order():
    assert walk(TWO_PHASES, seed=0) != walk(TWO_PHASES, seed=1)


@pytest.mark.parametrize(
    ("mixture", "usable"),
    [
        ({"text": 1}, range(17)),
        ({"speech_first": 1}, range(12)),
        ({"speech": 1}, [*range(12), *range(17, 20)]),
    ],
)
def test_every_usable_example_is_seen_once_an_epoch(mixture, usable):
    read = [one.index for one in stream(recipe(phases=[phase(mixture)]))]
    epochs = [read[i : i + len(usable)] for i in range(0, len(read), len(usable))][:-1]
    assert len(epochs) >= 3
    for epoch in epochs:
        assert sorted(epoch) == list(usable)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs), "each in another order"


@settings(max_examples=20, deadline=None)
@given(st.integers(20, 300), st.integers(0, 5))
def test_a_micro_batch_never_exceeds_its_tokens(limit, seed):
    settings = recipe(micro_batch_tokens=limit, phases=[phase(MIXED, steps=12)])
    sizes = []
    for _, batches in walk(settings, seed):
        for chosen in batches:
            sizes.append(len(chosen))
            assert collated(chosen).ids.numel() <= limit
    assert max(sizes) > 1 or limit < 50, "nothing was batched"


LENGTHS = st.tuples(st.integers(0, 90), st.integers(0, 90)).filter(any)


@settings(max_examples=60, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=25), st.integers(5, 120), st.integers(0, 9))
def test_what_is_too_long_for_every_micro_batch_is_listed_and_the_rest_is_read_as_before(
    lengths, limit, seed
):
    data = [
        Example([10] * text, [70] * units or None, f"{number}")
        for number, (text, units) in enumerate(lengths)
    ]
    settings = recipe(micro_batch_tokens=limit, phases=[phase(MIXED, steps=4)])
    curriculum = Curriculum(data, settings, seed)
    listed = {one.index: one for one in curriculum.too_long()}
    if all(4 + min(text or units, units or text) > limit for text, units in lengths):
        with pytest.raises(TrainingError, match="no example fits"):
            curriculum.step(0)
        return
    read = [batch for step in range(4) for batch in curriculum.step(step)[1]]
    assert all(collated(batch, data=data).ids.numel() <= limit for batch in read)
    for index, (text, units) in enumerate(lengths):
        sizes = {"text": text and 4 + text, "speech": units and 4 + units}
        both = text and units and 4 + text + units
        sizes |= {"speech_first": both, "text_first": both}
        over = [form for form in MIXED if sizes[form] > limit]
        assert (listed[index].forms if index in listed else []) == over
        if over:
            assert listed[index].length == max(sizes[form] for form in over)
    shown = {(one.index, one.form) for batch in read for one in batch}
    assert not {(one.index, form) for one in listed.values() for form in one.forms} & shown


def test_one_endless_text_makes_no_micro_batch_of_its_own():
    endless = Example([10] * 60_000, None, "endless")
    settings = recipe(micro_batch_tokens=120, phases=[phase(MIXED, 30)])
    batches = [batch for _, step in walk(settings, data=[*DATA, endless]) for batch in step]
    assert max(collated(batch).ids.numel() for batch in batches) <= 120
    [listed] = Curriculum([*DATA, endless], settings, seed=0).too_long()
    assert listed == (len(DATA), 60_004, ["text"])
    with pytest.raises(TrainingError, match=r"micro_batch_tokens 120, the shortest has 60004"):
        Curriculum([endless], recipe(phases=[phase({"text": 1})]), seed=0).step(0)


def test_corpora_without_too_long_examples_are_read_as_they_always_were():
    """Digests of the micro-batches of earlier versions."""
    read = [
        [(phase.name, [[tuple(one) for one in batch] for batch in batches])]
        for phase, batches in walk(TWO_PHASES)
    ]
    assert hashlib.sha256(repr(read).encode()).hexdigest()[:16] == "1994a04fbffa69e9"


def test_an_utterance_that_is_left_out_leaves_everything_else_in_its_place():
    data = [one._replace(name=f"u{number}") for number, one in enumerate(DATA)]
    settings = recipe(phases=[phase({"speech_first": 1}, 40)])
    before = stream(settings, data)
    passed = settings.model_copy(update={"leave_out": ("u3", "u7")})
    after = stream(passed, data)
    assert {3, 7} <= {one.index for one in before}
    kept = [one for one in before if one.index not in (3, 7)]
    assert len(after) >= len(kept) and after[: len(kept)] == kept
    with pytest.raises(TrainingError, match=r"train\.leave_out: no utterance u99 to train on"):
        Curriculum(data, settings.model_copy(update={"leave_out": ("u99",)}), seed=0)


def spoilt_at(objective: Objective, steps: set[int], what: str = "loss") -> Objective:
    """An objective whose loss, or gradient, is no number in the second micro-batch of two of these
    steps."""
    forward, seen = objective.forward, []

    def spoilt(batch):
        seen.append(batch)
        sums = forward(batch)
        step, number = divmod(len(seen) - 1, 2)
        if step not in steps or number != 1:
            return sums
        # A square root at zero has a value, and no slope.
        return sums + (torch.nan if what == "loss" else (sums - sums.detach()).abs().sqrt())

    objective.forward = spoilt
    return objective


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_on_what_is_no_number_is_not_taken_and_the_utterances_are_named(what):
    """… and what follows is as if there had been no such step."""
    data = [one._replace(name=f"u{number}") for number, one in enumerate(toy_corpus())]
    settings, logs, skipped = recipe(phases=[phase({"speech_first": 1}, 9)]), [], []
    _, micro_batches = Curriculum(data, settings, seed=1).step(5)
    objective = spoilt_at(objective_of(), {5}, what)
    after: dict[int, dict[str, torch.Tensor]] = {}

    def noted(step: int) -> None:
        after[step] = {name: one.clone() for name, one in objective.state_dict().items()}

    def logged(log: StepLog) -> None:
        logs.append(log)
        noted(log.step)

    def lost(one: Lost) -> None:
        skipped.append(one)
        noted(one.step)

    train(objective, data, VOCABULARY, settings, seed=1, log=logged, skipped=lost)
    assert [log.step for log in logs] == [0, 1, 2, 3, 4, 6, 7, 8]
    [one] = skipped
    assert one.step == 5 and f"the {what} is not finite" in str(one)
    assert all(torch.equal(after[5][name], weight) for name, weight in after[4].items())
    assert any(not torch.equal(after[6][name], weight) for name, weight in after[5].items())
    second = {f"u{chosen.index}" for chosen in micro_batches[1]}
    both = second | {f"u{chosen.index}" for chosen in micro_batches[0]}
    assert set(one.read) == (second if what == "loss" else both)
    assert ("micro-batch 2 of 2" in str(one)) == (what == "loss")


def test_the_third_step_in_a_row_that_is_not_taken_ends_the_training():
    data = [one._replace(name=f"u{number}") for number, one in enumerate(toy_corpus())]
    settings, logs, skipped = recipe(phases=[phase({"speech_first": 1}, 9)]), [], []
    objective = spoilt_at(objective_of(), {1, 2, 4, 5, 6})
    with pytest.raises(NonFiniteLoss, match=r"step 7, .*in the third step in a row") as raised:
        train(objective, data, VOCABULARY, settings, 1, log=logs.append, skipped=skipped.append)
    assert [log.step for log in logs] == [0, 3]
    assert [one.step for one in skipped] == [1, 2, 4, 5, 6]
    assert "train.leave_out=[ID]" in str(raised.value)
    assert all(name in str(raised.value) for name in skipped[-1].read[:20])
    assert all(weight.isfinite().all() for weight in objective.parameters())


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_workers_share_a_step_without_gap_or_overlap_and_make_the_same_gradient(world):
    settings = recipe(micro_batches=6, phases=[phase(MIXED)])
    objective = objective_of()
    _, micro_batches = Curriculum(DATA, settings, seed=0).step(1)
    batches = [collated(chosen) for chosen in micro_batches]
    counts = torch.stack([batch.counts() for batch in batches]).sum(0)

    def gradients(share):
        objective.zero_grad()
        losses = train_step(objective, lambda loss: loss.backward(), share, counts, 0.5)
        return losses.sum(0), [p.grad.clone() for p in objective.parameters()]

    whole_sums, whole = gradients(batches)
    shares = [gradients(batches[rank::world]) for rank in range(world)]
    torch.testing.assert_close(sum(sums for sums, _ in shares), whole_sums)
    for number, expected in enumerate(whole):
        summed = sum(gradient[number] for _, gradient in shares)
        torch.testing.assert_close(summed, expected, atol=1e-5, rtol=1e-4)


def test_micro_batches_accumulate_to_one_large_batch():
    chosen = [Chosen(i, "speech_first") for i in range(8)]
    results = []
    for cuts in ([chosen], [chosen[:1], chosen[1:3], chosen[3:]]):
        objective = objective_of()
        batches = [collated(one) for one in cuts]
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        sums = train_step(objective, lambda loss: loss.backward(), batches, counts, 0.5).sum(0)
        results.append((sums, [p.grad for p in objective.parameters()]))
    (sums, gradient), (accumulated_sums, accumulated) = results
    torch.testing.assert_close(accumulated_sums, sums)
    for one, other in zip(accumulated, gradient, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_phases_switch_at_their_steps():
    phases = [
        phase({"text": 1}, 3, "text"),
        phase({"speech": 1}, 1, "speech"),
        phase({"speech_first": 1, "text_first": 2}, 5, "both"),
    ]
    for step, (now, batches) in enumerate(walk(recipe(phases=phases, micro_batches=3))):
        expected = phases[0 if step < 3 else 1 if step < 4 else 2]
        assert now.name == expected["name"]
        assert len(batches) == 3
        assert {one.form for batch in batches for one in batch} <= set(expected["mixture"])


def test_a_mixture_is_kept_to_in_its_proportions():
    data = corpus(spoken=300, written=0, heard=0)
    settings = recipe(phases=[phase({"speech_first": 3, "text": 1}, 60)], micro_batch_tokens=300)
    forms = Counter(one.form for one in stream(settings, data)[:300])
    assert forms["speech_first"] / 300 == pytest.approx(0.75, abs=0.08)


def test_an_example_is_never_shown_in_a_format_that_it_lacks_the_data_for():
    for index, form in stream(recipe(phases=[phase(MIXED, 100)])):
        text, units, *_ = DATA[index]
        assert text or form == "speech"
        assert units or form == "text"


def test_a_mixture_that_no_example_fits_is_an_error_that_names_the_phase():
    settings = recipe(phases=[phase({"speech_first": 1}, name="listening")])
    with pytest.raises(ValueError, match="phase listening: no example fits"):
        Curriculum(corpus(spoken=0), settings, seed=0).step(0)
    with pytest.raises(ValueError, match="no examples to train on"):
        Curriculum([], settings, seed=0)


@pytest.mark.parametrize("step", [-1, 12])
def test_a_step_outside_the_run_is_an_error(step):
    with pytest.raises(ValueError, match=f"step {step} of 12"):
        Curriculum(DATA, TWO_PHASES, seed=0).step(step)


def test_utterances_become_examples():
    units = Units(np.array([3, 19], np.int32), np.array([2, 1], np.int32))
    tokenized = [
        Tokenized(Utterance(id="both", text="Red light"), units),
        Tokenized(Utterance(id="written", text="lamp off"), None),
        Tokenized(Utterance(id="heard"), units),
    ]
    heard = [VOCABULARY.first_unit + 3, VOCABULARY.first_unit + 19]
    assert examples(tokenized, VOCABULARY) == [
        Example(VOCABULARY.encode("red light"), heard, "both"),
        Example(VOCABULARY.encode("lamp off"), None, "written"),
        Example([], heard, "heard"),
    ]


def test_unit_dropout_drops_its_share_of_a_transcriptions_units_and_no_text():
    everything = [Chosen(i, form) for i in range(12) for form in ("speech_first", "text_first")]
    whole, dropped = collated(everything), collated(everything, dropout=0.3)
    kept, total = 0, 0
    for row, (index, form) in enumerate(everything):
        text, units, *_ = DATA[index]
        start, end = dropped.speech[row].tolist()
        if form == "text_first":
            assert dropped.ids[row].tolist()[: len(text)] == whole.ids[row].tolist()[: len(text)]
            continue
        kept, total = kept + end - start, total + len(units)
        left = dropped.ids[row, start:end].tolist()
        expected = VOCABULARY.sequence("speech_first", text, left)
        assert dropped.ids[row, : len(expected)].tolist() == expected
        remaining = iter(units)
        assert all(unit in remaining for unit in left), "units that are kept keep their order"
    assert kept / total == pytest.approx(0.7, abs=0.1)
    assert dropped.counts()[1] == whole.counts()[1]


def test_unit_dropout_follows_from_its_seed():
    chosen = [Chosen(i, "speech_first") for i in range(12)]
    first, again, other = (
        collated(chosen, 0.5, seed).ids.tolist() for seed in ((1, 2, 3), (1, 2, 3), (1, 2, 4))
    )
    assert first == again != other


def test_a_transcription_that_lost_all_its_units_is_trained_on_text_alone():
    chosen = [Chosen(0, "speech_first"), Chosen(1, "speech_first")]
    batch = collated(chosen, dropout=1.0)
    assert batch.speech.tolist() == [[2, 2], [2, 2]]
    assert batch.counts().tolist() == [sum(len(DATA[i].text) + 1 for i in (0, 1)), 0]
    assert objective_of()(batch).isfinite().all()


def test_what_is_padded_is_no_target():
    batch = collated([Chosen(i, "text") for i in range(17)])
    for row, index in enumerate(range(17)):
        length = len(DATA[index].text) + 3
        assert (batch.targets[row, length - 1 :] == IGNORE).all()
        assert (batch.ids[row, length:] == 0).all()
        assert batch.targets[row, : length - 1].tolist() == batch.ids[row, 1:length].tolist()


def test_the_learning_rate_warms_up_to_its_peak_and_falls_to_a_tenth():
    settings = recipe(warmup_steps=10, learning_rate=0.02, phases=[phase({"text": 1}, 110)])
    rates = [learning_rate(step, settings) for step in range(110)]
    assert rates[:10] == pytest.approx([0.002 * (step + 1) for step in range(10)])
    assert max(rates) == rates[10] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[60] == pytest.approx(0.011), "half-way between the peak and its tenth"
    assert rates[-1] == pytest.approx(0.002, rel=0.01)
    assert learning_rate(0, recipe(warmup_steps=0)) == recipe().learning_rate
    assert learning_rate(39, recipe(warmup_steps=40)) == recipe().learning_rate


def test_weight_decay_is_for_matrices_alone_and_frozen_weights_are_left_out():
    objective = objective_of(shape=SHAPE.model_copy(update={"qkv_bias": True}))
    frozen = objective.lm.embedding.weight.requires_grad_(False)
    decayed, spared = adamw(objective, recipe(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in spared["params"]} == {1}
    optimized = [*decayed["params"], *spared["params"]]
    assert len(optimized) == len(list(objective.parameters())) - 1
    assert all(p is not frozen for p in optimized)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx2": True}, torch.float32),
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision("auto", torch.device("cpu")) == expected
    assert precision("auto", torch.device("cuda")) == torch.bfloat16
    assert precision("fp32", torch.device("cuda")) == torch.float32
    assert precision("bf16", torch.device("cpu")) == torch.bfloat16


def toy_corpus():
    """Sentences of two or three words; each piece of a word is heard as a unit of its own."""
    random = np.random.default_rng(0)
    data = []
    for _ in range(24):
        text = VOCABULARY.encode(" ".join(random.choice(WORDS, random.integers(2, 4))))
        units = [VOCABULARY.first_unit + piece * 7 % 20 for piece in text for _ in range(2)]
        data.append(Example(text, units))
    return data


def trained(settings):
    objective, logs = objective_of(), []
    train(objective, toy_corpus(), VOCABULARY, settings, seed=1, log=logs.append)
    return objective, logs


LEARNING = recipe(
    phases=[phase({"speech_first": 1}, 60)], micro_batch_tokens=400, unit_dropout=0.05
)


def test_a_small_model_learns_a_small_corpus_by_heart():
    _, logs = trained(LEARNING)
    assert [log.step for log in logs] == list(range(60))
    assert logs[0].loss > 3, "about log(vocabulary) before anything is learned"
    assert np.mean([log.loss for log in logs[-5:]]) < 0.4
    assert np.mean([log.ctc_loss for log in logs[-5:]]) < 0.5 * logs[0].ctc_loss


def test_training_is_its_steps_taken_one_by_one():
    settings = recipe(
        phases=[phase({"speech_first": 1}, 3)], clip=0.5, unit_dropout=0.2, weight_decay=0.1
    )
    loop, _ = trained(settings)
    objective, data = objective_of(), toy_corpus()
    parameters = list(objective.parameters())
    optimizer = adamw(objective, settings)
    for step in range(3):
        _, micro_batches = Curriculum(data, settings, seed=1).step(step)
        batches = [
            collate(data, chosen, VOCABULARY, 0.2, (1, step, number))
            for number, chosen in enumerate(micro_batches)
        ]
        sums = sum(objective(batch) for batch in batches)
        tokens, letters = sum(batch.counts() for batch in batches)
        gradients = torch.autograd.grad(sums[0] / tokens + 0.5 * sums[1] / letters, parameters)
        norm = torch.stack([one.square().sum() for one in gradients]).sum().sqrt()
        assert norm > 0.5, "the clip does something"
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient * (0.5 / norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.step()
    for ours, theirs in zip(loop.parameters(), parameters, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3)


def test_training_again_gives_the_same_weights():
    settings = recipe(phases=[phase({"speech_first": 1}, 4)], unit_dropout=0.2)
    (first, first_logs), (second, second_logs) = trained(settings), trained(settings)
    assert first_logs == second_logs
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_step_reports_losses_a_token_and_what_it_read():
    settings = recipe(phases=[phase({"speech_first": 1}, 1, "listening")])
    _, [log] = trained(settings)
    data = toy_corpus()
    _, micro_batches = Curriculum(data, settings, seed=1).step(0)
    batches = [collate(data, chosen, VOCABULARY, 0.0, (0,)) for chosen in micro_batches]
    losses = torch.stack([objective_of()(batch) for batch in batches]).sum(0)
    counts = torch.stack([batch.counts() for batch in batches]).sum(0)
    assert (log.phase, log.learning_rate) == ("listening", settings.learning_rate / 4)
    assert [log.loss, log.ctc_loss] == pytest.approx((losses / counts).tolist())
    assert log.tokens == sum(batch.ids.numel() for batch in batches)
    assert log.gradient_norm > 0


def test_bf16_training_learns_too():
    phases = [phase({"speech_first": 1}, 12)]
    settings = recipe(phases=phases, micro_batch_tokens=400, precision="bf16")
    objective, logs = trained(settings)
    assert logs[-1].loss < logs[0].loss - 0.5
    assert {p.dtype for p in objective.parameters()} == {torch.float32}


READS = CrossAttention(
    every=1,
    heads=2,
    head_width=16,
    window=12,
    encoder_layers=1,
    encoder_heads=2,
    encoder_feed_forward=32,
)


def frozen_lm():
    """A model that nobody trained, whose embeddings say something when they are read."""
    torch.manual_seed(2)
    lm = LM(SHAPE, VOCABULARY.size)
    with torch.no_grad():
        lm.embedding.weight.mul_(25)
    return lm.eval()


class Told:
    """Shows each example one window: its own text and states, or the next example's."""

    def __init__(self, data, right=True):
        self.data, self.right, self.asked = data, right, []
        texts, speech, *_ = zip(*data, strict=True)
        keys, _, slices, _ = read_states(frozen_lm(), VOCABULARY, texts, speech, logits=False)
        self.keys = [keys[own][:-1].clone() for own in slices]

    def __call__(self, chosen, draw):
        self.asked.append((list(chosen), draw.random()))
        told = [(one + (not self.right)) % len(self.data) for one in chosen]
        longest = max(len(self.data[one].text) for one in told)
        tokens = torch.zeros(len(told), longest, dtype=torch.long)
        keys = torch.zeros(len(told), longest, SHAPE.width)
        for row, one in enumerate(told):
            length = len(self.data[one].text)
            tokens[row, :length] = torch.tensor(self.data[one].text)
            keys[row, :length] = self.keys[one]
        return Windows(
            tokens=tokens,
            present=tokens > 0,
            keys=keys,
            index=torch.arange(len(told))[:, None],
            since=torch.zeros(len(told), 1, dtype=torch.long),
            until=torch.full((len(told), 1), 99),
        )


def adapting(settings, contexts, seed=1):
    """Train an adapter for the frozen model."""
    torch.manual_seed(3)
    adapter = Adapter(READS, SHAPE)
    objective, logs = Objective(frozen_lm(), len(VOCABULARY.alphabet), 0.0, adapter), []
    train(objective, toy_corpus(), VOCABULARY, settings, seed, logs.append, contexts)
    return objective, logs


ADAPTING = recipe(phases=[phase({"speech_first": 1}, 20)], micro_batch_tokens=400, ctc_weight=0.0)


def test_training_an_adapter_moves_the_adapter_and_never_the_language_model():
    objective, logs = adapting(ADAPTING, Told(toy_corpus()))
    for name, tensor in frozen_lm().state_dict().items():
        assert torch.equal(objective.lm.state_dict()[name], tensor), name
    torch.manual_seed(3)
    moved = objective.adapter.state_dict()
    for name, tensor in Adapter(READS, SHAPE).state_dict().items():
        assert not torch.equal(moved[name], tensor), name
    assert all(log.gradient_norm > 0 for log in logs)


def test_an_adapter_learns_to_read_what_it_is_told_and_that_the_wrong_words_are_no_use():
    data = toy_corpus()
    (_, right), (_, wrong) = (adapting(ADAPTING, Told(data, told)) for told in (True, False))
    ends = [np.mean([log.loss for log in logs[-5:]]) for logs in (right, wrong)]
    objective = Objective(frozen_lm(), len(VOCABULARY.alphabet), 0.0)
    _, micro_batches = Curriculum(data, ADAPTING, seed=1).step(0)
    batches = [collate(data, chosen, VOCABULARY, 0.0, (0,)) for chosen in micro_batches]
    loss = sum(objective(one)[0] for one in batches) / sum(one.counts()[0] for one in batches)
    assert right[0].loss == wrong[0].loss == pytest.approx(float(loss))
    assert ends[0] < ends[1] - 0.5
    assert ends[0] < right[0].loss - 2


def test_contexts_are_asked_for_every_micro_batch_from_its_own_seed():
    told, again = Told(toy_corpus()), Told(toy_corpus())
    settings = recipe(
        phases=[phase({"speech_first": 1}, 3)], ctc_weight=0.0, unit_dropout=0.2, micro_batches=2
    )
    (_, logs), (_, same) = adapting(settings, told), adapting(settings, again)
    curriculum = Curriculum(toy_corpus(), settings, seed=1)
    expected = [
        [one.index for one in chosen] for step in range(3) for chosen in curriculum.step(step)[1]
    ]
    assert [chosen for chosen, _ in told.asked] == expected
    assert len({draw for _, draw in told.asked}) == len(expected)
    assert told.asked == again.asked
    assert logs == same


def test_a_batch_without_contexts_has_no_windows():
    data, chosen = toy_corpus(), [Chosen(0, "speech_first"), Chosen(3, "speech_first")]
    bare = collate(data, chosen, VOCABULARY, 0.5, (7,))
    assert bare.windows is None
    told = Told(data)
    batch = collate(data, chosen, VOCABULARY, 0.5, (7,), told)
    assert told.asked[0][0] == [0, 3]
    assert len(batch.windows.index) == 2
    assert torch.equal(batch.ids, bare.ids), "contexts are drawn after the units"
