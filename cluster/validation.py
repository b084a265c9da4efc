"""What a model in training makes of the dev split: its loss, and its word error rate.

The workers share the work. Nothing is learned, and no random number is drawn: a run that measures
ends with the weights of one that does not.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from cluster.parts import parts
from mmrag.config import Dev, Experiment, Format
from mmrag.decoding.decode import decode
from mmrag.model.curriculum import TrainingError
from mmrag.model.epochs import Chosen
from mmrag.model.examples import Example, examples, speakable
from mmrag.model.lm import LM, parameter_count
from mmrag.model.loss import Batch, Objective
from mmrag.model.train import collate
from mmrag.model.vocabulary import Vocabulary
from mmrag.recogniser import longest
from mmrag.score.rates import word_counts
from mmrag.speech.tokenized import Tokenized, read
from mmrag.storage import Location

GIB = 1 << 30
MEASURED: dict[str, Format] = {"dev_loss": "speech_first", "dev_text_loss": "text"}
"""Name in `metrics.jsonl` -> what the sample is shown as: to be transcribed, and as text alone."""

Gather = Callable[[list[Tensor]], AbstractContextManager]
"""Makes partitioned parameters whole inside of a block, in every worker."""


class DevSplit:
    """A fixed sample of a split, cut among the workers that train together."""

    def __init__(
        self,
        directory: Location,
        experiment: Experiment,
        vocabulary: Vocabulary,
        dtype: torch.dtype,
        rank: int,
        world: int,
        add_up: Callable[[Tensor], Tensor],
        gather: Gather | None = None,
    ) -> None:
        """`directory` holds the split's Parquet; `dtype` is what the weights are in, `add_up` gives
        the sum over all workers, and `gather` makes parameters whole where they are partitioned.

        TrainingError, in every worker alike, if there is nothing in the split to be measured, or no
        room to decode in.
        """
        settings = experiment.train
        self._settings = settings.dev
        self._steps = settings.steps
        self._vocabulary = vocabulary
        self._decoding = experiment.decode.model_copy(update={"beams": 1})
        self._add_up = add_up
        self._gather = gather
        if gather and settings.dev.wer_steps:
            check_copy(settings.dev, parameter_count(experiment.lm, vocabulary.size), dtype)
        most = max(settings.dev.loss_utterances, settings.dev.wer_utterances)
        sample = sampled(read(directory), vocabulary, most)
        if not sample:
            raise TrainingError(
                f"train.dev.split {directory.name}: none of its texts can be written"
            )
        budget = settings.micro_batch_tokens
        first = examples(sample[: settings.dev.loss_utterances], vocabulary)
        self._batches = {
            name: list(dealt(cut(first, vocabulary, form, budget), rank, world))
            for name, form in MEASURED.items()
        }
        spoken = [one for one in sample if one.units is not None]
        if settings.dev.wer_steps and not spoken:
            raise TrainingError(f"train.dev.wer_steps: nobody speaks in {directory}")
        self._spoken = spoken[: settings.dev.wer_utterances][rank::world]

    def measure(self, model: torch.nn.Module, done: int) -> dict[str, float]:
        """What is to be measured after `done` steps, by the names of `metrics.jsonl`; called by
        every worker, and the same in each. `model` is an Objective, or an engine around one.

        * `dev_loss`: nats a target of the text, given the speech;
        * `dev_text_loss`: nats a token of the same texts by themselves;
        * `dev_wer`: errors over words of greedy transcripts, without retrieval.
        """
        told: dict[str, float] = {}
        with resting(model):
            if self._due(self._settings.loss_steps, done):
                for name, batches in self._batches.items():
                    told |= self._loss(model, name, batches)
            if self._due(self._settings.wer_steps, done):
                told |= self._word_error_rate(getattr(model, "module", model))
        return told

    def _due(self, every: int, done: int) -> bool:
        return every > 0 and (done % every == 0 or done == self._steps)

    @torch.no_grad()
    def _loss(
        self, model: torch.nn.Module, name: str, batches: Sequence[tuple[Batch, bool]]
    ) -> dict[str, float]:
        """Nats a target, teacher-forced: sums over counts of all workers, divided once."""
        device = next(model.parameters()).device
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, counts in batches:
            loss = model(batch.to(device))[0]
            if counts:
                sums += torch.stack((loss.double().cpu(), batch.counts()[0].double()))
        loss, targets = self._add_up(sums).tolist()
        return {name: loss / targets} if targets else {}

    def _word_error_rate(self, objective: Objective) -> dict[str, float]:
        """By the decoder that serves, with the weights as they are; each worker's share is decoded
        by itself, and so without waiting for the others at every token."""
        lm = whole(objective.lm, self._gather) if self._gather else objective.lm
        counts = torch.zeros(4, dtype=torch.float64)
        seconds = self._decoding.batch_seconds
        for part in parts(self._spoken, lambda one: one.utterance.duration, seconds):
            speech = [self._vocabulary.speech_input(one.units) for one in part.work]
            limits = [longest(one.utterance.duration, self._decoding) for one in part.work]
            heard = decode(lm, self._vocabulary, speech, limits, self._decoding)
            texts = [self._vocabulary.decode(one.tokens) for one in heard]
            said = [self._vocabulary.spoken(one.utterance.text) for one in part.work]
            counts += torch.from_numpy(word_counts(said, texts)).sum(0)
        *errors, words = self._add_up(counts).tolist()
        return {"dev_wer": sum(errors) / words} if words else {}


def sampled(split: Iterable[Tokenized], vocabulary: Vocabulary, count: int) -> list[Tokenized]:
    """At most `count` utterances with a text that can be written, those with speech first.

    Which ones follows from their ids, wherever they stand in the split.
    """
    told = (one for one in speakable(split, vocabulary) if one.utterance.text)

    def order(one: Tokenized) -> tuple[bool, bytes]:
        return one.units is None, hashlib.sha256(one.utterance.id.encode()).digest()

    return heapq.nsmallest(count, told, key=order)


def cut(
    sample: Sequence[Example], vocabulary: Vocabulary, form: Format, budget: int
) -> list[Batch]:
    """The examples that have what the format shows, in batches of at most `budget` tokens, padding
    included; an example that is longer by itself is left out, as it is in training."""
    usable = [n for n, one in enumerate(sample) if form == "text" or one.units is not None]
    lengths = {
        n: 4 + len(sample[n].text) + (len(sample[n].units) if form != "text" else 0) for n in usable
    }
    chosen: list[list[Chosen]] = []
    for n in sorted((n for n in usable if lengths[n] <= budget), key=lambda n: (lengths[n], n)):
        if not chosen or lengths[n] * (len(chosen[-1]) + 1) > budget:
            chosen.append([])
        chosen[-1].append(Chosen(n, form))
    return [collate(sample, some, vocabulary, 0.0, (0,)) for some in chosen]


def dealt(batches: Sequence[Batch], rank: int, world: int) -> Iterator[tuple[Batch, bool]]:
    """A worker's batches, as many for each worker, and whether each counts: under ZeRO-3 all of
    them have to call the model together."""
    rounds = -(-len(batches) // world)
    for number in range(rank, rounds * world, world):
        counts = number < len(batches)
        yield batches[number if counts else 0], counts


@contextmanager
def resting(model: torch.nn.Module) -> Iterator[None]:
    """The model does not train inside of the block."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)


def whole(lm: LM, gather: Gather) -> LM:
    """A copy of a partitioned language model that this worker has to itself."""
    weights = {}
    for name, parameter in lm.named_parameters():
        with gather([parameter]):
            weights[name] = parameter.detach().clone()
    with torch.device("meta"):
        copy = LM(lm.config, lm.vocabulary)
    copy.load_state_dict(weights, assign=True)
    return copy.eval()


def check_copy(dev: Dev, parameters: int, dtype: torch.dtype) -> None:
    """TrainingError if a whole copy of the language model is more than `dev` allows."""
    size = parameters * dtype.itemsize / GIB
    if size > dev.wer_copy_gib:
        raise TrainingError(
            f"train.dev.wer_steps: under ZeRO-3 each worker decodes with a whole copy of the "
            f"language model, {size:.1f} GiB, and train.dev.wer_copy_gib is {dev.wer_copy_gib:g}: "
            "raise it where the workers have that memory to spare, or set train.dev.wer_steps=0"
        )
