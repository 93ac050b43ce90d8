"""The compiled kernel of compact layers: torch's numbers where it can be built, torch itself where not."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from supar_sweep.errors import ConfigError
from supar_sweep.sparse import kernel, kernel_build
from supar_sweep.sparse.compact import MAX_TILE_TOKENS, MIN_TILE_TOKENS, CompactLinear, set_kernel
from supar_sweep.sparse.kernel import choose_kernel, kernel_takes
from supar_sweep.sparse.kernel_build import BuildError, built_kernel
from supar_sweep.sparse.masks import live_positions
from tests.grids import alive, wait_for

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


@pytest.fixture
def fresh() -> Iterator[None]:
    """Nothing is known of the kernel yet, and what the test learns is forgotten."""
    kernel._library.cache_clear()
    yield
    kernel._library.cache_clear()


def layer_of(
    fan_in: int, fan_out: int, n_live: int, dtype: torch.dtype = torch.float32, **options: Any
) -> CompactLinear:
    layer = CompactLinear(fan_in, fan_out, n_live, dtype=dtype, **options)
    layer.set_pattern(live_positions(1, (fan_out, fan_in), n_live))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return layer


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, by_feature: bool = False) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    return x.mT.contiguous().mT if by_feature else x


def results(layer: CompactLinear, x: Tensor, grad: Tensor, used: bool) -> list[Tensor]:
    """Output, gradient to x, gradients to the parameters."""
    assert set_kernel(layer, used) == 1
    x = x.detach().requires_grad_()
    y = layer(x)
    assert ("Kernel" in type(y.grad_fn).__name__) == used
    gradients = torch.autograd.grad(y, [x, *layer.parameters()], grad)
    return [y.detach(), *gradients]


def assert_near(got: list[Tensor], want: list[Tensor], size: float) -> None:
    for index, (mine, its) in enumerate(zip(got, want, strict=True)):
        assert mine.shape == its.shape
        assert (mine - its).norm() <= size * its.norm(), index


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize(("fan_in", "fan_out", "n_live"), [(24, 40, 96), (130, 257, 9000), (16, 16, 256), (5, 150, 3)])
@pytest.mark.parametrize(
    "batch", [(), (1,), (83,), (3, 1), (2, 15), (3, 64), (2, 65), (3, 96), (2, 130), (1, 600), (2, 3, 17)], ids=str
)
def test_it_gives_what_torch_gives(
    batch: tuple[int, ...], fan_in: int, fan_out: int, n_live: int, by_feature: bool, bias: bool, dtype: torch.dtype
) -> None:
    layer = layer_of(fan_in, fan_out, n_live, dtype, bias=bias, feature_major=by_feature)
    turned = by_feature and len(batch) == 2
    x = normal((*batch, fan_in), dtype, 1, turned)
    grad = normal((*batch, fan_out), dtype, 2, turned) + 1  # sums that do not cancel
    got, want = results(layer, x, grad, True), results(layer, x, grad, False)
    assert_near(got, want, TOLERANCE[dtype])
    if turned and not MIN_TILE_TOKENS <= batch[1] <= MAX_TILE_TOKENS:
        return  # no layer makes such an input
    # a neighbour gets the same memory layout from both, so both transpose as often
    assert [t.is_contiguous() for t in got[:2]] == [t.is_contiguous() for t in want[:2]]


@pytest.mark.compiler
def test_columns_beyond_16_bits_are_read() -> None:
    layer = layer_of(2**15 + 20, 16, 900)
    assert layer.cols.dtype == torch.int32
    x, grad = normal((67, layer.fan_in), torch.float32, 1), normal((67, 16), torch.float32, 2) + 1
    assert_near(results(layer, x, grad, True), results(layer, x, grad, False), 1e-6)


@pytest.mark.compiler
@pytest.mark.parametrize("by_feature", [True, False])
def test_its_gradients_are_the_differences(by_feature: bool) -> None:
    layer = layer_of(7, 9, 25, torch.float64, feature_major=by_feature)
    x = normal((2, 66, 7), torch.float64, 1, by_feature).requires_grad_()
    pattern, bias = (layer.cols, layer.row_starts, layer.col_starts), layer.bias
    assert bias is not None

    def product(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return kernel.kernel_product(x, values, bias, pattern, by_feature)

    assert torch.autograd.gradcheck(product, (x, layer.values, bias), fast_mode=True)


@pytest.mark.compiler
def test_only_what_is_asked_for_is_differentiated() -> None:
    layer = layer_of(30, 20, 100)
    x, grad = normal((70, 30), torch.float32, 1), normal((70, 20), torch.float32, 2)
    _, x_grad, values_grad, bias_grad = results(layer, x, grad, True)
    whole = {"x": x_grad, "values": values_grad, "bias": bias_grad}
    assert layer.bias is not None
    for wanted in whole:
        parts = {"x": x.detach().clone(), "values": layer.values, "bias": layer.bias}
        for name, part in parts.items():
            part.requires_grad_(name == wanted)
        (got,) = torch.autograd.grad(layer(parts["x"]), [parts[wanted]], grad)
        assert torch.equal(got, whole[wanted])


@pytest.mark.compiler
def test_gradients_of_any_memory_layout_are_read() -> None:
    layer = layer_of(30, 20, 100)
    x = normal((4, 70, 60), torch.float32, 1)[..., ::2]
    broadcast = torch.ones(()).expand(4, 70, 20)
    backwards = normal((20, 70, 4), torch.float32, 2).permute(2, 1, 0)
    for grad in (broadcast, backwards):
        assert_near(results(layer, x, grad, True), results(layer, x, grad, False), 1e-6)


@pytest.mark.compiler
def test_parameters_of_any_memory_layout_are_read() -> None:
    layer, x = layer_of(30, 20, 100), normal((70, 30), torch.float32, 1)
    pattern = (layer.cols, layer.row_starts, layer.col_starts)
    values, bias = normal((200,), torch.float32, 2)[::2], normal((40,), torch.float32, 3)[::2]
    got = kernel.kernel_product(x, values, bias, pattern, False)
    assert torch.equal(got, kernel.kernel_product(x, values.clone(), bias.clone(), pattern, False))


@pytest.mark.compiler
def test_what_is_not_finite_stays_with_its_token() -> None:
    layer = layer_of(30, 20, 200)
    x = normal((70, 30), torch.float32, 1)
    want = results(layer, x, normal((70, 20), torch.float32, 2), True)[0]
    x[69] = torch.inf
    got = results(layer, x, normal((70, 20), torch.float32, 2), True)[0]
    assert torch.equal(got[:69], want[:69])
    assert not got[69].isfinite().any()


@pytest.mark.compiler
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("by_feature", [True, False])
def test_bits_do_not_depend_on_threads(dtype: torch.dtype, by_feature: bool) -> None:
    layer = layer_of(300, 520, 30000, dtype, feature_major=by_feature)
    x, grad = normal((3, 333, 300), dtype, 1, by_feature), normal((3, 333, 520), dtype, 2, by_feature)
    assert layer.n_live * 3 * 333 >= kernel._THREADED_PRODUCTS
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 1, 2, 3, 7, 400):
            torch.set_num_threads(threads)
            found.append(results(layer, x, grad, True))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(mine, its) for mine, its in zip(found[0], others, strict=True))


@pytest.mark.compiler
def test_its_gradients_cannot_be_differentiated_again() -> None:
    layer, x = layer_of(30, 20, 100), normal((4, 30), torch.float32, 1).requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), [x], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


def test_the_rest_is_torchs() -> None:
    x, values = torch.ones(3, 4), torch.ones(5)
    assert not kernel_takes(x.bfloat16(), values.bfloat16(), None)
    assert not kernel_takes(x, values.double(), None)
    assert not kernel_takes(x, values, torch.ones(2).double())
    assert not kernel_takes(torch.ones(0, 4), values, None)
    assert not kernel_takes(x.to("meta"), values.to("meta"), None)
    assert choose_kernel("cuda").reason == "device is cuda, not the CPU"
    assert not choose_kernel("cpu", torch.bfloat16).used
    layer = layer_of(4, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


# ---------------------------------------------------------------- where it can be had

ASK = """
import torch
from supar_sweep.sparse.compact import CompactLinear
from supar_sweep.sparse.kernel import choose_kernel
from supar_sweep.sparse.masks import live_positions
from tests.grids import alive, wait_for
choice = choose_kernel("cpu")
layer = CompactLinear(8, 8, 20)
layer.set_pattern(live_positions(1, (8, 8), 20))
torch.nn.init.ones_(layer.values)
y = layer(torch.ones(3, 8))
assert y[0].tolist() == torch.bincount(torch.from_numpy(layer.live().rows), minlength=8).tolist()
assert type(y.grad_fn).__name__ == ("_KernelProductBackward" if choice.used else "_CompactProductBackward")
print(choice.used, choice.reason)
"""


def asking(cache: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that says whether it has the kernel, and uses a layer."""
    return subprocess.Popen(
        [sys.executable, "-c", ASK],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def answer(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert not err
    return out.strip()


@pytest.mark.compiler
def test_processes_that_build_at_once_all_get_it(tmp_path: Path) -> None:
    processes = [asking(tmp_path) for _ in range(3)]
    for process in processes:
        assert answer(process).startswith("True compiled by ")
    (file,) = (tmp_path / "supar-sweep").iterdir()
    before = file.stat().st_mtime_ns
    assert answer(asking(tmp_path)).startswith("True")
    assert file.stat().st_mtime_ns == before  # taken from the cache


@pytest.mark.compiler
@pytest.mark.parametrize("damage", ["cut to 100 bytes", "cut to a half", "a bit flipped"])
def test_a_damaged_kernel_in_the_cache_is_built_anew(damage: str, tmp_path: Path) -> None:
    assert answer(asking(tmp_path)).startswith("True compiled by ")
    (file,) = (tmp_path / "supar-sweep").iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "cut to 100 bytes": whole[:100],
        "cut to a half": whole[:middle],  # loading it is a SIGBUS
        "a bit flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    }
    file.write_bytes(damaged[damage])
    assert answer(asking(tmp_path)).startswith("True compiled by ")
    (built,) = (tmp_path / "supar-sweep").iterdir()
    assert hashlib.sha256(built.read_bytes()).hexdigest().startswith(built.stem.rpartition("-")[2])


def test_without_a_compiler_torch_computes(tmp_path: Path) -> None:
    environment = {"PATH": "", "CXX": ""}
    assert answer(asking(tmp_path, **environment)) == (
        "False no compiled kernel: no C++ compiler: no c++ or g++ or clang++ on PATH"
    )
    assert "no C++ compiler: no none-such" in answer(asking(tmp_path, CXX="none-such"))


def test_without_a_cache_folder_torch_computes(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = answer(asking(tmp_path / "file"))
    assert said.startswith("False no compiled kernel: ")


def test_the_environment_switches_it_off(tmp_path: Path) -> None:
    assert answer(asking(tmp_path, SUPAR_KERNEL="off")) == "False switched off by SUPAR_KERNEL=off"
    assert not (tmp_path / "supar-sweep").exists()


@pytest.mark.usefixtures("fresh")
def test_an_unknown_switch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPAR_KERNEL", "of")
    with pytest.raises(ConfigError, match=r"SUPAR_KERNEL: unknown environment setting.*did you mean 'off'"):
        choose_kernel("cpu")


def compiler_script(folder: Path, text: str) -> str:
    script = folder / "compiler"
    script.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo mine 1.0 && exit\n{text}\n", encoding="utf-8")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "echo 'kernel.cpp:1: error: out of ideas'; exit 1"))
    with pytest.raises(BuildError, match=r"failed: kernel\.cpp:1: error: out of ideas"):
        built_kernel()
    assert not list((tmp_path / "supar-sweep").iterdir())


def test_a_compiler_that_hangs_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler_script(tmp_path, f"sleep 600 & echo $! >> {tmp_path}/children; wait"))
    monkeypatch.setattr(kernel_build, "BUILD_LIMIT_S", 4.0)  # time for its child to begin, on a busy machine too
    with pytest.raises(BuildError, match="took over 4 s"):
        built_kernel()
    (child,) = (tmp_path / "children").read_text(encoding="utf-8").split()
    wait_for(lambda: not alive(int(child)))  # on a busy machine a killed process takes its time to end


def test_a_cache_that_others_may_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler_script(tmp_path, "exit 1"))
    (tmp_path / "supar-sweep").mkdir()
    (tmp_path / "supar-sweep").chmod(0o777)
    with pytest.raises(BuildError, match="others may write to the cache folder"):
        built_kernel()


@pytest.mark.compiler
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("sums[n] += value", "sums[n] -= value"),
        ("places[cols[k]]++];", "k];"),
        ("sums[i] += value", "sums[i] -= value"),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = kernel_build.SOURCE.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source = tmp_path / "kernel.cpp"
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    monkeypatch.setattr(kernel_build, "SOURCE", source)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    choice = choose_kernel("cpu")
    assert not choice.used
    assert choice.reason.startswith("the compiled kernel is wrong here: relative error ")


@pytest.mark.usefixtures("fresh")
def test_a_compiler_that_writes_no_library_leaves_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", compiler_script(tmp_path, 'for target; do :; done; echo junk > "$target"'))
    file, _ = built_kernel()
    choice = choose_kernel("cpu")
    assert not choice.used
    assert str(file) in choice.reason
