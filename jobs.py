"""Completion files that are to be made: what is asked of which model, and where its answers go.

finetune_cot.py reads the inputs of a job once and has it done, by a model on this machine here, or
by one behind an API in teacher.py.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chats
import completions
import decoding
import distributed
import models
from api import ApiConfig
from completions import SamplingConfig
from distributed import Ranks
from models import LoadedModel
from tasks import Sample


class LocalJob(NamedTuple):
    """A completion file that a model here is to make; every input but the model has been read."""

    path: Path
    samples: list[Sample]
    plan: SamplingConfig
    chat: chats.ChatConfig | None  # None: plain prompts
    metadata: dict
    seed: int
    first: int  # completions of each sample that are there already

    @property
    def is_done(self) -> bool:
        return self.first >= self.plan.degree


class RemoteJob(NamedTuple):
    """A completion file that a model behind an API is to make."""

    path: Path
    metadata: dict
    plan: SamplingConfig
    samples: list[Sample]
    api: ApiConfig
    rules: str  # that tell how many answers are right


def load_shared(name: str, ranks: Ranks) -> LoadedModel:
    """Load a model, a folder of which other machines get from rank 0 if they lack it."""
    distributed.share_folder(Path(name), ranks)
    return models.load_model(name)


def complete_locally(
    job: LocalJob, loaded: LoadedModel | None, ranks: Ranks, options: dict[str, Any]
) -> None:
    """Make a completion file with a model, None being the toy teacher.  All ranks complete.

    options: batch_size, plain and cuda_graphs of decoding.generate.
    """
    if loaded is None:
        from data.toy import toy_teacher

        complete = functools.partial(toy_teacher, seed=job.seed, first=job.first)
    else:
        loaded.model.to(ranks.device)
        complete = model_completer(job, loaded, options)
    complete = chats.in_template(complete, job.chat)
    data = completions.make_completions(complete, job.samples, job.plan, job.first)
    if ranks.is_rank0:
        completions.write_completions(job.path, job.metadata, data, job.first)


def model_completer(job: LocalJob, loaded: LoadedModel, options: dict[str, Any]) -> Callable:
    """Return decoding.generate with all of its arguments but those of a batch of prompts."""
    overflow = "skip"
    if job.plan.template == "fs_cot":
        overflow = "truncate_left"  # of its examples: the question stands at the end
    return functools.partial(
        decoding.generate,
        *loaded,
        seed=job.seed,
        first=job.first,
        journal=job.path,
        overflow=overflow,
        **options,
    )
