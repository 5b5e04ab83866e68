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
    words = text.split()
    line = " ".join(words)
    return re.sub(r" +([.,:;?!])", r"\1", line)


def find_runs(saved: str, data: str, task: str) -> dict[str, page.Record]:
    """Return {"ft": run, "ft_cot": run}, the first of each on a task.  Raises UserError."""
    how = page.Part(saved, data, "paper", False)
    found = {}
    for path in page.last_epochs(saved):
        metadata, _ = completions.read_completions(path)
        method = metadata.get("completion_key")
        is_shown = metadata["dataset_key"] == task and method in BARS
        if is_shown and method not in found:
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
    task = run["task"]
    curated = training_data.read_curated(files.finetune_data, task, files.saved)
    train, _ = tasks.load_split(task, run["split"], data)
    judged = training_data.judge_rationales(curated, task, set(train), set())
    rows = defaultdict(list)
    for row in curated.rows:
        i = row["sample_index"]
        rows[i].append(row)
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
    for row, (is_kept, why, place) in zip(rows, marks, strict=True):
        if is_kept:
            kept = row
            position = place
        elif why.startswith(training_data.WRONG_ANSWER):
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
    """Return how many characters some texts have together."""
    return len("".join(texts))


def test_example(runs: dict[str, page.Record]) -> tuple[str, ...]:
    """Return (question, completion of ft_cot, completion of ft); ft_cot alone is right.

    The shortest of the test questions that are so.
    """
    right = page.OUTCOMES.index("right")
    guesses = {}  # of ft, that are not right
    for i, _, text, _, _, outcome, *_ in runs["ft"]["rows"]:
        if outcome != right:
            guesses[i] = text
    questions = runs["ft_cot"]["questions_of"]
    examples = []
    for i, _, text, _, _, outcome, *_ in runs["ft_cot"]["rows"]:
        if outcome == right and i in guesses:
            question, _ = questions[i]
            example = (question, text, guesses[i])
            examples.append(example)
    if not examples:
        raise UserError("there is no test question on which ft_cot alone is right")
    return min(examples, key=text_length)


def read_story(saved: str, data: str, task: str) -> Story:
    """Return the texts of the figure from what a run left in `saved`.  Raises UserError."""
    runs = find_runs(saved, data, task)
    example = training_example(runs["ft_cot"], saved, data)
    asked, completion, guessed = map(tidy, test_example(runs))
    return Story(
        example=Example(*map(tidy, example)),
        asked=asked,
        completion=completion,
        guessed=guessed,
        accuracies={method: run["accuracy"] for method, run in runs.items()},
        questions=runs["ft_cot"]["questions"],
        random=tasks.TASKS[task].random,
    )


# ---------------- Drawing

WIDTH = 860
COLUMNS = [(24, 250), (302, 253), (583, 253)]  # x, width
GAPS = (278, 561)  # x of what stands between columns
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
    lines = []
    line = ""
    for word in text.split():
        longer = f"{line} {word}".strip()
        if line and text_width(longer) > width:
            lines.append(line)
            line = word
        else:
            line = longer
    lines.append(line)
    if len(lines) > most:
        lines[most - 1] += " ..."
    return lines[:most]


def element(tag: str, text: str = "", **attributes: object) -> str:
    """Return an SVG element: class_="card", text_anchor="end" -> class="card" text-anchor="end"."""
    written = ""
    for name, value in attributes.items():
        bare = name.rstrip("_")
        key = bare.replace("_", "-")
        written += f' {key}="{value}"'
    return f"<{tag}{written}>{escape(text)}</{tag}>"


def write(x: float, y: float, text: str, style: str = "", anchor: str = "start") -> str:
    """Draw a line of text; anchor: what of it stands at x."""
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
    room = box.width - 2 * PADDING
    for line in wrap(text, room):
        box.lines.append((line, ""))
    return box


def draw_box(box: Box, y: float, height: float) -> list[str]:
    """Draw a card and its title above it."""
    place = {"x": box.x, "y": y, "width": box.width, "height": height, "rx": 9}
    parts = [
        write(box.x, y - 9, box.title, "title"),
        element("rect", **place, class_=box.ground),
    ]
    left = box.x + PADDING
    baseline = y + PADDING + 13
    for line, style in box.lines:
        parts.append(write(left, baseline, line, style))
        baseline += LINE
    return parts


