"""The training loop against a plain one: pad, the model's own loss, one process.   python -m pytest tests/test_train_loop.py"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import train_loop
from conftest import KINDS, ROOT, tiny_model, tiny_tokenizer
from storage import UserError

ONE_RANK = train_loop.Ranks(0, 1, torch.device("cpu"))


def arguments(**changes):
    return argparse.Namespace(
        **{
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 8,
            "lr": 1e-3,
            "weight_decay": 0.01,
            "seed": 0,
            "precision": "fp32",
            "max_length": 512,
            "checkpoint_every": 1,
            "checkpoint_steps": 0,
            "keep": 1,
            "micro_tokens": 0,
            "packing": True,
            "schedule": "constant",
            "warmup": 0,
            "max_grad_norm": 0.0,
            "gradient_checkpointing": False,
            "compile": False,
            "shard": "no",
            "log_every": 0,
            **changes,
        }
    )


def toy_data(n=20):
    """Rows of very uneven length, where a mean of means goes wrong."""
    return {
        "sample_index": list(range(n)),
        "input": [f"count to {i} ###" for i in range(n)],
        "label": [" " + " ".join(map(str, range(i % 7 * 3))) + f" --> {i}" for i in range(n)],
    }


def family_of(model):
    return "encoder_decoder" if model.config.is_encoder_decoder else "decoder"


def samples_for(model, tokenizer, n=20):
    return train_loop.encode(tokenizer, family_of(model), toy_data(n), 512)[0]


def plain_loss_and_gradients(model, samples):
    """The oracle: right-padded batch, -100 on prompt and padding, Hugging Face's own loss (a mean over label tokens)."""
    pad = lambda rows, value: torch.tensor(
        [r + [value] * (max(map(len, rows)) - len(r)) for r in rows]
    )
    if model.config.is_encoder_decoder:
        prompts = [s.prompt for s in samples]
        batch = {
            "input_ids": pad(prompts, 1),
            "attention_mask": pad([[1] * len(p) for p in prompts], 0),
            "labels": pad([s.label for s in samples], -100),
        }
    else:
        rows = [s.prompt + s.label for s in samples]
        batch = {
            "input_ids": pad(rows, 1),
            "attention_mask": pad([[1] * len(r) for r in rows], 0),
            "labels": pad([[-100] * len(s.prompt) + s.label for s in samples], -100),
        }
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


class KeepGradients(torch.optim.SGD):
    """An optimizer that changes nothing and keeps the gradients it was handed."""

    def step(self, closure=None):
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def step_loss_and_gradients(model, samples, **changes):
    args = arguments(**changes)
    ids = {
        "family": family_of(model),
        "pad_id": 1,
        "start_id": getattr(model.config, "decoder_start_token_id", None),
    }
    setup = train_loop.set_up(model, samples, ids, args, ONE_RANK)
    assert setup.packing == args.packing
    model.train()
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    with setup.kernels():
        loss, *_ = train_loop.optimizer_step(
            setup._replace(optimizer=optimizer), samples, 1, 1e-3, args, ONE_RANK
        )
    return loss, dict(zip((name for name, _ in model.named_parameters()), optimizer.seen))


GROUPINGS = {
    "packed": {},
    "packed, 3 a time": {"micro_batch_size": 3},
    "packed, 60 tokens a time": {"micro_tokens": 60},
    "padded": {"packing": False},
    "padded, 3 a time": {"micro_batch_size": 3, "packing": False},
    "one by one": {"micro_batch_size": 1, "packing": False},
    "padded, 60 tokens a time": {"micro_tokens": 60, "packing": False},
    "recomputed": {"gradient_checkpointing": True, "micro_batch_size": 3},
}


