"""export: a trained cell -> a model folder -> transformers, and lm-evaluation-harness: the same numbers, without a network."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from supar_sweep.config.decode import decode
from supar_sweep.config.schema import CellConfig
from supar_sweep.errors import CheckpointError, ConfigError
from supar_sweep.training import export as export_module
from supar_sweep.training import model as gpt
from supar_sweep.training.corpus import load_corpus
from supar_sweep.training.data import val_batches
from supar_sweep.training.export import LARGEST_ERROR, MARK, Exported, export_checkpoint
from supar_sweep.training.hf_classes import hf_model
from supar_sweep.training.restore import find_checkpoints, read_trained
from supar_sweep.training.run_cell import run_cell
from tests.command_line import GRID, call, here, only_cell, refused
from tests.test_model import VARIANTS
from tests.tiny import folder_of, result_of, tiny_job

__all__ = ["here"]  # a fixture

LAST_KEPT = {"checkpoint_every_steps": 6, "keep_checkpoints": True}
FACTORS = {"hparams.alpha_in": 3.0, "hparams.alpha_out": 2.0}
COMPLETEP = {"depth": "completep", "depth_alpha": 0.75, "base.n_layer": 1}


def trained(store: Path, **overrides: Any) -> Any:
    """The job of a cell that was trained, its checkpoints kept."""
    job = tiny_job(store, runtime=LAST_KEPT, **{**FACTORS, **overrides})
    assert run_cell(job) == "done"
    return job


def exported(job: Any, to: Path) -> Exported:
    return export_checkpoint(folder_of(job).path, to, exports=to)


def as_trained(job: Any) -> Any:
    """The model as a resumed run would have it: built by the rules, loaded from the newest file."""
    model, _ = gpt.build(decode(CellConfig, job["cell"]))
    newest = max((folder_of(job).path / "checkpoints").glob("*.pt"))
    model.load_state_dict(torch.load(newest, weights_only=True)["state"]["model"])
    return model


def from_folder(folder: Path, *, shipped: bool) -> Any:
    from transformers import AutoModelForCausalLM

    # a stock class must do without the folder's code
    return AutoModelForCausalLM.from_pretrained(str(folder), trust_remote_code=shipped, local_files_only=True).eval()


def some_tokens(n_tokens: int = 16) -> torch.Tensor:
    return torch.randint(256, (3, n_tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No call may leave this machine."""
    import socket

    def refuse(*_: Any) -> None:
        raise AssertionError("a network call")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---------------------------------------------------------------- the round trip


@pytest.mark.hf
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_transformers_computes_the_trained_models_logits_and_loss(variant: dict[str, Any], tmp_path: Path) -> None:
    job = trained(tmp_path / "cells", **variant, **COMPLETEP)
    written = exported(job, tmp_path / "model")
    stock = variant["model.activation"] == "gelu" and (
        variant["model.position"] == "learned" or not variant["model.bias"]
    )
    assert written.has_code != stock
    assert {p.name for p in written.folder.glob("*.py")} == (
        set() if stock else {"modeling_supar.py", "decoder_supar.py"}
    )
    theirs, ours = from_folder(written.folder, shipped=not stock), as_trained(job)
    assert type(theirs).__name__ == written.architecture
    with torch.no_grad():
        torch.testing.assert_close(theirs(some_tokens()).logits, ours(some_tokens()), rtol=1e-4, atol=1e-5)
        cell = decode(CellConfig, job["cell"])
        losses = [
            F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten())
            for x, y in val_batches(load_corpus(cell.data), eval_seqs=8, context_tokens=16, batch_seqs=4)
        ]
    assert math.isclose(float(torch.stack(losses).mean()), result_of(job)["summary"]["val_loss"], rel_tol=1e-5)
    assert written.logits_error < LARGEST_ERROR
    assert written.params == sum(p.numel() for p in ours.parameters())
    assert sum(p.numel() for p in theirs.parameters()) >= written.params  # GPT-2 has biases, of zeros


@pytest.mark.hf
@pytest.mark.parametrize(
    "overrides",
    [
        {"parameterization": "sp"},
        {"parameterization": "mup", "density": 1.0},
        {"layer_density": "er", "density": 0.125},
        {"train.precision": "float64"},
        {"train.precision": "bfloat16"},
    ],
    ids=str,
)
def test_every_method_and_precision(overrides: dict[str, Any], tmp_path: Path) -> None:
    job = trained(tmp_path / "cells", **overrides)
    written = exported(job, tmp_path / "model")
    theirs, ours = from_folder(written.folder, shipped=False), as_trained(job)
    with torch.no_grad():
        found, wanted = theirs(some_tokens()).logits, ours(some_tokens())
    torch.testing.assert_close(found.double(), wanted.double(), rtol=1e-4, atol=1e-5)
    config = json.loads((written.folder / "config.json").read_text())
    assert config["torch_dtype"] == ("float64" if overrides.get("train.precision") == "float64" else "float32")
    wanted_density = result_of(job)["m_rho"]
    assert written.density == config[MARK]["density"] == pytest.approx(wanted_density)
    zeros = sum(int((p == 0).sum()) for n, p in theirs.named_parameters() if ".attn." in n or ".mlp." in n)
    dead = sum(math.prod(row["shape"]) - row["live"] for row in result_of(job)["layers"])
    biases = sum(p.numel() for n, p in theirs.named_parameters() if n.endswith("bias") and "ln_" not in n)
    assert zeros == dead + biases


