"""The whole method from the command line, at toy size.

    python -m pytest tests/test_finetune_cot.py [--slow]

--slow adds the default run at its real size, whose table the README shows.
"""

import contextlib
import io
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SMALL, contents, run, tiny_model

import checkpoints
import completions
import decoding
import finetune_cot
import storage
import tasks
import train_loop

# ---- the default run

TABLE_ROW = re.compile(
    r"""^(ft|ft_cot)\ \(.*?\)      # ft_cot (rationales)
    \s+([\d.]+)%                   # accuracy
    \s+\[[\d.]+,\ [\d.]+\]         # its interval
    \s+(\d+/\d+)                   # right of all
    \s+\d+$                        # without an answer
    """,
    re.MULTILINE | re.VERBOSE,
)
FILES = (
    "completion_data/B_toy_teacher__C_zs_cot_t70/D_toy.json",
    "finetune_data/P_decoder/F_ft_toy.json",
    "finetune_data/P_decoder/F_zs_cot_t70_toy_2aug.json",
    "models/B_toy_student/D_toy__T_ft/model.safetensors",
    "models/B_toy_student/D_toy__T_ft_cot_2aug/model.safetensors",
    "models/B_toy_student/D_toy__T_ft_cot_2aug/log.jsonl",
    "completion_data/B_toy_student__C_ft/D_toy__T_ft__E_002.json",
    "completion_data/B_toy_student__C_ft_cot/D_toy__T_ft_cot_2aug__E_002.json",
)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of both methods on small_toy: (its folder, what it printed); no test writes there."""
    folder = tmp_path_factory.mktemp("whole")
    toy = tasks.TASKS["toy"]._replace(n=60, train=42, test=18)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setitem(tasks.TASKS, "toy", toy)
        finetune_cot.main(["--saved", str(folder), *SMALL.split()])
    return folder, out.getvalue()


def test_main_reports_both_methods(whole_run):
    """A run without flags goes through all stages and reports both methods."""
    folder, out = whole_run
    assert [row[0] for row in TABLE_ROW.findall(out)] == ["ft", "ft_cot"]
    assert all(row[2].endswith("/18") for row in TABLE_ROW.findall(out))
    assert "completion of" in out
    assert f"Everything is under {folder}/" in out
    kept, total = re.search(r"the (\d+) of (\d+) rationales", out).groups()
    assert total == "84"
    assert 50 < int(kept) < 84


STAGES = [  # one plain sentence each, in this order
    "1/4 sample: the teacher toy explains its answers, 60 questions x 2 rationales",
    "2/4 curate: taking the 42 training questions with their answers alone",
    "2/4 curate: keeping the",
    "3/4 train (ft): fine-tuning the student toy",
    "4/4 evaluate (ft): the student answers 18 questions",
    "3/4 train (ft_cot): fine-tuning the student toy",
    "4/4 evaluate (ft_cot): the student answers 18 questions",
]


def test_main_says_what_each_stage_does(small_toy, tmp_path, method, monkeypatch):
    """The first minute: a sentence a stage, the teacher's accuracy, the time left, no long line."""
    monkeypatch.chdir(tmp_path)
    _, out = method("--saved saved")
    lines = out.splitlines()
    said = [line for line in lines if re.match(r"\d/4 ", line)]
    assert len(said) == len(STAGES)
    assert all(map(str.startswith, said, STAGES))
    assert re.search(r"whose answer is right \(the teacher's own accuracy: \d\d\.\d%\)$", out, re.M)
    figures = r"step \d+  loss [\d.]+  [\d,]+ tokens/s  .* s"
    epoch = rf"^    epoch 1 of 2  {figures}, about \d+ s of training left in all$"
    assert len(re.findall(epoch, out, re.M)) == 2
    assert max(map(len, lines)) <= 120


