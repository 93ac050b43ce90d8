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
        (
            "tune study.space.lrr={low_log2:-3,high_log2:0}",
            "study.space.lrr: is not a hyperparameter; did you mean 'lr'?",
        ),
        ("tune study.space={}", "study.space: is empty"),
        ("tune study.space.lr=3", "study.space.lr: must be a mapping"),
        ("tune study.space.lr={low_log2:-3}", "study.space.lr.high_log2: is missing"),
        ("tune study.space.lr.low_log2=5", "study.space.lr.low_log2: must be below high_log2 = -3"),
        ("tune study.space.lr.high_log2=inf", "study.space.lr.high_log2: out of range (got inf); allowed: -100 .. 100"),
        ("tune study.name=../x", "study.name: cannot be the name of a folder (got '../x')"),
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


def test_an_experiment_file_without_its_first_line(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "experiment").mkdir()
    (here / "experiment" / "mine.yaml").write_text("model: {width: 64}\n")
    said = refused(capsys, "plan", "-cd", str(here), "experiment=mine")
    assert "experiment.model: is a section of its own" in said
    assert "# @package _global_" in said


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


# -- bounds, before anything is enumerated ---------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan experiment.axes.lr={log2:[-9,-3],step:1e-9}", "experiment.axes.lr: has too many values"),
        ("plan experiment.axes.lr={mult_log2:[-9,-3],step:1e-9}", "experiment.axes.lr: has too many values"),
        ("plan experiment.axes.lr={log2:[-9,2000],step:1}", "experiment.axes.lr: reaches beyond"),
        ("plan experiment.axes.lr={log2:[-1e6,1e6],step:1}", "allowed: octaves from -100 to 100"),
        (
            "plan experiment.axes.lr={log2:[-9,-3],step:0.001} experiment.axes.init_std={log2:[-9,-3],step:0.1}",
            # 6 / 0.001 + 1 values times 6 / 0.1 + 1
            "experiment.axes: make 366,061 cells (6,001 of lr x 61 of init_std); allowed: up to 100,000",
        ),
        ("plan model.n_layer=1000000", "model.n_layer: out of range (got 1000000); allowed: >= 1 and <= 10000"),
        ("plan base.width=1e308", "base.width: out of range"),
        ("plan base.n_layer=1e308", "base.n_layer: out of range"),
        ("plan train.steps=1e308", "train.steps: out of range"),
        (
            "plan experiment.plot={figure:pareot}",
            "experiment.plot.figure: no such figure (got 'pareot'); did you mean 'pareto'?",
        ),
        ("plan train.steps=1e308", "... (309 characters)); allowed: >= 1"),
        ("plan train.steps=99999999999999999999999", "train.steps: out of range"),
        ("plan model.ffn_mult=1e23", "model.ffn_mult: out of range (got 1e+23); allowed: > 0 and <= 1000"),
        ("plan runtime.threads=1e308", "runtime.threads: out of range"),
        ("plan runtime.checkpoint_every_s=1e308", "runtime.checkpoint_every_s: out of range"),
        (
            "plan hparams.lr=1e308",
            "hparams.lr: out of range (got 1e+308); allowed: 7.9e-31 .. 1.3e+30 (2^-100 .. 2^100)",
        ),
        ("plan hparams.init_std=1e-320", "hparams.init_std: out of range"),
        ("plan hparams.weight_decay=1e308", "hparams.weight_decay: out of range"),
        ("plan optimizer.eps=1e-320", "optimizer.eps: out of range"),
        ("rules model.width=1000000 model.n_layer=10000", "model: has 1.2e+17 parameters, which are more than fit"),
        ("rules base.width=1e308", "base.width: out of range"),
        ("tune study.n_trials=1e308", "study.n_trials: out of range"),
    ],
)
def test_what_is_too_much_is_refused_at_once(
    capsys: pytest.CaptureFixture[str], here: Path, words: str, says: str
) -> None:
    word, *rest = words.split()
    assert says in refused(capsys, word, *CELL, *rest)


