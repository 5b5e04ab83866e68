"""Fine-tune-CoT: a small student learns to reason from a large teacher's explanations.

    python finetune_cot.py                              # the toy task: no download, key or GPU
    python finetune_cot.py --task multiarith --teacher text-davinci-002 --student gpt2
    torchrun --standalone --nproc_per_node=2 finetune_cot.py --task multiarith ...

The method of Ho, Schmid and Yun (ACL 2023, §3), top to bottom: 1. `sample` a teacher's rationales,
2. `curate` those whose answer is right, 3. `train` a student on question -> rationale -> answer,
4. `evaluate` it on the test questions.  Each stage writes one file or folder under --saved and is
skipped when that is there already, made with the same settings.
"""

import functools
import os
from argparse import Namespace
from pathlib import Path

import chats
import completions
import curation
import distributed
import evaluate
import flags
import jobs
import models
import provenance
import storage
import tasks
import teacher
import terminal
from distributed import Ranks, on_rank0, print0
from jobs import LocalJob, load_shared
from models import LoadedModel
from provenance import STAGES, TRAINED_WITH
from storage import UserError
from tasks import API_FAMILIES, FINE_TUNED, PROMPTED

# ---------------- 1. Sample: the teacher explains its answers (paper §3, reasoning generation)


def sample(args: Namespace, ranks: Ranks) -> None:
    """Write the teacher's completion dataset: --degree rationales for each question of the task.

    A grid samples its largest --degree once; the smaller ones use the first completions of it.
    """
    path = flags.teacher_file(args)
    if flags.is_remote_teacher(args):  # the journal of an API has a lock of its own
        on_rank0(ranks, sample_remote_teacher, args, path)
        return
    with storage.file_lock(path, ranks.is_rank0):
        sample_local_teacher(args, ranks, path)


def sample_local_teacher(args: Namespace, ranks: Ranks, path: Path) -> None:
    """Ask a toy or local teacher all questions, train and test, as in the published files.

    Of a file with more rationales a question the first serve; to one with fewer the rest is added.
    """
    job = on_rank0(ranks, plan_sampling, args, path)
    if job.is_done:
        return
    questions = len(job.samples)
    asked = f"{questions:,} questions x {job.plan.degree} rationales"
    print0(ranks, f"1/4 sample: the teacher {args.teacher} explains its answers, {asked}")
    teacher_model = None
    if args.teacher != "toy":
        folder = args.teacher.removeprefix("hf:")
        teacher_model = load_shared(folder, ranks)
    options = flags.decoding_options(args)
    jobs.complete_locally(job, teacher_model, ranks, options)
    print0(ranks, f"    -> {path}")


def plan_sampling(args: Namespace, path: Path) -> LocalJob:
    """Read what a toy or local teacher is asked, and how much of it is at `path`."""
    samples = tasks.load(args.task, args.data)
    chat = flags.chat_config(args, "sample", args.teacher, args.teacher_method)
    is_chat = chat is not None
    plan = flags.teacher_plan(args, is_chat)
    seed = args.data_seed
    settings = completions.sampling_settings(plan, samples, seed)
    settings |= chats.chat_settings(chat)
    if args.teacher != "toy":
        folder = args.teacher.removeprefix("hf:")
        settings["model"] = provenance.model_fingerprint(folder, args.saved)
    first = completions.sampled_degree(path, args.task, settings)
    metadata = flags.teacher_metadata(args)
    metadata["settings"] = settings
    return LocalJob(path, samples, plan, chat, metadata, seed, first)


# ---------------- 2. Curate: keep what is right, as the student will read it (paper §3, curation)


