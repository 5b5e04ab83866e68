"""The command line of finetune_cot.py: the flags, what is refused, and the file names that follow.

Standard library alone, so that `--help` answers at once.  A flag's name is also its name in
settings, in log.jsonl and in train_loop.TrainConfig.  Functions here and in finetune_cot.py are the
only ones that take `args`, the parsed flags of one run.
"""

import argparse
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import tasks
from storage import UserError, completion_path, model_key, safe_key
from tasks import API_FAMILIES, FINE_TUNED, PROMPTED

USAGE = "%(prog)s [--task NAME ...] [--teacher NAME] [--student NAME] [--study NAME] [more flags]"
PAPER = {"teacher": "text-davinci-002", "student": "gpt2", "degree": 1, "temperature": 0.0}
PAPER |= {"epochs": 20, "batch_size": 8, "lr": 3e-4}
TOY = {"teacher": "toy", "student": "toy", "degree": 2, "temperature": 0.7}
TOY |= {"epochs": 5, "batch_size": 16, "lr": 1e-3}
DEFAULTS = {"paper": PAPER, "toy": TOY}  # of the flags whose default depends on the task


def parse_args(argv: list[str] | None = None, description: str = "") -> list[Namespace]:
    """Parse the command line into the flags of each run: of one, or of a grid (extras/studies.py).

    A grid is --study NAME, --task all, or a flag that was given several values.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(description)
    args = parser.parse_args(argv)
    if args.study or is_grid(args):
        from extras import studies

        lines = studies.command_lines(argv)
        runs = [run for line in lines for run in studies.expand(parser.parse_args(line))]
    else:
        runs = [with_single_values(args)]
    return [with_defaults(run) for run in runs]


def is_grid(args: Namespace) -> bool:
    lists = [value for name, value in vars(args).items() if name != "method"]
    has_several = any(isinstance(value, list) and len(value) > 1 for value in lists)
    return has_several or (args.task == ["all"] and not args.dry_run)


def with_single_values(args: Namespace) -> Namespace:
    """Turn each list of one value into the value; --method stays a list."""
    values = vars(args).copy()
    for name, value in values.items():
        if isinstance(value, list) and name != "method":
            values[name] = value[0]
    return Namespace(**values)


def usual_flags(args: Namespace) -> dict:
    """Return the row of DEFAULTS for the task; the names of files leave out what is usual."""
    if args.task == "toy" and not args.finetune_data:
        return DEFAULTS["toy"]
    return DEFAULTS["paper"]


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


# ---------------- The flags, in titled groups (by hand: a flag is one or two lines)


def make_parser(description: str) -> argparse.ArgumentParser:
    """Make the parser of all flags, in titled groups."""
    parser = argparse.ArgumentParser(
        usage=USAGE,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_flags(parser.add_argument_group("what to run").add_argument)
    add_file_flags(parser.add_argument_group("where").add_argument)
    add_teacher_flags(parser.add_argument_group("teacher (paper §3, step 1)").add_argument)
    api = parser.add_argument_group("API teachers (key: OPENAI_API_KEY in the environment)")
    add_api_flags(api.add_argument)
    add_curation_flags(parser.add_argument_group("curation (paper §3, step 2)").add_argument)
    add_training_flags(parser.add_argument_group("training (paper, appendix)").add_argument)
    add_hardware_flags(parser.add_argument_group("speed and memory").add_argument)
    add_checkpoint_flags(parser.add_argument_group("checkpoints and log").add_argument)
    add_evaluation_flags(parser.add_argument_group("evaluation (paper §4)").add_argument)
    parser.set_defaults(sample_degree=None)  # of a grid: the largest degree, sampled once for all
    return parser


# fmt: off
def add_run_flags(add: Callable) -> None:
    """Add the flags of what to run."""
    names = ", ".join(tasks.TASKS)
    methods = [*PROMPTED, *FINE_TUNED]
    stages = ["all", "sample", "curate", "train", "evaluate"]
    add("--study", metavar="NAME", help="an experiment of the paper, a row in extras/studies.py")
    add("--task", nargs="+", default=["toy"], help=f"all (but toy), or of {names} (default toy)")
    add("--teacher", nargs="+", help="toy; hf:NAME, a local model; a model behind an API or with "
        "a file in --saved (default text-davinci-002, the paper's)")
    add("--student", nargs="+", help="Hugging Face folder or name (default gpt2), or toy")
    add("--method", nargs="+", choices=methods, default=list(FINE_TUNED), help="default: ft ft_cot")
    add("--stage", choices=stages, default="all", help="one stage (default all)")
    add("--split", nargs="+", default="default", help="default, template, few_shot_8, few_shot_32 "
        "or few_shot_128 (default: default)")
    add("--seed", "--seeds", nargs="+", type=int, default=0, help="of batch order, dropout, the "
        "toy student and sampled answers (default 0)")
    add("--data_seed", type=int, default=0, help="of local teachers, the validation share and "
        "--filter random (default 0)")


def add_file_flags(add: Callable) -> None:
    add("--saved", default="saved", help="folder of everything a run writes (default saved)")
    add("--data", default="data", help="folder of the prepared benchmarks (default data)")
    add("--finetune_data", help="with --stage train: a fine-tuning file of your own")
    add("--out", help="folder of the student (default under --saved; for one --method)")
    add("--train_key", help="name of this training run in file names (default from the flags)")


def add_teacher_flags(add: Callable) -> None:
    """Add the flags of how the teacher is asked."""
    methods = ["zs", "zs_cot", "zs_cot_one_step", "fs_cot"]
    add("--teacher_method", nargs="+", choices=methods, default="zs_cot", help="prompting method "
        "of the teacher (default zs_cot, two steps; one step costs less)")
    add("--degree", nargs="+", type=int, help="D of diverse reasoning, rationales a question "
        "(default 1; toy 2; paper 1 to 64)")
    add("--temperature", type=float, help="default 0; toy 0.7; paper 0, and 0.7 where D > 1")
    add("--teacher_max_new_tokens", type=int, default=128, help="tokens a rationale (default 128, "
        "the paper's)")


def add_api_flags(add: Callable) -> None:
    """Add the flags of an API; its key is none of them, since a flag could be read in `ps`."""
    add("--base_url", help="server, like http://127.0.0.1:8000/v1 (default OPENAI_BASE_URL, or "
        "OpenAI)")
    add("--api", choices=["chat", "completions"], default="chat", help="chat (default), or "
        "completions: raw prompts, the paper's strings")
    add("--teacher_part", choices=["all", "train"], default="all", help="questions of --split to "
        "ask: all (default), or train, which is all that a student needs")
    add("--choices", type=int, default=1, help="rationales a request (default 1): their prompt is "
        "paid for once")
    add("--concurrency", type=int, default=16, help="requests in flight (default 16)")
    add("--requests_per_minute", type=float, default=0, help="default 0: no limit of ours")
    add("--tokens_per_minute", type=float, default=0, help="default 0: no limit of ours")
    add("--attempt_timeout", type=float, default=120, help="seconds an attempt (default 120)")
    add("--max_attempts", type=int, default=6, help="attempts a request, which then is recorded "
        "as failed (default 6)")
    add("--no_temperature", action="store_true", help="send no temperature: some models refuse it")
    add("--legacy_max_tokens", action="store_true", help="for chat servers that know max_tokens "
        "alone (llama.cpp)")
    add("--dry_run", action="store_true", help="with --stage sample: estimate the cost; --task "
        "all: of every benchmark")
    add("--price_in", type=float, help="dollars a million prompt tokens")
    add("--price_out", type=float, help="dollars a million completion tokens")
    add("--max_cost", type=float, help="stop before a completion file costs more dollars than "
        "this, earlier runs included")
    add("--batch", choices=["submit", "status", "fetch"], help="with --stage sample: use the "
        "Batch API, step by step")


def add_curation_flags(add: Callable) -> None:
    """Add the flags of which rationales are kept."""
    styles = [*tasks.LABEL_STYLES, *API_FAMILIES]
    filters = ["right", "all", "random", "wrong"]
    add("--rules", choices=["paper", "flexible"], help="rules that read the answer (default "
        "paper; of chat models, flexible)")
    add("--label_style", choices=styles, default="token", help="default token: '{question} ###' "
        "-> ' {rationale} --> {answer}'; gpt3, chat: files for an API")
    add("--filter", nargs="+", choices=filters, default="right", help="rationales to learn from: "
        "right (default, the paper's); for studies all, wrong, or random: as many as are right, "
        "of all.  A wrong one keeps the answer of its teacher")
    add("--max_rationale_words", nargs="+", type=int, default=0, help="drop longer rationales "
        "(default 0: none)")
    add("--max_per_question", type=int, default=0, help="keep the first so many rationales of a "
        "question (default 0: all)")
    add("--max_similarity", type=float, default=1.0, help="drop a rationale that shares more than "
        "this of its word trigrams with an earlier one of its question (default 1)")
    add("--drop_unfinished", action="store_true", help="drop rationales cut by the token limit")
    add("--drop_duplicates", action="store_true", help="keep the first of equal rationales of a "
        "question")
    add("--show", type=int, default=0, help="with --stage curate: print so many samples to read")


def add_training_flags(add: Callable) -> None:
    """Add the flags of the optimizer and its schedule."""
    schedules = ["constant", "linear", "cosine"]
    add("--epochs", type=int, help="default 20, the paper's; toy 5")
    add("--batch_size", nargs="+", type=int, help="samples of an optimizer step, over all ranks "
        "(default 8, the paper's; toy 16)")
    add("--lr", nargs="+", type=float, help="learning rate of AdamW (default 3e-4; toy 1e-3)")
    add("--schedule", choices=schedules, default="constant", help="of the learning rate after "
        "warm-up, down to 0 (default constant, the paper's)")
    add("--warmup", type=int, default=0, help="steps of linear warm-up (default 0, the paper's)")
    add("--weight_decay", type=float, default=0.01, help="default 0.01, the paper's")
    add("--max_grad_norm", type=float, default=0.0, help="clip the gradient to this norm (default "
        "0: never, as the paper)")
    add("--max_length", type=int, default=512, help="tokens of a prompt and of a label; longer "
        "samples are dropped (default 512, the paper's)")


def add_hardware_flags(add: Callable) -> None:
    """Add the flags of speed and memory."""
    families = ["decoder", "encoder_decoder"]
    precisions = ["fp32", "tf32", "bf16", "fp16"]
    add("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    add("--plain", action="store_true", help="do without the fast paths of extras/")
    add("--family", choices=families, help="of a student by hub name (default: from its name)")
    add("--precision", choices=precisions, default="fp32", help="autocast of matmuls (default "
        "fp32; T5 overflows in fp16)")
    add("--micro_batch_size", type=int, help="samples of a forward pass on a rank: bounds memory, "
        "changes no step (default: all)")
    add("--micro_tokens", type=int, default=0, help="tokens of a forward pass on a rank, padding "
        "included (default 0: 1024 on CPUs, unbounded on GPUs)")
    add("--packing", action=argparse.BooleanOptionalAction, default=True, help="pack samples end "
        "to end instead of padding, where the student's logits stay the same (default on)")
    add("--gradient_checkpointing", action="store_true", help="recompute activations to save "
        "memory (default off)")
    add("--compile", action="store_true", help="torch.compile the student (default off)")
    add("--shard", choices=["no", "gpu", "cpu"], default="no", help="shard weights and optimizer "
        "over ranks, FSDP2; cpu: offload them (default no: DDP)")


def add_checkpoint_flags(add: Callable) -> None:
    """Add the flags of checkpoints and log lines."""
    add("--checkpoint_every", type=int, default=1, help="epochs between checkpoints to resume "
        "from (default 1; 0 never)")
    add("--checkpoint_steps", type=int, default=0, help="steps between checkpoints within an "
        "epoch (default 0: none)")
    add("--keep", type=int, default=1, help="newest checkpoints to keep (default 1)")
    add("--keep_best", action="store_true", help="with --eval_every: also keep the student of the "
        "best epoch on the --validation share or, without one, on the test part")
    add("--log_every", type=int, default=0, help="steps between log lines (default 0: an epoch)")


def add_evaluation_flags(add: Callable) -> None:
    """Add the flags of how the student is evaluated."""
    add("--eval_every", type=int, default=0, help="epochs between evaluations (default 0: at the "
        "end alone; paper 1)")
    add("--validation", type=float, default=0.0, help="share of the training questions set aside "
        "to choose the epoch by (default 0)")
    add("--max_new_tokens", type=int, default=512, help="of the student, a question (default 512)")
    add("--eval_samples", type=int, default=1, help="K answers a question for majority vote and "
        "pass@k (default 1, greedy)")
    add("--eval_temperature", type=float, default=0.7, help="where K > 1 (default 0.7)")
    add("--eval_batch_size", type=int, help="rows decoded at once (default: 96 on a CPU, 512 on a "
        "GPU, or as many as memory allows); more is faster and takes more memory")


# fmt: on
# ---------------- What is refused before anything is computed

AT_LEAST_1 = """degree epochs batch_size micro_batch_size max_length max_new_tokens eval_batch_size
    eval_samples teacher_max_new_tokens keep""".split()
AT_LEAST_0 = """temperature weight_decay checkpoint_every checkpoint_steps eval_every seed data_seed
    micro_tokens warmup max_grad_norm log_every validation requests_per_minute tokens_per_minute
    price_in price_out max_cost""".split()
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
    check_base_url(base_url(args))


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
    for flag in ("max_rationale_words", "max_per_question", "show"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag} {getattr(args, flag)} must be 0 or more")
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
    if args.dry_run or args.batch:
        if args.stage != "sample" or (args.dry_run and args.batch):
            raise UserError("--dry_run and --batch go with --stage sample, one at a time")
        if not is_remote_teacher(args):
            raise UserError(
                "--dry_run and --batch are for teachers behind an API: name one with --teacher"
            )
    needs_api = args.label_style in API_FAMILIES and args.stage not in ("sample", "curate")
    if needs_api and not has_api(args):
        raise UserError(
            f"--label_style {args.label_style} makes files for the API, not for a student here: "
            "use it with --stage curate, or set OPENAI_API_KEY or --base_url to have the student "
            "trained there"
        )


def check_base_url(base_url: str | None) -> None:
    """Refuse what is no base URL or holds a secret; warn where the key would travel in clear."""
    if not base_url:
        return
    url = urlsplit(base_url)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise UserError(
            "the base URL must begin with http:// or https:// and a host, like "
            "http://127.0.0.1:8000/v1"
        )
    if url.username or url.password:
        raise UserError(
            "the base URL must hold no name and no password: put the key into OPENAI_API_KEY"
        )
    is_loopback = url.hostname in ("localhost", "::1") or url.hostname.startswith("127.")
    if url.scheme == "http" and not is_loopback:
        print(
            f"warning: plain http to {url.hostname}: the key and all texts travel unencrypted; "
            "use https",
            file=sys.stderr,
        )


# ---------------- The API


def base_url(args: Namespace) -> str | None:
    return args.base_url or os.environ.get("OPENAI_BASE_URL") or None


def has_api(args: Namespace) -> bool:
    return bool(os.environ.get("OPENAI_API_KEY", "").strip() or base_url(args))


def is_remote_teacher(args: Namespace) -> bool:
    """Tell whether the teacher's completions lie in --saved or come through an API."""
    return args.teacher != "toy" and not args.teacher.startswith("hf:")


