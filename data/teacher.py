"""Ask a teacher through the OpenAI API, or any server that speaks it (vLLM, llama.cpp, Ollama, transformers serve).

Each completion is written to a journal beside the completion file before anything else happens to it, under a key that says
what was asked; whatever ends a run, the next one asks only for keys that are not there.  The completion file is made from the
journal when all is there.  The API key comes from OPENAI_API_KEY alone.  (saved/README.md: the files; README.md: how to use it.)

    sample -> fill -> worker -> ask -> attempt (the one retry loop) -> record (the journal) -> publish (the completion file)

data/batch.py asks through the Batch API instead, over the same journal, and has OpenAI-style students fine-tuned.
"""
import asyncio
import functools
import gc
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import evaluate
import tasks
from data.api import BadReply, Failed, Run, Stopped, attempt, base_url, check_journal, dollars, fail, has_api, most_tokens, read_reply, record, totals
from data import files
from data.files import UserError

API_FAMILIES = {"gpt3": "openai", "chat": "chat"}  # label styles of students behind an API
ENDPOINTS = {"chat": "/chat/completions", "completions": "/completions"}


# ---------------- Flags

def add_flags(parser):
    """How a teacher is asked.  The API key is not among them: a flag could be read in `ps`."""
    teaching = parser.add_argument_group("teaching (paper §3, step 1)")
    teaching.add_argument("--teacher_method", nargs="+", choices=["zs", "zs_cot", "zs_cot_one_step", "fs_cot"], default="zs_cot",
                          help="how the teacher is prompted (default zs_cot, two steps; one step costs less; zs: no rationale)")
    teaching.add_argument("--degree", nargs="+", type=int, help="D, rationales a question: diverse reasoning (default 1; toy 2; paper 1 to 64)")
    teaching.add_argument("--temperature", type=float, help="of the teacher (default 0; toy 0.7; paper 0, and 0.7 where D > 1)")
    teaching.add_argument("--teacher_max_new_tokens", type=int, default=128, help="tokens a rationale (default 128, the paper's)")
    api = parser.add_argument_group("API teachers (key: OPENAI_API_KEY in the environment)")
    api.add_argument("--base_url", help="server to ask, e.g. http://127.0.0.1:8000/v1 (default OPENAI_BASE_URL, or OpenAI)")
    api.add_argument("--api", choices=list(ENDPOINTS), default="chat",
                     help="chat (default), or completions: raw prompts, the paper's strings")
    api.add_argument("--teacher_part", choices=["all", "train"], default="all",
                     help="questions of --split to ask: all (default), or train alone: it costs less and is all a student needs")
    api.add_argument("--choices", type=int, default=1, help="rationales asked for in one request, its prompt paid once (default 1)")
    api.add_argument("--concurrency", type=int, default=16, help="requests under way at once (default 16)")
    api.add_argument("--requests_per_minute", type=float, default=0, help="default 0: no limit of ours")
    api.add_argument("--tokens_per_minute", type=float, default=0, help="default 0: no limit of ours")
    api.add_argument("--attempt_timeout", type=float, default=120, help="seconds an attempt may take in all (default 120)")
    api.add_argument("--max_attempts", type=int, default=6, help="attempts a request, then it is recorded as failed (default 6)")
    api.add_argument("--no_temperature", action="store_true", help="send no temperature: some reasoning models refuse it")
    api.add_argument("--legacy_max_tokens", action="store_true", help="for chat servers that know only max_tokens (llama.cpp)")
    api.add_argument("--dry_run", action="store_true", help="with --stage sample: say what it would cost; --task all: every benchmark")
    api.add_argument("--price_in", type=float, help="dollars a million prompt tokens (of the Batch API, where you use it)")
    api.add_argument("--price_out", type=float, help="dollars a million completion tokens")
    api.add_argument("--max_cost", type=float, help="stop before a completion file costs more dollars than this, earlier runs included")
    api.add_argument("--batch", choices=["submit", "status", "fetch"], help="with --stage sample: use the Batch API, step by step")


