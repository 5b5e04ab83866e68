"""Students that are unlike GPT-2 and T5: exact, or refused before anything is computed.

python -m pytest tests/test_rehearsal.py
"""

import os
import sys
import time

import pytest
import torch
import transformers as tf
from conftest import (
    PROMPTS,
    family_of,
    greedy_texts,
    model_folder_of,
    prepare_training,
    samples_for,
    start_training,
    tiny_bart,
    tiny_family,
    tiny_lfm2,
    tiny_model,
    tiny_tokenizer,
    toy_data,
    train_all,
    train_config,
)

import completions
import decoding
import models
import rehearsal
import sampling
import storage
import tasks
import terminal
import tokens
from storage import UserError

LIMITS = [7, 3, 7, 3, 7, 3, 7]  # rows leave at different times


def prepare(model, samples=None, **changes):
    samples = samples or samples_for(model, tiny_tokenizer())
    config = train_config(**changes)
    return prepare_training(model, samples, config)


def texts_of(model, tokenizer=None, **options):
    """Texts of PROMPTS, to LIMITS."""
    arguments = model, tokenizer or tiny_tokenizer(), family_of(model), PROMPTS, LIMITS
    rows = decoding.generate(*arguments, **options)
    return [completions[0]["completion"] for completions in rows]


def hugging_face_texts(model):
    """Greedy texts of model.generate, each prompt alone, to LIMITS."""
    tokenizer = tiny_tokenizer()
    texts = {
        limit: greedy_texts(model, tokenizer, family_of(model), limit) for limit in set(LIMITS)
    }
    return [texts[limit][i] for i, limit in enumerate(LIMITS)]


@pytest.fixture(params=[True, False], ids=["plain", "fast"])
def plain(request):
    return request.param


# ---------------- Refused before the first step


@pytest.mark.parametrize(
    "model_type, reason",
    [
        ("openai-gpt", "keep no key-value cache"),
        ("rwkv", "keep no key-value cache"),
        ("prophetnet", "cannot be trained here"),
        ("cpmant", "cannot be trained here"),
    ],
)
def test_train_refuses_what_cannot_be_decoded_or_trained(model_type, reason, tmp_path):
    """In one sentence, in seconds, with no file written."""
    model = tiny_family(model_type)
    start = time.perf_counter()
    with pytest.raises(UserError, match=f"models of type {model_type} {reason}"):
        next(start_training(model, tiny_tokenizer(), tmp_path / "out"))
    assert time.perf_counter() - start < 10
    assert list((tmp_path / "out").iterdir()) == []


def test_train_refuses_a_student_that_sees_the_answer(tmp_path):
    """BERT without is_decoder reads the label that it has to predict."""
    model = tiny_family("bert", is_decoder=False)
    with pytest.raises(UserError, match="models of type bert (predict a token from those|keep no)"):
        next(start_training(model, tiny_tokenizer(), tmp_path / "out"))


def test_train_refuses_frozen_weights(tmp_path):
    model = tiny_model("gpt2").requires_grad_(False)
    with pytest.raises(UserError, match="models of type gpt2 cannot be trained here .*grad"):
        next(start_training(model, tiny_tokenizer(), tmp_path / "out"))


def test_generate_refuses_what_cannot_be_decoded(plain):
    with pytest.raises(UserError, match="models of type cpmant cannot be decoded here"):
        texts_of(tiny_family("cpmant"), plain=plain)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_prepare_training_leaves_weights_and_random_state(kind):
    """The rehearsal takes no step, and what is drawn after it is what was drawn without it."""
    model = tiny_model(kind, dropout=0.1).train()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    prepare(model)
    assert torch.equal(torch.rand(3), expected)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert all(weight.grad is None for weight in model.parameters())
    assert model.training


