"""What the paper printed: data/paper_results.csv, beside which report.py and plot.py put runs."""

from __future__ import annotations

import csv
import re
from pathlib import Path

RESULTS_FILE = Path(__file__).parent.parent / "data" / "paper_results.csv"
METHODS = {  # our method: its name in RESULTS_FILE; in the order of the paper's tables
    "zs": "zero_shot",
    "zs_cot": "zero_shot_cot",
    "fs_cot": "few_shot_cot",
    "ft": "fine_tune",
    "ft_cot": "fine_tune_cot",
    "ft_cot diverse": "fine_tune_cot_diverse",
}
SIZES = {  # parameters of its students, in millions; of GPT-3's as the paper gives them
    "ada": 300,
    "babbage": 1300,
    "curie": 6700,
    "t5_small": 60,
    "t5_base": 220,
    "t5_large": 700,
    "flan_t5_small": 60,
    "flan_t5_base": 220,
    "flan_t5_large": 700,
    "gpt2": 124,
    "gpt2_medium": 355,
    "gpt2_large": 774,
}
Results = dict[tuple[str, str, str], float]  # {(model, method, task): accuracy in %}


def read_rows() -> list[dict[str, str]]:
    """Return the rows of RESULTS_FILE."""
    with open(RESULTS_FILE, newline="") as file:
        return list(csv.DictReader(file))


def read_results() -> Results:
    """Return the accuracies that the paper prints; those read from its figures are left out."""
    results = {}
    for row in read_rows():
        if row["kind"] == "printed":
            results[row["model"], row["method"], row["dataset"]] = float(row["accuracy"])
    return results


def model_name(name: str) -> str:
    """google/flan-t5-base, google-t5_t5-base -> flan_t5_base, t5_base: as in RESULTS_FILE"""
    name = re.sub(r"^(google|google-t5|openai-community)[_/]", "", name)
    if name.startswith("text-davinci"):
        return name
    return name.replace("-", "_")


def accuracy(
    results: Results, model: str, method: str, train_key: str | None, task: str
) -> float | None:
    """Return the accuracy of the same model, method and task on the default split, or None.

    The paper's diverse reasoning has 64 rationales a question on multiarith and svamp, 8 elsewhere
    (§4); another degree, learning rate or seed, which train_key names, is not in it.
    """
    degree = 8
    if task in ("multiarith", "svamp"):
        degree = 64
    name = METHODS.get(method, method)
    if train_key == f"ft_cot_{degree}aug":
        name = METHODS["ft_cot diverse"]
    elif train_key not in (None, "", "ft", "ft_cot"):
        return None
    if method == "zs_cot" and model.startswith("text-davinci"):
        name = "teacher_zero_shot_cot"
    return results.get((model_name(model), name, task))