def check(args):
    """Refuse flags that cannot work, before anything is asked.  Raises UserError."""
    for name in ("choices", "concurrency", "attempt_timeout", "max_attempts"):
        if not 0 < getattr(args, name) <= 1000:
            raise UserError(f"--{name} {getattr(args, name)} must be above 0, and 1000 at most")
    for name in ("requests_per_minute", "tokens_per_minute", "price_in", "price_out", "max_cost"):
        if not 0 <= (getattr(args, name) or 0) < 10**9:
            raise UserError(f"--{name} {getattr(args, name)} must be 0 or more, and below a billion")
    if (args.price_in is None) != (args.price_out is None) or args.max_cost is not None and args.price_in is None:
        raise UserError("prices come in pairs, and --max_cost needs them: give --price_in and --price_out, dollars a million tokens")
    if (args.dry_run or args.batch) and args.stage != "sample" or args.dry_run and args.batch:
        raise UserError("--dry_run and --batch go with --stage sample, one at a time")
    if (args.dry_run or args.batch) and not is_elsewhere(args):
        raise UserError("--dry_run and --batch are for teachers behind an API: name one with --teacher")
    if args.label_style in API_FAMILIES and args.stage not in ("sample", "curate") and not has_api(args):
        raise UserError(f"--label_style {args.label_style} makes files for the API, not for a student here: use it with --stage curate, "
                        "or set OPENAI_API_KEY or --base_url to have the student trained there")
    url = urlsplit(base_url(args) or "https://")
    if url.scheme not in ("http", "https") or base_url(args) and not url.hostname:
        raise UserError("the base URL must begin with http:// or https:// and a host, like http://127.0.0.1:8000/v1")
    if url.username or url.password:
        raise UserError("the base URL must hold no name and no password: put the key into OPENAI_API_KEY")
    if url.scheme == "http" and url.hostname not in ("localhost", "::1") and not url.hostname.startswith("127."):
        print(f"warning: plain http to {url.hostname}: the key and all texts travel unencrypted; use https", file=sys.stderr)


# ---------------- What is asked, and under which key

class Plan(NamedTuple):
    """What is asked of whom."""
    model: str
    api: str              # a key of ENDPOINTS
    template: str         # of tasks.TEMPLATES; zs_cot takes two steps
    family: str
    max_new_tokens: int
    temperature: float | None = 0.0     # None: not sent
    degree: int = 1       # completions a question
    choices: int = 1      # of them a request
    legacy_max_tokens: bool = False
    examples: str = ""    # of fs_cot


class Request(NamedTuple):
    sample_index: int
    step: int             # 1, or 2: the answer after the rationale
    keys: dict            # {completion_index: key} of what it asks for
    body: dict

    @property
    def key(self):
        return next(iter(self.keys.values()))


def stop_strings(plan):
    """Where a completion ends: few-shot examples teach a base model to go on with a next question; the paper's labels end in END."""
    return ["\nQ:"] if plan.template == "fs_cot" else [" END"] if plan.family == "openai" and plan.template.startswith("ft") else []


@functools.lru_cache
def parameters(plan, step):
    """-> (what every request of a step sends besides its text, the same as JSON)."""
    temperature = plan.temperature if step == 1 or plan.temperature is None else 0.0  # the answer is read off greedily
    limit = "max_completion_tokens" if plan.api == "chat" and not plan.legacy_max_tokens else "max_tokens"
    fixed = {"model": plan.model, limit: plan.max_new_tokens} | ({"temperature": temperature} if temperature is not None else {})
    fixed |= {"stop": stop_strings(plan)} if plan.api == "completions" and stop_strings(plan) and step == 1 else {}
    return fixed, json.dumps([plan.api, fixed], sort_keys=True)


def conversation(plan, prompt, reasoning):
    """-> the texts of Zero-shot-CoT's second step (paper §3, step 1), which goes on after the reasoning; chat models take it in turns."""
    return [prompt, reasoning, tasks.COT_ANSWER.strip()] if plan.api == "chat" else [prompt + reasoning + tasks.COT_ANSWER]


def request_body(plan, step, texts):
    """-> the body of a request for one choice."""
    if plan.api == "completions":
        return {**parameters(plan, step)[0], "prompt": texts[0]}
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), texts)]
    return {**parameters(plan, step)[0], "messages": messages}


