"""The page: what it holds, and that a browser filters, searches and counts.

python -m pytest tests/extras/test_page.py   (the browser's tests need chromium)
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import answers_file, tiny_tokenizer

import evaluate
import storage
import tasks
from extras import page, training_data

HOSTILE = "</script><script>document.title = 'taken over'</script> <b>bold</b> \u2028 \ud800 no"


def read_page(path: Path) -> dict:
    """Return the data of a written page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text())
    return json.loads(found[1])


def write_page(saved: Path, *files: Path, **flags: object) -> dict:
    """Write page.html of a folder of runs; return its data."""
    out = saved / "page.html"
    more = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    evaluate.main(["page", "--out", str(out), "--saved", str(saved), *map(str, files), *more])
    return read_page(out)


# ---- where the answer was read


@pytest.mark.parametrize(
    "task, template, text, answer, rules, marked",
    [
        ("multiarith", None, " 5*5=25.", "25", "paper", (1, 2)),
        ("multiarith", None, " 5*5=25.", "25", "flexible", (5, 7)),
        ("multiarith", "ft_cot_token", "7 of 7 --> 7 of 7", "7", "paper", (11, 12)),
        ("multiarith", "ft_cot_token", "7 of 8", "8", "paper", (5, 6)),
        ("svamp", None, "it is $1,234.50", "1234.5", "flexible", (7, 15)),
        ("svamp", "ft_cot_token", "It is 5-3", "3", "flexible", (8, 9)),
        ("coin_flip", None, "No, not now", "no", "paper", (0, 2)),
        ("last_letter_concatenation", None, 'so "y a j o".', "yajo", "flexible", (4, 11)),
        ("date_understanding", None, "Because (C)", "C", "paper", (0, 1)),
        ("commonsense_qa", None, "nothing", "C", "paper", None),
    ],
)
def test_find_answer(task, template, text, answer, rules, marked):
    """The place is the one that was read, by value, in letters apart, inside a word."""
    verdict = tasks.grade(task, template, text, answer, rules)
    assert page.find_answer(text, verdict, rules) == marked


# ---- what the page holds


@pytest.fixture
def two_runs(report_toy, tmp_path):
    """Two runs of ten questions: 7 right and one unreadable; 5 right, of them 2 the other's."""
    outcomes = [True] * 7 + [False, False, None]
    answers_file(tmp_path, lambda i, k: outcomes[i], epoch=2)
    answers_file(tmp_path, lambda i, k: i >= 5, train_key="ft_cot_s1")
    answers_file(tmp_path, lambda i, k: i < 4)
    return tmp_path


def test_gather_takes_the_last_epoch(two_runs):
    data = write_page(two_runs)
    assert [run["epoch"] for run in data["runs"]] == [2, 1]


def test_gather_counts_outcomes(two_runs):
    data = write_page(two_runs)
    assert data["runs"][0]["counts"] == [7, 2, 1]


def test_gather_accuracy_of_every_epoch(two_runs):
    data = write_page(two_runs)
    assert [point[:2] for point in data["runs"][0]["accuracies"]] == [[1, 40.0], [2, 70.0]]


def test_gather_files_that_are_named(two_runs):
    """Only these are on the page, in their order."""
    folder = two_runs / "completion_data" / "B_m__C_ft_cot"
    data = write_page(two_runs, folder / "D_toy__T_ft_cot__E_001.json")
    assert [run["accuracy"] for run in data["runs"]] == [40.0]


def test_gather_names_a_file_that_it_leaves_out(two_runs, capsys):
    """A file without an answer to every question stops no other."""
    answers_file(two_runs, lambda i, k: True, "D_toy__T_part__E_001", indices=[0])
    data = write_page(two_runs)
    assert len(data["runs"]) == 2
    assert "not on the page: " in capsys.readouterr().err


def test_write_page_of_nothing(tmp_path):
    with pytest.raises(SystemExit, match="no completion file to show"):
        evaluate.main(["page", "--out", str(tmp_path / "p"), "--saved", str(tmp_path)])


def test_embed_hostile_text():
    """No text ends the script element; each comes back but for what UTF-8 cannot hold."""
    text = page.embed({"text": HOSTILE})
    found = re.search(r'id="data">(.*?)</script>', text)
    assert json.loads(found[1]) == {"text": HOSTILE.replace("\ud800", "?")}


def test_template_asks_no_network():
    """Nothing is loaded, and the page's policy forbids it."""
    text = page.TEMPLATE.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"""(src|href|@import|url\()\s*=?\s*["']?\s*(https?:)?//""", text)


# ---- a run of the whole method


@pytest.fixture
def toy_run(small_toy, trained_toy, tmp_path):
    """A folder of a student that learnt from 42 questions, two rationales each, for one epoch."""
    return Path(shutil.copytree(trained_toy, tmp_path / "saved"))


