"""The command line of finetune_cot.py: flags, their defaults, what is refused, and the names that follow from them."""

import argparse
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import tasks
from storage import UserError, model_key, completion_path, safe_key
from tasks import API_FAMILIES, FINE_TUNED, PROMPTED

# ---- parse
BATCH_SIZE_HELP = """rows decoded at once, of the longest; of shorter ones up to twice as many (default: on a CPU 96, but at most what takes half the
memory of the weights, or 0.6 GB; on a GPU 512, in half of its free memory); more is faster and takes more memory"""
DEFAULTS = {  # flags whose default depends on the task
    "paper": {
        "teacher": "text-davinci-002",
        "student": "gpt2",
        "degree": 1,
        "temperature": 0.0,
        "epochs": 20,
        "batch_size": 8,
        "lr": 3e-4,
    },
    "toy": {
        "teacher": "toy",
        "student": "toy",
        "degree": 2,
        "temperature": 0.7,
        "epochs": 5,
        "batch_size": 16,
        "lr": 1e-3,
    },
}


def parse_args(argv=None):
    """-> [the flags of one cell]: more than one where flags have several values, with the defaults that depend on the task filled in."""
    from extras import studies

    parser = argparse.ArgumentParser(
        usage=studies.USAGE,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_argument_group("what to run")
    what.add_argument(
        "--study",
        choices=studies.STUDIES,
        help="one of the paper's experiments: its flags stand in extras/studies.py",
    )
    what.add_argument(
        "--task",
        nargs="+",
        default=["toy"],
        help=f"all (but toy), or of {', '.join(tasks.TASKS)} (default toy)",
    )
    what.add_argument(
        "--teacher",
        nargs="+",
        help="toy; hf:NAME (local); a model behind an API or with a file in --saved (default text-davinci-002, the paper's)",
    )
    what.add_argument(
        "--student",
        nargs="+",
        help="Hugging Face folder or name (default gpt2), or toy, a tiny one made on the spot",
    )
    what.add_argument(
        "--method",
        nargs="+",
        choices=[*PROMPTED, *FINE_TUNED],
        default=list(FINE_TUNED),
        help="default: ft ft_cot",
    )
    what.add_argument(
        "--stage",
        choices=["all", "sample", "curate", "train", "evaluate"],
        default="all",
        help="one stage (default all)",
    )
    what.add_argument(
        "--split",
        nargs="+",
        default="default",
        help="default, template, few_shot_8, few_shot_32, few_shot_128 (default: default)",
    )
    what.add_argument(
        "--seed",
        "--seeds",
        nargs="+",
        type=int,
        default=0,
        help="of order, dropout, the toy student, students' samples (default 0)",
    )
    what.add_argument(
        "--data_seed",
        type=int,
        default=0,
        help="of local teachers, the validation share, --filter random (default 0)",
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--saved", default="saved", help="folder for everything a run writes (default saved)"
    )
    where.add_argument(
        "--data", default="data", help="folder of the prepared benchmarks (default data)"
    )
    where.add_argument("--finetune_data", help="with --stage train: a fine-tuning file of your own")
    where.add_argument(
        "--out", help="folder of the student (default under --saved; for one --method)"
    )
    where.add_argument(
        "--train_key",
        help="name of this training run in file names (default from method, degree, split and seed)",
    )
    add_teacher_flags(parser)
    curating = parser.add_argument_group(
        "curation (paper §3, step 2; --filter and below beyond it)"
    )
    curating.add_argument(
        "--rules",
        choices=["paper", "flexible"],
        help="what counts as right (default paper; of chat models, flexible)",
    )
    curating.add_argument(
        "--label_style",
        choices=[*tasks.LABEL_STYLES, *API_FAMILIES],
        default="token",
        help="of labels (default token: '{question} ###' -> ' {rationale} --> {answer}'; gpt3, chat: for an API)",
    )
    add_filter_flags(curating)
    training = parser.add_argument_group("training (paper, appendix)")
    training.add_argument("--epochs", type=int, help="default 20, the paper's; toy 5")
    training.add_argument(
        "--batch_size",
        nargs="+",
        type=int,
        help="samples an optimizer step sees, over all ranks (default 8, the paper's; toy 16)",
    )
    training.add_argument(
        "--micro_batch_size",
        type=int,
        help="samples a forward pass and rank: bounds memory, not what a step sees (default: all)",
    )
    training.add_argument(
        "--micro_tokens",
        type=int,
        default=0,
        help="tokens per forward pass and rank, padding included (default 0: 1024 on CPUs, no bound on GPUs)",
    )
    training.add_argument(
        "--packing",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="lay samples end to end instead of padding them, where the student gives the same logits so (default on)",
    )
    training.add_argument(
        "--lr",
        nargs="+",
        type=float,
        help="learning rate of AdamW (default 3e-4, the paper's; toy 1e-3)",
    )
    training.add_argument(
        "--schedule",
        choices=["constant", "linear", "cosine"],
        default="constant",
        help="of the learning rate after warm-up, down to 0 at the last step (default constant, the paper's)",
    )
    training.add_argument(
        "--warmup",
        type=int,
        default=0,
        help="steps in which the learning rate rises from 0 (default 0, the paper's)",
    )
    training.add_argument(
        "--weight_decay", type=float, default=0.01, help="default 0.01, the paper's"
    )
    training.add_argument(
        "--max_grad_norm",
        type=float,
        default=0.0,
        help="clip the gradient's norm to this (default 0: never, as the paper)",
    )
    training.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16", "fp16"],
        default="fp32",
        help="autocast of products (default fp32; tf32: faster fp32 products, on CPUs too; T5 overflows in fp16)",
    )
    training.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="compute activations twice to keep fewer (default off)",
    )
    training.add_argument(
        "--compile", action="store_true", help="torch.compile the student (default off)"
    )
    training.add_argument(
        "--shard",
        choices=["no", "gpu", "cpu"],
        default="no",
        help="split weights and optimizer over ranks, FSDP2; cpu: keep them in main memory (default no: DDP)",
    )
    training.add_argument(
        "--max_length",
        type=int,
        default=512,
        help="tokens of input and of label; longer samples are dropped (default 512, the paper's)",
    )
    training.add_argument(
        "--checkpoint_every",
        type=int,
        default=1,
        help="epochs between checkpoints to resume from (default 1; 0 never)",
    )
    training.add_argument(
        "--checkpoint_steps",
        type=int,
        default=0,
        help="steps between checkpoints within an epoch (default 0: none)",
    )
    training.add_argument(
        "--keep", type=int, default=1, help="checkpoints kept, the newest (default 1)"
    )
    training.add_argument(
        "--keep_best",
        action="store_true",
        help="with --eval_every: keep the student of the best epoch too, in best_epoch_* of "
        "its folder; best on the --validation share or, without one, on the test part (the paper's protocol)",
    )
    training.add_argument(
        "--log_every",
        type=int,
        default=0,
        help="steps between log lines (default 0: one line an epoch)",
    )
    training.add_argument(
        "--family",
        choices=["decoder", "encoder_decoder"],
        help="of a student by hub name (default: by its name)",
    )
    training.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    evaluating = parser.add_argument_group("evaluation")
    evaluating.add_argument(
        "--eval_every",
        type=int,
        default=0,
        help="epochs between evaluations (default 0: at the end only; paper 1)",
    )
    evaluating.add_argument(
        "--validation",
        type=float,
        default=0.0,
        help="share of train set aside to choose the epoch by (default 0)",
    )
    evaluating.add_argument(
        "--max_new_tokens",
        type=int,
        default=512,
        help="of the student, a question (default 512, the longest label)",
    )
    evaluating.add_argument(
        "--eval_samples",
        type=int,
        default=1,
        help="K answers a question: majority vote, pass@k (default 1, greedy)",
    )
    evaluating.add_argument(
        "--eval_temperature",
        type=float,
        default=0.7,
        help="of --eval_samples above 1 (default 0.7)",
    )
    evaluating.add_argument("--eval_batch_size", type=int, help=BATCH_SIZE_HELP)
    lines = studies.command_lines(sys.argv[1:] if argv is None else argv)
    cells = [cell for line in lines for cell in studies.expand(parser.parse_args(line))]
    for args in cells:
        args.usual = DEFAULTS["toy" if args.task == "toy" and not args.finetune_data else "paper"]
        for name, value in args.usual.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.micro_batch_size is None:
            args.micro_batch_size = args.batch_size
    return cells


