"""Several processes pretrain the encoder that one process would have, on the very same crops."""

import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from crew import together

from mmrag.config import Hubert, Pretrain
from mmrag.finite import NonFiniteLoss
from mmrag.records import Timed
from mmrag.speech import hubert, pretraining
from mmrag.speech.crops import Share, draw
from mmrag.speech.held_out import HeldOut
from mmrag.speech.hubert import HubertEncoder, generator_at, seeded_at
from mmrag.speech.pretraining import pretrain
from mmrag.speech.targets import Phones
from mmrag.speech.units import kmeans

RATE = 16_000
SHAPE = Hubert(
    conv_channels=8, norm="layer_norm", width=16, layers=2, heads=2, feed_forward=24, layer=2
)
ROUNDS = [
    {"target": "mfcc", "classes": 5, "steps": 2},
    {"target": "hubert", "classes": 7, "steps": 2},
    {"target": "phones", "steps": 2},
]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch):
    """Threads share torch's random state, which processes do not: none draws from it while another
    makes its weights."""
    lock, begin = threading.RLock(), pretraining.Round.__init__

    @contextmanager
    def alone(*place: int):
        with lock, seeded_at(*place):
            yield

    def in_step(self, *about, processes, **more) -> None:
        begin(self, *about, processes=processes, **more)
        processes.add([torch.zeros(1)])

    monkeypatch.setattr(pretraining.Round, "__init__", in_step)
    for module in (hubert, pretraining):
        monkeypatch.setattr(module, "seeded_at", alone)


def plan(**changes) -> Pretrain:
    fields = {
        "rounds": ROUNDS,
        "batch_seconds": 2.5,
        "crop_seconds": 0.5,
        "learning_rate": 1e-3,
        "mask_probability": 0.1,
        "mask_length": 3,
        "sample_seconds": 2,
        "checkpoint_steps": 2,
        "num_cpus": 1,
    }
    return Pretrain(**{**fields, **changes})


def clips() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    lengths = (9000, 4000, 7000, 12_000, 5000, 16_000)
    return [torch.randn(length, generator=generator) for length in lengths]


def phones() -> Phones:
    half = [[Timed("a", 0.0, 0.1), Timed("b", 0.1, len(wave) / RATE)] for wave in clips()]
    return Phones(half)


class Stopped(Exception):
    pass


def run(directory: Path, count: int, stop_at: int | None = None, **changes):
    """The encoder that each of `count` processes ends with, and what the first one logged."""
    directory.mkdir(exist_ok=True)
    log = []

    def record(step, metrics):
        log.append((step, metrics))
        if step == stop_at:
            raise Stopped

    def work(member) -> HubertEncoder:
        given = changes.get("waves", clips())
        return pretrain(
            *(SHAPE, changes.get("plan", plan()), given, 0, directory, kmeans, record),
            phones=changes.get("phones", phones()),
            names=[f"clip-{number}" for number in range(len(given))],
            held_out={"dev": HeldOut(clips()[:3], [["a"], ["a", "b"], ["b"]])},
            reject=changes.get("reject"),
            processes=member if count > 1 else None,
        )

    return together(count, work), log


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    [encoder], log = run(tmp_path_factory.mktemp("alone"), 1)
    return encoder, log


def assert_the_same(encoders, log, alone) -> None:
    expected, told = alone
    first = told[-len(log)][0]
    assert [step for step, _ in log] == list(range(first, len(told) + 1))
    for (step, one), (_, other) in zip(log, told[-len(log) :], strict=True):
        assert one.keys() == other.keys(), step
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=2e-3, abs=1e-3), (step, name)
    for encoder in encoders:
        state = encoder.state_dict()
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(state[name], value, atol=2e-3, rtol=2e-3)


def test_several_processes_make_the_steps_of_one(tmp_path, alone):
    encoders, log = run(tmp_path, 2)
    assert_the_same(encoders, log, alone)
    first, *others = [encoder.state_dict() for encoder in encoders]
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


