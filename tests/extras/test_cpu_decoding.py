"""The fast path of decoding: pages, and rows that enter late.

That its texts are those of the plain loop and of Hugging Face is tested in tests/test_decoding.py.

python -m pytest tests/extras/test_cpu_decoding.py
"""

import pytest
import torch
import transformers
from conftest import KINDS, PROMPTS, tiny_bart, tiny_family, tiny_lfm2, tiny_model, tiny_tokenizer

import decoding
import models
from extras import cpu_decoding
from extras.cpu_pages import PAGE, PagedLayer, PageTable

LIMITS = [3, 90, 7, 1, 30, 12, 5, 60, 2, 9, 80, 4, 33, 21, 6, 2, 70, 10, 8, 40, 3]


@pytest.fixture
def load(model_folder):
    """-> function: kind -> (model, tokenizer, family)."""
    return lambda kind: models.load_model(str(model_folder(kind)))


# ---------------------------------------------------------------- which path


@pytest.mark.parametrize("plain", [True, False])
def test_generate_door(load, monkeypatch, plain):
    """On a CPU the fast path decodes, unless plain is asked for."""
    paths = []
    for module in (cpu_decoding, decoding):
        decode = module.decode
        monkeypatch.setattr(
            module,
            "decode",
            lambda *a, module=module, decode=decode: paths.append(module) or decode(*a),
        )
    decoding.generate(*load("gpt2"), PROMPTS, 3, plain=plain)
    assert paths == [decoding if plain else cpu_decoding]


def is_paged(monkeypatch, model, family: str, prompts: list[str] = PROMPTS) -> bool:
    """Return whether generate decodes with pages; its texts have to be the plain ones."""
    calls = []
    decode_paged = cpu_decoding.decode_paged
    monkeypatch.setattr(
        cpu_decoding, "decode_paged", lambda *a: calls.append(a) or decode_paged(*a)
    )
    arguments = model, tiny_tokenizer(), family, prompts, 12
    assert decoding.generate(*arguments) == decoding.generate(*arguments, plain=True)
    return bool(calls)


@pytest.mark.parametrize("kind", KINDS)
def test_supports_paged_cache(kind, monkeypatch):
    """The models of the paper are decoded with pages."""
    model = tiny_model(kind)
    family = "encoder_decoder" if model.config.is_encoder_decoder else "decoder"
    assert is_paged(monkeypatch, model, family)


def test_supports_paged_cache_other_layers(monkeypatch):
    """A hybrid model, whose layers do not all keep keys and values, keeps Hugging Face's cache."""
    assert not is_paged(monkeypatch, tiny_lfm2(), "decoder")


def test_supports_paged_cache_absolute_positions(monkeypatch):
    """An encoder-decoder that counts positions from the first column keeps it too."""
    assert not is_paged(monkeypatch, tiny_bart(), "encoder_decoder")


def test_supports_paged_cache_changed_values(monkeypatch, capsys):
    """So does DiffLlama, which attends to values other than the cache's, and a line says so."""
    assert not is_paged(monkeypatch, tiny_family("diffllama"), "decoder")
    said = capsys.readouterr().out
    assert "pages give models of type diffllama other logits" in said


def test_supports_paged_cache_changed_keys(monkeypatch):
    """So does a model that changes keys after the cache: pages could not stand for them."""
    update = transformers.cache_utils.DynamicLayer.update
    monkeypatch.setattr(
        transformers.cache_utils.DynamicLayer,
        "update",
        lambda *a, **k: tuple(x.clone() for x in update(*a, **k)),
    )
    assert not is_paged(monkeypatch, tiny_model("llama"), "decoder")


def test_supports_paged_cache_eager(monkeypatch):
    """So does a model whose attention is not torch's."""
    model = tiny_model("gpt2")
    model.set_attn_implementation("eager")
    assert not is_paged(monkeypatch, model, "decoder")
    assert model.config._attn_implementation == "eager"


# ---------------------------------------------------------------- rows that enter late


