"""Fine-tune-CoT: a small student learns to reason from a large teacher's explanations.

    python finetune_cot.py                              # the toy task: no download, key or GPU
    python finetune_cot.py --task multiarith --teacher text-davinci-002 --student gpt2
    torchrun --standalone --nproc_per_node=2 finetune_cot.py --task multiarith ...

The method of Ho, Schmid and Yun (ACL 2023, §3), top to bottom: 1. `sample` a teacher's rationales,
2. `curate` those whose answer is right, 3. `train` a student on question -> rationale -> answer,
4. `evaluate` it on the test questions.  Each stage writes one file or folder under --saved and is
skipped when that is there already, made with the same settings.
"""

import dataclasses
import functools
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import chats
import completions
import curation
import decoding
import distributed
import evaluate
import flags
import models
import provenance
import storage
import tasks
import teacher
import terminal
from completions import SamplingConfig
from distributed import Ranks, on_rank0, print0
from models import LoadedModel
from provenance import STAGES, TRAINED_WITH
from storage import UserError
from tasks import API_FAMILIES, FINE_TUNED, PROMPTED, Sample

# ---------------- 1. Sample: the teacher explains its answers (paper §3, reasoning generation)


def sample(args: Namespace, ranks: Ranks) -> None:
    """Write the teacher's completion dataset: --degree rationales for each question of the task.

    A grid samples its largest --degree once; the smaller ones use the first completions of it.
    """
    path = flags.teacher_file(args)
    if flags.is_remote_teacher(args):
        on_rank0(ranks, lambda: sample_remote_teacher(args, path))
    else:
        sample_local_teacher(args, ranks, path)


def sample_local_teacher(args: Namespace, ranks: Ranks, path: Path) -> None:
    """Ask a toy or local teacher all questions, train and test, as in the published files.

    Of a file with more rationales a question the first serve; to one with fewer the rest is added.
    """
    samples = on_rank0(ranks, lambda: tasks.load(args.task, args.data))
    chat = chat_config(args, ranks, "sample", args.teacher, args.teacher_method)
    family = "chat" if chat else "decoder"
    plan = on_rank0(ranks, lambda: flags.teacher_plan(args, family))
    settings = completions.sampling_settings(plan, samples, args.data_seed)
    settings |= chats.chat_settings(chat)
    if args.teacher.startswith("hf:"):
        folder = args.teacher.removeprefix("hf:")
        made_by = on_rank0(ranks, lambda: provenance.model_fingerprint(folder, args.saved))
        settings["model"] = made_by
    first = on_rank0(ranks, lambda: completions.sampled_degree(path, args.task, settings))
    if first >= plan.degree:
        return
    asked = f"{len(samples):,} questions x {plan.degree} rationales"
    print0(ranks, f"1/4 sample: the teacher {args.teacher} explains its answers, {asked}")
    complete = chats.in_template(teacher_complete(args, ranks, path, first), chat)
    data = completions.make_completions(complete, samples, plan, first)
    if ranks.is_rank0:
        metadata = flags.teacher_metadata(args) | {"settings": settings}
        completions.write_completions(path, metadata, data, first)
        print(f"    -> {path}")


def chat_config(
    args: Namespace, ranks: Ranks, stage: str, name: str, method: str
) -> chats.ChatConfig | None:
    """Return how a local model is asked in its chat template, or None for plain prompts."""
    options = (args.chat, args.thinking, args.system)
    return on_rank0(ranks, lambda: chats.chat_config(stage, name, method, *options))


def teacher_complete(args: Namespace, ranks: Ranks, path: Path, first: int) -> Callable:
    """Return complete(prompts, max_new_tokens, temperature, n, stop) of a toy or local teacher.

    first: completions of each prompt that are there already.
    """
    if args.teacher == "toy":
        from data.toy import toy_teacher

        return functools.partial(toy_teacher, seed=args.data_seed, first=first)
    loaded = load_shared(args.teacher.removeprefix("hf:"), ranks)
    complete = local_complete(args, ranks, loaded, args.teacher_method, path, args.data_seed)
    return functools.partial(complete, first=first)


def local_complete(
    args: Namespace, ranks: Ranks, loaded: LoadedModel, method: str, path: Path, seed: int
) -> Callable:
    """Return complete(...) of a loaded model, for completions that will be written to `path`."""
    loaded.model.to(ranks.device)
    overflow = "skip"
    if method == "fs_cot":  # of a prompt that is too long, examples are cut off, not the question
        overflow = "truncate_left"
    options = {"batch_size": args.eval_batch_size, "seed": seed, "overflow": overflow}
    options |= {"journal": path, "plain": args.plain}
    return functools.partial(decoding.generate, *loaded, **options)


