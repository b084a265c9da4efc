from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_models import perturb
from torch.nn import functional

from mmrag.config import CrossAttention, LanguageModel
from mmrag.model.cross_attention import Adapter, Windows
from mmrag.model.epochs import Chosen
from mmrag.model.examples import Example
from mmrag.model.lm import LM
from mmrag.model.loss import IGNORE, Batch, Objective, combine
from mmrag.model.train import collate
from mmrag.model.vocabulary import EOS, PAD, Vocabulary

CTC_WEIGHT = 0.7
SHAPE = LanguageModel(width=16, layers=1, heads=2, kv_heads=1, feed_forward=24, tied=True)


class Pieces:
    """Eight pieces, a letter each."""

    unknown = None
    size = 8

    def decode(self, pieces):
        return "".join("abcdefgh"[piece] for piece in pieces)


VOCABULARY = Vocabulary(Pieces(), units=6)
TEXT = range(VOCABULARY.first_piece, VOCABULARY.first_unit)
UNITS = range(VOCABULARY.first_unit, VOCABULARY.size)
DATA = [
    Example([*TEXT[:3]], [*UNITS, *UNITS[:3]]),
    Example([*TEXT[2:4]], [*UNITS[:5]]),
    Example([*TEXT[1:6]], None),
    Example([TEXT[4], TEXT[4]], [*UNITS[1:4]]),
    Example([], [*UNITS[:2]]),
    Example([*TEXT[:4]], [*UNITS[2:5]]),  # more letters than units: no CTC alignment
]
FORMS = ["speech_first", "speech_first", "text", "speech_first", "speech", "speech_first"]
ROWS = [Chosen(index, form) for index, form in enumerate(FORMS)]


def batch_of(rows):
    return collate(DATA, rows, VOCABULARY, unit_dropout=0, seed=(0,))


def objective_of(ctc_weight=CTC_WEIGHT):
    torch.manual_seed(0)
    objective = Objective(LM(SHAPE, VOCABULARY.size), len(VOCABULARY.alphabet), ctc_weight)
    return perturb(objective)


def step(objective, batches):
    """The step's loss over all `batches`, and the gradient it leaves."""
    objective.zero_grad()
    counts = torch.stack([batch.counts() for batch in batches]).sum(0)
    losses = [combine(objective(batch), counts, (1.0, CTC_WEIGHT)) for batch in batches]
    for loss in losses:
        loss.backward()
    return sum(losses).detach(), [p.grad.clone() for p in objective.parameters()]


