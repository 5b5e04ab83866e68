"""Shared by all tests: tiny random models, and optional published files to test against.

FINETUNE_COT_SHARED names a folder with mirror/, saved/, vectors/ and dataset_SHA256SUMS; tests that
need it are skipped without it.  Everything else is made here: no network, no GPU.
"""

import collections
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks of a test would want two GPUs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # more slow tiny models down, and cannot be forked
if not (ROOT / "extras").is_dir():
    collect_ignore = ["extras", "test_readme.py"]  # the tests of what was deleted, or describes it


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; skipped unless --slow is given")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run it with --slow"))


@pytest.fixture(scope="session")
def shared():
    folder = os.environ.get("FINETUNE_COT_SHARED")
    if not folder:
        assert not os.environ.get("FINETUNE_COT_REQUIRE_SHARED"), "FINETUNE_COT_SHARED is not set"
        pytest.skip("FINETUNE_COT_SHARED is not set: no published files to compare with")
    return Path(folder)


def tiny_tokenizer(bos: bool = False) -> Any:
    """Return a tokenizer of bytes, which encodes any text: eos 0, pad 1, perhaps bos 2 first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(["<eos>", "<pad>", "<bos>", *letters])}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token=None if bos else "<pad>"
    )


def tiny_model(kind: str, dropout: float = 0.0, t5_scale: float = 1.0) -> Any:
    """Return a small random model: gpt2, llama, t5 (tied head) or flan-t5 (gated, untied head).

    t5_scale: of a T5's random weights; at 1 most of its greedy texts are empty, at 2 none is.
    """
    import torch
    import transformers as tf

    torch.manual_seed(0)
    ids = {"eos_token_id": 0, "pad_token_id": 1}
    if kind == "gpt2":
        return tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=259,
                n_layer=2,
                n_head=2,
                n_embd=32,
                n_positions=256,
                bos_token_id=0,
                eos_token_id=0,
                initializer_range=0.2,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
            )
        )
    if kind == "llama":
        return tf.LlamaForCausalLM(
            tf.LlamaConfig(
                vocab_size=259,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
                initializer_range=0.2,
                **ids,
            )
        )
    torch.manual_seed(1)
    config = tf.T5Config(
        vocab_size=259,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        initializer_factor=t5_scale,
        decoder_start_token_id=1,
        feed_forward_proj="gated-gelu" if kind == "flan-t5" else "relu",
        tie_word_embeddings=kind == "t5",
        **ids,
    )
    return tf.T5ForConditionalGeneration(config)


KINDS = ["gpt2", "llama", "t5", "flan-t5"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return a function: kind -> a Hugging Face folder with a tiny random model."""
    made = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_model(kind, t5_scale=2.0).save_pretrained(made[kind])
            tiny_tokenizer(bos=kind == "llama").save_pretrained(made[kind])
        return made[kind]

    return folder


