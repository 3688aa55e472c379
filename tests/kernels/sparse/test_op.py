"""Block-sparse attention kernels by the interpreter, against dense attention in float64: outputs and all gradients."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from hf_linear_attn.kernels.sparse.lists import ANYWHERE
from hf_linear_attn.kernels.sparse.op import block_sparse_attention
from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.sparse import fused, strided
from hf_linear_attn.ops.sparse.layout import ANYONE, NOBODY, BlockGrid, Extra
from hf_linear_attn.ops.sparse.patterns import bigbird_lists, hashed, own_block_lists, random_blocks
from hf_linear_attn.ops.window import attention as sliding_window
from hf_linear_attn.ops.window import fused as window_fused
from hf_linear_attn.ops.window.csr import window_csr
from hf_linear_attn.ops.window.fused import refusal, sliding_window_attention
from tests.kernels.sparse.reference import dense_attention, error_ratio
from tests.ops.references import naive_block_sparse_attention

CPU = torch.device("cpu")
TILES = ((16, 16), (32, 16))
OUTPUT, GRADIENT = 0.001, 0.005


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """What the kernels do not write is nan."""
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like

    def poisoned(make):
        def function(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return function

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(new_empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(empty_like))


def draw(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(actual_of, expected_of, tensors, seed=9):
    """Both functions return tensors; they and the gradients of all `tensors` must agree, in float32 and float64."""
    results = []
    for function, dtype in ((actual_of, torch.float32), (expected_of, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
        outputs = [x.masked_fill(x < -1e29, 0) for x in function(*inputs)]
        weights = draw(*(x.shape for x in outputs), seed=seed)
        loss = sum((x * w.to(dtype)).sum() for x, w in zip(outputs, weights, strict=True))
        results.append((outputs, torch.autograd.grad(loss, inputs)))
    (outputs, gradients), (expected, expected_gradients) = results
    for number, pair in enumerate(zip(outputs, expected, strict=True)):
        assert error_ratio(*pair) < OUTPUT, f"output {number}"
    for number, pair in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert error_ratio(*pair) < GRADIENT, f"gradient {number}"


def window_of(q_len, k_len, left, right):
    distance = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
    return (distance <= left) & (distance >= -right)


@pytest.mark.parametrize(
    ("q_len", "k_len", "left", "right", "dim"),
    [(1, 1, 3, 0, 16), (7, 7, 2, 2, 16), (63, 63, 20, 9, 16), (5, 40, 17, 0, 60), (40, 40, 40, 0, 60)],
    ids=lambda x: str(x),
)
def test_windows_with_the_gradient_of_the_log_sum_exp(q_len, k_len, left, right, dim):
    lists = window_csr(q_len, k_len, left, right, CPU, tiles=TILES)
    tensors = draw((2, 1, q_len, dim), (2, 1, k_len, dim), (2, 1, k_len, dim))
    seen = window_of(q_len, k_len, left, right)
    compare(
        lambda q, k, v: block_sparse_attention(q, k, v, lists, scaling=0.3),
        lambda q, k, v: dense_attention(q, k, v, seen, 0.3),
        tensors,
    )


@pytest.mark.parametrize("rows", [1, 37], ids=["mask per key", "mask per pair"])
def test_padding_and_columns(rows):
    """Keys at negative positions and hidden columns of a shifted logit; padded keys are nan, and rows see nothing."""
    tensors = draw((2, 2, 37, 16), (2, 2, 37, 16), (2, 2, 37, 16), (2, 2, 18, 16), (2, 2, 18, 16))
    allowed = torch.rand(2, 37, generator=torch.Generator().manual_seed(1)) > 0.4
    allowed[1, :25] = False
    shown = torch.rand(2, rows, 18, generator=torch.Generator().manual_seed(2)) > 0.3
    shown[1, : rows - 1] = False
    shift, lists = torch.tensor([-1.0, 0.5]), window_csr(37, 37, 6, 3, CPU, tiles=TILES)
    k_pos = torch.where(allowed, torch.arange(37), -1).int()
    hidden = ~allowed[:, None, :, None]

    def actual(q, k, v, xk, xv):
        k, v = (x.masked_fill(hidden, float("nan")) for x in (k, v))
        extra = xk, xv, shown
        return block_sparse_attention(q, k, v, lists, scaling=0.3, k_pos=k_pos, extra=extra, extra_shift=shift)

    def expected(q, k, v, xk, xv):
        seen = torch.cat([shown.expand(-1, 37, -1), window_of(37, 37, 6, 3) & allowed[:, None]], -1)[:, None]
        bias = torch.cat([shift[:, None].expand(-1, 18), torch.zeros(2, 37)], -1)[:, None].double()
        return dense_attention(q, torch.cat([xk, k], 2), torch.cat([xv, v], 2), seen, 0.3, bias)

    compare(actual, expected, tensors)


def test_buckets_positions_and_holes():
    """INDEXED: equal buckets, at most its own position, not itself; in any order of the tokens."""
    tensors = draw((2, 2, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    generator = torch.Generator().manual_seed(3)
    bucket = torch.randint(3, (2, 2, 40), generator=generator, dtype=torch.int32)
    position = torch.stack([torch.randperm(40, generator=generator) for _ in range(2)], dim=1).int().t()  # strided
    # The lists hold every tile, none of them FULL, the band and the hole speak of positions.
    lists = window_csr(40, 40, 39, 39, CPU, tiles=TILES, hole=(0, 0))
    lists = replace(lists.masked(), band=(0, ANYWHERE))
    distance = position[:, :, None] - position[:, None]
    seen = (bucket[..., None] == bucket[..., None, :]) & (distance > 0)[:, None]
    compare(
        lambda q, k, v: block_sparse_attention(
            q, k, v, lists, scaling=0.3, q_pos=position, k_pos=position, q_bucket=bucket, k_bucket=bucket
        ),
        lambda q, k, v: dense_attention(q, k, v, seen, 0.3),
        tensors,
    )


def test_dropout_is_the_same_forward_and_backward():
    """With unit vectors as values the output shows the weights that were kept."""
    lists = window_csr(16, 16, 9, 9, CPU, tiles=TILES)
    q, k, xk = draw((1, 2, 16, 32), (1, 2, 16, 32), (1, 2, 16, 32))
    values = torch.eye(32).expand(1, 2, -1, -1)
    v, xv = values[:, :, :16], values[:, :, 16:]
    shown = torch.ones(1, 1, 16, dtype=torch.bool)

    def attend(q, k, v, xk, xv, seed=5):
        extra = xk, xv, shown
        return block_sparse_attention(q, k, v, lists, scaling=0.3, extra=extra, dropout_p=0.25, seed=seed)

    kept, log_sum = attend(q, k, v, xk, xv)
    assert torch.equal(kept, attend(q, k, v, xk, xv)[0])
    assert not torch.equal(kept, attend(q, k, v, xk, xv, seed=6)[0])
    seen = torch.cat([window_of(16, 16, 9, 9), torch.ones(16, 16, dtype=torch.bool)], -1)
    share = (kept > 0).sum() / (seen.sum() * 2)
    assert 0.68 < float(share) < 0.82
    mask = (kept > 0).double() / 0.75

    def expected(q, k, v, xk, xv):
        logits = (q @ torch.cat([k, xk], 2).mT * 0.3).masked_fill(~seen, -torch.inf)
        return logits.softmax(-1) * mask @ torch.cat([v, xv], 2), logits.logsumexp(-1)

    compare(attend, expected, [q, k, v, xk, xv])
    assert error_ratio(log_sum, expected(*(x.double() for x in (q, k, v, xk, xv)))[1]) < OUTPUT


def test_any_strides_and_what_a_row_without_keys_gives():
    q, k, v = (x.transpose(1, 2) for x in draw((2, 20, 3, 16), (2, 20, 3, 16), (2, 20, 3, 32)))
    v = v[..., ::2]  # its last stride is 2
    lists = window_csr(20, 20, 4, 0, CPU, tiles=TILES)
    hidden = torch.where(torch.arange(20) < 12, -1, torch.arange(20)).int()[None]
    out, lse = block_sparse_attention(q, k, v, lists, scaling=0.3, k_pos=hidden)
    expected, _ = dense_attention(q, k, v, window_of(20, 20, 4, 0) & (hidden >= 0), 0.3)
    assert error_ratio(out, expected) < OUTPUT
    assert out.transpose(1, 2).is_contiguous()
    assert bool((out[:, :, :12] == 0).all())
    assert bool((lse[:, :, :12] == -1e30).all())


@pytest.mark.parametrize("dilation", [1, 3, (1, 2)], ids=str)
def test_the_window_op_equals_its_twin(dilation, monkeypatch):
    monkeypatch.setattr(window_fused, "tiles_for", lambda *_: TILES)
    tensors = draw((2, 2, 23, 16), (2, 2, 40, 16), (2, 2, 40, 16), (2, 2, 3, 16), (2, 2, 3, 16))
    allowed = torch.arange(40).expand(2, -1) >= torch.tensor([[0], [9]])
    shown = torch.rand(2, 23, 3, generator=torch.Generator().manual_seed(2)) > 0.3

    def attend(function):
        def call(q, k, v, xk, xv):
            where = {"left": 5, "right": 2, "scaling": 0.3, "dilation": dilation, "key_allowed": allowed}
            return (function(q, k, v, **where, extra=(xk, xv, shown)),)

        return call

    compare(attend(sliding_window_attention), attend(sliding_window.naive_sliding_window_attention), tensors)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("padding", "block"), [(None, 4), ("interior", 5), ("left", 20)])
def test_the_block_op_equals_its_twin(is_causal, padding, block, monkeypatch):
    """BigBird's lists, other ones per head, with columns; blocks of less than a tile, odd ones, and more than one."""
    monkeypatch.setattr(fused, "block_tile", lambda *_: 16)
    places = torch.arange(50).expand(2, -1)
    mask = {"left": places >= torch.tensor([[3], [17]]), "interior": places % 5 != 1}.get(padding)
    tensors = draw((2, 2, 50, 16), (2, 2, 50, 16), (2, 2, 50, 16), (2, 2, 4, 16), (2, 2, 4, 16))
    column_block = torch.tensor([[0, 2, ANYONE, NOBODY]])

    def attend(function):
        def call(q, k, v, xk, xv):
            call = compact(q, k, v, mask)
            grid = BlockGrid(call, block, aligned=mask is None)
            codes, numbers = hashed(torch.arange(2)), {"number": 2, "num_window_blocks": 3, "is_causal": is_causal}
            lists = bigbird_lists(
                grid.row, grid.blocks, random_blocks(grid.row, grid.blocks, codes=codes, **numbers), 3, is_causal
            )
            extra = Extra(xk, xv, column_block, torch.tensor([-1.0, 0.5], dtype=torch.float64))
            return (call.restore(function(call, grid, lists, scaling=0.3, extra=extra)),)

        return call

    compare(attend(fused.block_sparse_attention), attend(naive_block_sparse_attention), tensors)


