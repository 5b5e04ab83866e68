"""What the README says is so: its commands parse, its files exist, its links are true.

python -m pytest tests/test_readme.py
python tests/test_readme.py               # write the line numbers of the README anew
"""

import re
import shlex

import pytest
from conftest import ROOT  # first: it puts the project on the path

import evaluate
import flags
import tasks

README = (ROOT / "README.md").read_text()
PARSERS = {"finetune_cot.py": flags.parse_args, "evaluate.py": evaluate.parse_args}
COMMANDS = sorted(
    set(
        re.findall(
            r"(?:python|nproc_per_node=\d) ((?:finetune_cot|evaluate)\.py[^`#&|\n]*)", README
        )
    )
)


def test_the_readme_has_commands_to_check():
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_is_understood_by_the_real_parser(command):
    script, *options = shlex.split(
        re.sub(r"\[(.*?)\]|\.\.\.", r"\1", command)
    )  # optional parts in brackets are tried as well
    if "--help" in options:
        return
    parsed = PARSERS[script](options)
    if script == "finetune_cot.py":
        for args in parsed:
            flags.check(args)


LINK = re.compile(r"\[`(\w+)`\]\(([\w/.]+\.py)#L(\d+)\)")  # [`name`](file.py#L12)


def line_of(name, path):
    """-> the number of the line of path that defines name."""
    lines = (ROOT / path).read_text().splitlines()
    found = [
        i
        for i, line in enumerate(lines, 1)
        if re.match(rf"(?:async )?(?:def|class) {name}\b|{name}(?:: [^=]+)? = ", line)
    ]
    assert len(found) == 1, f"{path} defines {name} in lines {found}"
    return found[0]


def with_true_lines(text):
    return LINK.sub(lambda m: f"[`{m[1]}`]({m[2]}#L{line_of(m[1], m[2])})", text)


def test_the_links_of_the_readme_lead_to_the_lines_they_name():
    wrong = [
        f"{m[0]}: now line {line_of(m[1], m[2])}"
        for m in LINK.finditer(README)
        if int(m[3]) != line_of(m[1], m[2])
    ]
    assert not wrong, "run `python tests/test_readme.py`, which writes them anew\n" + "\n".join(
        wrong
    )
    assert len(LINK.findall(README)) > 30 and README.count("](") - README.count("](http") == len(
        LINK.findall(README)
    ), "a link of another form"


def test_the_benchmarks_that_the_readme_prepares_are_known():
    names = [
        name
        for line in re.findall(r"python data/prepare\.py +([a-z0-9_ ]+?)(?: {2,}|$)", README, re.M)
        for name in line.split()
    ]
    assert names
    assert set(names) <= set(tasks.TASKS)


def test_the_readme_s_template_recipe_is_one_entry_that_works(monkeypatch):
    entry = re.search(r'^ +`("ft_cot_steps": .*),`$', README, re.M)[1]
    monkeypatch.setitem(tasks.TEMPLATES, *eval("{" + entry + "}").popitem())
    prompt, label = tasks.format_sample("ft_cot_steps", "decoder", "What?", "Because.", "7")
    assert (prompt, label) == ("What?\nLet us see.", " Because.\nSo: 7")


def test_the_readme_s_task_recipe_is_one_row_that_works(monkeypatch):
    row = eval(re.search(r"^ +`(Task\(.*\)),`", README, re.M)[1], vars(tasks))
    monkeypatch.setitem(tasks.TASKS, row.key, row)
    assert (row.train, row.test) == tuple(map(len, tasks.default_split(row.key)))
    assert tasks.grade(row.key, "ft_cot_token", "2 + 3 = 5 --> 5", "5.0").correct


@pytest.mark.parametrize("page", ["README.md", "saved/README.md", "data/README.md"])
def test_the_files_a_page_names_exist_or_are_made_by_a_run(page):
    for name in re.findall(
        r"\b(?:data/|tests/|saved/|extras/)?[a-z_]+\.(?:py|csv|txt|md)\b", (ROOT / page).read_text()
    ):
        assert (ROOT / name).exists() or (ROOT / page).parent.joinpath(name).exists(), name


def test_the_readme_tells_how_many_samples_and_which_flags_the_default_run_has():
    [args] = flags.parse_args([])
    assert (args.task, args.method) == (
        "toy",
        ["ft", "ft_cot"],
    )
    assert f"{tasks.TASKS['toy'].test} test questions" in README


def test_the_checks_run_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m1 '(.*)' README\.md", (ROOT / ".ci" / "run").read_text()).group(1)
    command = next(line for line in README.splitlines() if re.search(pattern, line))
    assert shlex.split(command)[-4:] == ["-m", "pytest", "tests", "-q"]


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_true_lines(README))