def needs_torch(args: Namespace) -> bool:
    """Tell whether a run of these flags loads a model here."""
    has_local_teacher = args.teacher.startswith("hf:") and args.stage in ("all", "sample")
    has_local_student = args.label_style not in API_FAMILIES
    return has_local_teacher or (has_local_student and args.stage not in ("sample", "curate"))


# ---------------- Names of files (saved/README.md)

CURATION = {  # flag: (the paper's value, what stands in file names for another one)
    "filter": ("right", "{}"),
    "max_rationale_words": (0, "{}words"),
    "max_per_question": (0, "{}each"),
    "max_similarity": (1.0, "similar{:g}"),
    "drop_unfinished": (False, "finished"),
    "drop_duplicates": (False, "unique"),
}


def curation_options(args: Namespace) -> dict:
    """Return {flag: value} of the flags of CURATION that differ from the paper."""
    values = {flag: getattr(args, flag) for flag in CURATION}
    return {flag: value for flag, value in values.items() if value != CURATION[flag][0]}


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


def run_suffix(args: Namespace, method: str) -> str:
    """Return what tells apart two curated files, or two students, of one task and method.

    ft_cot with --degree 8 --split few_shot_32: '_8aug_few_shot_32'.  ft knows no degree or teacher.
    """
    parts = []
    if method != "ft":
        if args.degree > 1:
            parts.append(f"{args.degree}aug")
        if args.teacher != usual_flags(args)["teacher"]:
            parts.append(f"by_{model_key(args.teacher.removeprefix('hf:'))}")
        options = curation_options(args).items()
        parts += [CURATION[flag][1].format(value) for flag, value in options]
    if args.split != "default":
        parts.append(args.split)
    if args.validation:
        seed = f"s{args.data_seed}" if args.data_seed else ""  # it chooses the share
        parts.append(f"v{args.validation:g}{seed}")
    return "".join(f"_{part}" for part in parts)


