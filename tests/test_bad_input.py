"""Bad input from the command line: one clear line, and nothing begun. What a person would type."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from supar_sweep.cli.compose import compose
from supar_sweep.cli.main import COMMANDS
from supar_sweep.cli.settings import CELL_KEYS, OUTPUT, READS
from tests.command_line import CELL, HPARAMS, call, here, refused

__all__ = ["here"]

# -- words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_knows_its_own_sections(command: str) -> None:
    wanted = {*CELL_KEYS, *OUTPUT, *READS[command]}
    if command in ("export", "logs"):  # a record says what cell it is of
        wanted -= {*CELL_KEYS, "hparams_file", "tuned_at"}
    assert set(compose(command)) == wanted


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("tune study.space.lrr={low_log2:-3,high_log2:0}", "study.space.lrr: is no hyperparameter; did you mean 'lr'?"),
        ("tune study.space={}", "study.space: is empty"),
        ("tune study.space.lr=3", "study.space.lr: must be a mapping"),
        ("tune study.space.lr={low_log2:-3}", "study.space.lr.high_log2: is missing"),
        ("tune study.space.lr.low_log2=5", "study.space.lr.low_log2: must be below high_log2 = -3"),
        ("tune study.space.lr.high_log2=inf", "study.space.lr.high_log2: out of range (got inf); allowed: -100 .. 100"),
        ("tune study.name=../x", "study.name: is no name (got '../x'); allowed: a folder name"),
        ("tune study.confirm_seeds=[1,1]", "study.confirm_seeds: must be different seeds (got [1, 1])"),
        ("tune study.confirm_seeds=[-1]", "study.confirm_seeds: must be different seeds (got [-1])"),
        (
            "tune study.confirm_seeds=[]",
            "study.confirm_seeds: is empty, but confirm_top_k = 3 trials are to be rerun (got [])",
        ),
        (
            "tune study.confirm_top_k=0",
            "study.confirm_top_k: reruns no trial, but there are confirm_seeds = [1, 2, 3] for it",
        ),
        ("tune base.width=20", "width: must be a multiple of d_head = 8 (got 20); allowed: 16 or 24"),
        ("tune launcher.procesess=2", "did you mean 'launcher.processes'?"),
        ("tune launcher=slurm launcher.nodes=3", "train.batch_seqs: cannot be shared by 3 processes (got 2)"),
        ("plan launcher=slurm launcher.gpus_per_node=4", "train.batch_seqs: cannot be shared by 4 processes (got 2)"),
        (
            "run launcher=slurm launcher.nodes=2 runtime.cohort=4",
            "runtime.cohort: has no effect where 2 processes train",
        ),
        ("quickstart launcher.procesess=2", "did you mean 'launcher.processes'?"),
        ("quickstart metric=loss", "metric: unknown choice (got 'loss')"),
        ("quickstart base.width=20", "base.width: must be a multiple of d_head = 8 (got 20); allowed: 16 or 24"),
        ("plot +colour=red", "colour: unknown key for plot"),
        ("plan runs_dir=null", "runs_dir: must be a path"),
        ("plan hparams_file=3", "hparams_file: must be a path (got 3)"),
        ("plan model=null", "model: must be one of its options (got 'null'); allowed: gpt, paper"),
        ("plan model=[1]", "model: must be one of its options (got '[1]'); allowed: gpt, paper"),
        ("plan =3", "cannot read the settings"),
        (
            "plan depth=completep",
            "depth_alpha: must be set when depth is completep, and null otherwise (got None); allowed",
        ),
        ("run +study.name=x", "study: unknown key for run"),
        ("run study.space.lr={low_log2:-9,high_log2:-3}", "study: unknown key for run"),
        ("tune experiment.axes.lr=[0.1]", "experiment: unknown key for tune"),
        ("transfer density=0", "density: out of range (got 0.0); allowed: > 0 and <= 1"),
        ("transfer target.density=nan", "target.density: must be a number (got nan)"),
        ("transfer target.widht=16", "did you mean 'target.width'?"),
        ("rules density=1.5", "density: out of range (got 1.5)"),
    ],
)
def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], here: Path, words: str, says: str) -> None:
    word, *rest = words.split()
    assert says in refused(capsys, word, *CELL, *rest)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("tune density=0.25", "density: has no effect on tune"),
        ("tune model.width=64", "model.width: has no effect on tune: the proxy is the base shape, dense (got 64)"),
        ("tune model.n_layer=3", "allowed: 2; base.n_layer sets it"),
        ("tune parameterization=sp", "parameterization: has no effect on tune"),
        ("quickstart density=0.5", "density: has no effect: an axis of the experiment gives its values"),
        ("plan experiment=lr_basins seed=7", "seed: has no effect"),
        ("run experiment=lr_basins hparams.lr=0.1", "allowed: experiment.axes.lr=[...]"),
        ("plan experiment.zipped=[{width:[16,32],n_layer:[1,2]}] model.n_layer=3", "model.n_layer: has no effect"),
        ("transfer seed=1", "seed: has no effect on transfer"),
        ("tune sparsity=rigl", "sparsity: has no effect on tune: the proxy is dense (got 'rigl'); allowed: static"),
        ("plan sparsity=gmp density=1", "sparsity: has no effect at density 1: there is no dead weight (got 'gmp')"),
        ("plan sparsity=set density=0.5 sparsity.start_fraction=0.1", "sparsity.start_fraction: has no effect"),
        ("plan density=0.5 sparsity.dynamic_lr_exponent=0.5", "sparsity.dynamic_lr_exponent: has no effect"),
        (
            "run sparsity=rigl density=0.5 runtime.compute=compact",
            "runtime.compute: cannot be had with sparsity.method",
        ),
        ("transfer model.width=32 target.width=64", "model.width: has no effect: target.width replaces it"),
    ],
)
def test_a_setting_without_effect_is_an_error(
    capsys: pytest.CaptureFixture[str], here: Path, words: str, says: str
) -> None:
    word, *rest = words.split()
    assert says in refused(capsys, word, *CELL, *rest)
    assert list(here.iterdir()) == []


def test_what_a_grid_does_read_may_be_typed_beside_its_axes(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    around = "experiment.axes.lr={mult_log2: [-1, 1]}"
    for words in (
        (around, "hparams.lr=0.01"),
        ("experiment=lr_basins", "hparams.init_std=0.1"),
        ("experiment.axes.density=[1]", "seed=3"),
    ):
        code, _, err = call(capsys, "plan", *CELL, "model.width=16", *words)
        assert code == 0, err


def test_a_space_that_is_typed_replaces_the_studys(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    # merged, it would search four hyperparameters where one was asked for
    space = "study.space={lr: {low_log2: -9, high_log2: -5}}"
    code, out, _ = call(capsys, "tune", space, "--cfg", "job", "--package", "study.space")
    assert code == 0
    assert yaml.safe_load(out) == {"lr": {"low_log2": -9, "high_log2": -5}}


# -- files of settings -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("modle: {width: 3}", "modle: unknown key for plan; did you mean 'model'?"),
        ("model: {widht: 3}", "model.widht: unknown key; did you mean 'width'?"),
        ("experiment: {axis: {}}", "experiment.axis: unknown key; did you mean 'axes'?"),
        ("experiment: [", "mine.yaml"),
    ],
)
def test_a_wrong_experiment_file(capsys: pytest.CaptureFixture[str], here: Path, text: str, says: str) -> None:
    (here / "experiment").mkdir()
    (here / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert says in refused(capsys, "plan", "-cd", str(here), "experiment=mine")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hparams: {lr: 0.01}\n", "hparams.init_std: is missing"),
        (b"hparams: [\n", "hparams: cannot read"),
        (b"\xff\xfe", "hparams: cannot read"),
        ((HPARAMS + "lineage: 3\n").encode(), "lineage: must be a mapping"),
        ((HPARAMS + "lineage: {proxy: 3}\n").encode(), "lineage.proxy: must be a mapping"),
        ((HPARAMS + "base: {width: 0, n_layer: 1}\n").encode(), "base.width: must be at least 1"),
    ],
)
def test_a_wrong_hparams_file(capsys: pytest.CaptureFixture[str], here: Path, content: bytes, says: str) -> None:
    (here / "best.yaml").write_bytes(content)
    for word in ("transfer", "plan", "tune"):
        assert says in refused(capsys, word, "hparams=best.yaml")


# -- data ------------------------------------------------------------------------------------------

TEXT = ("data=text", "data.paths=[corpus.txt]")
TOKENS = ("data=tokens", "data.train_path=corpus.txt", "data.val_path=corpus.txt")


@pytest.mark.parametrize(
    ("data", "content", "says"),
    [
        (TEXT, None, "data.paths: no such file"),
        (TEXT, b"", "corpus.txt is empty"),
        (TEXT, b"x" * 34, "data.name=text: the training part has 32 tokens, less than one batch"),
        (TEXT, b"x" * 400, "data.name=text: the held-out part has 20 tokens, less than one evaluation"),
        (TOKENS, None, "data.train_path: cannot read"),
        (TOKENS, b"", "data.train_path: "),
        (TOKENS, b"x" * 3, "an odd number: not a file of uint16"),
        (("train.batch_seqs=10000000",), None, "train.batch_seqs * model.context_tokens + 1 = 160,000,001"),
    ],
)
def test_data_that_cannot_serve_stops_every_command_before_it_begins(
    capsys: pytest.CaptureFixture[str], here: Path, data: tuple[str, ...], content: bytes | None, says: str
) -> None:
    if content is not None:
        (here / "corpus.txt").write_bytes(content)
    for word in ("plan", "run", "tune", "quickstart"):
        assert says in refused(capsys, word, *CELL, *data)
    assert not (here / "runs").exists()
