"""What makes decoding fast and changes no token: a cache in pages, attention over them, the likeliest word without the whole head in fp32,
and weights laid out for a CPU.  evaluate.py's `decode` uses it; it imports torch, so it is imported there.

Shapes: B rows that are decoded side by side, b of them read together, H heads, T tokens of a row, D width of a head.
"""

import collections
import contextlib
import functools
import weakref

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from extras import cpu_training as kernels

# ---------------- The cache: pages of a few tokens

PAGE = 16  # tokens: with fewer there is more to put together, with more the last page of a row is emptier


class Pages:
    """Which pages hold the tokens of which row, in every layer the same ones (Kwon et al. 2023, for GPUs).  So no row is padded, whatever the
    others' lengths, and none moves as it grows; the pages of rows that ended are taken by those that grow, or by the last pages."""

    def __init__(self, growing):
        """growing: whether rows get tokens."""
        # of each row its pages, and its number of tokens
        self.growing = growing
        self.rows = []
        self.lengths = []
        # the number of all pages, those of them that no row has; of lay_out
        self.count = 0
        self.free = []
        self.owner = None

    def enter(self, lengths):
        """Add rows of so many tokens.  -> their pages, end to end"""
        new = [[self.another() for _ in range(0, length, PAGE)] for length in lengths]
        self.rows = self.rows + new
        self.lengths = self.lengths + lengths
        self.owner = None
        return [page for pages in new for page in pages]

    def another(self):
        """-> a page that no row has"""
        self.count += not self.free
        return self.free.pop() if self.free else self.count - 1

    def keep(self, places):
        """Go on with the rows at these places alone, each named once."""
        self.free += [
            page for place in {*range(len(self.rows))} - {*places} for page in self.rows[place]
        ]
        self.rows = [self.rows[place] for place in places]
        self.lengths = [self.lengths[place] for place in places]
        self.owner = None

    def advance(self):
        """Make room for a token in each row, if they grow.  Then the last pages fill the gaps, as all pages are multiplied.
        -> [(from, to)] of those"""
        if self.growing:
            for pages, length in zip(self.rows, self.lengths):
                if length % PAGE == 0:
                    pages.append(self.another())
            self.lengths = [length + 1 for length in self.lengths]
        self.count -= len(self.free)
        gaps = [page for page in self.free if page < self.count]
        self.free = []
        moves = []
        for pages in self.rows if gaps else ():
            for i, page in enumerate(pages):
                if page >= self.count:
                    pages[i] = gaps.pop()
                    moves.append((page, pages[i]))
        if self.growing or self.owner is None:
            self.lay_out()
        return moves

    def lay_out(self):
        """Make what attention has to know.  Of each row: its pages, `table` (B, most), the first once more where others have more; the page of its
        last token and the column there, `last`.  Of all pages: the rows' one after another, `listed`, and where each row's begin, `starts` (B,).  Of
        each page: its row, `owner` (pages,); what is added to its scores, `mask` (pages, 1, 1, PAGE); its tokens' places in a bias, which is over
        those of the longest row, `columns` (pages, PAGE)."""
        numbers = [len(pages) for pages in self.rows]
        lengths = torch.tensor(self.lengths)
        self.table = torch.tensor(
            [pages + pages[:1] * (max(numbers) - len(pages)) for pages in self.rows]
        )
        self.last = torch.tensor([pages[-1] for pages in self.rows]), (lengths - 1) % PAGE
        self.listed = torch.tensor([page for pages in self.rows for page in pages])
        self.starts = torch.tensor([0, *numbers[:-1]]).cumsum(0)
        owner, (self.owner, first) = (
            torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers)),
            torch.empty(2, self.count, dtype=torch.long),
        )
        self.owner[self.listed], first[self.listed] = (
            owner,
            PAGE * (torch.arange(self.count) - self.starts[owner]),
        )
        length = lengths[self.owner, None]
        columns = first[:, None] + torch.arange(PAGE)
        self.mask = torch.where(columns < length, 0.0, -torch.inf)[:, None, None]
        self.columns = (columns + (lengths.max() - length if self.growing else 0)).clamp(
            max=max(self.lengths) - 1
        )
        self.biased = None, None

    def added(self, bias, shape):
        """-> what is added to scores of this shape (pages, H, H' / H, PAGE).  bias: over the longest row's tokens, (1, H', 1, T) or None; that of T5
        is the same in every layer."""
        if bias is None:
            return self.mask
        if self.biased[0] is not bias:
            self.biased = (
                bias,
                self.mask + bias[0, :, 0][:, self.columns].transpose(0, 1).reshape(shape),
            )
        return self.biased[1]