def curate(args: Namespace, ranks: Ranks, method: str) -> str:
    """Write the fine-tuning file of a method, on rank 0; return its SHA-256."""
    if args.stage == "curate" and method == "ft_cot":
        on_rank0(ranks, publish_partial_completions, args)
    path = flags.finetune_file(args, method)
    redo = provenance.is_redone(args.redo, "curate")

    def write_file() -> str:
        plan = plan_curation(args, method)
        return curation.curate(plan, redo)

    with storage.file_lock(path, ranks.is_rank0, timeout=60):  # other seeds may share it
        sha256 = on_rank0(ranks, write_file)
    if args.show and ranks.is_rank0:
        from extras import filters

        filters.show_samples(path, args.show)
    return sha256


def plan_curation(args: Namespace, method: str) -> curation.CurationPlan:
    """Read all inputs and say what the file is made from.  Raises UserError if some are missing."""
    family = flags.student_family(args)
    template = curation.student_template(method, args.label_style)
    benchmark = flags.load_benchmark(args, args.validation)
    settings = curation.benchmark_settings(benchmark, args.split, template, family)
    path = flags.finetune_file(args, method, family)
    if method == "ft":
        return curation.CurationPlan(path, settings, benchmark)
    source = flags.teacher_file(args)
    if not source.exists():
        where = source.resolve()
        what = f"there are no completions of {args.teacher} for {args.task} at {where}"
        remedy = "run --stage sample, or put the teacher's file there"
        raise UserError(f"{what}: {remedy}")
    settings["source"] = storage.file_sha256(source)
    metadata, rows = completions.read_completions(source, args.task)
    sampled_with = metadata.get("settings", {})
    rules = args.rules
    if not rules:
        rules = teacher.default_rules(sampled_with.get("api"))
    options = flags.curation_options(args)
    settings["teacher"] = args.teacher
    settings["degree"] = args.degree
    settings["rules"] = rules
    settings |= options
    options.pop("rationale", None)  # no filter
    if args.filter == "random":
        settings["data_seed"] = args.data_seed
    return curation.CurationPlan(
        path,
        settings,
        benchmark,
        source,
        rows,
        template=metadata.get("prediction_template"),
        filters=options,
        taught=provenance.teacher_flags(sampled_with),
    )


# ---------------- 3. Train: fine-tune the student (paper §3).  The loop itself is train_loop.py


def train(
    args: Namespace, ranks: Ranks, method: str, curated: str | None, steps_after: int
) -> LoadedModel | None:
    """Fine-tune a student on the file of a method; return it, if this process has trained it.

    curated: the SHA-256 of its fine-tuning file, if this run has made it.
    steps_after: those of the students that come after this one, for the time that is left.
    """
    data_file = flags.finetune_file(args, method)
    if args.finetune_data:
        data_file = Path(args.finetune_data)
    elif args.stage == "train":
        on_rank0(ranks, check_finetune_file, args, method)
    if curated:
        found = on_rank0(ranks, storage.file_sha256, data_file)
        if found != curated:
            what = "was replaced by another run since it was curated: start the same command again"
            raise UserError(f"{data_file} {what}")
    if args.label_style in API_FAMILIES:
        from extras import finetune_jobs

        note = flags.job_file(args, method)
        api = flags.api_config(args)
        finetune_jobs.fine_tune(api, args.student, data_file, note)
        return None
    out = flags.student_dir(args, method)
    with storage.file_lock(out, ranks.is_rank0):
        return train_local_student(args, ranks, method, data_file, steps_after)


def check_finetune_file(args: Namespace, method: str) -> None:
    """Raise UserError where the fine-tuning file is not what these flags would make."""
    plan = plan_curation(args, method)
    curation.check_curated(plan)