@pytest.fixture
def learnt(toy_run):
    """What the page holds of the training of ft_cot."""
    data = write_page(toy_run)
    [run] = [run for run in data["runs"] if run["name"] == "ft_cot_2aug"]
    return data["training"][run["training"]] | {"teachers": data["teachers"], "run": run}


def test_describe_training_kept_as_in_the_note(learnt):
    """As many rationales are kept as curation says beside its file."""
    note = storage.read_json(Path(learnt["file"]).with_suffix(".made_from.json"))
    assert (learnt["kept"], learnt["rationales"]) == (note["kept"], note["total"])


def test_describe_training_says_why(learnt):
    """A wrong rationale is dropped for its answer, a test question's is never learnt from."""
    reasons = {mark[1] for marks in learnt["judged"].values() for mark in marks}
    assert "its answer is right" in reasons
    assert "its answer reads yes, and no is right" in reasons
    assert "a test question: never learnt from" in reasons


def test_describe_training_tokens_of_a_kept_rationale(learnt):
    """The label's tokens are those of the rationale, the answer and EOS."""
    index = next(i for i, marks in learnt["judged"].items() if marks[0][0])
    position = learnt["judged"][index][0][2]
    prompt, label = learnt["samples"][str(position)]
    words = [learnt["vocabulary"][str(token)] for token in label]
    rationale = learnt["teachers"][learnt["teacher"]][index][0][0]
    assert "".join(words[:-3]) == rationale.replace(" ", "")
    assert words[-3] == "-->"
    assert learnt["vocabulary"][str(prompt[-1])] == "###"


def test_describe_training_losses(learnt):
    assert [epoch for epoch, _ in learnt["run"]["losses"]] == [1]


def test_judge_rationales_beyond_the_degree(small_toy, trained_toy):
    """Of a run that takes one rationale a question the second is neither kept nor dropped."""
    path = trained_toy / "finetune_data" / "P_decoder" / "F_zs_cot_t70_toy_2aug.json"
    curated = training_data.read_curated(path, "toy", trained_toy)
    curated = curated._replace(settings=curated.settings | {"degree": 1})
    train, _ = tasks.load_split("toy")
    judged = training_data.judge_rationales(curated, "toy", set(train), set())
    seconds = [judged[i][1] for i in train]
    assert seconds == [[None, "not looked at: this run takes the first 1", -1]] * 42


def test_read_log_torn_by_a_kill(tmp_path):
    """What stands before the torn line is read."""
    (tmp_path / "log.jsonl").write_text('{"epoch": 1, "epoch_loss": 0.5}\n{"epoch": 2, "epo')
    assert page.read_log(tmp_path) == ({}, [[1, 0.5]])


def test_run_files_of_two_families(toy_run):
    """Of fine-tuning files of one name it is the one that the student was trained on."""
    folder = toy_run / "finetune_data"
    shutil.copytree(folder / "P_decoder", folder / "P_encoder_decoder")
    for path in (folder / "P_decoder").glob("F_*.json"):
        path.write_text(path.read_text().replace(" ###", ""))
    data = write_page(toy_run)
    files = {Path(learnt["file"]).parent.name for learnt in data["training"].values()}
    assert files == {"P_encoder_decoder"}


def test_run_files_made_anew(toy_run):
    """A fine-tuning file that is no longer what the student learnt from is not shown as that."""
    path = toy_run / "finetune_data" / "P_decoder" / "F_ft_toy.json"
    path.write_text(path.read_text().replace(" ###", ""))
    data = write_page(toy_run)
    assert [run["training"] is None for run in data["runs"]] == [True, False, True]


def test_describe_training_limit(toy_run):
    """--limit shows the first training questions, and tells how many there are."""
    data = write_page(toy_run, limit=3)
    for learnt in data["training"].values():
        assert (len(learnt["order"]), learnt["total"]) == (3, 42)


def test_tokenize_samples_without_the_student(toy_run):
    """Where the student's folder is gone its samples are shown as texts."""
    for folder in (toy_run / "models" / "B_toy_student").glob("D_*"):
        shutil.rmtree(folder)
    data = write_page(toy_run)
    learnt = next(iter(data["training"].values()))
    assert "no tokens" in learnt["note"]
    assert len(learnt["texts"]) == learnt["size"]


