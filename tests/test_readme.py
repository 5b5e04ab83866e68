"""What the README says is so: its commands parse, its files exist.   python -m pytest tests/test_readme.py"""
import re
import shlex

import pytest

import evaluate
import finetune_cot
import tasks
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PARSERS = {"finetune_cot.py": finetune_cot.parse_args, "evaluate.py": evaluate.parse_args}
COMMANDS = sorted(set(re.findall(r"(?:python|nproc_per_node=\d) ((?:finetune_cot|evaluate)\.py[^`#&|\n]*)", README)))


def test_the_readme_has_commands_to_check():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood_by_the_real_parser(command):
    script, *flags = shlex.split(re.sub(r"\[(.*?)\]|\.\.\.", r"\1", command))  # optional parts in brackets are tried as well
    if "--help" in flags:
        return
    parsed = PARSERS[script](flags)
    if script == "finetune_cot.py":
        for args in parsed:
            finetune_cot.check(args)


@pytest.mark.parametrize("page", ["README.md", "saved/README.md", "data/README.md"])
def test_the_files_a_page_names_exist_or_are_made_by_a_run(page):
    for name in re.findall(r"\b(?:data/|tests/|saved/)?[a-z_]+\.(?:py|csv|txt|md)\b", (ROOT / page).read_text()):
        assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists(), name


def test_the_readme_tells_how_many_samples_and_which_flags_the_default_run_has():
    [args] = finetune_cot.parse_args([])
    assert (args.task, args.method) == ("toy", ["ft", "ft_cot"]) and f"{tasks.TASKS['toy'].test} test questions" in README


@pytest.mark.parametrize("module, others", [("tasks", ("train_loop", "evaluate", "finetune_cot")), ("train_loop", ("evaluate", "finetune_cot")),
                                            ("evaluate", ("train_loop", "finetune_cot"))])
def test_imports_point_one_way(module, others):
    text = (ROOT / f"{module}.py").read_text()
    assert not any(re.search(rf"^\s*(?:import|from) {other}\b", text, re.M) for other in others)


def test_the_checks_run_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m1 '(.*)' README\.md", (ROOT / ".ci" / "run").read_text()).group(1)
    command = next(line for line in README.splitlines() if re.search(pattern, line))
    assert shlex.split(command)[-4:] == ["-m", "pytest", "tests", "-q"]
