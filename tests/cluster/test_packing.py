"""What the driver packs for its workers, by itself or by tasks."""

import numpy as np
import pytest

from cluster import packing
from cluster.packing import pack, pack_contexts, packed_contexts
from mmrag.model.packed import Packed
from mmrag.model.vocabulary import SentencePieces, Vocabulary
from mmrag.records import Units, Utterance
from mmrag.retrieval.contexts import write_neighbours
from mmrag.speech.tokenized import Tokenized, TokensError, write_part

WORDS = ["light", "door", "lamp"]


@pytest.fixture
def tokens(tmp_path):
    """Two splits of five parts each, of two utterances; one of all cannot be written."""
    random = np.random.default_rng(0)
    splits = []
    for split in ("lm", "text"):
        splits.append(tmp_path / "tokens" / split)
        splits[-1].mkdir(parents=True)
        for number in range(5):
            ids = random.integers(0, 9, 6).astype(np.int32)
            said = [
                Tokenized(
                    Utterance(id=f"{split}-{number}-{each}", text=str(random.choice(WORDS))),
                    Units(ids, np.ones_like(ids)) if split == "lm" else None,
                )
                for each in range(2)
            ]
            write_part(splits[-1] / f"part-{number:05d}.parquet", said)
    strange = [Tokenized(Utterance(id="strange", text="日本"), None)]
    write_part(splits[-1] / "part-00005.parquet", strange)
    return splits


@pytest.fixture
def vocabulary(tmp_path):
    known = Vocabulary(SentencePieces.train(WORDS, 40), units=9)
    directory = tmp_path / "vocabulary"
    directory.mkdir()
    known.save(directory)
    return known, directory


@pytest.mark.ray
def test_tasks_pack_what_one_process_packs(tokens, vocabulary, tmp_path, monkeypatch, ray_cluster):
    known, directory = vocabulary
    by_tasks = Packed(pack(tokens, directory, tmp_path / "tasks"), known)
    monkeypatch.setattr(packing, "MANY", 99)
    alone = Packed(pack(tokens, directory, tmp_path / "alone"), known)
    assert list(by_tasks) == list(alone) and len(alone) == 20
    assert list(by_tasks.rejected()) == list(alone.rejected())
    assert by_tasks.counts == {"utterances": 20, "units": 60, "rejected": 1}
    names = [one.name for one in alone]
    assert names == [f"{s}-{n}-{e}" for s in ("lm", "text") for n in range(5) for e in range(2)]


@pytest.mark.ray
def test_a_part_that_is_none_is_named_and_nothing_is_packed(
    tokens, vocabulary, tmp_path, ray_cluster
):
    _, directory = vocabulary
    (tokens[0] / "part-00003.parquet").write_bytes(b"torn")
    with pytest.raises(TokensError, match=r"part-00003\.parquet is not a tokenized part"):
        pack(tokens, directory, tmp_path / "draft")
    assert not (tmp_path / "draft" / packing.FOLDER / "corpus").exists()
    with pytest.raises(TokensError, match="no tokenized parts in"):
        pack([tmp_path / "nothing"], directory, tmp_path / "draft")


def test_neighbours_are_packed_by_the_name_of_their_datastore(tmp_path):
    for number, name in enumerate(("right", "wrong")):
        (tmp_path / "neighbours" / name).mkdir(parents=True)
        found = {"u0": np.full((3, 2), number), "u1": np.full((1, 2), -1)}
        write_neighbours(tmp_path / "neighbours" / name / "part-00000.npz", found)
    pack_contexts(tmp_path / "neighbours", ("right", "wrong"), tmp_path / "draft")
    near = packed_contexts(tmp_path / "draft", ("right", "wrong"))
    assert near["right"]["u0"].tolist() == [[0, 0]] * 3
    assert near["wrong"]["u0"].tolist() == [[1, 1]] * 3
