"""Decoding, plain and fast, against Hugging Face's generate on one prompt at a time.

python -m pytest tests/test_decoding.py
"""

import collections
import functools
import inspect
import json
import math
import random
import subprocess
import sys
import time

import pytest
import torch
import transformers
from conftest import (
    KINDS,
    PROMPTS,
    ROOT,
    fork_ranks,
    greedy_texts,
    tiny_bart,
    tiny_lfm2,
    tiny_model,
    tiny_tokenizer,
)

import decoding
import evaluate
import models
import sampling
import storage
from storage import UserError

LIMITS = [5, 20, 9, 14, 3, 8, 12]  # of the new tokens of PROMPTS


@pytest.fixture(params=[True, False], ids=["plain", "fast"])
def plain(request):
    """Whether to decode without extras/; without extras/ both are plain."""
    return request.param


@pytest.fixture
def load(model_folder):
    """-> function: kind -> (model, tokenizer, family)."""
    return lambda kind: models.load_model(str(model_folder(kind)))


@pytest.fixture(scope="module")
def oracle(model_folder):
    """-> function: kind -> Hugging Face's greedy texts of 40 tokens, made once."""

    @functools.cache
    def texts(kind):
        return greedy_texts(*models.load_model(str(model_folder(kind))), 40)

    return texts


MANY_LIMITS = [3, 90, 7, 1, 30, 12, 5, 60, 2, 9, 80, 4, 33, 21, 6, 2, 70, 10, 8, 40, 3]


@pytest.fixture(scope="module")
def alone(model_folder):
    """-> function: kind -> what each of 21 prompts is answered alone, by the plain path, once."""

    @functools.cache
    def rows(kind):
        arguments = models.load_model(str(model_folder(kind)))
        found = []
        for prompt, limit in zip(PROMPTS * 3, MANY_LIMITS, strict=True):
            found += decoding.generate(*arguments, [prompt], limit, plain=True)
        return found

    return rows


# ---------------------------------------------------------------- load a model


def test_load_model_no_config(tmp_path):
    """A folder that is not a model is refused."""
    with pytest.raises(UserError, match="is not a model folder: it has no config.json"):
        models.load_model(str(tmp_path))


def test_load_model_no_tokenizer(tmp_path):
    """A model without a tokenizer is refused."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        models.load_model(str(tmp_path))


def test_load_model_torn(tmp_path):
    """A torn weight file is named."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=f"the model {tmp_path} could not be loaded"):
        models.load_model(str(tmp_path))


def test_load_model_unknown_name():
    """A name that is neither a folder nor to be had is refused."""
    sentence = "neither a folder here nor in the cache, and .* cannot be reached"
    with pytest.raises(UserError, match=sentence):
        models.load_model("no-such-model")


def test_load_model_no_eos(tmp_path):
    """A tokenizer without an end of sequence is refused: a student could never stop."""
    tiny_model("gpt2").save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        models.load_model(str(tmp_path))


def test_load_model_no_decoder_start(tmp_path):
    """An encoder-decoder without a first token is refused."""
    tiny_model("t5").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = storage.read_json(tmp_path / "config.json")
    config["decoder_start_token_id"] = None
    storage.write_json(tmp_path / "config.json", config)
    with pytest.raises(UserError, match="has no decoder_start_token_id"):
        models.load_model(str(tmp_path))


def test_fuse_gelu(model_folder):
    """GELU in one operation is the function of the config."""
    folder = str(model_folder("gpt2"))
    model = models.load_model(folder)[0].eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 60)[None]
    assert type(model.transformer.h[0].mlp.act) is not type(theirs.transformer.h[0].mlp.act)
    assert model.config.activation_function == "gelu_new"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", [None, "cuda"])
