"""The step without host work, on the CPU.   python -m pytest tests/extras/test_gpu_step.py"""

import collections

import pytest
import torch
from conftest import (
    log_rows,
    prepare_training,
    replay_graphs_on_the_cpu,
    samples_for,
    start_training,
    tiny_model,
    tiny_tokenizer,
    train_all,
    train_config,
)
from torch.utils._python_dispatch import TorchDispatchMode

import train_loop
from extras import gpu_graphs, gpu_step
from storage import UserError

KINDS = ["gpt2", "llama", "t5"]


@pytest.fixture
def gpu_paths(monkeypatch):
    """Take the paths of a GPU on the CPU."""
    monkeypatch.setattr(train_loop, "has_gpu", lambda setup: True)


def prepared(kind, dropout=0.0, **changes):
    """-> a setup with 20 samples of uneven length."""
    model = tiny_model(kind, dropout=dropout)
    samples = samples_for(model, tiny_tokenizer(bos=kind == "llama"))
    return prepare_training(model, samples, train_config(**{"cuda_graphs": True, **changes}))


def batch_of(setup, step):
    """-> 8 samples, others each step."""
    return [setup.samples[(3 * step + i) % len(setup.samples)] for i in range(8)]


RUNS = [(kind, 30, {}) for kind in KINDS]
RUNS += [("gpt2", 6, {"max_grad_norm": 0.5}), ("t5", 6, {"micro_batch_size": 3})]


@pytest.mark.parametrize("kind, steps, changes", RUNS, ids=str)
def test_static_step_equals_the_plain_step(kind, steps, changes, monkeypatch):
    """A warm-up and more give the same losses, norms and weights."""
    plain = prepared(kind, plain=True, warmup=3, **changes)
    expected = []
    with train_loop.training_mode(plain):
        for step in range(1, steps + 1):
            lr = train_loop.learning_rate(step, steps, plain.config)
            figures, _ = train_loop.optimizer_step(plain, batch_of(plain, step), step, lr)
            expected.append(figures)
    monkeypatch.setattr(train_loop, "has_gpu", lambda setup: True)
    setup = prepared(kind, warmup=3, **changes)
    assert not setup.config.plain
    static_step = train_loop.open_static_step(setup)
    rows = []
    with train_loop.training_mode(setup):
        for step in range(1, steps + 1):
            lr = train_loop.learning_rate(step, steps, setup.config)
            rows += static_step(batch_of(setup, step), step, lr, step % 7 == 0 or step == steps)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert static_step.is_whole == ("micro_batch_size" not in changes)
    for name in ("loss", "grad_norm"):
        values = [row[name] for row in rows]
        assert values == pytest.approx([row[name] for row in expected], rel=1e-6)
    assert all(row["size"] > row["tokens"] for row in rows)
    ours = weights_of(setup)
    theirs = weights_of(plain)
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def weights_of(setup):
    """-> all weights, without GPT-2's biases of keys: no logit, and no gradient, depends on them.

    AdamW makes steps of the rounding that they get for a gradient.
    """
    weights = []
    for name, weight in setup.state.model.named_parameters():
        flat = weight.detach().flatten()
        if name.endswith("c_attn.bias"):
            flat = flat.unflatten(0, (3, -1))[[0, 2]].flatten()
        weights.append(flat)
    return torch.cat(weights)


REPLAYED = [("gpt2", {}), ("t5", {}), ("gpt2", {"micro_batch_size": 3, "max_grad_norm": 0.5})]


@pytest.mark.parametrize("kind, changes", REPLAYED, ids=str)
def test_static_step_replayed_equals_itself(kind, changes, monkeypatch, gpu_paths):
    """What a graph repeats reads all that differs from step to step, dropout's seed included."""
    runs = []
    for is_replayed in (False, True):
        if is_replayed:
            replay_graphs_on_the_cpu(monkeypatch, gpu_graphs.Graphs)
        setup = prepared(kind, dropout=0.2, **changes)
        static_step = train_loop.open_static_step(setup)
        rows = []
        with train_loop.training_mode(setup):
            for step in range(1, 9):
                rows += static_step(batch_of(setup, step), step, 1e-3 / step, step % 3 == 2)
        runs.append([(row["loss"], row["grad_norm"]) for row in rows])
        runs.append([p.detach().clone() for p in setup.state.model.parameters()])
    graphs = static_step.graphs.graphs.values()
    assert sum(graph is not None for graph in graphs) >= 1
    assert runs[2] == runs[0]
    assert all(map(torch.equal, runs[3], runs[1]))


