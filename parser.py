"""The flags of finetune_cot.py, in titled groups; what they mean together is in flags.py.

A flag's name is also its name in settings, in log.jsonl and in train_loop.TrainConfig.  A new one
is one or two lines here, and a name in a list of provenance.py: whether it changes a result.
"""

import argparse
from collections.abc import Callable

import tasks
from provenance import STAGES
from storage import default_folder
from tasks import API_FAMILIES, FINE_TUNED, PROMPTED
from terminal import Parser

USAGE = "%(prog)s [--task NAME ...] [--teacher NAME] [--student NAME] [more flags]"
EPILOG = (
    "Several values (--degree 1 2 4, or 1,2,4) make a run of each.  Toy: the default of --task toy."
)
OTHER_NAMES = {  # of the flags, in other programs
    "--learning_rate": "--lr",
    "--model": "--student",
    "--model_name_or_path": "--student",
    "--dataset": "--task",
    "--num_epochs": "--epochs",
    "--num_train_epochs": "--epochs",
    "--per_device_train_batch_size": "--batch_size",
}
BASIC = "task teacher student method degree epochs batch_size lr device".split()  # of --help


def make_parser(description: str, show_all: bool = False) -> Parser:
    """Make the parser of all flags, in titled groups; show_all: in its help, too."""
    form = argparse.RawDescriptionHelpFormatter
    about = {"usage": USAGE, "description": description, "formatter_class": form}
    parser = Parser(BASIC, show_all, **about, epilog=EPILOG)
    add_run_flags(parser.group("what to run"))
    add_file_flags(parser.group("where"))
    add_teacher_flags(parser.group("teacher (paper §3, step 1)"))
    add_api_flags(parser.group("API teachers (key: OPENAI_API_KEY in the environment)"))
    add_curation_flags(parser.group("curation (paper §3, step 2)"))
    add_training_flags(parser.group("training (paper, appendix)"))
    add_hardware_flags(parser.group("speed and memory"))
    add_checkpoint_flags(parser.group("checkpoints and log"))
    add_evaluation_flags(parser.group("evaluation (paper §4)"))
    parser.other_names = OTHER_NAMES
    parser.set_defaults(sample_degree=None)  # of a grid: the largest degree, sampled once for all
    return parser


# fmt: off
def add_run_flags(add: Callable) -> None:
    """Add the flags of what to run."""
    names = ", ".join(tasks.TASKS)
    methods = [*PROMPTED, *FINE_TUNED]
    add("--study", help="an experiment of the paper, a row in extras/studies.py")
    add("--task", nargs="+", default=["toy"], help=f"toy (default), all (but toy), or of {names}")
    add("--teacher", nargs="+", help="hf:NAME, a local model; else a model behind an API or one "
        "with a file in --saved (default toy, else text-davinci-002, the paper's)")
    add("--student", nargs="+", help="Hugging Face folder or name (default toy, else gpt2)")
    add("--method", nargs="+", choices=methods, default=list(FINE_TUNED), help="prompted: zs, "
        "zs_cot, fs_cot; fine-tuned: ft (on answers), ft_cot (on rationales); default: ft ft_cot")
    add("--stage", choices=["all", *STAGES], default="all", help="default all")
    add("--redo", choices=STAGES, help="make this stage and those after it again, though made with "
        "the same settings; what was there is kept aside (never sample, which costs money)")
    add("--split", nargs="+", default="default", help="default, template, few_shot_8, few_shot_32 "
        "or few_shot_128 (default: default)")
    add("--seed", "--seeds", nargs="+", type=int, default=0, help="of batch order, dropout, the "
        "toy student and sampled answers (default 0)")
    add("--data_seed", type=int, default=0, help="of local teachers, the validation share and "
        "--filter random (default 0)")


def add_file_flags(add: Callable) -> None:
    saved, data = map(default_folder, ("saved", "data"))
    add("--saved", metavar="DIR", default=saved, help="all that runs write (default saved)")
    add("--data", metavar="DIR", default=data, help="prepared benchmarks (default data)")
    add("--finetune_data", metavar="FILE", help="with --stage train: your own fine-tuning file")
    add("--out", metavar="DIR", help="folder of one --method's student (default in --saved)")
    add("--train_key", help="name of this training run in file names (default from the flags)")


