"""Fine-tune-CoT: a small student learns to reason from a large teacher's explanations (Ho, Schmid and Yun, ACL 2023).

    python finetune_cot.py                              # the toy task: no download, no key, no GPU
    python finetune_cot.py --task multiarith --teacher text-davinci-002 --student gpt2
    torchrun --standalone --nproc_per_node=2 finetune_cot.py --task multiarith ...

The method, top to bottom (paper §3): 1. `sample` a teacher's rationales, 2. `curate`: keep those whose answer is right,
3. `train` a student on question -> rationale -> answer, 4. `evaluate` it on the test questions.  Each stage writes one
file or folder under --saved and is skipped when it is already there, made with the same settings.
"""
import argparse
import functools
import json
import os
import re
import sys
import time
from pathlib import Path

import evaluate
import tasks
from data import batch, files, filters, look, studies, teacher
from data.completions import is_made, write_completions
from data.files import (UserError, base_model, finetune_key, finetune_path, student_path, teacher_file,
                        teacher_metadata, test_file, train_key)

PROMPTED = ("zs", "zs_cot", "fs_cot")     # methods that only prompt a model
FINE_TUNED = ("ft", "ft_cot")             # methods that fine-tune a student: on answers, on rationales and answers
DEFAULTS = {  # flags whose default depends on the task
    "paper": {"teacher": "text-davinci-002", "student": "gpt2", "degree": 1, "temperature": 0.0, "epochs": 20, "batch_size": 8, "lr": 3e-4},
    "toy": {"teacher": "toy", "student": "toy", "degree": 2, "temperature": 0.7, "epochs": 5, "batch_size": 16, "lr": 1e-3}}


# ---------------- 1. Sample: the teacher explains its answers (paper §3, step 1: reasoning generation)

def teacher_complete(args):
    """-> complete(prompts, n, temperature, max_new_tokens, stop) of the toy or the local model that --teacher names."""
    if args.teacher == "toy":
        from data.toy import toy_teacher
        return functools.partial(toy_teacher, seed=args.data_seed)
    return local_complete(args, *evaluate.load_model(args.teacher.removeprefix("hf:")))


def local_complete(args, model, tokenizer, family, path=None, method=None):
    """-> complete(...) of a local model, for completions that will be written to path (default: the teacher's)."""
    model.to(args.ranks.device)
    too_long = "cut" if (method or args.teacher_method) == "fs_cot" else "skip"  # few-shot prompts lose examples, not the question
    def complete(prompts, n, temperature, max_new_tokens, stop):
        return evaluate.generate(model, tokenizer, family, prompts, max_new_tokens, temperature, n, stop,
                                 args.eval_batch_size, args.seed if path else args.data_seed, too_long, journal=path or teacher_file(args))
    return complete


def few_shot(args, method, settings):
    """-> the few-shot prompt that a method needs, if any; it is one of the settings of what is made with it."""
    examples = evaluate.few_shot_examples(args.task, args.data) if method == "fs_cot" else ""
    settings |= {"examples": files.fingerprint(examples)} if examples else {}
    return examples


def at_sample_degree(args):
    return argparse.Namespace(**vars(args) | {"degree": args.sample_degree})


def sample(args):
    """Write the teacher's completion dataset: --degree rationales for every sample of the task, train and test, as published.
    (In a grid the largest of its degrees; cells that want fewer take the first.)"""
    path, args = teacher_file(args), at_sample_degree(args)
    if teacher.is_elsewhere(args):
        return on_master(args, lambda: teacher.sample(args, path, teacher_metadata(args)))
    samples = tasks.load(args.task, args.data)
    settings = {"teacher": args.teacher, "method": args.teacher_method, "degree": args.degree, "temperature": args.temperature,
                "seed": args.data_seed, "max_new_tokens": args.teacher_max_new_tokens, "samples": files.fingerprint(samples),
                "texts": tasks.texts_of(args.teacher_method, "decoder")}
    if args.teacher.startswith("hf:"):
        import train_loop
        settings["model"] = files.model_fingerprint(args.teacher[3:])
    examples = few_shot(args, args.teacher_method, settings)
    if on_master(args, lambda: is_made("sample", args, path, settings)):
        return path
    data = evaluate.make_completions(teacher_complete(args), samples, args.teacher_method, "decoder", args.teacher_method, args.degree,
                                     args.temperature, args.teacher_max_new_tokens, examples)
    if args.ranks.is_master:
        write_completions(path, teacher_metadata(args) | {"settings": settings}, data)
        print(f"sample: {len(samples)} questions x {args.degree} rationales -> {path}")
    return path


