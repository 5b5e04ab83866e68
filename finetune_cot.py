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
import flags
import storage
import teacher
from extras import batch_api as batch, filters, report as look, studies
from flags import (
    check,
    finetune_key,
    finetune_path,
    is_remote_teacher,
    parse_args,
    student_path,
    teacher_file,
    teacher_metadata,
    test_file,
    train_key,
)
from storage import UserError, model_key, completions_match, write_completions
from tasks import FINE_TUNED, PROMPTED


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
    too_long = (
        "cut" if (method or args.teacher_method) == "fs_cot" else "skip"
    )  # few-shot prompts lose examples, not the question

    def complete(prompts, n, temperature, max_new_tokens, stop):
        return evaluate.generate(
            model,
            tokenizer,
            family,
            prompts,
            max_new_tokens,
            temperature,
            n,
            stop,
            args.eval_batch_size,
            args.seed if path else args.data_seed,
            too_long,
            journal=path or teacher_file(args),
        )

    return complete


def few_shot(args, method, settings):
    """-> the few-shot prompt that a method needs, if any; it is one of the settings of what is made with it."""
    examples = evaluate.few_shot_prompt(args.task, args.data) if method == "fs_cot" else ""
    settings |= {"examples": storage.fingerprint(examples)} if examples else {}
    return examples


def at_sample_degree(args):
    return argparse.Namespace(**vars(args) | {"degree": args.sample_degree})


def sample(args):
    """Write the teacher's completion dataset: --degree rationales for every sample of the task, train and test, as published.
    (In a grid the largest of its degrees; cells that want fewer take the first.)"""
    path = teacher_file(args)
    args = at_sample_degree(args)
    if is_remote_teacher(args):
        return on_master(args, lambda: teacher.sample(args, path, teacher_metadata(args)))
    samples = tasks.load(args.task, args.data)
    settings = {
        "teacher": args.teacher,
        "method": args.teacher_method,
        "degree": args.degree,
        "temperature": args.temperature,
        "seed": args.data_seed,
        "max_new_tokens": args.teacher_max_new_tokens,
        "samples": storage.fingerprint(samples),
        "texts": tasks.template_fingerprint(args.teacher_method, "decoder"),
    }
    if args.teacher.startswith("hf:"):
        settings["model"] = storage.model_fingerprint(args.teacher[3:])
    examples = few_shot(args, args.teacher_method, settings)
    if on_master(args, lambda: completions_match("sample", args, path, settings)):
        return path
    data = evaluate.make_completions(
        teacher_complete(args),
        samples,
        args.teacher_method,
        "decoder",
        args.teacher_method,
        args.degree,
        args.temperature,
        args.teacher_max_new_tokens,
        examples,
    )
    if args.ranks.is_master:
        write_completions(path, teacher_metadata(args) | {"settings": settings}, data)
        print(f"sample: {len(samples)} questions x {args.degree} rationales -> {path}")
    return path


# ---------------- 2. Curate: keep what is right, and write it as the student will read it (paper §3, step 2: curation)


def family_of(args):
    """What the student reads: decoder, encoder_decoder, openai or chat storage.  From its config, or, of a hub name, by the name."""
    if args.label_style in tasks.API_FAMILIES:
        return tasks.API_FAMILIES[args.label_style]
    if args.family:
        return args.family
    config = Path(args.student) / "config.json"
    if config.is_file():
        return (
            "encoder_decoder" if storage.read_json(config).get("is_encoder_decoder") else "decoder"
        )
    return "encoder_decoder" if re.search(r"t5|bart|pegasus", args.student.lower()) else "decoder"


def label_template(args, method):
    name = f"{method}_{args.label_style}"
    return (
        name if name in tasks.TEMPLATES else f"{method}_token"
    )  # API styles; a style of one's own may have no ft


