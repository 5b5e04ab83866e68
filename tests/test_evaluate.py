"""Decoding against Hugging Face's generate, scores against published numbers.   python -m pytest tests/test_evaluate.py"""

import contextlib
import json
import math
import random
import re
import subprocess
import sys
import time

import pytest
import torch

import evaluate
import tasks
import evaluate as completions
import storage as files
from extras import report as look
from conftest import KINDS, ROOT, run, tiny_model, tiny_tokenizer
from storage import UserError

PUBLISHED = {
    "multiarith": 78.79,
    "coin_flip": 90.04,
    "date_understanding": 67.58,
    "strategy_qa": 53.45,
    "svamp": 64.20,
}
PROMPTS = [
    "a",
    "count to ten ###",
    "Q: What is 3 + 4?\n\nA:",
    "x" * 60,
    "How many?",
    "b c d e f g",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13",
]


def one_by_one(model, tokenizer, family, max_new_tokens):
    """The oracle: Hugging Face's generate, one prompt at a time, so nothing is padded."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([tasks.encode_prompt(tokenizer, family, prompt)])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=0,
            pad_token_id=1,
        )[0]
        texts.append(
            tokenizer.decode(
                out[ids.shape[1] if family == "decoder" else 1 :], skip_special_tokens=True
            )
        )
    return texts


@pytest.mark.parametrize("kind", [*KINDS[:3], pytest.param(KINDS[3], marks=pytest.mark.slow)])
def test_greedy_text_equals_hugging_face_one_by_one_for_any_batch_size(kind, model_folder):
    model, tokenizer, family = evaluate.load_model(str(model_folder(kind)))
    expected = one_by_one(model, tokenizer, family, 40)
    for batch_size in (1, 3, 7):
        done = evaluate.generate(model, tokenizer, family, PROMPTS, 40, batch_size=batch_size)
        assert [row[0]["completion"] for row in done] == expected


def test_rows_leave_the_batch_of_a_hybrid_attention_model_too():
    import transformers

    torch.manual_seed(0)
    config = transformers.Lfm2Config(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
        block_auto_adjust_ff_dim=False,
        eos_token_id=0,
        pad_token_id=1,
    )
    model = transformers.Lfm2ForCausalLM(config)
    tokenizer = tiny_tokenizer()
    limits = [5, 20, 9, 14, 3, 8, 12]
    rows = evaluate.generate(model, tokenizer, "decoder", PROMPTS, limits)
    assert rows == [
        evaluate.generate(model, tokenizer, "decoder", [prompt], limit)[0]
        for prompt, limit in zip(PROMPTS, limits)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_each_row_stops_at_its_own_limit_whatever_its_neighbours_do(kind, model_folder):
    model, tokenizer, family = evaluate.load_model(str(model_folder(kind)))
    limits = [3, 30, 7, 1, 30, 12, 5]
    rows = evaluate.generate(model, tokenizer, family, PROMPTS, limits)
    assert rows == [
        evaluate.generate(model, tokenizer, family, [prompt], limit)[0]
        for prompt, limit in zip(PROMPTS, limits)
    ]
    assert [
        len(tokenizer(row[0]["completion"], add_special_tokens=False)["input_ids"]) for row in rows
    ][3] <= 3  # one byte, or its replacement sign


@pytest.mark.parametrize("kind", [*KINDS[:3], "bart"])
def test_waiting_prompts_take_the_places_of_ended_ones_and_no_text_changes(
    kind, model_folder, monkeypatch
):
    import transformers
    from extras import cpu_decoding as decoding

    if (
        kind == "bart"
    ):  # its decoder counts positions from the first column, so its rows must wait until all have ended
        torch.manual_seed(0)
        sizes = {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
        }
        config = transformers.BartConfig(
            vocab_size=259,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            init_std=0.3,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=0,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            **sizes,
        )
        model = transformers.BartForConditionalGeneration(config).eval()
        tokenizer = tiny_tokenizer()
        family = "encoder_decoder"
    else:
        model, tokenizer, family = evaluate.load_model(str(model_folder(kind)))
    prompts = PROMPTS * 3
    limits = [3, 90, 7, 1, 30, 12, 5, 60, 2, 9, 80, 4, 33, 21, 6, 2, 70, 10, 8, 40, 3]
    alone = [
        evaluate.generate(model, tokenizer, family, [prompt], limit)[0]
        for prompt, limit in zip(prompts, limits)
    ]
    entered = []
    enter = decoding.enter
    monkeypatch.setattr(
        decoding,
        "enter",
        lambda state, *more: entered.append(state is not None) or enter(state, *more),
    )
    assert evaluate.generate(model, tokenizer, family, prompts, limits, batch_size=4) == alone
    assert any(entered) == (kind != "bart")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_attention_goes_over_no_more_pages_than_the_tokens_of_each_row_fill(
    kind, model_folder, monkeypatch
):
    from extras import cpu_decoding as decoding

    model, tokenizer, family = evaluate.load_model(str(model_folder(kind)))
    limits = [3, 40, 7, 1, 30, 12, 5] * 3
    seen = []
    attend = decoding.PagedLayer.attend
    another = decoding.Pages.another

    def count(pages):
        page = another(pages)
        pages.most = max(getattr(pages, "most", 0), pages.count - len(pages.free))
        return page

    monkeypatch.setattr(decoding.Pages, "another", count)

    def check(layer, *more):
        pages = layer.pages
        assert [len(row) for row in pages.rows] == [
            -(-length // decoding.PAGE) for length in pages.lengths
        ]
        assert sorted(sum(pages.rows, [])) == [*range(pages.count)]  # each page is some row's
        assert all(
            pages.owner[page] == place for place, row in enumerate(pages.rows) for page in row
        )
        assert (pages.mask == 0).sum() == sum(pages.lengths)
        seen.append((pages.lengths[0], pages.count))
        assert (
            layer.written == pages.most
        )  # as many as were ever in use at once: those of ended rows are used again
        return attend(layer, *more)

    monkeypatch.setattr(decoding.PagedLayer, "attend", check)
    evaluate.generate(model, tokenizer, family, [*PROMPTS, *["y" * 200] * 14], limits, batch_size=6)
    assert len(seen) > 100
    assert any(length >= 200 for length, _ in seen)
    assert min(count for _, count in seen) < max(count for _, count in seen) / 4
    assert model.config._attn_implementation == "sdpa"


def test_attention_over_pages_is_attention_over_the_tokens_of_a_row():
    """Rows of all lengths, more queries than keys, a bias, values far apart; rows enter, grow and leave."""
    from extras import cpu_decoding as decoding

    torch.manual_seed(0)
    lengths = [1, 16, 17, 50]
    heads = 2
    width = 8
    keys, values = [
        [torch.randn(heads, length, width) * scale for length in lengths] for scale in (9, 1)
    ]
    pages = decoding.Pages(growing=True)
    layer = decoding.PagedLayer(pages, keys[0][None])

    def enter(rows):
        for row in rows:
            read = decoding.DynamicLayer()
            read.keys = keys[row][None]
            read.values = values[row][None]
            new = pages.enter([keys[row].shape[1]])
            layer.reserve()
            layer.enter(read, [(0, 0, keys[row].shape[1])], new)

    enter(range(3))
    there = [0, 1, 2]
    for step in range(40):
        if step == 8:
            pages.keep([1])
            there = [1]
        if step == 9:
            enter([3])
            there = [1, 3]
        layer.settle(pages.advance())
        new = torch.randn(2, len(there), heads, 1, width)
        layer.update(*new)
        for row, key, value in zip(there, *new):
            keys[row], values[row] = (
                torch.cat([keys[row], key], 1),
                torch.cat([values[row], value], 1),
            )
        longest = max(keys[row].shape[1] for row in there)
        query = torch.randn(len(there), 6, 1, width)
        bias = torch.randn(1, 6, 1, longest)
        for each in (None, bias):
            out = layer.attend(query, each, 0.5)
            for place, row in enumerate(there):
                own = None if each is None else each[..., -keys[row].shape[1] :]
                exact = torch.nn.functional.scaled_dot_product_attention(
                    query[place : place + 1],
                    *(x[row][None].repeat_interleave(3, 1) for x in (keys, values)),
                    own,
                    scale=0.5,
                )
                assert torch.allclose(out[place], exact[0], rtol=1e-4, atol=1e-5)
        query[-1] = torch.nan  # of a row alone: the prompt that breaks is the one that is named
        assert torch.equal(layer.attend(query, bias, 0.5)[:-1], out[:-1])


def test_a_model_that_changes_keys_after_the_cache_keeps_hugging_face_s_cache(
    model_folder, monkeypatch
):
    """Its attention is not given what the cache holds, so pages could not stand for it."""
    import transformers
    from extras import cpu_decoding as decoding

    model, tokenizer, family = evaluate.load_model(str(model_folder("llama")))
    expected = evaluate.generate(model, tokenizer, family, PROMPTS, 12)
    paged = []
    can_be_paged = decoding.can_be_paged
    update = transformers.cache_utils.DynamicLayer.update
    monkeypatch.setattr(
        transformers.cache_utils.DynamicLayer,
        "update",
        lambda *a, **k: tuple(x.clone() for x in update(*a, **k)),
    )
    monkeypatch.setattr(
        decoding, "can_be_paged", lambda state: paged.append(can_be_paged(state)) or paged[-1]
    )
    assert evaluate.generate(model, tokenizer, family, PROMPTS, 12) == expected
    assert paged
    assert not any(paged)


def test_of_shorter_prompts_more_rows_are_decoded_side_by_side_in_as_many_tokens(
    model_folder, monkeypatch
):
    model, tokenizer, family = evaluate.load_model(str(model_folder("gpt2")))
    held = []
    step = evaluate.decode_step
    monkeypatch.setattr(
        evaluate,
        "decode_step",
        lambda *a: held.append((len(a[2]), int(a[3]["positions"].sum()))) or step(*a),
    )
    evaluate.generate(model, tokenizer, family, ["x" * 150] * 8 + ["y" * 20] * 40, 64, batch_size=4)
    assert held[0][0] == 4
    assert max(rows for rows, _ in held) == 8
    assert max(tokens for _, tokens in held) <= 4 * (150 + 64)


def test_on_a_cpu_the_cache_takes_bounded_memory_unless_a_batch_size_is_named(model_folder):
    from extras import cpu_decoding as decoding

    model, tokenizer, family = evaluate.load_model(str(model_folder("gpt2")))
    rows = [{"ids": [5] * n, "limit": 100, "room": 64} for n in (50, 40, 30)]
    with decoding.paged_attention(model), torch.inference_mode():
        _, state = evaluate.prefill(model, family, [[5, 6]], 1)
        a_token = 2 * model.config.n_layer * model.config.n_embd * 4  # keys and values in fp32
        assert decoding.bytes_a_token(state) == a_token
        budgets = [
            evaluate.token_budget(model, family, rows, size, evaluate.CPU_ROWS, memory)
            for size, memory in ((None, 10**9), (None, 200 * a_token), (None, 1), (2, 1))
        ]
    assert budgets == [50 + 40 + 30 + 3 * 64, 200, 50 + 64, 50 + 40 + 2 * 64]


def test_pages_of_a_weight_file_are_forgotten_only_while_nothing_is_written_there(model_folder):
    from extras import cpu_training as kernels

    if not kernels.glibc():
        pytest.skip("no glibc: nothing is forgotten here")
    model, *_ = evaluate.load_model(str(model_folder("gpt2")))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    start, end = next(
        (start, end)
        for start, end in kernels.mapped_files()
        if start <= model.lm_head.weight.data_ptr() < end
    )
    assert kernels.forget(model.parameters(), [(start, end)])
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert not kernels.forget([torch.ones(5000)], kernels.mapped_files())
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 1
    assert (start, end) not in kernels.mapped_files()


def test_a_rank_without_a_gpu_of_its_own_is_told_so(monkeypatch):
    for name, value in (("is_available", True), ("device_count", 2)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    for device in (None, "cuda"):
        with pytest.raises(
            UserError,
            match="rank 2 has no GPU of its own, there are 2: start as many ranks with torchrun, or add --device cpu",
        ):
            evaluate.select_device(device)
    assert evaluate.select_device("cpu") == torch.device("cpu")


with_8_bits = pytest.mark.skipif(
    not torch.cpu.get_capabilities().get("avx512_vnni"), reason="this CPU has no products in 8 bits"
)


@with_8_bits
def test_the_likeliest_word_is_exact_where_8_bits_cannot_tell_words_apart():
    from extras.cpu_decoding import Likeliest

    torch.manual_seed(0)
    for words, width, rows in ((2, 1, 3), (1000, 64, 8), (3001, 200, 5), (1057, 33, 1)):
        for common, outlier in ((0, 1), (30, 1), (0, 100)):
            head = torch.nn.Linear(width, words, bias=False)
            hidden = torch.randn(rows, width) * 5
            hidden[:, 0] *= outlier
            with torch.no_grad():
                head.weight.normal_().mul_(torch.rand(words, 1) + 0.1).add_(
                    common * torch.randn(width)
                )
                head.weight[words // 2 :] = head.weight[: words - words // 2] * (
                    1 + 1e-4 * torch.randn(words - words // 2, 1)
                )  # near twins
                best, word = Likeliest(head)(hidden)
            logits = hidden.double() @ head.weight.double().t()
            rounding = width * 2**-23 * hidden.norm(dim=1) * head.weight.norm(dim=1).amax()
            chosen = logits.gather(1, word[:, None])[:, 0]
            assert (logits.amax(1) - chosen <= rounding).all()
            assert ((best - chosen).abs() <= rounding).all()


@with_8_bits
def test_of_equal_words_the_first_is_the_likeliest_and_a_number_that_is_none_is_noticed():
    from extras.cpu_decoding import Likeliest

    head = torch.nn.Linear(8, 100, bias=False)
    hidden = torch.ones(3, 8)
    with torch.no_grad():
        head.weight.fill_(0.5)  # all words are in doubt
        assert [x.tolist() for x in Likeliest(head)(hidden)] == [[4.0] * 3, [0] * 3]
        head.weight[40:60] = 1.0
        hidden[1, 2] = torch.nan
        best, word = Likeliest(head)(hidden)
        assert best.isfinite().tolist() == [True, False, True]
        assert word[0] == word[2] == 40
        assert word[1] < 100
        head.weight[7, 1] = torch.inf
        assert not Likeliest(head)(hidden)[0].isfinite().any()


@with_8_bits
def test_a_head_is_left_alone_where_its_logits_are_changed_afterwards_or_drawn_from(
    model_folder, monkeypatch
):
    import transformers
    from extras import cpu_decoding as decoding

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    model, tokenizer, family = evaluate.load_model(str(model_folder("gpt2")))
    torch.manual_seed(0)
    capped = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            final_logit_softcapping=5.0,
        )
    ).eval()
    for one, replaced in ((model, True), (capped, False)):
        with decoding.likeliest_word(one) as likeliest:
            assert (
                (likeliest is not None)
                == ("forward" in vars(one.get_output_embeddings()))
                == replaced
            )
        assert "forward" not in vars(one.get_output_embeddings())
    monkeypatch.setattr(decoding, "likeliest_word", lambda model: 1 / 0)
    evaluate.generate(model, tokenizer, family, PROMPTS[:2], 3, temperature=1.0)


@with_8_bits
@pytest.mark.parametrize("kind", KINDS[:3])
def test_texts_are_the_same_with_the_whole_head_in_fp32(kind, model_folder, monkeypatch):
    from extras import cpu_decoding as decoding

    model, tokenizer, family = evaluate.load_model(str(model_folder(kind)))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True})
    rough = evaluate.generate(model, tokenizer, family, PROMPTS, 40)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    monkeypatch.setattr(decoding, "Likeliest", lambda head: 1 / 0)
    assert evaluate.generate(model, tokenizer, family, PROMPTS, 40) == rough


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_weights_are_the_same_bits_after_decoding_even_where_it_fails(
    kind, model_folder, monkeypatch
):
    model, tokenizer, family = evaluate.load_model(str(model_folder(kind)))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    parameters = list(map(id, model.parameters()))
    evaluate.generate(model, tokenizer, family, PROMPTS, 3)
    monkeypatch.setattr(evaluate, "decode_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate.generate(model, tokenizer, family, PROMPTS, 3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(map(id, model.parameters())) == parameters
    with torch.no_grad():
        assert next(iter(model.parameters())).requires_grad
        assert not torch.is_inference(model.get_output_embeddings().weight)


def test_gelu_in_one_operation_is_the_function_of_the_config(model_folder):
    import transformers

    folder = str(model_folder("gpt2"))
    model = evaluate.load_model(folder)[0].eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.arange(3, 60)[None]
    assert type(model.transformer.h[0].mlp.act) is not type(theirs.transformer.h[0].mlp.act)
    assert model.config.activation_function == "gelu_new"
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


def test_eos_ends_a_completion_with_reason_stop():
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    first = model(torch.tensor([[40, 41]])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = first  # so that the first token already ends it
    prompt = tokenizer.decode([40, 41])
    assert evaluate.generate(model, tokenizer, "decoder", [prompt], 10)[0][0] == {
        "completion": tokenizer.decode([first]),
        "finish_reason": "stop",
    }


def test_a_stop_string_ends_a_completion_and_is_cut_off():
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    text = evaluate.generate(model, tokenizer, "decoder", PROMPTS[:1], 20)[0][0]["completion"]
    stop = text[4:6]
    row = evaluate.generate(model, tokenizer, "decoder", PROMPTS[:1], 20, stop=[stop])[0][0]
    assert row == {"completion": text[: text.find(stop)], "finish_reason": "stop"}


def test_a_model_that_never_stops_is_cut_at_the_models_positions():
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id = 2
    row = evaluate.generate(model, tokenizer, "decoder", ["x" * 250], 1000)[0][0]
    assert row["finish_reason"] == "length"
    assert len(row["completion"]) <= 6


@pytest.mark.parametrize("prompt", ["", "x" * 256])
def test_a_prompt_that_is_empty_or_too_long_is_named(prompt):
    with pytest.raises(UserError, match="prompt 1 has"):
        evaluate.generate(tiny_model("gpt2"), tiny_tokenizer(), "decoder", ["fine", prompt], 5)


def test_a_prompt_that_is_too_long_may_go_unanswered_and_the_others_do_not_suffer(capsys):
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    rows = evaluate.generate(model, tokenizer, "decoder", ["a", "x" * 256, "b"], 5, too_long="skip")
    assert rows[1] == [{"completion": "", "finish_reason": "length"}]
    assert "1 of 3 prompts get fewer new tokens than asked, 1 none" in capsys.readouterr().out
    assert [rows[0], rows[2]] == evaluate.generate(model, tokenizer, "decoder", ["a", "b"], 5)


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (("--batch_size", "0"), "--batch_size"),
        (("--temperature", "nan"), "--temperature"),
        (("--stop", ""), "--stop"),
        (("--device", "foo"), "--device foo cannot be used here"),
    ],
)
def test_generate_refuses_flags_that_make_no_sense(flags, sentence, tmp_path, model_folder):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}')
    with pytest.raises(SystemExit, match=f"error: .*{sentence}"):
        evaluate.main(
            [
                "generate",
                "--model",
                str(model_folder("gpt2")),
                "--prompts",
                str(tmp_path / "p.jsonl"),
                "--out",
                str(tmp_path / "o.jsonl"),
                *flags,
            ]
        )
    assert not (tmp_path / "o.jsonl").exists()


def test_the_paper_s_value_stands_only_beside_the_paper_s_own_cells():
    results = look.read_paper_results()
    cell = {
        "model": "gpt2",
        "method": "ft_cot",
        "task": "multiarith",
        "split": "default",
        "train_key": "ft_cot",
    }
    assert look.paper_value(results, cell) is not None
    assert look.paper_value(results, {**cell, "train_key": "ft_cot_8aug"}) != look.paper_value(
        results, cell
    )
    for change in (
        {"train_key": "ft_cot_few_shot_8", "split": "few_shot_8"},
        {"split": "template"},
        {"train_key": "mine"},
        {"model": "gpt3"},
    ):
        assert look.paper_value(results, {**cell, **change}) is None


def test_samples_of_a_row_depend_on_its_seed_alone():
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    rows = evaluate.generate(
        model, tokenizer, "decoder", PROMPTS, 12, temperature=0.7, n=4, batch_size=5, seed=1
    )
    assert rows == evaluate.generate(
        model, tokenizer, "decoder", PROMPTS, 12, temperature=0.7, n=4, batch_size=28, seed=1
    )
    assert rows[2:4] == evaluate.generate(
        model, tokenizer, "decoder", PROMPTS[2:4], 12, temperature=0.7, n=4, seed=1
    )
    assert rows != evaluate.generate(
        model, tokenizer, "decoder", PROMPTS, 12, temperature=0.7, n=4, seed=2
    )
    assert len({row["completion"] for row in rows[2]}) > 1


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_sampled_tokens_follow_the_softmax_of_the_model(top_p):
    model = tiny_model("gpt2")
    draws = 100_000
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        logits = model(torch.tensor([[40, 41, 42]])).logits[0, -1]
    tokens = torch.cat(
        [
            evaluate.sample_tokens(logits.expand(2000, -1), 0.7, [generator] * 2000, top_p)
            for _ in range(draws // 2000)
        ]
    )
    chances = torch.softmax(logits.double() / 0.7, -1)
    order = chances.argsort(descending=True).tolist()
    reached = next(
        i for i in range(1, len(order) + 1) if chances[order[:i]].sum() >= top_p - 1e-9
    )  # the fewest tokens that reach top_p
    expected = chances[order[:reached]] / chances[order[:reached]].sum() * draws
    seen = torch.bincount(tokens, minlength=len(order))[order].double()
    assert seen[:reached].sum() == draws
    common = (
        expected >= 10
    )  # the rest counts as one outcome, if it is likely enough to be counted at all
    seen, expected = [
        torch.cat([x[:reached][common], x[:reached][~common].sum()[None]]) for x in (seen, expected)
    ]
    degrees = len(expected) - 1 - int(expected[-1] < 10)
    assert (
        (seen - expected)[: degrees + 1] ** 2 / expected[: degrees + 1]
    ).sum() < degrees + 3.1 * math.sqrt(2 * degrees) + 5  # p about 0.001


def test_a_prompt_is_read_once_however_many_samples_are_drawn(monkeypatch):
    read = []
    prefill = evaluate.prefill
    monkeypatch.setattr(
        evaluate,
        "prefill",
        lambda model, family, prompts, pad_id: (
            read.extend(prompts) or prefill(model, family, prompts, pad_id)
        ),
    )
    evaluate.generate(
        tiny_model("gpt2"),
        tiny_tokenizer(),
        "decoder",
        PROMPTS,
        3,
        temperature=1.0,
        n=8,
        batch_size=100,
    )
    assert len(read) == len(PROMPTS)


def test_logits_that_are_no_numbers_stop_the_run_and_name_the_prompt():
    model = tiny_model("llama")
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("!")["input_ids"][0]] = float("nan")
    with pytest.raises(UserError, match="prompt 2: the model's logits are not numbers"):
        evaluate.generate(model, tokenizer, "decoder", ["fine", "good", "bad!", "well"], 5)


def test_a_few_shot_prompt_is_cut_on_the_left_and_keeps_its_question():
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    cut = evaluate.generate(
        model, tokenizer, "decoder", ["y" * 300 + "Q: how many?"], 6, too_long="cut"
    )
    assert cut == evaluate.generate(model, tokenizer, "decoder", ["y" * 238 + "Q: how many?"], 6)


def test_a_run_that_dies_goes_on_and_decodes_nothing_twice(tmp_path, monkeypatch):
    model = tiny_model("gpt2")
    tokenizer = tiny_tokenizer()
    limits = [5, 20, 9, 14, 3, 8, 12]

    def decode():
        return evaluate.generate(
            model,
            tokenizer,
            "decoder",
            PROMPTS,
            limits,
            0.7,
            2,
            batch_size=4,
            journal=tmp_path / "out",
        )

    expected = decode()
    decoded = []
    whole = evaluate.decode
    files.remove_journals(tmp_path / "out")

    def dying(model, tokenizer, family, rows, *settings):
        for i, ended in enumerate(whole(model, tokenizer, family, rows, *settings)):
            if i == 3:
                raise KeyboardInterrupt
            decoded.append(ended[0]["key"])
            yield ended

    monkeypatch.setattr(evaluate, "decode", dying)
    for _ in range(14):
        with contextlib.suppress(KeyboardInterrupt):
            assert decode() == expected
            break
    else:
        pytest.fail("it never ended")
    assert len(decoded) == len(set(decoded)) == 14
    with torch.no_grad():
        model.lm_head.weight += 0.1  # another model: what is there is not its own
    with contextlib.suppress(KeyboardInterrupt):
        decode()
    assert len(decoded) > 14
    files.remove_journals(tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_9_at_random_moments_leaves_the_file_of_an_uninterrupted_run(tmp_path, model_folder):
    prompts = [
        {"prompt": f"{'count on ' * (i % 7)}{i}", "max_new_tokens": 60 + i % 90} for i in range(400)
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))

    def command(out):
        return [
            sys.executable,
            ROOT / "evaluate.py",
            "generate",
            "--model",
            model_folder("gpt2"),
            "--prompts",
            tmp_path / "p.jsonl",
            "--out",
            out,
            "--batch_size",
            "16",
            "--temperature",
            "0.7",
        ]

    assert subprocess.run(command(tmp_path / "whole")).returncode == 0
    journal = tmp_path / "out.journal-0"
    kept = []
    chance = random.Random(0)
    for _ in range(10):
        process = subprocess.Popen(command(tmp_path / "out"))
        before = len(kept)
        while process.poll() is None and (
            not journal.exists()
            or journal.read_bytes().count(b"\n") < before + chance.randrange(1, 30)
        ):
            time.sleep(0.01)
        process.kill()
        process.wait()
        lines = journal.read_bytes().split(b"\n")[:-1]
        # what was there is not decoded again
        assert lines[:before] == kept
        assert len(set(lines)) == len(lines) < 400
        kept = lines
    assert subprocess.run(command(tmp_path / "out")).returncode == 0
    assert (tmp_path / "out").read_bytes() == (tmp_path / "whole").read_bytes()
    assert not journal.exists()


def test_two_ranks_give_the_file_of_one(tmp_path, model_folder):
    rows = [{"prompt": p, "max_new_tokens": 3 + 2 * i} for i, p in enumerate(PROMPTS)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [
        "--model",
        str(model_folder("gpt2")),
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--temperature",
        "0.7",
        "--top_p",
        "0.9",
        "--samples",
        "3",
    ]
    done = run(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "evaluate.py",
        "generate",
        *flags,
        "--out",
        tmp_path / "two",
    )
    assert done.returncode == 0, done.stderr
    evaluate.main(["generate", *flags, "--out", str(tmp_path / "one"), "--batch_size", "4"])
    assert (tmp_path / "two").read_text() == (tmp_path / "one").read_text()
    assert [row["completion_index"] for row in files.read_jsonl(tmp_path / "one")] == [
        0,
        1,
        2,
    ] * len(PROMPTS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "p.jsonl", "two"]


def test_generate_writes_the_rows_it_read_in_order_with_completion_and_reason(
    tmp_path, model_folder
):
    rows = [{"prompt": p, "id": i, "max_new_tokens": i + 1} for i, p in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    evaluate.main(
        [
            "generate",
            "--model",
            str(model_folder("gpt2")),
            "--prompts",
            str(tmp_path / "prompts.jsonl"),
            "--out",
            str(tmp_path / "out.jsonl"),
        ]
    )
    out = files.read_jsonl(tmp_path / "out.jsonl")
    assert [{k: r[k] for k in ("prompt", "id", "max_new_tokens")} for r in out] == rows
    assert all(
        r["finish_reason"] in ("stop", "length") and isinstance(r["completion"], str) for r in out
    )


@pytest.mark.parametrize(
    "row",
    [
        '{"text": "a"}',
        '["a"]',
        '{"prompt": "a", "max_new_tokens": 0}',
        '{"prompt": "a", "max_new_tokens": "5"}',
    ],
)
def test_a_prompt_file_of_the_wrong_form_is_named_with_its_row(tmp_path, row):
    (tmp_path / "p.jsonl").write_text('{"prompt": "fine"}\n' + row)
    with pytest.raises(UserError, match="p.jsonl, row 2"):
        completions.read_prompts(tmp_path / "p.jsonl", 5)


def test_a_folder_that_is_not_a_model_or_has_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a model folder: it has no config.json"):
        evaluate.load_model(str(tmp_path))
    tiny_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer"):
        evaluate.load_model(str(tmp_path))
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="could not be loaded"):
        evaluate.load_model(str(tmp_path))
    with pytest.raises(
        UserError, match="neither a folder here nor a model that could be downloaded"
    ):
        evaluate.load_model("no-such-model")


# ---------------------------------------------------------------- completion datasets and scores


def completion_file(path, n=2000, correct=lambda i: True, **metadata):
    """A completion file on the toy task, where correct(i) says which are right."""
    samples = tasks.toy_samples(n)
    data = {
        str(s["sample_index"]): [
            {
                **{k: s[k] for k in ("sample_index", "question", "answer")},
                "completion_index": 0,
                "finish_reason": "stop",
                "completion": s["answer"] if correct(s["sample_index"]) else "?",
            }
        ]
        for s in reversed(samples)
    }
    files.write_json(
        path,
        {
            "metadata": {
                "dataset_key": "toy",
                "base_model": "m",
                "completion_key": "zs",
                "prediction_template": "zs",
                **metadata,
            },
            "data": data,
        },
    )
    return path


@pytest.mark.parametrize("task, accuracy", PUBLISHED.items())
def test_published_completions_score_as_published(shared, task, accuracy):
    path = shared / "saved/completion_data/B_text-davinci-002__C_zs_cot" / f"D_{task}.json"
    assert evaluate.score(path, part="all")["accuracy"] == accuracy


def test_a_score_counts_what_it_says(tmp_path):
    path = completion_file(tmp_path / "f.json", correct=lambda i: i % 4)
    s = evaluate.score(path, part="all")
    assert (
        s["n"],
        s["correct"],
        s["accuracy"],
        s["no_answer"],
        s["complete"],
        s["correct_format"],
    ) == (2000, 1500, 75.0, 500, 100.0, 100.0)
    train, test = tasks.load_split("toy")
    assert evaluate.score(path)["n"] == len(test)
    assert evaluate.score(path, part="train")["correct"] == sum(bool(i % 4) for i in train)


def test_wilson_interval_solves_its_defining_equation():
    for correct, n in [(0, 10), (3, 10), (10, 10), (159, 300), (1, 1)]:
        low, high = evaluate.wilson(correct, n)
        for p in (
            low / 100,
            high / 100,
        ):  # |observed - p| = z * sqrt(p (1 - p) / n), or the end of the scale
            assert p in (0.0, 1.0) or abs(correct / n - p) == pytest.approx(
                1.959964 * math.sqrt(p * (1 - p) / n), rel=1e-6, abs=1e-7
            )
    assert evaluate.wilson(5, 10) == pytest.approx((23.66, 76.34), abs=0.01)
    assert evaluate.wilson(0, 10) == pytest.approx((0.0, 27.75), abs=0.01)


def test_a_file_that_lacks_samples_is_no_result_unless_asked(tmp_path):
    path = completion_file(tmp_path / "f.json", n=1500)
    missing = sum(i >= 1500 for i in tasks.load_split("toy")[1])
    with pytest.raises(
        UserError, match=rf"lacks {missing} of the 600 samples of part 'test'.*--allow_partial"
    ):
        evaluate.score(path)
    assert evaluate.score(path, allow_partial=True)["n"] == 600 - missing


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d["data"]["5"][0].update(answer="maybe"), "sample 5 is not sample 5 of toy"),
        (lambda d: d["data"]["5"][0].update(question="Who?"), "sample 5 is not sample 5 of toy"),
        (
            lambda d: d["data"].update({"9999": [{**d["data"]["5"][0], "sample_index": 9999}]}),
            "sample 9999 is not",
        ),
        (
            lambda d: d["data"]["5"].append(d["data"]["5"][0]),
            "completion 0 of sample 5 is there twice",
        ),
        (lambda d: d["data"]["5"][0].pop("answer"), "a completion of sample 5 lacks"),
        (lambda d: d["data"].update({"5": "x"}), "a completion of sample 5 lacks"),
        (
            lambda d: d["data"].update({"5": [{**d["data"]["5"][0], "sample_index": 6}]}),
            "a completion of sample 5 lacks",
        ),
        (lambda d: d["metadata"].pop("dataset_key"), "is not a completion file"),
        (lambda d: d["metadata"].update(dataset_key="coin"), "no task 'coin'"),
        (lambda d: d.update(data=[]), "is not a completion file"),
        (
            lambda d: d["metadata"].update(prediction_template=["zs"]),
            "prediction_template in its metadata is",
        ),
        (lambda d: d["metadata"].update(epoch="3"), "epoch in its metadata is"),
        (lambda d: d["metadata"].update(dataset_key=["toy"]), "dataset_key in its metadata is"),
    ],
)
def test_completions_that_do_not_belong_are_found_and_named(tmp_path, change, message):
    path = completion_file(tmp_path / "f.json")
    content = files.read_json(path)
    change(content)
    files.write_json(path, content)
    with pytest.raises(UserError, match=message):
        evaluate.score(path)


def test_a_sample_that_two_halves_of_a_file_hold_is_not_dropped_silently(tmp_path):
    path = completion_file(tmp_path / "f.json", n=9)
    text = path.read_text()
    path.write_text(text.replace('"data": {', '"data": {"5": [],', 1))
    with pytest.raises(
        UserError, match="f.json is not valid JSON .the key '5' is there twice in an object"
    ):
        evaluate.score(path)


def test_score_prints_a_line_or_an_object_for_each_file(tmp_path):
    paths = [completion_file(tmp_path / f"{i}.json") for i in (1, 2)]
    done = run("evaluate.py", "score", *paths, "--json")
    assert [json.loads(line)["accuracy"] for line in done.stdout.splitlines()] == [100.0, 100.0]
    done = run("evaluate.py", "score", *paths, "--rules", "flexible")
    assert done.stdout.count("100.00  [99.36, 100.00]") == 2
    done = run("evaluate.py", "score", tmp_path / "none.json")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_table_shows_the_papers_teacher_values_beside_ours(shared):
    done = run("evaluate.py", "table", "--saved", shared / "saved")
    ours, paper = (
        next(
            re.split(r"\s{2,}", line)
            for line in done.stdout.splitlines()
            if re.match(pattern, line)
        )
        for pattern in ("text-davinci-002", "  +paper")
    )
    assert ours[1] == "zs_cot, all questions"
    assert (
        ours[2:]
        == paper[2:]
        == [f"{PUBLISHED[task]:.2f}" for task in tasks.TASKS if task in PUBLISHED]
    )


def test_the_table_tells_the_last_epoch_from_the_best_on_test(tmp_path):
    for epoch, share in [(1, 2), (2, 4), (3, 3)]:
        completion_file(
            tmp_path / "completion_data" / "B_m__C_ft" / f"D_toy__T_ft__E_{epoch:03d}.json",
            correct=lambda i: i % share,
            completion_key="ft",
            train_key="ft",
            epoch=epoch,
        )
    table, skipped = look.collect(look.saved_files(tmp_path), tmp_path)
    assert not skipped
    assert table["m", "ft, last epoch"]["toy"]["epoch"] == 3
    assert table["m", "ft, best test epoch (the paper's protocol)"]["toy"]["epoch"] == 2


def test_show_and_diff_print_what_there_is_to_look_at(tmp_path, capsys):
    a, b = [completion_file(tmp_path / f"{k}.json", n=12, correct=lambda i: i % k) for k in (2, 3)]
    evaluate.main(["show", str(a), "--limit", "2"])
    text = capsys.readouterr().out
    assert "6 of 12 are right; the first 2:" in text
    assert "6 of 12 are unreadable" in text
    assert "0 of 12 are wrong" in text
    sample = tasks.toy_samples(2)[1]
    assert f"right (sample 1, completion 0)\n  question:   {sample['question']}" in text
    assert "paper:      None is wrong, of []" in text
    evaluate.main(["diff", str(a), str(b)])
    text = capsys.readouterr().out
    assert f"right in {b} (sample 2," in text
    assert f"wrong in {b} (sample 3," in text
    assert "sample 1," not in text
    assert "sample 6," not in text
    assert (
        "12 completions in both files: 4 right in both, 2 in the first alone, 4 in the second alone, 2 in neither"
        in text
    )


def test_the_table_has_a_row_for_the_epoch_chosen_on_the_validation_share(tmp_path):
    train, test = tasks.load_split("toy")
    rest, aside = tasks.split_off_validation(train, 0.1, 0)
    assert sorted(rest + aside) == train
    assert len(aside) == 140
    assert aside != tasks.split_off_validation(train, 0.1, 1)[1]
    assert aside == tasks.split_off_validation(train, 0.1, 0)[1]
    for epoch, on_test, on_validation in [(1, 2, 10), (2, 5, 4), (3, 3, 3)]:
        completion_file(
            tmp_path / "completion_data" / "B_m__C_ft" / f"D_toy__T_ft__E_{epoch:03d}.json",
            train_key="ft",
            epoch=epoch,
            validation=aside,
            correct=lambda i: i % (on_validation if i in aside else on_test),
        )
    table, skipped = look.collect(look.saved_files(tmp_path), tmp_path)
    chosen = {label.partition(",")[2]: row["toy"]["epoch"] for (_, label), row in table.items()}
    assert not skipped
    assert chosen == {
        " last epoch": 3,
        " best test epoch (the paper's protocol)": 2,
        " epoch chosen on validation": 1,
    }
    assert {row["toy"]["n"] for row in table.values()} == {len(test)}


def test_zero_shot_cot_asks_twice_and_keeps_both_answers():
    asked = []

    def complete(prompts, n, temperature, max_new_tokens, stop):
        asked.append(prompts)
        return [
            [
                {"completion": f" r{k}" if len(asked) == 1 else " 7.", "finish_reason": "stop"}
                for k in range(n)
            ]
            for _ in prompts
        ]

    data = evaluate.make_completions(
        complete,
        [{"sample_index": 3, "question": "q", "answer": "7"}],
        "zs_cot",
        "decoder",
        "zs_cot",
        degree=2,
    )
    step_1 = "Q: q\nA: Let's think step by step."
    assert asked == [
        [step_1],
        [f"{step_1} r0\nTherefore, the answer is", f"{step_1} r1\nTherefore, the answer is"],
    ]
    assert [
        (
            r["completion_index"],
            r["reasoning_prompt"],
            r["reasoning_completion"],
            r["prompt"],
            r["completion"],
        )
        for r in data["3"]
    ] == [(0, step_1, " r0", asked[1][0], " 7."), (1, step_1, " r1", asked[1][1], " 7.")]
