"""Shared by all tests: tiny random models, and optional published files to test against.

FINETUNE_COT_SHARED names a folder with mirror/, saved/, vectors/ and dataset_SHA256SUMS; tests that
need it are skipped without it.  Everything else is made here: no network, no GPU.
"""

import collections
import os
import signal
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
# a shell starts what it runs in the background with Ctrl-C ignored, and children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
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


def model_folder_of(kind: str, folder: Path) -> Path:
    """Save a tiny random model and its tokenizer to a folder."""
    tiny_model(kind, t5_scale=2.0).save_pretrained(folder)
    tiny_tokenizer(bos=kind == "llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Return a function: kind -> a Hugging Face folder with a tiny random model."""
    made = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = model_folder_of(kind, tmp_path_factory.mktemp(kind))
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
    "--teacher_max_new_tokens": 128,  # what the journals of earlier versions were asked with
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
        self.err = captured.err
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


@pytest.fixture
def unanswered(published, tmp_path):
    """Return `published`, of completions in which no answer can be read."""
    import json

    path = tmp_path / "completion_data/B_text-davinci-002__C_zs_cot/D_multiarith.json"
    content = json.loads(path.read_text())
    for rows in content["data"].values():
        for row in rows:
            row["completion"] = "no idea"
    path.write_text(json.dumps(content))
    return published


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


def tiny_bart(**changes):
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
        **changes,
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


# ---- families: a tiny model of each type that transformers knows

TINY_SIZES = {
    32: "hidden_size d_model n_embd dim embedding_size embed_dim",
    64: """intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size mlp_hidden_size""",
    16: "q_lora_rank kv_lora_rank linear_head_dim",
    8: """head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim mamba_d_state state_size
        ssm_state_size linear_key_head_dim linear_value_head_dim hidden_size_per_layer_input""",
    4: """num_attention_heads n_head n_heads num_heads encoder_attention_heads rotary_dim
        decoder_attention_heads num_local_experts num_experts n_routed_experts moe_num_experts
        linear_num_value_heads linear_num_heads laurel_rank""",
    2: """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers
        num_experts_per_tok num_decoder_layers num_encoder_layers num_key_value_heads num_kv_heads
        bos_token_id linear_num_key_heads""",
    256: "max_position_embeddings n_positions max_seq_len n_ctx context_length",
    259: "vocab_size vocab_size_per_layer_input",
    1: "pad_token_id",
    0: "eos_token_id num_kv_shared_layers",
}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3}
MAMBA_HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8}
FULL_HEADS = {"num_key_value_heads": 4}
TINY_EXCEPTIONS = {
    **dict.fromkeys(
        "axk2 deepseek_v2 deepseek_v3 deepseek_v32 dots3_note_text".split(), FULL_HEADS
    ),
    **dict.fromkeys("glm4_moe_lite glm_moe_dsa longcat_flash minicpm3 youtu".split(), FULL_HEADS),
    **dict.fromkeys("minimax qwen3_next qwen3_5_text qwen3_5_moe_text".split(), HYBRID),
    "axk1": {**FULL_HEADS, "n_group": 1, "topk_group": 1},
    "bailing_hybrid": {**FULL_HEADS, "layer_group_size": 2},
    "bamba": {**MAMBA_HEADS, "attn_layer_indices": [1]},
    "granitemoehybrid": {**MAMBA_HEADS, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {**MAMBA_HEADS, "mamba_d_ssm": 64, "mamba_chunk_size": 16},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"chunk_size": 16},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "kimi_linear": {**FULL_HEADS, **HYBRID, "mlp_layer_types": ["dense", "sparse"]},
    "lfm2": {**CONVOLUTION, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**CONVOLUTION, "num_dense_layers": 1},
    "lfm3": CONVOLUTION,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba2": {
        **FULL_HEADS,
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "mamba"],
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "roc_bert": {"pronunciation_vocab_size": 30, "shape_vocab_size": 30},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
}


def family_classes():
    """Return {model type: name of its class}: all decoders and encoder-decoders there are."""
    from transformers.models.auto import modeling_auto

    decoders = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    del decoders["whisper"]  # the half of an encoder-decoder that reads sound
    encoder_decoders = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    return {**decoders, **encoder_decoders}