# ---------------- 2. Curate: keep what is right, and write it as the student will read it (paper §3, step 2: curation)

def family_of(args):
    """What the student reads: decoder, encoder_decoder, openai or chat files.  From its config, or, of a hub name, by the name."""
    if args.label_style in teacher.API_FAMILIES:
        return teacher.API_FAMILIES[args.label_style]
    if args.family:
        return args.family
    config = Path(args.student) / "config.json"
    if config.is_file():
        return "encoder_decoder" if files.read_json(config).get("is_encoder_decoder") else "decoder"
    return "encoder_decoder" if re.search(r"t5|bart|pegasus", args.student.lower()) else "decoder"


def label_template(args, method):
    name = f"{method}_{args.label_style}"
    return name if name in tasks.TEMPLATES else f"{method}_token"  # API styles; a style of one's own may have no ft


def correct_rationales(args, path, train):
    """-> (rows kept, rows looked at): completions 0 .. degree-1 of the training samples, and of those with a rationale the right
    ones, less what the flags of data/filters.py leave out."""
    metadata, rows = evaluate.read_completions(path, args.task)
    evaluate.check_rows(path, rows, args.task, tasks.load(args.task, args.data), args.data)
    wanted = set(train)
    rows = [row for row in rows if row["sample_index"] in wanted and row["completion_index"] < args.degree]
    if len(rows) < len(train) * args.degree:
        print(f"curate: {path} has {len(rows)} of the {len(train) * args.degree} rationales of {len(train)} questions x {args.degree}")
    template = metadata.get("prediction_template")
    rules = teacher.rules_of(args, metadata)
    judged = [(row, tasks.judge(args.task, template, row.get("completion"), row["answer"], rules)) for row in rows]
    right = sum(verdict.correct for _, verdict in judged)
    judged = [(row, verdict) for row, verdict in judged
              if filters.rationale_of(row).strip() and ("api" not in row or row.get("finish_reason") == "stop")]  # cut: not kept
    kept = filters.choose(args, judged)
    if not kept:
        wanted = "correct rationale" if args.filter == "right" else "rationale"
        raise UserError(f"no {wanted} is left for {args.task}: of the {len(rows)} completions of {len(train)} training samples in "
                        f"{path}, {right} are right by the {rules} rules and {len(judged)} explain anything; try "
                        f"{'' if rules == 'flexible' else '--rules flexible, '}another --teacher or a larger --degree")
    return filters.leave_out(args, kept), rows


def curation(args, method):
    """-> (path of the fine-tuning file, the settings it is to be made with, training indices)."""
    family, template, completions = family_of(args), label_template(args, method), teacher_file(args)
    train, _ = tasks.set_aside(tasks.load_split(args.task, args.split, args.data)[0], args.validation, args.data_seed)
    if method == "ft_cot" and not completions.exists():
        raise UserError(f"there are no completions of {args.teacher} for {args.task} at {completions}: "
                        "run --stage sample, or put the teacher's file there")
    samples = files.fingerprint(tasks.load(args.task, args.data))
    source = samples if method == "ft" else files.file_sha256(completions)
    settings = {"source": source, "samples": samples, "split": args.split, "train": files.fingerprint(train), "template": template,
                "family": family, "texts": tasks.texts_of(template, family)}
    if method == "ft_cot":
        rules = teacher.rules_of(args, evaluate.read_completions(completions, args.task)[0])
        settings |= {"teacher": args.teacher, "degree": args.degree, "rules": rules, **files.curation_options(args)}
        settings |= {"data_seed": args.data_seed} if args.filter == "random" else {}
    return finetune_path(args, method, family), settings, train


