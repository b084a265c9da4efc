"""The dev split is measured alike by any number of workers, and nothing is learned from it."""

from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from crew import together
from random_models import perturb

from cluster.validation import DevSplit, check_copy, cut, sampled, whole
from mmrag.config import Dev, Experiment, LanguageModel, read
from mmrag.decoding.decode import decode
from mmrag.model.curriculum import TrainingError
from mmrag.model.epochs import Chosen
from mmrag.model.examples import examples
from mmrag.model.lm import LM
from mmrag.model.loss import Objective
from mmrag.model.train import collate
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.recogniser import longest
from mmrag.records import Units, Utterance
from mmrag.score import word_error_rate
from mmrag.speech.tokenized import Tokenized, write_part

TEXTS = [
    "turn the lights on in the kitchen",
    "what is the weather in the morning",
    "call the doctor",
    "play some music in the kitchen",
    "is the doctor in",
    "on",
    "turn on the music and call the doctor in the morning",
]
UNITS = 12


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(SentencePieces.train(TEXTS, 40), UNITS)


def said(number: int, text: str | None, spoken: bool = True) -> Tokenized:
    draw = np.random.default_rng(number)
    count = 3 + 2 * number
    steps = draw.integers(1, UNITS, count)
    ids = (np.cumsum(steps) % UNITS).astype(np.int32)
    units = Units(ids, np.ones(count, np.int32)) if spoken else None
    return Tokenized(Utterance(id=f"dev-{number}", text=text, duration=count / 50), units)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    directory = tmp_path / "dev"
    directory.mkdir()
    write_part(directory / "part-0.parquet", [said(n, text) for n, text in enumerate(TEXTS)])
    return directory


@pytest.fixture(scope="module")
def shape() -> LanguageModel:
    return LanguageModel(width=16, layers=2, heads=2, kv_heads=1, feed_forward=24, tied=True)


@pytest.fixture
def objective(shape, vocabulary) -> Objective:
    torch.manual_seed(3)
    lm = perturb(LM(shape, vocabulary.size))
    return Objective(lm, len(vocabulary.alphabet), ctc_weight=0.5)


def settings(experiment: Experiment, shape: LanguageModel, **dev) -> Experiment:
    dev = {"loss_steps": 2, "wer_steps": 4, "loss_utterances": 6, "wer_utterances": 5, **dev}
    train = experiment.train.model_copy(update={"dev": Dev(**dev), "micro_batch_tokens": 60})
    return experiment.model_copy(update={"train": train, "lm": shape})


def measured(experiment, split, vocabulary, objective, count=1, done=4, gather=None):
    def work(member):
        dev = DevSplit(
            *(split, experiment, vocabulary, torch.float32),
            *(member.rank, member.count, member.summed, gather),
        )
        return dev.measure(objective, done)

    return together(count, work)


def chosen(split, vocabulary, count):
    from mmrag.speech import tokenized

    return sampled(tokenized.read(split), vocabulary, count)


def test_the_loss_is_that_of_each_sentence_by_itself(
    experiment, shape, split, vocabulary, objective
):
    """… in one process, a sentence at a time: sums over counts, divided once."""
    [told] = measured(settings(experiment, shape), split, vocabulary, objective)
    data = examples(chosen(split, vocabulary, 6), vocabulary)
    for name, form in (("dev_loss", "speech_first"), ("dev_text_loss", "text")):
        loss, targets = 0.0, 0
        for n in range(len(data)):
            batch = collate(data, [Chosen(n, form)], vocabulary, 0.0, (0,))
            with torch.no_grad():
                loss += objective(batch)[0].item()
            targets += int(batch.counts()[0])
        assert told[name] == pytest.approx(loss / targets, rel=1e-5), name


@pytest.mark.parametrize("count", [2, 3, 9])
def test_any_number_of_workers_measures_the_same(
    experiment, shape, split, vocabulary, objective, count
):
    alone = settings(experiment, shape)
    [expected] = measured(alone, split, vocabulary, objective)
    for told in measured(alone, split, vocabulary, objective, count):
        assert told == pytest.approx(expected, rel=1e-6)
    assert set(expected) == {"dev_loss", "dev_text_loss", "dev_wer"}


def test_transcripts_are_those_of_the_decoder_that_serves(
    experiment, shape, split, vocabulary, objective
):
    own = settings(experiment, shape)
    [told] = measured(own, split, vocabulary, objective, 1)
    sample = chosen(split, vocabulary, 6)[:5]
    greedy = own.decode.model_copy(update={"beams": 1})
    heard = decode(
        objective.lm.eval(),
        vocabulary,
        [vocabulary.encode_units(one.units) for one in sample],
        [longest(one.utterance.duration, greedy) for one in sample],
        greedy,
    )
    texts = [vocabulary.decode(one.tokens) for one in heard]
    rate = word_error_rate([one.utterance.text for one in sample], texts, resamples=1).rate
    assert told["dev_wer"] == pytest.approx(rate)


