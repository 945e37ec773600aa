"""How long a change of a 7B model's weight takes to become a LoRA, beside its whole decomposition.

    python examples/benchmarks/lora_conversion.py --shapes 4096x4096,11008x4096 --rank 16

The whole one is `torch.linalg.svd` in double precision. Each is timed once.
"""

from __future__ import annotations

import argparse
import time

import torch

from autopeft.models.lora_conversion import factorize


def main() -> None:
    """Print one line a shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4096x4096,11008x4096", help="Shapes, out x in.")
    parser.add_argument("--rank", type=int, default=16, help="Rank of the change.")
    parser.add_argument("--seed", type=int, default=0, help="Random seed.")
    parser.add_argument("--device", default="cpu", help="Where to compute.")
    asked = parser.parse_args()
    torch.manual_seed(asked.seed)
    for shape in asked.shapes.split(","):
        out, in_ = map(int, shape.split("x"))
        weight = torch.randn(out, in_, device=asked.device) / in_**0.5
        product = torch.randn(out, asked.rank) @ torch.randn(asked.rank, in_) / in_
        merged = weight + product.to(asked.device)
        rounding = torch.finfo(weight.dtype).eps * float(merged.norm())
        change = merged.double() - weight.double()
        began = time.perf_counter()
        found = factorize(change, max_rank=128, rounding=rounding)
        ours = time.perf_counter() - began
        began = time.perf_counter()
        _, values, _ = torch.linalg.svd(change, full_matrices=False)
        whole = time.perf_counter() - began
        gap = float((change - (found.b @ found.a).double()).norm())
        best = float(values[found.rank :].norm())
        print(f"{shape} rank {found.rank}: {ours:.2f} s, whole {whole:.2f} s")
        print(f"  {whole / ours:.0f} times; misses {gap:.2g}, the best of that rank {best:.2g}")


if __name__ == "__main__":
    main()