def curate(args, method, write=True):
    """Write the fine-tuning file of a method: ft: every training question with its gold answer; ft_cot: the correct
    rationales, each with the *gold* answer.  -> its path.  Beside it stands what it was made from.
    With write=False, raise UserError instead where the file is missing or was made with other settings."""
    path, settings, train = curation(args, method)
    made_from = path.with_suffix(".made_from.json")
    note = files.read_json(made_from) if path.exists() and made_from.exists() else {}
    unchanged = bool(note) and note.get("sha256") == files.file_sha256(path)
    if unchanged and files.is_current("curate", path, note.get("settings"), settings):
        return path
    if not write:
        raise UserError(f"the fine-tuning file {path} is missing or was made with other settings: make it with --stage curate")
    if method == "ft":
        samples = tasks.load(args.task, args.data)
        kept = total = [samples[i] for i in train]
    else:
        kept, total = correct_rationales(args, teacher_file(args), train)
    if method != "ft" and files.file_sha256(teacher_file(args)) != settings["source"]:
        raise UserError(f"{teacher_file(args)} was replaced by another run while it was read: start the same command again")
    rationales = [filters.rationale_of(row) if method == "ft_cot" else "" for row in kept]
    template, family = settings["template"], settings["family"]
    pairs = [tasks.format_sample(template, family, row["question"], r, row["answer"]) for row, r in zip(kept, rationales)]
    if family in teacher.API_FAMILIES.values():
        text = batch.job_file(family, pairs)
    else:
        inputs, labels = zip(*pairs)
        text = json.dumps({"sample_index": [row["sample_index"] for row in kept], "input": inputs, "label": labels}, indent=4)
    if path.exists() and not unchanged and path.read_bytes() != text.encode():  # not ours, or edited by hand
        files.keep_aside(path)
    made_from.unlink(missing_ok=True)  # first, so that no kill leaves a new file with an old note
    files.write_whole(path, text)
    files.write_json(made_from, {"settings": settings, "kept": len(kept), "total": len(total), "sha256": files.file_sha256(path)})
    what = "rationales" if method == "ft_cot" else "samples"
    print(f"curate: kept {len(kept)} of {len(total)} {what} ({100 * len(kept) / len(total):.1f}%) -> {path}")
    return path


# ---------------- 3. Train (paper §3, step 3: fine-tuning).  The loop itself is train_loop.py

def student_source(args):
    """-> folder or name to load the untrained student from; the toy student is made here."""
    if args.student != "toy":
        return args.student
    from data.toy import make_toy_student
    folder = Path(args.saved) / "models" / "B_toy_student" / f"untrained_s{args.seed}"
    with files.held(folder, args.ranks.is_master, patience=60):
        if args.ranks.is_master and not (folder / "tokenizer_config.json").exists():  # the last of its files
            make_toy_student(folder, args.seed)
    on_master(args, lambda: None)  # the other ranks wait here
    return str(folder)


TRAINED_WITH = ("epochs", "batch_size", "lr", "weight_decay", "seed", "precision", "max_length", "schedule", "warmup", "max_grad_norm")


def train(args, method, data_file):
    """Fine-tune the student on a fine-tuning file, evaluating every --eval_every epochs.  -> the student's folder."""
    import train_loop
    from data import training_log
    data = files.read_finetune_data(data_file)
    out, source = student_path(args, method), student_source(args)
    settings = {"student": files.model_fingerprint(source), "finetune_data": files.file_sha256(data_file)}
    settings |= {k: getattr(args, k) for k in TRAINED_WITH}
    if Path(source).resolve() == out.resolve():
        raise UserError(f"--out {out} is the student itself: choose another folder, so that it is kept")
    state = on_master(args, lambda: files.claim_student_folder(out, settings))
    if state == "finished":
        return out
    if not args.finetune_data and args.ranks.is_master:  # completions of an older run are not this one's
        for old in test_file(args, method, 0).parent.glob(f"D_{args.task}__T_{train_key(args, method)}__E_*.json"):
            if state == "new" or evaluate.read_completions(old)[0].get("settings", {}).get("model") != files.fingerprint(settings):
                files.keep_aside(old)
    model, tokenizer, family = evaluate.load_model(source)
    if f"P_{'decoder' if family == 'encoder_decoder' else 'encoder_decoder'}" in Path(data_file).parts:
        raise UserError(f"{data_file} is not for {family} students like {args.student}: curate again with --family {family}")
    print_once(args, f"train: {method} on {data_file} -> {out}")
    for epoch in train_loop.train(model, tokenizer, family, data, out, args, settings, args.ranks):
        if args.eval_every and epoch % args.eval_every == 0:
            path = test(args, method, model, tokenizer, family, epoch, files.fingerprint(settings))["file"]
            if args.keep_best and args.ranks.is_master:
                scored = evaluate.score(path, "validation" if args.validation else "test", args.split, args.data)
                training_log.keep_best(out, scored, model, tokenizer)
    print_once(args, f"train: the student is in {out}; try it: python evaluate.py generate --model {out} --prompts FILE --out FILE")
    return out


