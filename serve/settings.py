"""The service's settings: one complete YAML section, `args` of the application in `config.yaml`.

Whatever `build` is given besides is merged over it, and checked before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
    field_validator,
)
from yaml import YAMLError

from mmrag.config import (
    KNN,
    SLUG,
    ConfigError,
    Decode,
    RetrievedAttention,
    Section,
    Spotting,
    explain,
    resolved,
)
from mmrag.config import Speaking as ConfiguredSpeaking
from mmrag.model.prepared import Compute
from mmrag.storage import is_url

ORIGIN = r"https?://[A-Za-z0-9.-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:]+\](:\d{1,5})?"
CONFIG = Path(__file__).parent / "config.yaml"
ALIASED = r"models:/[^@/]+@[^@/]+"
"""A registered model by an alias, which may be moved."""
KEYS = "MMRAG_API_KEYS"
"""Environment variable with the API keys, separated by commas; KEYS_FILE names a file of them."""
KEYS_FILE = "MMRAG_API_KEYS_FILE"

ALIASES = (
    "whisper-1",
    "gpt-transcribe",
    "gpt-live-transcribe",
    "gpt-4o-transcribe",
    "gpt-4o-mini-transcribe",
    "gpt-4o-mini-transcribe-2025-12-15",
    "gpt-realtime-whisper",
)
"""OpenAI's models that clients name where they name any."""
Alias = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,100}$")]


class Replicas(Section):
    """How many copies of a deployment there are, and what each of them takes and holds."""

    num_cpus: float = Field(gt=0)
    """CPUs a replica reserves; may be a fraction."""
    num_gpus: float = Field(default=0, ge=0)
    threads: PositiveInt = 1
    """Threads of its matrix products."""
    min: PositiveInt
    max: PositiveInt
    target_ongoing_requests: PositiveFloat
    """Requests a replica should have at a time: more of them start another replica."""
    max_ongoing_requests: PositiveInt
    """Requests a replica takes at a time."""
    max_queued_requests: PositiveInt
    """Requests that each caller lets wait for a replica; beyond, they are refused (429)."""
    upscale_delay_s: float = Field(ge=0)
    downscale_delay_s: float = Field(ge=0)
    drain_s: PositiveFloat
    """How long a replica that is to stop may finish what it has."""

    def model_post_init(self, _: Any) -> None:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is more than max {self.max}")
        if not self.target_ongoing_requests < self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests {self.target_ongoing_requests} is not below "
                f"max_ongoing_requests {self.max_ongoing_requests}: nothing would ever scale up"
            )


class Encoding(Replicas):
    """Audio to units."""

    batch_seconds: PositiveFloat
    """Audio encoded at once, seconds."""
    wait_seconds: float = Field(ge=0)
    """How long a clip waits for others to be encoded with."""


class Decoding(Replicas):
    """Units to text."""

    rows: PositiveInt
    """Hypotheses extended in one step; further requests of the replica wait."""
    cache_tokens: PositiveInt | None = None
    """Tokens of prompts and transcripts that are kept at once, all rows together; a request waits
    until there is room for it. None for as many as the rows take."""
    fallback: tuple[PositiveFloat, ...] = ()
    """Temperatures at which a transcript that is not credible (`decode.agreement`) is made again,
    one after the other, once it was made without retrieval."""
    compute: Compute | None = None
    """What our own language model's weights are multiplied in: float32, bfloat16, or int8, which is
    near to them; auto measures which of the exact ones is quicker here, None leaves the format that
    they are read in. A Whisper stays as it is."""
    compiled: bool | None = False
    """Whether its steps are compiled, which takes a while when a replica starts and needs a C++
    compiler; None measures whether they are the quicker."""


class Pool(Section):
    """Actors that small datastores share."""

    actors: PositiveInt
    entries: NonNegativeInt
    """Of the largest datastore that is in the pool, if it has one shard; larger ones have actors of
    their own."""
    memory_mb: PositiveFloat
    """Keys that one actor holds in memory; beyond, the datastore asked for longest ago is closed
    until it is asked for again."""


class RetrieverReplicas(Replicas):
    """Datastores and their index shards."""

    shard_cpus: float = Field(gt=0)
    """CPUs a shard's actor reserves."""
    shard_gpus: float = Field(default=0.0, ge=0)
    """GPUs that it reserves, and searches its lists and codes on."""
    shard_replicas: PositiveInt
    """Copies of each shard."""
    answer_seconds: PositiveFloat
    """How long a shard may take to answer before a step goes on without it."""
    idle_seconds: PositiveFloat
    """A shard that nobody has asked for so long ends; it starts again when it is needed."""
    pool: Pool