def sample_remote_teacher(args: Namespace, path: Path) -> None:
    """Use the completions at `path`, or ask the teacher's API for what is missing there."""
    api = api_config(args)
    if args.dry_run:
        from extras import dry_run

        keys = [args.task]
        if args.task == "all":
            keys = [key for key in tasks.TASKS if key != "toy"]
        dry_run.dry_run(lambda task: remote_job(args, task), keys, api, args.student)
        return
    if path.exists() and not (teacher.has_journal(path) and flags.has_api(args)):
        print(f"1/4 sample: using the completions of {args.teacher}\n    <- {path}")
        return
    if not flags.has_api(args):
        raise teacher.no_completions(args.teacher, args.task, path.resolve())
    plan, samples, _ = remote_job(args, args.task)
    teacher.refuse_identical(plan)
    metadata = flags.teacher_metadata(args)
    rules = args.rules or teacher.default_rules(plan.api)
    job = (path, metadata, plan, samples, api, rules)
    if args.batch:
        from extras import batch_api

        batch_api.run_batch_command(args.batch, *job)
    else:
        teacher.sample_remote(*job)


def api_config(args: Namespace) -> teacher.ApiConfig:
    values = {name: getattr(args, name) for name in teacher.ApiConfig._fields}
    return teacher.ApiConfig(**values | {"base_url": flags.base_url(args)})


def remote_job(args: Namespace, task: str) -> tuple[SamplingConfig, list[Sample], Path]:
    """Return what to ask of a teacher behind an API, of which questions, and for which file."""
    args = Namespace(**vars(args) | {"task": task})  # a dry run asks for every task
    benchmark = flags.load_benchmark(args)
    indices = benchmark.train
    if args.teacher_part == "all":
        indices = sorted(benchmark.train + benchmark.test)
    samples = [benchmark.samples[i] for i in indices]
    path = flags.teacher_file(args)
    family = "decoder"
    if args.api == "chat":
        family = "chat"
    plan = flags.teacher_plan(args, family)
    return teacher.with_limit(plan, samples, path, args.teacher_max_new_tokens), samples, path


def publish_partial_completions(args: Namespace) -> None:
    """Make the completion file from what an unfinished sampling has in its journal."""
    if flags.teacher_file(args).with_suffix(".journal.jsonl").exists():
        plan, samples, path = remote_job(args, args.task)
        teacher.publish_partial(path, flags.teacher_metadata(args), plan, samples)


# ---------------- 2. Curate: keep what is right, as the student will read it (paper §3, curation)


def plan_curation(args: Namespace, method: str) -> curation.CurationPlan:
    """Read all inputs and say what the file is made from.  Raises UserError if some are missing."""
    family = flags.student_family(args)
    template = flags.student_template(args, method)
    benchmark = flags.load_benchmark(args, args.validation)
    samples = storage.fingerprint(benchmark.samples)
    settings = {"source": samples, "samples": samples, "split": args.split}
    settings |= {"train": storage.fingerprint(benchmark.train), "template": template}
    settings |= {"family": family, "texts": tasks.template_fingerprint(template, family)}
    settings |= {"code": provenance.code_fingerprint(args.task)}
    path = flags.finetune_file(args, method, family)
    if method == "ft":
        return curation.CurationPlan(path, settings, benchmark)
    source = flags.teacher_file(args)
    if not source.exists():
        raise UserError(
            f"there are no completions of {args.teacher} for {args.task} at {source.resolve()}: "
            "run --stage sample, or put the teacher's file there"
        )
    settings["source"] = storage.file_sha256(source)
    metadata, rows = completions.read_completions(source, args.task)
    sampled_with = metadata.get("settings", {})
    rules = args.rules or teacher.default_rules(sampled_with.get("api"))
    options = flags.curation_options(args)
    settings |= {"teacher": args.teacher, "degree": args.degree, "rules": rules, **options}
    settings |= flags.rationale_option(args)
    if args.filter == "random":
        settings["data_seed"] = args.data_seed
    return curation.CurationPlan(
        path,
        settings,
        benchmark,
        source,
        rows,
        template=metadata.get("prediction_template"),
        filters=curation.filter_config(options, args.data_seed),
        taught=provenance.teacher_flags(sampled_with),
    )