# ---------------- 4. Evaluate on the test questions (paper §4)

def test(args, method, model, tokenizer, family, epoch, made_by):
    """Write the completion dataset of a student on the test part, unless it is there; -> its score."""
    template = label_template(args, method) if method in FINE_TUNED else method
    path = test_file(args, method, epoch)
    samples = tasks.load(args.task, args.data)
    train, indices = tasks.load_split(args.task, args.split, args.data)
    rest, validation = tasks.set_aside(train, args.validation if method in FINE_TUNED else 0, args.data_seed)
    samples = [samples[i] for i in indices + validation]
    settings = {"model": made_by, "epoch": epoch, "template": template, "max_new_tokens": args.max_new_tokens,
                "samples": files.fingerprint(samples), "texts": tasks.texts_of(template, family)}
    k, temperature = args.eval_samples, args.eval_temperature if args.eval_samples > 1 else 0.0
    settings |= {"samples_a_question": k, "temperature": temperature, "seed": args.seed} if k > 1 else {}
    examples = few_shot(args, method, settings)
    if not on_master(args, lambda: is_made("evaluate", args, path, settings)):
        complete, start = local_complete(args, model, tokenizer, family, path, method), time.perf_counter()
        data = evaluate.make_completions(complete, samples, method, family, template, k, temperature, args.max_new_tokens, examples)
        metadata = {"dataset_key": args.task, "base_model": base_model(args.student), "completion_key": method,
                    "finetune_key": finetune_key(args, method) if method in FINE_TUNED else None,
                    "train_key": train_key(args, method) if method in FINE_TUNED else None, "epoch": epoch,
                    "prediction_template": template, "split": args.split, "part": "test", "validation": validation, "settings": settings,
                    "run": studies.about(args, method, len(rest), model)}
        if args.ranks.is_master:
            write_completions(path, metadata, data)
        seconds, log = time.perf_counter() - start, student_path(args, method) / "log.jsonl"
        trained = [row["seconds"] for row in (files.read_jsonl(log) if log.exists() else []) if "epoch_loss" in row]
        print_once(args, f"evaluate: {len(samples)} questions in {seconds:.1f} s"
                         + (f", {100 * seconds / max(trained[-1], 0.001):.0f}% of what training the epoch took" if trained else ""))
    result = on_master(args, lambda: evaluate.score(path, "test", args.split, args.data))
    print_once(args, f"evaluate: {method}{f' epoch {epoch}' if epoch else ''}: test accuracy {result['accuracy']:.2f}% "
                     f"[{result['low']:.1f}, {result['high']:.1f}] ({result['correct']} of {result['n']}) -> {path}")
    if k > 1:
        print_once(args, f"evaluate: {on_master(args, lambda: look.describe_votes(result, args.data))}")
    return result


def test_finished(args, method, out):
    """Score a finished student, or the untrained one for the methods that only prompt."""
    if method in PROMPTED:
        import train_loop
        source = student_source(args)
        return test(args, method, *evaluate.load_model(source), None, files.model_fingerprint(source))
    note = files.read_json(out / "run.json") if (out / "run.json").exists() else {}
    if not note.get("finished") or not isinstance(note.get("settings"), dict):
        raise UserError(f"there is no finished student in {out}: run --stage train")
    if not args.out:  # one of --out may have been trained on any file, with any flags
        data_file, wanted = finetune_path(args, method, family_of(args)), {k: getattr(args, k) for k in TRAINED_WITH}
        if args.stage == "evaluate" and data_file.exists() and (method == "ft" or teacher_file(args).exists()):
            on_master(args, lambda: curate(args, method, write=False))
            wanted["finetune_data"] = files.file_sha256(data_file)
        files.check_settings(out, note["settings"], wanted)
    epoch = note["settings"].get("epochs")
    if type(epoch) is not int:
        raise UserError(f"{out / 'run.json'} does not say after how many epochs the student was finished: train it again")
    return test(args, method, *evaluate.load_model(str(out)), epoch, files.fingerprint(note["settings"]))


