"""The loop against Hugging Face.   python -m pytest tests/test_train_loop.py"""

import functools
import math
import signal

import pytest
import torch
import transformers as tf
from conftest import (
    KINDS,
    assert_gradients_equal,
    assert_ranks_equal_one_process,
    decoder_start_of,
    hugging_face_loss_and_gradients,
    prepare_training,
    samples_for,
    start_training,
    step_loss_and_gradients,
    tiny_model,
    tiny_tokenizer,
    toy_data,
    train_all,
    train_config,
)

import batches
import checkpoints
import train_loop
from batches import PackedLengths
from storage import UserError
from tokens import TrainSample

# ---------------- The step against the oracle

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


@functools.cache
def oracle(kind):
    """-> 8 samples, and the oracle's loss and gradients of them, made once."""
    model = tiny_model(kind)
    samples = samples_for(model, tiny_tokenizer(bos=kind == "llama"))[:8]
    return samples, *hugging_face_loss_and_gradients(model, samples)


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
@pytest.mark.parametrize("changes", GROUPINGS.values(), ids=GROUPINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_step_equals_hugging_face_on_the_padded_batch(kind, changes, plain):
    """Loss and gradients are Hugging Face's own, however the batch is grouped."""
    model = tiny_model(kind)
    samples, expected, expected_gradients = oracle(kind)
    loss, gradients = step_loss_and_gradients(model, samples, plain=plain, **changes)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_gradients_equal(gradients, expected_gradients)


@pytest.mark.parametrize("kind", ["t5", "flan-t5"])
def test_optimizer_step_packs_prompts_and_labels_of_equal_length(kind):
    """Nothing tells encoder and decoder rows apart by their length."""
    model = tiny_model(kind)
    samples = [TrainSample(i, [5 + i] * n, [9 + i] * (n - 1) + [0]) for i, n in enumerate((3, 5))]
    expected, expected_gradients = hugging_face_loss_and_gradients(model, samples)
    loss, gradients = step_loss_and_gradients(model, samples)
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_gradients_equal(gradients, expected_gradients)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_optimizer_step_draws_the_same_dropout_when_it_recomputes(kind):
    model = tiny_model(kind, dropout=0.2)
    samples = samples_for(model, tiny_tokenizer())[:8]
    loss, gradients = step_loss_and_gradients(tiny_model(kind, dropout=0.2), samples)
    again, recomputed = step_loss_and_gradients(model, samples, gradient_checkpointing=True)
    assert again == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, recomputed[name], rtol=1e-4, atol=1e-6), name


def test_optimizer_step_clips_the_gradient_of_the_whole_step():
    model = tiny_model("gpt2")
    samples = samples_for(model, tiny_tokenizer())[:8]
    _, free = step_loss_and_gradients(model, samples)
    norm = torch.cat([g.flatten() for g in free.values()]).norm().item()
    changes = {"max_grad_norm": norm / 10, "micro_batch_size": 3}
    _, clipped = step_loss_and_gradients(model, samples, **changes)
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient / 10, rtol=1e-4, atol=1e-6)


def test_optimizer_step_in_bf16_is_as_near_as_hugging_face_in_bf16():
    model = tiny_model("llama")
    samples = samples_for(model, tiny_tokenizer(bos=True))[:8]
    loss, exact = hugging_face_loss_and_gradients(model, samples)
    with torch.autocast("cpu", torch.bfloat16):
        _, theirs = hugging_face_loss_and_gradients(model, samples)
    half_loss, ours = step_loss_and_gradients(model, samples, precision="bf16")
    assert half_loss == pytest.approx(loss, rel=2**-7)
    assert half_loss != loss

    def error(gradients):
        return torch.cat([(gradients[k] - exact[k]).flatten() for k in exact]).norm()

    assert 0 < error(ours) < 1.25 * error(theirs)


def test_optimizer_step_skips_an_overflow_in_fp16_and_counts_it():
    model = tiny_model("gpt2")
    samples = samples_for(model, tiny_tokenizer())[:8]
    config = train_config(precision="fp16", packing=False)
    setup = prepare_training(model, samples, config)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60)
    setup = setup._replace(state=setup.state._replace(scaler=scaler))
    before = [p.clone() for p in model.parameters()]
    figures, _ = train_loop.optimizer_step(setup, samples, 1, 1e-3)
    assert math.isfinite(figures["loss"])
    assert figures["grad_norm"] is None
    assert scaler.get_scale() == 2.0**59
    assert all(map(torch.equal, before, model.parameters()))
    for step in range(2, 80):
        figures, _ = train_loop.optimizer_step(setup, samples, step, 1e-3)
        if figures["grad_norm"] is not None:
            break
    assert figures["grad_norm"] is not None
    assert not all(map(torch.equal, before, model.parameters()))
    skipped = figures | {"step": 1, "epoch": 1, "grad_norm": None}
    line = checkpoints.describe_steps([skipped, skipped], 2, 2, 1.0)
    assert "2 steps skipped (fp16 overflow)" in line


