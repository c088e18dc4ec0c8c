"""The variables that every process of the project has, and the bits that a CPU computes under them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import environment
from runtime.environment import SAME_INSTRUCTIONS, has_avx2, set_environment

BITS = "e0e08a7617648667"
SUMS = """
from runtime.environment import set_environment
set_environment()
import hashlib, torch
from torch.nn import functional as F
from training.sde import root
torch.set_num_threads(2)
draw = torch.Generator().manual_seed(0)
def normal(*shape): return torch.randn(*shape, generator=draw)
rows, few, square = normal(640, 128), normal(7, 128), normal(128, 128)
query, key, value = (normal(4, 4, 50, 32).requires_grad_() for _ in range(3))
seen = F.scaled_dot_product_attention(query, key, value, attn_mask=normal(4, 1, 50, 50) > -1)
seen.square().sum().backward()
weight = torch.nn.Parameter(normal(5000))
optimizer = torch.optim.AdamW([weight], lr=1e-3, fused=True)
for _ in range(3):
    weight.grad = normal(5000)
    optimizer.step()
made = [rows @ square, few @ square, rows.t() @ rows, rows.softmax(-1), F.gelu(rows), F.silu(rows), F.layer_norm(rows, (128,)), rows.exp(),
        root(rows.abs()), torch.rsqrt(rows.abs()), rows.sum(), rows.std(), torch.linalg.vector_norm(rows), F.conv2d(normal(8, 48, 4, 4),
        normal(128, 48, 1, 1)), seen, query.grad, weight]
digest = hashlib.sha256(b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in made)).hexdigest()
print(torch.backends.cpu.get_cpu_capability(), digest[:16])
"""


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that none of the variables is in, and that is put back as it was."""
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in SAME_INSTRUCTIONS})
    return monkeypatch


@pytest.mark.skipif(not has_avx2(), reason="needs an x86 CPU with AVX2")
def test_a_process_computes_the_bits_of_every_cpu_with_avx2():
    own = {name: value for name, value in os.environ.items() if name not in SAME_INSTRUCTIONS}
    done = subprocess.run([sys.executable, "-c", SUMS], cwd=Path(__file__).parents[2], env=own, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["AVX2", BITS]


def test_what_the_caller_set_stays(bare: pytest.MonkeyPatch):
    bare.setattr(environment, "has_avx2", lambda: True)
    os.environ["MKL_CBWR"] = "AUTO"
    set_environment()
    assert {name: os.environ[name] for name in SAME_INSTRUCTIONS} == SAME_INSTRUCTIONS | {"MKL_CBWR": "AUTO"}


def test_a_cpu_without_avx2_is_not_held_to_it(bare: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "cpuinfo").write_text("flags\t\t: fpu sse sse2 avx avx2_of_another_name\n")
    assert not has_avx2(tmp_path / "cpuinfo") and not has_avx2(tmp_path / "none")
    bare.setattr(environment, "has_avx2", lambda: False)
    set_environment()
    assert not SAME_INSTRUCTIONS.keys() & os.environ.keys()