def run(
    *command: Any, cwd: Path = ROOT, env: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess:
    """Run a script of the project as a user would, and return the finished process."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **(env or {})},
        **options,
    )


# ---- teacher, api

KEY = "sk-marked-5b1f"
ASK_FLAGS = {
    "--stage": "sample",
    "--teacher": "gpt-test",
    "--teacher_method": "zs_cot_one_step",
    "--degree": 1,
    "--temperature": 0,
    "--concurrency": 4,
}


@pytest.fixture
def server():
    """A server on loopback that misbehaves as its test wishes (tests/api_server.py)."""
    from api_server import ApiServer

    with ApiServer() as server:
        yield server


class Ask:
    """Run `--stage sample` on 20 toy questions: flags -> (exit message or None, output)."""

    def __init__(self, url: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.flags = {**ASK_FLAGS, "--base_url": url, "--saved": saved}
        self.capsys = capsys
        self.file = self.completion_file("zs_cot_one_step")
        self.journal = self.file.with_suffix(".journal.jsonl")
        self.failures = self.file.with_suffix(".failures.jsonl")

    def completion_file(self, key: str) -> Path:
        return self.flags["--saved"] / f"completion_data/B_gpt-test__C_{key}/D_toy.json"

    def __call__(self, *flags: object) -> tuple[str | None, str]:
        import finetune_cot

        command = list(flags)
        for flag, value in self.flags.items():
            if flag not in flags:
                command += [flag, value]
        message = None
        try:
            finetune_cot.main(list(map(str, command)))
        except SystemExit as e:
            message = e.code
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        assert KEY not in f"{captured}{message}"
        return message, captured.out


@pytest.fixture
def ask(server, tmp_path, capsys, monkeypatch):
    """An Ask with short waits.  In the end the key must not be in any file that was made."""
    import api
    import tasks

    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=20, train=14, test=6))
    monkeypatch.setattr(api, "BACKOFF", 0.01)
    monkeypatch.setattr(api, "LONGEST_BACKOFF", 0.03)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    yield Ask(server.url, tmp_path, capsys)
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


def read_rows(file: Path) -> list[dict]:

    import completions

    return completions.read_completions(file)[1]


def first_time(server, reply, of: int = 1, later=None) -> None:
    """Make a server give `reply` to its first requests; None stands for the usual one."""
    server.answer = lambda request: reply if len(server.log) <= of else later


def keys_asked(server) -> collections.Counter:
    """Return how often each key was asked for."""
    return collections.Counter(request.key for request in server.asked())


# ---- the command line

SMALL = "--epochs 2 --max_new_tokens 48"  # with small_toy, a run of seconds


@pytest.fixture
def small_toy(monkeypatch):
    """The toy task with 60 samples instead of 2,000."""
    import tasks

    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=60, train=42, test=18))


@pytest.fixture
def method(capsys):
    """Return a function: flags as one string -> (exit message or None, what finetune_cot printed).

    What must not be split at blanks follows the string: method("--stage train", "--out", "a b").
    """
    import shlex

    import finetune_cot

    def run_method(flags: str, *more: str) -> tuple[str | None, str]:
        capsys.readouterr()
        try:
            finetune_cot.main([*shlex.split(flags), *more])
            message = None
        except SystemExit as e:
            message = e.code
        return message, capsys.readouterr().out

    return run_method


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder with its bytes, except logs, which hold times, and locks."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "log.jsonl" and path.suffix != ".lock":
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.fixture(scope="session")
def published_data(shared, tmp_path_factory):
    """A data/ with the multiarith and coin_flip benchmarks."""
    if not (shared / "mirror").is_dir():
        pytest.skip("no mirror of the benchmarks")
    folder = tmp_path_factory.mktemp("data")
    flags = ("--mirror", shared / "mirror", "--out", folder)
    done = run("data/prepare.py", "multiarith", "coin_flip", *flags)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def published(shared, published_data, tmp_path, method):
    """Return a function: flags -> `method` curating the published completions of multiarith."""
    import shutil

    shutil.copytree(shared / "saved/completion_data", tmp_path / "completion_data")
    where = f"--saved {tmp_path} --data {published_data}"
    flags = f"{where} --task multiarith --teacher text-davinci-002 --stage curate"
    return lambda more="": method(f"{flags} {more}")


# ---- tasks

LONGEST = 2.0  # seconds of work that a case may take


def amount(short: int, long: int) -> pytest.MarkDecorator:
    """Parametrize a test with `cases`: a short form, and a long one for --slow."""
    return pytest.mark.parametrize("cases", [short, pytest.param(long, marks=pytest.mark.slow)])


def timed(function: Callable, *arguments: object) -> Any:
    """Call function within LONGEST seconds of this process alone, so other work does not count."""
    start = time.process_time()
    try:
        return function(*arguments)
    finally:
        assert time.process_time() - start < LONGEST


# ---- decoding

PROMPTS = [
    "a",
    "count to ten ###",
    "Q: What is 3 + 4?\n\nA:",
    "x" * 60,
    "How many?",
    "b c d e f g",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13",
]


def greedy_texts(model, tokenizer, family: str, max_new_tokens: int) -> list[str]:
    """The oracle: Hugging Face's generate on one prompt of PROMPTS at a time, without padding."""
    import torch

    import tasks

    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tasks.encode_prompt(tokenizer, family, prompt)])
        options = {"max_new_tokens": max_new_tokens, "do_sample": False}
        special = {"eos_token_id": 0, "pad_token_id": 1}
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options, **special)[0]
        new = output[1:]
        if family == "decoder":
            new = output[ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True))
    return texts


