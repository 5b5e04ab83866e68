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
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import completions
import curation
import decoding
import evaluate
import flags
import storage
import tasks
import teacher
from completions import SamplingConfig
from decoding import LoadedModel
from storage import Ranks, UserError, on_rank0, print0
from tasks import API_FAMILIES, FINE_TUNED, PROMPTED, Benchmark, Sample

# ---------------- 1. Sample: the teacher explains its answers (paper §3, reasoning generation)


def sample(args: Namespace, ranks: Ranks) -> None:
    """Write the teacher's completion dataset: --degree rationales for each question of the task.

    A toy or local teacher is asked all questions, train and test, as in the published files.  A
    grid samples its largest --degree once; the smaller ones use the first completions of it.
    """
    path = flags.teacher_file(args)
    if flags.is_remote_teacher(args):
        on_rank0(ranks, lambda: sample_remote_teacher(args, path))
        return
    samples = tasks.load(args.task, args.data)
    plan = teacher_plan(args, family="decoder")
    settings = {"teacher": args.teacher, "method": plan.template, "degree": plan.degree}
    settings |= {"temperature": plan.temperature, "seed": args.data_seed}
    settings |= {"max_new_tokens": plan.max_new_tokens, **fingerprints(samples, plan)}
    if args.teacher.startswith("hf:"):
        settings["model"] = storage.model_fingerprint(args.teacher.removeprefix("hf:"))
    if on_rank0(ranks, lambda: completions.completions_match("sample", path, args.task, settings)):
        return
    complete = teacher_complete(args, ranks, path)
    data = completions.make_completions(complete, samples, plan)
    if ranks.is_rank0:
        metadata = flags.teacher_metadata(args) | {"settings": settings}
        completions.write_completions(path, metadata, data)
        print(f"sample: {len(samples)} questions x {plan.degree} rationales -> {path}")


def teacher_plan(args: Namespace, family: str) -> SamplingConfig:
    """Return how the teacher is asked."""
    temperature = args.temperature
    if args.no_temperature and flags.is_remote_teacher(args):
        temperature = None
    plan = {"model": args.teacher, "api": args.api, "family": family}
    plan |= {"template": args.teacher_method, "degree": args.sample_degree}
    plan |= {"max_new_tokens": args.teacher_max_new_tokens, "temperature": temperature}
    plan |= {"choices": args.choices, "legacy_max_tokens": args.legacy_max_tokens}
    return SamplingConfig(**plan, examples=few_shot_examples(args, args.teacher_method))


def few_shot_examples(args: Namespace, method: str) -> str:
    return completions.few_shot_prompt(args.task, args.data) if method == "fs_cot" else ""


def fingerprints(samples: list[Sample], plan: SamplingConfig) -> dict:
    """Return what tells, in settings, that questions, templates or few-shot examples changed."""
    known = {"samples": storage.fingerprint(samples)}
    known["texts"] = tasks.template_fingerprint(plan.template, plan.family)
    if plan.examples:
        known["examples"] = storage.fingerprint(plan.examples)
    return known


def teacher_complete(args: Namespace, ranks: Ranks, path: Path) -> Callable:
    """Return complete(prompts, max_new_tokens, temperature, n, stop) of a toy or local teacher."""
    if args.teacher == "toy":
        from data.toy import toy_teacher

        return functools.partial(toy_teacher, seed=args.data_seed)
    loaded = decoding.load_model(args.teacher.removeprefix("hf:"))
    return local_complete(args, ranks, loaded, args.teacher_method, path, args.data_seed)


def local_complete(
    args: Namespace, ranks: Ranks, loaded: LoadedModel, method: str, path: Path, seed: int
) -> Callable:
    """Return complete(...) of a loaded model, for completions that will be written to `path`."""
    loaded.model.to(ranks.device)
    # of a few-shot prompt that is too long, examples are cut off, not the question
    overflow = "truncate_left" if method == "fs_cot" else "skip"
    options = {"batch_size": args.eval_batch_size, "seed": seed, "overflow": overflow}
    options |= {"journal": path, "plain": args.plain}
    return functools.partial(decoding.generate, *loaded, **options)