def test_it_is_measured_at_its_intervals_and_after_the_last_step(
    experiment, shape, split, vocabulary, objective
):
    own = settings(experiment, shape)
    losses = {"dev_loss", "dev_text_loss"}
    for done, expected in (
        (1, set()),
        (2, losses),
        (4, {*losses, "dev_wer"}),
        (own.train.steps, {*losses, "dev_wer"}),
    ):
        [told] = measured(own, split, vocabulary, objective, done=done)
        assert set(told) == expected, done
    off = settings(experiment, shape, loss_steps=0, wer_steps=0)
    assert measured(off, split, vocabulary, objective, done=own.train.steps) == [{}]


def test_nothing_is_learned_and_no_random_number_is_drawn(
    experiment, shape, split, vocabulary, objective
):
    before = {name: one.clone() for name, one in objective.state_dict().items()}
    state = torch.get_rng_state()
    objective.train()
    measured(settings(experiment, shape), split, vocabulary, objective)
    assert objective.training and objective.lm.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(one.grad is None for one in objective.parameters())
    for name, one in objective.state_dict().items():
        assert torch.equal(one, before[name]), name


def test_the_sample_follows_from_the_names_and_speech_comes_first(vocabulary):
    told = [said(n, TEXTS[n], spoken=n != 2) for n in range(4)]
    names = {
        tuple(one.utterance.id for one in sampled(order, vocabulary, 3))
        for order in permutations(told)
    }
    assert len(names) == 1 and "dev-2" not in names.pop()
    assert [one.utterance.id for one in sampled(told, vocabulary, 9)][-1] == "dev-2"
    nothing = [said(5, None), said(6, "Ω")]
    assert sampled(nothing, vocabulary, 3) == []


def test_what_is_longer_than_a_micro_batch_is_not_measured(vocabulary):
    data = examples([said(n, TEXTS[n]) for n in range(6)], vocabulary)
    for budget in (25, 40, 100):
        batches = cut(data, vocabulary, "speech_first", budget)
        assert all(batch.ids.numel() <= budget for batch in batches)
        short = [one for one in data if 4 + len(one.text) + len(one.units) <= budget]
        assert sum(len(batch.ids) for batch in batches) == len(short)


def test_text_that_nobody_speaks_has_a_loss_as_text_alone(
    experiment, shape, tmp_path, vocabulary, objective
):
    directory = tmp_path / "dev"
    directory.mkdir()
    told = [said(n, text, spoken=False) for n, text in enumerate(TEXTS)]
    write_part(directory / "part-0.parquet", told)
    own = settings(experiment, shape, wer_steps=0)
    for told in measured(own, directory, vocabulary, objective, count=2):
        assert set(told) == {"dev_text_loss"}
    with pytest.raises(TrainingError, match=r"train\.dev\.wer_steps: nobody speaks in .*dev"):
        measured(settings(experiment, shape), directory, vocabulary, objective)


def test_a_split_without_a_text_that_can_be_written_is_refused(
    experiment, shape, tmp_path, vocabulary, objective
):
    directory = tmp_path / "dev"
    directory.mkdir()
    write_part(directory / "part-0.parquet", [said(1, None)])
    with pytest.raises(TrainingError, match=r"train\.dev\.split dev: none of its texts"):
        measured(settings(experiment, shape), directory, vocabulary, objective)


@contextmanager
def gathering(parameters):
    """As DeepSpeed does it: whole inside of the block, and then a stub again."""
    for one in parameters:
        one.data = one.kept
    yield
    for one in parameters:
        one.data = torch.empty(0)


def test_a_partitioned_model_decodes_from_a_copy_that_each_worker_has_to_itself(
    experiment, shape, split, vocabulary, objective
):
    [expected] = measured(settings(experiment, shape), split, vocabulary, objective)
    lm = objective.lm
    weights = {name: one.detach().clone() for name, one in lm.named_parameters()}
    for one in lm.parameters():
        one.kept, one.data = one.data, torch.empty(0)
    copy = whole(lm, gathering)
    assert all(torch.equal(one, weights[name]) for name, one in copy.named_parameters())
    assert all(one.numel() == 0 for one in lm.parameters())
    own = settings(experiment, shape, loss_steps=0)
    [told] = measured(own, split, vocabulary, objective, gather=gathering)
    assert told == {"dev_wer": expected["dev_wer"]}


def test_a_copy_that_there_is_no_room_for_is_refused_by_its_setting(
    experiment, shape, split, vocabulary, objective
):
    check_copy(Dev(), 6_750_000_000, torch.bfloat16)
    with pytest.raises(TrainingError, match=r"25\.1 GiB, and train\.dev\.wer_copy_gib is 16:"):
        check_copy(Dev(), 6_750_000_000, torch.float32)
    tight = settings(experiment, shape, wer_copy_gib=1e-6)
    measured(tight, split, vocabulary, objective)
    with pytest.raises(TrainingError, match=r"train\.dev\.wer_steps: under ZeRO-3"):
        measured(tight, split, vocabulary, objective, gather=gathering)


def test_an_experiment_that_says_nothing_of_it_measures_the_loss():
    configs = Path(__file__).parents[2] / "jobs" / "configs"
    dev = read(configs / "train_tiny.yaml").train.dev
    assert dev == Dev() and dev.loss_steps and not dev.wer_steps