# ---------------- 3. Train: fine-tune the student (paper §3).  The loop itself is train_loop.py


def student_source(args: Namespace, ranks: Ranks) -> str:
    """Return the folder or name of the untrained student; the toy student is made on the spot."""
    if args.student != "toy":
        return args.student
    from data.toy import untrained_student

    return untrained_student(args.saved, args.seed, ranks)


def load_shared(name: str, ranks: Ranks) -> LoadedModel:
    """Load a model, a folder of which other machines get from rank 0 if they lack it."""
    distributed.share_folder(Path(name), ranks)
    return models.load_model(name)


def train_settings(args: Namespace, source: str, data_file: Path, out: Path) -> dict:
    """Return what makes a student.  Raises UserError for a file that is no fine-tuning data."""
    if not (out / "run.json").exists():
        storage.read_finetune_data(data_file)
    settings = {"student": provenance.model_fingerprint(source, args.saved)}
    settings |= {"finetune_data": storage.file_sha256(data_file)}
    return settings | {name: getattr(args, name) for name in TRAINED_WITH}


def train(
    args: Namespace, ranks: Ranks, method: str, data_file: Path, steps_after: int
) -> LoadedModel | None:
    """Fine-tune the student on a fine-tuning file, evaluating it every --eval_every epochs.

    Returns the student, or None where it is finished already.
    steps_after: those of the students that come after this one, for the time that is left.
    """
    import checkpoints
    import tokens
    import train_loop

    out = flags.student_dir(args, method)
    source = student_source(args, ranks)
    settings = on_rank0(ranks, lambda: train_settings(args, source, data_file, out))
    if Path(source).resolve() == out.resolve():
        raise UserError(f"--out {out} is the student itself: choose another folder")
    redo = provenance.is_redone(args.redo, "train")
    state = on_rank0(ranks, lambda: storage.prepare_output_dir(out, settings, redo))
    if state == "finished":
        return None
    if ranks.is_rank0 and not args.finetune_data:  # evaluations of an older student of this name
        made_by = None
        if state == "unfinished":
            made_by = storage.fingerprint(settings)
        folder = flags.test_file(args, method, 0).parent
        names = f"D_{args.task}__T_{flags.train_key(args, method)}__E_*.json"
        completions.set_aside_completions(folder.glob(names), made_by)
    student = load_shared(source, ranks)
    curation.check_family(data_file, family=student.family, student=args.student)
    line = f"3/4 train ({method}): fine-tuning the student {args.student}\n    <- {data_file}"
    print0(ranks, line)
    samples = tokens.load_or_tokenize(student, data_file, out, args.max_length, ranks)
    names = [field.name for field in dataclasses.fields(train_loop.TrainConfig)]
    config = train_loop.TrainConfig(**{name: getattr(args, name) for name in names})
    run = (samples, out, config, settings, ranks, vars(args), steps_after)
    for epoch in train_loop.train(student.model, student.tokenizer, *run):
        if args.eval_every and epoch % args.eval_every == 0:
            result = evaluate_student(args, ranks, method, student, epoch, settings)
            if args.keep_best and ranks.is_rank0:
                part = "test"
                if args.validation:
                    part = "validation"
                best = evaluate.score(result["file"], part, args.split, args.data)
                checkpoints.keep_best(out, best, student.model, student.tokenizer)
    print0(ranks, f"    -> {out}")
    return student


# ---------------- 4. Evaluate: the student completes the test questions (paper §4)


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
    path = flags.test_file(args, method, epoch)
    validation = 0.0
    made_by = made_with["student"]
    if method in FINE_TUNED:
        validation = args.validation
        made_by = storage.fingerprint(made_with)
    benchmark = on_rank0(ranks, lambda: flags.load_benchmark(args, validation))
    samples = [benchmark.samples[i] for i in benchmark.test + benchmark.validation]
    chat = chat_config(args, ranks, "evaluate", args.student, method)
    family = "chat" if chat else student.family
    plan = on_rank0(ranks, lambda: flags.student_plan(args, method, family, args.student))
    settings = completions.evaluation_settings(plan, made_by, epoch, samples, args.seed)
    settings |= chats.chat_settings(chat)
    run = flags.run_metadata(args, method, made_with) | {"family": student.family}
    run |= {"parameters": student.model.num_parameters()}
    if method in FINE_TUNED:
        run["questions"] = len(benchmark.train)
    if redo or not on_rank0(
        ranks, lambda: completions.completions_match("evaluate", path, args.task, settings, run)
    ):
        print0(ranks, f"4/4 evaluate ({method}): the student answers {len(samples):,} questions")
        complete = local_complete(args, ranks, student, method, path, args.seed)
        complete = chats.in_template(complete, chat)
        data = completions.make_completions(complete, samples, plan)
        metadata = flags.student_metadata(args, method, plan.template, epoch)
        metadata |= {"validation": benchmark.validation, "settings": settings, "run": run}
        if ranks.is_rank0:
            completions.write_completions(path, metadata, data)
    return on_rank0(ranks, lambda: score_student(args, method, path, epoch))