def sample_remote_teacher(args: Namespace, path: Path) -> None:
    """Use the completions at `path`, or ask the teacher's API for what is missing there."""
    api = api_config(args)
    if args.dry_run:
        from extras import dry_run

        keys = [key for key in tasks.TASKS if key != "toy"] if args.task == "all" else [args.task]
        dry_run.dry_run(lambda task: remote_job(args, task), keys, api, args.student)
        return
    journal = path.with_suffix(".journal.jsonl")
    has_journal = journal.exists() and journal.stat().st_size > 0
    if path.exists() and not (has_journal and flags.has_api(args)):
        print(f"sample: using the completions of {args.teacher} at {path}")
        return
    if not flags.has_api(args):
        raise UserError(
            f"there are no completions of {args.teacher} for {args.task} at {path}: put the "
            "teacher's completion file there (saved/README.md has the format), set OPENAI_API_KEY "
            "or --base_url to sample it through the API, or take a local teacher, hf:NAME"
        )
    plan, samples, _ = remote_job(args, args.task)
    if plan.degree > 1 and plan.temperature == 0:
        raise UserError(
            f"--degree {plan.degree} at --temperature 0 would buy {plan.degree} identical "
            "rationales: use --temperature 0.7"
        )
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
    benchmark = load_benchmark(args)
    indices = benchmark.train
    if args.teacher_part == "all":
        indices = sorted(benchmark.train + benchmark.test)
    plan = teacher_plan(args, family="chat" if args.api == "chat" else "decoder")
    return plan, [benchmark.samples[i] for i in indices], flags.teacher_file(args)


def publish_partial_completions(args: Namespace) -> None:
    """Make the completion file from what an unfinished sampling has in its journal."""
    if flags.teacher_file(args).with_suffix(".journal.jsonl").exists():
        plan, samples, path = remote_job(args, args.task)
        teacher.publish_partial(path, flags.teacher_metadata(args), plan, samples)


# ---------------- 2. Curate: keep what is right, as the student will read it (paper §3, curation)


def student_family(args: Namespace) -> str:
    """Return what the student reads: decoder, encoder_decoder, openai or chat samples.

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
    return "encoder_decoder" if is_encoder_decoder else "decoder"


def student_template(args: Namespace, method: str) -> str:
    """Return a method's template in the --label_style, or in `token` where it has none of that."""
    if method in PROMPTED:
        return method
    name = f"{method}_{args.label_style}"
    return name if name in tasks.TEMPLATES else f"{method}_token"


def load_benchmark(args: Namespace, validation: float = 0.0) -> Benchmark:
    return tasks.load_benchmark(args.task, args.split, args.data, validation, args.data_seed)


def plan_curation(args: Namespace, method: str) -> curation.CurationPlan:
    """Read all inputs and say what the file is made from.  Raises UserError if some are missing."""
    family = student_family(args)
    template = student_template(args, method)
    benchmark = load_benchmark(args, args.validation)
    samples = storage.fingerprint(benchmark.samples)
    settings = {"source": samples, "samples": samples, "split": args.split}
    settings |= {"train": storage.fingerprint(benchmark.train), "template": template}
    settings |= {"family": family, "texts": tasks.template_fingerprint(template, family)}
    path = flags.finetune_file(args, method, family)
    if method == "ft":
        return curation.CurationPlan(path, settings, benchmark)
    source = flags.teacher_file(args)
    if not source.exists():
        raise UserError(
            f"there are no completions of {args.teacher} for {args.task} at {source}: run --stage "
            "sample, or put the teacher's file there"
        )
    settings["source"] = storage.file_sha256(source)
    metadata, rows = completions.read_completions(source, args.task)
    api = metadata.get("settings", {}).get("api")
    settings |= {"teacher": args.teacher, "degree": args.degree}
    settings |= {"rules": args.rules or teacher.default_rules(api), **flags.curation_options(args)}
    if args.filter == "random":
        settings["data_seed"] = args.data_seed
    teacher_template = metadata.get("prediction_template")
    options = filter_config(args)
    return curation.CurationPlan(path, settings, benchmark, source, rows, teacher_template, options)


def filter_config(args: Namespace) -> Any:
    """Return the filters beyond the paper's rule, a filters.FilterConfig, or None."""
    if flags.curation_options(args):
        from extras import filters

        values = {name: getattr(args, name) for name in flags.CURATION}
        return filters.FilterConfig(**values, seed=args.data_seed)
    return None


def curate(args: Namespace, method: str) -> str:
    """Write the fine-tuning file of a method, unless it is there; return its SHA-256."""
    return curation.curate(plan_curation(args, method))