@pytest.mark.parametrize("changes", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_hugging_faces_own_on_the_padded_batch(kind, changes):
    model = tiny_model(kind)
    tokenizer = tiny_tokenizer(bos=kind == "llama")
    samples = samples_for(model, tokenizer)[:8]
    expected, expected_gradients = plain_loss_and_gradients(model, samples)
    loss, gradients = step_loss_and_gradients(model, samples, **changes)
    assert loss == pytest.approx(expected, rel=1e-6)
    scale = max(g.abs().max() for g in expected_gradients.values())
    for name, gradient in gradients.items():
        assert (gradient - expected_gradients[name]).abs().max() < 2e-6 * scale, name


def test_collate_marks_the_positions_that_predict_label_tokens_of_a_decoder():
    samples = [train_loop.Sample(0, [5, 6], [7, 0]), train_loop.Sample(1, [8], [9, 10, 0])]
    inputs, keep, targets = train_loop.collate(samples, "decoder", 1, None)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 10]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert keep.tolist() == [[False, True, True], [True, True, True]]
    assert targets.tolist() == [7, 0, 9, 10, 0]


def test_collate_shifts_the_labels_of_an_encoder_decoder_right():
    samples = [train_loop.Sample(0, [5, 6], [7, 0]), train_loop.Sample(1, [8], [9, 10, 0])]
    inputs, keep, targets = train_loop.collate(samples, "encoder_decoder", 1, 2)
    assert inputs["input_ids"].tolist() == [[5, 6], [8, 1]]
    assert inputs["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert inputs["decoder_input_ids"].tolist() == [[2, 7, 1], [2, 9, 10]]
    assert keep.tolist() == [[True, True, False], [True, True, True]]
    assert targets.tolist() == [7, 0, 9, 10, 0]


def test_labels_end_with_eos_and_prompts_do_not():
    tokenizer = tiny_tokenizer()
    [sample], dropped = train_loop.encode(
        tokenizer, "decoder", {"sample_index": [4], "input": ["ab ###"], "label": [" c"]}, 512
    )
    assert sample.label[-1] == tokenizer.eos_token_id
    assert tokenizer.eos_token_id not in sample.prompt
    assert not dropped
    assert (
        tokenizer.decode(sample.prompt) == "ab ###" and tokenizer.decode(sample.label[:-1]) == " c"
    )


def test_a_sample_that_is_too_long_is_dropped_and_never_cut():
    data = {
        "sample_index": [1, 2, 3, 4],
        "input": ["short", "x" * 30, "short", "twenty characters ok"],
        "label": ["a", "a", "y" * 30, "twenty characters ok"],
    }
    samples, dropped = train_loop.encode(tiny_tokenizer(), "decoder", data, 25)
    assert [s.sample_index for s in samples] == [1, 4]
    assert dropped == [2, 3]
    samples, dropped = train_loop.encode(tiny_tokenizer(), "decoder", data, 25, max_positions=40)
    assert dropped == [2, 3, 4]  # 20 + 20 + EOS do not fit 40 positions


def test_a_decoder_sample_without_a_prompt_is_dropped_since_nothing_predicts_its_first_token():
    data = {"sample_index": [1, 2], "input": ["", "a"], "label": ["b", "b"]}
    assert train_loop.encode(tiny_tokenizer(), "decoder", data, 25)[1] == [1]


def test_batches_hold_every_sample_once_and_depend_on_seed_and_epoch_alone():
    batches = train_loop.global_batches(21, 8, seed=3, epoch=2)
    assert [len(b) for b in batches] == [8, 8, 5]
    assert sorted(sum(batches, [])) == list(range(21))
    assert batches == train_loop.global_batches(21, 8, seed=3, epoch=2)
    assert (
        batches
        != train_loop.global_batches(21, 8, seed=3, epoch=3)
        != train_loop.global_batches(21, 8, seed=4, epoch=3)
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize(
    "world_size, limits",
    [
        (1, {}),
        (1, {"micro_batch_size": 3}),
        (2, {"micro_batch_size": 2}),
        (3, {"micro_batch_size": 1}),
        (4, {"micro_batch_size": 4}),
        (1, {"micro_tokens": 9}),
        (2, {"micro_tokens": 1}),
    ],
)
def test_micro_batches_partition_the_batch_within_bounds_and_equally_many_for_each_rank(
    n, world_size, limits, packing
):
    batch = [train_loop.Sample(i, [1] * (i * 7 % 5 + 1), [0]) for i in range(n)]
    groups = train_loop.micro_batches(batch, arguments(**limits), packing, world_size)
    assert len(groups) % world_size == 0
    assert max(map(len, groups)) <= limits.get("micro_batch_size", 8)
    assert sorted(s.sample_index for g in groups for s in g) == list(range(n))
    for lengths in ([len(s.prompt) + 1 for s in g] for g in groups if len(g) > 1):
        assert (sum(lengths) if packing else len(lengths) * max(lengths)) <= limits.get(
            "micro_tokens", 99
        )


def train_all(model, tokenizer, out, data=None, **changes):
    out.mkdir(exist_ok=True)
    list(
        train_loop.train(
            model,
            tokenizer,
            family_of(model),
            data or toy_data(),
            out,
            arguments(**changes),
            {"test": True},
            ONE_RANK,
        )
    )
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "kind", ["gpt2", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS[1:])]
)
def test_a_tiny_student_learns_eight_samples_by_heart(kind, tmp_path):
    epochs = 150 if "t5" in kind else 50
    records = train_all(
        tiny_model(kind),
        tiny_tokenizer(bos=kind == "llama"),
        tmp_path,
        toy_data(8),
        epochs=epochs,
        lr=1e-2,
    )
    losses = [r["epoch_loss"] for r in records if "epoch_loss" in r]
    assert len(losses) == epochs
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "precision, kind", [("bf16", "gpt2"), ("fp16", "gpt2"), ("bf16", "t5"), ("tf32", "llama")]
)
def test_every_precision_runs_the_same_loop(precision, kind, tmp_path):
    reference = [
        r["loss"]
        for r in train_all(tiny_model(kind), tiny_tokenizer(), tmp_path / "fp32")
        if "loss" in r
    ]
    losses = [
        r["loss"]
        for r in train_all(
            tiny_model(kind), tiny_tokenizer(), tmp_path / precision, precision=precision
        )
        if "loss" in r
    ]
    torch.set_float32_matmul_precision("highest")
    assert losses == pytest.approx(reference, rel=0.05)