def correct_rationales(args, path, train):
    """-> (rows kept, rows looked at): completions 0 .. degree-1 of the training samples, and of those with a rationale the right
    ones, less what the flags of extras/filters.py leave out."""
    metadata, rows = evaluate.read_completions(path, args.task)
    evaluate.check_rows(path, rows, args.task, tasks.load(args.task, args.data), args.data)
    wanted = set(train)
    rows = [
        row
        for row in rows
        if row["sample_index"] in wanted and row["completion_index"] < args.degree
    ]
    if len(rows) < len(train) * args.degree:
        print(
            f"curate: {path} has {len(rows)} of the {len(train) * args.degree} rationales of {len(train)} questions x {args.degree}"
        )
    template = metadata.get("prediction_template")
    rules = teacher.rules_of(args, metadata)
    judged = [
        (row, tasks.grade(args.task, template, row.get("completion"), row["answer"], rules))
        for row in rows
    ]
    right = sum(verdict.correct for _, verdict in judged)
    judged = [
        (row, verdict)
        for row, verdict in judged
        if filters.rationale_of(row).strip()
        and ("api" not in row or row.get("finish_reason") == "stop")
    ]  # cut: not kept
    kept = filters.choose(args, judged)
    if not kept:
        wanted = "correct rationale" if args.filter == "right" else "rationale"
        raise UserError(
            f"no {wanted} is left for {args.task}: of the {len(rows)} completions of {len(train)} training samples in "
            f"{path}, {right} are right by the {rules} rules and {len(judged)} explain anything; try "
            f"{'' if rules == 'flexible' else '--rules flexible, '}another --teacher or a larger --degree"
        )
    return filters.leave_out(args, kept), rows


def curation(args, method):
    """-> (path of the fine-tuning file, the settings it is to be made with, training indices)."""
    family = family_of(args)
    template = label_template(args, method)
    completions = teacher_file(args)
    train, _ = tasks.split_off_validation(
        tasks.load_split(args.task, args.split, args.data)[0], args.validation, args.data_seed
    )
    if method == "ft_cot" and not completions.exists():
        raise UserError(
            f"there are no completions of {args.teacher} for {args.task} at {completions}: "
            "run --stage sample, or put the teacher's file there"
        )
    samples = storage.fingerprint(tasks.load(args.task, args.data))
    source = samples if method == "ft" else storage.file_sha256(completions)
    settings = {
        "source": source,
        "samples": samples,
        "split": args.split,
        "train": storage.fingerprint(train),
        "template": template,
        "family": family,
        "texts": tasks.template_fingerprint(template, family),
    }
    if method == "ft_cot":
        rules = teacher.rules_of(args, evaluate.read_completions(completions, args.task)[0])
        settings |= {
            "teacher": args.teacher,
            "degree": args.degree,
            "rules": rules,
            **flags.curation_options(args),
        }
        settings |= {"data_seed": args.data_seed} if args.filter == "random" else {}
    return finetune_path(args, method, family), settings, train


def curate(args, method, write=True):
    """Write the fine-tuning file of a method: ft: every training question with its gold answer; ft_cot: the correct
    rationales, each with the *gold* answer.  -> its path.  Beside it stands what it was made from.
    With write=False, raise UserError instead where the file is missing or was made with other settings."""
    path, settings, train = curation(args, method)
    made_from = path.with_suffix(".made_from.json")
    note = storage.read_json(made_from) if path.exists() and made_from.exists() else {}
    unchanged = bool(note) and note.get("sha256") == storage.file_sha256(path)
    if unchanged and storage.settings_match("curate", path, note.get("settings"), settings):
        return path
    if not write:
        raise UserError(
            f"the fine-tuning file {path} is missing or was made with other settings: make it with --stage curate"
        )
    if method == "ft":
        samples = tasks.load(args.task, args.data)
        kept = total = [samples[i] for i in train]
    else:
        kept, total = correct_rationales(args, teacher_file(args), train)
    if method != "ft" and storage.file_sha256(teacher_file(args)) != settings["source"]:
        raise UserError(
            f"{teacher_file(args)} was replaced by another run while it was read: start the same command again"
        )
    rationales = [filters.rationale_of(row) if method == "ft_cot" else "" for row in kept]
    template = settings["template"]
    family = settings["family"]
    pairs = [
        tasks.format_sample(template, family, row["question"], r, row["answer"])
        for row, r in zip(kept, rationales)
    ]
    if family in tasks.API_FAMILIES.values():
        text = batch.job_file(family, pairs)
    else:
        inputs, labels = zip(*pairs)
        text = json.dumps(
            {
                "sample_index": [row["sample_index"] for row in kept],
                "input": inputs,
                "label": labels,
            },
            indent=4,
        )
    if (
        path.exists() and not unchanged and path.read_bytes() != text.encode()
    ):  # not ours, or edited by hand
        storage.move_to_backup(path)
    made_from.unlink(missing_ok=True)  # first, so that no kill leaves a new file with an old note
    storage.write_atomic(path, text)
    storage.write_json(
        made_from,
        {
            "settings": settings,
            "kept": len(kept),
            "total": len(total),
            "sha256": storage.file_sha256(path),
        },
    )
    what = "rationales" if method == "ft_cot" else "samples"
    print(
        f"curate: kept {len(kept)} of {len(total)} {what} ({100 * len(kept) / len(total):.1f}%) -> {path}"
    )
    return path


