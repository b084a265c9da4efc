"""One experiment in frozen models: a section a stage, a module of sections a wing."""

from mmrag.config.decoding import BatchDecode, Decode, Evaluate, Reproduce, Tune
from mmrag.config.experiment import Experiment, Tracking, parse, read
from mmrag.config.model import (
    AdapterTraining,
    Contexts,
    CrossAttention,
    Format,
    LanguageModel,
    Phase,
    Train,
    Vocabulary,
    WhisperShape,
    WhisperTraining,
)
from mmrag.config.retrieval import KNN, Datastore, Index, RetrievalMode, RetrievedAttention
from mmrag.config.section import SLUG, ConfigError, Section, Workers, as_dict, explain
from mmrag.config.speech import Hubert, Pretrain, PretrainRound, Synthesize, Tokenize

__all__ = [
    "KNN",
    "SLUG",
    "AdapterTraining",
    "BatchDecode",
    "ConfigError",
    "Contexts",
    "CrossAttention",
    "Datastore",
    "Decode",
    "Evaluate",
    "Experiment",
    "Format",
    "Hubert",
    "Index",
    "LanguageModel",
    "Phase",
    "Pretrain",
    "PretrainRound",
    "Reproduce",
    "RetrievalMode",
    "RetrievedAttention",
    "Section",
    "Synthesize",
    "Tokenize",
    "Tracking",
    "Train",
    "Tune",
    "Vocabulary",
    "WhisperShape",
    "WhisperTraining",
    "Workers",
    "as_dict",
    "explain",
    "parse",
    "read",
]