def tiny_family(model_type: str, **changes: Any) -> Any:
    """Return a small random model of a type, or raise what its configuration or class raises."""
    import torch
    import transformers as tf

    defaults = tf.AutoConfig.for_model(model_type)
    known = {**defaults.to_dict(), **defaults.attribute_map}
    sizes = {}
    for size, names in TINY_SIZES.items():
        for name in names.split():
            if name in known and defaults.attribute_map.get(name, name) not in sizes:
                sizes[defaults.attribute_map.get(name, name)] = size
    if defaults.is_encoder_decoder:
        sizes["decoder_start_token_id"] = 2
    else:
        sizes["is_decoder"] = True  # of BERT and its like
    config = type(defaults)(**sizes | TINY_EXCEPTIONS.get(model_type, {}) | changes)
    model_class = getattr(tf, family_classes()[model_type])
    with torch.device("meta"):
        count = sum(weight.numel() for weight in model_class(config).parameters())
    if count > 4e6:
        raise ValueError(f"{count} parameters at the smallest")
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and 0 < weight.std() < 0.2:
                weight.mul_(min(10, 0.2 / weight.std()))  # at random size all texts are alike
    model.generation_config = tf.GenerationConfig(
        eos_token_id=0,
        pad_token_id=1,
        decoder_start_token_id=getattr(config, "decoder_start_token_id", None),
    )
    return model


# ---- extras for GPUs


def replay_graphs_on_the_cpu(monkeypatch, graphs):
    """Let the class extras.gpu_graphs.Graphs record operations and repeat them, as a GPU does.

    Numbers come from the same tensors, whatever Python would read by then.  As on a GPU, nothing
    that is recorded may ask the host or bring data from it.
    """
    import contextlib

    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Recording(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []
            self.is_done = True  # a GPU would not have run them yet

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = function.overloadpacket.__name__
            assert name not in {"_local_scalar_dense", "nonzero", "lift_fresh", "equal"}
            result = function(*args, **(kwargs or {}))
            self.calls.append((function, args, kwargs or {}, result))
            return result

        def replay(self):
            if self.is_done:
                self.is_done = False
                return
            with torch.no_grad():
                for function, args, kwargs, result in self.calls:
                    again = function(*args, **kwargs)
                    for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                        if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                            old.copy_(new)

    def capture(self, work):
        recording = Recording()
        with recording:
            work()
        return recording

    def start(self, device, work):
        self.device, self.work, self.graphs, self.is_used = device, work, {}, True

    monkeypatch.setattr(graphs, "__init__", start)
    monkeypatch.setattr(graphs, "on_stream", lambda self: contextlib.nullcontext())
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "copy_in", lambda self, target, source: target.copy_(source))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))


# ---- train_loop: data, oracle, ranks


def one_rank():
    """A plain start on the CPU: one rank."""
    import torch

    from distributed import Ranks

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
    from tokens import tokenize

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


def tokenized(samples):
    """A list of samples as a fine-tuning file has them."""
    import numpy as np

    from tokens import TokenizedSamples

    texts = []
    rows = []
    for sample in samples:
        rows.append([sample.sample_index, len(texts), len(texts) + 1])
        texts += [sample.prompt, sample.label]
    return TokenizedSamples.from_texts(texts, np.array(rows))


def prepare_training(model, samples, config):
    """train_loop.prepare_training of a list of samples, on one rank."""
    import train_loop

    samples = tokenized(samples)
    start_token = decoder_start_of(model)
    return train_loop.prepare_training(model, samples, start_token, config, one_rank())


