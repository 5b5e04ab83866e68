"""What the flags of finetune_cot.py mean: what is refused, what is asked, how files are named.

Functions here and in finetune_cot.py are the only ones that take `args`, the parsed flags of one
run; the flags themselves are in parser.py.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import chats
import completions
import curation
import provenance
import servers
import storage
import tasks
import teacher
from api import ApiConfig
from completions import SamplingConfig
from jobs import RemoteJob
from parser import make_parser
from provenance import CURATION, check_redo
from storage import UserError, completion_path, model_key, safe_key
from tasks import API_FAMILIES, FINE_TUNED, Benchmark

# The defaults that depend on the task
PAPER = {"teacher": "text-davinci-002", "student": "gpt2", "degree": 1, "temperature": 0.0}
PAPER |= {"epochs": 20, "batch_size": 8, "lr": 3e-4, "schedule": "constant", "warmup": 0}
PAPER |= {"max_new_tokens": 512}
TOY = {"teacher": "toy", "student": "toy", "degree": 2, "temperature": 0.7}
TOY |= {"epochs": 2, "batch_size": 8, "lr": 4e-3, "schedule": "linear", "warmup": 50}
TOY |= {"max_new_tokens": 64}


def parse_args(argv: list[str] | None = None, description: str = "") -> list[Namespace]:
    """Parse the command line into the flags of each run: of one, or of a grid (extras/studies.py).

    A grid is --study NAME, --task all, or a flag that was given several values.
    """
    if argv is None:
        argv = sys.argv[1:]
    parser = make_parser(description, show_all="--help-all" in argv)
    args = parser.parse(argv)
    if args.study or is_grid(args):
        from extras import studies

        runs = []
        for line in studies.command_lines(argv):
            runs += studies.expand(parser.parse(line))
    else:
        runs = [with_single_values(args)]
    return [with_defaults(run) for run in runs]


def is_grid(args: Namespace) -> bool:
    for name, value in vars(args).items():
        has_several = isinstance(value, list) and len(value) > 1
        if has_several and name != "method":
            return True
    return args.task == ["all"] and not args.dry_run


def with_single_values(args: Namespace) -> Namespace:
    """Turn each list of one value into the value; --method stays a list."""
    values = vars(args).copy()
    for name, value in values.items():
        if isinstance(value, list) and name != "method":
            values[name] = value[0]
    return Namespace(**values)


def pick(args: Namespace, names: Iterable[str]) -> dict:
    """Return {name: value} of some flags."""
    return {name: getattr(args, name) for name in names}


def usual_flags(args: Namespace) -> dict:
    """Return the defaults of the task; the names of files leave out what is usual."""
    if args.task == "toy" and not args.finetune_data:
        return TOY
    return PAPER


def with_defaults(args: Namespace) -> Namespace:
    """Fill in the defaults that depend on other flags."""
    for name, value in usual_flags(args).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.micro_batch_size is None:
        args.micro_batch_size = args.batch_size
    if args.sample_degree is None:
        args.sample_degree = args.degree
    return args


# ---------------- What is refused before anything is computed

AT_LEAST_1 = """degree epochs batch_size micro_batch_size max_length max_new_tokens eval_batch_size
    eval_samples teacher_max_new_tokens keep""".split()
AT_LEAST_0 = """temperature weight_decay checkpoint_every checkpoint_steps eval_every seed data_seed
    micro_tokens warmup max_grad_norm log_every validation requests_per_minute tokens_per_minute
    price_in price_out max_cost max_rationale_words max_per_question show""".split()
UP_TO_1000 = "choices concurrency attempt_timeout max_attempts".split()


def check(args: Namespace) -> None:
    """Refuse flags that cannot work.  Raises UserError with one sentence."""
    if not (args.dry_run and args.task == "all"):
        tasks.find_task(args.task)
    model_key(args.teacher.removeprefix("hf:"))
    model_key(args.student)
    safe_key(args.split)
    safe_key(args.train_key or "none")
    check_numbers(args)
    check_training(args)
    check_curation(args)
    check_api(args)
    check_redo(args.redo, args.stage, args.label_style in API_FAMILIES)
    request_parameters(args)
    servers.check_base_url(base_url(args))


def check_numbers(args: Namespace) -> None:
    """Refuse numbers out of range, NaN included."""
    for name in AT_LEAST_1:
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be 1 or more")
    for name in AT_LEAST_0:
        value = getattr(args, name)
        if value is not None and not 0 <= value < 10**9:  # so that NaN is refused too
            raise UserError(f"--{name} {value} must be 0 or more, and below a billion")
    for name in UP_TO_1000:
        value = getattr(args, name)
        if not 0 < value <= 1000:
            raise UserError(f"--{name} {value} must be above 0, and 1000 at most")
    if not 0 < args.lr < 10:
        raise UserError(f"--lr {args.lr} must be above 0 and below 10")


def check_training(args: Namespace) -> None:
    """Refuse flags of training that contradict each other."""
    has_one_student = len(args.method) == 1
    if args.finetune_data and (args.stage != "train" or not (has_one_student or args.out)):
        raise UserError("--finetune_data goes with --stage train and --out DIR (or one --method)")
    if (args.out or args.train_key) and not (has_one_student or args.finetune_data):
        raise UserError("--out and --train_key are of one student: name one --method")
    if args.keep_best and not args.eval_every:
        raise UserError("--keep_best compares epochs: say how often with --eval_every 1")
    if args.shard != "no" and args.eval_every:
        raise UserError(
            "--shard spreads the weights over the ranks while training, so it cannot be evaluated "
            "in between: leave out --eval_every"
        )


def check_curation(args: Namespace) -> None:
    """Refuse filters out of range, and a degree that would repeat one rationale."""
    if not 0 <= args.max_similarity <= 1:
        raise UserError(f"--max_similarity {args.max_similarity} must be from 0 to 1")
    if args.show and args.stage != "curate":
        raise UserError("--show goes with --stage curate")
    if args.degree > 1 and not args.temperature and not is_remote_teacher(args):
        raise UserError(
            f"--degree {args.degree} at --temperature 0 would give {args.degree} identical "
            "rationales: use --temperature 0.7"
        )


def check_api(args: Namespace) -> None:
    """Refuse incomplete prices, and API flags without an API."""
    has_prices = args.price_in is not None
    if has_prices != (args.price_out is not None) or (args.max_cost is not None and not has_prices):
        raise UserError(
            "prices come in pairs, and --max_cost needs them: give --price_in and --price_out, "
            "dollars a million tokens"
        )
    if (args.dry_run or args.batch) and (args.stage != "sample" or (args.dry_run and args.batch)):
        raise UserError("--dry_run and --batch go with --stage sample, one at a time")
    if args.stage == "sample":
        servers.check_given(vars(args), is_remote_teacher(args))
    needs_api = args.label_style in API_FAMILIES and args.stage not in ("sample", "curate")
    if needs_api and not has_api(args):
        raise UserError(
            f"--label_style {args.label_style} makes files for the API, not for a student here: "
            "use it with --stage curate, or set OPENAI_API_KEY or --base_url to have the student "
            "trained there"
        )


# ---------------- The API


def base_url(args: Namespace) -> str | None:
    return args.base_url or os.environ.get("OPENAI_BASE_URL") or None


def request_parameters(args: Namespace) -> dict:
    """Return what a request carries besides its text, of SamplingConfig's columns."""
    names = "api top_p reasoning_effort extra_body system extra_headers".split()
    return servers.read_parameters(**pick(args, names))