def test_dependent_axes_count_by_the_values_that_they_have_where(
    capsys: pytest.CaptureFixture[str], here: Path
) -> None:
    words = (
        "experiment.axes.density=[1,0.5]",
        "experiment.axes.lr={log2: [-9, -3], step: 0.001}",
        "experiment.by={density: {1.0: {init_std: {log2: [-9, -3], step: 0.5}}, 0.5: {init_std: [0.1]}}}",
    )
    # (6 / 0.5 + 1) + 1 of density with its init_std, times 6001 of lr: 84,014 are allowed
    code, _, err = call(capsys, "transfer", *CELL)
    assert code == 0, err
    says = refused(capsys, "plan", *CELL, *words, "experiment.axes.seed=[0,1]")
    assert f"experiment.axes: make {14 * 6001 * 2:,} cells (14 of density x 6,001 of lr x 2 of seed)" in says


# -- a wrong value by its own name, though others are computed from it ----------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan train.steps=abc", "train.steps: must be an integer (got 'abc')"),
        ("plan train.steps=[1,2]", "train.steps: must be an integer (got [1, 2])"),
        ("plan train.steps=null", "train.steps: must be an integer (got None)"),
        ("plan train.steps=nan", "train.steps: must be an integer (got nan)"),
        ("tune base=null", "model.width: cannot be worked out: "),
        ("plan hparams.lr=${hparams.lr}", "hparams.lr: cannot be worked out: Recursive interpolation detected"),
        ("plan model.width=${no.such}", "model.width: cannot be worked out: Interpolation key 'no.such' not found"),
        ("plan scales=3", "scales: must map each scale"),
        ("plan experiment.plot=3", "experiment.plot: must be a mapping"),
        ("plan experiment.plot=abc", "experiment.plot: must be a mapping"),
        ("plan tuned_at=3", "tuned_at: must map what is known of the proxy"),
        ("plan launcher=[]", "launcher: is missing, and the command reads it; allowed: dev_cluster, local, slurm"),
        ("plan runtime=[]", "runtime: is missing"),
        ("plan ~launcher", "launcher: is missing"),
        ("quickstart ~figure", "figure: is missing"),
        ("plan model=3", "model: must be one of its options (got '3'); allowed: gpt, paper"),
        ("plan scale=0", "scale: must be one of its options (got '0'); allowed: cpu, gpu1, paper"),
        ("plan +model.width=3", "model.width: is there already; allowed: model.width=..., without the +"),
        ("plan +model=paper", "model: has an option already"),
        ("plan ~model.widht", "model.widht: unknown key for plan; did you mean 'model.width'?"),
        ("plan ~model", "model: is missing, and the command reads it; allowed: gpt, paper"),
        ("plan tuned_at.bias=[1] hparams=cpu", "tuned_at.bias: must be one value (got [1])"),
        ("export checkpoint=x to=''", "to: must be a path (got '')"),
        (
            "plan optimizer=sgd optimizer.beta1=0.9",
            "optimizer.beta1: is not a setting of optimizer=sgd; optimizer=adamw has it; allowed: optimizer.name, ",
        ),
        ("plan launcher=slurm launcher.processes=3", "is not a setting of launcher=slurm; launcher=local has it"),
        ("plan launcher=slurm launcher.name=local", "launcher.name: does not go with the launcher's other settings"),
        ("plan hparams.lr.more=3", "hparams.lr.more: unknown key for plan: hparams.lr is a value, not a section"),
        ("plan hparams.lr=range(1,3)", "several are an axis: experiment.axes.hparams.lr=[...]"),
        ("plan hparams_file=''", "hparams_file: must be a path (got '')"),
        ("plan runs_dir=''", "runs_dir: must be a path (got '')"),
        ("plan runs_dir=~no-such-user/x", "runs_dir: names the home of a user who does not exist"),
        (f"plan experiment.name={300 * 'x'}", "experiment.name: is too long: 300 bytes (got 'xxxx"),
        (f"plan runs_dir={300 * 'y'}", "runs_dir: is too long: 300 bytes"),
        (
            "plan --config-dir=/no-such-folder",
            "--config-dir: is not a folder (got '/no-such-folder'); allowed: a folder",
        ),
        ("plan --config-name=nope", "--config-name: is set by the command (got 'nope'); allowed: leave it out"),
        ("plan train.target=''", "train.target: is not a dotted path of a function (got '')"),
        ("plan train.target=abc", "train.target: is not a dotted path of a function (got 'abc')"),
        ("plan train.target=no_such_module.train", "train.target: cannot be found (got 'no_such_module.train')"),
        (
            "transfer target.width=4",
            "target.width: must be a multiple of d_head = 32 (got 4); allowed: 32, or a multiple",
        ),
        ("transfer target.density=1e-300", "density: leaves layer"),
        ("run experiment=lr_basins scale=cpu", "hparams=cpu train=short"),
    ],
)
def test_the_error_names_what_was_typed(capsys: pytest.CaptureFixture[str], here: Path, words: str, says: str) -> None:
    word, *rest = words.split()
    assert says in refused(capsys, word, *rest)