# ---------------- 3. Train (paper §3, step 3: fine-tuning).  The loop itself is train_loop.py


def student_source(args):
    """-> folder or name to load the untrained student from; the toy student is made here."""
    if args.student != "toy":
        return args.student
    from data.toy import make_toy_student

    folder = Path(args.saved) / "models" / "B_toy_student" / f"untrained_s{args.seed}"
    with storage.file_lock(folder, args.ranks.is_master, patience=60):
        if (
            args.ranks.is_master and not (folder / "tokenizer_config.json").exists()
        ):  # the last of its files
            make_toy_student(folder, args.seed)
    on_master(args, lambda: None)  # the other ranks wait here
    return str(folder)


TRAINED_WITH = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "seed",
    "precision",
    "max_length",
    "schedule",
    "warmup",
    "max_grad_norm",
)


def train(args, method, data_file):
    """Fine-tune the student on a fine-tuning file, evaluating every --eval_every epochs.  -> the student's folder."""
    import train_loop

    data = storage.read_finetune_data(data_file)
    out = student_path(args, method)
    source = student_source(args)
    settings = {
        "student": storage.model_fingerprint(source),
        "finetune_data": storage.file_sha256(data_file),
    }
    settings |= {k: getattr(args, k) for k in TRAINED_WITH}
    if Path(source).resolve() == out.resolve():
        raise UserError(
            f"--out {out} is the student itself: choose another folder, so that it is kept"
        )
    state = on_master(args, lambda: storage.prepare_output_dir(out, settings))
    if state == "finished":
        return out
    if (
        not args.finetune_data and args.ranks.is_master
    ):  # completions of an older run are not this one's
        for old in test_file(args, method, 0).parent.glob(
            f"D_{args.task}__T_{train_key(args, method)}__E_*.json"
        ):
            if state == "new" or evaluate.read_completions(old)[0].get("settings", {}).get(
                "model"
            ) != storage.fingerprint(settings):
                storage.move_to_backup(old)
    model, tokenizer, family = evaluate.load_model(source)
    if (
        f"P_{'decoder' if family == 'encoder_decoder' else 'encoder_decoder'}"
        in Path(data_file).parts
    ):
        raise UserError(
            f"{data_file} is not for {family} students like {args.student}: curate again with --family {family}"
        )
    print_once(args, f"train: {method} on {data_file} -> {out}")
    for epoch in train_loop.train(model, tokenizer, family, data, out, args, settings, args.ranks):
        if args.eval_every and epoch % args.eval_every == 0:
            path = test(
                args, method, model, tokenizer, family, epoch, storage.fingerprint(settings)
            )["file"]
            if args.keep_best and args.ranks.is_master:
                scored = evaluate.score(
                    path, "validation" if args.validation else "test", args.split, args.data
                )
                train_loop.keep_best(out, scored, model, tokenizer)
    print_once(
        args,
        f"train: the student is in {out}; try it: python evaluate.py generate --model {out} --prompts FILE --out FILE",
    )
    return out


