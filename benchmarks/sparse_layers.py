"""python benchmarks/sparse_layers.py: one sparse layer's training step, dense with a mask against its live weights alone.

Prints, for each width and density, the median times of forward, both gradients and AdamW's step of a square layer in both forms,
taken in turn in one process, and their ratio; the dense form on torch's matmul and on the route that this machine chooses, the
compact one as it runs here and on torch's operators alone, in case that is the compiled kernel. Beside them the bytes that each
form keeps between steps. What a run chooses by itself is the last column.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.machine import interleaved_s
from supar_sweep.sparse.compact import CompactLinear, set_kernel
from supar_sweep.sparse.compute import choose_compute, training_step
from supar_sweep.sparse.kernel import choose_kernel
from supar_sweep.sparse.linear import MaskedLinear, attach_mask
from supar_sweep.sparse.masks import dense_mask, live_positions
from supar_sweep.sparse.route import choose_route
from supar_sweep.sweep.tables import render
from supar_sweep.training.cost import compact_layer_bytes
from supar_sweep.training.environment import device_name, prepare_process

WIDTHS = [256, 1024, 2048]
DENSITIES = [4, 16, 64]
ROUNDS = 9


def layers(width: int, one_in: int, route: str) -> dict[str, torch.nn.Module]:
    """Return the same square layer in its forms: dense on torch's matmul, dense on `route`, compact, compact without a kernel."""
    n_live = width * width // one_in
    made: dict[str, torch.nn.Module] = {}
    for name, matmul in (("dense", "torch"), ("routed", route)):
        dense = MaskedLinear(width, width, bias=False, route=matmul)
        torch.nn.init.normal_(dense.weight, std=width**-0.5)
        attach_mask(dense, "weight", dense_mask(1, (width, width), n_live))
        made[name] = dense
    for name in ("compact", "compact_torch"):
        compact = CompactLinear(width, width, n_live, bias=False)
        compact.set_pattern(live_positions(1, (width, width), n_live))
        torch.nn.init.normal_(compact.values, std=width**-0.5)
        made[name] = compact
    set_kernel(made["compact_torch"], False)
    return made


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    arguments = parser.parse_args()
    batch, threads = (arguments.sequences, arguments.context), arguments.threads
    tokens = batch[0] * batch[1]
    prepare_process(threads)
    rows = []
    for width in arguments.widths:
        route = choose_route("cpu", tokens, width, width).route
        for one_in in DENSITIES:
            steps = {name: training_step(layer, batch, "cpu") for name, layer in layers(width, one_in, route).items()}
            median_ms = {name: 1e3 * s for name, s in interleaved_s(steps, arguments.rounds).items()}
            n_live = width * width // one_in
            chosen = choose_compute(
                "cpu",
                fan_in=width,
                fan_out=width,
                density=1 / one_in,
                tokens=tokens,
                context_tokens=arguments.context,
                route=route,
            )
            rows.append(
                {
                    "width": width,
                    "density": f"1/{one_in}",
                    "dense_ms": round(median_ms["dense"], 2),
                    f"{route}_ms": round(median_ms["routed"], 2),
                    "compact_ms": round(median_ms["compact"], 2),
                    "compact_torch_ms": round(median_ms["compact_torch"], 2),
                    "ratio": round(median_ms["dense"] / median_ms["compact"], 2),
                    "ratio_same_route": round(median_ms["routed"] / median_ms["compact"], 2),
                    # weight, gradient, two moments, a byte of mask
                    "state_ratio": round(17 * width * width / compact_layer_bytes(width, width, n_live), 1),
                    "chosen": chosen.form,
                }
            )
    title = f"{batch[0]} x {batch[1]} tokens, {threads} thread(s), torch {torch.__version__}, {device_name('cpu')}"
    kernel = choose_kernel("cpu")
    title += f"; compact: {'kernel' if kernel.used else 'torch'} ({kernel.reason})"
    print(render(rows, title=title))


if __name__ == "__main__":
    main()
