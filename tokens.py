"""A fine-tuning file as token ids: made once on rank 0, mapped into memory by every rank.

    <finetune_data>.<key>.tokens    safetensors: token_ids (every prompt and label end to end),
                                    ends (2 a sample, in token_ids) and sample_index

Two bytes a token where that is enough, else four; in a Python list a token takes about 40.  The key
is a fingerprint of the file, the tokenizer and the bounds: another student makes another file.
"""

import json
import os
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import distributed
import storage
import terminal
from distributed import Ranks, share_files
from models import LoadedModel, Positions, count_positions
from storage import FinetuneData, UserError

Ids = list[int]
NO_BOUND = Positions()


class TrainSample(NamedTuple):
    """Token ids of a sample; the label ends with EOS, so that the student learns to stop."""

    sample_index: int
    prompt: Ids
    label: Ids

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.label)


class TokenizedSamples(Sequence[TrainSample]):
    """All samples of a fine-tuning file: a sequence that makes each TrainSample when asked."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """tensors: token_ids (all tokens,), ends (2 x samples,), sample_index (samples,)."""
        self.tensors = tensors
        self.token_ids = tensors["token_ids"]
        self.ends = tensors["ends"]
        self.sample_index = tensors["sample_index"]

    @classmethod
    def from_samples(cls, samples: Iterable[TrainSample]) -> "TokenizedSamples":
        """Lay samples end to end, in two bytes a token where every id fits, else in four."""
        token_ids = array("i")
        ends = array("q")
        indices = array("q")
        for sample in samples:
            indices.append(sample.sample_index)
            for ids in (sample.prompt, sample.label):
                token_ids.extend(ids)
                ends.append(len(token_ids))
        columns = {"token_ids": token_ids, "ends": ends, "sample_index": indices}
        tensors = {name: torch.from_numpy(np.array(column)) for name, column in columns.items()}
        if max(token_ids, default=0) < 2**16:
            tensors["token_ids"] = tensors["token_ids"].to(torch.uint16)
        return cls(tensors)

    def __len__(self) -> int:
        return len(self.sample_index)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[k] for k in range(len(self))[i]]
        i = range(len(self))[i]  # IndexError past the end, which ends an iteration
        start = self.ends[2 * i - 1] if i else 0
        middle, end = self.ends[2 * i : 2 * i + 2]
        prompt = self.token_ids[start:middle].tolist()
        return TrainSample(int(self.sample_index[i]), prompt, self.token_ids[middle:end].tolist())

    @property
    def shortest_first(self) -> Ids:
        """Places of the samples in the order of their lengths, prompt and label together."""
        lengths = self.ends[1::2].diff(prepend=torch.tensor([0]))
        return lengths.argsort(stable=True).tolist()

    @property
    def largest_id(self) -> int:
        return int(self.token_ids.numpy().max())


# ---------------- Texts -> token ids

CHUNK = 1000  # rows that are tokenized at once


def tokenize(
    tokenizer: PreTrainedTokenizerBase,
    family: str,
    data: FinetuneData,
    max_length: int,
    positions: Positions = NO_BOUND,
) -> tuple[TokenizedSamples, Ids]:
    """Return the samples of a fine-tuning file, and the indices of those that are dropped.

    A sample is dropped, never cut, where its prompt or label exceeds max_length tokens (paper: 512)
    or the model's positions: its answer stands last.  So is one without a prompt: nothing predicts
    its first label token.  Raises UserError where no sample is left.
    """
    dropped = []

    def fitting_samples() -> Iterator[TrainSample]:
        """Yield what the bounds let through; note the others in `dropped`."""
        for sample in tokenize_all(tokenizer, family, data):
            fits = (
                len(sample.prompt) <= min(max_length, positions.prompt)
                and len(sample.label) <= min(max_length, positions.label)
                and sample.length <= positions.total
            )
            if fits and sample.prompt:
                yield sample
            else:
                dropped.append(sample.sample_index)

    samples = TokenizedSamples.from_samples(fitting_samples())
    if not samples:
        raise UserError(
            f"no sample is left to train on: all {len(dropped)} exceed {max_length} tokens or the "
            "model's positions; raise --max_length"
        )
    return samples, dropped


def tokenize_all(
    tokenizer: PreTrainedTokenizerBase, family: str, data: FinetuneData
) -> Iterator[TrainSample]:
    """Yield each row as tokens: labels end with EOS; prompts of a decoder, which goes on, do not.

    CHUNK rows are tokenized in one call, on all cores, and a prompt of several rationales once.
    """
    eos = tokenizer.eos_token_id
    starts = range(0, len(data["input"]), CHUNK)
    for start in terminal.progress(starts, "tokenizing", total=len(starts)):
        rows = slice(start, start + CHUNK)
        texts = [storage.replace_lone_surrogates(text) for text in data["input"][rows]]
        prompts = list(dict.fromkeys(texts))
        prompt_ids = tokenizer(prompts)["input_ids"]
        if family == "decoder":
            prompt_ids = [ids[:-1] if ids[-1:] == [eos] else ids for ids in prompt_ids]
        ids_of = dict(zip(prompts, prompt_ids, strict=True))
        labels = tokenizer(text_target=data["label"][rows], add_special_tokens=False)["input_ids"]
        for index, text, label in zip(data["sample_index"][rows], texts, labels, strict=True):
            yield TrainSample(index, ids_of[text], label + [eos])


def describe_dropped(dropped: Ids, n_kept: int, max_length: int) -> str:
    """Say how many samples are dropped, and which are the first of them."""
    indices = ", ".join(str(index) for index in dropped[:10])
    if len(dropped) > 10:
        indices += ", ..."
    return (
        f"dropped {len(dropped)} of {len(dropped) + n_kept} samples that are longer than "
        f"{max_length} tokens (or than the model): sample_index {indices}"
    )


def describe_lost_text(tokenizer: PreTrainedTokenizerBase, data: FinetuneData) -> str:
    """Say how many labels lose characters in the tokenizer, with an example; "" where none does.

    T5's has no newline, no run of spaces and no `{`: the student cannot learn to write them.
    Spaces around a label, and those that decoding adds, are no loss.
    """
    labels = data["label"]
    characters = set().union(*labels)
    characters.add("  ")
    suspects = [one for one in characters if one not in round_trip(tokenizer, f"a{one}a")]
    examples = []
    for index, label in zip(data["sample_index"], labels, strict=True):
        if any(one in label for one in suspects):  # few labels have to be read twice
            lost = Counter(label.strip()) - Counter(round_trip(tokenizer, label))
            if lost:
                examples.append(f"{''.join(lost)!r} of sample_index {index}")
    if not examples:
        return ""
    return (
        f"{len(examples)} of {len(labels)} labels lose characters that the tokenizer does not "
        f"know, such as {examples[0]}: the student cannot learn to write them"
    )


def round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a label as the student could write it."""
    ids = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **options)