# ---------------- 4. Evaluate on the test questions (paper §4)


def test(args, method, model, tokenizer, family, epoch, made_by):
    """Write the completion dataset of a student on the test part, unless it is there; -> its score."""
    template = label_template(args, method) if method in FINE_TUNED else method
    path = test_file(args, method, epoch)
    samples = tasks.load(args.task, args.data)
    train, indices = tasks.load_split(args.task, args.split, args.data)
    rest, validation = tasks.split_off_validation(
        train, args.validation if method in FINE_TUNED else 0, args.data_seed
    )
    samples = [samples[i] for i in indices + validation]
    settings = {
        "model": made_by,
        "epoch": epoch,
        "template": template,
        "max_new_tokens": args.max_new_tokens,
        "samples": storage.fingerprint(samples),
        "texts": tasks.template_fingerprint(template, family),
    }
    k = args.eval_samples
    temperature = args.eval_temperature if args.eval_samples > 1 else 0.0
    settings |= (
        {"samples_a_question": k, "temperature": temperature, "seed": args.seed} if k > 1 else {}
    )
    examples = few_shot(args, method, settings)
    if not on_master(args, lambda: completions_match("evaluate", args, path, settings)):
        complete = local_complete(args, model, tokenizer, family, path, method)
        start = time.perf_counter()
        data = evaluate.make_completions(
            complete,
            samples,
            method,
            family,
            template,
            k,
            temperature,
            args.max_new_tokens,
            examples,
        )
        metadata = {
            "dataset_key": args.task,
            "base_model": model_key(args.student),
            "completion_key": method,
            "finetune_key": finetune_key(args, method) if method in FINE_TUNED else None,
            "train_key": train_key(args, method) if method in FINE_TUNED else None,
            "epoch": epoch,
            "prediction_template": template,
            "split": args.split,
            "part": "test",
            "validation": validation,
            "settings": settings,
            "run": studies.about(args, method, len(rest), model),
        }
        if args.ranks.is_master:
            write_completions(path, metadata, data)
        seconds = time.perf_counter() - start
        log = student_path(args, method) / "log.jsonl"
        trained = [
            row["seconds"]
            for row in (storage.read_jsonl(log) if log.exists() else [])
            if "epoch_loss" in row
        ]
        print_once(
            args,
            f"evaluate: {len(samples)} questions in {seconds:.1f} s"
            + (
                f", {100 * seconds / max(trained[-1], 0.001):.0f}% of what training the epoch took"
                if trained
                else ""
            ),
        )
    result = on_master(args, lambda: evaluate.score(path, "test", args.split, args.data))
    print_once(
        args,
        f"evaluate: {method}{f' epoch {epoch}' if epoch else ''}: test accuracy {result['accuracy']:.2f}% "
        f"[{result['low']:.1f}, {result['high']:.1f}] ({result['correct']} of {result['n']}) -> {path}",
    )
    if k > 1:
        print_once(
            args, f"evaluate: {on_master(args, lambda: look.describe_votes(result, args.data))}"
        )
    return result


def test_finished(args, method, out):
    """Score a finished student, or the untrained one for the methods that only prompt."""
    if method in PROMPTED:
        source = student_source(args)
        return test(
            args, method, *evaluate.load_model(source), None, storage.model_fingerprint(source)
        )
    note = storage.read_json(out / "run.json") if (out / "run.json").exists() else {}
    if not note.get("finished") or not isinstance(note.get("settings"), dict):
        raise UserError(f"there is no finished student in {out}: run --stage train")
    if not args.out:  # one of --out may have been trained on any file, with any flags
        data_file = finetune_path(args, method, family_of(args))
        wanted = {k: getattr(args, k) for k in TRAINED_WITH}
        if (
            args.stage == "evaluate"
            and data_file.exists()
            and (method == "ft" or teacher_file(args).exists())
        ):
            on_master(args, lambda: curate(args, method, write=False))
            wanted["finetune_data"] = storage.file_sha256(data_file)
        storage.check_settings(out, note["settings"], wanted)
    epoch = note["settings"].get("epochs")
    if type(epoch) is not int:
        raise UserError(
            f"{out / 'run.json'} does not say after how many epochs the student was finished: train it again"
        )
    return test(
        args, method, *evaluate.load_model(str(out)), epoch, storage.fingerprint(note["settings"])
    )


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