def has_api(args: Namespace) -> bool:
    return bool(os.environ.get("OPENAI_API_KEY", "").strip() or base_url(args))


def api_config(args: Namespace) -> ApiConfig:
    values = pick(args, ApiConfig._fields)
    values["base_url"] = base_url(args)
    return ApiConfig(**values)


def is_remote_teacher(args: Namespace) -> bool:
    """Tell whether the teacher's completions lie in --saved or come through an API."""
    return args.teacher != "toy" and not args.teacher.startswith("hf:")


def needs_torch(args: Namespace) -> bool:
    """Tell whether a run of these flags loads a model here."""
    if args.stage in ("all", "sample") and args.teacher.startswith("hf:"):
        return True
    return args.stage not in ("sample", "curate") and args.label_style not in API_FAMILIES


# ---------------- What is asked of whom


def teacher_plan(args: Namespace, is_chat: bool) -> SamplingConfig:
    """Return how the teacher is asked."""
    family = "decoder"
    if is_chat:
        family = "chat"
    temperature = args.temperature
    if args.no_temperature and is_remote_teacher(args):
        temperature = None
    return SamplingConfig(
        model=args.teacher,
        api=args.api,
        template=args.teacher_method,
        family=family,
        max_new_tokens=args.teacher_max_new_tokens or 128,  # the paper's
        temperature=temperature,
        degree=args.sample_degree,
        choices=args.choices,
        legacy_max_tokens=args.legacy_max_tokens,
        examples=few_shot_examples(args, args.teacher_method),
        task=args.task,
        is_teacher=True,
        **request_parameters(args),
    )