def test_the_log_names_what_made_it_and_has_a_line_for_every_step(tmp_path):
    header, *records = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path)
    assert header["arguments"]["lr"] == 1e-3
    assert header["torch"]
    assert header["device"]
    assert header["settings"] == {"test": True}
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    epoch = [r for r in records if r["epoch"] == 1 and "loss" in r]
    mean = sum(r["loss"] * r["label_tokens"] for r in epoch) / sum(r["label_tokens"] for r in epoch)
    assert next(r["epoch_loss"] for r in records if "epoch_loss" in r) == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_run_stopped_after_an_epoch_goes_on_to_bit_identical_weights_and_the_same_log(
    kind, tmp_path
):
    data = toy_data()
    whole = tmp_path / "whole"
    stopped = tmp_path / "stopped"
    expected = train_all(tiny_model(kind, dropout=0.1), tiny_tokenizer(), whole, epochs=4)
    stopped.mkdir()
    model = tiny_model(kind, dropout=0.1)
    run = train_loop.train(
        model,
        tiny_tokenizer(),
        family_of(model),
        data,
        stopped,
        arguments(epochs=4),
        {"test": True},
        ONE_RANK,
    )
    (
        next(run),
        next(run),
    )  # two epochs and their checkpoint, then a step of the third is logged and lost
    run.close()
    train_loop.log(stopped, ONE_RANK, step=7, epoch=3, loss=99.0)
    torch.manual_seed(12345)  # whatever the random state of the new process is
    model = tiny_model(kind, dropout=0.1)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    epochs = list(
        train_loop.train(
            model,
            tiny_tokenizer(),
            family_of(model),
            data,
            stopped,
            arguments(epochs=4),
            {"test": True},
            ONE_RANK,
        )
    )
    assert epochs == [2, 3, 4]
    assert (whole / "model.safetensors").read_bytes() == (
        stopped / "model.safetensors"
    ).read_bytes()
    records = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    timeless = lambda rs: [{k: v for k, v in r.items() if k != "seconds"} for r in rs[1:]]
    assert timeless(records) == timeless(expected)
    assert not list(stopped.glob("checkpoint*"))
    assert json.loads((stopped / "run.json").read_text())["finished"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_with_step_and_samples(precision, tmp_path):
    model = tiny_model("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(sample_index .*--lr"):
        train_all(model, tiny_tokenizer(), tmp_path, precision=precision)


def test_training_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=1)[0]["commit"] is None


