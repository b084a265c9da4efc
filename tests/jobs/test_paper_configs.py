"""The experiments on published corpora, each run on a few sentences in the corpus's own layout.

The sentences are spoken by espeak-ng, the models are those of the package: what is measured says
nothing, but every stage runs on what the one before it left.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import soundfile

from jobs import build_datastore, evaluate, pretrain_hubert, stage, tokenize
from mmrag import artifact, config
from mmrag.config import Experiment
from mmrag.corpora.voices.espeak import Synthesizer, Voice
from mmrag.retrieval import phrases
from mmrag.retrieval.datastore import Datastore
from mmrag.speech import tokenized
from mmrag.speech.audio import SAMPLE_RATE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
PAPER = Path(__file__).parents[2] / "jobs" / "configs" / "paper"
WORKERS = "{count: 1, num_cpus: 0.8, num_gpus: 0}"
MINIATURE = [
    *("hubert.weights=mmrag:tiny", "tokenize.codebook=mmrag:tiny", "train.base=mmrag:tiny"),
    *("lm.width=192", "lm.layers=4", "lm.heads=4", "lm.kv_heads=4", "lm.feed_forward=512"),
    *(f"{section}.workers={WORKERS}" for section in ("tokenize", "datastore", "evaluate")),
    *("tokenize.units=200", "tokenize.batch_seconds=30", "tokenize.part_seconds=20"),
    *("datastore.part_utterances=20", "datastore.index={kind: flat, shards: 1}"),
    *("decode.beams=1", "decode.batch_seconds=60"),
    *("evaluate.retriever=local", "evaluate.resamples=50"),
]
SENTENCES = [
    "please call mary jones today",
    "the council in brussels met on monday",
    "we have to talk about the budget",
    "denver broncos won the game",
    "a train leaves from zurich at noon",
    "she opened a small shop in lisbon",
]


@pytest.fixture(scope="module")
def speak() -> Callable[[str, Path], None]:
    synthesizer, voice = Synthesizer(), Voice("reader", "en-us")

    def write(text: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, synthesizer.speak(text, voice).wave, SAMPLE_RATE)

    return write


@pytest.fixture
def corpora(tmp_path, monkeypatch) -> Path:
    """Where the experiments look for their corpora."""
    monkeypatch.setenv("MMRAG_CORPUS", str(tmp_path / "corpora"))
    monkeypatch.setenv("MMRAG_RUNS", str(tmp_path / "runs"))
    (tmp_path / "corpora").mkdir()
    return tmp_path / "corpora"


def experiment(name: str, *overrides: str) -> Experiment:
    return config.read(PAPER / f"{name}.yaml", [*MINIATURE, *overrides])


def told(made: artifact.Artifact, split: str) -> Iterator[tokenized.Tokenized]:
    return tokenized.read(made.path / split)


def rejected(made: artifact.Artifact) -> dict[str, str]:
    rows = [json.loads(line) for line in (made.path / "rejected.jsonl").open()]
    return {row["source"]: row["reason"] for row in rows}


def measured(made: artifact.Artifact) -> dict[tuple[str, str | None], dict]:
    rows = json.loads((made.path / "results.json").read_text())["rows"]
    return {(row["mode"], row["datastore"]): row for row in rows}


def of_a_domain(name: str) -> tuple[artifact.Artifact, artifact.Artifact]:
    """Tokens and evaluation of an experiment with a datastore of its lm split."""
    with stage.console.capture():
        pretrain_hubert.run(experiment(name))
        tokens = tokenize.run(experiment(name))
        build_datastore.run(experiment(name, "datastore.name=text", "datastore.audio=none"))
        build_datastore.run(experiment(name))
        return tokens, evaluate.run(experiment(name))


def check_a_domain(evaluated: artifact.Artifact, utterances: int) -> None:
    results = measured(evaluated)
    assert set(results) == {
        ("none", None),
        ("knn", "text"),
        *((mode, "multimodal") for mode in ("knn", "cross_attention", "both")),
    }
    for row in results.values():
        assert row["utterances"] == utterances and row["words"] > 0 and row["wer"] >= 0


def test_spoken_squad_runs_from_its_files_to_a_table(ray_cluster, corpora, speak):
    root = corpora / "Spoken-SQuAD"
    for file, folder, topics in (
        ("spoken_train-v1.1.json", "train_wav", 10),
        ("spoken_test-v1.1.json", "dev_wav", 3),
    ):
        data = []
        for number in range(topics):
            said = [SENTENCES[number % 6], SENTENCES[(number + 3) % 6]]
            answers = [{"answer_start": 7, "text": said[0].split()[1]}]
            questions = [{"question": "?", "id": str(number), "answers": answers}]
            paragraph = {"context": " ".join(f"{one}." for one in said), "qas": questions}
            data.append({"title": f"topic {number}", "paragraphs": [paragraph]})
            for index, sentence in enumerate(said):
                speak(sentence, root / folder / f"{number}_0_{index}.wav")
        data.append({"title": "damaged", "paragraphs": [{"qas": []}]})
        (root / file).write_text(json.dumps({"version": "1.1", "data": data}))
    (root / "dev_wav" / "2_0_1.wav").unlink()
    tokens, evaluated = of_a_domain("spoken_squad")
    assert [len(list(told(tokens, split))) for split in ("lm", "dev", "test")] == [18, 2, 5]
    assert set(rejected(tokens)) == {
        f"{root}/spoken_train-v1.1.json: paragraph 10_0",
        f"{root}/spoken_test-v1.1.json: paragraph 3_0",
        f"{root}/dev_wav/2_0_1.wav",
    }
    check_a_domain(evaluated, 5)


def test_slue_voxpopuli_runs_from_its_files_to_a_table(ray_cluster, corpora, speak):
    root = corpora / "slue-voxpopuli"
    header = "id\traw_text\tnormalized_text\tspeaker_id\tsplit\traw_ner\tnormalized_ner"
    for split, count in (("fine-tune", 6), ("dev", 2), ("test", 4)):
        rows = [header]
        for number, text in enumerate(SENTENCES[:count]):
            spans = [["GPE", text.index("brussels"), 8]] if "brussels" in text else []
            id = f"2013-PLENARY_{split}_{number}"
            rows.append(f"{id}\t{text}\t{text}\t28266\t{split}\t{spans}\t{spans}")
            speak(text, root / split / f"{id}.ogg")
        rows.append(f"broken\tx\tx\t1\t{split}\t[]\t[['GPE', 0, 99]]")
        (root / f"slue-voxpopuli_{split}.tsv").write_text("\n".join(rows) + "\n")
    tokens, evaluated = of_a_domain("slue_voxpopuli")
    assert [len(list(told(tokens, split))) for split in ("lm", "dev", "test")] == [6, 2, 4]
    assert len(rejected(tokens)) == 3
    assert ("brussels",) in {one.utterance.entities for one in told(tokens, "test")}
    assert all(one.units is not None for one in told(tokens, "test"))
    check_a_domain(evaluated, 4)


def test_librispeech_biasing_runs_from_its_files_to_a_table(ray_cluster, corpora, speak):
    tree = corpora / "LibriSpeech" / "test-clean" / "61" / "70968"
    rare = ["jones", "brussels", "budget", "broncos", "zurich", "lisbon"]
    rows = []
    for number, (text, word) in enumerate(zip(SENTENCES, rare, strict=True)):
        others = [name for name in rare if name != word][:2]
        listed = json.dumps(sorted([word, *others]))
        rows.append(f"61-70968-{number:04d}\t{text}\t{json.dumps([word])}\t{listed}\n")
        speak(text, tree / f"61-70968-{number:04d}.flac")
    rows.append("61-70968-0099\tbroken\n")
    tables = corpora / "is21_deep_bias" / "ref"
    tables.mkdir(parents=True)
    (tables / "test-clean.biasing_100.tsv").write_text("".join(rows))
    name = "librispeech_biasing"
    with stage.console.capture():
        pretrain_hubert.run(experiment(name))
        tokens = tokenize.run(experiment(name))
        store = build_datastore.run(experiment(name))
        evaluated = evaluate.run(experiment(name))
    assert len(list(told(tokens, "test"))) == 6
    assert list(rejected(tokens)) == [f"{tables}/test-clean.biasing_100.tsv:7"]
    lists = phrases.read_lists(tokens.path / phrases.LISTS)
    assert lists["61-70968-0001"] == ["brussels", "budget", "jones"]
    assert set(phrases.Phrases(Datastore.open(store.path)).names) == set(rare)
    results = measured(evaluated)
    ways = ("knn", "cross_attention", "both")
    assert set(results) == {("none", None), *((mode, "phrases") for mode in ways)}
    assert all(row["utterances"] == 6 for row in results.values())
    assert 0 < results["knn", "phrases"]["recall_at_k"] < 1
