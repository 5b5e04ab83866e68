"""The training loop against a plain one: pad, the model's own loss, one process.   python -m pytest tests/test_train_loop.py"""
import argparse
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

import train_loop
from conftest import KINDS, ROOT, tiny_model, tiny_tokenizer
from tasks import UserError

ONE_RANK = train_loop.Ranks(0, 1, torch.device("cpu"))


def arguments(**changes):
    return argparse.Namespace(**{"epochs": 2, "batch_size": 8, "micro_batch_size": 8, "lr": 1e-3, "weight_decay": 0.01, "seed": 0, "precision": "fp32",
                                 "max_length": 512, "checkpoint_every": 1, **changes})


def toy_data(n=20):
    """Rows of very uneven length, where a mean of means goes wrong."""
    return {"sample_index": list(range(n)), "input": [f"count to {i} ###" for i in range(n)],
            "label": [" " + " ".join(map(str, range(i % 7 * 3))) + f" --> {i}" for i in range(n)]}


def family_of(model):
    return "encoder_decoder" if model.config.is_encoder_decoder else "decoder"


def samples_for(model, tokenizer, n=20):
    return train_loop.encode(tokenizer, family_of(model), toy_data(n), 512)[0]


def plain_loss_and_gradients(model, samples):
    """The oracle: right-padded batch, -100 on prompt and padding, Hugging Face's own loss (a mean over label tokens)."""
    pad = lambda rows, value: torch.tensor([r + [value] * (max(map(len, rows)) - len(r)) for r in rows])
    if model.config.is_encoder_decoder:
        prompts = [s.prompt for s in samples]
        batch = {"input_ids": pad(prompts, 1), "attention_mask": pad([[1] * len(p) for p in prompts], 0), "labels": pad([s.label for s in samples], -100)}
    else:
        rows = [s.prompt + s.label for s in samples]
        batch = {"input_ids": pad(rows, 1), "attention_mask": pad([[1] * len(r) for r in rows], 0),
                 "labels": pad([[-100] * len(s.prompt) + s.label for s in samples], -100)}
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


def step_loss_and_gradients(model, samples, micro_batch_size, family):
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    collate_arguments = (family, 1, model.config.decoder_start_token_id if family == "encoder_decoder" else None)
    loss = train_loop.optimizer_step(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), samples, 1, arguments(micro_batch_size=micro_batch_size),
                                     collate_arguments, ONE_RANK, {"dtype": torch.bfloat16, "enabled": False})
    return loss, dict(zip((name for name, _ in model.named_parameters()), optimizer.seen))


@pytest.mark.parametrize("micro_batch_size", [8, 3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_hugging_faces_own_on_the_padded_batch(kind, micro_batch_size):
    model, tokenizer = tiny_model(kind), tiny_tokenizer(bos=kind == "llama")
    samples = samples_for(model, tokenizer)[:8]
    expected, expected_gradients = plain_loss_and_gradients(model, samples)
    loss, gradients = step_loss_and_gradients(model, samples, micro_batch_size, family_of(model))
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
    [sample], dropped = train_loop.encode(tokenizer, "decoder", {"sample_index": [4], "input": ["ab ###"], "label": [" c"]}, 512)
    assert sample.label[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in sample.prompt and not dropped
    assert tokenizer.decode(sample.prompt) == "ab ###" and tokenizer.decode(sample.label[:-1]) == " c"


def test_a_sample_that_is_too_long_is_dropped_and_never_cut():
    data = {"sample_index": [1, 2, 3, 4], "input": ["short", "x" * 30, "short", "twenty characters ok"], "label": ["a", "a", "y" * 30, "twenty characters ok"]}
    samples, dropped = train_loop.encode(tiny_tokenizer(), "decoder", data, 25)
    assert [s.sample_index for s in samples] == [1, 4] and dropped == [2, 3]
    samples, dropped = train_loop.encode(tiny_tokenizer(), "decoder", data, 25, max_positions=40)
    assert dropped == [2, 3, 4]  # 20 + 20 + EOS do not fit 40 positions


def test_a_decoder_sample_without_a_prompt_is_dropped_since_nothing_predicts_its_first_token():
    data = {"sample_index": [1, 2], "input": ["", "a"], "label": ["b", "b"]}
    assert train_loop.encode(tiny_tokenizer(), "decoder", data, 25)[1] == [1]


def test_batches_hold_every_sample_once_and_depend_on_seed_and_epoch_alone():
    batches = train_loop.global_batches(21, 8, seed=3, epoch=2)
    assert [len(b) for b in batches] == [8, 8, 5] and sorted(sum(batches, [])) == list(range(21))
    assert batches == train_loop.global_batches(21, 8, seed=3, epoch=2)
    assert batches != train_loop.global_batches(21, 8, seed=3, epoch=3) != train_loop.global_batches(21, 8, seed=4, epoch=3)


@pytest.mark.parametrize("n", [1, 2, 5, 8])
@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 8), (1, 3), (2, 2), (3, 1), (4, 4)])
def test_micro_batches_partition_the_batch_with_equally_many_for_each_rank(n, world_size, micro_batch_size):
    batch = [train_loop.Sample(i, [1] * (i * 7 % 5 + 1), [0]) for i in range(n)]
    groups = train_loop.micro_batches(batch, micro_batch_size, world_size)
    assert len(groups) % world_size == 0 and max(map(len, groups)) <= micro_batch_size
    assert sorted(s.sample_index for g in groups for s in g) == list(range(n))