def prompt_of(plan, sample):
    return tasks.format_sample(plan.template, plan.family, sample["question"], examples=plan.examples)[0]


def key_of(plan, step, texts, sample_index, k):
    """-> what names a completion: 20 hex digits of all that is asked, for which sample, its number and its step."""
    asked = "\0".join([parameters(plan, step)[1], *texts, f"{sample_index} {k} {step}"])
    return hashlib.sha256(asked.encode()).hexdigest()[:20]


def goes_on(row):
    """Whether step 2 makes sense: a rationale that was cut, filtered or refused has no answer to read off."""
    return row["finish_reason"] == "stop" and bool((row["completion"] or "").strip())


def steps_of(plan, rows, sample, k):
    """-> [(key, texts)] of completion k of a sample: step 1 and, once the journal's rows {key: row} hold its rationale, step 2."""
    index, texts = sample["sample_index"], [prompt_of(plan, sample)]
    steps = [(key_of(plan, 1, texts, index, k), texts)]
    first = rows.get(steps[0][0])
    if plan.template == "zs_cot" and first and goes_on(first):
        texts = conversation(plan, texts[0], first["completion"])
        steps.append((key_of(plan, 2, texts, index, k), texts))
    return steps


def next_requests(plan, rows, sample, ks):
    """-> the requests that completions ks of a sample need next; [] when all is there."""
    index, steps = sample["sample_index"], {k: steps_of(plan, rows, sample, k) for k in ks}
    missing = {k: first[0] for k, [first, *_] in steps.items() if first[0] not in rows}
    if missing:
        body = request_body(plan, 1, [prompt_of(plan, sample)]) | ({"n": len(missing)} if len(missing) > 1 else {})
        return [Request(index, 1, missing, body)]
    return [Request(index, 2, {k: key}, request_body(plan, 2, texts)) for k, [_, *second] in steps.items()
            for key, texts in second if key not in rows]


def all_units(plan, samples):
    """The queue: (sample, completion indices that one request may ask for)."""
    for sample in samples:
        for k in range(0, plan.degree, plan.choices):
            yield sample, range(k, min(k + plan.choices, plan.degree))


# ---------------- Workers

def make_rows(request_keys, sample_index, step, choices, usage, model, attempts, unanswered):
    """-> the journal's rows: one a choice; what the request as a whole cost stands in the first."""
    rows = [{"key": key, "sample_index": sample_index, "completion_index": k, "step": step, **choice, "model": model}
            for (k, key), choice in zip(request_keys.items(), choices)]
    rows[0] |= {"usage": usage, "attempts": attempts, "unanswered": unanswered}
    return rows


async def ask(run, request):
    """Ask for one request's completions and write them to the journal; a failure goes to the failures file."""
    import httpx2
    prompt, completion = most_tokens(request.body)
    cost, n = dollars(run.args, prompt, completion), len(request.keys)

    async def send():
        """One attempt; -> (choices, usage, model).  Raises BadReply where the server sent no answer."""
        response = await run.client.post(ENDPOINTS[run.plan.api], body=request.body, cast_to=httpx2.Response,
                                         options={"headers": {"X-Client-Request-Id": request.key}})
        try:
            reply = json.loads(response.content)
        except (ValueError, RecursionError):
            raise BadReply(f"a reply that is not JSON: {response.text[:200]!r}") from None
        return read_reply(reply, run.plan.api, n)

    try:
        (choices, usage, model), attempts, unanswered = await attempt(run, send, prompt / 4 + completion, cost)
    except Failed as e:
        run.failed_keys.add(request.key)
        return fail(run, request.key, request.sample_index, request.step, list(request.keys), e)
    rows = make_rows(request.keys, request.sample_index, request.step, choices, usage, model, attempts, unanswered)
    paid = dollars(run.args, usage["prompt_tokens"], usage["completion_tokens"]) if usage else cost
    if cost and not usage:
        rows[0]["possible_cost"] = cost
    run.requests, run.spent = run.requests + 1, run.spent + paid
    for k, count in (usage or {"usage_unknown": 1}).items():
        run.tokens[k] += count
    await record(run, rows)