def test_rehearsal_mode_scales_small_weights_up():
    """A student that is not trained yet is tried at the size of weights that are."""
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    config = tf.GPT2Config(vocab_size=259, n_layer=1, n_head=2, n_embd=64, **ids)
    model = tf.GPT2LMHeadModel(config)
    weight = model.transformer.h[0].mlp.c_fc.weight  # 64 x 256
    with rehearsal.rehearsal_mode(model):
        assert 0.6 < weight.std() * 16 < 1.6
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


# ---------------- Packed, padded or one by one


OLD = tuple(map(int, tf.__version__.split(".")[:2])) < (5, 23)
DECODES = pytest.mark.skipif(OLD, reason="by this transformers it decodes otherwise than it trains")
LEAKING = [pytest.param("doge", marks=DECODES), pytest.param("umt5", marks=DECODES), "gpt_oss"]


@pytest.mark.parametrize("model_type", LEAKING)
def test_choose_layout_pads_what_leaks(model_type):
    """Doge's weights get no gradient packed; UMT5 and gpt-oss attend in their own way."""
    assert not prepare(tiny_family(model_type)).packing


def test_choose_layout_pads_a_convolution_at_random_weights():
    """What leaks from a sample into the next is 8e-5 of the logits in a new LFM2."""
    assert not prepare(tiny_lfm2()).packing


def test_choose_layout_one_by_one(capsys):
    """A model whose padded rows change each other is trained a sample at a time."""

    def mix(module, inputs, hidden):
        if len(hidden) > 1:
            hidden = hidden + hidden.mean(0, keepdim=True)
        return hidden

    model = tiny_model("gpt2")
    model.transformer.ln_f.register_forward_hook(mix)
    setup = prepare(model, packing=False)
    assert [len(group) for group in setup.micro_batches(setup.samples[:3])] == [1, 1, 1]
    assert "samples are trained one by one" in capsys.readouterr().out


# ---------------- Decoding


@pytest.mark.parametrize(
    "model_type",
    [
        "switch_transformers",  # its encoder's output is more than a tensor
        "mamba",  # its cache has another name, its dt_proj's weight is read by the model
        "jamba",
        "diffllama",  # pages would keep its keys and forget what it does to its values
        "minimax",  # its batches are wrong in Hugging Face too
    ],
)
def test_generate_is_hugging_face_s(model_type, plain):
    """Greedy texts are those of generate."""
    model = tiny_family(model_type)
    expected = hugging_face_texts(model)
    assert texts_of(model, plain=plain) == expected


def test_generate_says_that_batches_are_wrong(capsys):
    texts_of(tiny_family("minimax"))
    assert "prompts are decoded one by one" in capsys.readouterr().out


# ---------------- Token ids and positions


def test_generate_token_without_embedding():
    """The prompt is named."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[ADDED]"])
    arguments = tiny_model("gpt2"), tokenizer, "decoder", ["fine", "not [ADDED]"], 3
    with pytest.raises(UserError, match="prompt 1 holds token 259, but the model has 259 embed"):
        decoding.generate(*arguments)


def test_train_token_without_embedding(tmp_path):
    """The sample is named, wherever in the file it stands."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[ADDED]"])
    data = toy_data()
    data["label"][7] = " [ADDED] --> 7"
    with pytest.raises(UserError, match="the sample of sample_index 7 holds token 259"):
        next(start_training(tiny_model("gpt2"), tokenizer, tmp_path / "out", data))