def check(args):
    """Refuse what cannot work before anything is computed.  Raises UserError."""
    check_teacher(args)
    check_filters(args)
    if not (args.dry_run and args.task == "all"):
        tasks.find_task(args.task)
    for name, checked in (
        (args.teacher.removeprefix("hf:"), model_key),
        (args.student, model_key),
        (args.split, safe_key),
        (args.train_key or "none", safe_key),
    ):
        checked(name)
    for name in (
        "degree",
        "epochs",
        "batch_size",
        "micro_batch_size",
        "max_length",
        "max_new_tokens",
        "eval_batch_size",
        "eval_samples",
        "teacher_max_new_tokens",
        "keep",
    ):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be 1 or more")
    for name in (
        "temperature",
        "weight_decay",
        "checkpoint_every",
        "checkpoint_steps",
        "eval_every",
        "seed",
        "data_seed",
        "micro_tokens",
        "warmup",
        "max_grad_norm",
        "log_every",
        "validation",
    ):
        if not 0 <= getattr(args, name) < 10**9:  # so that nan is refused too
            raise UserError(
                f"--{name} {getattr(args, name)} must be 0 or more, and below a billion"
            )
    if not 0 < args.lr < 10:
        raise UserError(f"--lr {args.lr} must be above 0 and below 10")
    if args.finetune_data and (args.stage != "train" or len(args.method) > 1 and not args.out):
        raise UserError("--finetune_data goes with --stage train and --out DIR (or one --method)")
    if (args.out or args.train_key) and len(args.method) > 1 and not args.finetune_data:
        raise UserError("--out and --train_key are of one student: name one --method")
    if args.keep_best and not args.eval_every:
        raise UserError("--keep_best compares epochs: say how often with --eval_every 1")
    if args.shard != "no" and args.eval_every:
        raise UserError(
            "--shard spreads the weights over the ranks while training, so it cannot be evaluated in between: leave out --eval_every"
        )
    if args.degree > 1 and not args.temperature and not is_remote_teacher(args):
        raise UserError(
            f"--degree {args.degree} at --temperature 0 would give {args.degree} identical rationales: use --temperature 0.7"
        )