# ---------------- 3. Train: fine-tune the student (paper §3).  The loop itself is train_loop.py

TRAINED_WITH = (  # flags that change the student
    "epochs batch_size lr weight_decay seed precision max_length schedule warmup max_grad_norm"
).split()


def student_source(args: Namespace, ranks: Ranks) -> str:
    """Return the folder or name of the untrained student; the toy student is made on the spot."""
    if args.student != "toy":
        return args.student
    from data.toy import make_toy_student

    folder = Path(args.saved) / "models" / "B_toy_student" / f"untrained_s{args.seed}"
    with storage.file_lock(folder, ranks.is_rank0, timeout=60):
        last_file = folder / "tokenizer_config.json"
        if ranks.is_rank0 and not last_file.exists():
            make_toy_student(folder, args.seed)
    on_rank0(ranks, lambda: None)  # the other ranks wait here
    return str(folder)


def train(args: Namespace, ranks: Ranks, method: str, data_file: Path) -> None:
    """Fine-tune the student on a fine-tuning file, evaluating it every --eval_every epochs."""
    import checkpoints
    import train_loop

    data = storage.read_finetune_data(data_file)
    out = flags.student_dir(args, method)
    source = student_source(args, ranks)
    settings = {"student": storage.model_fingerprint(source)}
    settings |= {"finetune_data": storage.file_sha256(data_file)}
    settings |= {name: getattr(args, name) for name in TRAINED_WITH}
    if Path(source).resolve() == out.resolve():
        raise UserError(f"--out {out} is the student itself: choose another folder")
    state = on_rank0(ranks, lambda: storage.prepare_output_dir(out, settings))
    if state == "finished":
        return
    made_by = storage.fingerprint(settings)
    if ranks.is_rank0 and not args.finetune_data:  # evaluations of an older student of this name
        folder = flags.test_file(args, method, 0).parent
        names = f"D_{args.task}__T_{flags.train_key(args, method)}__E_*.json"
        completions.set_aside_completions(
            folder.glob(names), made_by if state == "unfinished" else None
        )
    student = decoding.load_model(source)
    curation.check_family(data_file, family=student.family, student=args.student)
    print0(ranks, f"train: {method} on {data_file} -> {out}")
    names = [field.name for field in dataclasses.fields(train_loop.TrainConfig)]
    config = train_loop.TrainConfig(**{name: getattr(args, name) for name in names})
    for epoch in train_loop.train(*student, data, out, config, settings, ranks, vars(args)):
        if args.eval_every and epoch % args.eval_every == 0:
            result = evaluate_student(args, ranks, method, student, epoch, made_by)
            if args.keep_best and ranks.is_rank0:
                part = "validation" if args.validation else "test"
                best = evaluate.score(result["file"], part, args.split, args.data)
                checkpoints.keep_best(out, best, student.model, student.tokenizer)
    command = f"python evaluate.py generate --model {out} --prompts FILE --out FILE"
    print0(ranks, f"train: the student is in {out}; try it: {command}")


# ---------------- 4. Evaluate: the student completes the test questions (paper §4)


def student_plan(
    args: Namespace, method: str, family: str, model: str, api: str = ""
) -> SamplingConfig:
    """Return how the student is asked: greedily, or --eval_samples times at a temperature."""
    k = args.eval_samples
    plan = {"model": model, "api": api, "family": family}
    plan |= {"template": student_template(args, method), "degree": k, "choices": k}
    plan |= {"max_new_tokens": args.max_new_tokens}
    plan |= {"temperature": args.eval_temperature if k > 1 else 0.0}
    return SamplingConfig(**plan, examples=few_shot_examples(args, method))