@pytest.mark.parametrize("kind", KINDS[:3])
def test_decode_rows_enter_late(kind, load, monkeypatch):
    """Waiting rows take the places of ended ones, and no text changes."""
    model, tokenizer, family = load(kind)
    entered_beside = []
    append_rows = cpu_decoding.PagedCache.append_rows

    def spy(cache, read, places):
        entered_beside.append(len(cache.lengths()))
        append_rows(cache, read, places)

    monkeypatch.setattr(cpu_decoding.PagedCache, "append_rows", spy)
    arguments = model, tokenizer, family, PROMPTS * 3, LIMITS
    rows = decoding.generate(*arguments, batch_size=4)
    assert max(entered_beside[4:]) > 0
    assert rows == decoding.generate(*arguments, plain=True)


def test_decode_more_short_rows(load, monkeypatch):
    """Of shorter prompts up to twice as many rows are decoded, in as many tokens."""
    steps = []
    decode_step = cpu_decoding.decode_step

    def spy(model, tokens, cache):
        steps.append((len(tokens), sum(cache.lengths())))
        return decode_step(model, tokens, cache)

    monkeypatch.setattr(cpu_decoding, "decode_step", spy)
    monkeypatch.setattr(cpu_decoding, "paged_logits", lambda model, rehearsal: rehearsal.logits)
    prompts = ["x" * 150] * 8 + ["y" * 20] * 40
    decoding.generate(*load("gpt2"), prompts, 64, batch_size=4)
    assert steps[0][0] == 4
    assert max(rows for rows, _ in steps) == 8
    assert max(tokens for _, tokens in steps) <= 4 * (150 + 64)


