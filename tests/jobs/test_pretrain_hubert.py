"""The encoder's pretraining as a job: on whatever is tokenized, aligned or not."""

import json

import numpy as np
import pytest
import soundfile

from cluster.progress import records
from jobs import pretrain_hubert
from mmrag.config import PretrainRound
from mmrag.speech.hubert import HubertEncoder

pytestmark = pytest.mark.ray


@pytest.fixture
def speech(workspace, tmp_path):
    """A source of its own: half of the corpus without its alignment, a broken file, a dev split."""
    directory = tmp_path / "speech"
    directory.mkdir()
    for split, keep in (("lm", 12), ("dev", 3)):
        rows = [json.loads(line) for line in (workspace.path / "corpus" / f"{split}.jsonl").open()][
            :keep
        ]
        for number, row in enumerate(rows):
            wave, rate = soundfile.read(workspace.path / "corpus" / row["audio_filepath"])
            soundfile.write(directory / f"{split}-{number}.flac", wave, rate)
            row |= {"audio_filepath": f"{split}-{number}.flac", "utterance": f"{split}-{number}"}
            if number % 2:
                del row["phones"]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "lm-3.flac").write_bytes(b"fLaC")
    return directory


def test_it_reads_what_is_tokenized_and_measures_phones_on_dev(workspace, borrow, speech):
    experiment, manifest = workspace.experiment, speech / "lm.jsonl"
    again = manifest.read_text().splitlines(keepends=True)[0]
    manifest.write_text(f"{manifest.read_text()}{again}{{\n")
    pretrain = experiment.pretrain.model_copy(
        update={"rounds": (PretrainRound(target="phones", steps=12),), "checkpoint_steps": 6}
    )
    tokenize = experiment.tokenize.model_copy(update={"source": str(speech)})
    changed = borrow().model_copy(update={"pretrain": pretrain, "tokenize": tokenize})
    made = pretrain_hubert.run(changed)
    assert HubertEncoder.load(made.path).width == experiment.hubert.width
    measured = [
        {name: value for name, value in record.items() if name.startswith("phone_errors_")}
        for record in records(made.path)
    ]
    assert [number for number, one in enumerate(measured, start=1) if one] == [6, 12]
    assert all(0 < rate <= 2 for one in measured for rate in one.values())
    assert made.summary["phone_errors_assistant"] == round(
        measured[-1]["phone_errors_assistant"], 3
    )
    listed = [json.loads(line) for line in (made.path / "rejected.jsonl").open()]
    assert made.summary["rejected"] == len(listed) == 3
    told = {one["source"].removeprefix(f"{manifest}:"): one["reason"] for one in listed}
    assert "'lm-0' is also on line 1" in told["13"] and "not JSON" in told["14"]
    assert "lm-3.flac" in told["lm-3"]
    assert np.isfinite([record["loss"] for record in records(made.path)]).all()


@pytest.mark.slow
def test_two_workers_on_ray_train_make_the_steps_of_one_process(workspace, borrow, speech):
    """… on the same crops; what one of them cannot read is listed once."""

    def made(place: str, workers: int):
        rounds = (
            PretrainRound(target="mfcc", classes=8, steps=3),
            PretrainRound(target="phones", steps=5),
        )
        changes = {"rounds": rounds, "checkpoint_steps": 4, "workers": workers, "num_cpus": 0.8}
        pretrain = workspace.experiment.pretrain.model_copy(update=changes)
        tokenize = workspace.experiment.tokenize.model_copy(update={"source": str(speech)})
        experiment = borrow().model_copy(update={"pretrain": pretrain, "tokenize": tokenize})
        where = experiment.workspace / place
        return pretrain_hubert.run(experiment.model_copy(update={"workspace": where}))

    one, two = made("one", 1), made("two", 2)
    alone, shared = records(one.path), records(two.path)
    assert [record["step"] for record in shared] == list(range(1, 9))
    for first, second in zip(alone, shared, strict=True):
        assert first.keys() == second.keys()
        for name in ("loss", "accuracy", "gradient_norm", "learning_rate"):
            assert second[name] == pytest.approx(first[name], rel=1e-3, abs=1e-3), first["step"]
    assert alone[-1]["phone_errors_assistant"] == pytest.approx(
        shared[-1]["phone_errors_assistant"], abs=0.05
    )
    theirs = HubertEncoder.load(two.path).state_dict()
    for name, value in HubertEncoder.load(one.path).state_dict().items():
        assert np.allclose(value, theirs[name], atol=2e-3), name
    listed = (two.path / "rejected.jsonl").read_text()
    assert listed == (one.path / "rejected.jsonl").read_text() and "lm-3" in listed
    hidden = {path.name for path in two.path.iterdir() if path.name.startswith(".")}
    assert not hidden


@pytest.mark.slow
def test_what_every_worker_gives_up_for_is_raised_once_and_as_it_is(workspace, borrow, speech):
    pretrain = workspace.experiment.pretrain.model_copy(
        update={"workers": 2, "num_cpus": 0.8, "leave_out": ("nobody",)}
    )
    tokenize = workspace.experiment.tokenize.model_copy(update={"source": str(speech)})
    changed = borrow().model_copy(update={"pretrain": pretrain, "tokenize": tokenize})
    with pytest.raises(ValueError, match=r"^pretrain\.leave_out: no utterance nobody to pretrain"):
        pretrain_hubert.run(changed)