@pytest.mark.hf
def test_a_compact_cell_is_exported_as_its_masked_twin(tmp_path: Path) -> None:
    job = tiny_job(tmp_path / "cells", runtime={**LAST_KEPT, "compute": "compact"}, density=0.25)
    assert run_cell(job) == "done"
    written = exported(job, tmp_path / "model")
    trained_model = read_trained(find_checkpoints(folder_of(job).path)).model
    with torch.no_grad():
        found, wanted = from_folder(written.folder, shipped=False)(some_tokens()).logits, trained_model(some_tokens())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert written.density == 0.25


@pytest.mark.hf
def test_the_tokenizer_is_the_bytes(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    written = exported(trained(tmp_path / "cells"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(str(written.folder), local_files_only=True)
    text = "def f(x):\r\n\treturn  1 <s> </s> <unk> \u00e9\u0100\u010a \U0001f600"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 256
    assert tokenizer.model_max_length == 16
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0


@pytest.mark.hf
@pytest.mark.parametrize("shipped", [False, True])
def test_generation_continues_as_the_logits_say(shipped: bool, tmp_path: Path) -> None:
    job = trained(tmp_path / "cells", **{"model.activation": "swiglu" if shipped else "gelu"})
    model = from_folder(exported(job, tmp_path / "model").folder, shipped=shipped)
    start = some_tokens(4)[:1]
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found = model.generate(start, attention_mask=torch.ones_like(start), **settings)
    wanted = start
    with torch.no_grad():
        for _ in range(5):
            wanted = torch.cat((wanted, as_trained(job)(wanted)[:, -1:].argmax(-1)), 1)
    assert torch.equal(found, wanted)


@pytest.mark.hf
def test_an_export_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = trained(tmp_path / "cells")
    real = hf_model

    def other_gelu(*args: Any) -> Any:
        found = real(*args)
        return type(found)(
            architecture=found.architecture,
            config={**found.config, "activation_function": "gelu_new"},
            weights=found.weights,
        )

    first = exported(job, tmp_path / "model")
    before = (first.folder / "config.json").read_text()
    monkeypatch.setattr(export_module, "hf_model", other_gelu)
    with pytest.raises(CheckpointError, match="computes other logits"):
        exported(job, tmp_path / "model")
    assert (first.folder / "config.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.hf
def test_a_class_that_does_not_load_is_named_with_its_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    job = trained(tmp_path / "cells")
    monkeypatch.delattr(transformers.GPT2LMHeadModel, "forward")
    with pytest.raises(CheckpointError, match=f"transformers {re.escape(transformers.__version__)} cannot use"):
        exported(job, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["cells"]


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = trained(tmp_path / "cells")
    real = read_trained

    def broken(files: Any) -> Any:
        found = real(files)
        with torch.no_grad():
            found.model.norm.weight.fill_(math.nan)
        return found

    monkeypatch.setattr(export_module, "find_spec", lambda name: object())
    monkeypatch.setattr(export_module, "read_trained", broken)
    with pytest.raises(CheckpointError, match="no numbers"):
        exported(job, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["cells"]


@pytest.mark.hf
def test_the_config_says_where_the_model_comes_from_and_holds_no_path(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    data = {"name": "text", "paths": [str(text)], "val_fraction": 0.1}
    job = trained(tmp_path / "cells", **{"data": data})
    written = exported(job, tmp_path / "model")
    config = (written.folder / "config.json").read_text()
    origin = json.loads(config)[MARK]
    assert str(tmp_path) not in config
    assert len({path.stat().st_mode for path in written.folder.iterdir()}) == 1
    assert origin["cell_id"] == job["cell_id"]
    assert origin["step"] == written.step == 12
    assert origin["summary"] == result_of(job)["summary"]
    assert origin["corpus_fingerprint"] == job["fingerprint"]
    assert origin["folded_multipliers"]["embedding_output"] == 3.0
    assert origin["folded_multipliers"]["logits"] == 2.0 / (32 / 16)


# ---------------------------------------------------------------- lm-evaluation-harness


@pytest.mark.lm_eval
@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [VARIANTS[0], VARIANTS[-1], VARIANTS[10]], ids=lambda v: "-".join(map(str, v.values()))
)
def test_the_harness_scores_as_the_trained_model_does(
    variant: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import lm_eval
    from lm_eval.tasks import TaskManager

    job = trained(tmp_path / "cells", **variant)
    written = exported(job, tmp_path / "model")
    rows: list[dict[str, Any]] = [
        {"question": "import", "choices": [" os", " zzz"], "answer": 0},
        {"question": "def f", "choices": ["(x):", "QQQQQ"], "answer": 1},
        {"question": "return", "choices": [" None", "\x7f\x7f"], "answer": 0},
    ]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "choice.yaml").write_text(
        f"""task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.json"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
    )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={written.folder},dtype=float32,trust_remote_code={written.has_code}",
        tasks=["choice"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        device="cpu",
        batch_size=2,
        bootstrap_iters=0,
    )
    wanted = [[_score(as_trained(job), row["question"], choice) for choice in row["choices"]] for row in rows]
    samples = sorted(found["samples"]["choice"], key=lambda sample: sample["doc_id"])
    for sample, scores in zip(samples, wanted, strict=True):
        told = [float(answer[0][0]) for answer in sample["resps"]]
        assert told == pytest.approx(scores, rel=1e-4)
    right = [max(range(2), key=scores.__getitem__) == row["answer"] for row, scores in zip(rows, wanted, strict=True)]
    assert found["results"]["choice"]["acc,none"] == pytest.approx(sum(right) / 3)


def _score(model: Any, question: str, choice: str) -> float:
    """The log-likelihood of a choice after a question, in nats."""
    before, after = question.encode(), choice.encode()
    tokens = torch.tensor([list(before + after)])
    with torch.no_grad():
        logp = model(tokens[:, :-1]).log_softmax(-1)[0]
    return float(sum(logp[len(before) - 1 + i, byte] for i, byte in enumerate(after)))


# ---------------------------------------------------------------- what is refused, and what is said


def test_a_complete_cell_without_a_checkpoint_says_how_to_keep_one(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(capsys, "run", *GRID)[0] == 0
    err = refused(capsys, "export", f"checkpoint={only_cell().path}")
    assert "move its folder away" in err
    assert "runtime.keep_checkpoints=true" in err
    shutil.rmtree("runs")
    assert call(capsys, "run", *GRID, "runtime.keep_checkpoints=true")[0] == 0
    assert read_trained(find_checkpoints(only_cell().path)).warnings == ()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "checkpoint: must be set"),
        (["checkpoint=null"], "checkpoint: must be set"),
        (["checkpoint=lr2^-7"], "checkpoint: is not there"),
        (["checkpoint=nowhere"], "checkpoint: is not there"),
        (["checkpoint=."], "checkpoint: is of no cell"),
        (["chekpoint=x"], "did you mean 'checkpoint'?"),
        (["checkpoint=x", "model.width=64"], "model.width: unknown key for export"),
    ],
)
def test_wrong_requests_are_refused(
    words: list[str], says: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(capsys, "export", *words)
    assert list(here.iterdir()) == []


def test_what_is_no_export_is_not_replaced(tmp_path: Path) -> None:
    job = trained(tmp_path / "cells")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds no export"):
        exported(job, mine)
    assert [p.name for p in mine.iterdir()] == ["config.json"]
    with pytest.raises(ConfigError, match="holds no export"):
        exported(job, mine / "config.json")


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = trained(tmp_path / "cells")
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == "safetensors" else object())
    with pytest.raises(ConfigError, match="without safetensors") as refusal:
        exported(job, tmp_path / "model")
    assert "supar-sweep[hf]" in str(refusal.value)
    assert not (tmp_path / "model").exists()


@pytest.mark.hf
def test_the_command_writes_below_runs_and_says_how_to_evaluate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("model.activation=swiglu", "density=0.5", "runtime.keep_checkpoints=true")
    assert call(capsys, "run", *GRID, *words)[0] == 0
    for _ in range(2):  # again: the same export takes the place of the first
        code, out, err = call(capsys, "export", f"checkpoint={only_cell().path}", "format=json")
        assert code == 0, err
        (row,) = json.loads(out)
        assert Path(row["folder"]).parent == here / "runs" / "exports"
        assert Path(row["folder"]).name.isidentifier()
        assert only_cell().cell_id in row["folder"]
        assert (row["class"], row["tokenizer"], row["density"], row["step"]) == ("SuparForCausalLM", "bytes", 0.5, 4)
        assert "trust_remote_code=True" in err
        assert "--tasks arc_easy,lambada_openai,race,piqa,boolq" in err
        assert "dead weights as zeros" in err
    assert list((here / "runs" / "exports").iterdir()) == [Path(row["folder"])]


@pytest.mark.hf
def test_token_files_have_no_tokenizer_and_the_command_says_so(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np

    for name, seed in (("train", 0), ("val", 1)):
        np.random.default_rng(seed).integers(300, size=3000).astype("<u2").tofile(f"{name}.bin")
    data = ("data=tokens", "data.train_path=train.bin", "data.val_path=val.bin", "data.vocab_size=300")
    assert call(capsys, "run", *GRID, *data, "runtime.keep_checkpoints=true")[0] == 0
    code, out, err = call(capsys, "export", f"checkpoint={only_cell().path}", "to=model", "format=json")
    assert code == 0, err
    assert json.loads(out)[0]["tokenizer"] is None
    assert "no tokenizer: the corpus was token files" in err
    assert "tokenizer=" in err
    assert sorted(p.name for p in Path("model").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads(Path("model/config.json").read_text())["vocab_size"] == 300