def train_local_student(
    args: Namespace, ranks: Ranks, method: str, data_file: Path, steps_after: int
) -> LoadedModel | None:
    """Fine-tune the student on a fine-tuning file, evaluating it every --eval_every epochs.

    Returns the student, or None where it is finished already.
    """
    import checkpoints
    import tokens
    import train_loop

    out = flags.student_dir(args, method)
    source = student_source(args, ranks)
    settings, state = on_rank0(ranks, prepare_student_dir, args, method, source, data_file)
    if state == "finished":
        return None
    student = load_shared(source, ranks)
    model, tokenizer, family = student
    curation.check_family(data_file, family, args.student)
    print0(ranks, f"3/4 train ({method}): fine-tuning the student {args.student}")
    print0(ranks, f"    <- {data_file}")
    samples = tokens.load_or_tokenize(student, data_file, out, args.max_length, ranks)
    names = train_loop.TrainConfig.__annotations__
    options = flags.pick(args, names)
    config = train_loop.TrainConfig(**options)
    run = (samples, out, config, settings, ranks, vars(args), steps_after)
    for epoch in train_loop.train(model, tokenizer, *run):
        if not args.eval_every or epoch % args.eval_every:
            continue
        result = evaluate_student(args, ranks, method, student, epoch, settings)
        if args.keep_best and ranks.is_rank0:
            if args.validation:
                file = result["file"]
                result = evaluate.score(file, "validation", args.split, args.data)
            checkpoints.keep_best(out, result, model, tokenizer)
    print0(ranks, f"    -> {out}")
    return student


def student_source(args: Namespace, ranks: Ranks) -> str:
    """Return the folder or name of the untrained student; the toy student is made on the spot."""
    if args.student != "toy":
        return args.student
    from data.toy import untrained_student

    return untrained_student(args.saved, args.seed, ranks)


def prepare_student_dir(
    args: Namespace, method: str, source: str, data_file: Path
) -> tuple[dict, str]:
    """Return what makes a student, and whether its folder is "finished", "unfinished" or "new".

    Evaluations of an older student of this name are set aside.  Raises UserError for a file that is
    no fine-tuning data, and for a folder that is not this student's.
    """
    out = flags.student_dir(args, method)
    note = out / "run.json"
    if not note.exists():
        storage.read_finetune_data(data_file)
    settings = {
        "student": provenance.model_fingerprint(source, args.saved),
        "finetune_data": storage.file_sha256(data_file),
        **flags.pick(args, TRAINED_WITH),
    }
    untrained = Path(source).resolve()
    if untrained == out.resolve():
        raise UserError(f"--out {out} is the student itself: choose another folder")
    redo = provenance.is_redone(args.redo, "train")
    state = storage.prepare_output_dir(out, settings, redo)
    if state == "finished":
        provenance.note_other_code(out)
    elif not args.finetune_data:
        made_by = None
        if state == "unfinished":
            made_by = storage.fingerprint(settings)
        path = flags.test_file(args, method, epoch=0)
        key = flags.train_key(args, method)
        names = f"D_{args.task}__T_{key}__E_*.json"
        of_epochs = path.parent.glob(names)
        completions.set_aside_completions(of_epochs, made_by)
    return settings, state


# ---------------- 4. Evaluate: the student completes the test questions (paper §4)


def evaluate_method(
    args: Namespace, ranks: Ranks, method: str, student: LoadedModel | None
) -> dict:
    """Score a finished student, or the untrained one for the methods that only prompt.

    student: the one that this run has just trained; None: load it.  Raises UserError where there
    is none, or where it was made with other flags than these.
    """
    if args.label_style in API_FAMILIES:
        return evaluate_api_student(args, method)
    redo = False
    epoch = None
    if method in PROMPTED:
        source = student_source(args, ranks)
        made_by = on_rank0(ranks, provenance.model_fingerprint, source, args.saved)
        made_with = {"student": made_by}
    else:
        source = str(flags.student_dir(args, method))
        made_with = on_rank0(ranks, finished_student_settings, args, method)
        epoch = made_with["epochs"]
    if student is None:
        student = load_shared(source, ranks)
        redo = provenance.is_redone(args.redo, "evaluate")
    path = flags.test_file(args, method, epoch)
    with storage.file_lock(path, ranks.is_rank0):
        return evaluate_student(args, ranks, method, student, epoch, made_with, redo)


