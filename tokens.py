"""A fine-tuning file as token ids: made once on rank 0, mapped into memory by every rank.

    <finetune_data>.<key>.tokens    safetensors: token_ids (every distinct text, end to end), starts
                                    (of each text, and the end), rows (sample_index, prompt, label)

Two bytes a token where that is enough, else four; in a Python list a token takes about 40.  The key
is a fingerprint of the file, the tokenizer and the bounds: another student makes another file.
"""

import itertools
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
Texts = list[str]
NO_BOUND = Positions()


class TrainSample(NamedTuple):
    """Token ids of a sample; the label ends with EOS, so that the student learns to stop."""

    sample_index: int
    prompt: Ids
    label: Ids

    @property
    def length(self) -> int:
        n_prompt = len(self.prompt)
        return n_prompt + len(self.label)


class TokenizedSamples(Sequence[TrainSample]):
    """All samples of a fine-tuning file: a sequence that makes each TrainSample when asked.

    A text of several samples, such as the prompt of several rationales, is there once.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        """tensors: token_ids (all tokens,), starts (texts + 1,), rows (samples, 3).

        A row is sample_index, and the numbers of the texts that are its prompt and its label.
        """
        self.tensors = tensors
        self.token_ids = tensors["token_ids"]
        self.starts = tensors["starts"]
        self.rows = tensors["rows"]

    @classmethod
    def from_texts(cls, texts: Iterable[Ids], rows: np.ndarray) -> "TokenizedSamples":
        """Lay texts end to end, in two bytes a token where every id fits, else in four."""
        token_ids = array("i")
        starts = array("q", [0])
        for ids in texts:
            token_ids.extend(ids)
            starts.append(len(token_ids))
        flat = np.array(token_ids)
        if flat.max(initial=0) < 2**16:
            flat = flat.astype(np.uint16)
        arrays = {"token_ids": flat, "starts": np.array(starts), "rows": rows}
        tensors = {}
        for name, numbers in arrays.items():
            tensors[name] = torch.from_numpy(numbers)
        return cls(tensors)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            places = range(len(self))[i]
            return [self[place] for place in places]
        place = range(len(self))[i]  # IndexError past the end, which ends an iteration
        row = self.rows[place]
        index, prompt, label = row.tolist()
        prompt_ids = self.text(prompt)
        label_ids = self.text(label)
        return TrainSample(index, prompt_ids, label_ids)

    def text(self, number: int) -> Ids:
        """Return the token ids of a text."""
        bounds = self.starts[number : number + 2]
        start, end = bounds.tolist()
        ids = self.token_ids[start:end]
        return ids.tolist()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt and of each label, (samples, 2)."""
        of_texts = self.starts.diff()
        prompt_and_label = self.rows[:, 1:]
        return of_texts[prompt_and_label]

    @property
    def shortest_first(self) -> Tensor:
        """Places of the samples in the order of their lengths, prompt and label together."""
        totals = self.lengths.sum(dim=1)
        return totals.argsort(stable=True)

    @property
    def largest_id(self) -> int:
        token_ids = self.token_ids.numpy()
        return int(token_ids.max())


# ---------------- Texts -> token ids

CHUNK = 1000  # texts that are tokenized at once


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
    prompts, prompt_numbers = number_texts(data["input"])
    labels, label_numbers = number_texts(data["label"])
    label_numbers += len(prompts)
    rows = np.column_stack([data["sample_index"], prompt_numbers, label_numbers])
    prompt_ids = tokenize_prompts(tokenizer, family, prompts)
    label_ids = tokenize_labels(tokenizer, labels)
    texts = itertools.chain(prompt_ids, label_ids)
    samples = TokenizedSamples.from_texts(texts, rows)
    prompt_length, label_length = samples.lengths.T
    both = prompt_length + label_length
    most_prompt = min(max_length, positions.prompt)
    most_label = min(max_length, positions.label)
    is_dropped = prompt_length == 0
    is_dropped |= prompt_length > most_prompt
    is_dropped |= label_length > most_label
    is_dropped |= both > positions.total
    dropped_rows = samples.rows[is_dropped]
    dropped = dropped_rows[:, 0].tolist()
    if is_dropped.all():
        raise UserError(
            f"no sample is left to train on: all {len(dropped)} exceed {max_length} tokens or the "
            "model's positions; raise --max_length"
        )
    kept = samples.rows[~is_dropped]
    samples = TokenizedSamples(samples.tensors | {"rows": kept})
    return samples, dropped


def number_texts(texts: Texts) -> tuple[Texts, np.ndarray]:
    """Return the distinct texts, and the place of each text among them."""
    places = {}
    for text in texts:
        places.setdefault(text, len(places))
    numbers = [places[text] for text in texts]
    return list(places), np.array(numbers)


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, family: str, prompts: Texts
) -> Iterator[Ids]:
    """Yield the token ids of prompts; a decoder goes on, so its prompt ends without EOS."""
    end = [tokenizer.eos_token_id]
    for ids in encode_all(tokenizer, prompts, add_special_tokens=True):
        if family == "decoder" and ids[-1:] == end:
            del ids[-1]
        yield ids