def tiny_bart():
    """A model whose decoder counts positions from the first column: no row may enter late."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    special = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 0, "decoder_start_token_id": 2}
    config = tf.BartConfig(
        vocab_size=259,
        init_std=0.3,
        forced_eos_token_id=None,
        **sizes,
        **layers,
        **heads,
        **special,
    )
    return tf.BartForConditionalGeneration(config).eval()


def tiny_lfm2():
    """A decoder with convolutions and attention, whose cache layers are of two kinds."""
    import torch
    import transformers as tf

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "block_auto_adjust_ff_dim": False}
    layers = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"eos_token_id": 0, "pad_token_id": 1}
    config = tf.Lfm2Config(vocab_size=259, **sizes, **layers, **heads, **special)
    return tf.Lfm2ForCausalLM(config).eval()


# ---- train_loop: data, oracle, ranks


def one_rank():
    """A plain start on the CPU: one rank."""
    import torch

    from storage import Ranks

    return Ranks(0, 1, torch.device("cpu"))


def train_config(**changes):
    """A configuration for tests: two epochs, a rate at which tiny models learn."""
    from train_loop import TrainConfig

    return TrainConfig(**{"epochs": 2, "batch_size": 8, "lr": 1e-3} | changes)


def toy_data(n=20):
    """Rows of very uneven length, where a mean of means goes wrong."""
    labels = [" " + " ".join(map(str, range(i % 7 * 3))) + f" --> {i}" for i in range(n)]
    inputs = [f"count to {i} ###" for i in range(n)]
    return {"sample_index": list(range(n)), "input": inputs, "label": labels}


def family_of(model):
    return "encoder_decoder" if model.config.is_encoder_decoder else "decoder"


def decoder_start_of(model):
    return model.config.decoder_start_token_id if model.config.is_encoder_decoder else None


def samples_for(model, tokenizer, n=20):
    from batches import tokenize

    return tokenize(tokenizer, family_of(model), toy_data(n), 512)[0]


def hugging_face_loss_and_gradients(model, samples):
    """The oracle: right-padded, -100 on prompts and padding, the model's own mean loss."""
    import torch

    def pad(rows, value):
        width = max(map(len, rows))
        return torch.tensor([row + [value] * (width - len(row)) for row in rows])

    rows = [s.prompt + s.label for s in samples]
    labels = [[-100] * len(s.prompt) + s.label for s in samples]
    if model.config.is_encoder_decoder:
        rows = [s.prompt for s in samples]
        labels = [s.label for s in samples]
    mask = pad([[1] * len(row) for row in rows], 0)
    model.zero_grad()
    loss = model(input_ids=pad(rows, 1), attention_mask=mask, labels=pad(labels, -100)).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


def step_loss_and_gradients(model, samples, context=None, **changes):
    """One step of ours whose optimizer changes nothing and keeps the gradients it is handed."""
    import contextlib

    import torch

    import train_loop

    class KeepGradients(torch.optim.SGD):
        def step(self, closure=None):
            self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]

    config = train_config(**changes)
    setup = train_loop.prepare_training(model, samples, decoder_start_of(model), config, one_rank())
    assert setup.packing == config.packing
    optimizer = KeepGradients(model.parameters(), lr=0.0)
    setup = setup._replace(state=setup.state._replace(optimizer=optimizer))
    patches = context(setup) if context else contextlib.nullcontext()
    with train_loop.training_mode(setup), patches:
        figures, _ = train_loop.optimizer_step(setup, samples, 1, 1e-3)
    names = [name for name, _ in model.named_parameters()]
    return figures["loss"], dict(zip(names, optimizer.seen, strict=True))


def assert_gradients_equal(gradients, expected, tolerance=2e-6):
    scale = max(gradient.abs().max() for gradient in expected.values())
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < tolerance * scale, name


def start_training(model, tokenizer, out, data=None, ranks=None, **changes):
    """-> the generator of epochs of a run in out."""
    import train_loop

    out.mkdir(exist_ok=True)
    return train_loop.train(
        model,
        tokenizer,
        family_of(model),
        data or toy_data(),
        out,
        train_config(**changes),
        {"test": True},
        ranks or one_rank(),
        {"lr": changes.get("lr", 1e-3)},
    )


def train_all(model, tokenizer, out, data=None, **changes):
    """Train to the end; -> the rows of log.jsonl."""
    list(start_training(model, tokenizer, out, data, **changes))
    return log_rows(out)


def log_rows(out):
    import json

    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def step_losses(out):
    return [row["loss"] for row in log_rows(out) if "loss" in row]


def timeless_rows(out):
    """What a run must log again when it is resumed: all but the header and the seconds."""
    rows = log_rows(out)[1:]
    for row in rows:
        row.pop("seconds", None)
    return rows