# ---------------- Ranks: files are decided on and written by rank 0 alone

def on_master(args, function):
    """Run function on rank 0; every rank gets its result, when it is done."""
    if args.ranks.world_size == 1:
        return function()
    import torch.distributed as dist
    box = [function() if args.ranks.is_master else None]
    dist.broadcast_object_list(box)
    return box[0]


def print_once(args, text):
    if args.ranks.is_master:
        print(text, flush=True)


# ---------------- Command line

def parse_args(argv=None):
    """-> [the flags of one cell]: more than one where flags have several values, with the defaults that depend on the task filled in."""
    parser = argparse.ArgumentParser(usage=studies.USAGE, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to run")
    what.add_argument("--study", choices=studies.STUDIES, help="one of the paper's experiments: its flags stand in data/studies.py")
    what.add_argument("--task", nargs="+", default=["toy"], help=f"all (but toy), or of {', '.join(tasks.TASKS)} (default toy)")
    what.add_argument("--teacher", nargs="+", help="toy; hf:NAME (local); a model behind an API or with a file in --saved (default text-davinci-002, the paper's)")
    what.add_argument("--student", nargs="+", help="Hugging Face folder or name (default gpt2), or toy, a tiny one made on the spot")
    what.add_argument("--method", nargs="+", choices=[*PROMPTED, *FINE_TUNED], default=list(FINE_TUNED), help="default: ft ft_cot")
    what.add_argument("--stage", choices=["all", "sample", "curate", "train", "evaluate"], default="all", help="one stage (default all)")
    what.add_argument("--split", nargs="+", default="default", help="default, template, few_shot_8, few_shot_32, few_shot_128 (default: default)")
    what.add_argument("--seed", "--seeds", nargs="+", type=int, default=0, help="of order, dropout, the toy student, students' samples (default 0)")
    what.add_argument("--data_seed", type=int, default=0, help="of local teachers, the validation share, --filter random (default 0)")
    where = parser.add_argument_group("where")
    where.add_argument("--saved", default="saved", help="folder for everything a run writes (default saved)")
    where.add_argument("--data", default="data", help="folder of the prepared benchmarks (default data)")
    where.add_argument("--finetune_data", help="with --stage train: a fine-tuning file of your own")
    where.add_argument("--out", help="folder of the student (default under --saved; for one --method)")
    where.add_argument("--train_key", help="name of this training run in file names (default from method, degree, split and seed)")
    teacher.add_flags(parser)
    curating = parser.add_argument_group("curation (paper §3, step 2; --filter and below beyond it)")
    curating.add_argument("--rules", choices=["paper", "flexible"], help="what counts as right (default paper; of chat models, flexible)")
    curating.add_argument("--label_style", choices=[*tasks.LABEL_STYLES, *teacher.API_FAMILIES], default="token",
                          help="of labels (default token: '{question} ###' -> ' {rationale} --> {answer}'; gpt3, chat: for an API)")
    filters.add_flags(curating)
    training = parser.add_argument_group("training (paper, appendix)")
    training.add_argument("--epochs", type=int, help="default 20, the paper's; toy 5")
    training.add_argument("--batch_size", nargs="+", type=int, help="samples an optimizer step sees, over all ranks (default 8, the paper's; toy 16)")
    training.add_argument("--micro_batch_size", type=int, help="samples a forward pass and rank: bounds memory, not what a step sees (default: all)")
    training.add_argument("--micro_tokens", type=int, default=0, help="tokens per forward pass and rank, padding included (default 0: 1024 on CPUs, no bound on GPUs)")
    training.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True,
                          help="lay samples end to end instead of padding them, where the student gives the same logits so (default on)")
    training.add_argument("--lr", nargs="+", type=float, help="learning rate of AdamW (default 3e-4, the paper's; toy 1e-3)")
    training.add_argument("--schedule", choices=["constant", "linear", "cosine"], default="constant",
                          help="of the learning rate after warm-up, down to 0 at the last step (default constant, the paper's)")
    training.add_argument("--warmup", type=int, default=0, help="steps in which the learning rate rises from 0 (default 0, the paper's)")
    training.add_argument("--weight_decay", type=float, default=0.01, help="default 0.01, the paper's")
    training.add_argument("--max_grad_norm", type=float, default=0.0, help="clip the gradient's norm to this (default 0: never, as the paper)")
    training.add_argument("--precision", choices=["fp32", "tf32", "bf16", "fp16"], default="fp32",
                          help="autocast of products (default fp32; tf32: faster fp32 products, on CPUs too; T5 overflows in fp16)")
    training.add_argument("--gradient_checkpointing", action="store_true", help="compute activations twice to keep fewer (default off)")
    training.add_argument("--compile", action="store_true", help="torch.compile the student (default off)")
    training.add_argument("--shard", choices=["no", "gpu", "cpu"], default="no",
                          help="split weights and optimizer over ranks, FSDP2; cpu: keep them in main memory (default no: DDP)")
    training.add_argument("--max_length", type=int, default=512, help="tokens of input and of label; longer samples are dropped (default 512, the paper's)")
    training.add_argument("--checkpoint_every", type=int, default=1, help="epochs between checkpoints to resume from (default 1; 0 never)")
    training.add_argument("--checkpoint_steps", type=int, default=0, help="steps between checkpoints within an epoch (default 0: none)")
    training.add_argument("--keep", type=int, default=1, help="checkpoints kept, the newest (default 1)")
    training.add_argument("--keep_best", action="store_true", help="with --eval_every: keep the student of the best epoch too, in best_epoch_* of "
                          "its folder; best on the --validation share or, without one, on the test part (the paper's protocol)")
    training.add_argument("--log_every", type=int, default=0, help="steps between log lines (default 0: one line an epoch)")
    training.add_argument("--family", choices=["decoder", "encoder_decoder"], help="of a student by hub name (default: by its name)")
    training.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    evaluating = parser.add_argument_group("evaluation")
    evaluating.add_argument("--eval_every", type=int, default=0, help="epochs between evaluations (default 0: at the end only; paper 1)")
    evaluating.add_argument("--validation", type=float, default=0.0, help="share of train set aside to choose the epoch by (default 0)")
    evaluating.add_argument("--max_new_tokens", type=int, default=512, help="of the student, a question (default 512, the longest label)")
    evaluating.add_argument("--eval_samples", type=int, default=1, help="K answers a question: majority vote, pass@k (default 1, greedy)")
    evaluating.add_argument("--eval_temperature", type=float, default=0.7, help="of --eval_samples above 1 (default 0.7)")
    evaluating.add_argument("--eval_batch_size", type=int, help=evaluate.BATCH_SIZE_HELP)
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
    teacher.check(args)
    filters.check(args)
    if not (args.dry_run and args.task == "all"):
        tasks.find_task(args.task)
    for name, checked in ((args.teacher.removeprefix("hf:"), base_model), (args.student, base_model), (args.split, files.safe_key),
                          (args.train_key or "none", files.safe_key)):
        checked(name)
    for name in ("degree", "epochs", "batch_size", "micro_batch_size", "max_length", "max_new_tokens", "eval_batch_size",
                 "eval_samples", "teacher_max_new_tokens", "keep"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise UserError(f"--{name} {value} must be 1 or more")
    for name in ("temperature", "weight_decay", "checkpoint_every", "checkpoint_steps", "eval_every", "seed", "data_seed", "micro_tokens", "warmup",
                 "max_grad_norm", "log_every", "validation"):
        if not 0 <= getattr(args, name) < 10**9:  # so that nan is refused too
            raise UserError(f"--{name} {getattr(args, name)} must be 0 or more, and below a billion")
    if not 0 < args.lr < 10:
        raise UserError(f"--lr {args.lr} must be above 0 and below 10")
    if args.finetune_data and (args.stage != "train" or len(args.method) > 1 and not args.out):
        raise UserError("--finetune_data goes with --stage train and --out DIR (or one --method)")
    if (args.out or args.train_key) and len(args.method) > 1 and not args.finetune_data:
        raise UserError("--out and --train_key are of one student: name one --method")
    if args.keep_best and not args.eval_every:
        raise UserError("--keep_best compares epochs: say how often with --eval_every 1")
    if args.shard != "no" and args.eval_every:
        raise UserError("--shard spreads the weights over the ranks while training, so it cannot be evaluated in between: leave out --eval_every")
    if args.degree > 1 and not args.temperature and not teacher.is_elsewhere(args):
        raise UserError(f"--degree {args.degree} at --temperature 0 would give {args.degree} identical rationales: use --temperature 0.7")


def ends_with(args):
    """-> the file that a run ends with, and the one of its teacher: what tells the cells of a grid apart."""
    teachers = teacher_file(args)
    if args.stage == "sample":
        return teachers, teachers
    method = args.method[-1]
    file = finetune_path(args, method, family_of(args)) if args.stage == "curate" else test_file(args, method, 0)
    return file, teachers


def needs_torch(args):
    on_api = args.label_style in teacher.API_FAMILIES
    return not (args.stage in ("sample", "curate") or on_api) or args.teacher.startswith("hf:") and args.stage in ("all", "sample")


def run(args):
    """The method: one call a stage.  -> the scores of the methods that were evaluated."""
    stages = ("sample", "curate", "train", "evaluate") if args.stage == "all" else (args.stage,)
    methods = args.method[-1:] if args.finetune_data else args.method
    fine_tuned = [method for method in methods if method in FINE_TUNED]
    if "sample" in stages and (args.stage == "sample" or "ft_cot" in fine_tuned):
        with files.held(teacher_file(args), args.ranks.is_master and not teacher.is_elsewhere(args)):  # the API has its journal
            sample(args)
    if args.stage == "curate" and "ft_cot" in fine_tuned and teacher.is_elsewhere(args):
        teacher.publish_partial(at_sample_degree(args), teacher_file(args), teacher_metadata(args))
    results, curated = [], {}
    if "curate" in stages:
        for method in fine_tuned:
            path = finetune_path(args, method, family_of(args))
            with files.held(path, args.ranks.is_master, patience=60):  # other seeds may share it
                curated[method] = on_master(args, lambda: files.file_sha256(curate(args, method)))
            if args.show:
                filters.show(path, args.show)
    for method in methods:
        if "train" in stages and method in FINE_TUNED:
            data_file = args.finetune_data or finetune_path(args, method, family_of(args))
            if args.stage == "train" and not args.finetune_data:
                on_master(args, lambda: curate(args, method, write=False))
            if method in curated and curated[method] != files.file_sha256(data_file):
                raise UserError(f"{data_file} was replaced by another run since it was curated: start the same command again")
            if args.label_style in teacher.API_FAMILIES:
                batch.fine_tune(args, Path(data_file), batch.student(args, method)[0])
            else:
                with files.held(student_path(args, method), args.ranks.is_master):
                    train(args, method, Path(data_file))
        if "evaluate" in stages and args.label_style in teacher.API_FAMILIES:
            results.append(batch.test(args, label_template(args, method) if method in FINE_TUNED else method, *batch.student(args, method)))
        elif "evaluate" in stages:
            with files.held(test_file(args, method, args.epochs), args.ranks.is_master):
                results.append(test_finished(args, method, student_path(args, method)))
    return results


def main(argv=None):
    """Check, run, and turn every error a user can mend into one sentence and a failing exit."""
    files.print_anything()
    cells = parse_args(argv)
    try:
        for args in cells:
            check(args)
        cells = studies.gather(cells, ends_with)
        ranks = argparse.Namespace(world_size=1, is_master=True)
        if any(needs_torch(args) for args in cells):
            import train_loop
            ranks = train_loop.setup_ranks(evaluate.find_device(cells[0].device))
        elif os.environ.get("RANK", "0") != "0":
            return  # under torchrun: one process is enough
        for args in cells:
            args.ranks = ranks
        if len(cells) > 1:
            studies.run_cells(cells, run)
        elif (results := run(args)) and ranks.is_master:
            look.report(results, args.student, args.seed, args.saved)
        if ranks.world_size > 1:
            train_loop.dist.destroy_process_group()
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except RuntimeError as e:
        sys.exit(files.lost_rank(e))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; start the same command again to go on")


if __name__ == "__main__":
    main()
