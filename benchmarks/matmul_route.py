"""python benchmarks/matmul_route.py: the linear layers' fp32 matmul on this CPU, oneDNN's route against torch's default.

Prints, for each shape, the two routes' median times of forward and backward, taken in turn in one process, their ratio, and the
error of oneDNN's route against float64. What a run chooses by itself is the last column.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.machine import interleaved_s
from supar_sweep.sparse.linear import MaskedLinear, set_route
from supar_sweep.sparse.route import ROUTES, choose_route
from supar_sweep.sweep.tables import render

TOKENS, ROUNDS = 512, 30
SHAPES = [(64, 64), (256, 256), (256, 1024), (1024, 1024), (2048, 2048)]


def one_pass(layer: MaskedLinear, x: torch.Tensor, route: str) -> None:
    """Run one forward and backward pass on a route."""
    set_route(layer, route)
    layer(x).sum().backward()


def main() -> None:
    """Measure and print the table."""
    torch.set_num_threads(1)
    rows = []
    for fan_in, fan_out in SHAPES:
        layer = MaskedLinear(fan_in, fan_out, bias=False)
        torch.nn.init.normal_(layer.weight)
        x = torch.randn(TOKENS, fan_in, requires_grad=True)
        median_s = interleaved_s({route: partial(one_pass, layer, x, route) for route in ROUTES}, ROUNDS)
        exact = x.detach().double() @ layer.weight.detach().double().T
        set_route(layer, "onednn")
        error = ((layer(x).double() - exact).abs().max() / exact.abs().max()).item()
        choice = choose_route(torch.device("cpu"), TOKENS, fan_in, fan_out)
        rows.append(
            {
                "fan_in": fan_in,
                "fan_out": fan_out,
                "torch_ms": round(1e3 * median_s["torch"], 3),
                "onednn_ms": round(1e3 * median_s["onednn"], 3),
                "ratio": round(median_s["torch"] / median_s["onednn"], 2),
                "error": f"{error:.1e}",
                "chosen": choice.route,
            }
        )
    title = f"{TOKENS} tokens, 1 thread, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"
    print(render(rows, title=title))


if __name__ == "__main__":
    main()