class TenantQuotas(Section):
    """What each tenant may have at a time; None for whatever the service has room for."""

    requests: PositiveInt | None = None
    """Requests in flight, of all replicas of the ingress together."""
    sessions: PositiveInt | None = None
    """Live sessions."""
    audio_seconds: PositiveFloat | None = None
    """Audio a minute, seconds."""
    entries: PositiveInt | None = None
    """Entries of all its datastores together."""
    datastores: PositiveInt | None = None
    """None for `limits.datastores`."""


class Limits(Section):
    """What a request may ask for."""

    upload_mb: PositiveFloat
    audio_seconds: PositiveFloat
    requests: PositiveInt
    """Requests that a replica of the ingress works on; beyond, they are refused (429)."""
    receiving: PositiveInt
    """Requests whose body a replica of the ingress is still receiving, besides; beyond, 429."""
    receive_seconds: PositiveFloat
    """The longest that a request's body may take to come in (408)."""
    receive_bytes_per_second: PositiveFloat
    """The slowest that it may come in, on average after the first ten seconds (408)."""
    timeout_seconds: PositiveFloat
    """The longest that a request may take (504)."""
    phrases: PositiveInt
    """Phrases that may come with a request."""
    texts: PositiveInt
    """Texts that may be added to a datastore at once."""
    text_length: PositiveInt
    """Characters of a phrase or a text."""
    texts_length: PositiveInt
    """Characters of all phrases or texts of a request together: all of them are spoken."""
    datastores: PositiveInt
    """Of each tenant."""
    sessions: PositiveInt = 64
    """Realtime sessions that a replica of the ingress holds; beyond, they are refused (429)."""
    session_seconds: PositiveFloat = 14_400
    """The longest that a session lasts."""
    silent_seconds: PositiveFloat = 7200
    """The longest that no audio comes in one."""
    session_buffer_seconds: PositiveFloat = 120
    """Audio of one that waits to be transcribed; beyond, it is refused by an `error` event."""
    tenant: TenantQuotas = TenantQuotas()
    """Of a tenant for which the file of keys says nothing else."""