def add_teacher_flags(parser):
    """How a teacher is asked.  The API key is not among them: a flag could be read in `ps`."""
    teaching = parser.add_argument_group("teaching (paper §3, step 1)")
    teaching.add_argument(
        "--teacher_method",
        nargs="+",
        choices=["zs", "zs_cot", "zs_cot_one_step", "fs_cot"],
        default="zs_cot",
        help="how the teacher is prompted (default zs_cot, two steps; one step costs less; zs: no rationale)",
    )
    teaching.add_argument(
        "--degree",
        nargs="+",
        type=int,
        help="D, rationales a question: diverse reasoning (default 1; toy 2; paper 1 to 64)",
    )
    teaching.add_argument(
        "--temperature",
        type=float,
        help="of the teacher (default 0; toy 0.7; paper 0, and 0.7 where D > 1)",
    )
    teaching.add_argument(
        "--teacher_max_new_tokens",
        type=int,
        default=128,
        help="tokens a rationale (default 128, the paper's)",
    )
    api = parser.add_argument_group("API teachers (key: OPENAI_API_KEY in the environment)")
    api.add_argument(
        "--base_url",
        help="server to ask, e.g. http://127.0.0.1:8000/v1 (default OPENAI_BASE_URL, or OpenAI)",
    )
    api.add_argument(
        "--api",
        choices=["chat", "completions"],
        default="chat",
        help="chat (default), or completions: raw prompts, the paper's strings",
    )
    api.add_argument(
        "--teacher_part",
        choices=["all", "train"],
        default="all",
        help="questions of --split to ask: all (default), or train alone: it costs less and is all a student needs",
    )
    api.add_argument(
        "--choices",
        type=int,
        default=1,
        help="rationales asked for in one request, its prompt paid once (default 1)",
    )
    api.add_argument(
        "--concurrency", type=int, default=16, help="requests under way at once (default 16)"
    )
    api.add_argument(
        "--requests_per_minute", type=float, default=0, help="default 0: no limit of ours"
    )
    api.add_argument(
        "--tokens_per_minute", type=float, default=0, help="default 0: no limit of ours"
    )
    api.add_argument(
        "--attempt_timeout",
        type=float,
        default=120,
        help="seconds an attempt may take in all (default 120)",
    )
    api.add_argument(
        "--max_attempts",
        type=int,
        default=6,
        help="attempts a request, then it is recorded as failed (default 6)",
    )
    api.add_argument(
        "--no_temperature",
        action="store_true",
        help="send no temperature: some reasoning models refuse it",
    )
    api.add_argument(
        "--legacy_max_tokens",
        action="store_true",
        help="for chat servers that know only max_tokens (llama.cpp)",
    )
    api.add_argument(
        "--dry_run",
        action="store_true",
        help="with --stage sample: say what it would cost; --task all: every benchmark",
    )
    api.add_argument(
        "--price_in",
        type=float,
        help="dollars a million prompt tokens (of the Batch API, where you use it)",
    )
    api.add_argument("--price_out", type=float, help="dollars a million completion tokens")
    api.add_argument(
        "--max_cost",
        type=float,
        help="stop before a completion file costs more dollars than this, earlier runs included",
    )
    api.add_argument(
        "--batch",
        choices=["submit", "status", "fetch"],
        help="with --stage sample: use the Batch API, step by step",
    )