async def worker(run, units):
    """Take the next unit from the queue that all workers share, and ask until nothing of it is missing but what failed."""
    try:
        for sample, ks in units:
            while requests := [r for r in next_requests(run.plan, run.journal.rows, sample, ks) if r.key not in run.failed_keys]:
                for request in requests:
                    await ask(run, request)
    except Stopped:
        pass


async def collect(args, plan, path, samples):
    """Ask, with many workers at once, for everything that the journal lacks; -> the finished Run."""
    gc.disable()  # 100,000 rows are read a third faster
    try:
        run = Run(args, plan, path)
        todo = [unit for unit in all_units(plan, samples) if next_requests(plan, run.journal.rows, *unit)]
    finally:
        gc.freeze()
        gc.enable()
    async with run:
        units, total, steps = iter(todo), len(samples) * plan.degree, 2 if plan.template == "zs_cot" else 1
        there = total - sum(len(ks) for _, ks in todo)
        asking = f"; asking {plan.model} for the rest" if todo else ""
        print(f"sample: {there} of {total} completions are in {run.journal.path}{asking}", flush=True)
        reporter = asyncio.create_task(report(run, lambda: f"{there + run.requests * plan.choices // steps} of {total} completions"))
        try:
            await asyncio.gather(*(worker(run, units) for _ in range(min(args.concurrency, len(todo)))))
        finally:
            reporter.cancel()
    return run


async def report(run, done):
    """A running line: every 10 seconds, or every second where someone looks on."""
    looked_at = sys.stderr.isatty()
    while True:
        await asyncio.sleep(1 if looked_at else 10)
        print(f"\r{done()}; {progress(run)}\033[K" if looked_at else f"{done()}; {progress(run)}",
              end="" if looked_at else "\n", file=sys.stderr, flush=True)


def progress(run):
    """failed, requests and their rate, tokens, dollars"""
    minutes, t = (time.monotonic() - run.started) / 60, run.tokens
    cost = f", ${run.spent:.4f}" if run.args.price_in is not None else ""
    unknown = f" and those of {t['usage_unknown']} requests that the server did not count" if t["usage_unknown"] else ""
    return (f"{len(run.failed_keys)} failed; {run.requests} requests, {run.requests / minutes:.0f} a minute; in all "
            f"{t['prompt_tokens']} prompt and {t['completion_tokens']} completion tokens{unknown}{cost}")


# ---------------- From the journal to the completion file

def make_completion(plan, sample, k, first, second=None):
    """-> one row of the completion file from the journal's rows of its steps (second: None where there is none)."""
    text, last = first["completion"] or "", second or first
    ends = [text.find(stop) for stop in stop_strings(plan) if stop in text]  # some servers leave the stop string in
    row = {"sample_index": sample["sample_index"], "completion_index": k, "question": sample["question"], "answer": sample["answer"],
           "prompt": prompt_of(plan, sample), "completion": text[:min(ends)] if ends else text,
           "finish_reason": "stop" if ends else first["finish_reason"]}
    if plan.template == "zs_cot":
        row |= {"reasoning_" + name: row[name] for name in ("prompt", "completion", "finish_reason")}
        row |= {"prompt": tasks.COT_ANSWER.strip() if plan.api == "chat" else row["prompt"] + text + tasks.COT_ANSWER,
                "completion": second and second["completion"] or "", "finish_reason": second and second["finish_reason"]}
    return row | {"api": plan.api, "model": last["model"]} | ({"refusal": last["refusal"]} if "refusal" in last else {})


def dataset(plan, samples, rows):
    """-> ({"<sample_index>": [row, ...]} of every completion whose steps are all in rows, the journal's rows behind it, missing)."""
    data, used, missing = {}, [], 0
    for sample in samples:
        for k in range(plan.degree):
            found = [rows.get(key) for key, _ in steps_of(plan, rows, sample, k)]
            if None in found:
                missing += 1
                continue
            used += found
            data.setdefault(str(sample["sample_index"]), []).append(make_completion(plan, sample, k, *found))
    return data, used, missing