@settings(max_examples=25, deadline=None)
@given(st.permutations(ROWS), st.sets(st.integers(1, len(ROWS) - 1)))
def test_the_loss_of_a_step_does_not_depend_on_how_its_rows_are_cut(rows, cuts):
    """Workers and micro-batches are both cuts, so this is the proof for either."""
    objective = objective_of()
    loss, gradient = step(objective, [batch_of(ROWS)])
    edges = [0, *sorted(cuts), len(rows)]
    parts = [batch_of(rows[a:b]) for a, b in pairwise(edges)]
    cut_loss, cut_gradient = step(objective, parts)
    torch.testing.assert_close(cut_loss, loss)
    for one, other in zip(cut_gradient, gradient, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_the_loss_of_a_step_is_no_mean_of_means():
    objective = objective_of()
    short, long = batch_of(ROWS[3:4]), batch_of(ROWS[2:3])
    whole, _ = step(objective, [short, long])
    means = [step(objective, [one])[0] for one in (short, long)]
    assert abs(whole - sum(means) / 2) > 1e-3


def test_both_losses_are_divided_by_their_own_counts():
    sums, counts = torch.tensor([6.0, 10.0]), torch.tensor([3.0, 4.0])
    assert combine(sums, counts, (1.0, 0.5)) == 6 / 3 + 0.5 * 10 / 4
    assert combine(sums, torch.ones(2), (1.0, 0.5)) == 6 + 0.5 * 10
    assert combine(torch.zeros(2), torch.zeros(2), (1.0, 0.5)) == 0


def test_padding_never_changes_the_loss():
    objective, batch = objective_of(), batch_of(ROWS)
    sums = objective(batch)
    rows = len(ROWS)
    for pad in (PAD, UNITS[2]):
        padded = Batch(
            ids=torch.cat((batch.ids, torch.full((rows, 4), pad)), 1),
            targets=torch.cat((batch.targets, torch.full((rows, 4), IGNORE)), 1),
            speech=batch.speech,
            letters=torch.cat((batch.letters, torch.full((rows, 3), 5)), 1),
            letter_counts=batch.letter_counts,
        )
        torch.testing.assert_close(objective(padded), sums)
        assert torch.equal(padded.counts(), batch.counts())


def next_token_loss(objective, ids, first_target):
    logits = objective.lm(torch.tensor([ids])).logits
    return functional.cross_entropy(
        logits[first_target:-1], torch.tensor(ids[first_target + 1 :]), reduction="sum"
    )


def test_the_next_token_loss_is_that_of_each_row_by_itself():
    objective = objective_of()
    total = torch.zeros(())
    for index, form in ROWS:
        text, units, *_ = DATA[index]
        ids = VOCABULARY.sequence(form, text, units or [])
        total += next_token_loss(objective, ids, 2 + len(units) if form == "speech_first" else 0)
    torch.testing.assert_close(objective(batch_of(ROWS))[0], total)


def test_the_ctc_loss_is_torchs_over_the_units_of_each_transcription_by_itself():
    objective = objective_of()
    total, aligned = torch.zeros(()), 0
    for index, form in ROWS:
        text, units, *_ = DATA[index]
        if form != "speech_first":
            continue
        ids = torch.tensor([VOCABULARY.sequence(form, text, units)])
        states = objective.lm(ids).hidden[0, 2 : 2 + len(units)]
        target = torch.tensor(VOCABULARY.spelling(text)) + 1
        lengths = torch.tensor(len(units)), torch.tensor(len(target))
        loss = functional.ctc_loss(
            objective.ctc(states).log_softmax(-1), target, *lengths, reduction="sum"
        )
        if loss.isfinite():
            total, aligned = total + loss, aligned + 1
    assert aligned == 3, "one of the four has no alignment, and counts as no loss"
    torch.testing.assert_close(objective(batch_of(ROWS))[1], total)


def test_a_text_without_alignment_leaves_no_nan_in_the_gradient():
    _, gradient = step(objective_of(), [batch_of(ROWS[5:])])
    assert all(one.isfinite().all() for one in gradient)


def test_what_is_counted_is_what_is_trained_on():
    transcripts = [len(DATA[row.index].text) for row in ROWS if row.form == "speech_first"]
    text, speech = len(DATA[2].text) + 2, len(DATA[4].units) + 2  # the marker and the end too
    tokens = sum(transcripts) + len(transcripts) + text + speech
    assert batch_of(ROWS).counts().tolist() == [tokens, sum(transcripts)]


def test_a_transcription_is_trained_on_its_text_and_the_end_alone():
    batch = batch_of(ROWS)
    for row, (index, form) in enumerate(ROWS):
        trained = batch.targets[row][batch.targets[row] != IGNORE].tolist()
        ids = VOCABULARY.sequence(form, DATA[index].text, DATA[index].units or [])
        assert trained == ([*DATA[index].text, EOS] if form == "speech_first" else ids[1:])


def test_only_the_units_of_a_transcription_are_read_by_ctc():
    batch = batch_of(ROWS)
    for row, (index, form) in enumerate(ROWS):
        start, end = batch.speech[row].tolist()
        expected = DATA[index].units if form == "speech_first" else []
        assert batch.ids[row, start:end].tolist() == expected


def test_without_ctc_no_head_is_built_and_its_loss_is_zero():
    with_ctc, without = objective_of(), objective_of(ctc_weight=0)
    assert without.ctc is None
    assert {n for n, _ in without.named_parameters()} == {
        n for n, _ in with_ctc.named_parameters() if not n.startswith("ctc.")
    }
    without.lm.load_state_dict(with_ctc.lm.state_dict())
    sums = without(batch_of(ROWS))
    assert sums[1] == 0
    torch.testing.assert_close(sums[0], with_ctc(batch_of(ROWS))[0])


def test_a_batch_with_nothing_to_learn_from_costs_nothing():
    nothing = batch_of(ROWS[:2])
    nothing.targets.fill_(IGNORE)
    nothing.speech.fill_(0)
    loss, gradient = step(objective_of(), [nothing])
    assert loss == 0
    assert not any(one.any() for one in gradient)


@pytest.mark.parametrize("rows", [ROWS[:2], ROWS[2:3]])
def test_a_batch_moves_as_a_whole(rows):
    meta = torch.device("meta")
    bare, shown = batch_of(rows).to(meta), replace(batch_of(rows), windows=windows_for(rows))
    assert bare.windows is None
    for moved in (bare, shown.to(meta)):
        tensors = [v for one in (moved, moved.windows) if one for v in vars(one).values()]
        held = {value.device.type for value in tensors if isinstance(value, torch.Tensor)}
        assert held == {"meta"}
    assert shown.windows.tokens.device.type == "cpu", "a copy moved"


WINDOWS = Windows(
    tokens=torch.tensor([[*TEXT[:3]], [*TEXT[3:6]], [TEXT[6], TEXT[7], PAD]]),
    present=torch.tensor([[True] * 3, [True] * 3, [True, True, False]]),
    keys=torch.randn(3, 3, 16, generator=torch.Generator().manual_seed(4)),
    index=torch.empty(0),
    since=torch.empty(0),
    until=torch.empty(0),
)
READS = CrossAttention(
    every=1,
    heads=2,
    head_width=8,
    window=3,
    encoder_layers=1,
    encoder_heads=2,
    encoder_feed_forward=16,
)


def windows_for(rows):
    """Each example is shown two windows by its own number, the second from its second token on."""
    index = torch.tensor([[row.index % 3, (row.index + 1) % 3] for row in rows])
    since = torch.tensor([[0, 1]] * len(rows))
    return replace(WINDOWS, index=index, since=since, until=torch.full_like(since, 9))


def reading_objective():
    """A frozen language model and an adapter whose gates are open."""
    objective = Objective(
        objective_of(ctc_weight=0).lm, len(VOCABULARY.alphabet), 0.0, Adapter(READS, SHAPE)
    )
    torch.manual_seed(1)
    perturb(objective.adapter)
    return objective


SPOKEN = [row for row in ROWS if row.form == "speech_first"]


def shown(rows):
    return replace(batch_of(rows), windows=windows_for(rows))


def test_the_loss_of_a_step_with_windows_does_not_depend_on_how_its_rows_are_cut():
    objective = reading_objective()

    def gradient(parts):
        objective.zero_grad()
        batches = [shown(part) for part in parts]
        counts = torch.stack([batch.counts() for batch in batches]).sum(0)
        losses = [combine(objective(batch), counts, (1.0, 0.0)) for batch in batches]
        for loss in losses:
            loss.backward()
        return sum(losses).detach(), [p.grad for p in objective.adapter.parameters()]

    loss, whole = gradient([SPOKEN])
    cut_loss, cut = gradient([SPOKEN[:1], SPOKEN[1:3], SPOKEN[3:]])
    torch.testing.assert_close(cut_loss, loss)
    for one, other in zip(cut, whole, strict=True):
        assert one.any(), "everything in the adapter learns"
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_a_row_reads_its_windows_from_the_token_before_its_transcript_on():
    objective, total, plain = reading_objective(), torch.zeros(()), torch.zeros(())
    for row in SPOKEN:
        text, units, *_ = DATA[row.index]
        ids = torch.tensor([VOCABULARY.sequence("speech_first", text, units)])
        first = 2 + len(units)
        memory = objective.adapter.memory(
            windows_for([row]), objective.lm.embedding, torch.tensor([first]), len(text) + 1
        )
        target = torch.tensor([*text, EOS])
        for read in (memory, None):
            logits = objective.lm(ids, memory=read).logits[first:-1]
            loss = functional.cross_entropy(logits, target, reduction="sum")
            total, plain = (total + loss, plain) if read else (total, plain + loss)
    torch.testing.assert_close(objective(shown(SPOKEN))[0], total)
    assert abs(total - plain) > 0.1, "otherwise nothing was read"


def test_an_untrained_adapter_leaves_the_loss_as_it_is_bit_for_bit():
    objective = reading_objective()
    plain = Objective(objective_of(ctc_weight=0).lm, len(VOCABULARY.alphabet), 0.0)
    objective.adapter = Adapter(READS, SHAPE)
    assert torch.equal(objective(shown(SPOKEN)), plain(batch_of(SPOKEN)))


@pytest.mark.parametrize("checkpointed", [1, 2])
def test_an_adapter_learns_the_same_where_activations_are_computed_again(checkpointed):
    objective = reading_objective()
    gradients = []
    for again in (None, checkpointed):
        objective.zero_grad()
        objective.lm.checkpointed, objective.lm.loss_chunk = again, again
        objective(shown(SPOKEN))[0].backward()
        gradients.append([one.grad.clone() for one in objective.adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_an_adapter_freezes_the_language_model_and_nothing_else_does():
    objective = reading_objective()
    objective(shown(SPOKEN))[0].backward()
    assert all(p.grad is None and not p.requires_grad for p in objective.lm.parameters())
    assert all(p.requires_grad for p in objective.adapter.parameters())
    assert all(p.requires_grad for p in objective_of().lm.parameters())