def test_all_leave_out_the_same_layers(tmp_path):
    """Each step those of its own number (LayerDrop)."""
    dropping = plan(layer_drop=0.5)
    [alone], told = run(tmp_path / "one", 1, plan=dropping)
    encoders, log = run(tmp_path / "two", 2, plan=dropping)
    assert_the_same(encoders, log, (alone, told))


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, alone):
    """Two, then one, then three: the steps are those of the run that never changed."""
    told = []
    for count, stop_at in ((2, 3), (1, 4), (3, None)):
        if stop_at:
            with pytest.raises(Stopped):
                run(tmp_path, count, stop_at)
            continue
        encoders, told = run(tmp_path, count)
    assert told[0][0] == 5, "it goes on from the state at step 4"
    assert_the_same(encoders, told, alone)


def drawn(share: Share | None, step: int = 0, waves=None):
    encoder = HubertEncoder.create(SHAPE, seed=0)
    waves = clips() if waves is None else waves
    return draw(encoder, waves, phones(), plan(), generator_at(0, 1, step), share=share)


@pytest.mark.parametrize("count", [2, 3, 40])
def test_the_crops_of_a_step_are_cut_over_the_processes(count):
    whole = drawn(None)
    shares = [drawn(Share(rank, count, {})) for rank in range(count)]
    found = [clip for share in shares for clip in share.clips]
    assert sorted(found) == sorted(whole.clips) and whole.dealt == ()
    seconds = [int(share.lengths.sum()) for share in shares]
    assert sum(seconds) == int(whole.lengths.sum())
    assert max(seconds) - min(seconds) <= RATE // 2, "a crop's difference at most"
    masked = sum(int(share.mask.sum()) for share in shares)
    assert masked == int(whole.mask.sum())
    for rank, share in enumerate(shares):
        assert [list(clips) for clips in share.dealt] == [each.clips for each in shares]
        assert share.dealt[rank] == share.clips


def test_what_others_hear_is_not_read_once_its_length_is_known():
    class Counting(list):
        read = 0

        def __getitem__(self, clip):
            Counting.read += 1
            return super().__getitem__(clip)

    waves, share = Counting(clips()), Share(0, 2, {})
    for step in range(12):
        drawn(share, step, waves)
    assert share.samples == {clip: len(wave) for clip, wave in enumerate(clips())}
    Counting.read = 0
    own = drawn(share, 12, waves)
    assert Counting.read == len(own.clips)


def test_a_clip_that_is_gone_between_two_steps_is_named_and_tried_again():
    """… with the others, which all read it anew: the error is none that ends the run."""

    class Vanishing(list):
        gone = False

        def __getitem__(self, clip):
            if self.gone:
                raise ValueError("clip.wav: no such file")
            return super().__getitem__(clip)

    waves, share = Vanishing(clips()), Share(0, 2, {})
    for step in range(12):
        drawn(share, step, waves)
    waves.gone = True
    with pytest.raises(RuntimeError, match=r"cannot be now: clip\.wav: no such file"):
        drawn(share, 12, waves)


def test_a_loss_that_is_no_number_stops_all_and_names_the_clips_of_that_process(tmp_path):
    waves = clips()
    waves[3] = torch.full_like(waves[3], torch.nan)
    rounds = [{"target": "phones", "steps": 9}]
    with pytest.raises(NonFiniteLoss, match=r"round 1, step \d: the loss .*clip-3") as raised:
        run(tmp_path, 3, waves=waves, plan=plan(rounds=rounds))
    read = {f"clip-{clip}" for clip in range(len(waves)) if f"clip-{clip}" in str(raised.value)}
    assert len(read) < len(waves), "those of the other two are not suspected"


def test_what_only_the_first_process_meets_ends_the_others_too(tmp_path):
    def broken(*_):
        raise ValueError("nothing to cluster")

    def work(member):
        with pytest.raises(ValueError) as raised:
            pretrain(
                *(SHAPE, plan(), clips(), 0, tmp_path, broken, lambda *_: None),
                phones=phones(),
                processes=member,
            )
        return str(raised.value)

    others = "the first worker could not make the targets"
    assert together(2, work) == ["nothing to cluster", others]


def test_a_state_that_a_worker_does_not_see_yet_is_not_gone_on_from(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, 2, stop_at=3)
    known, read = threading.local(), torch.load

    def late(path, **how):
        state = read(path, **how)
        if known.rank == 1:
            state["step"] -= 1
        return state

    def work(member):
        known.rank = member.rank
        with pytest.raises(RuntimeError, match="do not all find the same state"):
            pretrain(
                *(SHAPE, plan(), clips(), 0, tmp_path, kmeans, lambda *_: None),
                phones=phones(),
                processes=member,
            )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", late)
        together(2, work)