def test_a_set_without_a_usable_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match="no sample is left to train on: all 20 exceed 3 tokens"):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, max_length=3)


def torchrun(ranks, *command):
    """Start a script under torchrun; -> the process."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        *map(str, command),
    ]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def training(folder, data, out, *flags):
    """The command that fine-tunes a model folder on a fine-tuning file."""
    return [
        "finetune_cot.py",
        "--stage",
        "train",
        "--student",
        folder,
        "--finetune_data",
        data,
        "--out",
        out,
        "--device",
        "cpu",
        *flags,
    ]


def step_losses(out):
    return [
        r["loss"]
        for r in map(json.loads, (out / "log.jsonl").read_text().splitlines())
        if "loss" in r
    ]


RANK_RUNS = {  # name: (kind, changes).  18 samples in batches of 8: the last has 2, so that of 3 ranks one has none
    "ddp t5": ("t5", {}),
    "fsdp llama": ("llama", {"shard": "gpu"}),
    "ddp padded": ("gpt2", {"packing": False, "micro_batch_size": 2}),
    "fsdp t5": ("t5", {"shard": "gpu", "micro_batch_size": 2}),
    "fsdp offloaded, resumed": ("gpt2", {"shard": "cpu", "max_grad_norm": 0.5, "stop_after": 2}),
}
RANKS_SCRIPT = """
import sys; sys.path[:0] = ["tests", "."]
from pathlib import Path
from test_train_loop import *
ranks = train_loop.setup_ranks(torch.device("cpu"))
for name, (kind, changes) in list(RANK_RUNS.items())[:int(sys.argv[2])]:
    out, stop = Path(sys.argv[1]) / name, changes.pop("stop_after", 0)
    out.mkdir(exist_ok=True)
    for part in ("first", "second") if stop else ("whole",):
        model = tiny_model(kind)
        run = train_loop.train(model, tiny_tokenizer(bos=kind == "llama"), family_of(model), toy_data(18), out, arguments(epochs=7, **changes), {}, ranks)
        for epoch in run:
            if part == "first" and epoch == stop:
                break