def score_student(args: Namespace, method: str, path: Path, epoch: int | None) -> dict:
    """Score a completion file on the test part and print the accuracy."""
    result = evaluate.score(path, "test", args.split, args.data)
    evaluate.print_accuracy(result, epoch)
    if args.eval_samples > 1:
        from extras import compare

        print(f"evaluate: {compare.describe_votes(result, args.data)}")
    return result


def evaluate_finished_student(
    args: Namespace, ranks: Ranks, method: str, redo: bool, student: LoadedModel | None
) -> dict:
    """Score a finished student, or the untrained one for the methods that only prompt.

    student: the one that this run has just trained; None: load it.  Raises UserError where there
    is none, or where it was made with other flags than these.
    """
    if method in PROMPTED:
        source = student_source(args, ranks)
        made_by = on_rank0(ranks, lambda: provenance.model_fingerprint(source, args.saved))
        made_with = {"student": made_by}
        student = load_shared(source, ranks)
        return evaluate_student(args, ranks, method, student, None, made_with, redo)
    settings = on_rank0(ranks, lambda: finished_student_settings(args, method))
    if student is None:
        student = load_shared(str(flags.student_dir(args, method)), ranks)
    return evaluate_student(args, ranks, method, student, settings["epochs"], settings, redo)


def finished_student_settings(args: Namespace, method: str) -> dict:
    """Return what made a finished student.  Raises UserError where that is not what flags say."""
    out = flags.student_dir(args, method)
    settings = provenance.finished_settings(out)
    if not args.out:  # one of --out may have been trained on any file, with any flags
        wanted = {name: getattr(args, name) for name in TRAINED_WITH}
        family = flags.student_family(args)
        data_file = flags.finetune_file(args, method, family)
        has_source = method == "ft" or flags.teacher_file(args).exists()
        if args.stage == "evaluate" and data_file.exists() and has_source:
            curation.check_curated(plan_curation(args, method))
            wanted["finetune_data"] = storage.file_sha256(data_file)
        storage.check_settings(out, settings, wanted)
    return settings


def evaluate_api_student(args: Namespace, method: str) -> dict:
    """Write the completion file of a student behind an API, on the test part; return its score."""
    model = args.student
    if method in FINE_TUNED:
        from extras import batch_api

        model = batch_api.fine_tuned_model(flags.job_file(args, method))
    family = API_FAMILIES[args.label_style]
    api = "completions"
    if family == "chat":
        api = "chat"
    plan = flags.student_plan(args, method, family, model, api)
    benchmark = flags.load_benchmark(args)
    samples = [benchmark.samples[i] for i in benchmark.test]
    metadata = flags.student_metadata(args, method, plan.template, epoch=None)
    run = flags.run_metadata(args, method, {"student": model})
    metadata["run"] = run | {"family": family, "questions": len(benchmark.train)}
    metadata = teacher.with_settings(metadata, plan, samples)
    path = flags.test_file(args, method, None)
    rules = args.rules or teacher.default_rules(plan.api)
    teacher.sample_missing(api_config(args), plan, path, metadata, samples, rules)
    return evaluate.score(path, "test", args.split, args.data)


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
    check_before_start(args, ranks, tuned)
    if "sample" in stages and (args.stage == "sample" or "ft_cot" in tuned):
        is_local = not flags.is_remote_teacher(args)  # the journal of an API has a lock of its own
        with storage.file_lock(flags.teacher_file(args), ranks.is_rank0 and is_local):
            sample(args, ranks)
    curated = {}
    if "curate" in stages:
        if args.stage == "curate" and "ft_cot" in tuned and flags.is_remote_teacher(args):
            on_rank0(ranks, lambda: publish_partial_completions(args))
        for method in tuned:
            curated[method] = curate_method(args, ranks, method)
    results = []
    for i, method in enumerate(methods):
        is_trained = "train" in stages and method in FINE_TUNED
        student = None
        if is_trained:
            family = flags.student_family(args)
            later = [flags.finetune_file(args, m, family) for m in methods[i + 1 :]]
            steps_after = curation.count_steps(later, args.epochs, args.batch_size)
            student = train_method(args, ranks, method, curated.get(method), steps_after)
        if "evaluate" in stages:
            redo = provenance.is_redone(args.redo, "evaluate")
            if is_trained and args.redo != "evaluate":
                redo = False  # a student that was trained again has no older evaluation
            results.append(evaluate_method(args, ranks, method, redo, student))
    return results