def check_teacher(args):
    """Refuse flags that cannot work, before anything is asked.  Raises UserError."""
    for name in ("choices", "concurrency", "attempt_timeout", "max_attempts"):
        if not 0 < getattr(args, name) <= 1000:
            raise UserError(f"--{name} {getattr(args, name)} must be above 0, and 1000 at most")
    for name in ("requests_per_minute", "tokens_per_minute", "price_in", "price_out", "max_cost"):
        if not 0 <= (getattr(args, name) or 0) < 10**9:
            raise UserError(
                f"--{name} {getattr(args, name)} must be 0 or more, and below a billion"
            )
    if (
        (args.price_in is None) != (args.price_out is None)
        or args.max_cost is not None
        and args.price_in is None
    ):
        raise UserError(
            "prices come in pairs, and --max_cost needs them: give --price_in and --price_out, dollars a million tokens"
        )
    if (args.dry_run or args.batch) and args.stage != "sample" or args.dry_run and args.batch:
        raise UserError("--dry_run and --batch go with --stage sample, one at a time")
    if (args.dry_run or args.batch) and not is_remote_teacher(args):
        raise UserError(
            "--dry_run and --batch are for teachers behind an API: name one with --teacher"
        )
    if (
        args.label_style in API_FAMILIES
        and args.stage not in ("sample", "curate")
        and not has_api(args)
    ):
        raise UserError(
            f"--label_style {args.label_style} makes files for the API, not for a student here: use it with --stage curate, "
            "or set OPENAI_API_KEY or --base_url to have the student trained there"
        )
    url = urlsplit(base_url(args) or "https://")
    if url.scheme not in ("http", "https") or base_url(args) and not url.hostname:
        raise UserError(
            "the base URL must begin with http:// or https:// and a host, like http://127.0.0.1:8000/v1"
        )
    if url.username or url.password:
        raise UserError(
            "the base URL must hold no name and no password: put the key into OPENAI_API_KEY"
        )
    if (
        url.scheme == "http"
        and url.hostname not in ("localhost", "::1")
        and not url.hostname.startswith("127.")
    ):
        print(
            f"warning: plain http to {url.hostname}: the key and all texts travel unencrypted; use https",
            file=sys.stderr,
        )