def remote_job(args: Namespace, task: str) -> RemoteJob:
    """Return what to ask of a teacher behind an API, of which questions, and for which file."""
    args = Namespace(**vars(args))
    args.task = task  # a dry run asks for every one
    benchmark = load_benchmark(args)
    indices = benchmark.train
    if args.teacher_part == "all":
        indices = sorted(benchmark.train + benchmark.test)
    samples = [benchmark.samples[i] for i in indices]
    path = teacher_file(args)
    plan = teacher_plan(args, is_chat=args.api == "chat")
    plan = teacher.with_limit(plan, samples, path, args.teacher_max_new_tokens)
    rules = args.rules or teacher.default_rules(plan.api)
    metadata = teacher_metadata(args)
    api = api_config(args)
    return RemoteJob(path, metadata, plan, samples, api, rules)


def remote_evaluation(args: Namespace, method: str, model: str) -> RemoteJob:
    """Return what to ask of a student behind an API: the questions of the test part."""
    family = API_FAMILIES[args.label_style]
    endpoint = "completions"
    if family == "chat":
        endpoint = "chat"
    plan = student_plan(args, method, family, model, endpoint)
    benchmark = load_benchmark(args)
    samples = [benchmark.samples[i] for i in benchmark.test]
    run = run_metadata(args, method, {"student": model})
    run["family"] = family
    run["questions"] = len(benchmark.train)
    metadata = student_metadata(args, method, plan.template, epoch=None)
    metadata["run"] = run
    metadata = teacher.with_settings(metadata, plan, samples)
    path = test_file(args, method, None)
    rules = args.rules or teacher.default_rules(plan.api)
    api = api_config(args)
    return RemoteJob(path, metadata, plan, samples, api, rules)


def chat_config(args: Namespace, stage: str, model: str, method: str) -> chats.ChatConfig | None:
    """Return how to chat with a model here, or None for plain prompts."""
    return chats.chat_config(stage, model, method, args.chat, args.thinking, args.system)


def decoding_options(args: Namespace) -> dict:
    """Return the arguments of decoding.generate that are flags."""
    options = pick(args, ["plain", "cuda_graphs"])
    options["batch_size"] = args.eval_batch_size
    return options


def few_shot_examples(args: Namespace, method: str) -> str:
    if method != "fs_cot":
        return ""
    return completions.few_shot_prompt(args.task, args.data)


def student_plan(
    args: Namespace, method: str, family: str, model: str, api: str = ""
) -> SamplingConfig:
    """Return how the student is asked: greedily, or --eval_samples times at a temperature."""
    temperature = 0.0
    if args.eval_samples > 1:
        temperature = args.eval_temperature
    return SamplingConfig(
        model=model,
        api=api,
        template=curation.student_template(method, args.label_style),
        family=family,
        max_new_tokens=args.max_new_tokens,
        temperature=temperature,
        degree=args.eval_samples,
        choices=args.eval_samples,
        examples=few_shot_examples(args, method),
    )