def test_train_pads_with_a_token_that_exists(tmp_path):
    """A padding token that was added without resizing is never looked up."""
    tokenizer = tiny_tokenizer(bos=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == 259
    rows = train_all(tiny_model("gpt2"), tokenizer, tmp_path / "out", epochs=1, packing=False)
    assert "epoch_loss" in rows[-1]
    assert len(texts_of(tiny_model("gpt2"), tokenizer)) == len(PROMPTS)


def short_bart(positions=40):
    """An encoder-decoder with as many positions."""
    return tiny_bart(max_position_embeddings=positions)


def test_train_drops_what_exceeds_an_encoder_decoder(tmp_path, capsys):
    """BART has positions for 1,024 tokens, Marian for 512, Blenderbot for 128."""
    data = toy_data(5)
    data["label"][2] = "y" * 50
    data["input"][4] = "x" * 50
    train_all(short_bart(), tiny_tokenizer(), tmp_path / "out", data, epochs=1)
    assert "dropped 2 of 5 samples" in capsys.readouterr().out


def test_generate_within_the_positions_of_an_encoder_decoder(plain, capsys):
    """A prompt that is too long is named; new tokens end with the decoder's positions."""
    model = short_bart()
    arguments = model, tiny_tokenizer(), "encoder_decoder"
    with pytest.raises(UserError, match="prompt 1 has 50 tokens: .* at most 40"):
        decoding.generate(*arguments, ["a", "x" * 50], 3, plain=plain)
    options = {"overflow": "truncate_left", "plain": plain}
    whole, cut = decoding.generate(*arguments, ["y" * 40, "x" * 10 + "y" * 40], 60, **options)
    assert whole == cut
    assert "the model reads 40 tokens at most: completions of 2 of 2" in capsys.readouterr().out


@pytest.mark.parametrize("kind, positions", [("gpt2", (256,)), ("llama", (256,)), ("t5", ())])
def test_count_positions(kind, positions):
    counted = models.count_positions(tiny_model(kind).config)
    assert counted == models.Positions(**dict(zip(["total"], positions, strict=False)))


# ---------------- Folders that hold no plain model


def test_load_model_adapter(tmp_path):
    """The base would be evaluated as if it were the student."""
    model_folder_of("gpt2", tmp_path)
    storage.write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA"})
    with pytest.raises(UserError, match="holds an adapter .*merge_and_unload"):
        models.load_model(str(tmp_path))


METHODS = "bitsandbytes gptq awq torchao quanto compressed-tensors fp8 mxfp4".split()


@pytest.mark.parametrize("method", METHODS)
def test_load_model_quantized(method, tmp_path):
    model_folder_of("gpt2", tmp_path)
    config = storage.read_json(tmp_path / "config.json")
    storage.write_json(
        tmp_path / "config.json", config | {"quantization_config": {"quant_method": method}}
    )
    sentence = (
        rf"are quantized \({method}\).*take the unquantized model, or serve it and use --base"
    )
    with pytest.raises(UserError, match=sentence):
        models.load_model(str(tmp_path))


def test_load_model_names_the_folder(tmp_path):
    """Not one of the model's layers."""
    model_folder_of("gpt2", tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"the tokenizer of {tmp_path} has no end-of-sequence"):
        models.load_model(str(tmp_path))


# ---------------- Tokenizers


def sentencepiece_tokenizer(prepend: str):
    """Return a tokenizer like Llama-2's and T5's: decoding loses the space of the first piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<eos>", "<pad>", "<unk>", "▁", "▁step", "▁by", ".", "▁First", "First", "▁add"]
    pieces += sorted(
        {*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,;:!?'()-=+*/$%>"}
    )
    vocabulary = [(piece, -len(pieces) / (1 + len(piece))) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=prepend)]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=prepend)
    special = {"eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def test_text_after_keeps_the_space():
    """Llama-2's tokenizer decodes "▁First" alone to "First"."""
    tokenizer = sentencepiece_tokenizer("always")
    before = tokenizer("step by step.")["input_ids"]
    ids = tokenizer.convert_tokens_to_ids(["▁First", "▁add"])
    assert tokenizer.decode(ids) == "First add"
    assert sampling.text_after(tokenizer, before[-1:], ids) == " First add"


def test_generate_goes_on_after_the_prompt(monkeypatch):
    """So the second step of Zero-shot-CoT does not read "step by step.First"."""
    tokenizer = sentencepiece_tokenizer("always")
    first = tokenizer.convert_tokens_to_ids("▁First")
    monkeypatch.setattr(
        decoding, "next_tokens", lambda logits, *_: torch.full((len(logits),), first)
    )
    arguments = tiny_model("gpt2"), tokenizer, "decoder", ["step by step."], 2
    [[completion]] = decoding.generate(*arguments, plain=True)
    assert completion["completion"] == " First First"


def test_add_answers_separates_what_an_encoder_decoder_writes():
    row = {"prompt": "step by step.", "completion": "First add", "finish_reason": "stop"}
    answer = {"completion": "4", "finish_reason": "stop"}
    completions.add_answers(lambda prompts, *_: [[answer]], [row], 5, "encoder_decoder")
    assert row["prompt"] == "step by step. First add" + tasks.ANSWER_TRIGGER


def test_train_saves_a_padding_token(tmp_path):
    """Hugging Face's pipeline refuses batches without one, and gives each prompt its own text."""
    tokenizer = tiny_tokenizer(bos=True)
    assert tokenizer.pad_token is None
    train_all(tiny_model("gpt2"), tokenizer, tmp_path / "out", epochs=1)
    pipe = tf.pipeline("text-generation", str(tmp_path / "out"), device="cpu")
    options = {"max_new_tokens": 3, "do_sample": False, "batch_size": 2}
    assert len(pipe(["a", "bcd"], **options)) == 2


RATIONALE = "First\nadd  {x} to \\y.\n\nSo it is done"
GOLDS = {"gsm8k": "1,234", "svamp": "-12.25", "aqua": "E", "coin_flip": "no", "multiarith": "7"}
GOLDS["last_letter_concatenation"] = "nkpq"


@pytest.mark.parametrize("task, gold", GOLDS.items())
@pytest.mark.parametrize("template", ["ft_cot_token", "ft_token", "ft_natural"])
def test_tokenize_t5_labels_keep_their_answers(task, gold, template):
    """T5's tokenizer has no newline and no brace; the answer of a label survives both."""
    tokenizer = sentencepiece_tokenizer("always")
    family = "encoder_decoder"
    prompt, label = tasks.format_sample(template, family, "1 + 1?", RATIONALE, gold)
    data = {"sample_index": [0], "input": [prompt], "label": [label]}
    [sample], _ = tokens.tokenize(tokenizer, family, data, 512)
    decoded = tokenizer.decode(sample.label, skip_special_tokens=True)
    assert tasks.grade(task, template, decoded, gold, "paper").correct
    assert tasks.grade(task, template, decoded, gold, "flexible").correct


def test_train_counts_labels_that_lose_characters(tmp_path, capsys):
    """Once, with an example."""
    tokenizer = sentencepiece_tokenizer("always")
    data = toy_data(4)
    data["label"][1] = " First\nadd {x}. --> 1"
    train_all(tiny_model("t5"), tokenizer, tmp_path / "out", data, epochs=1)
    said = capsys.readouterr().out
    assert said.count("1 of 4 labels lose characters") == 1
    assert "of sample_index 1" in said


def test_describe_lost_text_nothing():
    """A tokenizer of bytes loses nothing."""
    data = toy_data(4)
    data["label"][1] = " First\n\nadd  {x} ~ é. --> 1"
    assert tokens.describe_lost_text(tiny_tokenizer(), data) == ""


# ---------------- Notebooks


def test_main_in_a_notebook(monkeypatch):
    """Its sys.stdout cannot be reconfigured."""

    class Stream:
        def write(self, text: str) -> None:
            pass

    monkeypatch.setattr("sys.stdout", Stream())
    terminal.escape_unencodable_output()


def test_progress_on_a_terminal_of_no_size(monkeypatch, capsys):
    """A cell's terminal has no columns for a bar, so lines come."""
    times = iter([0.0, 5.0, 11.0, 12.0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((0, 0)))
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(times))
    assert list(terminal.progress(["a", "b", "c"], "decoding", total=3)) == ["a", "b", "c"]
    assert "decoding: 1 of 3, 11 s" in capsys.readouterr().err