def train_all(model, tokenizer, out, data=None, **changes):
    out.mkdir(exist_ok=True)
    list(train_loop.train(model, tokenizer, family_of(model), data or toy_data(), out, arguments(**changes), {"test": True}, ONE_RANK))
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_student_learns_eight_samples_by_heart(kind, tmp_path):
    epochs = 150 if "t5" in kind else 50
    records = train_all(tiny_model(kind), tiny_tokenizer(bos=kind == "llama"), tmp_path, toy_data(8), epochs=epochs, lr=1e-2)
    losses = [r["epoch_loss"] for r in records if "epoch_loss" in r]
    assert len(losses) == epochs and losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("precision, kind", [("bf16", "gpt2"), ("fp16", "gpt2"), ("bf16", "t5"), ("tf32", "llama")])
def test_every_precision_runs_the_same_loop(precision, kind, tmp_path):
    reference = [r["loss"] for r in train_all(tiny_model(kind), tiny_tokenizer(), tmp_path / "fp32") if "loss" in r]
    losses = [r["loss"] for r in train_all(tiny_model(kind), tiny_tokenizer(), tmp_path / precision, precision=precision) if "loss" in r]
    torch.set_float32_matmul_precision("highest")
    assert losses == pytest.approx(reference, rel=0.05)


def test_the_log_names_what_made_it_and_has_a_line_for_every_step(tmp_path):
    header, *records = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path)
    assert header["arguments"]["lr"] == 1e-3 and header["torch"] and header["device"] and header["settings"] == {"test": True}
    assert [r["step"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    epoch = [r for r in records if r["epoch"] == 1 and "loss" in r]
    mean = sum(r["loss"] * r["label_tokens"] for r in epoch) / sum(r["label_tokens"] for r in epoch)
    assert next(r["epoch_loss"] for r in records if "epoch_loss" in r) == pytest.approx(mean)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_run_stopped_after_an_epoch_goes_on_to_bit_identical_weights_and_the_same_log(kind, tmp_path):
    data, whole, stopped = toy_data(), tmp_path / "whole", tmp_path / "stopped"
    expected = train_all(tiny_model(kind, dropout=0.1), tiny_tokenizer(), whole, epochs=4)
    stopped.mkdir()
    model = tiny_model(kind, dropout=0.1)
    run = train_loop.train(model, tiny_tokenizer(), family_of(model), data, stopped, arguments(epochs=4), {"test": True}, ONE_RANK)
    next(run), next(run)  # two epochs and their checkpoint, then a step of the third is logged and lost
    run.close()
    train_loop.log(stopped / "log.jsonl", step=7, epoch=3, loss=99.0)
    torch.manual_seed(12345)  # whatever the random state of the new process is
    model = tiny_model(kind, dropout=0.1)
    for p in model.parameters():
        torch.nn.init.zeros_(p)
    epochs = list(train_loop.train(model, tiny_tokenizer(), family_of(model), data, stopped, arguments(epochs=4), {"test": True}, ONE_RANK))
    assert epochs == [2, 3, 4]
    assert (whole / "model.safetensors").read_bytes() == (stopped / "model.safetensors").read_bytes()
    records = [json.loads(line) for line in (stopped / "log.jsonl").read_text().splitlines()]
    timeless = lambda rs: [{k: v for k, v in r.items() if k != "seconds"} for r in rs[1:]]
    assert timeless(records) == timeless(expected)
    assert not (stopped / "checkpoint.pt").exists() and json.loads((stopped / "run.json").read_text())["finished"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_loss_that_is_not_finite_stops_with_step_and_samples(precision, tmp_path):
    model = tiny_model("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(epoch 1, sample_index .*--lr"):
        train_all(model, tiny_tokenizer(), tmp_path, precision=precision)


def test_training_needs_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=1)[0]["commit"] is None


def test_a_set_without_a_usable_sample_is_refused(tmp_path):
    with pytest.raises(UserError, match="no sample is left to train on: all 20 exceed 3 tokens"):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, max_length=3)


def torchrun(ranks, folder, data, out, *flags):
    """Start training under torchrun; -> the process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "finetune_cot.py", "--stage", "train",
               "--student", str(folder), "--finetune_data", str(data), "--out", str(out), "--device", "cpu", "--checkpoint_every", "0", *map(str, flags)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def step_losses(out):
    return [r["loss"] for r in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in r]


@pytest.mark.parametrize("kind, ranks", [("llama", 2), ("t5", 3)])
def test_torchrun_gives_the_losses_of_one_process(kind, ranks, tmp_path, model_folder):
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(18)))  # the last batch has 2 samples: with 3 ranks, one has none
    process = torchrun(ranks, model_folder(kind), data, tmp_path / "ranks", "--epochs", 7, "--batch_size", 8)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    train_all(tiny_model(kind), tiny_tokenizer(bos=kind == "llama"), tmp_path / "one", toy_data(18), lr=3e-4, epochs=7)
    one, many = step_losses(tmp_path / "one"), step_losses(tmp_path / "ranks")
    assert len(one) == 21 and many == pytest.approx(one, rel=1e-5)
    assert output.count("batch 8 =") == 1  # only one rank talks


def test_when_a_rank_dies_the_others_end(tmp_path, model_folder):
    import os
    data = tmp_path / "data.json"
    data.write_text(json.dumps(toy_data(400)))
    process = torchrun(2, model_folder("gpt2"), data, tmp_path / "out", "--epochs", 1000)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "log.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