def test_select_device_rank_without_gpu(monkeypatch, device):
    """A rank without a GPU of its own says so."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    sentence = "rank 2 has no GPU of its own, there are 2: start as many ranks with torchrun, or"
    with pytest.raises(UserError, match=sentence):
        models.select_device(device)


def test_select_device_cpu_rank(monkeypatch):
    """On CPUs there may be any number of ranks."""
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert models.select_device("cpu") == torch.device("cpu")


# ---------------------------------------------------------------- greedy texts


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("kind", [*KINDS[:3], pytest.param(KINDS[3], marks=pytest.mark.slow)])
def test_generate_greedy_is_hugging_face_s(kind, batch_size, plain, load, oracle):
    """Greedy texts are those of model.generate one prompt at a time, for any batch size."""
    done = decoding.generate(*load(kind), PROMPTS, 40, batch_size=batch_size, plain=plain)
    assert [row[0]["completion"] for row in done] == oracle(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_texts_differ(kind, oracle):
    """The oracle says something: no text is empty and they differ."""
    texts = oracle(kind)
    assert "" not in texts
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("make_model", [tiny_lfm2, tiny_bart])
def test_generate_other_caches(make_model, plain):
    """Rows leave the batch of a model with other cache layers or absolute positions too."""
    model = make_model()
    arguments = model, tiny_tokenizer(), "decoder"
    if model.config.is_encoder_decoder:
        arguments = model, tiny_tokenizer(), "encoder_decoder"
    rows = decoding.generate(*arguments, PROMPTS, LIMITS, batch_size=3, plain=plain)
    for prompt, limit, row in zip(PROMPTS, LIMITS, rows, strict=True):
        assert [row] == decoding.generate(*arguments, [prompt], limit, plain=True)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_generate_limit_of_each_row(kind, plain, load):
    """Each row stops at its own limit, whatever its neighbours do."""
    model, tokenizer, family = load(kind)
    limits = [3, 30, 7, 1, 30, 12, 5]
    rows = decoding.generate(model, tokenizer, family, PROMPTS, limits, plain=plain)
    for prompt, limit, row in zip(PROMPTS, limits, rows, strict=True):
        assert [row] == decoding.generate(model, tokenizer, family, [prompt], limit, plain=True)
    one_byte = tokenizer(rows[3][0]["completion"], add_special_tokens=False)["input_ids"]
    assert len(one_byte) <= 3  # or the three of its replacement sign


@pytest.mark.parametrize("kind", KINDS[:3])
def test_generate_many_batches(kind, plain, load, alone):
    """Of 21 prompts in batches of 4, each has the text it has alone."""
    arguments = *load(kind), PROMPTS * 3, MANY_LIMITS
    assert decoding.generate(*arguments, batch_size=4, plain=plain) == alone(kind)


def test_generate_nothing(plain, load):
    """Of no prompts there are no completions."""
    assert decoding.generate(*load("gpt2"), [], 5, plain=plain) == []


def test_decode_reads_as_one_page():
    """The plain loop, with reading prompts and one step, is short enough to be read at once."""
    functions = (decoding.decode, decoding.prefill, decoding.decode_step, decoding.select_rows)
    assert sum(len(inspect.getsourcelines(function)[0]) for function in functions) <= 110


# ---------------------------------------------------------------- where a completion ends


def test_generate_eos(plain):
    """End of sequence ends a completion, with the reason stop."""
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    first = model(torch.tensor([[40, 41]])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = first  # so that the first token ends it
    prompt = tokenizer.decode([40, 41])
    [[row]] = decoding.generate(model, tokenizer, "decoder", [prompt], 10, plain=plain)
    assert row == {"completion": tokenizer.decode([first]), "finish_reason": "stop"}


def test_generate_stop_string(plain):
    """A stop string ends a completion and is cut off."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder", PROMPTS[:1], 20
    text = decoding.generate(*arguments, plain=plain)[0][0]["completion"]
    stop = text[4:6]
    [[row]] = decoding.generate(*arguments, stop=[stop], plain=plain)
    assert row == {"completion": text[: text.find(stop)], "finish_reason": "stop"}


def test_shows_stop_reads_the_last_tokens_alone():
    """However long a text is, a few tokens are decoded at each of its tokens."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer("Q: how\n" * 50)["input_ids"]
    seen = []

    class Counting:
        def decode(self, ids, **options):
            seen.append(len(ids))
            return tokenizer.decode(ids, **options)

    assert sampling.shows_stop(Counting(), ids, ["\n\n", "how\n"])
    assert not sampling.shows_stop(Counting(), ids, ["\u00e9", "Q: who"])
    assert seen == [5, 7]


def test_rows_of_greedy_decoding_make_no_random_stream(plain, monkeypatch):
    """A stream a row takes memory; only sampling needs it."""
    made = []
    monkeypatch.setattr(torch, "Generator", lambda: made.append(1))
    model = tiny_model("gpt2")
    decoding.generate(model, tiny_tokenizer(), "decoder", ["a", "b"], 3, plain=plain)
    assert not made


def test_generate_first_of_two_stop_strings(plain):
    """Of several stop strings the one that comes first in the text cuts."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder", PROMPTS[:1], 20
    text = decoding.generate(*arguments, plain=plain)[0][0]["completion"]
    stop = [text[4:7], text[5:7]]
    [[row]] = decoding.generate(*arguments, stop=stop, plain=plain)
    assert row["completion"] == text[: min(text.find(string) for string in stop)]