def publish(path, metadata, plan, samples, rows):
    """Write the completion file from the journal, which keeps every row: so nothing is lost by writing over an older file."""
    data, used, missing = dataset(plan, samples, rows)
    if not data:
        raise UserError(f"{path.with_suffix('.journal.jsonl')} holds no completion that was asked for with these flags: use those of "
                        "--stage sample")
    settings = metadata["settings"] | {"missing": missing}
    files.write_json(path, {"metadata": metadata | {"settings": settings, "usage": totals(used)}, "data": data})
    print(f"sample: {len(samples)} questions x {plan.degree}" + (f", {missing} completions missing" if missing else "") + f" -> {path}")
    return path


def summarise(run, samples, task, rules):
    """Print what this run did, the share of correct completions so far, and a warning where sampling is not random; -> missing."""
    data, _, missing = dataset(run.plan, samples, run.journal.rows)
    rows = [row for many in data.values() for row in many]
    right = sum(tasks.judge(task, run.plan.template, row["completion"], row["answer"], rules).correct for row in rows)
    share = f"; {100 * right / len(rows):.1f}% of {len(rows)} are correct so far ({rules} rules)" if rows else ""
    print(f"sample: {progress(run)}{share}")
    text = "reasoning_completion" if run.plan.template == "zs_cot" else "completion"
    many = [[row[text] for row in rows] for rows in data.values() if len(rows) > 1]
    same = sum(len(set(texts)) == 1 for texts in many)
    if same and run.plan.temperature != 0:
        print(f"warning: all completions of {same} of {len(many)} questions are identical: does the server sample?  (transformers serve "
              "does only where the model's generation_config.json says do_sample: true)")
    return missing


def fill(args, plan, path, metadata, samples):
    """Write the completion file of an API model from the journal and from what is asked for now.  Raises UserError where some of
    it is missing at the end: what was answered is in the journal."""
    run, total = asyncio.run(collect(args, plan, path, samples)), len(samples) * plan.degree
    missing = summarise(run, samples, metadata["dataset_key"], args.rules or default_rules(plan.api))
    if isinstance(run.reason, KeyboardInterrupt):
        raise run.reason
    if run.reason:
        raise UserError(f"{run.reason} ({total - missing} of {total} completions are there, in {run.journal.path})")
    if missing:
        raise UserError(f"{missing} of {total} completions are missing, {len(run.failed_keys)} requests failed ({run.failures.path} says "
                        "why): start the same command again to ask for them, or go on without them from --stage curate")
    return publish(path, metadata, plan, samples, run.journal.rows)


# ---------------- Stage sample, for a teacher that is neither the toy nor a local model

def is_elsewhere(args):
    """Whether the teacher is neither the toy nor a local model: its completions lie in --saved, or come through the API."""
    return args.teacher != "toy" and not args.teacher.startswith("hf:")


def default_rules(api):
    """Chat models write their answers in sentences that the paper's rules often misread."""
    return "flexible" if api == "chat" else "paper"


def rules_of(args, metadata):
    """-> the rules that curate a completion file: --rules, or what suits the model that wrote it."""
    return args.rules or default_rules(metadata.get("settings", {}).get("api"))


def teacher_samples(args):
    train, test = tasks.load_split(args.task, args.split, args.data)
    samples = tasks.load(args.task, args.data)
    return [samples[i] for i in sorted(train + (test if args.teacher_part == "all" else []))]


def teacher_plan(args):
    examples = evaluate.few_shot_examples(args.task, args.data) if args.teacher_method == "fs_cot" else ""
    return Plan(args.teacher, args.api, args.teacher_method, "chat" if args.api == "chat" else "decoder", args.teacher_max_new_tokens,
                None if args.no_temperature else args.temperature, args.degree, args.choices, args.legacy_max_tokens, examples)


def with_settings(metadata, plan, samples):
    settings = {k: v for k, v in plan._asdict().items() if k not in ("family", "choices", "examples")}
    return metadata | {"settings": settings | {"examples": files.fingerprint(plan.examples), "samples": files.fingerprint(samples)}}