def student_family(args: Namespace) -> str:
    """Return what a student reads: decoder, encoder_decoder, openai or chat samples.

    A folder's config tells; of a hub name, which need not be downloaded for curation, the name.
    """
    if args.label_style in API_FAMILIES:
        return API_FAMILIES[args.label_style]
    if args.family:
        return args.family
    config = Path(args.student) / "config.json"
    if config.is_file():
        is_encoder_decoder = storage.read_json(config).get("is_encoder_decoder")
    else:
        is_encoder_decoder = re.search(r"t5|bart|pegasus", args.student.lower())
    if is_encoder_decoder:
        return "encoder_decoder"
    return "decoder"


def load_benchmark(args: Namespace, validation: float = 0.0) -> Benchmark:
    return tasks.load_benchmark(args.task, args.split, args.data, validation, args.data_seed)


def run_metadata(args: Namespace, method: str, made_with: dict) -> dict:
    """Return all flags that made a result: what tables and figures know a run by.

    Of what was learnt, the settings beside the files have the last word (provenance.py).
    """
    known = provenance.effective_flags(method, vars(args))
    if method in FINE_TUNED:
        note = curation.read_note(finetune_file(args, method))
        known = provenance.with_notes(known, made_with, note)
    elif args.student != "toy":
        known["student"] = made_with["student"]
    return known


# ---------------- Names of files (saved/README.md)

FINETUNE_FILES = {
    "decoder": "P_decoder/F_{}.json",
    "encoder_decoder": "P_encoder_decoder/F_{}.json",
    "openai": "P_openai/F_{}.jsonl",
    "chat": "P_openai/F_{}_chat.jsonl",
}


def curation_options(args: Namespace) -> dict:
    """Return {flag: value} of the flags of CURATION that differ from the paper."""
    options = pick(args, CURATION)
    for flag, (usual, _) in CURATION.items():
        if options[flag] == usual:
            del options[flag]
    return options


def teacher_key(args: Namespace) -> str:
    """Return zs_cot; zs_cot_t70 at temperature 0.7; zs_cot_t70_s1 of a local teacher's seed 1."""
    key = args.teacher_method
    if args.temperature:
        key += f"_t{round(100 * args.temperature)}"
    if args.data_seed and not is_remote_teacher(args):
        key += f"_s{args.data_seed}"
    return key


def teacher_name(args: Namespace) -> str:
    if args.teacher == "toy":
        return "toy_teacher"
    return model_key(args.teacher.removeprefix("hf:"))


def teacher_file(args: Namespace) -> Path:
    return completion_path(args.saved, teacher_name(args), teacher_key(args), args.task)


def teacher_metadata(args: Namespace) -> dict:
    """Return what the teacher's completion file says of itself."""
    return {
        "dataset_key": args.task,
        "base_model": teacher_name(args),
        "completion_key": teacher_key(args),
        "finetune_key": None,
        "train_key": None,
        "epoch": None,
        "prediction_template": args.teacher_method,
    }


def student_metadata(args: Namespace, method: str, template: str, epoch: int | None) -> dict:
    """Return what a student's completion file says of itself."""
    metadata = {
        "dataset_key": args.task,
        "base_model": model_key(args.student),
        "completion_key": method,
        "finetune_key": None,
        "train_key": None,
        "epoch": epoch,
        "prediction_template": template,
        "split": args.split,
        "part": "test",
    }
    if method in FINE_TUNED:
        metadata["finetune_key"] = finetune_key(args, method)
        metadata["train_key"] = train_key(args, method)
    return metadata


