"""An MLP of your own under SP and SuPar: do its activations move with density?"""

import torch
from torch import Tensor, nn

from supar_sweep import (
    HParams,
    Method,
    Ratios,
    check_init,
    forward_multipliers,
    param_groups,
    parameterize,
    tag,
)

BASE_WIDTH, WIDTH, N_HIDDEN = 64, 512, 2


class MLP(nn.Module):
    """A plain torch model; the tags in its constructor are all that it knows of the rules."""

    def __init__(self, logits_mult: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(16, WIDTH)
        self.hidden = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(N_HIDDEN))
        self.head = nn.Linear(WIDTH, 1, bias=False)
        self.logits_mult = logits_mult
        tag(self.inputs, "weight", "embedding")  # reads inputs of a fixed size
        for layer in self.hidden:
            tag(layer, "weight", "hidden", base_fan_in=BASE_WIDTH)
        tag(self.head, "weight", "head")  # biases and norms are recognised without a tag

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.inputs(x))
        for layer in self.hidden:
            x = torch.relu(layer(x))
        return self.head(x * self.logits_mult), x


def mean_activation(parameterization: str, density: float, steps: int = 10) -> float:
    """Train some steps; return mean |activation| of the last hidden layer."""
    method = Method(parameterization=parameterization)
    hparams = HParams(lr=0.005, init_std=0.2, alpha_in=1.0, alpha_out=1.0, weight_decay=0.0)
    ratios = Ratios(m_d=WIDTH / BASE_WIDTH)
    model = MLP(forward_multipliers(method, ratios, hparams).logits)
    plans = parameterize(model, method=method, hparams=hparams, ratios=ratios, density=density, seed=0, eps=1e-8)
    check_init(plans)
    optimizer = torch.optim.AdamW(param_groups(plans))
    x = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    y = x.prod(dim=1, keepdim=True).sign()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x)[0], y).backward()
        optimizer.step()
    return model(x)[1].abs().mean().item()


if __name__ == "__main__":
    for name in ("sp", "supar"):
        for density in (1, 1 / 4, 1 / 16):
            print(f"{name:6} density {density:<7} {mean_activation(name, density):.3f}")
