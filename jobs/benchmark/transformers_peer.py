"""What transformers does with the same weights: `generate`, and its continuous batching.

`generate` has the requests sorted by how much they want and then by how long they are, which only
somebody knows who has seen the transcripts: it pads least so. A batch of it ends when the longest
transcript of the batch does; what it writes beyond a request's own length is thrown away. Its
continuous batching runs on a CPU with the attention of torch (`sdpa`), over all requests at once
behind a mask; what it takes to start and stop is not counted. Neither is compiled: transformers
does that on an accelerator alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from jobs.benchmark.workload import Request
from mmrag.model import pretrained
from mmrag.model.lm import LM

if TYPE_CHECKING:
    from transformers import GenerationConfig

PAD, PAGE, BATCH_TOKENS = 0, 256, 256
"""The id that prompts are padded with; tokens of a page, and of a batch, in continuous batching."""
POLL_SECONDS = 1.0


class TransformersPeer:
    """The weights of a language model in transformers' own class."""

    def __init__(self, directory: Path, lm: LM, dtype: torch.dtype) -> None:
        """Writes a checkpoint into `directory`, and reads it as its users do."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as told

        told.disable_progress_bar()
        for name in ("transformers", "ContinuousBatchingLogger"):
            logging.getLogger(name).setLevel(logging.ERROR)
        pretrained.to_huggingface(directory, lm)
        self._model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa"
        ).eval()
        self._model.generation_config.eos_token_id = None

    def generate(self, asked: Sequence[Request], batch: int) -> list[list[int]]:
        """Every request's tokens, so many requests at a time, greedily."""
        order = sorted(
            range(len(asked)), key=lambda n: (asked[n].tokens, len(asked[n].prompt)), reverse=True
        )
        found: list[list[int]] = [[] for _ in asked]
        for start in range(0, len(order), batch):
            some = order[start : start + batch]
            for number, tokens in zip(some, self._together([asked[n] for n in some]), strict=True):
                found[number] = tokens[: asked[number].tokens]
        return found

    @torch.inference_mode()
    def _together(self, asked: Sequence[Request]) -> list[list[int]]:
        longest = max(len(one.prompt) for one in asked)
        ids = torch.full((len(asked), longest), PAD)
        for row, one in enumerate(asked):
            ids[row, longest - len(one.prompt) :] = torch.tensor(one.prompt)
        seen = torch.zeros_like(ids)
        for row, one in enumerate(asked):
            seen[row, longest - len(one.prompt) :] = 1
        settings = _greedy(max(one.tokens for one in asked))
        written = self._model.generate(ids, attention_mask=seen, generation_config=settings)
        return written[:, longest:].tolist()

    @contextmanager
    def continuous(
        self, asked: Sequence[Request], rows: int
    ) -> Iterator[Callable[[], list[list[int]]]]:
        """Ready to answer these requests, `rows` at a time; yields what does, as often as wanted.

        RuntimeError where it cannot, or gives up.
        """
        from transformers import ContinuousBatchingConfig

        pages = sum(-(-(len(one.prompt) + one.tokens) // PAGE) for one in asked)
        settings = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages,
            max_batch_tokens=BATCH_TOKENS,
            max_requests_per_batch=rows,
            allow_block_sharing=False,
        )
        with self._model.continuous_batching_context_manager(
            generation_config=_greedy(max(one.tokens for one in asked)),
            continuous_batching_config=settings,
        ) as manager:

            def answer() -> list[list[int]]:
                names = [
                    manager.add_request(list(one.prompt), max_new_tokens=one.tokens)
                    for one in asked
                ]
                found: dict[str, list[int]] = {}
                while len(found) < len(names):
                    one = manager.get_result(timeout=POLL_SECONDS)
                    if one is None and not manager.is_running():
                        raise RuntimeError("continuous batching of transformers gave up")
                    if one is not None and one.error is not None:
                        raise RuntimeError(f"continuous batching of transformers: {one.error}")
                    if one is not None and one.is_finished():
                        found[one.request_id] = one.generated_tokens
                return [found[name] for name in names]

            yield answer


def _greedy(tokens: int) -> GenerationConfig:
    """So many tokens, of which none ends anything."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=PAD
    )