def check_before_start(args: Namespace, ranks: Ranks, tuned: list[str]) -> None:
    """Raise UserError for a validation share that cannot be; say which method has no template."""
    if args.finetune_data:
        return
    if args.validation and tuned:
        on_rank0(ranks, lambda: flags.load_benchmark(args, args.validation))
    for method in tuned:
        note = curation.describe_fallback(method, args.label_style)
        if note:
            print0(ranks, note)


def curate_method(args: Namespace, ranks: Ranks, method: str) -> str:
    """Curate one method on rank 0; return the SHA-256 of its file."""
    path = flags.finetune_file(args, method, flags.student_family(args))
    with storage.file_lock(path, ranks.is_rank0, timeout=60):  # other seeds may share it
        redo = provenance.is_redone(args.redo, "curate")
        sha256 = on_rank0(ranks, lambda: curation.curate(plan_curation(args, method), redo))
    if args.show and ranks.is_rank0:
        from extras import filters

        filters.show_samples(path, args.show)
    return sha256


def train_method(
    args: Namespace, ranks: Ranks, method: str, curated: str | None, steps_after: int
) -> LoadedModel | None:
    """Train one method; return the student, if this process has trained one.

    curated: the SHA-256 of its fine-tuning file, if this run has made it.
    """
    data_file = flags.finetune_file(args, method, flags.student_family(args))
    if args.finetune_data:
        data_file = Path(args.finetune_data)
    elif args.stage == "train":
        on_rank0(ranks, lambda: curation.check_curated(plan_curation(args, method)))
    if curated and curated != on_rank0(ranks, lambda: storage.file_sha256(data_file)):
        what = "was replaced by another run since it was curated: start the same command again"
        raise UserError(f"{data_file} {what}")
    if args.label_style in API_FAMILIES:
        from extras import batch_api

        note = flags.job_file(args, method)
        batch_api.fine_tune(api_config(args), args.student, data_file, note)
        return None
    with storage.file_lock(flags.student_dir(args, method), ranks.is_rank0):
        return train(args, ranks, method, data_file, steps_after)


def evaluate_method(
    args: Namespace, ranks: Ranks, method: str, redo: bool, student: LoadedModel | None
) -> dict:
    if args.label_style in API_FAMILIES:
        return evaluate_api_student(args, method)
    with storage.file_lock(flags.test_file(args, method, args.epochs), ranks.is_rank0):
        return evaluate_finished_student(args, ranks, method, redo, student)


# ---------------- Command line


def run_all(runs: list[Namespace]) -> None:
    """Check every run, then run them; print the table of one, or of the grid."""
    for args in runs:
        flags.check(args)
    ranks = Ranks()
    if any(flags.needs_torch(args) for args in runs):
        ranks = distributed.init_ranks(models.select_device(runs[0].device))
    elif os.environ.get("RANK", "0") != "0":
        return  # under torchrun one process is enough
    if len(runs) > 1:
        from extras import studies

        cells = studies.dedupe_cells(runs)
        studies.run_cells(cells, lambda args: run(args, ranks), ranks, runs[0].data)
    else:
        results = run(runs[0], ranks)
        if results and ranks.is_rank0:
            evaluate.print_report(results, runs[0].student, runs[0].seed, runs[0].saved)
    if ranks.world_size > 1:
        import torch.distributed as dist

        dist.destroy_process_group()


def main(argv: list[str] | None = None) -> None:
    """Turn every error that a user can mend into one sentence and a failing exit."""
    with terminal.error_exits():
        run_all(flags.parse_args(argv, __doc__))


if __name__ == "__main__":
    main()