def run_suffix(args: Namespace, method: str) -> str:
    """Return what tells apart two curated files, or two students, of one task and method.

    ft_cot with --degree 8 --split few_shot_32: '_8aug_few_shot_32'.  ft knows no degree or teacher.
    """
    parts = []
    if method != "ft":
        if args.degree > 1:
            parts.append(f"{args.degree}aug")
        if args.teacher != usual_flags(args)["teacher"]:
            key = model_key(args.teacher.removeprefix("hf:"))
            parts.append(f"by_{key}")
        for flag, value in curation_options(args).items():
            _, form = CURATION[flag]
            parts.append(form.format(value))
    if args.split != "default":
        parts.append(args.split)
    if args.validation:
        share = f"v{args.validation:g}"
        if args.data_seed:
            share += f"s{args.data_seed}"  # it chooses the samples
        parts.append(share)
    return "".join(f"_{part}" for part in parts)


def finetune_key(args: Namespace, method: str) -> str:
    key = "ft"
    if method != "ft":
        key = teacher_key(args)
    suffix = run_suffix(args, method)
    return f"{key}_{args.task}{suffix}"


def finetune_file(args: Namespace, method: str, family: str = "") -> Path:
    """Return the fine-tuning file of a method, for students of a family, by default this one's."""
    form = FINETUNE_FILES[family or student_family(args)]
    key = safe_key(finetune_key(args, method))
    name = form.format(key)
    return Path(args.saved) / "finetune_data" / name


def train_key(args: Namespace, method: str) -> str:
    """Return --train_key, or the method and whatever is not usual in this training run."""
    if args.train_key:
        return safe_key(args.train_key)
    usual = usual_flags(args)
    key = method
    if args.label_style != "token":
        key += f"_{args.label_style}"
    if method != "ft":
        if args.teacher_method != "zs_cot":
            key += f"_{args.teacher_method}"
        usual_temperature = 0.0  # the paper's
        if args.degree > 1:
            usual_temperature = 0.7
        if args.temperature != usual_temperature:
            key += f"_t{round(100 * args.temperature)}"
    key += run_suffix(args, method)
    if args.lr != usual["lr"]:
        key += f"_lr{args.lr:g}"
    if args.batch_size != usual["batch_size"]:
        key += f"_b{args.batch_size}"
    if args.seed:
        key += f"_s{args.seed}"
    return safe_key(key)


def student_dir(args: Namespace, method: str) -> Path:
    if args.out:
        return Path(args.out)
    model = model_key(args.student)
    key = train_key(args, method)
    folder = Path(args.saved) / "models" / f"B_{model}"
    return folder / f"D_{args.task}__T_{key}"


def samples_suffix(args: Namespace) -> list[str]:
    """Return the part of a file name that tells K sampled answers a question from a greedy one."""
    if args.eval_samples == 1:
        return []
    percent = round(100 * args.eval_temperature)
    return [f"K_{args.eval_samples:02d}_t{percent}"]


def test_file(args: Namespace, method: str, epoch: int | None) -> Path:
    """Return the completion file of a student on the test questions.

    Of a fine-tuned one it names run and epoch, of an untrained one the split (and, as each seed
    makes another toy student and other sampled answers, the seed).
    """
    if method in FINE_TUNED:
        parts = [f"T_{train_key(args, method)}"]
        if args.label_style not in API_FAMILIES:
            parts.append(f"E_{epoch:03d}")
    else:
        parts = [f"S_{args.split}"]
        if args.seed and (args.student == "toy" or args.eval_samples > 1):
            parts[0] += f"_s{args.seed}"
    parts += samples_suffix(args)
    model = model_key(args.student)
    return completion_path(args.saved, model, method, args.task, *parts)


def job_file(args: Namespace, method: str) -> Path:
    """Return the file that keeps the ids of an API student's fine-tuning job."""
    model = model_key(args.student)
    data_key = finetune_key(args, method)
    key = train_key(args, method)
    folder = Path(args.saved) / "model_metadata" / f"B_{model}"
    return folder / f"F_{data_key}__T_{key}.json"