TO_THE_RIGHT = "h18m-5 -5l5 5l-5 5"
DOWN = "v37m-5 -5l5 5l5 -5"


def arrow(x: float, y: float, shape: str) -> str:
    """Draw an arrow that begins at a point."""
    return element("path", d=f"M{x} {y}{shape}", class_="arrow")


BARS = {  # method: what the figure calls it, the style of its bar
    "ft": ("answers alone (ft)", "pale"),
    "ft_cot": ("rationales (ft_cot)", "bar"),
}


def draw_bars(story: Story, box: Box, y: float) -> list[str]:
    """Draw the accuracies of both students as bars in a card, with a random guess."""
    parts = []
    left = box.x + PADDING
    full = box.width - 2 * PADDING
    right = left + full
    baseline = y + PADDING + 13
    for method, (name, style) in BARS.items():
        share = story.accuracies[method]
        part = round(full * share / 100, 1)
        place = {"x": left, "y": baseline + 7, "height": 13, "rx": 3}
        parts += [
            write(left, baseline, name, "small"),
            write(right, baseline, f"{share:.1f}%", "bold", "end"),
            element("rect", **place, width=full, class_="track"),
            element("rect", **place, width=part, class_=style),
        ]
        baseline += 50
    if story.random:
        at = left + full * story.random / 100
        bottom = baseline - 25
        ends = {"x1": at, "x2": at, "y1": y + PADDING + 18, "y2": bottom}
        parts += [
            element("line", **ends, class_="guess", stroke_dasharray="2 3"),
            write(at, bottom + 13, "a random guess", "small soft", "middle"),
        ]
    return parts


def make_rows(story: Story) -> list[list[Box]]:
    """Return the cards of the figure: three rows on a grid of three columns."""
    example = story.example
    wrong = example.dropped_answer.rstrip(".")
    n = f"{story.questions:,}"
    question = make_box("1 · A training question", example.question, "card", 0)
    dropped = make_box("2 · A large teacher explains it", example.dropped, "dropped", 1)
    kept = make_box("... several times", example.kept, "kept", 2)
    prompt = make_box("3 · What a small student reads", example.prompt, "prompt", 0)
    label = make_box("and what it learns to write", example.label, "label", 1, 2)
    asked = make_box("4 · A test question", story.asked, "prompt", 0)
    answer = make_box("5 · The student reasons by itself", story.completion, "label", 1)
    bars = make_box(f"6 · Right of {n} test questions", "", "card", 2)
    notes = [
        (dropped, f"✗ dropped: it ends in {wrong}", "wrong bold"),
        (kept, "✓ kept: its answer is right", "right bold"),
        (label, "the loss looks at these tokens alone", "soft"),
        (answer, f"✓ right (ft says {story.guessed})", "right bold"),
    ]
    for box, note, style in notes:
        box.lines.append((note, style))
    bars.lines.extend([("", "")] * 5)  # room
    return [[question, dropped, kept], [prompt, label], [asked, answer, bars]]


def draw_rows(rows: list[list[Box]], story: Story) -> tuple[list[str], float]:
    """Draw the cards, and arrows from each to what is made of it; return them and the height."""
    parts = []
    y = 44
    for i, row in enumerate(rows):
        height = max(box.height for box in row)
        middle = y + height / 2
        bottom = y + height + 5
        for box in row:
            parts += draw_box(box, y, height)
        parts.append(arrow(GAPS[0], middle, TO_THE_RIGHT))
        if i == 0:  # the question becomes the prompt, the kept rationale the label
            parts.append(arrow(250, bottom, DOWN))
            parts.append(arrow(710, bottom, DOWN))
        elif i == 2:
            parts.append(arrow(GAPS[1], middle, TO_THE_RIGHT))
            parts += draw_bars(story, row[-1], y)
        y += height + 48
    return parts, y - 24


def draw_method(story: Story) -> str:
    """Return the figure as SVG."""
    rows = make_rows(story)
    parts, height = draw_rows(rows, story)
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
    story = read_story(saved, data, task)
    storage.write_atomic(out, draw_method(story))
    print(f"plot: the method, from a run on {task} in {saved} -> {out}")