def step_loss_and_gradients(model, samples, context=None, **changes):
    """One step of ours whose optimizer changes nothing and keeps the gradients it is handed."""
    import contextlib

    import torch

    import train_loop

    class KeepGradients(torch.optim.SGD):
        def step(self, closure=None):
            self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]

    config = train_config(**changes)
    setup = prepare_training(model, samples, config)
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
    import storage
    import tokens
    import train_loop
    from models import LoadedModel

    out.mkdir(exist_ok=True)
    config = train_config(**changes)
    ranks = ranks or one_rank()
    student = LoadedModel(model, tokenizer, family_of(model))
    data_file = out.with_suffix(".json")
    if ranks.is_rank0:
        storage.write_json(data_file, data or toy_data())
    samples = tokens.load_or_tokenize(student, data_file, out, config.max_length, ranks)
    return train_loop.train(
        model,
        tokenizer,
        samples,
        out,
        config,
        {"test": True},
        ranks,
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
        row.pop("peak_memory_mb", None)
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


def fork_ranks(n_ranks: int, function: Callable[[], None], folder: Path) -> str:
    """Call a function in as many ranks, and return what they print.

    They are forks of this process, which holds torch, and have the environment that torchrun makes.
    """
    import socket

    if sys.platform == "darwin":
        pytest.skip("macOS may end a fork of a process that holds torch")

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    world = {"WORLD_SIZE": n_ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    log = folder / "ranks.log"
    log.unlink(missing_ok=True)
    pids = []
    for rank in range(n_ranks):
        pids.append(os.fork())
        if pids[-1] == 0:
            be_rank(world | {"RANK": rank, "LOCAL_RANK": rank}, function, log)
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    output = log.read_text()
    assert ended == [0] * n_ranks, output
    return output


def be_rank(environment: dict[str, Any], function: Callable[[], None], log: Path) -> None:
    """Call a function in this fork of the tests, and end it."""
    import traceback

    import torch

    status = 1
    try:
        signal.alarm(240)  # of a rank that waits for one that is no more
        torch.set_num_threads(1)  # the threads of the process that was forked are not here
        os.environ |= {name: str(value) for name, value in environment.items()}
        sys.stdout = sys.stderr = open(log, "a", buffering=1)
        function()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)  # past torch's threads: one of them may abort a process that ends


def train_as_rank(runs: dict[str, tuple[str, dict]], folder: Path) -> None:
    """Train each of runs, or `parts` of it; by default the whole, with stop_after both parts."""
    import torch

    import distributed

    ranks = distributed.init_ranks(torch.device("cpu"))
    for name, (kind, changes) in runs.items():
        settings = dict(changes)
        stop = settings.pop("stop_after", 0)
        parts = ("first", "second") if stop else ("whole",)
        for part in settings.pop("parts", parts):
            model = tiny_model(kind), tiny_tokenizer(bos=kind == "llama")
            run = start_training(*model, folder / name, toy_data(18), ranks, epochs=7, **settings)
            for epoch in run:
                if part == "first" and epoch == stop:
                    break
    distributed.wait_for_all(ranks)


def assert_ranks_equal_one_process(n_ranks, runs, folder):
    """Run each of runs, {name: (kind, changes of the configuration)}, on ranks and in one process.

    18 samples in batches of 8: the last has 2, so that of 3 ranks one has none.
    """
    output = train_on_ranks(n_ranks, runs, folder)
    resumed = sum("stop_after" in changes for _, changes in runs.values())
    assert output.count("batch 8 =") == len(runs) + resumed  # only one rank talks
    assert_equal_one_process(runs, folder)


def train_on_ranks(n_ranks, runs, folder):
    """-> what they print."""
    return fork_ranks(n_ranks, lambda: train_as_rank(runs, folder), folder)


def assert_equal_one_process(runs, folder):
    """Compare what ranks left in the folder with one process."""
    from safetensors.torch import load_file

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
    name: str | None = None,
    model: str = "m",
    many: int = 1,
    indices: Iterable[int] | None = None,
    **metadata: object,
) -> Path:
    """Write a completion file on the small toy, of a student unless metadata say otherwise.

    name: by default that of the student's epoch, D_toy__T_ft_cot__E_001 and the like.
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
    known |= metadata
    if name is None:
        name = f"D_toy__T_{known['train_key']}__E_{known['epoch']:03d}"
    path = saved / "completion_data" / f"B_{model}__C_ft_cot" / f"{name}.json"
    storage.write_json(path, {"metadata": known, "data": data})
    return path


def first_right(limit: int) -> Callable[[int, int], bool]:
    """Return `right` for answers_file: the first so many questions are answered rightly."""
    return lambda place, k: place < limit


@pytest.fixture
def three_answers(report_toy, tmp_path):
    """Three answers to ten questions: 0-4 all right; 5-7 two right; 8 one right, two unreadable;
    9 one right, two wrong."""
    right = [[True] * 3] * 5 + [[True, True, False]] * 3
    right += [[True, None, None], [True, False, False]]
    name = "D_toy__T_ft_cot__E_001__K_03_t70"
    return answers_file(tmp_path, lambda place, k: right[place][k], name, many=3)


# ---- page, figure


@pytest.fixture(scope="session")
def trained_toy(tmp_path_factory):
    """The folder of a run of both methods on small_toy, for one epoch; no test writes there."""
    import finetune_cot
    import tasks

    folder = tmp_path_factory.mktemp("trained")
    toy = tasks.TASKS["toy"]._replace(n=60, train=42, test=18)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tasks.TASKS, "toy", toy)
        finetune_cot.main(["--saved", str(folder), "--epochs", "1"])
    return folder