FILTERS = ("right", "all", "random", "wrong")


def add_filter_flags(group):
    """The flags of files.CURATION, with the defaults that stand there."""

    def add(flag, **settings):
        group.add_argument(f"--{flag}", default=CURATION[flag][0], **settings)

    add(
        "filter",
        nargs="+",
        choices=FILTERS,
        help="rationales to learn from: right (default, the paper's); for studies: all; random, as "
        "many as are right, of all; wrong.  A wrong one keeps the answer that its teacher gave",
    )
    add("max_rationale_words", nargs="+", type=int, help="drop longer rationales (default 0: none)")
    add(
        "drop_unfinished",
        action="store_true",
        help="drop rationales that the teacher's token limit cut off",
    )
    add(
        "drop_duplicates",
        action="store_true",
        help="of the same rationale for the same question keep the first",
    )
    add(
        "max_similarity",
        type=float,
        help="drop a rationale that shares more than this of its word triples with an earlier one of its "
        "question (default 1: none; try 0.8)",
    )
    add(
        "max_per_question",
        type=int,
        help="keep the first so many rationales of a question (default 0: all)",
    )
    group.add_argument(
        "--show",
        type=int,
        default=0,
        help="with --stage curate: print so many of the samples, to be read",
    )


def check_filters(args):
    """Refuse flags that cannot work.  Raises UserError."""
    for flag in ("max_rationale_words", "max_per_question", "show"):
        if getattr(args, flag) < 0:
            raise UserError(f"--{flag} {getattr(args, flag)} must be 0 or more")
    if not 0 <= args.max_similarity <= 1:
        raise UserError(f"--max_similarity {args.max_similarity} must be from 0 to 1")
    if args.show and args.stage != "curate":
        raise UserError("--show goes with --stage curate")


def base_url(args):
    return args.base_url or os.environ.get("OPENAI_BASE_URL") or None


def has_api(args):
    return bool(os.environ.get("OPENAI_API_KEY", "").strip() or base_url(args))


def is_remote_teacher(args):
    """Whether the teacher is neither the toy nor a local model: its completions lie in --saved, or come through the API."""
    return args.teacher != "toy" and not args.teacher.startswith("hf:")


# ---------------- Names of files (saved/README.md), from the flags of a run


def teacher_key(args):
    """zs_cot at temperature 0, zs_cot_t70 at 0.7; zs_cot_t70_s1 with --data_seed 1, where the teacher is one of ours and so has a seed"""
    seed = args.data_seed if args.teacher == "toy" or args.teacher.startswith("hf:") else 0
    return (
        args.teacher_method
        + (f"_t{round(100 * args.temperature)}" if args.temperature else "")
        + (f"_s{seed}" if seed else "")
    )


def teacher_metadata(args):
    return {
        "dataset_key": args.task,
        "base_model": teacher_name(args),
        "completion_key": teacher_key(args),
        "finetune_key": None,
        "train_key": None,
        "epoch": None,
        "prediction_template": args.teacher_method,
    }


CURATION = {  # flag that chooses rationales: (its default, which is the paper's, what stands in names where it is another)
    "filter": ("right", "{}"),
    "max_rationale_words": (0, "{}words"),
    "max_per_question": (0, "{}each"),
    "max_similarity": (1.0, "similar{:g}"),
    "drop_unfinished": (False, "finished"),
    "drop_duplicates": (False, "unique"),
}