@pytest.mark.parametrize("kind", KINDS)
def test_static_step_in_bf16_is_near_the_plain_step(kind, gpu_paths):
    setup = prepared(kind, precision="bf16")
    batch = batch_of(setup, 1)
    static_step = train_loop.open_static_step(setup)
    plain = prepared(kind, precision="bf16", plain=True)
    with train_loop.training_mode(plain):
        expected, _ = train_loop.optimizer_step(plain, batch, 1, 1e-3)
    with train_loop.training_mode(setup):
        (figures,) = static_step(batch, 1, 1e-3, True)
    assert figures["loss"] == pytest.approx(expected["loss"], rel=2**-7)
    assert figures["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2**-4)


OTHERS = [
    {"precision": "fp16"},
    {"packing": False},
    {"gradient_checkpointing": True},
    {"plain": True},
]


@pytest.mark.parametrize("changes", OTHERS, ids=str)
def test_open_static_step_leaves_other_runs_their_own(changes, gpu_paths):
    assert train_loop.open_static_step(prepared("gpt2", **changes)) is None


def test_open_static_step_is_closed_on_a_cpu():
    assert train_loop.open_static_step(prepared("gpt2")) is None


# ---------------- Runs


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_train_resumes_to_the_bit(kind, tmp_path, gpu_paths):
    """With dropout, and from a checkpoint within an epoch."""
    changes = {
        "checkpoint_steps": 2,
        "checkpoint_every": 0,
        "warmup": 5,
        "keep": 9,
        "cuda_graphs": True,
    }
    model = tiny_model(kind, dropout=0.2)
    rows = train_all(model, tiny_tokenizer(), tmp_path / "whole", epochs=3, **changes)
    run = start_training(
        tiny_model(kind, dropout=0.2), tiny_tokenizer(), tmp_path / "broken", epochs=3, **changes
    )
    assert next(run) == 1
    run.close()
    assert [path.name for path in tmp_path.glob("broken/*.pt")] == ["checkpoint_00000002.pt"]
    resumed = tiny_model(kind, dropout=0.2)
    again = train_all(resumed, tiny_tokenizer(), tmp_path / "broken", epochs=3, **changes)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert [row["loss"] for row in again if "loss" in row] == losses
    assert len(set(losses)) == 9
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))


def test_train_goes_on_from_a_checkpoint_of_the_other_step(tmp_path, monkeypatch):
    """The plain step's checkpoints are read by the static step, and the other way round."""
    expected = train_all(tiny_model("gpt2"), tiny_tokenizer(), tmp_path / "plain", epochs=4)
    for epoch in range(4):
        monkeypatch.setattr(train_loop, "has_gpu", lambda setup, on=epoch % 2: bool(on))
        student = tiny_model("gpt2"), tiny_tokenizer()
        run = start_training(*student, tmp_path / "mixed", epochs=4, cuda_graphs=True)
        if epoch:
            next(run)  # what the checkpoint ends
        next(run)
        run.close()
    losses = [row["loss"] for row in log_rows(tmp_path / "mixed") if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in expected if "loss" in row], rel=1e-5)


