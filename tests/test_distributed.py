"""Two processes over gloo: DDP and FSDP2 compute and train what one process does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SCRIPT = """
import copy, sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from hf_linear_attn import convert_model
from tests.tiny import base_model, small_options, token_batch

torch.set_num_threads(1)
dist.init_process_group("gloo")
assert dist.get_world_size() == 2
mode, variant = sys.argv[1:]
model = convert_model(base_model("bert", hidden_dropout_prob=0.0), variant, **small_options(variant, "bert")).train()
batch = token_batch(batch=4, length=30)
batch["attention_mask"][1, 20:] = 0
share = {name: tensor[dist.get_rank() * 2 : dist.get_rank() * 2 + 2] for name, tensor in batch.items()}

def step(model, batch):
    out = model(**batch).last_hidden_state
    loss = out[..., ::2].sum() / batch["input_ids"].numel()
    loss.backward()
    return out.detach()

reference = copy.deepcopy(model)
expected = step(reference, batch)
if mode == "ddp":
    # the pooler has no part in this loss
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
else:
    for layer in model.encoder.layer:
        fully_shard(layer)
    wrapped = fully_shard(model)
out = step(wrapped, share)
torch.testing.assert_close(out, expected[dist.get_rank() * 2 :][:2], atol=1e-5, rtol=1e-5)
gradients = dict(reference.named_parameters())
compared = 0
for name, parameter in model.named_parameters():
    if parameter.grad is None:
        assert gradients[name].grad is None, name
        continue
    got = parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad
    torch.testing.assert_close(got, gradients[name].grad, atol=1e-5, rtol=1e-4)
    compared += 1
assert compared > 10
if mode == "fsdp":
    try:
        convert_model(model, variant)
    except ValueError:
        pass
    else:
        raise AssertionError("a sharded model was converted")

    plain = base_model("bert")
    fully_shard(plain)
    try:
        convert_model(plain, variant)
    except ValueError as error:
        assert "sharded" in str(error), error
    else:
        raise AssertionError("a sharded model was converted")
dist.destroy_process_group()
print("same")
"""


@pytest.mark.parametrize(
    ("mode", "variant"),
    [
        pytest.param(mode, variant, marks=() if (mode, variant) == ("fsdp", "linear") else pytest.mark.slow)
        for mode in ("ddp", "fsdp")
        for variant in ("linear", "longformer", "linformer")
    ],
)
def test_two_ranks_train_like_one(mode: str, variant: str, tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), mode, variant],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)
    assert all("same" in output for output in outputs)
