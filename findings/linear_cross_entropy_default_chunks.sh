#!/usr/bin/env bash
# torch 2.13.0: torch.nn.functional.linear_cross_entropy fuses the vocabulary projection with its loss, in
# chunks, to save the memory of the logits.  One would guess that its default options cost about the time of
# the two operations they replace.  On a CPU, with 600 hidden states of width 384 and GPT-2's 50,257 tokens,
# LinearCrossEntropyOptions() takes many times as long as F.linear followed by F.cross_entropy, forward and
# backward (5 and 13 times, in two runs on two cores of an AMD EPYC), while chunks of 256 rows, named by hand,
# take about as long as the two (0.8 and 1.2 times).  The losses agree.  So: on a CPU, set batch_chunk_size.
#
# Fails if the defaults become as fast as chunks of 256, or if the losses differ.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import statistics
import time

import torch
import torch.nn.functional as F

torch.set_num_threads(2)
torch.manual_seed(0)
hidden = torch.randn(600, 384, requires_grad=True)
weight = (0.02 * torch.randn(50257, 384)).requires_grad_()
targets = torch.randint(50257, (600,))


def two_operations():
    return F.cross_entropy(F.linear(hidden, weight), targets, reduction="sum")


def fused(options):
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def seconds(loss_of, repeats):
    times = []
    for _ in range(repeats):
        start = time.process_time()
        loss = loss_of()
        loss.backward()
        times.append(time.process_time() - start)
    return loss.item(), statistics.median(times)


plain, plain_time = seconds(two_operations, 3)
chunks = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
by_hand, by_hand_time = seconds(lambda: fused(chunks), 3)
default, default_time = seconds(lambda: fused(torch.nn.LinearCrossEntropyOptions()), 1)
print(f"two operations: loss {plain:.2f}, {plain_time:.2f} s of processor time")
print(f"fused, chunks of 256: loss {by_hand:.2f}, {by_hand_time / plain_time:.1f} times as long")
print(f"fused, default options: loss {default:.2f}, {default_time / plain_time:.1f} times as long")
assert abs(by_hand - plain) < 1e-3 * plain
assert abs(default - plain) < 1e-3 * plain
assert default_time > 3 * by_hand_time, "the default options are no longer slow"
PY