@pytest.mark.parametrize(
    "batch_size, bytes_per_token, expected",
    [
        (None, 0, 50 + 40 + 30 + 3 * 64),  # all rows fit
        (None, 6 * 10**8 // 200, 200),  # as many as memory has room for
        (None, 6 * 10**8, 50 + 64),  # the longest at least
        (2, 6 * 10**8, 50 + 40 + 2 * 64),  # as asked for
    ],
)
def test_cache_token_budget(batch_size, bytes_per_token, expected, monkeypatch):
    """By default the cache takes bounded memory; a batch size that is asked for is taken."""
    monkeypatch.setattr(decoding, "cache_bytes_per_token", lambda _: bytes_per_token)
    rows = [decoding.Row(0, "", [5] * n, 100, 0) for n in (50, 40, 30)]
    budget = cpu_decoding.cache_token_budget(tiny_model("gpt2"), {}, rows, batch_size)
    assert budget == expected


def test_split_for_prefill():
    """Chunks have 512 tokens at most, or one prompt, whose samples stay together."""
    lengths = {0: 600, 1: 200, 2: 200, 3: 180, 4: 10}
    indices = [0, 0, 1, 1, 2, 3, 4]
    rows = [decoding.Row(i, "", [5] * lengths[i], 9, 0) for i in indices]
    chunks = cpu_decoding.split_for_prefill(rows)
    assert [[row.index for row in chunk] for chunk in chunks] == [[0, 0], [1, 1, 2], [3, 4]]


# ---------------------------------------------------------------- pages


def check_pages(layer: PagedLayer) -> None:
    """Assert that the page table is that of its rows."""
    pages = layer.pages
    assert [len(row) for row in pages.rows] == [-(-n // PAGE) for n in pages.lengths]
    assert sorted(sum(pages.rows, [])) == list(range(pages.count))  # each page is some row's
    for place, row in enumerate(pages.rows):
        assert set(pages.page_to_row[row].tolist()) == {place}
    assert (pages.mask == 0).sum() == sum(pages.lengths)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_attend_no_more_pages_than_tokens_fill(kind, load, monkeypatch):
    """Attention goes over the pages of rows alone; those of ended rows are used again."""
    model, tokenizer, family = load(kind)
    seen = []
    most = {}  # of each page table the pages that were in use at once
    attend = PagedLayer.attend
    allocate_page = PageTable.allocate_page

    def count(pages):
        page = allocate_page(pages)
        most[id(pages)] = max(most.get(id(pages), 0), pages.count - len(pages.free))
        return page

    def check(layer, *arguments):
        check_pages(layer)
        assert layer.written == most[id(layer.pages)]
        seen.append((layer.pages.lengths[0], layer.pages.count))
        return attend(layer, *arguments)

    monkeypatch.setattr(PageTable, "allocate_page", count)
    monkeypatch.setattr(PagedLayer, "attend", check)
    prompts = [*PROMPTS, *["0 1 2 3 4 5 6 7 8 9 " * 10] * 14]
    limits = [3, 40, 7, 1, 30, 12, 5] * 3
    decoding.generate(model, tokenizer, family, prompts, limits, batch_size=6)
    counts = [count for _, count in seen]
    assert len(seen) > 100
    assert max(length for length, _ in seen) >= 200
    assert min(counts) < max(counts) / 4
    assert model.config._attn_implementation == "sdpa"


class ExactRows:
    """Keys and values of rows as they are, beside the same rows in a paged layer."""

    heads = 2
    width = 8

    def __init__(self, lengths: list[int]) -> None:
        self.keys = [9 * torch.randn(self.heads, length, self.width) for length in lengths]
        self.values = [torch.randn(self.heads, length, self.width) for length in lengths]
        self.pages = PageTable(grows=True)
        self.layer = PagedLayer(self.pages, self.keys[0][None], 0)
        self.active: list[int] = []

    def enter(self, row: int) -> None:
        """Put a row into the layer."""
        read = transformers.cache_utils.DynamicLayer()
        read.keys = self.keys[row][None]
        read.values = self.values[row][None]
        length = read.keys.shape[2]
        self.layer.append_rows(read, [(0, 0, length)], self.pages.append_rows([length]))
        self.active.append(row)

    def leave_all_but(self, row: int) -> None:
        """Let all other rows end."""
        self.pages.retain_rows([self.active.index(row)])
        self.active = [row]

    def append_token(self) -> None:
        """Append a random token to each row."""
        self.layer.apply_page_moves(self.pages.reserve_next_token())
        shape = len(self.active), self.heads, 1, self.width
        keys = torch.randn(shape)
        values = torch.randn(shape)
        self.layer.update(keys, values)
        for row, key, value in zip(self.active, keys, values, strict=True):
            self.keys[row] = torch.cat([self.keys[row], key], 1)
            self.values[row] = torch.cat([self.values[row], value], 1)

    def attend(self, row: int, query: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return torch's attention of a row's query (1, 6, 1, width) to its own tokens."""
        keys = self.keys[row][None].repeat_interleave(3, 1)
        values = self.values[row][None].repeat_interleave(3, 1)
        if bias is not None:
            bias = bias[..., -keys.shape[2] :]
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(query, keys, values, bias, scale=0.5)


def test_attend_is_attention_to_the_tokens_of_a_row():
    """Rows of all lengths, grouped queries, a bias; rows enter, grow and leave."""
    torch.manual_seed(0)
    exact = ExactRows([1, 16, 17, 50])
    for row in range(3):
        exact.enter(row)
    for step in range(40):
        if step == 8:
            exact.leave_all_but(1)
        if step == 9:
            exact.enter(3)
        exact.append_token()
        longest = max(exact.pages.lengths)
        query = torch.randn(len(exact.active), 6, 1, exact.width)
        for bias in (None, torch.randn(1, 6, 1, longest)):
            output = exact.layer.attend(query, bias, 0.5)
            for place, row in enumerate(exact.active):
                expected = exact.attend(row, query[place : place + 1], bias)
                torch.testing.assert_close(output[place], expected[0], rtol=1e-4, atol=1e-5)


def test_attend_nan_stays_with_its_row():
    """A NaN stays with its row, so that the prompt which breaks is the one that is named."""
    exact = ExactRows([1, 16, 17])
    for row in range(3):
        exact.enter(row)
    exact.append_token()
    query = torch.randn(3, 6, 1, exact.width)
    expected = exact.layer.attend(query, None, 0.5)
    query[-1] = torch.nan
    assert torch.equal(exact.layer.attend(query, None, 0.5)[:-1], expected[:-1])