@pytest.mark.parametrize("name", ["a\nb", "a\0b", "a\x1bb"])
def test_a_name_has_no_control_characters(capsys: pytest.CaptureFixture[str], here: Path, name: str) -> None:
    assert "experiment.name: cannot be the name of a folder" in refused(capsys, "plan", f"experiment.name='{name}'")
    assert "runs_dir: must be a path without line breaks" in refused(capsys, "plan", f"runs_dir='{name}'")


def test_the_words_that_stand_for_a_scale_make_its_cell(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    from supar_sweep.cli.settings import Settings

    said = refused(capsys, "run", "experiment=lr_basins", "scale=cpu")
    words = tuple(said.partition("write what you want of it: ")[2].split())
    made, of_scale = (Settings.read("plan", compose("plan", typed), typed).cell() for typed in (words, ("scale=cpu",)))
    # but for what it computes from other settings
    assert (made.model, made.hparams, made.base, made.train.steps) == (
        of_scale.model,
        of_scale.hparams,
        of_scale.base,
        of_scale.train.steps,
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "plan train.eval_every_steps=5",
            "train.eval_every_steps: has no effect: no run has more than 4 steps (got 5)",
        ),
        (
            "plan runtime.checkpoint_every_steps=5",
            "runtime.checkpoint_every_steps: has no effect: no run has more than 4",
        ),
        ("plan runtime.compute=compact", "runtime.compute: has no effect at density 1"),
        ("tune runtime.compute=compact", "runtime.compute: has no effect at density 1"),
    ],
)
def test_what_no_run_comes_to_has_no_effect(
    capsys: pytest.CaptureFixture[str], here: Path, words: str, says: str
) -> None:
    word, *rest = words.split()
    assert says in refused(capsys, word, *CELL, *rest)


@pytest.mark.parametrize(
    "words",
    [
        "train.eval_every_steps=4",
        "train=paper",  # its own 100 is more than the 4 steps that were typed
        "experiment.axes.train.steps=[2,8] train.eval_every_steps=5 train.summary_last_steps=1 schedule=constant",
        "train.divergence_patience_steps=1000",  # never
        "runtime.compute=compact experiment.axes.density=[1,0.5]",
    ],
)
def test_what_some_run_comes_to_may_be_typed(capsys: pytest.CaptureFixture[str], here: Path, words: str) -> None:
    cell = [word for word in CELL if not word.startswith("train.steps")] if "train.steps" in words else CELL
    code, _, err = call(capsys, "plan", *cell, "model.width=16", *words.split())
    assert code == 0, err


@pytest.mark.parametrize(
    ("words", "warned"), [("", False), ("optimizer=sgd", True), ("optimizer=sgd hparams.lr=1", False)]
)
def test_a_tuned_lr_is_one_of_its_optimizer(
    capsys: pytest.CaptureFixture[str], here: Path, words: str, warned: bool
) -> None:
    code, _, err = call(capsys, "plan", "hparams=paper", *words.split())
    assert code == 0, err
    assert ("warning: the hyperparameters were tuned with adamw" in err) == warned