def sample(args, path, metadata):
    """The completion file of --teacher: as it is where a user put it there, else sampled through the API.

    Raises UserError where there is neither a file nor an API to ask."""
    journal = path.with_suffix(".journal.jsonl")
    ours = journal.exists() and journal.stat().st_size > 0
    if args.dry_run:
        return dry_run(args, path)
    if path.exists() and not (ours and has_api(args)):
        print(f"sample: using the completions of {args.teacher} at {path}")
        return path
    if not has_api(args):
        raise UserError(f"there are no completions of {args.teacher} for {args.task} at {path}: put the teacher's completion file there "
                        "(saved/README.md has the format), set OPENAI_API_KEY or --base_url to sample it through the API, or take a "
                        "local teacher, hf:NAME")
    plan, samples = teacher_plan(args), teacher_samples(args)
    if args.degree > 1 and plan.temperature == 0:
        raise UserError(f"--degree {args.degree} at --temperature 0 would buy {args.degree} identical rationales: use --temperature 0.7")
    metadata = with_settings(metadata, plan, samples)
    if path.exists() and files.is_current("sample", path, evaluate.read_completions(path, args.task)[0].get("settings"),
                                          metadata["settings"] | {"missing": 0}):
        return path
    if args.batch:
        from data import batch
        return batch.step(args, plan, path, metadata, samples)
    return fill(args, plan, path, metadata, samples)


def taken_up(file):
    """-> the journal in a file, to read only."""
    journal = files.Journal(file)
    journal.close()
    check_journal(journal)
    return journal


def publish_partial(args, path, metadata):
    """For --stage curate: where sampling is unfinished, write the completion file from what the journal holds, asking for nothing."""
    file = path.with_suffix(".journal.jsonl")
    old = evaluate.read_completions(path, args.task)[0].get("settings", {}) if path.exists() else {"missing": True}
    if not file.exists() or not (old.get("missing") or old.get("degree", args.degree) < args.degree):
        return
    plan, samples, journal = teacher_plan(args), teacher_samples(args), taken_up(file)
    publish(path, with_settings(metadata, plan, samples), plan, samples, journal.rows)


# ---------------- Dry run

def token_counter(student):
    """-> (texts -> tokens in all, how it counts): the tokenizer of a student's folder, or 4 characters a token."""
    file = Path(student) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(file))
        return lambda texts: sum(len(e.ids) for e in tokenizer.encode_batch(texts)), f"prompts counted by the tokenizer of {student}"
    return lambda texts: sum(map(len, texts)) // 4, "prompts at 4 characters a token"


def estimate(args, path, count):
    """-> (requests, prompt tokens, completion tokens) that a run would ask for; tokens of completions at their most."""
    plan, samples, file = teacher_plan(args), teacher_samples(args), path.with_suffix(".journal.jsonl")
    rows = taken_up(file).rows if file.exists() else {}
    texts, completions, answers = [], 0, 0
    for sample, ks in all_units(plan, samples):
        for request in next_requests(plan, rows, sample, ks) if rows else [Request(0, 1, dict.fromkeys(ks), {})]:
            second = len(request.keys) if plan.template == "zs_cot" else 0  # answers to read off, each in a request of its own
            texts += [prompt_of(plan, sample)] * ((request.step == 1) + second)
            completions, answers = completions + len(request.keys) * (request.step == 1) + second, answers + second
    return len(texts), count(texts) + answers * (plan.max_new_tokens + 8), completions * plan.max_new_tokens


def dry_run(args, path):
    """Print what would be asked and, given prices, cost.  --task all: of every benchmark that is prepared."""
    count, how = token_counter(args.student)
    everything = [0, 0, 0]
    for task in [task for task in tasks.TASKS if task != "toy"] if args.task == "all" else [args.task]:
        args.task = task
        try:
            numbers = estimate(args, path.with_name(f"D_{task}.json"), count)
        except UserError as e:
            print(f"dry run: {task} is left out: {e}")
            continue
        everything = [a + b for a, b in zip(everything, numbers)]
        print_estimate(args, task, *numbers)
    print_estimate(args, f"in all, {how}", *everything)


def print_estimate(args, what, requests, prompt, completion):
    cost = f", at most ${dollars(args, prompt, completion):,.2f}" if args.price_in is not None else ""
    print(f"dry run: {what}: {requests:,} requests, {prompt:,} prompt tokens and at most {completion:,} completion tokens{cost}")