class Cors(Section):
    """Which pages of other origins may call the service from a browser."""

    origins: tuple[str, ...] = ()
    """`https://app.example`, with the port where it is not the usual one; `*` for all of them."""

    @field_validator("origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for one in origins:
            if one != "*" and not re.fullmatch(ORIGIN, one):
                raise ValueError(f"{one!r} is no origin: https://HOST or https://HOST:PORT, or *")
        return tuple(one.lower() for one in origins)


class Logs(Section):
    """What is written down about requests."""

    transcripts: bool = False
    """Whether the log holds what was said, and what unforeseen errors quote; a line a request."""
    audit: Path | None = None
    """A directory for the audit log: who changed what, a JSON line each; None for none."""

    @field_validator("audit")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return _absolute(path)


class Traces(Section):
    """Who is told how long each part of a request took."""

    endpoint: str | None = Field(default=None, pattern=r"https?://.+")
    """OpenTelemetry's collector (OTLP over HTTP: http://host:4318); None for nobody."""
    share: float = Field(default=0.01, ge=0, le=1)
    """Of requests whose caller does not say whether they are traced."""


class RetrievalDefaults(Section):
    """Retrieval parameters of a datastore that nobody tuned any for (`jobs.tune`)."""

    knn: KNN
    """kNN-LM alone."""
    both: KNN
    """kNN-LM beside cross-attention."""
    attention: RetrievedAttention
    """Cross-attention; a datastore of at most `whole` documents is read whole."""


class Speaking(ConfiguredSpeaking):
    """Who says the phrases of requests, and what is put into datastores as text."""

    seconds: float = Field(default=60, ge=0)
    """How much speech of slow synthesizers (Kokoro) a request may have made, by its letters: what
    is more than that is all said once, by espeak-ng."""

    @field_validator("kokoro")
    @classmethod
    def _absolute(cls, directory: str | None) -> str | None:
        return directory and str(_absolute(Path(directory)))


class Settings(Section):
    """The whole service."""

    name: str = Field(pattern=SLUG)
    """The model's id in the API."""
    aliases: tuple[Alias, ...] = ALIASES
    """Further ids that it answers to, so that clients that name another model get this one."""
    usage: Literal["duration", "tokens"] = "duration"
    """What a json answer counts: seconds of audio, or tokens. Verbose answers always count seconds,
    and streams tokens."""
    unknown_fields: Literal["refuse", "warn"] = "refuse"
    """What becomes of a form with a field that nobody here reads: refused (400), or answered
    without it, with a Warning header that names it."""
    model: str
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION` of the MLflow registry, a model of this
    package (`mmrag:tiny`), or a directory, or its URL, with hubert/, codebook/ and lm/."""
    registry: str
    """MLflow's address; MLFLOW_TRACKING_URI in the environment wins."""
    model_check_s: float = Field(default=0, ge=0)
    """How often the registry is asked whether the alias of `model` was moved, seconds: the service
    then goes over to the new version. 0: never, a service stays with the version it began with."""
    cache: Path
    """Where registered models are kept once fetched."""
    languages: tuple[str, ...] = Field(min_length=1)
    """ISO 639-1 codes of what the model understands; the first is reported."""
    device: str
    datastores: Path
    """Directory of the datastores; shared by all machines."""
    datastores_from: str | None = None
    """A directory or a URL whose datastores are copied there when the service starts, but for those
    that are there already."""
    local: Path | None = None
    """A directory on each machine's own disk to which shards copy their keys, where `datastores` is
    a share; None to read them where they are."""
    preload: tuple[str, ...] = ()
    """Datastores whose shards start with the service, not with the first request."""
    speaking: Speaking = Speaking()
    decode: Decode
    spotting: Spotting = Spotting()
    """How phrases are spotted."""
    retrieval_defaults: RetrievalDefaults | None = None
    """None for the model's own."""
    limits: Limits
    cors: Cors = Cors()
    logs: Logs = Logs()
    traces: Traces = Traces()
    """Of a service that `python -m serve` starts; `serve deploy` has `tracing_config` for it."""
    ingress: Replicas
    encoder: Encoding
    retriever: RetrieverReplicas
    decoder: Decoding

    @property
    def names(self) -> tuple[str, ...]:
        """Every id that the model answers to, its own first."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))

    @field_validator("aliases")
    @classmethod
    def _kept_promises(cls, aliases: tuple[str, ...]) -> tuple[str, ...]:
        for alias in aliases:
            if "diarize" in alias:
                raise ValueError(f"{alias} promises speakers, whom this service cannot tell apart")
        return aliases

    @field_validator("datastores", "cache", "local", mode="before")
    @classmethod
    def _on_disk(cls, path: Any) -> Any:
        if is_url(str(path)):
            raise ValueError(f"{path} is a URL, and what lies there changes: name a directory")
        return path

    @field_validator("datastores", "cache", "local")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return _absolute(path)

    def model_post_init(self, _: Any) -> None:
        """Only an alias can be moved. And what computes on GPUs by name reserves them, or others
        are placed on the same."""
        if self.model_check_s and not re.fullmatch(ALIASED, self.model):
            raise ValueError(
                f"model_check_s is {self.model_check_s:g} with model {self.model}: only the alias "
                "of a registered model can be moved (models:/NAME@ALIAS); set it to 0"
            )
        for part in ("encoder", "decoder"):
            if self.device.startswith("cuda") and not getattr(self, part).num_gpus:
                raise ValueError(
                    f"{part}.num_gpus is 0 with device {self.device}: name the share of a GPU that "
                    f"a replica takes ({part}.num_gpus=0.5), or leave device at auto"
                )


def read(given: Mapping[str, Any], config: Path = CONFIG) -> Settings:
    """The settings of `config`, with what is `given` merged in; ConfigError names what is wrong.

    Keys of `given` may be nested or dotted (`decoder.rows`), values as YAML writes them.
    """
    try:
        merged = OmegaConf.create(OmegaConf.load(config)["applications"][0]["args"])
        for key, value in given.items():
            if isinstance(value, str):
                value = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={value}"]))["x"]
            OmegaConf.update(merged, key, value, merge=True)
        values = resolved(merged)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{config}: {error}") from None
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, str(config))) from None


def _absolute(path: Path | None) -> Path | None:
    try:
        return path and path.expanduser().absolute()
    except RuntimeError:  # no HOME, and no account either
        raise ValueError(f"{path}: nobody's home is known here, write the path out") from None


def http_options(config: Path = CONFIG) -> dict[str, Any]:
    """Where the service listens, as Ray Serve wants it."""
    return OmegaConf.to_container(OmegaConf.load(config)["http_options"])