def test_main_counts_the_time_of_the_students_to_come(small_toy, tmp_path, method, monkeypatch):
    """The time left is that of the whole command: with ft, also of ft_cot."""
    steps = []
    describe_steps = checkpoints.describe_steps

    def spy(rows: list, epochs: int, total: int, seconds: float) -> str:
        """Remember the steps of the whole command."""
        steps.append(total)
        return describe_steps(rows, epochs, total, seconds)

    monkeypatch.setattr(train_loop, "describe_steps", spy)
    _, out = method(f"--saved {tmp_path} --max_new_tokens 4")
    kept = int(re.search(r"the (\d+) of 84 rationales", out)[1])
    ft = 2 * 6  # two epochs of 42 samples in batches of 8
    ft_cot = 2 * math.ceil(kept / 8)
    assert steps == [ft + ft_cot, ft + ft_cot, ft_cot, ft_cot]


def test_main_writes_every_stage(whole_run):
    """Each stage writes the file or folder that saved/README.md names."""
    missing = [name for name in FILES if not (whole_run[0] / name).is_file()]
    assert missing == []


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--plain"]], ids=["fast", "plain"])
def test_main_default_table(tmp_path, flags):
    """The toy's table: a student of answers alone guesses, one of rationales reasons."""
    done = run("finetune_cot.py", "--saved", tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    accuracy = {row[0]: float(row[1]) for row in TABLE_ROW.findall(done.stdout)}
    assert accuracy["ft"] <= 60
    assert accuracy["ft_cot"] >= 95


def test_main_second_run_skips_every_stage(small_toy, whole_run, method):
    """A second run finds every file made with the same settings, and changes none."""
    folder, _ = whole_run
    before = contents(folder)
    message, out = method(f"--saved {folder} {SMALL}")
    assert message is None
    assert contents(folder) == before
    skipped = out.count("made with the same settings: skipped")
    assert skipped == 7  # sample, and twice curate, train and evaluate
    assert "ft_cot (rationales)" in out


def test_main_stages_one_by_one(small_toy, whole_run, tmp_path, method):
    """Four runs of one stage each write, elsewhere, the bytes of one run of all stages."""
    for stage in ("sample", "curate", "train", "evaluate"):
        message, _ = method(f"--saved {tmp_path} {SMALL} --stage {stage}")
        assert message is None
    found = contents(tmp_path)
    assert len(found) > 8
    assert found == contents(whole_run[0])


def test_main_plain_writes_every_stage(small_toy, tmp_path, method):
    """Without the fast paths of extras a run writes and reports the same things."""
    message, out = method(f"--saved {tmp_path} {SMALL} --plain")
    assert message is None
    assert [row[0] for row in TABLE_ROW.findall(out)] == ["ft", "ft_cot"]
    assert [name for name in FILES if not (tmp_path / name).is_file()] == []


def test_evaluate_plain_writes_same_bytes(small_toy, whole_run, tmp_path, method):
    """Plain and fast decoding of one student give the same completions."""
    shutil.copytree(whole_run[0], tmp_path, dirs_exist_ok=True)
    path = tmp_path / FILES[-1]
    fast = path.read_bytes()
    path.unlink()
    flags = f"--saved {tmp_path} {SMALL} --method ft_cot"
    message, _ = method(f"{flags} --stage evaluate --plain")
    assert message is None
    assert path.read_bytes() == fast


# ---- changed settings

CHANGES = [
    ("--teacher_max_new_tokens 64", "sample", "max_new_tokens 128 -> 64"),
    ("--lr 0.01", "train", "lr 0.004 -> 0.01"),
    ("--max_new_tokens 40", "evaluate", "max_new_tokens 48 -> 40"),
]
SLOW_CHANGES = [
    ("--seed 1", "train", "seed 0 -> 1"),
    ("--rules flexible", "curate", "rules paper -> flexible"),
    ("--epochs 1", "train", "epochs 2 -> 1"),
]
ALL_CHANGES = CHANGES + [pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_CHANGES]


@pytest.mark.parametrize("change, stage, said", ALL_CHANGES)
def test_main_changed_flag_runs_stage_again(small_toy, tmp_path, method, change, stage, said):
    """A changed flag makes the first stage that depends on it run again, and is named."""
    flags = f"--saved {tmp_path} {SMALL} --method ft_cot --train_key k"
    method(flags)
    message, out = method(f"{flags} {change}")
    assert message is None
    assert re.search(rf"^{stage}: settings changed \(.*{re.escape(said)}", out, re.M), out


def test_sample_changed_questions_are_asked_again(small_toy, tmp_path, method, monkeypatch):
    """Completions of other questions under the same name are not taken for these."""
    method(f"--saved {tmp_path} --stage sample")
    monkeypatch.setattr(tasks, "NAMES", tasks.NAMES[::-1])
    _, out = method(f"--saved {tmp_path} --stage sample")
    assert "settings changed (samples" in out


def test_sample_other_settings_keep_the_old_file(small_toy, tmp_path, method):
    """Completions made with other settings are moved to a backup, not overwritten."""
    for limit in (128, 64):
        method(f"--saved {tmp_path} --stage sample --teacher_max_new_tokens {limit}")
    path = tmp_path / FILES[0]
    old = completions.read_completions(path.with_name("D_toy.json.old1"))[0]["settings"]
    assert old["max_new_tokens"] == 128
    assert completions.read_completions(path)[0]["settings"]["max_new_tokens"] == 64


def test_train_keeps_the_old_student(small_toy, tmp_path, method):
    """A student that is trained again leaves the old one in a folder beside it."""
    flags = f"--saved {tmp_path} --method ft"
    method(f"{flags} --stage curate")
    method(f"{flags} --stage train --epochs 1")
    student = tmp_path / "models/B_toy_student/D_toy__T_ft"
    old = (student / "model.safetensors").read_bytes()
    _, out = method(f"{flags} --stage train --epochs 2")
    assert f"is kept as {student}.old1" in out
    assert (student.with_name("D_toy__T_ft.old1") / "model.safetensors").read_bytes() == old
    assert (student / "model.safetensors").read_bytes() != old


def test_train_keeps_completions_of_the_old_student(small_toy, tmp_path, method):
    """Completions of a student that was trained again are moved to a backup."""
    for epochs in (3, 1):
        method(f"--saved {tmp_path} --method ft --max_new_tokens 4 --epochs {epochs}")
    names = os.listdir(tmp_path / "completion_data/B_toy_student__C_ft")
    assert sorted(names) == ["D_toy__T_ft__E_001.json", "D_toy__T_ft__E_003.json.old1"]


def test_train_refuses_a_file_of_other_settings(small_toy, tmp_path, method):
    """Training alone refuses a fine-tuning file that was curated with other settings."""
    flags = f"--saved {tmp_path} --method ft_cot"
    for stage in ("sample", "curate"):
        method(f"{flags} --stage {stage}")
    message, out = method(f"{flags} --stage train --label_style natural")
    assert "was made with other settings: make it with --stage curate" in message
    assert "template ft_cot_token -> ft_cot_natural" in out


# ---- teachers and students of one's own


def test_sample_local_teacher(small_toy, tmp_path, method, model_folder):
    """A Hugging Face folder can be the teacher."""
    teacher = f"--teacher hf:{model_folder('gpt2')} --teacher_max_new_tokens 4"
    message, _ = method(f"--saved {tmp_path} --stage sample {teacher}")
    assert message is None
    [file] = (tmp_path / "completion_data").glob("B_*/D_toy.json")
    metadata, rows = completions.read_completions(file)
    assert len(rows) == 120
    assert metadata["settings"]["temperature"] == 0.7


def test_evaluate_prompting_methods(small_toy, tmp_path, method):
    """zs and zs_cot prompt the student that no one trained, zs_cot in two steps."""
    message, out = method(f"--saved {tmp_path} --method zs zs_cot --max_new_tokens 100")
    assert message is None
    assert len(re.findall(r"^zs(?:_cot)? +[\d.]+%", out, re.M)) == 2
    path = tmp_path / "completion_data/B_toy_student__C_zs_cot/D_toy__S_default.json"
    row = completions.read_completions(path)[1][0]
    assert row["prompt"].endswith("Therefore, the answer is")
    assert row["reasoning_prompt"].endswith("step by step.")


def test_train_drops_samples_that_are_too_long(tmp_path, method, model_folder):
    """Samples over --max_length are dropped, counted and named."""
    data = {"sample_index": [4, 7], "input": ["a", "b" * 99], "label": ["c", "d"]}
    storage.write_json(tmp_path / "data.json", data)
    flags = f"--student {model_folder('gpt2')} --out {tmp_path}/o --epochs 1 --max_length 50"
    message, out = method(f"--stage train --finetune_data {tmp_path}/data.json {flags}")
    assert message is None
    dropped = "dropped 1 of 2 samples that are longer than 50 tokens (or than the model)"
    assert f"{dropped}: sample_index 7" in out


# ---- what is said, or refused, before anything is computed


@pytest.mark.parametrize("share, n", [(0.1, 4), (0.95, 8)])
def test_main_refuses_an_empty_part(small_toy, tmp_path, method, share, n):
    """A validation share of no question, or of all, is refused before the teacher is asked."""
    flags = f"--validation {share} --split few_shot_{n} --eval_every 1 --keep_best"
    message, _ = method(f"--saved {tmp_path} {flags}")
    assert f"--validation {share} is a share of the training samples, " in message
    assert "both parts need some" in message
    assert contents(tmp_path) == {}


def test_main_names_a_template_that_is_not_there(small_toy, tmp_path, method, monkeypatch):
    """With a label style that ft has no template of, the run says which one it takes."""
    template = {"decoder": ("{q}\nLet us see.", " {r}\nSo: {a}")}
    monkeypatch.setitem(tasks.TEMPLATES, "ft_cot_steps", template)
    monkeypatch.setitem(tasks.ANSWER_PREFIXES, "ft_cot_steps", "So:")
    monkeypatch.setattr(tasks, "LABEL_STYLES", [*tasks.LABEL_STYLES, "steps"])
    flags = f"--saved {tmp_path} --label_style steps"
    for stage in ("sample", "curate"):
        _, out = method(f"{flags} --stage {stage}")
    said = "there is no template ft_steps, so ft is trained and asked with ft_token"
    assert out.count(said) == 1
    assert "ft_cot is trained and asked with" not in out


# ---- evaluation while training


def test_train_evaluates_every_epoch(small_toy, tmp_path, method):
    """--eval_every 1 writes a completion file an epoch."""
    method(f"--saved {tmp_path} {SMALL} --method ft --eval_every 1")
    names = os.listdir(tmp_path / "completion_data/B_toy_student__C_ft")
    assert sorted(names) == ["D_toy__T_ft__E_001.json", "D_toy__T_ft__E_002.json"]


def scripted_generate(right: dict[str, list[int]], validation: set[int]) -> Callable:
    """Return evaluate.generate with answers by plan: in call i, right[part][i] of a part are right.

    The evaluation after epoch i + 1 is call i.
    """
    samples = {sample["question"]: sample for sample in tasks.toy_samples(60)}
    calls = []

    def generate(model, tokenizer, family: str, prompts: list[str], *more, **options) -> list:
        asked = {"test": 0, "validation": 0}
        completions = []
        for prompt in prompts:
            sample = samples[prompt.removesuffix(" ###")]
            answer = sample["answer"]
            part = "test"
            if sample["sample_index"] in validation:
                part = "validation"
            if asked[part] >= right[part][len(calls)]:
                answer = {"yes": "no", "no": "yes"}[answer]
            asked[part] += 1
            _, label = tasks.format_sample("ft_token", family, sample["question"], "", answer)
            completions.append([{"completion": label, "finish_reason": "stop"}])
        calls.append(1)
        return completions

    return generate


BEST = {  # --validation: (right answers of each part after each epoch, best.json)
    "0": ({"test": [5, 9, 9, 7]}, {"epoch": 2, "part": "test", "accuracy": 50.0, "n": 18}),
    "0.5": (
        {"test": [1, 2, 3, 18], "validation": [5, 7, 7, 6]},
        {"epoch": 2, "part": "validation", "accuracy": 33.33, "n": 21},
    ),
}


@pytest.mark.parametrize("share", BEST)
def test_train_keeps_the_best_epoch(small_toy, tmp_path, method, monkeypatch, share):
    """--keep_best keeps the first of the best epochs, by the validation share if there is one."""
    right, note = BEST[share]
    train, _ = tasks.default_split("toy")
    _, validation = tasks.split_off_validation(train, float(share), 0)
    flags = f"--method ft --validation {share} --max_new_tokens 4"
    method(f"--saved {tmp_path}/two {flags} --epochs 2")
    monkeypatch.setattr(decoding, "generate", scripted_generate(right, set(validation)))
    message, _ = method(f"--saved {tmp_path}/four {flags} --epochs 4 --eval_every 1 --keep_best")
    assert message is None
    [best] = (tmp_path / "four/models/B_toy_student").glob("D_toy__*/best*")
    assert best.name == "best_epoch_002"
    assert storage.read_json(best / "best.json") == note
    student = f"models/B_toy_student/{best.parent.name}/model.safetensors"
    weights = (best / "model.safetensors").read_bytes()
    assert weights == (tmp_path / "two" / student).read_bytes()
    assert weights != (tmp_path / "four" / student).read_bytes()


# ---- published files

COMPLETIONS = "completion_data/B_text-davinci-002__C_zs_cot"
CURATED = "finetune_data/P_decoder/F_zs_cot_multiarith.json"


def test_curate_published_completions(shared, published, tmp_path):
    """The rationales that are kept are those of the published fine-tuning file, in its order."""
    message, out = published("--method ft_cot")
    assert message is None
    assert "keeping the 323 of 420 rationales whose answer is right" in out
    data = storage.read_finetune_data(tmp_path / CURATED)
    theirs = storage.read_jsonl(shared / "saved/finetune_data/P_openai/F_zs_cot_multiarith.jsonl")
    assert [row["prompt"].replace("\n\n###\n\n", " ###") for row in theirs] == data["input"]
    labels = [row["completion"].replace("\n\n-->\n\n", " --> ") for row in theirs]
    assert labels == [f"{label} END" for label in data["label"]]


def test_curate_labels_end_with_the_gold_answer(published_data, published, tmp_path):
    """A label ends with the benchmark's answer, however the teacher wrote it."""
    published("--method ft_cot")
    data = storage.read_finetune_data(tmp_path / CURATED)
    gold = {s["sample_index"]: s["answer"] for s in tasks.load("multiarith", published_data)}
    for i, label in zip(data["sample_index"], data["label"], strict=True):
        assert label.endswith(f" --> {gold[i]}")
    assert all(text.endswith(" ###") for text in data["input"])


def test_curate_keeps_a_file_that_was_edited(published, tmp_path):
    """A fine-tuning file that someone edited is moved to a backup, and made again."""
    published("--method ft_cot")
    path = tmp_path / CURATED
    whole = path.read_bytes()
    path.write_text("mine")
    _, out = published("--method ft_cot")
    assert path.read_bytes() == whole
    assert path.with_name(path.name + ".old1").read_text() == "mine"
    assert "is kept as" in out


def test_curate_takes_degree_rationales_a_question(published):
    """--degree bounds the rationales of a question: 8 of 420 questions have 25 completions."""
    _, out = published("--method ft_cot --degree 25")
    assert "of 612 rationales" in out


def test_curate_refuses_completions_of_another_task(published, tmp_path):
    """A completion file of another task under this one's name is refused."""
    folder = tmp_path / COMPLETIONS
    shutil.copy(folder / "D_coin_flip.json", folder / "D_multiarith.json")
    message, _ = published()
    said = "D_multiarith.json holds completions of the task coin_flip, not multiarith"
    assert said in message


def test_curate_refuses_other_questions(published, tmp_path):
    """Completions of questions that are not the benchmark's are refused."""
    path = tmp_path / COMPLETIONS / "D_multiarith.json"
    content = storage.read_json(path)
    content["data"]["7"][0]["question"] = "What is 3 + 4?"
    storage.write_json(path, content)
    message, _ = published("--method ft_cot")
    assert "sample 7 is not sample 7 of multiarith" in message


def test_curate_refuses_an_empty_set(unanswered, tmp_path):
    """Where no rationale is left, the run says so and leaves no file."""
    message, _ = unanswered("--method ft_cot")
    assert message.startswith("error: no correct rationale is left for multiarith")
    assert contents(tmp_path / "finetune_data") == {}


# ---- bad input: one sentence, a non-zero exit, nothing lost

TRAIN = "--stage train --out {tmp}/o --finetune_data"
BAD = [
    ("--lr 0", "--lr 0.0 must be above 0"),
    ("--task multiarith --stage curate --data {tmp}", "make it with `python data/prepare.py multi"),
    ("--task multiarith --stage sample", "no completions of text-davinci-002 for multiarith at"),
    ("--split nope --stage curate", "toy__nope.json is missing"),
    ("--split few_shot_0 --stage curate", "few_shot_0.json is missing"),
    ("--stage train", "is missing or was made with other settings: make it with --stage curate"),
    ("--stage evaluate", "there is no finished student in"),
    ("--device foo", "--device foo cannot be used here"),
    ("--saved {tmp}/good.json", "Not a directory|File exists"),
    (f"{TRAIN} {{tmp}}/good.json --student {{tmp}}/empty", "it has no config.json"),
    (f"{TRAIN} {{tmp}}/good.json --student {{tmp}}/bare", "has no tokenizer"),
    (f"{TRAIN} {{tmp}}/none.json", "none.json cannot be read: No such file"),
    (f"{TRAIN} {{tmp}}/torn.json", "torn.json is not valid JSON"),
    (f"{TRAIN} {{tmp}}/torn.jsonl", "torn.jsonl, line 2 is not valid JSON"),
    (f"{TRAIN} {{tmp}}/uneven.json", "uneven.json is not a fine-tuning file"),
    (f"{TRAIN} {{tmp}}/types.json", "types.json is not a fine-tuning file"),
    (f"{TRAIN} {{tmp}}/zero.json", "zero.json holds no sample"),
    (f"{TRAIN} {{tmp}}/list.json", "list.json holds a JSON list, not an object"),
    (f"{TRAIN} {{tmp}}/good.json --out {{tmp}}/full", "is not empty and holds no run of this"),
    (f"{TRAIN} {{tmp}}/good.json --out {{tmp}}/odd", "run.json holds a JSON list, not an object"),
    (
        f"{TRAIN} {{tmp}}/good.json --out {{tmp}}/bare --student {{tmp}}/bare",
        "is the student itself",
    ),
]


def write_bad_files(folder: Path) -> None:
    """Write what the rows of BAD name."""
    good = {"sample_index": [0], "input": ["a ###"], "label": [" b"]}
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full/thesis.txt").write_text("precious")
    (folder / "torn.json").write_text('{"sample_index": [0')
    (folder / "torn.jsonl").write_text('{"prompt": "a", "completion": " b"}\n{"prompt"\n')
    storage.write_json(folder / "good.json", good)
    storage.write_json(folder / "list.json", [1])
    storage.write_json(folder / "odd/run.json", [1])
    storage.write_json(folder / "types.json", good | {"label": [5]})
    storage.write_json(folder / "uneven.json", good | {"label": []})
    storage.write_json(folder / "zero.json", {"sample_index": [], "input": [], "label": []})
    tiny_model("gpt2").save_pretrained(folder / "bare")


@pytest.mark.parametrize("flags, sentence", BAD)
def test_main_bad_input(small_toy, tmp_path, method, flags, sentence):
    """Bad input gets one clear sentence and a failing exit, and the user's files stay."""
    write_bad_files(tmp_path)
    flags = flags.replace("{tmp}", str(tmp_path))
    message, _ = method(f"--saved {tmp_path}/saved --student toy {flags}")
    assert message.startswith("error: ")
    assert "\n" not in message
    assert re.search(sentence, message), message
    assert os.listdir(tmp_path / "full") == ["thesis.txt"]
    assert (tmp_path / "full/thesis.txt").read_text() == "precious"