@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("q_len", "k_len", "stride"), [(36, 36, 6), (13, 37, 7), (20, 20, 25)])
def test_the_strided_op_equals_its_twin(is_causal, q_len, k_len, stride, monkeypatch):
    monkeypatch.setattr(window_fused, "tiles_for", lambda *_: TILES)
    tensors = draw((1, 2, q_len, 16), (1, 2, k_len, 16), (1, 2, k_len, 16))
    allowed = torch.arange(k_len)[None] >= 5 if q_len != 36 else None
    where = {"stride": stride, "scaling": 0.3, "is_causal": is_causal, "key_allowed": allowed}

    def rows(x):  # rows that see no key: unspecified
        return (x[:, :, 5:] if q_len == k_len else x,)

    compare(
        lambda *x: rows(fused.strided_attention(*x, **where)),
        lambda *x: rows(strided.naive_strided_attention(*x, **where)),
        tensors,
    )
    actual = fused.column_attention(*tensors, **where)
    expected = strided.column_attention(*(x.double() for x in tensors), **where)
    seen = torch.ones(1, q_len, dtype=torch.bool)  # a row that sees no key is 0 here
    if allowed is not None:
        number = torch.arange(k_len - q_len, k_len)[:, None] - torch.arange(k_len)
        seen = ((number % stride == 0) & allowed & ((number >= 0) | (not is_causal))).any(-1)[None]
    assert error_ratio(actual.transpose(1, 2)[seen], expected.transpose(1, 2)[seen]) < OUTPUT


