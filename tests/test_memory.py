"""Attention over many positions stays in bounded memory: the map of all pairs is never held."""

import subprocess
import sys

from conftest import ROOT

PROGRAM = """
import torch
from nonlocal_net import NonLocalBlock

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**10

torch.set_num_threads(1)
for mode in ("embedded_gaussian", "gaussian", "dot_product"):
    block = NonLocalBlock(64, mode=mode).eval()
    with torch.inference_mode():
        block(torch.randn(1, 64, 8, 8))
        before = peak()
        block(torch.randn(1, 64, 128, 128))
    print(mode, peak() - before)
"""


def test_a_non_local_block_never_holds_the_map_of_all_pairs():
    """128 x 128 positions: the map would take 1024 MiB in float32, the features take 4."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120)
    peaks = {mode: float(grown) for mode, grown in (line.split() for line in done.stdout.splitlines())}
    assert len(peaks) == 3, done.stderr
    assert max(peaks.values()) < 128, peaks