def finished_student_settings(args: Namespace, method: str) -> dict:
    """Return what made a finished student.  Raises UserError where that is not what flags say."""
    out = flags.student_dir(args, method)
    settings = provenance.finished_settings(out)
    if args.out:  # it may have been trained on any file, with any flags
        return settings
    wanted = flags.pick(args, TRAINED_WITH)
    data_file = flags.finetune_file(args, method)
    has_inputs = data_file.exists()
    if method != "ft":
        teacher_file = flags.teacher_file(args)
        has_inputs = has_inputs and teacher_file.exists()
    if args.stage == "evaluate" and has_inputs:
        check_finetune_file(args, method)
        wanted["finetune_data"] = storage.file_sha256(data_file)
    storage.check_settings(out, settings, wanted)
    return settings


def evaluate_student(
    args: Namespace,
    ranks: Ranks,
    method: str,
    student: LoadedModel,
    epoch: int | None,
    made_with: dict,
    redo: bool = False,
) -> dict:
    """Write a student's completion dataset on the test part, unless it is there; return its score.

    made_with: the settings of its training run; of an untrained one {"student": its hash}.
    """
    job = on_rank0(ranks, plan_evaluation, args, method, student, epoch, made_with, redo)
    if not job.is_done:
        questions = len(job.samples)
        print0(ranks, f"4/4 evaluate ({method}): the student answers {questions:,} questions")
        options = flags.decoding_options(args)
        jobs.complete_locally(job, student, ranks, options)
    return on_rank0(ranks, score_student, args, job.path, epoch)


def plan_evaluation(
    args: Namespace,
    method: str,
    student: LoadedModel,
    epoch: int | None,
    made_with: dict,
    redo: bool,
) -> LocalJob:
    """Read what a student is asked, and whether its answers are there already."""
    path = flags.test_file(args, method, epoch)
    run = flags.run_metadata(args, method, made_with)
    run["family"] = student.family
    run["parameters"] = student.model.num_parameters()
    if method in FINE_TUNED:
        made_by = storage.fingerprint(made_with)
        benchmark = flags.load_benchmark(args, args.validation)
        run["questions"] = len(benchmark.train)
    else:
        made_by = made_with["student"]
        benchmark = flags.load_benchmark(args)
    asked = benchmark.test + benchmark.validation
    samples = [benchmark.samples[i] for i in asked]
    chat = flags.chat_config(args, "evaluate", args.student, method)
    family = student.family
    if chat:
        family = "chat"
    plan = flags.student_plan(args, method, family, args.student)
    settings = completions.evaluation_settings(plan, made_by, epoch, samples, args.seed)
    settings |= chats.chat_settings(chat)
    metadata = flags.student_metadata(args, method, plan.template, epoch)
    metadata["validation"] = benchmark.validation
    metadata["settings"] = settings
    metadata["run"] = run
    is_there = False
    if not redo:
        is_there = completions.completions_match("evaluate", path, args.task, settings, run)
    first = 0
    if is_there:
        first = plan.degree
    return LocalJob(path, samples, plan, chat, metadata, args.seed, first)


def score_student(args: Namespace, path: Path, epoch: int | None) -> dict:
    """Score a completion file on the test part and print the accuracy."""
    result = evaluate.score(path, "test", args.split, args.data)
    evaluate.print_accuracy(result, epoch)
    if args.eval_samples > 1:
        from extras import compare

        votes = compare.describe_votes(result, args.data)
        print(f"evaluate: {votes}")
    return result


# ---------------- The whole method


def run(args: Namespace, ranks: Ranks) -> list[dict]:
    """Run the stages of one run, a call each; return the scores of the evaluated methods."""
    stages = [args.stage]
    if args.stage == "all":
        stages = STAGES
    methods = args.method
    if args.finetune_data:
        methods = args.method[-1:]
    tuned = [method for method in methods if method in FINE_TUNED]
    if not args.finetune_data:
        check_before_start(args, ranks, tuned)
    needs_teacher = args.stage == "sample" or "ft_cot" in tuned
    if "sample" in stages and needs_teacher:
        sample(args, ranks)
    curated = {}
    if "curate" in stages:
        for method in tuned:
            curated[method] = curate(args, ranks, method)
    results = []
    for i, method in enumerate(methods):
        student = None
        if "train" in stages and method in FINE_TUNED:
            to_come = methods[i + 1 :]
            later = [flags.finetune_file(args, other) for other in to_come]
            steps_after = curation.count_steps(later, args.epochs, args.batch_size)
            sha256 = curated.get(method)
            student = train(args, ranks, method, sha256, steps_after)
        if "evaluate" in stages:
            result = evaluate_method(args, ranks, method, student)
            results.append(result)
    return results