def torchrun(ranks, *command):
    """Start a script under torchrun; -> the process."""
    import subprocess

    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, f"--nproc_per_node={ranks}", *map(str, command)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def train_command(folder, data, out, *flags):
    """The command that fine-tunes a model folder on a fine-tuning file."""
    stage = ["finetune_cot.py", "--stage", "train", "--device", "cpu"]
    return [*stage, "--student", folder, "--finetune_data", data, "--out", out, *flags]


RANKS_SCRIPT = """
import ast, os, sys; sys.path[:0] = ["tests", "."]
from pathlib import Path
import torch
import storage
from conftest import start_training, tiny_model, tiny_tokenizer, toy_data
ranks = storage.init_ranks(torch.device("cpu"))
for name, (kind, changes) in ast.literal_eval(sys.argv[2]).items():
    stop = changes.pop("stop_after", 0)
    for part in ("first", "second") if stop else ("whole",):
        tokenizer = tiny_tokenizer(bos=kind == "llama")
        out = Path(sys.argv[1]) / name
        run = tiny_model(kind), tokenizer, out, toy_data(18), ranks
        run = start_training(*run, epochs=7, **changes)
        for epoch in run:
            if part == "first" and epoch == stop:
                break
sys.stdout.flush()
torch.distributed.barrier()
os._exit(0)  # past torch's threads: one of them may abort a process that ends
"""


def assert_ranks_equal_one_process(n_ranks, runs, folder):
    """Run each of runs, {name: (kind, changes of the configuration)}, on ranks and in one process.

    18 samples in batches of 8: the last has 2, so that of 3 ranks one has none.
    """
    from safetensors.torch import load_file

    (folder / "script.py").write_text(RANKS_SCRIPT)
    process = torchrun(n_ranks, folder / "script.py", folder, repr(runs))
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    resumed = sum("stop_after" in changes for _, changes in runs.values())
    assert output.count("batch 8 =") == len(runs) + resumed  # only one rank talks
    for name, (kind, changes) in runs.items():
        one = folder / f"{name}, one process"
        kept = {k: v for k, v in changes.items() if k == "max_grad_norm"}
        tokenizer = tiny_tokenizer(bos=kind == "llama")
        train_all(tiny_model(kind), tokenizer, one, toy_data(18), epochs=7, **kept)
        assert len(step_losses(one)) == 21
        assert step_losses(folder / name) == pytest.approx(step_losses(one), rel=1e-5)
        weights = load_file(folder / name / "model.safetensors")
        expected = load_file(one / "model.safetensors")
        assert weights.keys() == expected.keys()
        # a key's bias has no gradient but rounding
        key_biases = {f"transformer.h.{i}.attn.c_attn.bias" for i in range(2)}
        for k in weights.keys() - key_biases:
            assert (weights[k] - expected[k]).abs().max() < 1e-4, (name, k)


# ---- report


@pytest.fixture
def report_toy(monkeypatch):
    """The toy task with 23 training and 10 test questions."""
    import tasks

    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=33, train=23, test=10))


def answers_file(
    saved: Path,
    right: Callable[[int, int], bool | None],
    name: str = "D_toy__T_ft_cot__E_001",
    model: str = "m",
    many: int = 1,
    indices: Iterable[int] | None = None,
    **metadata: object,
) -> Path:
    """Write a completion file on the small toy, of a student unless metadata say otherwise.

    right(place, k): whether answer k of `many` to the question at that place of indices (default:
    the test part) is right; None: it is unreadable.
    """
    import storage
    import tasks

    samples = tasks.toy_samples(33)
    if indices is None:
        _, indices = tasks.load_split("toy")
    data = {}
    for place, i in enumerate(indices):
        rows = []
        for k in range(many):
            answer = samples[i]["answer"]
            wrong = {"yes": "no", "no": "yes"}[answer]
            texts = {True: answer, False: wrong, None: "?"}
            row = {**samples[i], "completion_index": k, "finish_reason": "stop"}
            rows.append(row | {"completion": texts[right(place, k)]})
        data[str(i)] = rows
    known = {
        "dataset_key": "toy",
        "base_model": model,
        "completion_key": "ft_cot",
        "train_key": "ft_cot",
        "epoch": 1,
        "part": "test",
        "prediction_template": "ft_cot_token",
    }
    path = saved / "completion_data" / f"B_{model}__C_ft_cot" / f"{name}.json"
    storage.write_json(path, {"metadata": known | metadata, "data": data})
    return path