def finetune_key(args: Namespace, method: str) -> str:
    if method == "ft":
        return f"ft_{args.task}{run_suffix(args, method)}"
    return f"{teacher_key(args)}_{args.task}{run_suffix(args, method)}"


def finetune_file(args: Namespace, method: str, family: str) -> Path:
    """Return the fine-tuning file of a method, for students of a family."""
    name = f"F_{safe_key(finetune_key(args, method))}"
    folder = Path(args.saved) / "finetune_data"
    if family == "openai":
        return folder / "P_openai" / f"{name}.jsonl"
    if family == "chat":
        return folder / "P_openai" / f"{name}_chat.jsonl"
    return folder / f"P_{family}" / f"{name}.json"


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
        if args.temperature != (0.7 if args.degree > 1 else 0.0):  # the paper's
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
    folder = Path(args.saved) / "models" / f"B_{model_key(args.student)}"
    return folder / f"D_{args.task}__T_{train_key(args, method)}"


def samples_suffix(args: Namespace) -> list[str]:
    """Return the part of a file name that tells K sampled answers a question from a greedy one."""
    if args.eval_samples == 1:
        return []
    return [f"K_{args.eval_samples:02d}_t{round(100 * args.eval_temperature)}"]


def test_file(args: Namespace, method: str, epoch: int | None) -> Path:
    """Return the completion file of a student on the test questions.

    Of a fine-tuned one it names run and epoch, of an untrained one the split (and, as each seed
    makes another toy student, the seed).
    """
    if method in FINE_TUNED:
        parts = [f"T_{train_key(args, method)}"]
        if args.label_style not in API_FAMILIES:
            parts.append(f"E_{epoch:03d}")
    elif args.student == "toy" and args.seed:
        parts = [f"S_{args.split}_s{args.seed}"]
    else:
        parts = [f"S_{args.split}"]
    parts += samples_suffix(args)
    return completion_path(args.saved, model_key(args.student), method, args.task, *parts)


def job_file(args: Namespace, method: str) -> Path:
    """Return the file that keeps the ids of an API student's fine-tuning job."""
    folder = Path(args.saved) / "model_metadata" / f"B_{model_key(args.student)}"
    return folder / f"F_{finetune_key(args, method)}__T_{train_key(args, method)}.json"