def test_token_texts_of_bytes():
    """A token is what it reads; half a letter is the tokenizer's name of it."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(" aé")["input_ids"]
    texts = training_data.token_texts(tokenizer, set(ids))
    assert [texts[token] for token in ids] == [" ", "a", "Ã", "©"]


# ---- in a browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Return a function: (page, what its address asks for) -> the page as the browser has it."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("no chromium: apt-get install chromium")
    profile = tmp_path_factory.mktemp("profile")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]

    def dump(path: Path, address: str = "") -> str:
        """Return the document after its script has run."""
        where = [f"--user-data-dir={profile}", "--dump-dom", f"{path.as_uri()}#{address}"]
        command = [program, *flags, *where]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        return done.stdout.decode()

    return dump


def counts(document: str) -> dict[str, int]:
    """Return the count on each filter, and the rows that are shown."""
    found = re.findall(r'id="filter-(\w+)"[^>]*>[^<]*<b>([\d,]+)<', document)
    shown = re.search(r'id="count"[^>]*>([\d,]+) of', document)
    return {name: int(n.replace(",", "")) for name, n in [*found, ("shown", shown[1])]}


def test_browser_counts(two_runs, browser):
    """The filters count what the runs are made of."""
    write_page(two_runs)
    document = browser(two_runs / "page.html", "run=0&other=1&filter=wrong")
    expected = {"all": 10, "right": 7, "wrong": 2, "unreadable": 1, "disagree": 0}
    assert counts(document) == expected | {"changed": 8, "gained": 5, "lost": 3, "shown": 2}


def test_browser_searches(two_runs, browser):
    """A word is searched in the questions, without regard to case, under a filter."""
    data = write_page(two_runs)
    rows = [row for row in data["runs"][0]["rows"] if row[5] == 0]
    asked = [data["questions"]["toy"][str(row[0])][0] for row in rows]
    expected = sum("Ann keeps" in question for question in asked)
    document = browser(two_runs / "page.html", "run=0&filter=right&q=aNN%20kEEPS")
    assert counts(document)["shown"] == expected


def test_browser_shows_hostile_text_as_text(report_toy, tmp_path, browser):
    """Markup in a completion is shown, not run, and the answer in it is marked."""
    path = answers_file(tmp_path, lambda i, k: True)
    content = storage.read_json(path)
    for [row] in content["data"].values():
        row["completion"] = HOSTILE
    storage.write_json(path, content)
    write_page(tmp_path)
    document = browser(tmp_path / "page.html")
    assert "<title>Toy Coins: Fine-tune-CoT</title>" in document
    assert html.escape("<b>bold</b>") in document
    assert re.search(r"<mark[^>]*>no</mark>", document)


def test_browser_lists_many_by_a_window(report_toy, tmp_path, browser):
    """Of 10,000 completions a few dozen are elements; the page is there within 2 seconds."""
    answers_file(tmp_path, lambda i, k: k % 3 > 0, many=1000)
    data = write_page(tmp_path)
    document = browser(tmp_path / "page.html")
    assert len(data["runs"][0]["rows"]) == counts(document)["shown"] == 10_000
    assert document.count('class="row"') < 60
    assert int(re.search(r'data-ready="(\d+)"', document)[1]) < 2000


def test_browser_tells_prompt_and_label_apart(toy_run, browser):
    """Tokens of a training sample carry their id and whether they are prompt or label."""
    write_page(toy_run)
    document = browser(toy_run / "page.html", "view=training&filter=kept")
    assert re.search(r'data-id="id \d+ · prompt 1"', document)
    assert re.search(r'data-id="id \d+ · label 1"', document)


def test_browser_results(toy_run, browser):
    """The table has a row a run; loss and accuracy have a curve each."""
    write_page(toy_run)
    document = browser(toy_run / "page.html", "view=results")
    assert document.count("<tr aria-current") == 3
    assert "Training loss, mean" in document
    assert "exact McNemar test: p = " in document


def test_gather_a_run_whose_tokenizer_is_broken(toy_run, capsys):
    """Its completions are shown without its training."""
    folder = toy_run / "models" / "B_toy_student" / "D_toy__T_ft"
    (folder / "tokenizer.json").write_text("{")
    data = write_page(toy_run)
    assert [run["training"] is None for run in data["runs"]] == [True, False, True]
    assert "not on the page: training of " in capsys.readouterr().err


def after_keys(browser, folder: Path, keys: str) -> str:
    """Return the written page as it is after these keys."""
    path = folder / "page.html"
    press = "document.dispatchEvent(new KeyboardEvent('keydown', {key}))"
    script = f"<script>for (const key of {json.dumps(list(keys))}) {press};</script></body>"
    path.write_text(path.read_text().replace("</body>", script))
    return browser(path, "run=0&other=1")


def test_browser_keys_move(two_runs, browser):
    """j is the next question, k the one before."""
    write_page(two_runs)
    document = after_keys(browser, two_runs, "jjk")
    rows = re.findall(r'<button class="row"[^>]*>', document)
    assert [i for i, row in enumerate(rows) if 'aria-current="true"' in row] == [1]


@pytest.mark.parametrize(
    "key, expected",
    [
        ("3", 'aria-pressed="true" id="filter-wrong"'),
        ("?", '<dialog id="help" open'),
        ("t", 'aria-current="true">Training<'),
        ("c", '<option value="1" selected="">m ft_cot_s1'),
    ],
)
def test_browser_keys(two_runs, browser, key, expected):
    """Keys filter, help, change the view and exchange the runs."""
    write_page(two_runs)
    assert expected in after_keys(browser, two_runs, key)
