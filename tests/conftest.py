"""Shared by all tests: tiny random models, and the optional folder of published files to test against.

FINETUNE_COT_SHARED names a folder with mirror/, saved/, vectors/ and dataset_SHA256SUMS; tests that need it are skipped
without it.  Everything else is made here: no network, no GPU."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # two ranks of a test would want two GPUs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = (
    "1"  # models this small are slower with more, and a process that has used more cannot be forked
)


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


def tiny_tokenizer(bos=False):
    """Bytes as tokens, so that any text can be encoded and decoded; eos 0, pad 1, and perhaps a bos that is put first."""
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


def tiny_model(kind, dropout=0.0):
    """A random model of a family, small enough for a test: gpt2, llama, t5 (tied head) or flan-t5 (gated, untied head)."""
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
    config = tf.T5Config(
        vocab_size=259,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=dropout,
        decoder_start_token_id=1,
        feed_forward_proj="gated-gelu" if kind == "flan-t5" else "relu",
        tie_word_embeddings=kind == "t5",
        **ids,
    )
    return tf.T5ForConditionalGeneration(config)


KINDS = ["gpt2", "llama", "t5", "flan-t5"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """-> function: kind -> a Hugging Face folder with a tiny random model and its tokenizer."""
    made = {}

    def folder(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_model(kind).save_pretrained(made[kind])
            tiny_tokenizer(bos=kind == "llama").save_pretrained(made[kind])
        return made[kind]

    return folder


def run(*command, cwd=ROOT, env=None, **options):
    """Run a script of the project as a user would; -> the finished process, output as text."""
    import subprocess

    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, **(env or {})},
        **options,
    )


# ---------------------------------------------------------------- a teacher behind an API

KEY = "sk-marked-5b1f"


@pytest.fixture
def server():
    from api_server import ApiServer

    with ApiServer() as server:
        yield server


@pytest.fixture
def ask(server, tmp_path, capsys, monkeypatch):
    """-> function: flags -> (exit message or None, what was printed), of `--stage sample` on 20 toy questions, with short waits."""
    import finetune_cot
    import tasks
    import teacher as api

    monkeypatch.setitem(tasks.TASKS, "toy", tasks.TASKS["toy"]._replace(n=20, train=14, test=6))
    monkeypatch.setattr(api, "BACKOFF", 0.01)
    monkeypatch.setattr(api, "LONGEST_BACKOFF", 0.03)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def ask(*flags):
        usual = {
            "--stage": "sample",
            "--teacher": "gpt-test",
            "--teacher_method": "zs_cot_one_step",
            "--degree": 1,
            "--temperature": 0,
            "--base_url": server.url,
            "--saved": tmp_path,
            "--concurrency": 4,
        }
        flags = [
            *(x for flag, value in usual.items() if flag not in flags for x in (flag, value)),
            *flags,
        ]
        try:
            finetune_cot.main([*map(str, flags)])
            message = None
        except SystemExit as e:
            message = e.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        assert KEY not in f"{captured}{message}"
        ask.err = captured.err
        return message, captured.out

    ask.file = tmp_path / "completion_data/B_gpt-test__C_zs_cot_one_step/D_toy.json"
    ask.journal = ask.file.with_suffix(".journal.jsonl")
    ask.failures = ask.file.with_suffix(".failures.jsonl")
    yield ask
    for path in tmp_path.rglob("*"):  # the key is in no file that any of these tests made
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