# ---------------- The file that ranks share


def load_or_tokenize(
    student: LoadedModel, data_file: Path, out: Path, max_length: int, ranks: Ranks
) -> TokenizedSamples:
    """Return the samples of data_file, mapped from a file beside it, and say what is lost.

    Rank 0 tokenizes what no earlier run has; every rank must call it.  The file goes to out, the
    student's folder, where the data's is read-only.
    """
    folder = out
    if os.access(data_file.parent, os.W_OK):
        folder = data_file.parent

    def find_or_make() -> str:
        bounds = [student.family, max_length, count_positions(student.model.config)]
        known = [storage.file_sha256(data_file), tokenizer_sha256s(student.tokenizer), *bounds]
        path = folder / f"{data_file.name}.{storage.fingerprint(known)}.tokens"
        if not path.exists():
            write_tokens(path, student, storage.read_finetune_data(data_file), max_length)
        return path.name

    name = distributed.on_rank0(ranks, find_or_make)
    share_files(folder, [name], ranks)
    samples, notes = read_tokens(folder / name)
    for note in notes:
        distributed.print0(ranks, note)
    return samples


def tokenizer_sha256s(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what tells tokenizers apart: the hashes of their files, and who reads them."""
    with tempfile.TemporaryDirectory() as folder:
        files = tokenizer.save_pretrained(folder)
        hashes = [storage.file_sha256(file) for file in sorted(files) if Path(file).exists()]
    return [*hashes, transformers.__version__, tokenizers.__version__]


def write_tokens(path: Path, student: LoadedModel, data: FinetuneData, max_length: int) -> None:
    """Tokenize data and write it, with lines that say what is lost."""
    model, tokenizer, family = student
    positions = count_positions(model.config)
    samples, dropped = tokenize(tokenizer, family, data, max_length, positions)
    notes = [describe_lost_text(tokenizer, data)]
    if dropped:
        notes.append(describe_dropped(dropped, len(samples), max_length))
    metadata = {"notes": json.dumps([note for note in notes if note])}
    storage.write_atomic(path, safetensors.torch.save(samples.tensors, metadata))


def read_tokens(path: Path) -> tuple[TokenizedSamples, list[str]]:
    """Return the samples and lines in a file; its pages are read when they are used."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            return TokenizedSamples(tensors), json.loads(file.metadata()["notes"])
    except (safetensors.SafetensorError, *storage.UNREADABLE) as e:
        raise UserError(f"{path} is damaged ({e}): delete it, and it is made again") from None