def evaluate_student(
    args: Namespace,
    ranks: Ranks,
    method: str,
    student: LoadedModel,
    epoch: int | None,
    made_by: str,
) -> dict:
    """Write a student's completion dataset on the test part, unless it is there; return its score.

    made_by: the fingerprint of what it was made with.
    """
    path = flags.test_file(args, method, epoch)
    benchmark = load_benchmark(args, args.validation if method in FINE_TUNED else 0.0)
    samples = [benchmark.samples[i] for i in benchmark.test + benchmark.validation]
    plan = student_plan(args, method, student.family, args.student)
    settings = {"model": made_by, "epoch": epoch, "template": plan.template}
    settings |= {"max_new_tokens": plan.max_new_tokens, **fingerprints(samples, plan)}
    if plan.degree > 1:
        settings |= {"samples_a_question": plan.degree}
        settings |= {"temperature": plan.temperature, "seed": args.seed}
    if not on_rank0(
        ranks, lambda: completions.completions_match("evaluate", path, args.task, settings)
    ):
        start = time.perf_counter()
        complete = local_complete(args, ranks, student, method, path, args.seed)
        data = completions.make_completions(complete, samples, plan)
        metadata = student_metadata(args, method, plan, epoch)
        metadata |= {"validation": benchmark.validation, "settings": settings}
        metadata |= {"run": run_metadata(args, method, len(benchmark.train), student.model)}
        if ranks.is_rank0:
            completions.write_completions(path, metadata, data)
            print(f"evaluate: {len(samples)} questions in {time.perf_counter() - start:.1f} s")
    return on_rank0(ranks, lambda: score_student(args, method, path, epoch))


def student_metadata(args: Namespace, method: str, plan: SamplingConfig, epoch: int | None) -> dict:
    """Return who made a completion file, by the names that its files have in saved/."""
    metadata = {"dataset_key": args.task, "base_model": storage.model_key(args.student)}
    metadata |= {"completion_key": method, "finetune_key": None, "train_key": None}
    if method in FINE_TUNED:
        metadata["finetune_key"] = flags.finetune_key(args, method)
        metadata["train_key"] = flags.train_key(args, method)
    metadata |= {"epoch": epoch, "prediction_template": plan.template}
    return metadata | {"split": args.split, "part": "test"}


def run_metadata(args: Namespace, method: str, questions: int, model: object) -> dict:
    """Return what a plot needs to know of a run: what the paper's studies vary, and the sizes."""
    known = {"parameters": sum(p.numel() for p in model.parameters())}
    names = []
    if method in FINE_TUNED:
        known["questions"] = questions
        names += "lr batch_size epochs label_style split seed".split()
    if method == "ft_cot":
        names += "teacher teacher_method temperature degree filter max_rationale_words".split()
    return known | {name: getattr(args, name) for name in names}


def score_student(args: Namespace, method: str, path: Path, epoch: int | None) -> dict:
    """Score a completion file on the test part and print the accuracy."""
    result = evaluate.score(path, "test", args.split, args.data)
    when = f" epoch {epoch}" if epoch else ""
    print(
        f"evaluate: {method}{when}: test accuracy {result['accuracy']:.2f}% [{result['low']:.1f}, "
        f"{result['high']:.1f}] ({result['correct']} of {result['n']}) -> {path}"
    )
    if args.eval_samples > 1:
        from extras import report

        print(f"evaluate: {report.describe_votes(result, args.data)}")
    return result


def evaluate_finished_student(args: Namespace, ranks: Ranks, method: str) -> dict:
    """Score a finished student, or the untrained one for the methods that only prompt.

    Raises UserError where there is none, or where it was made with other flags than these.
    """
    if method in PROMPTED:
        source = student_source(args, ranks)
        made_by = storage.model_fingerprint(source)
        return evaluate_student(args, ranks, method, decoding.load_model(source), None, made_by)
    out = flags.student_dir(args, method)
    note = storage.read_json(out / "run.json") if (out / "run.json").exists() else {}
    settings = note.get("settings")
    if not note.get("finished") or not isinstance(settings, dict):
        raise UserError(f"there is no finished student in {out}: run --stage train")
    if not args.out:  # one of --out may have been trained on any file, with any flags
        wanted = {name: getattr(args, name) for name in TRAINED_WITH}
        data_file = flags.finetune_file(args, method, student_family(args))
        has_source = method == "ft" or flags.teacher_file(args).exists()
        if args.stage == "evaluate" and data_file.exists() and has_source:
            on_rank0(ranks, lambda: curation.check_curated(plan_curation(args, method)))
            wanted["finetune_data"] = storage.file_sha256(data_file)
        storage.check_settings(out, settings, wanted)
    epoch = settings.get("epochs")
    if type(epoch) is not int:
        raise UserError(f"{out / 'run.json'} does not say its number of epochs: train it again")
    student = decoding.load_model(str(out))
    return evaluate_student(args, ranks, method, student, epoch, storage.fingerprint(settings))


