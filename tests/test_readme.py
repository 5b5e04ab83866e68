"""What README.md and docs/ say is so: commands parse, files exist, links are true, recipes work.

python -m pytest tests/test_readme.py
python tests/test_readme.py               # write the line numbers of the links anew
"""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT  # first: it puts the project on the path

import answers
import evaluate
import flags
import tasks

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARSERS = {"finetune_cot.py": flags.parse_args, "evaluate.py": evaluate.parse_args}
COMMAND = re.compile(r"(?:python|nproc_per_node=\d) ((?:finetune_cot|evaluate)\.py[^`#&|\n]*)")
LINK = re.compile(r"\[`(\w+)`\]\(((?:\.\./)?[\w/.]+\.py)#L(\d+)\)")  # [`name`](file.py#L12)
TARGET = re.compile(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)")  # ](file#place)
HAS_EXTRAS = (ROOT / "extras").is_dir()
pytestmark = pytest.mark.skipif(not HAS_EXTRAS, reason="the pages name files of extras/, too")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands() -> list[str]:
    """Return every command of the pages that our parsers read, a line each."""
    found = set()
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        found |= {command.strip() for command in COMMAND.findall(text)}
    return sorted(found)


def test_the_pages_have_commands_to_check():
    assert len(commands()) >= 30


@pytest.mark.parametrize("command", commands())
def test_a_command_of_a_page_is_understood_by_the_real_parser(command):
    with_options = re.sub(r"\[(.*?)\]|\.\.\.", r"\1", command)  # what is in brackets, too
    script, *options = shlex.split(with_options)
    if options[:1] in (["--help"], ["--help-all"]):
        return
    parsed = PARSERS[script](options)
    if script == "finetune_cot.py":
        for args in parsed:
            flags.check(args)


# ---------------- Links


def line_of(name: str, path: Path) -> int:
    """Return the number of the line of path that defines name."""
    definition = re.compile(rf"(?:async )?(?:def|class) {name}\b|{name}(?:: [^=]+)? = ")
    lines = path.read_text().splitlines()
    found = [i for i, line in enumerate(lines, 1) if definition.match(line)]
    assert len(found) == 1, f"{path} defines {name} in lines {found}"
    return found[0]


def with_true_lines(page: Path) -> str:
    """Return the text of a page, its links with the lines that define the names now."""

    def true_link(match: re.Match) -> str:
        name, file, _ = match.groups()
        return f"[`{name}`]({file}#L{line_of(name, (page.parent / file).resolve())})"

    return LINK.sub(true_link, page.read_text())


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_link_to_code_leads_to_the_line_it_names(page):
    remedy = "run `python tests/test_readme.py`, which writes the lines anew"
    assert with_true_lines(page) == page.read_text(), remedy


def anchors(text: str) -> set[str]:
    """Return the places of a page that a link may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_link_to_a_file_leads_to_one(page):
    for target, place in TARGET.findall(page.read_text()):
        path = (page.parent / target).resolve()
        assert path.exists(), target
        if path.suffix == ".md" and place:
            assert place in anchors(path.read_text()), f"{target}#{place}"


NAMED = re.compile(
    r"\b(?:tests/extras/|data/|tests/|saved/|extras/|docs/)?[a-z_]+\.(?:py|csv|txt|md|sh)\b"
)
OTHER_PAGES = [ROOT / "saved" / "README.md", ROOT / "data" / "README.md"]


@pytest.mark.parametrize("page", [*PAGES, *OTHER_PAGES], ids=page_name)
def test_the_files_a_page_names_exist(page):
    for name in NAMED.findall(page.read_text()):
        places = [ROOT / name, page.parent / name]
        assert any(path.exists() for path in places) or name == "reproduce.sh", name


# ---------------- The README


def test_the_readme_can_be_read_in_one_sitting():
    """At most 2,000 words, in lines that an editor shows whole."""
    assert len(README.split()) <= 2000
    assert [line for line in README.splitlines() if len(line) > 120] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_a_page_has_lines_that_an_editor_shows_whole(page):
    """Only rows of tables are longer than 120 characters."""
    lines = page.read_text().splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_benchmarks_that_the_readme_prepares_are_known():
    lines = re.findall(r"python data/prepare\.py +([a-z0-9_ ]+)$", README, re.M)
    names = {name for line in lines for name in line.split()}
    assert names == {"multiarith", "apples"}
    assert "multiarith" in tasks.TASKS


def test_the_readme_s_template_recipe_is_one_entry_that_works(monkeypatch):
    entry = re.search(r'`("ft_cot_steps": .*),`$', README, re.M)[1]
    monkeypatch.setitem(tasks.TEMPLATES, *eval("{" + entry + "}").popitem())
    prompt, label = tasks.format_sample("ft_cot_steps", "decoder", "What?", "Because.", "7")
    assert (prompt, label) == ("What?\nLet us see.", " Because.\nSo : 7")


def test_the_readme_s_task_recipe_is_one_row_that_works(monkeypatch):
    row = eval(re.search(r"^`(Task\(.*\)),`", README, re.M)[1], vars(tasks))
    monkeypatch.setitem(tasks.TASKS, row.key, row)
    assert (row.train, row.test) == tuple(map(len, tasks.default_split(row.key)))
    assert tasks.grade(row.key, "ft_cot_token", "2 + 3 = 5 --> 5", "5.0").correct


@pytest.mark.parametrize("rules", ["paper", "flexible"])
def test_the_readme_s_answer_type_recipe_is_three_lines_that_work(rules, monkeypatch):
    recipe = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(recipe.splitlines()) == 3
    names = dict(vars(answers))
    exec(recipe, names)
    row = tasks.Task("dates", "Dates", names["YEAR"], 10, 7, 3, 0.0)
    monkeypatch.setitem(tasks.TASKS, "dates", row)
    text = "He was 30 in 1969. --> 1999"
    assert tasks.grade("dates", "ft_cot_token", text, "1999", rules).correct
    assert not tasks.grade("dates", "ft_cot_token", text, "1969", rules).correct


def test_the_readme_tells_how_many_samples_and_which_flags_the_default_run_has():
    [args] = flags.parse_args([])
    assert (args.task, args.method) == ("toy", ["ft", "ft_cot"])
    assert f"{tasks.TASKS['toy'].test} questions" in README


def test_the_readme_s_output_is_of_the_run_in_docs():
    """The lines that it shows are lines of docs/first_run.txt."""
    shown = re.search(r"```\n(1/4 sample.*?)```", README, re.S)[1].splitlines()
    printed = (ROOT / "docs" / "first_run.txt").read_text().splitlines()
    assert [line for line in shown if line not in printed] == []
    assert max(map(len, printed)) <= 120


def test_the_checks_run_the_test_command_of_the_readme():
    pattern = re.search(r"grep -m1 '(.*)' README\.md", (ROOT / ".ci" / "run").read_text()).group(1)
    command = next(line for line in README.splitlines() if re.search(pattern, line))
    assert shlex.split(command)[-4:] == ["-m", "pytest", "tests", "-q"]


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_true_lines(path))
