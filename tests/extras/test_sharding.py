"""--shard against one process.   python -m pytest tests/extras/test_sharding.py"""

import pytest
from conftest import (
    assert_equal_one_process,
    assert_ranks_equal_one_process,
    tiny_model,
    tiny_tokenizer,
    train_all,
    train_on_ranks,
)

from storage import UserError

RUNS = {
    "fsdp llama": ("llama", {"shard": "gpu"}),
    "fsdp t5": ("t5", {"shard": "gpu", "micro_batch_size": 2}),
    "fsdp offloaded, resumed": ("gpt2", {"shard": "cpu", "max_grad_norm": 0.5, "stop_after": 2}),
}


def test_shard_equals_one_process(tmp_path):
    """Two ranks with split weights give the losses and weights of one process."""
    assert_ranks_equal_one_process(2, {"fsdp llama": RUNS["fsdp llama"]}, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_shard_on_any_number_of_ranks_equals_one_process(n_ranks, tmp_path):
    assert_ranks_equal_one_process(n_ranks, RUNS, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("before, after", [(2, 3), (3, 2)])
def test_shard_resumes_on_another_number_of_ranks(before, after, tmp_path):
    """A checkpoint is whole: it knows nothing of the ranks that wrote it."""
    changes = {"shard": "gpu", "stop_after": 2}
    for n_ranks, part in ((before, "first"), (after, "second")):
        train_on_ranks(n_ranks, {"run": ("llama", changes | {"parts": [part]})}, tmp_path)
    assert_equal_one_process({"run": ("llama", changes)}, tmp_path)


def test_shard_refuses_a_start_without_ranks(tmp_path):
    with pytest.raises(UserError, match="--shard splits the student over ranks: .* torchrun"):
        train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path, shard="gpu")