def evaluate_api_student(args: Namespace, method: str) -> dict:
    """Write the completion file of a student behind an API, on the test part; return its score."""
    model = args.student
    if method in FINE_TUNED:
        from extras import batch_api

        model = batch_api.fine_tuned_model(flags.job_file(args, method))
    family = API_FAMILIES[args.label_style]
    plan = student_plan(args, method, family, model, "chat" if family == "chat" else "completions")
    benchmark = load_benchmark(args)
    samples = [benchmark.samples[i] for i in benchmark.test]
    metadata = student_metadata(args, method, plan, epoch=None)
    metadata = teacher.with_settings(metadata, plan, samples)
    path = flags.test_file(args, method, None)
    rules = args.rules or teacher.default_rules(plan.api)
    teacher.sample_missing(api_config(args), plan, path, metadata, samples, rules)
    return evaluate.score(path, "test", args.split, args.data)


# ---------------- The whole method


def run(args: Namespace, ranks: Ranks) -> list[dict]:
    """Run the stages of one run, a call each; return the scores of the evaluated methods."""
    stages = ["sample", "curate", "train", "evaluate"] if args.stage == "all" else [args.stage]
    methods = args.method[-1:] if args.finetune_data else args.method
    tuned = [method for method in methods if method in FINE_TUNED]
    if "sample" in stages and (args.stage == "sample" or "ft_cot" in tuned):
        is_local = not flags.is_remote_teacher(args)  # the journal of an API has a lock of its own
        with storage.file_lock(flags.teacher_file(args), ranks.is_rank0 and is_local):
            sample(args, ranks)
    curated = {}
    if "curate" in stages:
        if args.stage == "curate" and "ft_cot" in tuned and flags.is_remote_teacher(args):
            publish_partial_completions(args)
        for method in tuned:
            curated[method] = curate_method(args, ranks, method)
    results = []
    for method in methods:
        if "train" in stages and method in FINE_TUNED:
            train_method(args, ranks, method, curated.get(method))
        if "evaluate" in stages:
            results.append(evaluate_method(args, ranks, method))
    return results


def curate_method(args: Namespace, ranks: Ranks, method: str) -> str:
    """Curate one method on rank 0; return the SHA-256 of its file."""
    path = flags.finetune_file(args, method, student_family(args))
    with storage.file_lock(path, ranks.is_rank0, timeout=60):  # other seeds may share it
        sha256 = on_rank0(ranks, lambda: curate(args, method))
    if args.show and ranks.is_rank0:
        from extras import filters

        filters.show_samples(path, args.show)
    return sha256


def train_method(args: Namespace, ranks: Ranks, method: str, curated: str | None) -> None:
    """Train one method.  curated: the SHA-256 of its fine-tuning file, if this run has made it."""
    data_file = flags.finetune_file(args, method, student_family(args))
    if args.finetune_data:
        data_file = Path(args.finetune_data)
    elif args.stage == "train":
        on_rank0(ranks, lambda: curation.check_curated(plan_curation(args, method)))
    if curated and curated != storage.file_sha256(data_file):
        what = "was replaced by another run since it was curated: start the same command again"
        raise UserError(f"{data_file} {what}")
    if args.label_style in API_FAMILIES:
        from extras import batch_api

        note = flags.job_file(args, method)
        batch_api.fine_tune(api_config(args), args.student, data_file, note)
    else:
        with storage.file_lock(flags.student_dir(args, method), ranks.is_rank0):
            train(args, ranks, method, data_file)


def evaluate_method(args: Namespace, ranks: Ranks, method: str) -> dict:
    if args.label_style in API_FAMILIES:
        return evaluate_api_student(args, method)
    with storage.file_lock(flags.test_file(args, method, args.epochs), ranks.is_rank0):
        return evaluate_finished_student(args, ranks, method)


# ---------------- Command line


def run_all(runs: list[Namespace]) -> None:
    """Check every run, then run them; print the table of one, or of the grid."""
    for args in runs:
        flags.check(args)
    ranks = Ranks()
    if any(flags.needs_torch(args) for args in runs):
        ranks = storage.init_ranks(decoding.select_device(runs[0].device))
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
    storage.escape_unencodable_output()
    runs = flags.parse_args(argv, __doc__)
    try:
        run_all(runs)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except ModuleNotFoundError as e:
        sys.exit(storage.missing_extras_message(e))
    except RuntimeError as e:
        sys.exit(storage.peer_failure_message(e))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; start the same command again to go on")


if __name__ == "__main__":
    main()