def curation_options(args):
    """-> {flag: value} of the flags of CURATION that are not at their default."""
    return {
        flag: getattr(args, flag)
        for flag, (default, _) in CURATION.items()
        if getattr(args, flag) != default
    }


def run_suffix(args, method="ft_cot"):
    """What distinguishes two curated sets or students of one task besides the method: of those who learn from rationales
    degree, teacher and choice; split and validation share."""
    parts = []
    if method != "ft":
        parts += [f"{args.degree}aug"] if args.degree > 1 else []
        parts += (
            [f"by_{model_key(args.teacher.removeprefix('hf:'))}"]
            if args.teacher != args.usual["teacher"]
            else []
        )
        parts += [CURATION[flag][1].format(value) for flag, value in curation_options(args).items()]
    share = f"v{args.validation:g}" + (
        f"s{args.data_seed}" if args.data_seed else ""
    )  # the seed chooses the share
    parts += [
        part
        for part, is_there in ((args.split, args.split != "default"), (share, args.validation))
        if is_there
    ]
    return "".join(f"_{part}" for part in parts)


def finetune_key(args, method):
    if method == "ft":
        return f"ft_{args.task}{run_suffix(args, method)}"
    return f"{teacher_key(args)}_{args.task}{run_suffix(args)}"


def train_key(args, method):
    """--train_key, or the method and whatever distinguishes this training from the usual one of the task."""
    if args.train_key:
        return safe_key(args.train_key)
    usual_temperature = 0.7 if args.degree > 1 else 0.0  # the paper's
    parts = (
        (args.label_style, args.label_style != "token"),
        (args.teacher_method, method != "ft" and args.teacher_method != "zs_cot"),
        (
            f"t{round(100 * args.temperature)}",
            method != "ft" and args.temperature != usual_temperature,
        ),
    )
    late = (
        (f"lr{args.lr:g}", args.lr != args.usual["lr"]),
        (f"b{args.batch_size}", args.batch_size != args.usual["batch_size"]),
        (f"s{args.seed}", args.seed),
    )
    before, after = (
        "".join(f"_{part}" for part, is_there in some if is_there) for some in (parts, late)
    )
    return safe_key(method + before + run_suffix(args, method) + after)


def finetune_path(args, method, family):
    suffix = {"openai": ".jsonl", "chat": "_chat.jsonl"}.get(family, ".json")
    folder = "P_openai" if family in ("openai", "chat") else f"P_{family}"
    return (
        Path(args.saved)
        / "finetune_data"
        / folder
        / f"F_{safe_key(finetune_key(args, method))}{suffix}"
    )


def teacher_name(args):
    return "toy_teacher" if args.teacher == "toy" else model_key(args.teacher.removeprefix("hf:"))


def teacher_file(args):
    return completion_path(args.saved, teacher_name(args), teacher_key(args), args.task)


def test_file(args, method, epoch):
    """The completion file of a student: of an epoch of a training run, or of the untrained student on a split's test part."""
    seed = (
        f"_s{args.seed}" if args.student == "toy" and args.seed else ""
    )  # each seed makes a toy student of its own
    parts = (
        [f"T_{train_key(args, method)}", f"E_{epoch:03d}"]
        if method.startswith("ft")
        else [f"S_{args.split}{seed}"]
    )
    return completion_path(
        args.saved, model_key(args.student), method, args.task, *parts, *samples_suffix(args)
    )


def samples_suffix(args):
    """K sampled answers a question instead of one greedy answer"""
    return (
        [f"K_{args.eval_samples:02d}_t{round(100 * args.eval_temperature)}"]
        if args.eval_samples > 1
        else []
    )


def student_path(args, method):
    if args.out:
        return Path(args.out)
    return (
        Path(args.saved)
        / "models"
        / f"B_{model_key(args.student)}"
        / f"D_{args.task}__T_{train_key(args, method)}"
    )