def ends_with(args):
    """-> the file that a run ends with, and the one of its teacher: what tells the cells of a grid apart."""
    teachers = teacher_file(args)
    if args.stage == "sample":
        return teachers, teachers
    method = args.method[-1]
    file = (
        finetune_path(args, method, family_of(args))
        if args.stage == "curate"
        else test_file(args, method, 0)
    )
    return file, teachers


def needs_torch(args):
    on_api = args.label_style in tasks.API_FAMILIES
    return (
        not (args.stage in ("sample", "curate") or on_api)
        or args.teacher.startswith("hf:")
        and args.stage in ("all", "sample")
    )


def run(args):
    """The method: one call a stage.  -> the scores of the methods that were evaluated."""
    stages = ("sample", "curate", "train", "evaluate") if args.stage == "all" else (args.stage,)
    methods = args.method[-1:] if args.finetune_data else args.method
    fine_tuned = [method for method in methods if method in FINE_TUNED]
    if "sample" in stages and (args.stage == "sample" or "ft_cot" in fine_tuned):
        with storage.file_lock(
            teacher_file(args), args.ranks.is_master and not is_remote_teacher(args)
        ):  # the API has its journal
            sample(args)
    if args.stage == "curate" and "ft_cot" in fine_tuned and is_remote_teacher(args):
        teacher.publish_partial(at_sample_degree(args), teacher_file(args), teacher_metadata(args))
    results = []
    curated = {}
    if "curate" in stages:
        for method in fine_tuned:
            path = finetune_path(args, method, family_of(args))
            with storage.file_lock(
                path, args.ranks.is_master, patience=60
            ):  # other seeds may share it
                curated[method] = on_master(args, lambda: storage.file_sha256(curate(args, method)))
            if args.show:
                filters.show(path, args.show)
    for method in methods:
        if "train" in stages and method in FINE_TUNED:
            data_file = args.finetune_data or finetune_path(args, method, family_of(args))
            if args.stage == "train" and not args.finetune_data:
                on_master(args, lambda: curate(args, method, write=False))
            if method in curated and curated[method] != storage.file_sha256(data_file):
                raise UserError(
                    f"{data_file} was replaced by another run since it was curated: start the same command again"
                )
            if args.label_style in tasks.API_FAMILIES:
                batch.fine_tune(args, Path(data_file), batch.student(args, method)[0])
            else:
                with storage.file_lock(student_path(args, method), args.ranks.is_master):
                    train(args, method, Path(data_file))
        if "evaluate" in stages and args.label_style in tasks.API_FAMILIES:
            results.append(
                batch.test(
                    args,
                    label_template(args, method) if method in FINE_TUNED else method,
                    *batch.student(args, method),
                )
            )
        elif "evaluate" in stages:
            with storage.file_lock(test_file(args, method, args.epochs), args.ranks.is_master):
                results.append(test_finished(args, method, student_path(args, method)))
    return results


def main(argv=None):
    """Check, run, and turn every error a user can mend into one sentence and a failing exit."""
    storage.escape_unencodable_output()
    cells = parse_args(argv)
    try:
        for args in cells:
            check(args)
        cells = studies.gather(cells, ends_with)
        ranks = argparse.Namespace(world_size=1, is_master=True)
        if any(needs_torch(args) for args in cells):
            import train_loop

            ranks = train_loop.setup_ranks(evaluate.select_device(cells[0].device))
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
        sys.exit(storage.peer_failure_message(e))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; start the same command again to go on")


if __name__ == "__main__":
    main()
