"""Try a student before the first step: can it be trained and decoded, and how may samples be laid?

All that is faster than one sample at a time is compared with one sample at a time, on the student
itself: logits and gradients of the longest and the shortest sample.  No step is taken, no random
number is drawn for good, and the weights are what they were.

Shapes: N label tokens in all, V vocabulary.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel as Model

import decoding
import models
import storage
from batches import IGNORE_INDEX, MicroBatch, Samples, collate, label_logits
from storage import UserError
from tokens import TokenizedSamples, TrainSample

BOUND = 1e-5  # of the largest logit, and of the largest gradient: a few times fp32's rounding


class Trial(NamedTuple):
    """What some samples give without dropout."""

    logits: Tensor  # (N, V) at label positions
    gradients: dict[str, Tensor]  # of the loss; only of weights that get one


def check_samples(model: Model, samples: TokenizedSamples) -> None:
    """Raise UserError with the first sample that has a token without an embedding."""
    embedding = model.get_input_embeddings()
    if samples.largest_id < len(embedding.weight):
        return
    for sample in samples:
        ids = sample.prompt + sample.label
        where = f"the sample of sample_index {sample.sample_index}"
        models.check_token_ids(model, ids, where)


def longest_and_shortest(samples: TokenizedSamples) -> Samples:
    """Return the samples to try: the longest shows positions and windows, the next one leaks."""
    places = samples.shortest_first
    longest = samples[places[-1]]
    shortest = samples[places[0]]
    return [longest, shortest]


def try_alone(model: Model, samples: Samples, start_token: int | None, sharded: bool) -> Trial:
    """Return the truth: each sample alone, by the plain path.

    Raises UserError, in one sentence, where the student can be neither trained nor decoded.
    """
    kind = model.config.model_type
    batches = [collate([sample], start_token, packing=False) for sample in samples]
    try:
        trial = try_batches(model, batches, with_gradients=not sharded)
        decoded = decode_label(model, samples[-1])
    except decoding.MODEL_ERRORS as e:
        if storage.is_out_of_memory(e):
            raise
        raise UserError(
            f"models of type {kind} cannot be trained here ({type(e).__name__}: "
            f"{storage.one_line(e)})"
        ) from None
    if not trial.gradients and not sharded:
        raise UserError("no weight of the student gets a gradient, so there is nothing to train")
    n_label = len(samples[-1].label)
    trained = trial.logits[-n_label:][: len(decoded)]
    if differ(decoded, trained, 1e-2):
        raise UserError(
            f"models of type {kind} predict a token from those that come after it, or decode "
            "otherwise than they are trained: take a causal one (BERT's kind: is_decoder in config)"
        )
    return trial


def differ(logits: Tensor, truth: Tensor, bound: float) -> bool:
    """Tell whether logits are off by more than bound times the largest; NaN says nothing."""
    error = (logits - truth).abs().max()
    largest = truth.abs().max()
    return bool(error > bound * largest)


def try_batches(model: Model, batches: list[MicroBatch], with_gradients: bool) -> Trial:
    """Run forward, and backward, on batches one after another; leave no gradient behind."""
    device = model.device
    logits = []
    model.zero_grad(set_to_none=True)
    try:
        for batch in batches:
            with torch.set_grad_enabled(with_gradients):
                output = label_logits(model, batch, device)
            if with_gradients:
                is_label = batch.targets != IGNORE_INDEX
                targets = batch.targets[is_label].to(device)
                loss = F.cross_entropy(output.float(), targets, reduction="sum")
                loss.backward()
            logits.append(output.detach())
        gradients = {}
        for name, weight in model.named_parameters():
            if weight.grad is not None:
                gradients[name] = weight.grad
    finally:
        model.zero_grad(set_to_none=True)
    return Trial(torch.cat(logits), gradients)


def decode_label(model: Model, sample: TrainSample) -> Tensor:
    """Return the logits of a sample's first label tokens as decoding computes them."""
    n_fed = decoding.REHEARSED_TOKENS - 1
    with torch.no_grad():
        logits, state = decoding.prefill(model, [sample.prompt])
        steps = [logits]
        for token in sample.label[:n_fed]:
            ids = torch.tensor([token], device=model.device)
            logits = decoding.decode_step(model, ids, state)
            steps.append(logits)
    n_label = len(sample.label)
    return torch.cat(steps)[:n_label]


def agrees(
    model: Model, samples: Samples, start_token: int | None, packing: bool, truth: Trial
) -> bool:
    """Tell whether samples in one batch give what they give alone, but for rounding.

    Call it in the mode that is to be trusted: packed attention, fast paths.
    """
    if not truth.logits.isfinite().all():
        return True  # there is nothing to compare; the first step says so, with its samples
    batch = collate(samples, start_token, packing)
    try:
        trial = try_batches(model, [batch], with_gradients=bool(truth.gradients))
    except decoding.MODEL_ERRORS as e:
        if storage.is_out_of_memory(e):
            raise
        return False  # such as a model that hands no keywords down to its attention
    if trial.logits.shape != truth.logits.shape:
        return False
    if differ(trial.logits, truth.logits, BOUND):
        return False
    if trial.gradients.keys() != truth.gradients.keys():
        return False
    largest = max((gradient.abs().max() for gradient in truth.gradients.values()), default=0)
    for name, gradient in trial.gradients.items():
        expected = truth.gradients[name]
        error = (gradient - expected).abs().max()
        if error > BOUND * largest:
            return False
        if expected.any() and not gradient.any():  # too small to be an error, but lost
            return False
    return True


@contextlib.contextmanager
def rehearsal_mode(model: Model) -> Iterator[None]:
    """Within this: no dropout, weights of ordinary size; afterwards all is as it was.

    A student that is not trained yet has weights so small that a sample hardly shows what leaks
    into it.  They are multiplied by powers of two, which loses no bit.
    """
    was_training = model.training
    model.eval()
    scaled = []
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            for weight in small_matrices(model):
                fan_in = max(weight.shape[1:])
                size = weight.square().mean().sqrt().item()  # ordinary is 1 / sqrt(fan_in)
                exponent = round(-math.log2(size * math.sqrt(fan_in)))
                if exponent > 0:
                    weight.mul_(2.0**exponent)
                    scaled.append((weight, exponent))
            with torch.enable_grad():
                yield
    finally:
        with torch.no_grad():
            for weight, exponent in scaled:
                weight.mul_(2.0**-exponent)
        model.train(was_training)


def small_matrices(model: Model) -> list[nn.Parameter]:
    """Return the weights that multiply something, without embeddings and without zeros alone."""
    embeddings = set()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            embeddings |= {id(weight) for weight in module.parameters(recurse=False)}
    return [
        weight
        for weight in model.parameters()
        if weight.dim() > 1 and weight.any() and id(weight) not in embeddings
    ]