def test_generate_to_the_last_position(plain):
    """A model that never stops is cut at its last position."""
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = 2
    [[row]] = decoding.generate(model, tokenizer, "decoder", ["x" * 250], 1000, plain=plain)
    assert row["finish_reason"] == "length"
    assert len(row["completion"]) <= 6


# ---------------------------------------------------------------- prompts too long for the model


@pytest.mark.parametrize("prompt", ["", "x" * 256])
def test_fit_context_window_error(prompt):
    """A prompt that is empty or leaves no room is named."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder"
    with pytest.raises(UserError, match="prompt 1 has"):
        decoding.generate(*arguments, ["fine", prompt], 5)


def test_fit_context_window_skip(capsys, plain):
    """A prompt that is too long may go unanswered; the others do not suffer."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder"
    prompts = ["a", "x" * 256, "b"]
    first, skipped, last = decoding.generate(*arguments, prompts, 5, overflow="skip", plain=plain)
    assert skipped == [{"completion": "", "finish_reason": "length"}]
    remark = "completions of 1 of 3 prompts may be cut, 1 get no room"
    assert remark in capsys.readouterr().out
    assert [first, last] == decoding.generate(*arguments, ["a", "b"], 5, plain=plain)


def test_fit_context_window_truncate_left():
    """A few-shot prompt loses its beginning and keeps its question."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder"
    cut = decoding.generate(*arguments, ["y" * 300 + "Q: how many?"], 6, overflow="truncate_left")
    assert cut == decoding.generate(*arguments, ["y" * 238 + "Q: how many?"], 6)


# ---------------------------------------------------------------- samples


def test_generate_samples_depend_on_the_seed_alone(plain):
    """A sample depends on its seed, prompt and number: not on the batch."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder"
    options = {"temperature": 0.7, "n": 4, "plain": plain}
    rows = decoding.generate(*arguments, PROMPTS, 12, batch_size=5, seed=1, **options)
    assert rows == decoding.generate(*arguments, PROMPTS, 12, batch_size=28, seed=1, **options)
    assert rows[2:4] == decoding.generate(*arguments, PROMPTS[2:4], 12, seed=1, **options)
    assert rows != decoding.generate(*arguments, PROMPTS, 12, seed=2, **options)
    assert len({row["completion"] for row in rows[2]}) > 1


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generate_fast_is_plain(temperature, load):
    """The fast path draws the samples of the plain one."""
    arguments = *load("t5"), PROMPTS, 12, temperature, 1
    assert decoding.generate(*arguments) == decoding.generate(*arguments, plain=True)


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sample_tokens_follow_the_softmax(top_p):
    """Draws follow the softmax, cut at top_p, by a chi-squared test."""
    draws = 100_000
    model = tiny_model("gpt2")
    with torch.inference_mode():
        logits = model(torch.tensor([[40, 41, 42]])).logits[0, -1]
    generators = [torch.Generator().manual_seed(0)] * 2000
    tokens = [
        sampling.sample_tokens(logits.expand(2000, -1), 0.7, generators, top_p)
        for _ in range(draws // 2000)
    ]
    probs, order = torch.softmax(logits.double() / 0.7, -1).sort(descending=True)
    kept = probs.cumsum(0) - probs < top_p - 1e-9  # the fewest tokens that reach top_p
    seen = torch.bincount(torch.cat(tokens), minlength=len(order))[order].double()
    assert seen[kept].sum() == draws
    expected = probs[kept] / probs[kept].sum() * draws
    common = expected >= 10  # the rest is too rare to be counted alone
    seen, expected = seen[kept][common], expected[common]
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    degrees = len(expected) - 1
    assert chi_squared < degrees + 3.1 * math.sqrt(2 * degrees) + 5  # p about 0.001


def test_generate_reads_a_prompt_once(plain, monkeypatch):
    """A prompt is read once, however many samples are drawn."""
    read = []
    prefill = decoding.prefill

    def count(model, prompts):
        if max(map(len, prompts)) > 1:  # one token: to see the size of the cache
            read.extend(prompts)
        return prefill(model, prompts)

    monkeypatch.setattr(decoding, "prefill", count)
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder", PROMPTS[1:], 3
    decoding.generate(*arguments, temperature=1.0, n=8, batch_size=100, plain=plain)
    lengths = collections.Counter(map(len, read))
    del lengths[32], lengths[7]  # of the rehearsal
    assert lengths == collections.Counter(map(len, PROMPTS[1:]))


# ---------------------------------------------------------------- errors


def test_generate_nan(plain):
    """NaN logits stop the run and name the prompt."""
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("!")["input_ids"][0]] = float("nan")
    prompts = ["fine", "good", "bad!", "well"]
    with pytest.raises(UserError, match="prompt 2: the model's logits are NaN or infinite"):
        decoding.generate(model, tokenizer, "decoder", prompts, 5, plain=plain)


