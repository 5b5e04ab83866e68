"""The method in one figure, drawn from a run: question, rationales, sample, student, accuracy.

    python evaluate.py plot method --out docs/method.svg     # of the default run in saved/

Every text in it is of that run.  It is an SVG that follows the reader's light or dark theme and
asks for no package.  A PNG of it, with any browser that has no window:

    chromium --headless --force-device-scale-factor=2 --window-size=860,HEIGHT \\
        --default-background-color=00000000 --screenshot=docs/method.png docs/method.svg
"""

from __future__ import annotations

import re
from collections import defaultdict
from html import escape
from pathlib import Path
from typing import NamedTuple

import completions
import storage
import tasks
from extras import page, training_data
from storage import UserError

# ---------------- What is drawn: one training question and one test question of a run


class Example(NamedTuple):
    """A training question, a rationale dropped for its answer, one that was kept, its sample."""

    question: str
    dropped: str
    dropped_answer: str
    kept: str
    prompt: str  # of the sample of the kept one
    label: str


class Story(NamedTuple):
    """The texts and numbers of the figure."""

    example: Example
    asked: str  # a question of the test
    completion: str  # the student's
    guessed: str  # what the student says that was fine-tuned on answers alone
    accuracies: dict[str, float]  # ft, ft_cot: %
    questions: int  # of the test
    random: float  # accuracy of a random guess, %


def tidy(text: str) -> str:
    """'Start : heads .' -> 'Start: heads.', as a student whose tokens are words writes it."""
    return re.sub(r" +([.,:;?!])", r"\1", " ".join(text.split()))


def find_runs(saved: str, data: str, task: str) -> dict[str, page.Record]:
    """Return {"ft": run, "ft_cot": run}, the first of each on a task.  Raises UserError."""
    how = page.Part(saved, data, "paper", False)
    found = {}
    for path in page.last_epochs(saved):
        metadata = completions.read_completions(path)[0]
        method = metadata.get("completion_key")
        if metadata["dataset_key"] != task or method not in ("ft", "ft_cot") or method in found:
            continue
        found[method] = page.describe_run(path, how) | {"path": path}
    if len(found) < 2:
        raise UserError(
            f"the figure needs a run of ft and ft_cot on {task} in {saved}: make them with "
            f"`python finetune_cot.py --task {task}`"
        )
    return found


def training_example(run: page.Record, saved: str, data: str) -> Example:
    """Return the shortest example of a run.  Raises UserError where it has none."""
    files = training_data.run_files(run["path"], run["metadata"], saved)
    if files.finetune_data is None:
        raise UserError(
            f"the fine-tuning file of {run['path']} is not there: run the command again"
        )
    curated = training_data.read_curated(files.finetune_data, run["task"], files.saved)
    train, _ = tasks.load_split(run["task"], run["split"], data)
    judged = training_data.judge_rationales(curated, run["task"], set(train), set())
    rows = defaultdict(list)
    for row in curated.rows:
        rows[row["sample_index"]].append(row)
    examples = []
    for i, marks in judged.items():
        example = example_of(rows[i], marks, curated.data)
        if example:
            examples.append(example)
    if not examples:
        raise UserError(f"no question of {files.finetune_data} has a kept and a wrong rationale")
    return min(examples, key=text_length)


def example_of(
    rows: list[completions.Completion], marks: list[list], data: storage.FinetuneData
) -> Example | None:
    """Return the example of one question, if there is one; marks: of its rationales."""
    dropped = None
    kept = None
    for row, mark in zip(rows, marks, strict=True):
        if mark[0]:
            kept = row
            position = mark[2]
        elif mark[1].startswith(training_data.WRONG_ANSWER):
            dropped = row
    if dropped is None or kept is None:
        return None
    return Example(
        question=kept["question"],
        dropped=tasks.rationale_of(dropped),
        dropped_answer=dropped["completion"],
        kept=tasks.rationale_of(kept),
        prompt=data["input"][position],
        label=data["label"][position],
    )


def text_length(texts: tuple[str, ...]) -> int:
    return sum(len(text) for text in texts)


def test_example(runs: dict[str, page.Record]) -> tuple[str, ...]:
    """Return (question, completion of ft_cot, completion of ft); ft_cot alone is right.

    The shortest of the test questions that are so.
    """
    guesses = {}
    for row in runs["ft"]["rows"]:
        guesses[row[0]] = row
    examples = []
    for row in runs["ft_cot"]["rows"]:
        guess = guesses.get(row[0])
        if row[5] == 0 and guess and guess[5] != 0:
            question, _ = runs["ft_cot"]["questions_of"][row[0]]
            examples.append((question, row[2], guess[2]))
    if not examples:
        raise UserError("there is no test question on which ft_cot alone is right")
    return min(examples, key=text_length)


