"""Say what sampling a teacher would ask for and, given prices, cost: the flag --dry_run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import steps
import teacher
from api import ApiConfig
from completions import SamplingConfig, format_prompt
from jobs import RemoteJob
from storage import UserError


class Estimate(NamedTuple):
    """What a run would ask for; completions at their most."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


def dry_run(
    load_job: Callable[[str], RemoteJob], task_keys: Iterable[str], api: ApiConfig, student: str
) -> None:
    """Print an estimate for each task, and the total.  A task that cannot be loaded is left out."""
    count_tokens, how = token_counter(student)
    estimates = []
    for task in task_keys:
        try:
            job = load_job(task)
            found = estimate(job.plan, job.samples, job.path, count_tokens)
        except UserError as e:
            print(f"dry run: {task} is left out: {e}")
            continue
        estimates.append(found)
        print_estimate(task, found, api)
    columns = zip(*estimates, strict=True)
    sums = map(sum, columns)
    total = Estimate(*sums)
    print_estimate(f"in all, {how}", total, api)


def token_counter(student: str) -> tuple[Callable[[list[str]], int], str]:
    """Return a function from texts to their tokens in all, and a phrase that says how it counts.

    A student's folder has a tokenizer; else a token is taken for 4 characters.
    """
    file = Path(student) / "tokenizer.json"
    if not file.is_file():
        return count_characters, "prompts at 4 characters a token"
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    def count_tokens(texts: list[str]) -> int:
        encodings = tokenizer.encode_batch(texts)
        return sum(len(encoding.ids) for encoding in encodings)

    return count_tokens, f"prompts counted by the tokenizer of {student}"


def count_characters(texts: list[str]) -> int:
    characters = sum(map(len, texts))
    return characters // 4


def estimate(
    plan: SamplingConfig,
    samples: steps.Samples,
    path: Path,
    count_tokens: Callable[[list[str]], int],
) -> Estimate:
    """Count what a run would ask for, without what its journal has already.

    A rationale that is yet to come has its most tokens, and so has the prompt of its answer.
    """
    journal_path = path.with_suffix(".journal.jsonl")
    rows = {}
    if journal_path.exists():
        rows = teacher.read_journal(journal_path)
    prompts = []
    completions = 0
    answers = 0
    for sample, ks in steps.list_units(plan, samples):
        for request in steps.next_requests(plan, rows, sample, ks):
            prompt = format_prompt(plan, sample)
            if request.step == 1:
                prompts.append(prompt)
                completions += len(request.keys)
            if plan.template == "zs_cot":  # each answer is read off in a request of its own
                prompts += [prompt] * len(request.keys)
                answers += len(request.keys)
    longest = plan.max_new_tokens
    prompt_tokens = count_tokens(prompts) + answers * (longest + 8)
    completion_tokens = (completions + answers) * longest
    return Estimate(len(prompts), prompt_tokens, completion_tokens)


def print_estimate(name: str, estimate: Estimate, api: ApiConfig) -> None:
    """Print what a task would ask for and, with --price_in, cost at most."""
    requests, prompt_tokens, completion_tokens = estimate
    text = f"{requests:,} requests, {prompt_tokens:,} prompt tokens and at most "
    text += f"{completion_tokens:,} completion tokens"
    if api.price_in is not None:
        cost = api.dollars(prompt_tokens, completion_tokens)
        text += f", at most ${cost:,.2f}"
    print(f"dry run: {name}: {text}")