def tokenize_labels(tokenizer: PreTrainedTokenizerBase, labels: Texts) -> Iterator[Ids]:
    """Yield the token ids of labels, which end with EOS."""
    end = [tokenizer.eos_token_id]
    for ids in encode_all(tokenizer, labels, add_special_tokens=False):
        yield ids + end


def encode_all(
    tokenizer: PreTrainedTokenizerBase, texts: Texts, add_special_tokens: bool
) -> Iterator[Ids]:
    """Yield the token ids of texts, CHUNK of which are tokenized at once, with a progress bar."""
    starts = range(0, len(texts), CHUNK)
    for start in terminal.progress(starts, "tokenizing", total=len(starts)):
        chunk = texts[start : start + CHUNK]
        yield from encode(tokenizer, chunk, add_special_tokens)


def encode(tokenizer: PreTrainedTokenizerBase, texts: Texts, add_special_tokens: bool) -> list[Ids]:
    """Return the token ids of texts, on all cores.

    What a tokenizer's own call gives; most of them can be asked for ids without offsets (LOG.md).
    """
    options = {"add_special_tokens": add_special_tokens}
    usual = transformers.TokenizersBackend._encode_plus
    call = getattr(type(tokenizer), "_encode_plus", None)
    if call is not usual:  # such as one in Python
        encoded = tokenizer(texts, **options)
        return encoded["input_ids"]
    tokenizer("")  # hands options such as "no truncation" to the backend
    encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, **options)
    return [encoding.ids for encoding in encodings]


def describe_dropped(dropped: Ids, n_kept: int, max_length: int) -> str:
    """Say how many samples are dropped, and which are the first of them."""
    first = map(str, dropped[:10])
    indices = ", ".join(first)
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
    labels = [label.strip() for label in data["label"]]
    suspects = []
    for written in ["  ", *set().union(*labels)]:
        decoded = round_trip(tokenizer, f"a{written}a")
        if written not in decoded:
            suspects.append(written)
    losing = []
    for index, label in zip(data["sample_index"], labels, strict=True):
        if any(suspect in label for suspect in suspects):
            losing.append((index, label))
    for index, label in losing:
        kept = round_trip(tokenizer, label)
        lost = Counter(label) - Counter(kept)
        if lost:
            return (
                f"{len(losing)} of {len(labels)} labels lose characters that the tokenizer does "
                f"not know, such as {''.join(lost)!r} of sample_index {index}: the student cannot "
                "learn to write them"
            )
    return ""


def round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return a label as the student could write it."""
    ids = tokenizer(text_target=text, add_special_tokens=False)["input_ids"]
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(ids, **options)


# ---------------- The file that ranks share

LAYOUT = 2  # of the tensors in it


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
        """Return the name of the token file, which is made where it is not there."""
        positions = count_positions(student.model.config)
        bounds = [student.family, max_length, positions]
        data_sha256 = storage.file_sha256(data_file)
        tokenizer_told = tokenizer_sha256s(student.tokenizer)
        known = [LAYOUT, data_sha256, tokenizer_told, *bounds]
        key = storage.fingerprint(known)
        path = folder / f"{data_file.name}.{key}.tokens"
        if not path.exists():
            data = storage.read_finetune_data(data_file)
            write_tokens(path, student, data, max_length)
        return path.name

    name = distributed.on_rank0(ranks, find_or_make)
    share_files(folder, [name], ranks)
    samples, notes = read_tokens(folder / name)
    for note in notes:
        distributed.print0(ranks, note)
    return samples


def tokenizer_sha256s(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return what tells tokenizers apart: the hashes of their files, and who reads them."""
    told = []
    with tempfile.TemporaryDirectory() as folder:
        for file in sorted(tokenizer.save_pretrained(folder)):
            if os.path.exists(file):
                sha256 = storage.file_sha256(file)
                told.append(sha256)
    told += [transformers.__version__, tokenizers.__version__]
    return told


def write_tokens(path: Path, student: LoadedModel, data: FinetuneData, max_length: int) -> None:
    """Tokenize data and write it, with lines that say what is lost."""
    model, tokenizer, family = student
    positions = count_positions(model.config)
    samples, dropped = tokenize(tokenizer, family, data, max_length, positions)
    notes = []
    lost = describe_lost_text(tokenizer, data)
    if lost:
        notes.append(lost)
    if dropped:
        note = describe_dropped(dropped, len(samples), max_length)
        notes.append(note)
    metadata = {"notes": json.dumps(notes)}
    content = safetensors.torch.save(samples.tensors, metadata)
    storage.write_atomic(path, content)


def read_tokens(path: Path) -> tuple[TokenizedSamples, list[str]]:
    """Return the samples and lines in a file; its pages are read when they are used."""
    tensors = {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            for name in file.keys():
                tensors[name] = file.get_tensor(name)
            metadata = file.metadata()
        samples = TokenizedSamples(tensors)
        notes = json.loads(metadata["notes"])
    except (safetensors.SafetensorError, *storage.UNREADABLE) as e:
        raise UserError(f"{path} is damaged ({e}): delete it, and it is made again") from None
    return samples, notes
