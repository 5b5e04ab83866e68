"""The flags of finetune_cot.py: defaults, what is refused, file names.

python -m pytest tests/test_flags.py
"""

import re
import shlex
import time
from argparse import Namespace

import pytest
from conftest import ROOT, run

import flags
import parser
from storage import UserError


@pytest.fixture(autouse=True)
def no_api(monkeypatch):
    """The environment names no API."""
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def parse(line: str) -> Namespace:
    [args] = flags.parse_args(shlex.split(line))
    return args


# ---- parse_args

DEFAULTS = [  # the paper's, and the toy's
    ("--task gsm8k", "lr", 3e-4),
    ("--task gsm8k", "batch_size", 8),
    ("--task gsm8k", "epochs", 20),
    ("--task gsm8k", "weight_decay", 0.01),
    ("--task gsm8k", "precision", "fp32"),
    ("--task gsm8k", "max_length", 512),
    ("--task gsm8k", "degree", 1),
    ("--task gsm8k", "temperature", 0.0),
    ("--task gsm8k", "teacher", "text-davinci-002"),
    ("--task gsm8k", "student", "gpt2"),
    ("--task gsm8k", "split", "default"),
    ("", "task", "toy"),
    ("", "method", ["ft", "ft_cot"]),
    ("", "teacher", "toy"),
    ("", "degree", 2),
    ("", "lr", 4e-3),
    ("--stage train --finetune_data f --out o", "lr", 3e-4),
    ("--stage train --finetune_data f --out o", "student", "gpt2"),
    ("--batch_size 4", "micro_batch_size", 4),
    ("--batch_size 4 --micro_batch_size 2", "micro_batch_size", 2),
    ("--task all --dry_run --stage sample", "task", "all"),
    ("--degree 8", "sample_degree", 8),
    ("", "plain", False),
    ("--plain", "plain", True),
]


def test_help_is_fast():
    """--help answers within half a second: nothing that it imports is large."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = run("finetune_cot.py", "--help")
        seconds.append(time.perf_counter() - start)
    assert done.returncode == 0
    assert min(seconds) < 0.5


def help_text(flag: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as end:
        flags.parse_args([flag])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_is_what_a_first_run_needs(capsys):
    """--help names a few flags, and how to see the others."""
    text = help_text("--help", capsys)
    assert re.findall(r"^  (--\w+) ", text, re.M) == [f"--{name}" for name in parser.BASIC]
    assert "--help-all" in text
    assert len(text.splitlines()) < 60


def test_help_all_names_every_flag(capsys):
    """--help-all names all flags, none with a list of choices that fills the line."""
    text = help_text("--help-all", capsys)
    names = [f"--{name}" for name in vars(parse("")) if name != "sample_degree"]
    assert [name for name in names if name not in text] == []
    assert max(map(len, re.findall(r"^  (--.*?)(?:  |$)", text, re.M))) <= 50


BARE_DEFAULTS = ["epochs", "lr", "degree", "batch_size", "max_new_tokens", "warmup", "schedule"]


@pytest.mark.parametrize("name", BARE_DEFAULTS)
def test_help_all_names_the_default_of_the_bare_command(name, capsys):
    """What --help-all calls the toy's default is what a run without flags has."""
    text = " ".join(help_text("--help-all", capsys).split())
    about = text.partition(f" --{name} ")[2][:160]
    value = re.search(r"default (?:toy )?([\w.-]+)", about)[1]
    assert str(getattr(parse(""), name)) in (value, str(float(value)) if value[0].isdigit() else "")


WRONG = [
    ("--epoch 3", "unrecognized arguments: --epoch (did you mean --epochs?)"),
    ("--studnet=x", "--studnet=x (did you mean --student?)"),
    ("--learning_rate 1", "--learning_rate (did you mean --lr?)"),  # as other programs name it
    ("--stud x", "--stud (did you mean --study?)"),  # no silent abbreviation
    ("--method ftcot", "no 'ftcot' (did you mean ft_cot?)"),
    ("--degree two", "invalid int value: 'two'"),
]


