"""The command line: output, and errors of one line."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import datasets
import huggingface_hub
import pytest
import torch
import transformers
from rich.console import Console

import llava_sparse
from llava_sparse import cli, evaluation, preparation, progress
from llava_sparse.evaluation import plan_runs, split_methods
from llava_sparse.reference import CHECKPOINT, SCENES

PICTURE = str(SCENES / "images" / "scene_000001.jpg")
BUDGET = (
    "`sparse_budget` must be an int in [1, 576], the visual tokens of one image, or a float in (0, 1], a ratio of them"
)
RATERS = "`sparse_options`: 'raters' must be one of 'selected', 'text', 'all', got 'any'."


@pytest.fixture(autouse=True)
def _process_as_before():
    modules = [library.utils.logging for library in (transformers, huggingface_hub, datasets)]
    threads = torch.get_num_threads()
    levels = [module.get_verbosity() for module in modules]
    yield
    for module, level in zip(modules, levels, strict=True):
        module.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, stdout and stderr."""

    def runner(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        return exit.value.code, *capsys.readouterr()

    return runner


@pytest.mark.parametrize("command", [[], ["pope"], ["bench"], ["ask"], ["methods"]])
def test_help_has_an_example(run, command):
    code, out, _ = run(*command, "--help")
    assert code == 0
    assert f"Example: llava-sparse {' '.join(command)}" in out


def test_progress_in_a_file_tells_how_long_it_takes(monkeypatch):
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress, "monotonic", lambda: now[0])
    with progress.Advance(Console(file=out), True, unit="questions") as advance:
        for done, time in ((20, 5), (30, 15), (40, 45), (44, 50), (400, 500), (620, 600)):
            now[0] = time
            advance("visionzip@64", done, 620)
    assert out.getvalue().splitlines() == [
        "visionzip@64: 20 of 620 questions",
        "visionzip@64: 40 of 620 questions, about 19 minutes left",
        "visionzip@64: 400 of 620 questions, about 5 minutes left",
        "visionzip@64: 620 of 620 questions",
    ]


def test_methods(run):
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    for text in ("visionzip", "encoder", "decoder", "version='1.5'", "arXiv 2412.04467", "arXiv 2410.04417"):
        assert text in out


@pytest.mark.parametrize("method", ["dense", "visionzip", "sparsevlm"])
def test_ask(run, method):
    for thing, answer in (("dog", "Yes"), ("pizza", "No")):
        arguments = ("ask", PICTURE, f"Is there a {thing} in the image?", "--method", method)
        code, out, err = run(*arguments)
        assert (code, out) == (0, f"{answer}\n")
        assert "the small reference model answers. It knows rendered scenes alone" in err
        assert "576" in err and ("→" in err) == (method != "dense")
    assert run(*arguments, "--model", CHECKPOINT)[2].startswith(f"{method}: 576")


def test_ask_about_several_pictures_in_words_of_ones_own(run):
    given = ("ask", PICTURE, PICTURE, "Is there a dog in the image?", "--model", CHECKPOINT, "--method", "dense")
    code, _, err = run(*given, "--prompt", "<image><image> {question} ASSISTANT:")
    assert (code, err) == (0, "dense: 1152 visual tokens\n")
    for prompt, message in (("<image>", "{question} has to be in it once"), ("{question}", "in it once or 2 times")):
        code, _, err = run(*given, "--prompt", prompt)
        assert code == 1 and message in err
    code, _, err = run(*given, "--video")
    assert code == 1 and "2 files are given; one video" in err


def test_version_and_help_without_a_word(run):
    assert run("--version") == (0, f"llava-sparse {llava_sparse.__version__}\n", "")
    code, out, err = run()
    assert (code, err) == (0, "") and "Usage: llava-sparse" in out