def read_story(saved: str, data: str, task: str) -> Story:
    """Return the texts of the figure from what a run left in `saved`.  Raises UserError."""
    runs = find_runs(saved, data, task)
    example = training_example(runs["ft_cot"], saved, data)
    asked, completion, guess = test_example(runs)
    return Story(
        example=Example(*map(tidy, example)),
        asked=tidy(asked),
        completion=tidy(completion),
        guessed=tidy(guess),
        accuracies={method: run["accuracy"] for method, run in runs.items()},
        questions=runs["ft_cot"]["questions"],
        random=tasks.TASKS[task].random,
    )


# ---------------- Drawing

WIDTH = 860
COLUMNS = [(24, 250), (302, 253), (583, 253)]  # x, width
SIZE = 14  # of text, px
LINE = 20
PADDING = 14
STYLE = """
  text { font: 14px Helvetica, Arial, "Liberation Sans", sans-serif; fill: #26231e }
  .title { font-weight: bold; font-size: 13px } .soft { fill: #6f685d }
  .small { font-size: 12.5px } .right { fill: #1f6a45 } .wrong { fill: #a93f2b }
  .bold { font-weight: bold } .accent { fill: #2b5c8a }
  .ground { fill: #faf8f4 } .card { fill: #fff; stroke: #e0dad0 }
  .prompt { fill: #ecebe7; stroke: #dedbd3 } .label { fill: #dcebf9; stroke: #bdd6ee }
  .kept { fill: #e6f4ec; stroke: #b9dfc8 } .dropped { fill: #fbebe7; stroke: #eecac0 }
  .track { fill: #ecebe7 } .bar { fill: #2b5c8a } .pale { fill: #b5ac9d }
  .arrow { stroke: #8d8577; fill: none; stroke-width: 1.6 } .guess { stroke: #26231e }
  @media (prefers-color-scheme: dark) {
    text { fill: #e7e3da } .soft { fill: #a8a296 } .right { fill: #86d3a6 } .wrong { fill: #f29d89 }
    .accent { fill: #94c0ea } .ground { fill: #17181b } .card { fill: #212327; stroke: #3a3d43 }
    .prompt { fill: #2b2d32; stroke: #3d4046 } .label { fill: #1f3a55; stroke: #34597e }
    .kept { fill: #1b3527; stroke: #2f5a42 } .dropped { fill: #40241d; stroke: #6a3c31 }
    .track { fill: #2b2d32 } .bar { fill: #94c0ea } .pale { fill: #77716a }
    .guess { stroke: #e7e3da }
  }
"""
NARROW = set(" .,:;'|!ijltfrI()[]-")
WIDE = set("mwMW%@")


def text_width(text: str) -> float:
    """Return about how wide a text is in px, rather too much: no font is at hand to measure."""
    width = 0.0
    for letter in text:
        if letter in NARROW:
            width += 0.31
        elif letter in WIDE:
            width += 0.87
        elif letter.isupper():
            width += 0.7
        else:
            width += 0.57
    return width * SIZE