@pytest.mark.parametrize("line, message", WRONG)
def test_parse_args_suggests_the_nearest(line, message, capsys):
    """A wrong flag, or a wrong name behind it, is answered with the nearest right one."""
    with pytest.raises(SystemExit) as end:
        flags.parse_args(line.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--seeds 0 1", "--seeds 0,1", "--seed=0,1", "--seed 0, 1"])
def test_parser_lists(line):
    """Several values stand behind a flag with spaces or with commas."""
    assert parser.make_parser("").parse(line.split()).seed == [0, 1]


def test_parser_lists_leave_paths_alone(tmp_path):
    """A folder whose name has a comma is one value."""
    folder = tmp_path / "a,b"
    folder.mkdir()
    assert parser.make_parser("").parse(["--student", str(folder)]).student == [str(folder)]


def test_default_folders_are_the_project_s(monkeypatch, tmp_path):
    """Wherever a command is started, --saved and --data mean the same folders."""
    monkeypatch.chdir(tmp_path)
    assert (parse("").saved, parse("").data) == (str(ROOT / "saved"), str(ROOT / "data"))
    monkeypatch.chdir(ROOT)
    assert (parse("").saved, parse("").data) == ("saved", "data")


@pytest.mark.parametrize("line, name, value", DEFAULTS)
def test_parse_args_default(line, name, value):
    """Defaults are the paper's setting, for files of the user's own too, but the toy's for toy."""
    assert getattr(parse(line), name) == value


def test_parse_args_has_no_flag_for_the_key(capsys):
    """The key of an API stands in the environment alone: `ps` would show a flag."""
    for flag in ("--key", "--api_key", "--openai_api_key"):
        with pytest.raises(SystemExit):
            flags.parse_args([flag, "x"])
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err


# ---- check

REFUSED = [
    ("--task multi", "there is no task 'multi'"),
    ("--task ../x", "there is no task '../x'"),
    ("--teacher ../x", "'../x' cannot be used as a name"),
    ("--teacher /etc/passwd", "cannot be used as a name"),
    ("--student /no-such-folder/x", "cannot be used as a name"),
    ("--split ../x", "'../x' cannot be used as a name"),
    ("--method ft --train_key ../x", "'../x' cannot be used as a name"),
    # numbers
    ("--batch_size 0", "--batch_size 0 must be 1 or more"),
    ("--micro_batch_size 0", "--micro_batch_size 0 must be 1 or more"),
    ("--eval_samples 0", "--eval_samples 0 must be 1 or more"),
    ("--temperature -1", "--temperature -1.0 must be 0 or more"),
    ("--temperature nan", "--temperature nan must be 0 or more"),
    ("--seed 20000000000", "--seed 20000000000 must be 0 or more, and below a billion"),
    ("--lr -1", "--lr -1.0 must be above 0"),
    ("--lr nan", "--lr nan must be above 0"),
    ("--max_rationale_words -1", "--max_rationale_words -1 must be 0 or more"),
    ("--max_similarity 1.5", "--max_similarity 1.5 must be from 0 to 1"),
    # flags that do not go together
    ("--finetune_data x.json", "--finetune_data goes with --stage train"),
    ("--finetune_data x.json --stage train", "and --out DIR"),
    ("--out x", "name one --method"),
    ("--train_key k", "name one --method"),
    ("--keep_best", "--keep_best compares epochs"),
    ("--shard gpu --eval_every 1", "leave out --eval_every"),
    ("--show 3", "--show goes with --stage curate"),
    ("--degree 3 --temperature 0", "3 identical rationales: use --temperature"),
    # APIs
    ("--label_style gpt3", "use it with --stage curate"),
    ("--base_url ftp://x", "must begin with http"),
    ("--base_url http://me:secret@127.0.0.1/v1", "must hold no name and no password"),
    ("--concurrency 0", "--concurrency 0 must be above 0"),
    ("--requests_per_minute nan", "--requests_per_minute nan must be"),
    ("--price_in 1", "prices come in pairs"),
    ("--max_cost 1", "--max_cost needs them"),
    ("--stage sample --teacher gpt-x --dry_run --batch fetch", "one at a time"),
    ("--teacher gpt-x --dry_run", "go with --stage sample"),
    ("--stage sample --dry_run", "behind an API"),
]
ALLOWED = [
    "",
    "--task multiarith --method zs",
    "--stage train --finetune_data x.json --out o",
    "--stage train --finetune_data x.json --method ft_cot",
    "--degree 3 --temperature 0.7",
    "--stage curate --label_style gpt3",
    "--label_style gpt3 --base_url http://127.0.0.1:9/v1",
    "--task svamp --degree 8 --temperature 0.7 --price_in 1 --price_out 2 --max_cost 3",
    "--stage sample --task all --teacher gpt-x --dry_run",
    "--stage curate --show 3",
]


@pytest.mark.parametrize("line, sentence", REFUSED)
def test_check_refuses(line, sentence):
    """What cannot work is refused with one sentence before anything is computed."""
    with pytest.raises(UserError) as caught:
        flags.check(parse(line))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", ALLOWED)
def test_check_allows(line):
    """What can work is not refused."""
    assert flags.check(parse(line)) is None


WARNS = [
    ("http://127.0.0.1:9/v1", False),
    ("http://localhost:9/v1", False),
    ("https://example.org/v1", False),
    ("http://example.org/v1", True),
]


@pytest.mark.parametrize("url, warns", WARNS)
def test_check_warns_of_plain_http(url, warns, capsys):
    """Plain http to another machine would show the key to who listens."""
    flags.check(parse(f"--base_url {url}"))
    assert ("unencrypted" in capsys.readouterr().err) == warns


# ---- APIs


def test_base_url_flag_before_environment(monkeypatch):
    """--base_url goes before OPENAI_BASE_URL."""
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1")
    assert flags.base_url(parse("")) == "http://127.0.0.1:1"
    assert flags.base_url(parse("--base_url http://127.0.0.1:2")) == "http://127.0.0.1:2"


@pytest.mark.parametrize("key, has", [("sk-1", True), (" ", False), ("", False)])
def test_has_api_key(monkeypatch, key, has):
    """A key in the environment is an API, a blank one is none."""
    monkeypatch.setenv("OPENAI_API_KEY", key)
    assert flags.has_api(parse("")) == has


def test_has_api_base_url():
    """A server of one's own needs no key."""
    assert flags.has_api(parse("--base_url http://127.0.0.1:1"))
    assert not flags.has_api(parse(""))


@pytest.mark.parametrize("teacher, remote", [("toy", False), ("hf:gpt2", False), ("gpt2", True)])
def test_is_remote_teacher(teacher, remote):
    """All teachers but the toy and local models are asked elsewhere."""
    assert flags.is_remote_teacher(parse(f"--teacher {teacher}")) == remote


# ---- names of files

TRAIN_KEYS = [  # flags, the key of ft_cot, the key of ft
    ("", "ft_cot_2aug", "ft"),
    ("--task svamp", "ft_cot", "ft"),
    ("--task svamp --temperature 0.7", "ft_cot_t70", "ft"),
    ("--task svamp --temperature 0.7 --degree 8", "ft_cot_8aug", "ft"),
    ("--task svamp --teacher gpt-x", "ft_cot_by_gpt-x", "ft"),
    ("--task svamp --teacher_method zs_cot_one_step", "ft_cot_zs_cot_one_step", "ft"),
    ("--lr 0.01 --seed 4", "ft_cot_2aug_lr0.01_s4", "ft_lr0.01_s4"),
    ("--batch_size 4", "ft_cot_2aug_b4", "ft_b4"),
    ("--label_style natural", "ft_cot_natural_2aug", "ft_natural"),
    ("--split few_shot_32", "ft_cot_2aug_few_shot_32", "ft_few_shot_32"),
    ("--validation 0.2", "ft_cot_2aug_v0.2", "ft_v0.2"),
    ("--validation 0.2 --data_seed 1", "ft_cot_2aug_v0.2s1", "ft_v0.2s1"),
    ("--filter all --max_per_question 3", "ft_cot_2aug_all_3each", "ft"),
    ("--drop_unfinished --drop_duplicates", "ft_cot_2aug_finished_unique", "ft"),
    ("--max_rationale_words 45 --max_similarity 0.8", "ft_cot_2aug_45words_similar0.8", "ft"),
    ("--train_key mine", "mine", "mine"),
]
FINETUNE_KEYS = [  # flags, method, key
    ("", "ft", "ft_toy"),
    ("", "ft_cot", "zs_cot_t70_toy_2aug"),
    ("--task svamp", "ft_cot", "zs_cot_svamp"),
    ("--data_seed 1", "ft_cot", "zs_cot_t70_s1_toy_2aug"),
    ("--task svamp --split template", "ft", "ft_svamp_template"),
    ("--lr 0.01 --seed 4", "ft_cot", "zs_cot_t70_toy_2aug"),
    ("--filter all --drop_unfinished", "ft_cot", "zs_cot_t70_toy_2aug_all_finished"),
]
TEACHER_KEYS = [
    ("", "zs_cot_t70"),
    ("--data_seed 1", "zs_cot_t70_s1"),
    ("--task svamp", "zs_cot"),
    ("--task svamp --data_seed 1", "zs_cot"),  # an API has no seed of ours
    ("--task svamp --teacher_method fs_cot", "fs_cot"),
]
FINETUNE_FILES = {
    "decoder": "P_decoder/F_ft_toy.json",
    "encoder_decoder": "P_encoder_decoder/F_ft_toy.json",
    "openai": "P_openai/F_ft_toy.jsonl",
    "chat": "P_openai/F_ft_toy_chat.jsonl",
}
TEST_FILES = [  # flags, method, name
    ("", "ft", "B_toy_student__C_ft/D_toy__T_ft__E_005.json"),
    ("", "ft_cot", "B_toy_student__C_ft_cot/D_toy__T_ft_cot_2aug__E_005.json"),
    ("", "zs", "B_toy_student__C_zs/D_toy__S_default.json"),
    ("--seed 1", "zs", "B_toy_student__C_zs/D_toy__S_default_s1.json"),
    ("--seed 1 --student gpt2", "zs", "B_gpt2__C_zs/D_toy__S_default.json"),
    ("--split few_shot_32", "zs", "B_toy_student__C_zs/D_toy__S_few_shot_32.json"),
    ("--eval_samples 4", "zs", "B_toy_student__C_zs/D_toy__S_default__K_04_t70.json"),
]


@pytest.mark.parametrize("line, ft_cot, ft", TRAIN_KEYS)
def test_train_key(line, ft_cot, ft):
    """The name of a student holds what is not usual, and of ft nothing about rationales."""
    args = parse(line)
    assert flags.train_key(args, "ft_cot") == ft_cot
    assert flags.train_key(args, "ft") == ft


@pytest.mark.parametrize("line, method, key", FINETUNE_KEYS)
def test_finetune_key(line, method, key):
    """The name of a fine-tuning file holds what it was made from, and nothing about training."""
    assert flags.finetune_key(parse(line), method) == key


@pytest.mark.parametrize("line, key", TEACHER_KEYS)
def test_teacher_key(line, key):
    """The name of a teacher's file holds prompting method, temperature and a local one's seed."""
    assert flags.teacher_key(parse(line)) == key


@pytest.mark.parametrize("teacher, name", [("toy", "toy_teacher"), ("hf:a/b", "a_b")])
def test_teacher_name(teacher, name):
    """A teacher's hub name becomes part of a file name."""
    assert flags.teacher_name(parse(f"--teacher {teacher}")) == name


def test_teacher_file():
    """Of a published teacher the name is that of the published file."""
    path = flags.teacher_file(parse("--task multiarith --saved s"))
    folder = "B_text-davinci-002__C_zs_cot"
    assert path.as_posix() == f"s/completion_data/{folder}/D_multiarith.json"


@pytest.mark.parametrize("family, name", FINETUNE_FILES.items())
def test_finetune_file(family, name):
    """Each model type has fine-tuning files of its own."""
    path = flags.finetune_file(parse("--saved s"), "ft", family)
    assert path.as_posix() == f"s/finetune_data/{name}"


def test_student_dir():
    """A student lies under --saved, or in --out."""
    path = flags.student_dir(parse("--saved s --seed 1"), "ft")
    assert path.as_posix() == "s/models/B_toy_student/D_toy__T_ft_s1"
    assert flags.student_dir(parse("--out o --method ft"), "ft").as_posix() == "o"


@pytest.mark.parametrize("line, method, name", TEST_FILES)
def test_test_file(line, method, name):
    """A student's completions are named by run and epoch, without training by split."""
    path = flags.test_file(parse(f"--saved s {line}"), method, 5)
    assert path.as_posix() == f"s/completion_data/{name}"


def test_samples_suffix():
    """K sampled answers are kept apart from greedy ones."""
    assert flags.samples_suffix(parse("")) == []
    sampled = parse("--eval_samples 16 --eval_temperature 0.5")
    assert flags.samples_suffix(sampled) == ["K_16_t50"]


def test_curation_options():
    """Settings name the filters that differ from the paper, and none by default."""
    assert flags.curation_options(parse("")) == {}
    options = flags.curation_options(parse("--filter all --max_per_question 3"))
    assert options == {"filter": "all", "max_per_question": 3}
