"""What runs are called in tables and figures: what they were made with, in words.

ft_cot_2aug_few_shot_32_s1 -> 'ft_cot, D = 2, few-shot 32, seed 1'
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import provenance
from extras import runs
from extras.runs import NOT_RECORDED, RunKey

USUAL = {"degree": "1", "split": "default", "seed": "0"}  # named wherever a run has another value
USUAL |= {"teacher_method": "zs_cot", "label_style": "token", "rationale": "content"}
USUAL |= {name: str(value) for name, (value, _) in provenance.CURATION.items()}
USUAL |= {"validation": "0.0"}
# named wherever the rows of a model and method do not all agree
COMPARED = ("degree", "split", "seed", "teacher", "lr", "batch_size", "epochs")


def in_words(name: str, value: str) -> str:
    """('degree', '2') -> 'D = 2'; ('split', 'few_shot_32') -> 'few-shot 32'; else 'lr 0.001'"""
    if name == "degree":
        return f"D = {value}"
    if name == "split" and value.startswith("few_shot_"):
        size = value.removeprefix("few_shot_")
        return f"few-shot {size}"
    spaced = name.replace("_", " ")
    if value == "True":
        return spaced
    return f"{spaced} {value}"


def is_usual(name: str, value: str) -> bool:
    """Tell whether a setting need not be named even where rows differ in it: 'filter right'."""
    return name not in COMPARED and USUAL.get(name) == value


def named_values(key: RunKey) -> dict[str, str]:
    """Return {name: value} of everything that a row is known by."""
    values = {}
    for name, value in key._asdict().items():
        values[name] = str(value)
    del values["flags"]
    del values["data"]
    values["seeds"] = " ".join(key.seeds)
    values |= dict(key.flags)
    values |= dict(key.data)
    return values


def setting_words(key: RunKey, varied: Iterable[str]) -> list[str]:
    """Return the settings of a row that are unusual, or of COMPARED and vary between rows."""
    values = named_values(key)
    if key.seeds:
        del values["seed"]  # a mean has none
    compared = [name for name in COMPARED if name in varied]
    words = []
    for name in dict.fromkeys([*USUAL, *COMPARED]):
        if name not in values:
            continue
        value = values[name]
        usual = USUAL.get(name, value)
        if name in compared or value != usual:
            words.append(in_words(name, value))
    return words


def row_label(key: RunKey, varied: Iterable[str] = ()) -> str:
    """'ft_cot, D = 2, last epoch', 'zs_cot, all questions': a row's name where that is enough."""
    parts = [key.method, *setting_words(key, varied)]
    if key.part == "all":
        parts.append("all questions")
    if key.samples > 1:
        parts.append(f"{key.samples} samples a question")
    if key.epoch:
        parts.append(key.epoch)
    if key.vote:
        parts.append(key.vote)
    if key.seeds:
        parts.append(f"mean of {len(key.seeds)} seeds")
    return ", ".join(parts)


Labels = dict[RunKey, str]
Described = dict[RunKey, dict[str, str]]  # {row: {name: value}}


def describe(described: Described, names: list[str]) -> Labels:
    """Return of each row ', lr 0.001, seed 1': what these names are there."""
    texts = {}
    for key, values in described.items():
        text = ""
        for name in names:
            value = values.get(name, NOT_RECORDED)
            words = in_words(name, value)
            text += f", {words}"
        texts[key] = text
    return texts


def differences(keys: list[RunKey]) -> Labels:
    """Return of each row ', schedule cosine': the names in which not all rows agree.

    What the files are called is one of these only where the settings do not tell the rows apart.
    """
    described = {key: named_values(key) for key in keys}
    values = list(described.values())
    varied = runs.varied_names(values)
    settings = [name for name in varied if name != "train_key"]
    texts = describe(described, settings)
    different = set(texts.values())
    if len(different) == len(keys):
        return texts
    return describe(described, varied)


def row_labels(keys: Iterable[RunKey]) -> Labels:
    """Label rows; of rows of a model that would read the same, name what differs.

    zs on two splits -> 'zs, split default' and 'zs, split template'
    """
    methods = defaultdict(list)
    for key in keys:
        methods[key.model, key.method].append(key)
    labels = {}
    for of_method in methods.values():
        known = [named_values(key) for key in of_method]
        varied = runs.varied_names(known)
        namesakes = defaultdict(list)
        for key in of_method:
            label = row_label(key, varied)
            namesakes[label].append(key)
        for label, same in namesakes.items():
            more = differences(same)
            for key in same:
                labels[key] = label + more[key]
    return labels


def run_name(key: RunKey) -> str:
    """Return what the files of a run are called; "" where that is its method alone."""
    name = key.train_key or ""
    if name == key.method:
        return ""
    return name