def test_pope(run, tmp_path):
    output = tmp_path / "results.json"
    arguments = ("--methods", "dense,visionzip", "--budget", 32, "--limit", 4, "--batch-size", 6, "--output", output)
    code, out, err = run("pope", *arguments)
    assert code == 0
    for text in ("method", "visual tokens", "F1", "yes ratio", "questions/s", "random", "adversarial", "average"):
        assert text in out
    assert "Questions scored: random 4, popular 4, adversarial 4." in out
    assert str(output) in err
    results = json.loads(output.read_text())
    assert [entry["method"] for entry in results["methods"]] == ["dense", "visionzip"]
    assert (results["settings"]["limit"], results["settings"]["batch_size"]) == (4, 6)
    assert results["methods"][1]["visual_tokens"] == 32


def test_pope_on_a_folder(run):
    code, out, _ = run("pope", "--dataset", SCENES, "--model", CHECKPOINT, "--methods", "visionzip", "--limit", 2)
    assert code == 0
    assert "visionzip" in out


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["pope", "--methods", "dense,vision-zip"], 1, "'vision-zip' is unknown (did you mean 'visionzip'?)"),
        (["pope", "--budget", "0", "--limit", "1"], 1, f"{BUDGET}, got 0."),
        (["pope", "--budget", "0.0", "--limit", "1"], 1, f"{BUDGET}, got 0.0."),
        (["pope", "--budget", "1.5", "--limit", "1"], 1, f"{BUDGET}, got 1.5."),
        (["pope", "--budgets", "0.5,0.50", "--limit", "1"], 1, "visionzip@0.5 is there 2 times"),
        (["pope", "--budget", "many"], 2, "Invalid value for '--budget'"),
        (["pope", "--budgets", "64,"], 2, "'64,': whole numbers or ratios (0.25), separated by commas, are allowed"),
        (["pope", "--seeds", "x"], 2, "Invalid value for '--seeds'"),
        (["pope", "--budgets", "64,64", "--limit", "1"], 1, "visionzip@64 is there 2 times"),
        (["pope", "--methods", "sparsevlm:rater=all"], 1, "'rater=all' is no option (did you mean 'raters'?)"),
        (["pope", "--methods", "sparsevlm:raters=any", "--limit", "1"], 1, RATERS),
        (["pope", "--answer-mode", "logit"], 1, "answer_mode 'logit' is unknown; allowed: text, logits, likelihood"),
        (["pope", "--prompt", "{question}"], 1, "<image> has to be in it once; it is there 0 times"),
        (["pope", "--split", "rondom"], 1, "rondom"),
        (["pope", "--variant", "9000"], 1, "'8910' is allowed"),
        (["pope", "--annotations", "no-such-folder", "--images", "."], 1, "no-such-folder"),
        (["pope", "--limit", "0"], 2, "Invalid value for '--limit'"),
        (["pope", "--dataset", "no-such-folder"], 1, "no-such-folder: no such folder; a dataset is 'reference'"),
        (["pope", "--dataset", "lmms-lab/POPE"], 1, "is there a network?"),
        (["pope", "--model", "no-such-folder", "--limit", "1"], 1, "no such model folder, and no Hub id"),
        (["pope", "--model", "owner/name", "--limit", "1"], 1, "is there a network?"),
        (["pope", "--model", str(SCENES), "--limit", "1"], 1, "there is no config.json in it"),
        (["pope", "--output", "no-such-folder/results.json"], 1, "a file in a folder that exists is allowed"),
        (["pope", "--dtype", "half", "--limit", "1"], 1, "dtype 'half' is unknown"),
        (["pope", "--attn-implementation", "magic", "--limit", "1"], 1, "magic"),
        (["ask", "no-such-file.jpg", "Is there a dog?"], 1, "no-such-file.jpg: no such file."),
        (["ask", __file__, "Is there a dog?"], 1, "cannot be decoded; a readable picture is allowed"),
        (["ask", PICTURE], 2, "Missing argument 'PICTURE...'"),
        (["ask", PICTURE, "Is there a dog?", "--method", "sparse-vlm"], 1, "did you mean 'sparsevlm'?"),
        (["ask", PICTURE, "Is there a dog?", "--budget", "1000"], 1, f"{BUDGET}, got 1000."),
        (["ask", PICTURE, "Is there a dog?", "--budget", "many"], 2, "'many': a whole number or a ratio (0.25) is"),
        (["ask", PICTURE, "Is there a dog in this <image>?"], 1, "text without <image> is allowed"),
        (["bench", "--shape", "7b"], 1, "shape '7b'"),
        (["bench", "--shape", "small", "--model", "x"], 1, "model, shape: one of them is allowed"),
        (["bench", "--methods", "visionzp"], 1, "did you mean 'visionzip'?"),
        (["bench", "--budgets", "half"], 2, "'half': whole numbers or ratios (0.25), separated by commas, are allowed"),
        (["bench", "--batch-sizes", "0"], 1, "batch_sizes=[0]: whole numbers from 1 on"),
        (["bench", "--batch-sizes", "1,x"], 2, "Invalid value for '--batch-sizes'"),
        (["bench", "--rounds", "0"], 2, "Invalid value for '--rounds'"),
        (["bench", "--attn-implementations", "magic"], 1, "magic"),
        (["bench", "--output", "no-such-folder/bench.json"], 1, "a file in a folder that exists is allowed"),
        (["bench", "--plot", "figure.doc"], 1, ".png"),
        (["answer"], 2, "No such command 'answer'"),
        (["pope", "--metods", "dense"], 2, "--metods"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, list) else "",
)
def test_errors_are_one_line(run, command, code, message):
    exit_code, out, err = run(*command)
    assert (exit_code, out) == (code, "")
    assert message in err
    assert err.startswith("llava-sparse: error: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("position", [0, 1, 3])
def test_debug_shows_the_traceback(run, position):
    command = ["pope", "--methods", "vision-zip"]
    code, _, err = run(*command[:position], "--debug", *command[position:])
    assert code == 1
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("llava-sparse: error: method 'vision-zip'")


def test_errors_of_our_own_making_name_their_type(run, monkeypatch):
    monkeypatch.setattr(evaluation, "evaluate", lambda *a, **k: {}["surprise"])
    assert run("pope") == (1, "", "llava-sparse: error: KeyError: 'surprise' (--debug shows where)\n")


def test_interruption(run, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate", interrupt)
    assert run("pope") == (130, "", "llava-sparse: error: interrupted\n")


@pytest.mark.parametrize(
    ("wanted", "cores", "load", "threads"),
    [(2, 2, 0.3, 2), (2, 2, 1.0, 1), (2, 2, 9.0, 1), (8, 16, 1.0, 8), (8, 8, 2.6, 5), (8, 8, 50.0, 4), (1, 1, 3.0, 1)],
)
def test_busy_cores_are_left_to_others(wanted, cores, load, threads):
    assert preparation.free_threads(wanted, cores, load) == threads


def test_help_imports_nothing_heavy():
    program = """
import sys, llava_sparse_cli
try:
    llava_sparse_cli.main(["bench", "--help"])
except SystemExit:
    print("heavy:", {"torch", "transformers", "datasets", "llava_sparse"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "--batch-sizes" in done.stdout and done.stdout.endswith("heavy: set()\n"), done


def test_runs_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "llava_sparse.cli", "ask", "no-such-file.jpg", "What?"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "llava-sparse: error: no-such-file.jpg: no such file.\n"


def test_runs_of_methods_budgets_seeds_and_options():
    runs = plan_runs(
        split_methods("dense, visionzip:budgets=[54,10],sparsevlm:raters=all:recycle=false,random"), [64, 32], [0, 1]
    )
    assert [run.name for run in runs] == [
        "dense",
        "visionzip:budgets=[54,10]",
        "sparsevlm:raters=all:recycle=false@64",
        "sparsevlm:raters=all:recycle=false@32",
        "random@64#0",
        "random@64#1",
        "random@32#0",
        "random@32#1",
    ]
    assert runs[1].sparsity == {"budget": None, "layers": None, "budgets": [54, 10], "options": None}
    assert runs[2].options == {"raters": "all", "recycle": False}
    assert runs[5].sparsity == {"budget": 64, "layers": None, "budgets": None, "options": {"seed": 1}}
    assert plan_runs(["sparsevlm:version=2.0"], [64])[0].options == {"version": "2.0"}


def test_pope_with_several_budgets_prompt_and_logits(run, tmp_path):
    output = tmp_path / "run.json"
    code, out, _ = run(
        "pope", "--methods", "visionzip,random", "--budgets", "64,16", "--limit", 4, "--answer-mode", "logits",
        "--prompt", r"USER: <image>\n{question} ASSISTANT:", "--split", "popular", "-o", output,
    )  # fmt: skip
    assert code == 0
    assert "Pairs of runs" in out
    results = json.loads(output.read_text())
    assert [entry["name"] for entry in results["methods"]] == [
        "visionzip@64", "visionzip@16", "random@64#0", "random@16#0",
    ]  # fmt: skip
    assert len(results["comparisons"]) == 6
    assert results["settings"]["prompt"] == "USER: <image>\n{question} ASSISTANT:"
    assert list(results["methods"][0]["splits"]) == ["popular"]
    assert 0 <= results["methods"][0]["scores"]["average"]["roc_auc"] <= 1


@pytest.mark.slow
def test_budgets_that_are_ratios(run, tmp_path):
    """From the command line to results, their table, a report, and a benchmark."""
    output, page = tmp_path / "run.json", tmp_path / "report"
    arguments = ("--methods", "dense,visionzip", "--budgets", "0.25,64", "--limit", 4, "--output", output)
    code, out, err = run("pope", *arguments)
    assert code == 0
    assert "visionzip@0.25" in out
    results = json.loads(output.read_text())
    assert [entry["name"] for entry in results["methods"]] == ["dense", "visionzip@0.25", "visionzip@64"]
    assert [entry["budget"] for entry in results["methods"]] == [None, 0.25, 64]
    assert [entry["visual_tokens"] for entry in results["methods"]] == [576, 144, 64]
    assert results["settings"]["budgets"] == [0.25, 64]
    written, finished = output.read_bytes(), err
    assert run("pope", *arguments)[0] == 0 and output.read_bytes() == written, finished
    assert run("report", output, "--html", f"{page}.html", "--markdown", f"{page}.md")[0] == 0
    for text in ((tmp_path / name).read_text() for name in ("report.html", "report.md")):
        assert "visionzip@0.25" in text and "budget 0.25" in text
    question = (PICTURE, "Is there a dog in the image?", "--budget", "0.25")
    assert run("ask", *question, "--method", "visionzip")[:2] == (0, "Yes\n")
    quick = ("--methods", "visionzip", "--budget", 0.25, "--rounds", 1, "--warm-up", 0, "--new-tokens", 2)
    code, out, _ = run("bench", *quick, "--text-tokens", 8, "--output", tmp_path / "bench.json")
    assert code == 0 and "visionzip@0.25" in out
    dense, quarter = json.loads((tmp_path / "bench.json").read_text())["results"]
    assert dense["lengths"][0] - quarter["lengths"][0] == 576 - 144


def test_bench_without_weights(run):
    code, out, _ = run("bench", "--shape", "small", "--methods", "visionzip", "--analytic")
    assert code == 0
    assert "576 / 576 / 576" in out and "64 / 64 / 64" in out and "cache, batch 32" in out
    code, _, err = run("bench", "--analytic")
    assert code == 1 and "--shape NAME is needed" in err


def test_bench(run, tmp_path):
    """On the reference model, then again from its file, then only profiled."""
    files = ["--output", tmp_path / "bench.json", "--plot", tmp_path / "bench.png"]
    quick = ["bench", "--methods", "visionzip", "--rounds", 1, "--warm-up", 0, "--new-tokens", 2, "--text-tokens", 8]
    code, out, err = run(*quick, *files)
    assert code == 0
    assert "visionzip@64" in out and "rounds" in err
    assert (tmp_path / "bench.png").stat().st_size > 5000
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["settings"]["model"] == "reference"
    assert [entry["run"] for entry in found["results"]] == ["dense", "visionzip@64"]
    assert found["results"][1]["flops_share"] < 1
    assert run(*quick, *files)[1] == out
    code, out, _ = run(*quick, "--profile", tmp_path / "traces")
    assert code == 0
    assert "aten::" in out and (tmp_path / "traces" / "dense.trace.json").exists()