def test_train_tells_figures_of_every_step(tmp_path, capsys, gpu_paths):
    """At log intervals and at the end of an epoch, in the order of the steps."""
    model = tiny_model("gpt2")
    rows = train_all(model, tiny_tokenizer(), tmp_path, epochs=2, log_every=2, cuda_graphs=True)
    assert [row["step"] for row in rows[1:]] == [1, 2, 3, 3, 4, 5, 6, 6]
    assert [row["epoch"] for row in rows[1:]] == [1] * 4 + [2] * 4
    assert capsys.readouterr().out.count("  loss ") == 5  # steps 2, 4, 6 and two epochs


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_static_step_leaves_weights_where_something_is_not_finite(what, gpu_paths):
    """And says so when it is asked, after the figures of the steps before."""
    setup = prepared("gpt2")
    model, optimizer, _ = setup.state
    static_step = train_loop.open_static_step(setup)
    weight = model.transformer.ln_f.weight
    with train_loop.training_mode(setup):
        assert list(static_step(batch_of(setup, 1), 1, 1e-3, False)) == []
        if what == "loss":
            hook = model.transformer.ln_f.register_forward_hook(lambda *args: args[2] * torch.nan)
        else:
            hook = weight.register_hook(lambda gradient: gradient * torch.inf)
        before = [p.clone() for p in model.parameters()]
        moments = [v.clone() for state in optimizer.state.values() for v in state.values()]
        bad = batch_of(setup, 2)
        figures = static_step(bad, 2, 1e-3, True)
        hook.remove()
    assert next(figures)["step"] == 1
    indices = ", ".join(str(sample.sample_index) for sample in bad)
    with pytest.raises(UserError) as error:
        next(figures)
    assert f"the {what} is " in str(error.value)
    assert f"at step 2 (sample_index {indices}): lower --lr" in str(error.value)
    assert all(map(torch.equal, before, model.parameters()))
    after = [v for state in optimizer.state.values() for v in state.values()]
    assert all(map(torch.equal, moments, after))


def test_train_stops_at_a_loss_that_is_not_finite(tmp_path, gpu_paths):
    model = tiny_model("gpt2")
    torch.nn.init.constant_(model.transformer.ln_f.weight, float("nan"))
    with pytest.raises(UserError, match=r"the loss is nan at step 1 \(sample_index .*--lr"):
        train_all(model, tiny_tokenizer(), tmp_path)


# ---------------- What moves between host and device


class TransferCounter(TorchDispatchMode):
    """Counts operations that would move data between host and GPU, or make the host wait.

    On a CPU a copy counts where it reads what the host made, a cast where it names a device.
    """

    WAITING = {"_local_scalar_dense", "nonzero", "lift_fresh", "equal", "is_nonzero"}

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()
        self.host = set()  # where host tensors lie

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        result = function(*args, **(kwargs or {}))
        if name in self.WAITING:
            self.counts[name] += 1
        elif name == "_to_copy" and (kwargs or {}).get("device") is not None:
            self.counts[name] += 1
        elif name == "copy_" and args[1].data_ptr() in self.host:
            self.counts["copy of host data"] += 1
        return result


@pytest.mark.parametrize("kind", KINDS)
def test_static_step_moves_data_once(kind, monkeypatch, gpu_paths):
    """One copy in; nothing comes out, and nothing waits, until the figures are asked for."""
    setup = prepared(kind)
    static_step = train_loop.open_static_step(setup)
    counter = TransferCounter()
    sources = []

    def on_the_host(function):
        def call(*arguments):
            with torch.utils._python_dispatch._disable_current_modes():
                result = function(*arguments)
            return result

        return call

    def join(arrays, function=gpu_step.join):
        shape, source = function(arrays)
        sources.append(source)
        counter.host = {source.data_ptr()}
        return shape, source

    monkeypatch.setattr(gpu_step, "static_arrays", on_the_host(gpu_step.static_arrays))
    monkeypatch.setattr(gpu_step, "join", on_the_host(join))
    with train_loop.training_mode(setup):
        list(static_step(batch_of(setup, 1), 1, 1e-3, True))  # AdamW makes its state
        for step in (2, 3, 4):
            batch = batch_of(setup, step)
            with counter:
                static_step(batch, step, 1e-3, False)
    assert counter.counts == {"copy of host data": 3}
    with train_loop.training_mode(setup), counter:
        train_loop.optimizer_step(setup, batch, 5, 1e-3)
    assert counter.counts.total() > 8  # the plain step does