def test_generate_out_of_memory(plain, monkeypatch):
    """Where memory runs out, the flag to lower is named."""

    def runs_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(decoding, "prefill", runs_out)
    with pytest.raises(UserError, match="out of memory: lower --eval_batch_size"):
        decoding.generate(tiny_model("gpt2"), tiny_tokenizer(), "decoder", ["a"], 3, plain=plain)


def test_generate_no_cache(plain, monkeypatch):
    """A model without a key-value cache is refused."""
    model = tiny_model("gpt2")
    monkeypatch.setattr(
        model.__class__, "forward", lambda self, **_: type("Output", (), {"logits": None})
    )
    with pytest.raises(UserError, match="models of type gpt2 keep no key-value cache"):
        decoding.generate(model, tiny_tokenizer(), "decoder", ["ab"], 3, plain=plain)


def test_generate_keeps_the_mode(plain):
    """A model in training mode is decoded without dropout and left in training mode."""
    model = tiny_model("gpt2", dropout=0.5).train()
    arguments = model, tiny_tokenizer(), "decoder", PROMPTS, 5
    rows = decoding.generate(*arguments, plain=plain)
    assert model.training
    assert rows == decoding.generate(*arguments, plain=plain)


def test_generate_then_train(plain, load):
    """A model can be trained after decoding: between epochs it is evaluated."""
    model, tokenizer, family = load("gpt2")
    decoding.generate(model, tokenizer, family, PROMPTS, 3, plain=plain)
    ids = torch.tensor([[40, 41, 42]])
    model(ids, labels=ids).loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())


# ---------------------------------------------------------------- memory


def test_default_batch_size_by_memory(monkeypatch):
    """By default so many rows are decoded at once as the cache has memory for."""
    model = tiny_model("gpt2")
    row = decoding.Row(0, "", [5] * 36, 1000, 0)
    token_bytes = 2 * model.config.n_layer * model.config.n_embd * 4  # keys and values in fp32
    sizes = []
    for rows in (10**6, 7, 0):
        memory = rows * (36 + decoding.RESERVED_TOKENS) * token_bytes
        monkeypatch.setattr(decoding, "cpu_cache_bytes", lambda _, memory=memory: memory)
        sizes.append(decoding.default_batch_size(model, row))
    assert sizes == [decoding.CPU_ROWS, 7, 1]


def test_cpu_cache_bytes():
    """The cache may take half of what the weights take, and always 0.6 GB."""
    model = tiny_model("gpt2")
    assert decoding.cpu_cache_bytes(model) == 6 * 10**8
    model.register_parameter("large", torch.nn.Parameter(torch.empty(10**9, device="meta")))
    assert decoding.cpu_cache_bytes(model) > 2 * 10**9


# ---------------------------------------------------------------- journals and ranks


def test_generate_goes_on_after_a_kill(tmp_path, monkeypatch):
    """A run that dies goes on and decodes nothing twice; another model's run starts anew."""
    model = tiny_model("gpt2")
    journal = tmp_path / "out"

    def generate():
        arguments = model, tiny_tokenizer(), "decoder", PROMPTS, LIMITS, 0.7, 2
        return decoding.generate(*arguments, batch_size=4, journal=journal)

    expected = generate()
    storage.remove_journals(journal)
    decoded = []
    collect = decoding.collect

    def dying(ended, journals, total):
        def some():
            for i, one in enumerate(ended):
                if i == 3:
                    raise KeyboardInterrupt
                decoded.append(one[0].key)
                yield one

        return collect(some(), journals, total)

    monkeypatch.setattr(decoding, "collect", dying)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            generate()
    assert generate() == expected
    assert len(decoded) == len(set(decoded)) == 14
    with torch.no_grad():
        model.lm_head.weight += 0.1
    with pytest.raises(KeyboardInterrupt):
        generate()
    assert len(decoded) > 14
    storage.remove_journals(journal)
    assert not list(tmp_path.iterdir())