# a gradient in bf16 has 8 bits
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_label_loss_equals_cross_entropy(dtype, rtol):
    """So does its gradient, in the precision of the logits."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(150, 50, generator=generator) * 30).to(dtype)
    ours = logits.clone().requires_grad_()
    theirs = logits.clone().requires_grad_()
    targets = torch.arange(150) * 7 % 50
    loss = train_loop.LabelLoss.apply(ours * 1, targets)
    truth = torch.nn.functional.cross_entropy(theirs.float(), targets, reduction="sum")
    (loss / 3).backward()
    (truth / 3).backward()
    assert loss.dtype == torch.float32
    assert torch.allclose(loss, truth, rtol=1e-6)
    assert torch.allclose(ours.grad, theirs.grad, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_label_logits_are_computed_at_label_positions_alone(kind):
    """And equal those of the whole row there."""
    model = tiny_model(kind).eval()
    samples = samples_for(model, tiny_tokenizer())[:3]
    decoder_start_token_id = decoder_start_of(model)
    widths = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, out: widths.append(out.shape[-2]))
    for group, is_packed in ((samples, False), (samples[:1], False), (samples[:1], True)):
        batch = batches.collate(group, decoder_start_token_id, packing=is_packed)
        is_label = batch.targets != -100
        inputs = dict(batch.inputs)
        inputs.pop("packed_lengths", None)
        logits = batches.label_logits(model, batch._replace(inputs=inputs), model.device)
        assert widths.pop() == is_label.sum()
        whole = model(**inputs).logits[is_label]
        widths.clear()
        assert torch.allclose(logits, whole, atol=1e-5)
    hook.remove()


# ---------------- Packing


def test_lengths_of_layer_tells_self_attention_from_cross_attention():
    model = tiny_model("t5")
    lengths = PackedLengths([1, 2], [3, 4])
    encoder = model.encoder.block[0].layer[0].SelfAttention
    decoder, cross, _ = model.decoder.block[0].layer
    assert batches.lengths_of_layer(encoder, lengths) == ([1, 2], [1, 2])
    assert batches.lengths_of_layer(decoder.SelfAttention, lengths) == ([3, 4], [3, 4])
    assert batches.lengths_of_layer(cross.EncDecAttention, lengths) == ([3, 4], [1, 2])
    layer = tiny_model("gpt2").transformer.h[0].attn
    assert batches.lengths_of_layer(layer, PackedLengths([1, 2], [])) == ([1, 2], [1, 2])


def tiny_mistral():
    """A student whose layers reach back less far than a sample."""
    torch.manual_seed(0)
    config = tf.MistralConfig(
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
    return tf.MistralForCausalLM(config)


def tiny_bart():
    """A student whose positions are absolute and counted by itself."""
    torch.manual_seed(0)
    config = tf.BartConfig(
        vocab_size=259,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        eos_token_id=0,
        decoder_start_token_id=1,
        init_std=0.2,
    )
    return tf.BartForConditionalGeneration(config)


def tiny_falcon():
    """A student that does not hand keywords down to its attention."""
    torch.manual_seed(0)
    config = tf.FalconConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, eos_token_id=0
    )
    return tf.FalconForCausalLM(config)


def prepared(model, **changes):
    samples = samples_for(model, tiny_tokenizer())
    config = train_config(**changes)
    return prepare_training(model, samples, config)


@pytest.mark.parametrize("make", [tiny_mistral, tiny_bart, tiny_falcon])
def test_choose_layout_pads_where_a_packed_row_gets_other_logits(make):
    model = make()
    assert not prepared(model).packing
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
@pytest.mark.parametrize("kind", KINDS)
def test_choose_layout_packs_the_students_of_the_paper(kind, plain):
    """And trusts the fast paths, if they are asked for."""
    setup = prepared(tiny_model(kind), plain=plain)
    assert setup.packing
    assert setup.config.plain == plain


def test_train_pads_a_student_that_cannot_be_packed(tmp_path, capsys):
    train_all(tiny_mistral(), tiny_tokenizer(), tmp_path / "window", epochs=1)
    assert "padded" in capsys.readouterr().out
    train_all(tiny_model("llama"), tiny_tokenizer(), tmp_path / "full", epochs=1)
    assert "packed" in capsys.readouterr().out


@pytest.mark.parametrize("plain", [True, False], ids=["plain", "fast"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_training_mode_leaves_hugging_faces_own_student(kind, plain):
    """After training, and after an error, modules and attention are what they were."""
    model = tiny_model(kind, dropout=0.1)
    samples = samples_for(model, tiny_tokenizer())
    config = train_config(plain=plain)
    setup = prepare_training(model, samples, config)
    before = [dict(vars(module)) for module in model.train().modules()]
    with pytest.raises(ZeroDivisionError), train_loop.training_mode(setup):
        assert model.config._attn_implementation == "packed"
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    assert [dict(vars(module)) for module in model.modules()] == before
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_training_mode_works_without_extras(tmp_path, monkeypatch):
    """`rm -r extras` leaves the plain path, with the same losses."""
    expected = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "all", plain=True)
    monkeypatch.setattr(train_loop, "__file__", str(tmp_path / "train_loop.py"))
    monkeypatch.setitem(__import__("sys").modules, "extras.cpu_training", None)
    rows = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "without")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == [row["loss"] for row in expected if "loss" in row]


# ---------------- Runs


@pytest.mark.parametrize(
    "kind", ["gpt2", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]
)
def test_train_teaches_a_tiny_student_eight_samples(kind, tmp_path):
    epochs = 150 if "t5" in kind else 50
    tokenizer = tiny_tokenizer(bos=kind == "llama")
    rows = train_all(tiny_model(kind), tokenizer, tmp_path, toy_data(8), epochs=epochs, lr=1e-2)
    losses = [row["epoch_loss"] for row in rows if "epoch_loss" in row]
    assert len(losses) == epochs
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    "precision, kind", [("bf16", "gpt2"), ("fp16", "gpt2"), ("bf16", "t5"), ("tf32", "llama")]
)
def test_train_runs_in_every_precision(precision, kind, tmp_path):
    expected = train_all(tiny_model(kind), tiny_tokenizer(), tmp_path / "fp32")
    changes = {"precision": precision}
    rows = train_all(tiny_model(kind), tiny_tokenizer(), tmp_path / precision, **changes)
    torch.set_float32_matmul_precision("highest")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in expected if "loss" in row], rel=0.05)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_train_stops_at_a_loss_that_is_not_finite(precision, tmp_path):
    model = tiny_model("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(sample_index .*--lr"):
        train_all(model, tiny_tokenizer(), tmp_path, precision=precision)


def test_train_refuses_data_without_a_usable_sample(tmp_path):
    with pytest.raises(UserError, match="no sample is left to train on: all 20 exceed 3 tokens"):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, max_length=3)


def test_train_says_which_samples_are_too_long(tmp_path, capsys):
    rows = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, epochs=1, max_length=30)
    said = capsys.readouterr().out
    assert "samples that are longer than 30 tokens" in said
    assert "of 20 samples" in said
    assert rows[-1]["epoch"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("packing", [False, True])
def test_train_compiled_gives_the_same_losses(packing, tmp_path):
    changes = {"epochs": 1, "packing": packing}
    expected = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "plain", **changes)
    changes["compile"] = True
    rows = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "compiled", **changes)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in expected if "loss" in row], rel=1e-5)


RANK_RUNS = {
    "ddp t5": ("t5", {}),
    "ddp padded": ("gpt2", {"packing": False, "micro_batch_size": 2}),
}


@pytest.mark.parametrize("n_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_train_on_ranks_equals_one_process(n_ranks, tmp_path):
    """Any number of ranks gives the losses and weights of one process."""
    assert_ranks_equal_one_process(n_ranks, RANK_RUNS, tmp_path)


def test_learning_rate_is_that_of_transformers_after_warm_up():
    makers = {
        "linear": tf.get_linear_schedule_with_warmup,
        "cosine": tf.get_cosine_schedule_with_warmup,
    }
    for name, make in makers.items():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = make(optimizer, 5, 20)
        expected = []
        for _ in range(20):
            expected.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        config = train_config(lr=2.0, warmup=5, schedule=name)
        rates = [train_loop.learning_rate(step, 20, config) for step in range(1, 21)]
        assert rates[5:] == pytest.approx(expected[5:])
        # ours starts above 0, so that the first step is not lost
        assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_learning_rate_is_constant_by_default():
    """As the paper's."""
    config = train_config(lr=2.0)
    assert {train_loop.learning_rate(step, 20, config) for step in range(1, 21)} == {2.0}


def test_train_yields_epochs_with_the_student_as_hugging_face_knows_it(tmp_path):
    """An evaluation between two epochs finds its own attention."""
    model = tiny_model("t5")
    epochs = []
    for epoch in start_training(model, tiny_tokenizer(), tmp_path):
        assert model.config._attn_implementation == "sdpa"
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        epochs.append(epoch)
    assert epochs == [1, 2]