class PagedLayer(DynamicLayer):
    """Keys and values of a layer, in pages: (H, PAGE, D) and (H, D, PAGE), so that both products take the sum along a line, in fp32 (on AMD bf16 takes
    a third longer for as many).  What it gives a model as keys and values stands for them: no numbers, but the right shape and, for `attend`,
    the layer."""

    def __init__(self, pages, like):
        """pages: of all layers; like: keys (b, H, T, D) such as rows that will enter have."""
        super().__init__()
        self.lazy_initialization(like, like)
        self.pages, (_, self.heads, _, self.width) = pages, like.shape
        self.room = torch.empty(2, 0, self.heads, PAGE * self.width, dtype=torch.float32)
        self.written = 0

    def reserve(self, tokens=0):
        """Have room for all pages, and at once for so many tokens: what is never written to takes no memory."""
        had = self.room.shape[1]
        count = self.pages.count
        if had < count:
            old = self.room
            self.room = self.room.new_empty(
                2, -(-5 * max(count, tokens // PAGE) // 4), *self.room.shape[2:]
            )
            self.room[:, : self.written] = old[:, : self.written]
            self.keys_of_page = self.room[0].unflatten(2, (PAGE, self.width))
            self.values_of_page = self.room[1].unflatten(2, (self.width, PAGE))
        if self.written < count:  # what is masked is multiplied too, and has to be a number
            self.room[:, self.written : count] = 0
            self.written = count

    def enter(self, read, rows, pages):
        """Write to these pages what a layer that has `read` holds of these rows: (row, its first token, the one after its last)."""
        for into, some in (
            (self.keys_of_page, read.keys),
            (self.values_of_page.transpose(2, 3), read.values),
        ):
            filled = [
                torch.nn.functional.pad(some[row, :, first:end], (0, 0, 0, (first - end) % PAGE))
                for row, first, end in rows
            ]
            into[pages] = torch.cat(
                [one.unflatten(1, (-1, PAGE)).transpose(0, 1) for one in filled]
            ).float()

    def settle(self, moves):
        """Follow `Pages.advance`."""
        self.reserve()
        if moves:
            origins, goals = torch.tensor(moves).t()
            self.room[:, goals] = self.room[:, origins]
        self.show(max(self.pages.lengths) - self.pages.growing)

    def show(self, tokens):
        """Make what stands for keys and values (B, H, T, D), of so many tokens."""
        shape = len(self.pages.rows), self.heads, tokens, self.width
        self.keys = self.values = torch.full((), torch.nan, dtype=self.dtype).expand(shape)
        self.keys.layer = weakref.proxy(self)  # a circle would be freed late

    def update(self, keys, values, *_, **__):
        """Append the tokens (B, H, 1, D) that `Pages.advance` made room for.  -> what stands for all keys and values"""
        page, column = self.pages.last
        self.keys_of_page[page, :, column], self.values_of_page[page, :, :, column] = (
            keys[:, :, 0].float(),
            values[:, :, 0].float(),
        )
        self.show(max(self.pages.lengths))
        return self.keys, self.values

    def attend(self, query, bias, scaling):
        """Attention of one query a row, (B, H', 1, D) -> the same shape; H' is a multiple of H.  bias (1, H', 1, T): added to scores.

        Each page is multiplied alone; a row's softmax, and the sum of its values, are put together of those of its pages."""
        pages = self.pages
        shape = (self.pages.count, self.heads, query.shape[1] // self.heads, PAGE)
        keys = self.keys_of_page[: pages.count].flatten(0, 1)
        values = self.values_of_page[: pages.count].flatten(0, 1)
        query = (
            (query.float() * scaling)
            .flatten(1)
            .index_select(0, pages.owner)
            .view(len(keys), -1, self.width)
        )
        scores = torch.bmm(query, keys.transpose(1, 2)).view(shape)
        scores += pages.added(bias, shape)
        largest = scores.amax(-1).flatten(1)[pages.table].amax(1)  # (B, H')
        chances = scores.sub_(largest.index_select(0, pages.owner).view(*shape[:3], 1)).exp_()
        sums = (
            torch.bmm(chances.view(len(keys), -1, PAGE), values.transpose(1, 2)).view(
                len(chances), -1
            ),
            chances.sum(-1).flatten(1),
        )
        out, total = (
            torch.nn.functional.embedding_bag(pages.listed, each, pages.starts, mode="sum")
            for each in sums
        )
        return (out.view(*largest.shape, 1, -1) / total[..., None, None]).to(self.dtype)


def attend(module, query, key, value, attention_mask, scaling=None, position_bias=None, **more):
    """Attention, (B, H, .., D) -> (B, .., H, D): of one query in the pages of a layer; else Hugging Face's, which leaves a mark on the
    keys: where those in the cache have it, they come here as they are."""
    if hasattr(key, "layer"):
        return key.layer.attend(
            query, position_bias, query.shape[-1] ** -0.5 if scaling is None else scaling
        ).transpose(1, 2), None
    key.attended = True
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        position_bias=position_bias,
        **more,
    )


AttentionInterface.register("paged", attend)
AttentionMaskInterface.register("paged", sdpa_mask)


@contextlib.contextmanager
def paged_attention(model):
    """While it is open, the model attends by `attend`, unless its attention is not torch's or it is compiled, or it is not on a CPU: a GPU
    has nothing to gain from less padding while it waits for its many small orders."""
    able = (
        model.device.type == "cpu"
        and model.config._attn_implementation == "sdpa"
        and not model._compiled_call_impl
    )
    try:
        if able:
            model.set_attn_implementation("paged")
        yield
    finally:
        if able:
            model.set_attn_implementation("sdpa")


# ---------------- The state of a batch: the cache ("past_key_values"), "positions" (B,) of the next tokens, masks of a cache not in pages


def layers_of(state):
    """-> [(layers, mask, whether tokens will come)] of a Hugging Face cache: self-attention, then cross-attention."""
    cache = state["past_key_values"]
    own = state.get("decoder_attention_mask")
    other = state.get("attention_mask")
    if hasattr(cache, "cross_attention_cache"):
        return [
            (cache.self_attention_cache.layers, own, True),
            (cache.cross_attention_cache.layers, other, False),
        ]
    return [(cache.layers, other, True)]


def is_paged(state):
    """Whether its cache is in pages."""
    return isinstance(layers_of(state)[0][0][0], PagedLayer)


def can_be_paged(state):
    """Whether what has been read may go into pages: not if a layer does not keep keys and values of all tokens (windows, linear attention), of one
    width, or its model does not give them to `attend` as they are."""
    return all(
        type(layer) is DynamicLayer
        and hasattr(layer.keys, "attended")
        and layer.keys.shape == layer.values.shape
        for layers, *_ in layers_of(state)
        for layer in layers
    )


def bytes_a_token(state):
    """-> what a token of a row takes of its cache, (b, H, T, D) a layer; 0 if no layer keeps tokens."""
    kinds = [
        [
            2
            * layer.keys.shape[1]
            * layer.keys.shape[3]
            * (4 if can_be_paged(state) else layer.dtype.itemsize)
            for layer in layers
            if getattr(layer, "keys", None) is not None
        ]
        for layers, *_ in layers_of(state)
    ]
    return sum(map(sum, kinds)) // len(kinds)


def can_start_late(model, family, state):
    """Whether rows may enter beside others that have tokens already.  A decoder is told its positions, and T5's are relative; others'
    (BART's) are counted from the first column."""
    return is_paged(state) and (
        family == "decoder" or hasattr(model.config, "relative_attention_num_buckets")
    )


def enter(state, read, places, tokens=0):
    """Put rows behind those of `state` (or None): those at `places` of what has just been read, a list with each as often as it is wanted.
    tokens: for so many there will be room.  -> state; its cache is in pages, if it can be"""
    positions = read["positions"][places]
    if not can_be_paged(read):
        return read if places == [*range(len(read["positions"]))] else take(read, places)
    for (into, *_), (layers, mask, growing) in zip(layers_of(state or read), layers_of(read)):
        ends = [
            (row, int(real.nonzero()[0]), int(real.nonzero()[-1]) + 1)
            for row, real in enumerate(mask)
        ]
        rows = [ends[place] for place in places]
        pages = into[0].pages if state else Pages(growing)
        new = pages.enter([end - first for _, first, end in rows])
        for i, layer in enumerate(layers):  # one by one, so that hardly any is there twice
            layers[i] = None
            into[i] = into[i] or PagedLayer(pages, layer.keys)
            into[i].reserve(tokens)
            into[i].enter(layer, rows, new)
    if not state:
        return {"past_key_values": read["past_key_values"], "positions": positions}
    return state | {"positions": torch.cat([state["positions"], positions])}


def take(state, places):
    """Go on with the rows at these places, a list; where they are in pages, each is named once.  -> state"""
    rows = torch.tensor(places, device=state["positions"].device)
    if is_paged(state):
        for layers, *_ in layers_of(state):
            layers[0].pages.keep(places)
    else:
        state["past_key_values"].reorder_cache(
            rows
        )  # every kind of layer has this one, linear attention too
    return {
        name: value if name == "past_key_values" else value[rows] for name, value in state.items()
    }


def advance(state):
    """Make room for a token in each row, if its cache is in pages; another makes it for itself."""
    for layers, *_ in layers_of(state) if is_paged(state) else ():
        moves = layers[0].pages.advance()
        for layer in layers:
            layer.settle(moves)


# ---------------- The likeliest word

GROUP = 32  # words whose scores are looked at together first


class Likeliest:
    """The word with the largest logit for each row, exactly, in less than half the time of a head in fp32 and a quarter of the memory of
    its packed copy: the head's product is done in 8 bits, and the words it leaves in doubt, a few a row, are multiplied in fp32."""

    def __init__(self, head):
        """head: a Linear without bias, of weight (V, K)"""
        self.head = head
        weight = head.weight.detach()
        self.mean = weight.mean(
            0
        )  # what all words have in common changes no order, but would cost digits
        kept = [
            in_8_bits(block - self.mean) for block in weight.split(1024)
        ]  # block by block, so that little is there twice
        words, scales, sizes, losses = map(torch.cat, zip(*kept))
        order = sizes.argsort()
        order = torch.cat([order, order[-1:].expand(-len(order) % GROUP)]).view(
            -1, GROUP
        )  # a row for each group: words of like size
        self.sizes = torch.stack([sizes[order].amax(1), losses[order].amax(1)])  # (2, groups)
        self.words = (
            order.t().flatten()
        )  # the words of a group lie V / GROUP apart, which finds the largest fastest
        self.rough = torch.ops.onednn.qlinear_prepack(words[self.words], None)
        self.scales = scales[self.words, 0]
        self.zeros = torch.zeros_like(self.words, dtype=torch.int32)

    def __call__(self, hidden):
        """hidden (B, K) -> the largest logits (B,), not finite where one is no number, and their words (B,)"""
        weight, (near, scale, size, lost) = self.head.weight, in_8_bits(hidden)
        scores = torch.ops.onednn.qlinear_pointwise(
            near.view(torch.uint8) + 128,
            1.0,
            128,
            self.rough,
            self.scales,
            self.zeros,
            None,
            1.0,
            0,
            torch.bfloat16,
            "none",
            [],
            "",
        ).unflatten(1, (GROUP, -1))  # (B, GROUP, groups), / scale
        groups = scores.amax(1)
        # The logit of the word that seems likeliest is surpassed by none that is less by more than sums can be off: by what rounding took from
        # their factors (Cauchy-Schwarz), by 2^-24 of all there is at each step, and by 2^-8 as they were rounded to bf16
        rows = torch.arange(len(hidden))
        group = groups.argmax(1)
        seeming = self.words[scores[rows, :, group].argmax(1) * groups.shape[1] + group]
        least = (hidden * (weight[seeming] - self.mean)).sum(1)
        errors = (
            torch.stack([lost + hidden.shape[1] * 2**-23 * size, size + lost], 1) @ self.sizes
        )  # (B, groups)

        def may_surpass(scores, scale, error, least):
            scores = scores * scale
            return ~(
                scores + 0.008 * scores.abs() + error < least
            )  # so said, it is true of what is no number

        row, group = may_surpass(groups, scale, errors, least[:, None]).nonzero(as_tuple=True)
        some, place = may_surpass(
            scores[row, :, group], scale[row], errors[row, group, None], least[row, None]
        ).nonzero(as_tuple=True)
        row = row[some]
        word = self.words[place * groups.shape[1] + group[some]]
        if len(row) > 128 * len(hidden):
            return (hidden @ weight.t()).max(1)
        logits = (hidden[row] * weight[word]).sum(1)
        best = torch.full_like(least, -torch.inf).scatter_reduce_(0, row, logits, "amax")
        first = torch.where(
            logits == best[row], word, len(weight)
        )  # of equals the first, as argmax
        return best, torch.full_like(best, len(weight) - 1, dtype=torch.long).scatter_reduce_(
            0, row, first, "amin"
        )


def in_8_bits(x):
    """x (N, K) -> whole numbers from -127 to 127 (N, K), the scale (N, 1) that makes x of them, and norms (N,): of x, and of what is lost."""
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    near = (x / scale).round()
    return near.to(torch.int8), scale, x.norm(dim=1), (x - near * scale).norm(dim=1)


@contextlib.contextmanager
def likeliest_word(model):
    """While it is open, `model` gives in place of logits what its head would multiply, and a Likeliest that knows the head makes words of it;
    or None comes, and nothing is changed: on a device that is not a CPU with products in 8 bits, or where something is done to the logits
    afterwards."""
    head = model.get_output_embeddings()
    able = torch.cpu.get_capabilities()
    if (
        type(head) is not torch.nn.Linear
        or head.bias is not None
        or head.weight.device.type != "cpu"
        or head.weight.dtype != torch.float32
        or not (able.get("avx512_vnni") or able.get("amx_int8"))
        or not torch.backends.mkldnn.is_available()
        or model._compiled_call_impl
    ):
        yield None
        return

    def mark(hidden):
        logits = hidden.new_zeros(1).expand(*hidden.shape[:-1], len(head.weight))
        logits.untouched = True  # what comes out of the model with this mark is what its head gave
        return logits

    head.forward = mark
    ids = torch.zeros(1, 1, dtype=torch.long)
    try:
        with torch.no_grad():
            out = model(
                input_ids=ids,
                use_cache=False,
                **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}),
            ).logits
        del head.forward
        if hasattr(out, "untouched"):
            head.forward = lambda hidden: hidden
        yield Likeliest(head) if hasattr(out, "untouched") else None
    finally:
        vars(head).pop("forward", None)