def wrap(text: str, width: float, most: int = 9) -> list[str]:
    """Break a text into lines of at most so many px, and at most so many lines."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > most:
        lines = [*lines[: most - 1], f"{lines[most - 1]} ..."]
    return lines


def element(tag: str, text: str = "", **attributes: object) -> str:
    """Return an SVG element: class_="card", text_anchor="end" -> class="card" text-anchor="end"."""
    written = [tag]
    for name, value in attributes.items():
        key = name.rstrip("_").replace("_", "-")
        written.append(f'{key}="{value}"')
    return f"<{' '.join(written)}>{escape(text)}</{tag}>"


def write(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    return element("text", text, x=x, y=y, class_=style, text_anchor=anchor)


class Box(NamedTuple):
    """A card of the figure."""

    title: str  # above it
    lines: list[tuple[str, str]]  # text, style
    ground: str  # a class of STYLE
    column: int  # the first and last of COLUMNS that it covers
    last_column: int

    @property
    def x(self) -> float:
        return COLUMNS[self.column][0]

    @property
    def width(self) -> float:
        x, width = COLUMNS[self.last_column]
        return x + width - self.x

    @property
    def height(self) -> float:
        return 2 * PADDING + LINE * len(self.lines) - 2


def make_box(
    title: str, text: str, ground: str, column: int, last_column: int | None = None
) -> Box:
    """Return a card of a wrapped text; more lines can be appended."""
    if last_column is None:
        last_column = column
    box = Box(title, [], ground, column, last_column)
    for line in wrap(text, box.width - 2 * PADDING):
        box.lines.append((line, ""))
    return box


def draw_box(box: Box, y: float, height: float) -> list[str]:
    """Draw a card and its title above it."""
    title = write(box.x, y - 9, box.title, "title")
    size = {"width": box.width, "height": height}
    card = element("rect", x=box.x, y=y, **size, rx=9, class_=box.ground)
    parts = [title, card]
    baseline = y + PADDING + 13
    for line, style in box.lines:
        parts.append(write(box.x + PADDING, baseline, line, style))
        baseline += LINE
    return parts


def arrow_right(x: float, y: float, length: float = 18) -> str:
    path = f"M{x} {y}h{length}m-5 -5l5 5l-5 5"
    return element("path", d=path, class_="arrow")


def arrow_down(x: float, y: float, length: float = 37) -> str:
    path = f"M{x} {y}v{length}m-5 -5l5 5l5 -5"
    return element("path", d=path, class_="arrow")


BARS = {  # method: what the figure calls it, the style of its bar
    "ft": ("answers alone (ft)", "pale"),
    "ft_cot": ("rationales (ft_cot)", "bar"),
}


def draw_bars(story: Story, box: Box, y: float) -> list[str]:
    """Draw the accuracies of both students as bars in a card, with a random guess."""
    parts = []
    left = box.x + PADDING
    full = box.width - 2 * PADDING
    top = y + PADDING + 2
    for method, (name, style) in BARS.items():
        share = story.accuracies[method]
        parts.append(write(left, top + 11, name, "small"))
        parts.append(write(left + full, top + 11, f"{share:.1f}%", "bold", "end"))
        place = {"x": left, "y": top + 18, "height": 13, "rx": 3}
        parts.append(element("rect", **place, width=full, class_="track"))
        part = round(full * share / 100, 1)
        parts.append(element("rect", **place, width=part, class_=style))
        top += 50
    if story.random:
        at = left + full * story.random / 100
        bottom = top - 14
        ends = {"x1": at, "x2": at, "y1": y + PADDING + 18, "y2": bottom}
        parts.append(element("line", **ends, class_="guess", stroke_dasharray="2 3"))
        parts.append(write(at, bottom + 13, "a random guess", "small soft", "middle"))
    return parts


def make_rows(story: Story) -> list[list[Box]]:
    """Return the cards of the figure: three rows on a grid of three columns."""
    example = story.example
    question = make_box("1 · A training question", example.question, "card", 0)
    dropped = make_box("2 · A large teacher explains it", example.dropped, "dropped", 1)
    wrong = example.dropped_answer.rstrip(".")
    dropped.lines.append((f"✗ dropped: it ends in {wrong}", "wrong bold"))
    kept = make_box("... several times", example.kept, "kept", 2)
    kept.lines.append(("✓ kept: its answer is right", "right bold"))
    prompt = make_box("3 · What a small student reads", example.prompt, "prompt", 0)
    label = make_box("and what it learns to write", example.label, "label", 1, 2)
    label.lines.append(("the loss looks at these tokens alone", "soft"))
    asked = make_box("4 · A test question", story.asked, "prompt", 0)
    answer = make_box("5 · The student reasons by itself", story.completion, "label", 1)
    answer.lines.append((f"✓ right (ft says {story.guessed})", "right bold"))
    bars = make_box(f"6 · Right of {story.questions:,} test questions", "", "card", 2)
    bars.lines.extend([("", "")] * 5)  # room
    return [[question, dropped, kept], [prompt, label], [asked, answer, bars]]


def draw_rows(rows: list[list[Box]], story: Story) -> tuple[list[str], float]:
    """Draw the cards, and arrows from each to what is made of it; return them and the height."""
    parts = []
    tops = []
    y = 44
    for row in rows:
        height = max(box.height for box in row)
        for box in row:
            parts += draw_box(box, y, height)
        parts.append(arrow_right(COLUMNS[1][0] - 24, y + height / 2))
        tops.append(y)
        y += height + 48
    below_first = tops[1] - 43
    for x in (250, 710):  # the question becomes the prompt, the kept rationale the label
        parts.append(arrow_down(x, below_first))
    [_, answer, bars] = rows[2]
    middle = tops[2] + (y - 48 - tops[2]) / 2
    parts.append(arrow_right(answer.x + answer.width + 6, middle))
    parts += draw_bars(story, bars, tops[2])
    return parts, y - 24


def draw_method(story: Story) -> str:
    """Return the figure as SVG."""
    parts, height = draw_rows(make_rows(story), story)
    size = f'width="{WIDTH}" height="{height:g}"'
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" {size}'
    name = element("title", "Fine-tune-CoT: question, rationales, sample, student")
    style = f"<style>{STYLE}</style>"
    ground = element("rect", width=WIDTH, height=height, rx=12, class_="ground")
    body = "\n".join([name, style, ground, *parts])
    return f'<svg {head} role="img">\n{body}\n</svg>\n'


def plot_method(out: str, saved: str, data: str, task: str) -> None:
    """Write the figure.  Raises UserError where there is no run, or out is no .svg."""
    if Path(out).suffix.lower() != ".svg":
        raise UserError(
            f"--out {out}: the method's figure is drawn as .svg (PNG: extras/figure.py)"
        )
    storage.write_atomic(out, draw_method(read_story(saved, data, task)))
    print(f"plot: the method, from a run on {task} in {saved} -> {out}")
