"""Decode with a local model, score completions, and set the scores side by side.

    python evaluate.py generate --model DIR --prompts FILE.jsonl --out FILE.jsonl     # {"prompt": ...} a line
    python evaluate.py score saved/completion_data/*/*.json [--part train|test|all] [--json]
    python evaluate.py table [--format markdown]     # beside the paper's values;  plot degree --out FILE.png: figures
    python evaluate.py show FILE    # wrong, right, unreadable completions to read;  diff FILE FILE: where two runs differ

Only `generate` imports torch.  Completion datasets are read and made in evaluate.py, looked at in extras/report.py.
"""

import argparse
import contextlib
import inspect
import json
import math
import os
import sys
from pathlib import Path

import tasks
import storage
from storage import UserError, read_completions, read_prompts


# ---------------- Local models

# decoded at once: on a CPU 64 of a small model take 12% longer, 128 are no faster
CPU_ROWS = 96
GPU_ROWS = 512
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
    "tokenizer.model",
)


def load_model(name, dtype="float32"):
    """-> (model, tokenizer, family) of a Hugging Face folder or hub name; family is decoder or encoder_decoder.

    Raises UserError where the folder is not a model, has no tokenizer, or the name cannot be downloaded."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    for cache in (
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY",
        "LRU_CACHE_CAPACITY",
    ):  # oneDNN's and torch's of what oneDNN compiles for the last 1024
        os.environ.setdefault(
            cache, "64"
        )  # shapes of products, up to 1 MB each; few of them come again
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "config.json").exists():
            raise UserError(f"{name} is not a model folder: it has no config.json")
        if not any((folder / f).exists() for f in TOKENIZER_FILES):
            raise UserError(
                f"{name} has no tokenizer: save one beside the model with tokenizer.save_pretrained({name!r})"
            )
    try:
        config = transformers.AutoConfig.from_pretrained(
            name, trust_remote_code=False
        )  # no code of a stranger's, and no question
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        auto = (
            transformers.AutoModelForSeq2SeqLM
            if config.is_encoder_decoder
            else transformers.AutoModelForCausalLM
        )
        model = auto.from_pretrained(name, dtype=dtype, trust_remote_code=False, weights_only=True)
    except (
        OSError,
        SafetensorError,
        StrictDataclassError,
        *storage.UNREADABLE,
    ) as e:  # files missing, torn or foreign
        what = (
            "could not be loaded"
            if folder.is_dir()
            else "is neither a folder here nor a model that could be downloaded"
        )
        raise UserError(f"the model {name} {what} ({' '.join(str(e).split())[:160]})") from None
    for module in model.modules():  # the same function as one operation instead of eight
        for name, layer in module.named_children():
            if type(layer) is transformers.activations.NewGELUActivation:
                setattr(module, name, transformers.activations.GELUTanh())
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {name} has no end-of-sequence token, so a student could never stop: set eos_token"
        )
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"the config of {name} has no decoder_start_token_id, so its decoder has no first token: set it"
        )
    return model, tokenizer, "encoder_decoder" if config.is_encoder_decoder else "decoder"


def sample_tokens(logits, temperature, generators, top_p=1.0):
    """(B, V) -> (B,) next tokens: greedy at temperature 0, else one draw a row from the row's own random stream, of the
    likeliest tokens that reach top_p together."""
    import torch

    if not temperature:
        return logits.argmax(-1)
    chances = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ranked, order = chances.sort(-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= top_p] = 0
        chances = chances.scatter(-1, order, ranked)
    cumulative = chances.cumsum(-1)
    draws = torch.tensor(
        [[torch.rand((), dtype=torch.float64, generator=g)] for g in generators],
        device=logits.device,
    )
    return (
        torch.searchsorted(cumulative, draws * cumulative[:, -1:], right=True)
        .squeeze(1)
        .clamp(max=logits.shape[-1] - 1)
    )


def prefill(model, family, prompts, pad_id):
    """Read a batch of prompts (lists of ids); -> (logits (B, V) of the first new token, what later steps need).

    Decoders: padded on the left, so that all rows go on at the same place, with a mask, and with positions that start at
    0 after the padding.  Encoder-decoders: padded on the right, the encoder runs once."""
    import torch

    left = family == "decoder"
    width = max(map(len, prompts))

    def padded(rows, value):
        return torch.tensor(
            [
                [value] * (width - len(r)) + r if left else r + [value] * (width - len(r))
                for r in rows
            ],
            device=model.device,
        )

    # (B, T)
    ids = padded(prompts, pad_id)
    state = {"attention_mask": padded([[1] * len(p) for p in prompts], 0)}
    if left:
        last = (
            {"logits_to_keep": 1}
            if "logits_to_keep" in inspect.signature(model.forward).parameters
            else {}
        )
        positions = (state["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        output = model(input_ids=ids, **state, position_ids=positions, use_cache=True, **last)
    else:
        encoder_outputs = model.get_encoder()(input_ids=ids, **state)
        start = torch.full(
            (len(prompts), 1), model.config.decoder_start_token_id, device=model.device
        )
        output = model(
            **state, encoder_outputs=encoder_outputs, decoder_input_ids=start, use_cache=True
        )
        state["decoder_attention_mask"] = torch.ones_like(start)
    if getattr(output, "past_key_values", None) is None:
        raise UserError(
            f"models of type {model.config.model_type} keep no key-value cache, so they cannot be decoded here"
        )
    state |= {
        "past_key_values": output.past_key_values,
        "positions": state["attention_mask"].sum(-1),
    }
    return output.logits[:, -1], state


def decode_step(model, family, tokens, state):
    """(B,) tokens -> (B, V) logits of the tokens after them; state is carried on."""
    import torch
    from extras import cpu_decoding as decoding

    decoding.advance(state)
    own = "attention_mask" if family == "decoder" else "decoder_attention_mask"
    if own in state:  # a cache in pages has masks of its own
        state[own] = torch.cat([state[own], torch.ones_like(tokens[:, None])], 1)
    told = {name: value for name, value in state.items() if name != "positions"}
    if family == "decoder":
        output = model(
            input_ids=tokens[:, None],
            position_ids=state["positions"][:, None],
            **told,
            use_cache=True,
        )
    else:  # what the encoder has read is in the cache: only its shape is looked at
        shape = (
            len(tokens),
            state["attention_mask"].shape[1] if own in state else 1,
            model.config.hidden_size,
        )
        read = torch.zeros(1, device=model.device, dtype=model.dtype).expand(shape)
        output = model(
            encoder_outputs=(read,), decoder_input_ids=tokens[:, None], **told, use_cache=True
        )
    state["positions"] = state["positions"] + 1
    state["past_key_values"] = output.past_key_values
    return output.logits[:, -1]


def prefill_in_chunks(model, family, rows, pad_id):
    """`prefill` of the prompts of rows (longest first), on a CPU in parts of at most 512 tokens (or one prompt): like lengths, little
    padding, small buffers.  A prompt is read once for all its rows.  Yields (rows, logits (b, V), state, the place there of each row) of each part."""
    from extras import cpu_decoding as decoding

    parts = []
    most = 512 if model.device.type == "cpu" else sys.maxsize
    for row in rows:
        read = {r["index"] for r in parts[-1]} if parts else ()
        if (
            not parts
            or row["index"] not in read
            and (len(read) + 1) * len(parts[-1][0]["ids"]) > most
        ):
            parts.append([])
        parts[-1].append(row)
    for part in parts:
        prompts = {row["index"]: row["ids"] for row in part}
        logits, state = prefill(model, family, list(prompts.values()), pad_id)
        if not decoding.can_be_paged(state) and len(parts) > 1:  # they could not be put together
            part = rows
            prompts = {row["index"]: row["ids"] for row in rows}
            logits, state = prefill(model, family, list(prompts.values()), pad_id)
        places = {index: place for place, index in enumerate(prompts)}
        yield part, logits, state, [places[row["index"]] for row in part]
        if part is rows:
            return


def room_of(row, new=()):
    """-> the tokens that a row takes in the cache: its prompt, its new tokens, and the room set aside for some of these."""
    return len(row["ids"]) + max(len(new), min(row["room"], row["limit"]))


def default_size(model):
    """-> (rows decoded at once, bytes their cache may take) where no batch_size is given: on a CPU half of what the weights take, or 0.6 GB,
    on a GPU half of what is free."""
    import torch

    if model.device.type != "cuda":
        return CPU_ROWS, max(6 * 10**8, sum(weight.nbytes for weight in model.parameters()) // 2)
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(
        model.device
    )  # torch has it, for whoever asks
    return GPU_ROWS, (torch.cuda.mem_get_info(model.device)[0] + unused) // 2


def token_budget(model, family, waiting, batch_size, rows, memory):
    """-> how many tokens there may be side by side: those of the longest batch_size rows; by default (None) of so many rows, but at most
    what takes so much memory (bytes), and those of the longest row at least."""
    from extras import cpu_decoding as decoding

    longest = sorted(map(room_of, waiting), reverse=True)[: batch_size or rows]
    if batch_size or not longest:
        return sum(longest)
    a_token = decoding.bytes_a_token(prefill(model, family, [waiting[0]["ids"][:1]], 0)[1])
    return max(longest[0], min(sum(longest), memory // max(1, a_token)))


def choose_entering(rows, tokens, waiting, most, budget):
    """-> how many of those waiting fit into the budget of tokens beside the rows there are, up to `most` rows in all; none while these fill
    7/8 of it."""
    room = budget - sum(map(room_of, rows, tokens))
    number = 0
    if not rows or room >= budget // 8:
        while (
            len(rows) + number < min(most, len(rows) + len(waiting))
            and (room := room - room_of(waiting[number])) >= 0
        ):
            number += 1
    return number


def decode(
    model,
    tokenizer,
    family,
    waiting,
    most,
    budget,
    temperature=0.0,
    top_p=1.0,
    stop=None,
    likeliest=None,
):
    """Decode rows {"index", "ids", "limit", "room", "random"}, the longest first; yield each when it ends, (row, text, reason): `stop` at end of
    sequence or a stop string (which is cut off), `length` at the row's limit.

    Rows that end leave, and waiting ones enter: `most` at once, with at most `budget` tokens.  likeliest: of
    decoding.likeliest_word; where it is, what is called logits is what it takes.  Raises UserError where logits are no numbers."""
    import torch
    from extras import cpu_decoding as decoding, cpu_training as kernels

    eos = model.generation_config.eos_token_id
    eos = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    pad_id = (
        tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    )
    rows = []
    tokens = []
    state = None
    while rows or waiting:
        if waiting and (not rows or decoding.can_start_late(model, family, state)):
            number = choose_entering(rows, tokens, waiting, most, budget)
            entering = waiting[:number]
            waiting = waiting[number:]
            for part, more, read, places in prefill_in_chunks(model, family, entering, pad_id):
                state = decoding.enter(state if rows else None, read, places, budget)
                logits = torch.cat([logits, more[places]]) if rows else more[places]
                rows = rows + part
                tokens = tokens + [[] for _ in part]
                kernels.give_freed_memory_back()  # reading takes ten times what a step takes
        if likeliest:
            best, picked = likeliest(logits)
        else:
            best = logits.amax(-1)
            picked = sample_tokens(
                logits.float(), temperature, [row["random"] for row in rows], top_p
            )
        if len(broken := (~best.isfinite()).nonzero()):
            raise UserError(
                f"prompt {rows[broken[0]]['index']}: the model's logits are not numbers (NaN or infinite) at new token "
                f"{len(tokens[broken[0]]) + 1}: its weights are damaged, or too large for this --precision"
            )
        ended = []
        going = []
        for place, (row, new, token) in enumerate(zip(rows, tokens, picked.tolist())):
            new.append(token)
            at_end = token in eos or len(new) >= row["limit"]
            text = tokenizer.decode(new, skip_special_tokens=True) if stop or at_end else ""
            cut = min((text.find(s) for s in stop or () if s in text), default=-1)
            if cut >= 0 or at_end:
                ended.append(
                    (
                        row,
                        text[:cut] if cut >= 0 else text,
                        "stop" if cut >= 0 or token in eos else "length",
                    )
                )
            else:
                going.append(place)
        if ended:
            yield from ended
            rows = [rows[place] for place in going]
            tokens = [tokens[place] for place in going]
            picked = picked[going]
        if rows:
            if ended:
                state = decoding.take(state, going)
            logits = decode_step(model, family, picked, state)


def fit_context_window(model, family, ids, limits, too_long):
    """-> [(prompt, limit of new tokens)] that the model has positions for, and a remark on those that suffer.  A prompt that
    leaves no room is refused (UserError), cut on the left, or gets the limit 0 (skip)."""
    positions = (
        family == "decoder"
        and max(getattr(model.config, "max_position_embeddings", None) or 0, 0)
        or sys.maxsize
    )
    fitting = []
    for i, (row, limit) in enumerate(zip(ids, limits)):
        if len(row) >= positions and too_long == "cut":
            row = row[min(limit, positions // 2) - positions :]
        if not row or len(row) >= positions and too_long == "refuse":
            raise UserError(
                f"prompt {i} has {len(row)} tokens: it needs at least 1 and, in this model, fewer than {positions}"
            )
        fitting.append((row, min(limit, max(0, positions - len(row)))))
    less = sum(new < old for (_, new), old in zip(fitting, limits))
    none = sum(not new for _, new in fitting)
    return fitting, less and (
        f"the model has {positions} positions: {less} of {len(ids)} prompts get fewer new tokens than asked, "
        f"{none} none"
    )


def gather(value):
    """-> ([value of each rank], this process's rank)"""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value], 0
    shares = [None] * dist.get_world_size()
    dist.all_gather_object(shares, value)
    return shares, dist.get_rank()


def open_journals(path, rank, ranks):
    """-> (the journals this rank looks after, its own first, {key: row} of what all ranks of a killed run had finished)."""
    journals = [
        storage.Journal(f"{path}.journal-{r}")
        for r in sorted({rank, *storage.journal_paths(path)})
        if r % ranks == rank
    ]
    held = [rows for share in gather([journal.rows for journal in journals])[0] for rows in share]
    return journals, {
        key: row
        for rows in held
        for key, row in rows.items()
        if {"completion", "finish_reason"} <= row.keys()
    }


def weight_checksums(model):
    """-> a sum of each of its weights, by which they are known again."""
    import torch
    from extras import cpu_training as kernels

    sums = []
    mapped = kernels.mapped_files()
    for weight in model.parameters():  # in parts, as torch makes doubles of all it sums
        sums.append(
            sum(
                part.sum(dtype=torch.float64).item()
                for part in weight.detach().flatten().split(2**22)
            )
        )
        kernels.forget([weight], mapped)
    return sums


def generate(
    model,
    tokenizer,
    family,
    prompts,
    max_new_tokens,
    temperature=0.0,
    n=1,
    stop=None,
    batch_size=None,
    seed=0,
    too_long="refuse",
    top_p=1.0,
    journal=None,
):
    """-> for each prompt, n times {"completion", "finish_reason"}.  max_new_tokens: one number, or one per prompt.

    Longest first, batch_size rows at a time; a row's random stream depends on seed, prompt and number alone.  Under torchrun each
    rank decodes its share and all return everything.  Beside `journal`, the path of the file to be written in the end, completions
    are kept as they finish, and a killed run goes on there.  too_long: refuse prompts that leave no room in the model's positions
    (UserError), cut them on the left, or skip them (empty completion, "length")."""
    import torch
    from extras import cpu_decoding as decoding, cpu_training as kernels

    ids = [tasks.encode_prompt(tokenizer, family, prompt) for prompt in prompts]
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    fitting, remark = fit_context_window(model, family, ids, limits, too_long)
    shares, rank = gather(remark)
    if remark and rank == 0:
        print(remark)
    settings = [temperature, top_p, stop, seed]
    journals = []
    done = {}
    if journal:  # a row may be taken from there if the weights and all else are the same
        settings += weight_checksums(model)
        journals, done = open_journals(journal, rank, len(shares))
    settings = storage.fingerprint(settings)
    keys = {
        (i, k): storage.fingerprint([settings, i, k, *fitting[i]])
        for i in range(len(ids))
        for k in range(n)
    }
    todo = [
        i
        for i, (_, limit) in enumerate(fitting)
        if limit and any(keys[i, k] not in done for k in range(n))
    ]
    rows = [
        {
            "index": i,
            "key": keys[i, k],
            "ids": fitting[i][0],
            "limit": fitting[i][1],
            "room": 64
            if model.device.type == "cpu"
            else fitting[i][
                1
            ],  # where there are no pages, no row enters later, for fear of long ones
            "random": torch.Generator().manual_seed(
                int(storage.fingerprint([seed, prompts[i], k]), 16) % 2**63
            ),
        }
        for i in sorted(todo, key=lambda i: -len(fitting[i][0]))[rank :: len(shares)]
        for k in range(n)
        if keys[i, k] not in done
    ]
    was_training = model.training
    fresh = {}
    size = default_size(model)
    model.eval()
    if model.device.type == "cpu":
        kernels.keep_freed_memory(2**25)  # larger blocks are weights
    with (
        decoding.paged_attention(model),
        contextlib.nullcontext() if temperature else decoding.likeliest_word(model) as likeliest,
        decoding.packed_products(model),
        torch.inference_mode(),
        storage.out_of_memory_hint(
            ": lower --eval_batch_size (evaluate.py generate: --batch_size)"
        ),
    ):
        budget = token_budget(model, family, rows, batch_size, *size)
        decoded = decode(
            model,
            tokenizer,
            family,
            rows,
            2 * (batch_size or size[0]),
            budget,
            temperature,
            top_p,
            stop,
            likeliest,
        )
        for row, text, reason in storage.progress(decoded, "decoding", rank == 0, len(rows)):
            fresh[row["key"]] = {"key": row["key"], "completion": text, "finish_reason": reason}
            for own in journals[:1]:
                own.append([fresh[row["key"]]])
    model.train(was_training)
    for one in journals:
        one.close()
    for share in gather(fresh)[0]:
        done |= share
    none = {"completion": "", "finish_reason": "length"}
    return [
        [{name: done.get(keys[i, k], none)[name] for name in none} for k in range(n)]
        for i in range(len(ids))
    ]


# ---------------- Completion datasets: made by any model behind complete(prompts, n, temperature, max_new_tokens, stop)


def few_shot_prompt(task, data_dir="data"):
    """-> the Few-shot-CoT prompt of a task.  Raises UserError where there is none."""
    path = Path(data_dir) / "few_shot_cot_prompts.json"
    prompt = storage.read_json(path).get(task) if path.exists() else None
    if prompt is None and task == "toy":
        return tasks.TOY_EXAMPLES
    if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
        raise UserError(
            f"{path} has no few-shot prompt for {task}: make it with `python data/prepare.py {task}`, or use zs_cot "
            "(there is none for tracking_shuffled_objects)"
        )
    return prompt["prompt"]


def make_completions(
    complete,
    samples,
    method,
    family,
    template,
    degree=1,
    temperature=0.0,
    max_new_tokens=128,
    examples="",
):
    """-> {"<sample_index>": [row, ...]}: `degree` completions per sample, by any model behind `complete(prompts, n,
    temperature, max_new_tokens, stop)`.  zs_cot takes two steps (paper §3, step 1): the rationale, then the answer after it."""
    prompts = [
        tasks.format_sample(template, family, s["question"], examples=examples)[0] for s in samples
    ]
    stop = (
        ["\nQ:"] if method == "fs_cot" else None
    )  # the examples teach a base model to go on with a next question
    first = complete(prompts, degree, temperature, max_new_tokens, stop)
    data = {
        str(s["sample_index"]): [
            {
                "sample_index": s["sample_index"],
                "completion_index": k,
                "question": s["question"],
                "answer": s["answer"],
                "prompt": prompt,
                **one,
            }
            for k, one in enumerate(many)
        ]
        for s, prompt, many in zip(samples, prompts, first)
    }
    if method == "zs_cot":
        rows = [row for many in data.values() for row in many]
        for row in rows:
            row |= {"reasoning_" + k: row[k] for k in ("prompt", "completion", "finish_reason")}
            row["prompt"] += row["completion"] + tasks.COT_ANSWER
        for row, [answer] in zip(
            rows, complete([row["prompt"] for row in rows], 1, 0.0, max_new_tokens, None)
        ):
            row |= answer
    return data


def check_rows(path, rows, task, samples, data_dir):
    """Raise UserError for a completion that is not of these samples: foreign, or with another question or gold answer."""
    gold = [(sample["question"].strip(), sample["answer"].strip()) for sample in samples]
    for row in rows:
        i = row["sample_index"]
        if not 0 <= i < len(gold) or (row["question"].strip(), row["answer"].strip()) != gold[i]:
            raise UserError(
                f"{path}: sample {i} is not sample {i} of {task} in {data_dir} (question or gold answer differ): "
                "the file was made from other data"
            )


def rows_of_part(path, metadata, rows, part, split, data_dir, allow_partial):
    """-> the rows of the asked part, checked against the dataset: no sample may be missing, foreign or differ from it."""
    task = metadata["dataset_key"]
    if (
        part == "all"
        and task != "toy"
        and not (Path(data_dir) / "dataset" / f"{task}.json").exists()
    ):
        return rows  # nothing to check against: the rows carry their gold answers
    samples = tasks.load(task, data_dir)
    check_rows(path, rows, task, samples, data_dir)
    if part == "validation":
        wanted = set(metadata.get("validation") or [])
    else:
        wanted = set(
            range(len(samples))
            if part == "all"
            else tasks.load_split(task, split, data_dir)[part == "test"]
        )
    missing = sorted(wanted - {row["sample_index"] for row in rows})
    if missing and not allow_partial:
        raise UserError(
            f"{path} lacks {len(missing)} of the {len(wanted)} samples of part '{part}' (first: {missing[0]}): "
            "complete it, choose another --part, or score what there is with --allow_partial"
        )
    return [row for row in rows if row["sample_index"] in wanted]


# ---------------- Scores


def wilson(correct, n, z=1.959964):
    """-> (low, high): the 95% Wilson score interval of a share, in percent; honest at 0% and 100% too."""
    share = correct / n
    z2 = z * z / n
    middle = share + z2 / 2
    half = z * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return 100 * max(0.0, middle - half) / (1 + z2), 100 * min(1 + z2, middle + half) / (1 + z2)


def grade_rows(metadata, rows, rules):
    """-> [(row, "right", "wrong" or "unreadable" by these rules, {rules: Verdict})]"""
    graders = [
        (r, tasks.make_grader(metadata["dataset_key"], metadata.get("prediction_template"), r))
        for r in ("paper", "flexible")
    ]
    judged = []
    for row in rows:
        verdicts = {r: grader(row["completion"], row["answer"]) for r, grader in graders}
        asked = verdicts[rules]
        judged.append(
            (
                row,
                "right"
                if asked.correct
                else "unreadable"
                if asked.prediction in (None, "")
                else "wrong",
                verdicts,
            )
        )
    return judged


def score(path, part="test", split="default", data_dir="data", rules="paper", allow_partial=False):
    """-> one dict: what the file is, n, accuracy by the asked rules with its 95% interval, and both rules' measures (all %)."""
    return score_rows(path, *read_completions(path), part, split, data_dir, rules, allow_partial)[0]


def score_rows(path, metadata, rows, part, split, data_dir, rules, allow_partial):
    """-> (score, judge_rows of the part) of what was read from path."""
    rows = rows_of_part(path, metadata, rows, part, split, data_dir, allow_partial)
    if not rows:
        raise UserError(f"{path} has no completion of part '{part}'")
    judged = grade_rows(metadata, rows, rules)

    def percent(flags):
        return round(100 * sum(flags) / len(rows), 2)

    correct = sum(outcome == "right" for _, outcome, _ in judged)
    questions = len({row["sample_index"] for row in rows})
    low, high = wilson(
        correct * questions / len(rows), questions
    )  # several answers to a question are not independent
    names = {
        "task": "dataset_key",
        "model": "base_model",
        "method": "completion_key",
        "train_key": "train_key",
        "epoch": "epoch",
        "template": "prediction_template",
        "run": "run",
    }
    return {
        "file": str(path),
        **{name: metadata.get(key) for name, key in names.items()},
        "part": part,
        "split": split,
        "rules": rules,
        "n": len(rows),
        "questions": questions,
        "correct": correct,
        "accuracy": round(100 * correct / len(rows), 2),
        "low": round(low, 2),
        "high": round(high, 2),
        **{r: percent(v[r].correct for _, _, v in judged) for r in ("paper", "flexible")},
        **{
            k: percent(getattr(v[rules], k) for _, _, v in judged)
            for k in ("contains_answer", "correct_format")
        },
        "complete": percent(row.get("finish_reason") == "stop" for row in rows),
        "no_answer": sum(v[rules].prediction in (None, "") for _, _, v in judged),
    }, judged


# ---------------- Command line


def select_device(name):
    """-> torch.device; cuda if there is one and none is named, under torchrun one for each rank.  Raises UserError where it is not to be had."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    rank = int(os.environ.get("LOCAL_RANK", 0))
    if name.startswith("cuda") and rank and rank >= torch.cuda.device_count():
        raise UserError(
            f"rank {rank} has no GPU of its own, there are {torch.cuda.device_count()}: start as many ranks with torchrun, or add --device cpu"
        )
    try:
        device = (
            torch.device("cuda", rank)
            if "RANK" in os.environ and name.startswith("cuda")
            else torch.device(name)
        )
        torch.zeros(1, device=device)
    except (
        RuntimeError,
        AssertionError,
    ) as e:  # what torch raises for a name or a device that is not there
        raise UserError(
            f"--device {name} cannot be used here: {str(e).splitlines()[0][:120]}"
        ) from None
    return device


def run_generate(args):
    """`generate`: complete a file of prompts, on one process or on the ranks of torchrun.  Raises UserError on flags that cannot work."""
    if (
        min(1 if args.batch_size is None else args.batch_size, args.max_new_tokens, args.samples)
        < 1
        or not 0 <= args.temperature < 100
        or not 0 < args.top_p <= 1
        or "" in (args.stop or [])
        or args.samples > 1
        and not args.temperature
    ):
        raise UserError(
            "--batch_size, --samples and --max_new_tokens must be 1 or more, --temperature from 0 to 100, and above 0 with "
            "--samples, --top_p above 0 and at most 1, --stop not empty"
        )
    rows, prompts, limits = read_prompts(args.prompts, args.max_new_tokens)
    device = select_device(args.device)
    dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(args.precision, "float32")
    if "RANK" in os.environ:  # under torchrun
        import torch

        if device.type == "cuda":
            torch.cuda.set_device(device)
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model, tokenizer, family = load_model(args.model, dtype)
    generated = generate(
        model.to(device),
        tokenizer,
        family,
        prompts,
        limits,
        args.temperature,
        args.samples,
        args.stop,
        args.batch_size,
        args.seed,
        top_p=args.top_p,
        journal=args.out,
    )
    if gather(None)[1] == 0:
        lines = [
            json.dumps({**row, **({"completion_index": k} if args.samples > 1 else {}), **one})
            + "\n"
            for row, many in zip(rows, generated)
            for k, one in enumerate(many)
        ]
        storage.write_atomic(args.out, "".join(lines))
        storage.remove_journals(args.out)
        print(f"wrote {len(lines)} completions to {args.out}")
    if (
        "RANK" in os.environ
    ):  # leave together, and past torch's threads: at times one of them aborts a process that ends
        os._exit(bool(gather(None) and sys.stdout.flush()))


BATCH_SIZE_HELP = """rows decoded at once, of the longest; of shorter ones up to twice as many (default: on a CPU 96, but at most what takes half the
memory of the weights, or 0.6 GB; on a GPU 512, in half of its free memory); more is faster and takes more memory"""


def parse_args(argv=None):
    """-> the flags of one of the commands; args.run is its function."""
    from extras import report as look

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    g = commands.add_parser("generate", help="decode prompts with a local model")
    g.set_defaults(run=run_generate)
    g.add_argument("--model", required=True, help="Hugging Face folder or name")
    g.add_argument(
        "--prompts", required=True, help='JSON lines: {"prompt": text, "max_new_tokens"?: number}'
    )
    g.add_argument(
        "--out",
        required=True,
        help="JSON lines: the same rows with completion and finish_reason, in the same order",
    )
    g.add_argument(
        "--max_new_tokens",
        type=int,
        default=1024,
        help="new tokens a prompt, where the row names none (default 1024)",
    )
    g.add_argument(
        "--temperature", type=float, default=0.0, help="0 = greedy (default, as in the paper)"
    )
    g.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens that reach this share (default 1: all)",
    )
    g.add_argument(
        "--samples",
        type=int,
        default=1,
        help="completions a prompt, each a row with its completion_index (default 1)",
    )
    g.add_argument("--stop", nargs="+", help="strings that end a completion and are cut off")
    g.add_argument("--batch_size", type=int, help=BATCH_SIZE_HELP)
    g.add_argument(
        "--precision",
        choices=["fp32", "bf16", "fp16"],
        default="fp32",
        help="of weights and products (default fp32)",
    )
    g.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    g.add_argument("--device", help="cpu, cuda, ... (default: cuda if there is one)")
    look.add_commands(commands)
    return parser.parse_args(argv)


def main(argv=None):
    """Run a command, and turn every error a user can mend into one sentence and a failing exit."""
    storage.escape_unencodable_output()
    try:
        (args := parse_args(argv)).run(args)
    except (UserError, OSError) as e:
        sys.exit(f"error: {e}")
    except RuntimeError as e:
        sys.exit(storage.peer_failure_message(e))
    except KeyboardInterrupt:
        sys.exit("interrupted: what is finished is kept; start the same command again to go on")


if __name__ == "__main__":
    main()