def add_teacher_flags(add: Callable) -> None:
    """Add the flags of how the teacher is asked."""
    methods = ["zs", "zs_cot", "zs_cot_one_step", "fs_cot"]
    add("--teacher_method", nargs="+", choices=methods, default="zs_cot", help="prompting method "
        "of the teacher: zs, zs_cot (default), zs_cot_one_step (costs less), fs_cot")
    add("--degree", nargs="+", type=int, help="D, the rationales that the teacher gives to each "
        "question (default toy 2, else 1; paper 1 to 64)")
    add("--chat", action=argparse.BooleanOptionalAction, help="ask a local model (hf:NAME; zs and "
        "zs_cot students) in its chat template (default: where its tokenizer has one)")
    add("--thinking", action=argparse.BooleanOptionalAction, help="tell that template to think, or "
        "not to (default: as it has it)")
    add("--temperature", type=float, help="default toy 0.7, else 0 (paper: 0.7 where D > 1)")
    add("--teacher_max_new_tokens", type=int, help="tokens a rationale, reasoning included "
        "(default 128, the paper's; of a chat behind an API 1024, since 128 cut most of today's)")


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
    add("--reasoning_effort", help="of reasoning models: none, minimal, low, medium, high, ...")
    add("--top_p", type=float, help="nucleus sampling (default: the server's)")
    add("--system", metavar="TEXT_OR_FILE", help="the system's turn of a chat (default: none)")
    add("--extra_body", metavar="JSON", help="more for each request, like "
        "'{\"chat_template_kwargs\": {\"enable_thinking\": false}}' (vLLM)")
    add("--extra_headers", default="", metavar="NAME=ENV_VARIABLE,...", help="headers, their "
        "values from the environment: api-key=AZURE_OPENAI_API_KEY")
    add("--dry_run", action="store_true", help="with --stage sample: estimate the cost; --task "
        "all: of every benchmark")
    add("--price_in", type=float, help="dollars a million prompt tokens")
    add("--price_out", type=float, help="dollars a million completion tokens")
    add("--max_cost", type=float, help="stop before a completion file costs more dollars than "
        "this, earlier runs included")
    add("--batch", choices=["submit", "status", "fetch", "cancel"], help="with --stage sample: use "
        "the Batch API, step by step")


def add_curation_flags(add: Callable) -> None:
    """Add the flags of which rationales are kept."""
    styles = [*tasks.LABEL_STYLES, *API_FAMILIES]
    filters = ["right", "all", "random", "wrong"]
    add("--rules", choices=["paper", "flexible"], help="rules that read the answer (default "
        "paper; of chat models, flexible)")
    add("--rationale", choices=["content", "reasoning", "both"], default="content", help="what "
        "is learnt of a reasoning teacher: what it said (default), thought, or both")
    add("--label_style", choices=styles, default="token", help="default token: '{question} ###' "
        "-> ' {rationale} --> {answer}'; gpt3, chat: files for an API")
    add("--filter", nargs="+", choices=filters, default="right", help="rationales to learn from: "
        "right (default, the paper's); for studies all, wrong, or random: as many of all as are "
        "right and kept.  A wrong one keeps the answer of its teacher")
    add("--max_rationale_words", nargs="+", type=int, default=0, help="drop longer rationales "
        "(default 0: none)")
    add("--max_per_question", type=int, default=0, help="keep the first so many rationales of a "
        "question (default 0: all)")
    add("--max_similarity", type=float, default=1.0, help="drop a rationale that shares more than "
        "this of its word trigrams with an earlier one of its question (default 1)")
    add("--drop_unfinished", action="store_true", help="drop rationales cut by the token limit")
    add("--drop_duplicates", action="store_true", help="drop a question's repeated rationales")
    add("--show", type=int, default=0, help="with --stage curate: print so many samples to read")


def add_training_flags(add: Callable) -> None:
    """Add the flags of the optimizer and its schedule."""
    schedules = ["constant", "linear", "cosine"]
    add("--epochs", type=int, help="default toy 2, else 20, the paper's")
    add("--batch_size", nargs="+", type=int, help="samples of a step (default 8)")
    add("--lr", nargs="+", type=float, help="learning rate of AdamW (default toy 4e-3, else 3e-4)")
    add("--schedule", choices=schedules, help="of the learning rate after warm-up, down to 0 "
        "(default toy linear, else constant, the paper's)")
    add("--warmup", type=int, help="steps of linear warm-up (default toy 50, else 0, the paper's)")
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
    add("--cuda_graphs", action="store_true", help="on one GPU, steps and tokens as CUDA graphs: "
        "tested on a CPU, not yet run on a GPU (default off)")
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
    add("--max_new_tokens", type=int, help="of the student, a question (default toy 64, else 512)")
    add("--eval_samples", type=int, default=1, help="K answers a question for majority vote and "
        "pass@k (default 1, greedy)")
    add("--eval_temperature", type=float, default=0.7, help="where K > 1 (default 0.7)")
    add("--eval_batch_size", type=int, help="rows decoded at once (default: 96 on a CPU, 512 on a "
        "GPU, or as many as memory allows); more is faster and takes more memory")


# fmt: on