def test_two_runs_are_equal_and_the_op_is_well_formed():
    lists = window_csr(20, 20, 7, 3, CPU, tiles=TILES)
    q, k, v, xk, xv = (x.requires_grad_() for x in draw((1, 2, 20, 16), *[(1, 2, 20, 16)] * 2, *[(1, 2, 3, 16)] * 2))
    runs = []
    for _ in range(2):
        out, lse = block_sparse_attention(q, k, v, lists, scaling=0.3, extra=(xk, xv, None))
        runs.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v, xk, xv))])
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))
    given = (q, k, v, xk, xv, *lists.tensors(), *[None] * 7, lists.numbers(), 0.3, 0.0)
    torch.library.opcheck(torch.ops.hf_linear_attn.block_sparse_fwd, given)


def test_compiles_into_one_graph(monkeypatch):
    monkeypatch.setattr(window_fused, "tiles_for", lambda *_: TILES)
    tensors = [x.requires_grad_() for x in draw((1, 1, 20, 16), (1, 1, 20, 16), (1, 1, 20, 16))]

    def attend(q, k, v):
        return sliding_window_attention(q, k, v, left=6, right=0, scaling=0.3)

    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors)
    expected = attend(*tensors)
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(x.square().sum(), tensors) for x in (out, expected))
    for pair in zip(*gradients, strict=True):
        torch.testing.assert_close(*pair)