# ---------------- Products


@contextlib.contextmanager
def packed_products(model):
    """While it is open, layers on a CPU multiply by weights laid out once in the blocks that oneDNN computes in, which it would
    otherwise do anew at every token: the same sums, 1.3 to 2 times as fast for the 16 to 128 rows of a step.  The plain layout of a
    weight that nothing else uses goes meanwhile, so that it is not there twice."""
    users = collections.Counter(
        id(p) for module in model.modules() for p in module.parameters(recurse=False)
    )
    layers = [
        layer
        for layer in model.modules()
        if type(layer) in (torch.nn.Linear, Conv1D)
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype in (torch.float32, torch.bfloat16)
        and torch.backends.mkldnn.is_available()
        and "forward" not in vars(layer)
        and not model._compiled_call_impl
    ]  # a compiled model would be compiled again
    packs = []
    packed_weights = {id(layer.weight) for layer in layers}
    try:
        files = kernels.mapped_files() if layers else []
        for parameter in (
            model.parameters() if layers else ()
        ):  # after this, nothing needs the file that weights were mapped from, or little
            if (
                id(parameter) not in packed_weights or users[id(parameter)] > 1
            ) and not kernels.forget([parameter], files):
                parameter.data = parameter.data.clone()
        for layer in layers:
            packs.append(torch.ops.mkldnn._reorder_linear_weight(rows_are_outputs(layer), 64))
            layer.forward = functools.partial(
                packed_product, packs[-1], layer.bias, len(rows_are_outputs(layer))
            )
            if users[id(layer.weight)] == 1:
                kernels.forget([layer.weight], files)
                layer.weight.data = layer.weight.data.new_empty(0)
        yield
    finally:
        for layer in layers[: len(packs)][::-1]:
            packed = packs.pop()
            vars(layer).pop("forward", None)  # Ctrl-C may have come before it was set
            if not layer.weight.numel():
                layer.weight.data = packed.to_dense()
                layer.weight.data = rows_are_outputs(layer).contiguous()


def rows_are_outputs(layer):
    """-> (out, in) weight of a layer; Conv1D, GPT-2's, holds it the other way round (and the same again turns it back)."""
    return layer.weight.detach().t() if type(layer) is Conv1D else layer.weight.detach()


def packed_product(packed, bias, width, x):
    """x (.., in) -> (.., width), with a weight of torch.ops.mkldnn._reorder_linear_weight."""
    return torch.ops.mkldnn._linear_pointwise(
        x.reshape(-1, x.shape[-1]), packed, bias, "none", [], ""
    ).view(*x.shape[:-1], width)
