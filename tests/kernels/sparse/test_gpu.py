"""Block-sparse attention on a GPU: three dtypes, up to 4096 tokens, against dense attention in float64."""

import pytest
import torch

pytest.importorskip("triton")

from hf_linear_attn.kernels.sparse.launch import tiles_for
from hf_linear_attn.kernels.sparse.op import block_sparse_attention
from hf_linear_attn.ops.base.compaction import compact
from hf_linear_attn.ops.sparse import fused, strided
from hf_linear_attn.ops.sparse.layout import BlockGrid
from hf_linear_attn.ops.sparse.patterns import bigbird_lists, hashed, random_blocks
from hf_linear_attn.ops.window import attention as sliding_window
from hf_linear_attn.ops.window.csr import window_csr
from hf_linear_attn.ops.window.fused import sliding_window_attention
from tests.kernels.sparse.reference import error_ratio
from tests.ops.references import naive_block_sparse_attention

pytestmark = pytest.mark.gpu

# RMS of the error over RMS of the result, outputs and gradients.
LIMITS = {torch.float32: (1e-4, 2e-4), torch.float16: (0.002, 0.005), torch.bfloat16: (0.01, 0.02)}
DTYPES = list(LIMITS)


def draw(*shapes, dtype, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(shape, generator=generator, device="cuda").to(dtype) for shape in shapes]


def compare(actual_of, expected_of, tensors, rows=slice(None)):
    """Outputs and gradients of both functions; the second runs in float64 on the same rounded inputs."""
    results = []
    for function, dtype in ((actual_of, tensors[0].dtype), (expected_of, torch.float64)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in tensors]
        out = function(*inputs)[:, :, rows]
        weight = draw(out.shape, dtype=tensors[0].dtype, seed=9)[0].to(dtype)
        results.append((out, torch.autograd.grad((out * weight).sum(), inputs)))
    (out, gradients), (expected, expected_gradients) = results
    limits = LIMITS[tensors[0].dtype]
    assert error_ratio(out, expected) < limits[0]
    for number, pair in enumerate(zip(gradients, expected_gradients, strict=True)):
        assert error_ratio(*pair) < limits[1], f"gradient {number}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [16, 60, 64, 128])
@pytest.mark.parametrize("length", [63, 500, 1000, 4096])
def test_windows_with_padding_and_columns(length, dim, dtype):
    batch = 1 if length == 4096 else 2
    shapes = [(batch, 2, length, dim)] * 3 + [(batch, 2, 3, dim)] * 2
    allowed = torch.arange(length, device="cuda").expand(batch, -1) >= torch.tensor([[0], [9]], device="cuda")[:batch]
    shown = torch.rand(batch, length, 3, generator=torch.Generator().manual_seed(2)).cuda() > 0.3
    shown[:, :, 0] = True
    where = {"left": 100, "right": 40, "scaling": dim**-0.5, "key_allowed": allowed}
    compare(
        lambda q, k, v, xk, xv: sliding_window_attention(q, k, v, **where, extra=(xk, xv, shown)),
        lambda q, k, v, xk, xv: sliding_window.naive_sliding_window_attention(q, k, v, **where, extra=(xk, xv, shown)),
        draw(*shapes, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("block", "padded"), [(16, False), (64, False), (64, True), (100, True)])
@pytest.mark.parametrize(("length", "dim"), [(1000, 60), (4096, 64), (1000, 128)])
def test_bigbird(length, dim, block, padded, is_causal, dtype):
    mask = None
    if padded:
        mask = torch.arange(length, device="cuda").expand(2, -1) >= torch.tensor([[0], [77]], device="cuda")

    def attend(function):
        def call(q, k, v):
            call = compact(q, k, v, mask)
            grid = BlockGrid(call, block, aligned=mask is None)
            codes = hashed(torch.arange(2, device="cuda"))
            numbers = {"codes": codes, "number": 3, "num_window_blocks": 3, "is_causal": is_causal}
            drawn = random_blocks(grid.row, grid.blocks, **numbers)
            lists = bigbird_lists(grid.row, grid.blocks, drawn, 3, is_causal)
            return call.restore(function(call, grid, lists, scaling=dim**-0.5))

        return call

    tensors = draw(*[(2, 2, length, dim)] * 3, dtype=dtype)
    compare(attend(fused.block_sparse_attention), attend(naive_block_sparse_attention), tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize(("length", "stride"), [(500, 30), (4096, 64)])
def test_strided(length, stride, is_causal, dtype):
    where = {"stride": stride, "scaling": 0.125, "is_causal": is_causal}
    compare(
        lambda *x: fused.strided_attention(*x, **where),
        lambda *x: strided.naive_strided_attention(*x, **where),
        draw(*[(1, 2, length, 64)] * 3, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_are_equal_on_two_streams(dtype):
    """Two passes at the same time, twenty times, give the same bits as one alone."""
    tensors = [x.requires_grad_() for x in draw(*[(2, 4, 1000, 64)] * 3, dtype=dtype)]

    def run():
        out = sliding_window_attention(*tensors, left=200, right=0, scaling=0.125)
        return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]

    expected = run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(20):
        runs = []
        for stream in streams:
            with torch.cuda.stream(stream):
                runs.append(run())
        torch.cuda.synchronize()
        for made in runs:
            assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_keeps_its_share_and_its_gradient(dtype):
    """With unit vectors as values the output shows which weights were kept; the gradient of v counts the same ones."""
    q, k = draw(*[(1, 2, 64, 64)] * 2, dtype=dtype)
    v = torch.eye(64, device="cuda", dtype=dtype).expand(1, 2, -1, -1).contiguous().requires_grad_()
    lists = window_csr(64, 64, 64, 64, q.device, tiles=tiles_for(dtype, 64))
    out, _ = block_sparse_attention(q, k, v, lists, scaling=0.1, dropout_p=0.25, seed=torch.tensor([7], device="cuda"))
    assert 0.7 < float((out > 0).float().mean()) < 0.8
    (gradient,) = torch.autograd.grad(out.float().sum(), v)
    assert error_ratio(gradient[..., 0], out.detach().float().sum(2)) < LIMITS[dtype][1]


def test_compiled_training_step_is_one_graph():
    tensors = [x.requires_grad_() for x in draw(*[(2, 4, 512, 64)] * 3, dtype=torch.bfloat16)]

    def attend(q, k, v):
        return sliding_window_attention(q, k, v, left=100, right=0, scaling=0.125)

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(*tensors)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    for pair in zip(*results, strict=True):
        torch.testing.assert_close(*pair)