def test_lists_of_blocks_are_made_in_the_graph_and_kept_under_a_key(monkeypatch):
    monkeypatch.setattr(fused, "block_tile", lambda *_: 16)
    tensors, made = draw((1, 2, 40, 16), (1, 2, 40, 16), (1, 2, 40, 16)), []

    def attend(q, k, v, kept_as=None):
        call = compact(q, k, v, None)
        grid = BlockGrid(call, 8, aligned=True)

        def lists():
            made.append(1)
            return own_block_lists(grid.row, grid.blocks, True)

        return fused.block_sparse_attention(call, grid, lists, scaling=0.3, kept_as=kept_as)

    expected = attend(*tensors)
    for _ in range(2):
        torch.testing.assert_close(attend(*tensors, kept_as=("own block", 8)), expected)
    assert len(made) == 2
    torch.testing.assert_close(torch.compile(attend, fullgraph=True, backend="aot_eager")(*tensors), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 2, 20, 16, dtype=torch.float64)}, "share a dtype"),
        ({"q": torch.zeros(1, 2, 20, 129)}, "D <= 128"),
        ({"v": torch.zeros(1, 2, 19, 16)}, r"\(1, 2, 19, 16\)"),
        ({"dropout_p": 1.0}, "dropout_p=1.0"),
        ({"extra": (torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), None)}, "Extra keys"),
        ({"extra_shift": torch.zeros(2, requires_grad=True)}, "extra_shift"),
    ],
    ids=["dtype", "head_dim", "length", "dropout", "columns", "shift"],
)
def test_what_does_not_fit_is_refused(change, message):
    call = {name: torch.zeros(1, 2, 20, 16) for name in "qkv"}
    call |= {"lists": window_csr(20, 20, 7, 3, CPU, tiles=TILES), "scaling": 0.3}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**(call | change))


def test_refusals_name_the_reason():
    assert refusal(torch.zeros(1, 1, 2, 16)) is None
    assert "float64" in refusal(torch.zeros(1, 1, 2, 16, dtype=torch.float64))
    assert "200" in refusal(torch.zeros(1, 1, 2, 200))