"""


@pytest.mark.parametrize(
    "ranks, runs", [(2, 2), *(pytest.param(n, 5, marks=pytest.mark.slow) for n in (2, 3))]
)
def test_any_number_of_ranks_sharded_or_not_gives_the_losses_and_weights_of_one_process(
    ranks, runs, tmp_path
):
    (tmp_path / "script.py").write_text(RANKS_SCRIPT)
    process = torchrun(ranks, tmp_path / "script.py", tmp_path, runs)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert output.count("batch 8 =") == runs + (runs == 5)  # only one rank talks
    for name, (kind, changes) in list(RANK_RUNS.items())[:runs]:
        changes = {k: v for k, v in changes.items() if k == "max_grad_norm"}
        train_all(
            tiny_model(kind),
            tiny_tokenizer(bos=kind == "llama"),
            tmp_path / "one",
            toy_data(18),
            epochs=7,
            **changes,
        )
        one = step_losses(tmp_path / "one")
        many = step_losses(tmp_path / name)
        assert len(one) == 21 and many == pytest.approx(one, rel=1e-5), name
        weights, expected = (
            {k: v for k, v in load_file(tmp_path / out / "model.safetensors").items()}
            for out in (name, "one")
        )
        assert weights.keys() == expected.keys()
        for k in weights.keys() - {
            f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)
        }:  # a key's bias has no gradient but rounding
            assert (weights[k] - expected[k]).abs().max() < 1e-4, (name, k)
        shutil.rmtree(tmp_path / "one")


@pytest.mark.slow
def test_when_a_rank_dies_the_others_end(tmp_path, model_folder):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(400)))
    process = torchrun(
        2,
        *training(
            model_folder("gpt2"), data, tmp_path / "out", "--epochs", 1000, "--checkpoint_every", 0
        ),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0


# ---------------------------------------------------------------- schedule, clipping, precision


def test_the_schedules_are_those_of_transformers_after_warm_up():
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    for name, make in (
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
    ):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = make(optimizer, 5, 20)
        expected = []
        for _ in range(20):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        rates = [
            train_loop.learning_rate(step, 20, arguments(lr=2.0, warmup=5, schedule=name))
            for step in range(1, 21)
        ]
        assert rates[5:] == pytest.approx(expected[5:])
        assert rates[:5] == pytest.approx(
            [0.4, 0.8, 1.2, 1.6, 2.0]
        )  # ours starts above 0, so that the first step is not lost
    assert {train_loop.learning_rate(step, 20, arguments(lr=2.0)) for step in range(1, 21)} == {
        2.0
    }  # the paper's


def test_clipping_bounds_the_norm_of_the_gradient_of_the_whole_step():
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    samples = samples_for(model, tokenizer)[:8]
    _, free = step_loss_and_gradients(model, samples)
    norm = torch.cat([g.flatten() for g in free.values()]).norm().item()
    _, clipped = step_loss_and_gradients(
        model, samples, max_grad_norm=norm / 10, micro_batch_size=3
    )
    for name in free:
        torch.testing.assert_close(clipped[name], free[name] / 10, rtol=1e-4, atol=1e-6)


def test_bf16_gradients_are_as_near_the_exact_ones_as_hugging_faces_own_in_bf16():
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer(bos=True)
    samples = samples_for(model, tokenizer)[:8]
    loss, exact = plain_loss_and_gradients(model, samples)
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = plain_loss_and_gradients(model, samples)
    half_loss, ours = step_loss_and_gradients(model, samples, precision="bf16")
    assert half_loss == pytest.approx(loss, rel=2**-7)
    assert half_loss != loss
    error = lambda gradients: torch.cat([(gradients[k] - exact[k]).flatten() for k in exact]).norm()
    assert 0 < error(ours) < 1.25 * error(theirs)


def test_an_overflow_in_fp16_skips_the_step_and_is_counted(tmp_path, capsys):
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    samples = samples_for(model, tokenizer)[:8]
    args = arguments(precision="fp16")
    setup = train_loop.set_up(
        model, samples, {"family": "decoder", "pad_id": 1, "start_id": None}, args, ONE_RANK
    )
    setup = setup._replace(
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**60),
        packing=False,
        collate=lambda s: train_loop.collate(s, "decoder", 1, None),
    )
    before = [p.clone() for p in model.parameters()]
    loss, norm, *_ = train_loop.optimizer_step(setup, samples, 1, 1e-3, args, ONE_RANK)
    assert math.isfinite(loss)
    assert norm is None
    assert setup.scaler.get_scale() == 2.0**59
    assert all(map(torch.equal, before, model.parameters()))
    for step in range(2, 80):
        loss, norm, *_ = train_loop.optimizer_step(setup, samples, step, 1e-3, args, ONE_RANK)
        if norm is not None:
            break
    assert norm is not None
    assert not all(map(torch.equal, before, model.parameters()))
    rows = [
        {
            "step": 1,
            "epoch": 1,
            "loss": 1.0,
            "lr": 1.0,
            "grad_norm": g,
            "label_tokens": 1,
            "tokens": 1,
            "size": 1,
        }
        for g in (None, 1.0)
    ]
    assert "1 steps skipped (fp16 overflow)" in train_loop.status(rows, 2, 1.0, torch.device("cpu"))


def test_a_student_whose_layers_reach_back_further_than_a_sample_is_padded_not_packed(
    tmp_path, capsys
):
    import transformers as tf

    torch.manual_seed(0)
    model = tf.MistralForCausalLM(
        tf.MistralConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=8,
            eos_token_id=0,
            initializer_range=0.2,
        )
    )
    train_all(model, tiny_tokenizer(), tmp_path / "window", epochs=1)
    assert "padded" in capsys.readouterr().out
    train_all(tiny_model("llama"), tiny_tokenizer(), tmp_path / "full", epochs=1)
    assert "packed" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_training_gives_the_same_losses(tmp_path):
    expected = [
        r["loss"]
        for r in train_all(
            tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "plain", epochs=1, packing=False
        )
        if "loss" in r
    ]
    losses = [
        r["loss"]
        for r in train_all(
            tiny_model("gpt2"),
            tiny_tokenizer(),
            tmp_path / "compiled",
            epochs=1,
            packing=False,
            compile=True,
        )
        if "loss" in r
    ]
    assert losses == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- stopped, killed, full


def timeless(out):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in (out / "log.jsonl").read_text().splitlines()[1:]
    ]


@pytest.mark.slow
def test_sigterm_writes_a_checkpoint_within_the_epoch_and_the_run_goes_on_to_the_same_bits_and_log(
    tmp_path,
):
    train_all(
        tiny_model("t5", dropout=0.1), tiny_tokenizer(), tmp_path / "whole", toy_data(60), epochs=3
    )

    def stop():
        while (
            not (tmp_path / "out" / "log.jsonl").exists() or len(timeless(tmp_path / "out")) < 11
        ):  # 8 steps an epoch and its own row
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(UserError, match="stopped by SIGTERM at step"):
        train_all(
            tiny_model("t5", dropout=0.1),
            tiny_tokenizer(),
            tmp_path / "out",
            toy_data(60),
            epochs=3,
        )
    [checkpoint] = (tmp_path / "out").glob("checkpoint*")
    assert int(checkpoint.stem.rpartition("_")[2]) % 8
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    train_all(
        tiny_model("t5", dropout=0.1), tiny_tokenizer(), tmp_path / "out", toy_data(60), epochs=3
    )
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("at, ends", [(8, "stopped"), (16, "finished")])
def test_sigterm_in_the_last_step_of_an_epoch_stops_after_it_and_in_the_last_of_all_the_run_is_finished(
    at, ends, tmp_path, monkeypatch
):
    step = train_loop.optimizer_step

    def terminated(setup, batch, number, *more):
        if number == at and not (tmp_path / "sent").exists():
            (tmp_path / "sent").touch()
            os.kill(os.getpid(), signal.SIGTERM)
        return step(setup, batch, number, *more)

    train_all(
        tiny_model("gpt2", dropout=0.1),
        tiny_tokenizer(),
        tmp_path / "whole",
        toy_data(60),
        epochs=2,
    )
    monkeypatch.setattr(train_loop, "optimizer_step", terminated)
    try:
        train_all(
            tiny_model("gpt2", dropout=0.1),
            tiny_tokenizer(),
            tmp_path / "out",
            toy_data(60),
            epochs=2,
        )
        assert ends == "finished"
    except UserError as e:
        # it came within step 8, so step 9 knows of it
        assert ends == "stopped"
        assert "stopped by SIGTERM at step 9" in str(e)
        train_all(
            tiny_model("gpt2", dropout=0.1),
            tiny_tokenizer(),
            tmp_path / "out",
            toy_data(60),
            epochs=2,
        )
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    "dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)  # a gradient in bf16 has 8 bits
def test_the_loss_and_its_gradient_equal_torch_s_cross_entropy(dtype, rtol):
    logits = (torch.randn(150, 50, generator=torch.Generator().manual_seed(0)) * 30).to(dtype)
    mine = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    targets = torch.arange(150) * 7 % 50
    loss = train_loop.LabelLoss.apply(mine * 1, targets)
    truth = torch.nn.functional.cross_entropy(theirs.float(), targets, reduction="sum")
    (loss / 3).backward()
    (truth / 3).backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, truth, rtol=1e-6)
    assert torch.allclose(mine.grad, theirs.grad, rtol=rtol, atol=1e-7)


STOPS = (signal.SIGKILL, 7), (signal.SIGTERM, 17), (signal.SIGKILL, 27)  # and the steps before it


@pytest.mark.slow
@pytest.mark.parametrize("ranks, stops", [(1, STOPS), (2, STOPS)])
def test_a_run_stopped_at_any_moment_goes_on_to_bit_identical_weights_and_the_same_log(
    ranks, stops, tmp_path, model_folder
):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(40)))
    flags = ["--epochs", 6, "--checkpoint_steps", 2, "--lr", "1e-3"]
    start = (
        (lambda out: torchrun(ranks, *training(model_folder("gpt2"), data, out, *flags)))
        if ranks > 1
        else (
            lambda out: subprocess.Popen(
                [sys.executable, *map(str, training(model_folder("gpt2"), data, out, *flags))],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )
    )
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    rng = random.Random(ranks)
    assert start(whole).wait(120) == 0
    for signal_sent, steps in stops:
        process = start(killed)
        while process.poll() is None and not (
            (killed / "log.jsonl").exists() and len(timeless(killed)) >= steps
        ):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.05)
        if signal_sent == signal.SIGKILL:
            os.system(f"pkill -9 -f 'out {killed}'")
        else:
            process.send_signal(signal_sent)
        output, _ = process.communicate(timeout=60)
        assert process.returncode != 0, output
        assert signal_sent == signal.SIGKILL or "stopped by SIGTERM at step" in output
    process = start(killed)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on after step" in output, output
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert timeless(whole) == timeless(killed)


def test_the_last_k_checkpoints_are_kept_and_a_full_disk_leaves_the_one_before(
    tmp_path, monkeypatch
):
    model = tiny_model("gpt2")
    args = arguments(epochs=9, keep=2)
    run = train_loop.train(
        model, tiny_tokenizer(), "decoder", toy_data(), tmp_path, args, {}, ONE_RANK
    )
    for _ in range(4):
        next(run)
    assert [p.name for p in sorted(tmp_path.glob("checkpoint*"))] == [
        "checkpoint_00000009.pt",
        "checkpoint_00000012.pt",
    ]
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, limits[1])
    )  # as a full disk: no file grows beyond this
    try:
        with pytest.raises(OSError):
            next(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in sorted(tmp_path.glob("checkpoint*"))] == [
        "checkpoint_00000009.pt",
        "checkpoint_00000012.pt",
    ]
    assert (
        next(
            train_loop.train(
                tiny_model("gpt2"),
                tiny_tokenizer(),
                "decoder",
                toy_data(),
                tmp_path,
                args,
                {},
                ONE_RANK,
            )
        )
        == 4
    )


def test_an_unfinished_run_is_not_resumed_with_other_settings_and_its_flags_are_named(
    tmp_path, capsys
):
    import storage as files

    assert files.prepare_output_dir(tmp_path / "out", {"lr": 1, "seed": 0}) == "new"
    (tmp_path / "out" / "checkpoint_00000003.pt").write_bytes(b"x")
    assert files.prepare_output_dir(tmp_path / "out", {"lr": 1, "seed": 0}) == "unfinished"
    with pytest.raises(UserError, match="unfinished run with other settings"):
        files.prepare_output_dir(tmp_path / "out", {"lr": 2, "seed": 0})
    assert "settings changed (lr 1 -> 2)" in capsys.readouterr().out
    assert (tmp_path / "out" / "checkpoint_00000003.pt").exists()