def check_before_start(args: Namespace, ranks: Ranks, tuned: list[str]) -> None:
    """Raise UserError for a validation share that cannot be; say which method has no template."""
    if args.validation and tuned:
        on_rank0(ranks, flags.load_benchmark, args, args.validation)
    for method in tuned:
        note = curation.describe_fallback(method, args.label_style)
        if note:
            print0(ranks, note)


# ---------------- Teachers and students behind an API


def sample_remote_teacher(args: Namespace, path: Path) -> None:
    """Use the completions at `path`, or ask the teacher's API for what is missing there."""
    if args.dry_run:
        from extras import dry_run

        keys = [args.task]
        if args.task == "all":
            keys = list(tasks.TASKS)
            keys.remove("toy")
        api = flags.api_config(args)
        load_job = functools.partial(flags.remote_job, args)
        dry_run.dry_run(load_job, keys, api, args.student)
        return
    has_api = flags.has_api(args)
    can_go_on = has_api and teacher.has_journal(path)
    if path.exists() and not can_go_on:
        print(f"1/4 sample: using the completions of {args.teacher}\n    <- {path}")
        return
    if not has_api:
        raise teacher.no_completions(args.teacher, args.task, path.resolve())
    job = flags.remote_job(args, args.task)
    teacher.refuse_identical(job.plan)
    if args.batch:
        from extras import batch_api

        batch_api.run_batch_command(args.batch, *job)
    else:
        teacher.sample_remote(*job)


def publish_partial_completions(args: Namespace) -> None:
    """Make the completion file from what an unfinished sampling by an API has in its journal."""
    path = flags.teacher_file(args)
    journal = path.with_suffix(".journal.jsonl")
    if journal.exists():
        job = flags.remote_job(args, args.task)
        teacher.publish_partial(job.path, job.metadata, job.plan, job.samples)


def evaluate_api_student(args: Namespace, method: str) -> dict:
    """Write the completion file of a student behind an API, on the test part; return its score."""
    model = args.student
    if method in FINE_TUNED:
        from extras import finetune_jobs

        note = flags.job_file(args, method)
        model = finetune_jobs.fine_tuned_model(note)
    job = flags.remote_evaluation(args, method, model)
    teacher.sample_missing(*job)
    return evaluate.score(job.path, "test", args.split, args.data)


# ---------------- Command line


def run_all(runs: list[Namespace]) -> None:
    """Check every run, then run them; print the table of one, or of the grid."""
    for args in runs:
        flags.check(args)
    ranks = Ranks()
    if any(map(flags.needs_torch, runs)):
        device = models.select_device(runs[0].device)
        ranks = distributed.init_ranks(device)
    elif os.environ.get("RANK", "0") != "0":
        return  # under torchrun one process is enough
    if len(runs) > 1:
        from extras import studies

        cells = studies.dedupe_cells(runs)
        run_cell = functools.partial(run, ranks=ranks)
        studies.run_cells(cells, run_cell, ranks, runs[0].data)
    else:
        results = run(runs[0], ranks)
        if results and ranks.is_rank0:
            args = runs[0]
            evaluate.print_report(results, args.student, args.seed, args.saved)
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Turn every error that a user can mend into one sentence and a failing exit."""
    with terminal.error_exits():
        runs = flags.parse_args(argv, __doc__)
        run_all(runs)


if __name__ == "__main__":
    main()