def test_completion_keys_of_older_journals(tmp_path):
    """Journals of earlier versions are continued: the keys of rows are the same."""
    model = tiny_model("gpt2")
    ids = tiny_tokenizer()("ab")["input_ids"]
    sums = [weight.detach().double().sum().item() for weight in model.parameters()]
    settings = storage.fingerprint([0.0, 1.0, None, 0, *decoding.weight_checksums(model)])
    assert decoding.weight_checksums(model) == pytest.approx(sums)
    key = storage.fingerprint([settings, 0, 0, ids, 5])
    row = {"key": key, "completion": "known", "finish_reason": "stop"}
    (tmp_path / "out.journal-0").write_text(json.dumps(row) + "\n")
    arguments = model, tiny_tokenizer(), "decoder", ["ab"], 5
    [[completion]] = decoding.generate(*arguments, journal=tmp_path / "out")
    assert completion == {"completion": "known", "finish_reason": "stop"}


def test_generate_equal_prompts(tmp_path):
    """Equal lines get texts of their own at a temperature; the first keeps what it had alone."""
    model = tiny_model("gpt2")
    options = {"temperature": 1.0, "seed": 3}
    many = decoding.generate(model, tiny_tokenizer(), "decoder", ["ab"] * 4, 12, **options)
    texts = [completion["completion"] for [completion] in many]
    assert len(set(texts)) == 4
    [[alone]] = decoding.generate(model, tiny_tokenizer(), "decoder", ["ab"], 12, **options)
    assert alone["completion"] == texts[0]


def test_generate_first_continues(tmp_path):
    """Completions 2 and 3, asked for alone, are those of four at once."""
    arguments = tiny_model("gpt2"), tiny_tokenizer(), "decoder", ["ab", "c"], 12
    options = {"temperature": 1.0, "seed": 3}
    whole = decoding.generate(*arguments, n=4, **options)
    rest = decoding.generate(*arguments, n=2, first=2, **options)
    assert rest == [of_prompt[2:] for of_prompt in whole]


@pytest.mark.slow
def test_generate_kill_9(tmp_path, model_folder):
    """Killed at random moments, a run leaves in the end the file of an uninterrupted one."""
    rows = []
    for i in range(400):
        rows.append({"prompt": f"{'count on ' * (i % 7)}{i}", "max_new_tokens": 60 + i % 90})
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = [sys.executable, ROOT / "evaluate.py", "generate", "--batch_size", "16"]
    files = ["--model", model_folder("gpt2"), "--prompts", prompts, "--temperature", "0.7", "--out"]
    command = [*map(str, [*script, *files])]
    subprocess.run([*command, tmp_path / "whole"], check=True)
    journal = tmp_path / "out.journal-0"
    kept = []
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen([*command, tmp_path / "out"])
        wanted = len(kept) + chance.randrange(1, 30)
        while process.poll() is None:
            if journal.exists() and journal.read_bytes().count(b"\n") >= wanted:
                break
            time.sleep(0.01)
        process.kill()
        process.wait()
        lines = journal.read_bytes().split(b"\n")[:-1]
        assert lines[: len(kept)] == kept  # what was there is not decoded again
        assert len(set(lines)) == len(lines) < 400
        kept = lines
    subprocess.run([*command, tmp_path / "out"], check=True)
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not journal.exists()


def test_generate_two_ranks(tmp_path, tmp_path_factory, model_folder):
    """Two ranks give the file of one."""
    rows = [{"prompt": p, "max_new_tokens": 3 + 2 * i} for i, p in enumerate(PROMPTS)]
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sampling = ["--temperature", "0.7", "--top_p", "0.9", "--samples", "3"]
    flags = ["--model", str(model_folder("gpt2")), "--prompts", str(prompts), *sampling]
    two = ["generate", *flags, "--out", str(tmp_path / "two")]
    fork_ranks(2, lambda: evaluate.main(two), tmp_path_factory.mktemp("ranks"))
    evaluate.main(["generate", *flags, "--out", str(tmp_path / "one"), "--batch_size", "4"])
    assert (tmp_path / "two").read_text() == (tmp_path / "one").read_text()
    numbers = [row["completion_index"] for row in storage.read_jsonl(tmp_path / "one")]
    assert numbers == [0, 1, 2] * len(PROMPTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "p.jsonl", "two"]
