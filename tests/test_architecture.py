"""The map of the repository, held by parsing every file's imports."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("mmrag", "cluster", "jobs", "serve")
MAY_IMPORT = {
    "mmrag": {"mmrag"},
    "cluster": {"cluster", "mmrag"},
    "jobs": {"jobs", "cluster", "mmrag"},
    "serve": {"serve", "cluster", "mmrag"},
}

WINGS = {
    "ground": [
        "storage", "config.section", "config.speech", "config.model", "config.retrieval",
        "config.decoding", "config.experiment", "config", "text", "terminal", "records", "finite",
        "ahead", "durable", "processes", "arrays", "names", "folders", "cached", "differing",
        "artifact", "shipped",
        "score.rates", "score.recall", "score.significance", "score.entities", "score.biasing",
        "score",
    ],
    "speech": [
        "containers", "decoders", "audio", "resampling", "silero", "vad", "turns", "cutting",
        "ends", "attention", "hubert", "targets", "crops", "masked", "held_out", "pretraining",
        "units", "tokenized",
    ],
    "corpora": [
        "voices.speech", "voices.phones", "voices.ipa", "voices.espeak", "voices.kokoro",
        "voices.flite", "voices.engines", "augment", "ids", "manifest", "grammar", "sentences",
        "drawn", "synthetic",
        "recordings", "pronunciation", "spanish", "splits", "slue_voxpopuli", "spoken_squad",
        "passages", "librispeech_biasing", "kaldi", "lhotse_cuts", "huggingface", "sources",
    ],
    "model": [
        "vocabulary", "ngram", "pages", "cross_entropy", "layers", "cross_attention", "lm", "flops",
        "plan", "prepared", "contract", "states", "precision", "pretrained", "loss", "examples",
        "packed", "epochs", "curriculum", "train",
        "whisper_cache", "whisper", "whisper_training",
    ],
    "retrieval": [
        "wording", "segment", "mapped", "tensors", "columns", "stored", "wordings", "local",
        "datastore",
        "snapshots", "compaction", "verify", "gpu", "scalar", "ivf", "sizing", "held_out", "index",
        "reindexing", "retrievers", "weights", "knn",
        "interpolation", "recent", "lookup", "overlap", "searching", "window_cache", "memory",
        "entries", "phrases", "display", "terms", "upkeep", "shortlist", "confusion", "contexts",
    ],
    "decoding": [
        "confidence", "boost", "hypotheses", "candidates", "beginnings", "beams", "spelling",
        "spotting",
        "ctc", "joint", "fusion", "rows", "decode",
        "guard", "align", "stitch", "partial", "engine", "tune",
    ],
    "front door": ["recogniser", "transcribe", "contents", "client", "entry_options",
        "lookup_options", "administration", "cli",
    ],
}  # fmt: skip
"""The wings of mmrag from the ground up, and the modules of each in reading order."""
BELOW = {
    "ground": (),
    "speech": ("ground",),
    "corpora": ("ground", "speech"),
    "model": ("ground", "speech"),
    "retrieval": ("ground", "speech", "model"),
    "decoding": ("ground", "speech", "model", "retrieval"),
    "front door": ("ground", "speech", "corpora", "model", "retrieval", "decoding"),
}
"""Wing -> the wings that it may import. Corpora and model stand side by side."""
AT_THE_ROOT = ("ground", "front door")
"""Wings that are no directory of their own."""
WING_OF = {
    f"mmrag.{name}" if wing in AT_THE_ROOT else f"mmrag.{wing}.{name}": wing
    for wing, names in WINGS.items()
    for name in names
}
"""Every module of mmrag in reading order, with its wing."""

EVERYWHERE = {"numpy", "torch"}
HOMES = {
    "omegaconf": ["mmrag.config", "serve.settings"],
    "fsspec": ["mmrag.storage"],
    # A stage tells our mistake from the user's; the API describes and checks what it is sent.
    "pydantic": [
        "mmrag.config",
        "jobs.stage",
        "serve.settings",
        "serve.schema",
        "serve.datastore_schema",
        "serve.datastores",
        "serve.access.keyfile",
        "serve.realtime.events",
    ],
    "yaml": ["mmrag.config", "serve.settings", "serve.access.keyfile", "jobs.benchmark.endpoint"],
    # Read by the one, written by the other; and sent through its codecs to be made worse.
    "soundfile": ["mmrag.speech.decoders", "mmrag.corpora.augment", "cluster.recording"],
    "av": ["mmrag.speech.decoders"],
    "torchaudio": ["mmrag.speech", "mmrag.corpora.voices.speech"],
    "transformers": [
        "mmrag.speech.hubert",
        "mmrag.model.whisper",
        "mmrag.model.whisper_training",
        "jobs.benchmark",
    ],
    "huggingface_hub": ["mmrag.model.whisper"],
    "safetensors": ["mmrag.speech.hubert", "mmrag.model.pretrained"],
    "faiss": [
        "mmrag.speech.units",
        "mmrag.retrieval.gpu",
        "mmrag.retrieval.scalar",
        "mmrag.retrieval.ivf",
        "mmrag.retrieval.index",
        "mmrag.retrieval.overlap",
        "jobs.benchmark",
    ],
    "sentencepiece": ["mmrag.model.vocabulary"],
    "tokenizers": ["mmrag.model.vocabulary", "mmrag.model.whisper_training"],
    "espeakng_loader": ["mmrag.corpora.voices.espeak"],
    "faker": ["mmrag.corpora.synthetic"],
    "kokoro_onnx": ["mmrag.corpora.voices.kokoro"],
    "onnx": ["mmrag.corpora.voices.kokoro"],
    "onnxruntime": ["mmrag.corpora.voices.kokoro"],
    "lhotse": ["mmrag.corpora.lhotse_cuts", "mmrag.corpora.kaldi"],
    "datasets": ["mmrag.corpora.huggingface"],
    "scipy": ["mmrag.corpora.augment", "mmrag.retrieval.shortlist"],
    "rapidfuzz": ["mmrag.retrieval.shortlist"],
    "sklearn": ["mmrag.decoding.confidence"],
    "pyarrow": ["mmrag.speech.tokenized", "cluster.parts"],
    "jiwer": ["mmrag.score.rates"],
    "num2words": ["mmrag.text"],
    "ray": ["cluster", "jobs", "serve"],
    "fastapi": ["serve"],
    "fastapi_offline": ["serve.api"],
    "starlette": ["serve"],
    "aiohttp": ["jobs.benchmark.load", "jobs.benchmark.live"],
    "psutil": ["jobs.benchmark", "serve.operations.guardian"],
    "deepspeed": ["cluster.train", "cluster.checkpoints", "cluster.partitions"],
    "mlflow": ["cluster.store", "cluster.tracking", "cluster.registry"],
    "requests": ["mmrag.client", "serve.api", "serve.traces"],
    "opentelemetry": ["serve.traces"],
    "rich": ["mmrag.terminal", "mmrag.cli", "mmrag.administration", "jobs"],
    "matplotlib": ["jobs.evaluation_tables", "jobs.reproduce.report", "jobs.benchmark.growth"],
    # Ray Data's rows are Arrow's: values are packed on their way between our own processes.
    "pickle": ["cluster.parts"],
}
"""Library -> the modules, or whole rooms, that may import it."""

LAZY = {
    *("transformers", "huggingface_hub", "matplotlib", "espeakng_loader", "faker"),
    *("lhotse", "datasets", "num2words", "av", "kokoro_onnx", "onnx", "onnxruntime"),
    "sklearn",
}
"""Imported where they are needed: slow to load, or an optional extra."""


def sources() -> dict[str, ast.Module]:
    """Every module of the four rooms by its dotted name."""
    found = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


SOURCES = sources()
OURS = {name.removesuffix(".__init__") for name in SOURCES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Full dotted names of what a module imports, at any depth; relative imports as '.'."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "."
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in OURS else node.module


def source_of(module: str) -> ast.Module:
    """The syntax tree of a module or package."""
    return SOURCES.get(module) or SOURCES[f"{module}.__init__"]


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the source text of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_the_rooms_are_all_there():
    assert {name.split(".")[0] for name in SOURCES} == set(ROOMS)
    assert len(SOURCES) > 30


def test_imports_are_absolute():
    assert [name for name, tree in SOURCES.items() if "." in set(imports(tree))] == []


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_what_lies_below_it(room):
    wrong = [
        f"{name} imports {target}"
        for name, tree in SOURCES.items()
        if name.split(".")[0] == room
        for target in imports(tree)
        if target.split(".")[0] in ROOMS and target.split(".")[0] not in MAY_IMPORT[room]
    ]
    assert wrong == []


def test_every_module_of_mmrag_has_its_place_in_a_wing():
    packages = {name.removesuffix(".__init__") for name in SOURCES if name.endswith("__init__")}
    modules = {name for name in OURS if name.startswith("mmrag.")} - packages
    assert sorted(set(WING_OF) - packages) == sorted(modules)


def test_a_wing_of_mmrag_imports_only_the_wings_below_it():
    wrong = [
        f"{name} ({wing}) imports {target}: {wing} may import {', '.join(BELOW[wing]) or 'nothing'}"
        for name, wing in WING_OF.items()
        for target in imports(source_of(name))
        if target in WING_OF and WING_OF[target] not in (wing, *BELOW[wing])
    ]
    assert wrong == []


def test_a_module_imports_only_those_before_it_in_its_wing():
    order = list(WING_OF)
    wrong = [
        f"{name} imports {target}, which a reader of {WING_OF[name]} meets only after it"
        for name in order
        for target in imports(source_of(name))
        if WING_OF.get(target) == WING_OF[name] and order.index(target) >= order.index(name)
    ]
    assert wrong == []


def test_no_file_is_longer_than_500_lines_without_a_reason():
    """A longer one says why in its docstring: "Long because …"."""
    long = [
        f"{path.relative_to(ROOT)} has {count} lines"
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*"))
        if path.suffix in (".py", ".js", ".css", ".html")
        and (count := len((text := path.read_text()).splitlines())) > 500
        and "Long because" not in text[:1000]
    ]
    assert long == []


def third_party() -> dict[str, set[str]]:
    """Library -> the modules that import it. `pickle` is watched like one."""
    users: dict[str, set[str]] = {}
    for name, tree in SOURCES.items():
        for target in imports(tree):
            library = target.split(".")[0]
            known = library in sys.stdlib_module_names and library != "pickle"
            if library and not known and library not in ROOMS:
                users.setdefault(library, set()).add(name)
    return users


def test_every_library_stays_in_its_home():
    homeless = [
        f"{name} imports {library}"
        for library, users in third_party().items()
        for name in users
        if library not in EVERYWHERE
        and not any(f"{name}.".startswith(f"{home}.") for home in HOMES.get(library, ()))
    ]
    assert homeless == []


def test_the_table_of_homes_names_nothing_that_is_gone():
    users = third_party()
    gone = [
        f"{library} in {home}"
        for library, homes in HOMES.items()
        for home in homes
        if not any(f"{name}.".startswith(f"{home}.") for name in users.get(library, ()))
    ]
    assert gone == []


def test_slow_and_optional_libraries_are_imported_where_they_are_needed():
    at_import = [
        f"{name} imports {target}"
        for name, tree in SOURCES.items()
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for target in imports(node)
        if target.split(".")[0] in LAZY
    ]
    assert at_import == []


def test_nothing_reaches_into_rays_private_modules():
    texts = {name: ast.unparse(tree) for name, tree in SOURCES.items()}
    assert [name for name, text in texts.items() if "ray._" in text] == []


def test_no_code_is_taken_from_a_checkpoint():
    trusting = [
        f"{name}:{call.lineno}"
        for name, tree in SOURCES.items()
        for _, call in calls(tree)
        for keyword in call.keywords
        if keyword.arg in ("trust_remote_code", "allow_pickle")
        and getattr(keyword.value, "value", True) is not False
    ]
    assert trusting == []


def test_files_are_never_unpickled():
    unsafe = []
    for name, tree in SOURCES.items():
        for function, call in calls(tree):
            safely = any(k.arg == "weights_only" and k.value.value is True for k in call.keywords)
            if function.endswith("pickle.load") or (function == "torch.load" and not safely):
                unsafe.append(f"{name}:{call.lineno} {function}")
    assert unsafe == []


def test_product_code_raises_and_never_asserts():
    asserting = [
        f"{name}:{node.lineno}"
        for name, tree in SOURCES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
    ]
    assert asserting == []


def test_every_module_says_what_it_does():
    assert [name for name, tree in SOURCES.items() if not ast.get_docstring(tree)] == []


def test_no_file_is_a_drawer_for_everything():
    drawers = {"utils", "util", "helpers", "helper", "common", "misc"}
    assert [name for name in SOURCES if drawers & set(name.split("."))] == []
