"""Methods of a user's own: what registration refuses, what a registered method can do, plugin files, their table."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass, make_dataclass
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import tiny
import torch
import transformers
from rich.console import Console
from transformers import AutoModelForImageTextToText

import llava_sparse
from llava_sparse import SparseLlavaProcessor, cli, method_table, plugins
from llava_sparse.evaluation import evaluate_pope, plan_runs
from llava_sparse.modeling.method_visionzip import VisionZip
from llava_sparse.modeling.pruning_methods import DecoderSparsifier, EncoderSparsifier, Sparsifier
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.modeling.pruning_settings import option, option_defaults
from llava_sparse.modeling.pruning_types import VisualTokens
from llava_sparse.reference import SCENES

PICTURE = str(SCENES / "images" / "scene_000001.jpg")
EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_method.py"

ENCODER = """
from dataclasses import dataclass

import torch

import llava_sparse
from llava_sparse.modeling.pruning_methods import EncoderSparsifier
from llava_sparse.modeling.pruning_settings import option
from llava_sparse.modeling.pruning_types import VisualTokens


@llava_sparse.register_method
@dataclass(frozen=True)
class Every(EncoderSparsifier):
    name = "every_nth"
    summary = "keeps the first patches from a place on"
    place = "projector"

    start: int = option(0, "the first patch", low=0)

    def reduce(self, vision):
        patches = vision.projected
        kept = torch.arange(self.start, self.start + self.tokens).expand(len(patches), -1)
        return VisualTokens.kept(patches, kept, torch.zeros(patches.shape[:2]))
"""

DECODER = """
from dataclasses import dataclass

import llava_sparse
from llava_sparse.modeling.pruning_methods import DecoderSparsifier


@llava_sparse.register_method
@dataclass(frozen=True)
class Late(DecoderSparsifier):
    name = "late"
    summary = "keeps the last tokens of a picture"
    looks_at_question = False
    positions: str = "original"

    @classmethod
    def preset_layers(cls, geometry, budget):
        return (1, 3)

    @classmethod
    def preset_budgets(cls, geometry, budget, layers, by_hand):
        return (2 * budget, budget)[: len(layers)]

    def rate(self, visual, text, text_valid):
        return text_valid

    def scores(self, attention):
        return attention.visual_positions.float()
"""


@pytest.fixture(autouse=True)
def _process_as_before():
    """What commands do to messages and threads of the whole process."""
    modules = [library.utils.logging for library in (transformers, huggingface_hub, datasets)]
    threads, levels = torch.get_num_threads(), [module.get_verbosity() for module in modules]
    yield
    for module, level in zip(modules, levels, strict=True):
        module.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _tables():
    """Every test leaves the tables as they were."""
    kept = [METHODS, plugins._plugins]
    before, modules = [dict(table) for table in kept], set(sys.modules)
    yield
    for table, old in zip(kept, before, strict=True):
        table.clear()
        table.update(old)
    for name in [name for name in sys.modules if name.startswith(plugins.PREFIX) and name not in modules]:
        del sys.modules[name]


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, stdout and stderr."""

    def runner(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        return exit.value.code, *capsys.readouterr()

    return runner


@pytest.fixture
def plugin(tmp_path):
    def write(text: str, name: str = "mine.py") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


# Registration


def keep_first(self, vision):
    patches = vision.features
    kept = torch.arange(self.tokens).expand(len(patches), -1)
    return VisualTokens.kept(patches, kept, torch.zeros(patches.shape[:2]))


def encoder(*fields, called="Mine", base=EncoderSparsifier, without=(), **attributes):
    namespace = {"name": "mine", "summary": "keeps the first", "reduce": keep_first, **attributes}
    namespace = {key: value for key, value in namespace.items() if key not in without}
    return make_dataclass(called, fields, bases=(base,), namespace=namespace, frozen=True)


def decoder(*fields, layers=(1, 3), without=(), **attributes):
    namespace = {
        "name": "mine",
        "summary": "keeps the last",
        "positions": "original",
        "preset_layers": classmethod(lambda cls, geometry, budget: layers),
        "preset_budgets": classmethod(lambda cls, geometry, budget, layers, by_hand: (budget,) * len(layers)),
        "rate": lambda self, visual, text, text_valid: text_valid,
        "scores": lambda self, attention: attention.visual_positions.float(),
        **attributes,
    }
    namespace = {key: value for key, value in namespace.items() if key not in without}
    return make_dataclass("Mine", fields, bases=(DecoderSparsifier,), namespace=namespace, frozen=True)


def resolving(function):
    return classmethod(lambda cls, geometry, settings: function(cls, settings.budget))


class NoDataclass(EncoderSparsifier):
    name = "mine"
    summary = "keeps the first"
    reduce = keep_first


class NotItsOwn(encoder()):
    name = "heir"


def fail(cls, budget):
    raise RuntimeError("no\nluck")


INCOMPLETE = "Mine is not complete; define preset_budgets, preset_layers, rate, scores too"
NAMES = "lower-case letters, digits, _ and - are allowed, but not 'dense'"
INVALID = {
    "no class": (lambda: "norm", TypeError, "'norm' is no method; a subclass of either EncoderSparsifier or"),
    "no method": (lambda: dict, TypeError, "dict is no method"),
    "no kind": (lambda: Sparsifier, TypeError, "Sparsifier is no method"),
    "abstract": (lambda: encoder(without=["reduce"]), TypeError, "Mine is not complete; define reduce too"),
    "abstract decoder": (
        lambda: decoder(without=["preset_layers", "preset_budgets", "rate", "scores"]),
        TypeError,
        INCOMPLETE,
    ),
    "no dataclass": (
        lambda: NoDataclass,
        TypeError,
        r"NoDataclass is no frozen dataclass of its own; write @dataclass",
    ),
    "an inherited one": (lambda: NotItsOwn, TypeError, "NotItsOwn is no frozen dataclass of its own"),
    "no name": (lambda: encoder(without=["name"]), ValueError, f"name=None: {NAMES}"),
    "a number": (lambda: encoder(name=3), ValueError, f"name=3: {NAMES}"),
    "an empty name": (lambda: encoder(name=""), ValueError, NAMES),
    "a name with +": (lambda: encoder(name="a+b"), ValueError, r"name='a\+b': lower-case"),
    "a name with :": (lambda: encoder(name="a:b"), ValueError, "name='a:b'"),
    "a name with @": (lambda: encoder(name="a@64"), ValueError, "name='a@64'"),
    "a name with ,": (lambda: encoder(name="a,b"), ValueError, "name='a,b'"),
    "a name with #": (lambda: encoder(name="a#1"), ValueError, "name='a#1'"),
    "capitals": (lambda: encoder(name="Mine"), ValueError, "name='Mine'"),
    "a line's end": (lambda: encoder(name="mine\n"), ValueError, NAMES),
    "dense": (lambda: encoder(name="dense"), ValueError, NAMES),
    "built in": (lambda: encoder(name="tome"), ValueError, "name='tome' is a method of llava_sparse; choose another"),
    "taken": (lambda: encoder(called="Other", name="taken"), ValueError, r"is that of .*\.Mine; choose another one"),
    "no summary": (lambda: encoder(without=["summary"]), ValueError, "summary=None: a text is allowed, of a few words"),
    "an empty summary": (lambda: encoder(summary=" "), ValueError, "summary=' '"),
    "no text": (lambda: encoder(cost=3), ValueError, "cost=3: a text is allowed, of a few words"),
    "an empty paper": (lambda: encoder(paper=""), ValueError, "paper=''"),
    "options of older versions": (
        lambda: encoder(option_defaults={"alpha": 1.0}),
        ValueError,
        "option_defaults: options are fields of the dataclass",
    ),
    "not for JSON": (
        lambda: encoder(("alpha", object, frozenset({1}))),
        ValueError,
        r"option alpha=frozenset\(\{1\}\) cannot be saved in a configuration",
    ),
    "infinite": (
        lambda: encoder(("alpha", float, option(float("inf"), "an exponent"))),
        ValueError,
        "option alpha=inf cannot be saved",
    ),
    "a default out of bounds": (
        lambda: encoder(("alpha", float, option(2.0, "a share", low=0, high=1))),
        ValueError,
        r"raised ValueError: `sparse_options`: 'alpha' must be a number in \[0, 1\], got 2.0\..*Make it work",
    ),
    "another kind": (lambda: encoder(kind="decoder"), ValueError, "kind='decoder': 'encoder' is allowed"),
    "a decoder's kind": (lambda: decoder(kind="encoder"), ValueError, "kind='encoder': 'decoder' is allowed"),
    "a flag": (lambda: encoder(needs_attention="yes"), ValueError, "needs_attention='yes': True or False is allowed"),
    "another flag": (lambda: encoder(draws=None), ValueError, "draws=None: True or False is allowed"),
    "a number as a flag": (lambda: encoder(draws=1), ValueError, "draws=1: True or False is allowed"),
    "a decoder's flag": (lambda: decoder(before_layer=1), ValueError, "before_layer=1: True or False is allowed"),
    "place": (
        lambda: encoder(place="here"),
        ValueError,
        "place='here': 'tower' or 'projector' or 'layers' is allowed",
    ),
    "a decoder's place": (lambda: decoder(place="tower"), ValueError, "place='tower': 'decoder' is allowed"),
    "unit": (lambda: encoder(unit="video"), ValueError, "unit='video': 'tile' or 'picture' is allowed"),
    "question in the layers": (
        lambda: encoder(place="layers", looks_at_question=True),
        ValueError,
        "place='layers' with looks_at_question: 'projector' is allowed",
    ),
    "question": (
        lambda: encoder(looks_at_question=True),
        ValueError,
        "place='tower' with looks_at_question: 'projector' is allowed",
    ),
    "resolve raises": (
        lambda: encoder(resolve=resolving(fail)),
        ValueError,
        "a budget of 4 of 16 patches raised RuntimeError: no luck. Make it work",
    ),
    "resolve gives nothing": (lambda: encoder(resolve=resolving(lambda cls, b: None)), ValueError, "AttributeError"),
    "a field without default": (
        lambda: encoder(("alpha", float)),
        ValueError,
        "Mine: .*'?alpha'? .*default",
    ),
    "another number": (lambda: encoder(tokens=property(lambda self: 5)), ValueError, "tokens=5; 4 is allowed"),
    "another number in processors": (
        lambda: encoder(entering=classmethod(lambda cls, patches, settings: 5)),
        ValueError,
        "gives tokens=5; 4 is allowed, what sparse_budget says",
    ),
    "no number in processors": (
        lambda: encoder(entering=classmethod(lambda cls, patches, settings: None)),
        ValueError,
        "4 is allowed, what sparse_budget says",
    ),
    "positions": (lambda: decoder(without=["positions"]), ValueError, "positions=None; 'compact' or 'original' is"),
    "other positions": (lambda: decoder(positions="old"), ValueError, "positions='old'"),
    "too deep": (lambda: decoder(layers=(2, 6, 15)), ValueError, r"\(2, 6, 15\) of a decoder with 6; ascending.*scale"),
    "descending": (lambda: decoder(layers=(3, 1)), ValueError, r"\(3, 1\) of a decoder"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_classes(case):
    make, kind, message = INVALID[case]
    llava_sparse.register_method(encoder(name="taken"))
    before = dict(METHODS)
    with pytest.raises(kind, match=message) as caught:
        llava_sparse.register_method(make())
    assert len(str(caught.value).splitlines()) == 1
    assert before == METHODS


def test_what_may_be_left_out():
    registered = llava_sparse.register_method(encoder())
    assert (registered.paper, registered.cost) == ("-", "-")
    assert METHODS["mine"] is registered and "mine" in llava_sparse.list_methods()
    assert llava_sparse.register_method(encoder(name="other", paper="arXiv 1", cost="N")).cost == "N"


def test_the_same_class_again_replaces_itself():
    """As when a notebook's cell runs again, or a script once as `__main__` and once as a plugin."""
    llava_sparse.register_method(encoder())
    again = llava_sparse.register_method(encoder(summary="better"))
    assert METHODS["mine"] is again
    other_kind = llava_sparse.register_method(decoder())
    assert METHODS["mine"] is other_kind
    fields = {"sparse_method": "mine", "sparse_budget": 4}
    whole = tiny.inputs(tiny.processor(SparseLlavaProcessor, **fields), tiny.QUESTIONS)
    assert (whole["input_ids"] == 4).sum(-1).tolist() == [tiny.PATCHES] * 3
    last = llava_sparse.register_method(encoder())
    assert METHODS["mine"] is last
    short = tiny.inputs(tiny.processor(SparseLlavaProcessor, **fields), tiny.QUESTIONS)
    assert (short["input_ids"] == 4).sum(-1).tolist() == [4] * 3


def test_two_numbers_are_counted_as_the_class_says(dense):
    """As VisionZip's: what enters the decoder is their sum, in the model and, by `entering`, in the processor."""
    llava_sparse.register_method(
        encoder(
            resolve=resolving(lambda cls, budget: cls((-2,), (budget - 1, 1))),
            tokens=property(lambda self: sum(self.budgets)),
        )
    )
    batch = tiny.inputs(tiny.processor(SparseLlavaProcessor, sparse_method="mine", sparse_budget=6), tiny.QUESTIONS)
    assert (batch["input_ids"] == 4).sum(-1).tolist() == [6, 6, 6]
    model = llava_sparse.sparsify(dense, "mine", budget=6)
    assert model.config.sparse_budgets == [5, 1]
    assert model(**batch, output_selection=True).selection[0].kept.tolist() == [list(range(6))] * 3


def test_a_method_of_the_package_is_registered_by_its_own_class_alone():
    """Its files may be imported once more, as a folder of the Hub; another class does not get its name."""
    before = dict(METHODS)
    assert llava_sparse.register_method(VisionZip) is VisionZip
    assert before == METHODS
    with pytest.raises(ValueError, match="name='visionzip' is a method of llava_sparse; choose another"):
        llava_sparse.register_method(encoder(called="VisionZip", base=VisionZip, name="visionzip"))
    assert before == METHODS


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("start", 3, ["3", 1.0, True]), ("share", 1, [1.5, "x", None]), ("word", "b", ["c", 1, None])],
)
def test_options_of_a_registered_method_are_checked(dense, name, right, wrong):
    """By their fields: kind, bounds and words; a plain field by its default."""
    llava_sparse.register_method(
        encoder(
            ("start", int, 0),
            ("share", float, option(0.5, "a share", low=0, high=1)),
            ("word", str, option("a", "a word", choices=("a", "b"))),
        )
    )
    assert getattr(llava_sparse.sparsify(dense, "mine", 4, options={name: right}).model.sparsifier, name) == right
    for value in wrong:
        with pytest.raises(ValueError, match=f"`sparse_options`: '{name}' must be .*, got {value!r}"):
            llava_sparse.SparseLlavaConfig(sparse_method="mine", sparse_budget=4, sparse_options={name: value})


def test_a_script_and_its_plugin_are_the_same(plugin, monkeypatch):
    path = plugin(ENCODER)
    llava_sparse.plugins.load_plugin(path)
    script = type(sys)("__main__")
    script.__file__ = str(path)
    monkeypatch.setitem(sys.modules, "__main__", script)
    exec(compile(ENCODER, str(path), "exec"), vars(script))
    assert METHODS["every_nth"].__module__ == "__main__"


def test_a_variant_of_a_method_counts_as_it_does(dense):
    @llava_sparse.register_method
    @dataclass(frozen=True)
    class Zip(VisionZip):
        name = "my-zip"
        summary = "VisionZip, a little different"

    model = llava_sparse.sparsify(dense, "my-zip", budgets=[4, 2])
    ours = tiny.processor(SparseLlavaProcessor, sparse_method="my-zip", sparse_budgets=[4, 2])
    batch = tiny.inputs(ours, tiny.QUESTIONS)
    assert (batch["input_ids"] == 4).sum(-1).tolist() == [6, 6, 6]
    expected = llava_sparse.sparsify(dense, "visionzip", budgets=[4, 2])
    assert torch.equal(model(**batch).logits, expected(**batch).logits)


# What a registered method can do


def lengths(outputs) -> list[int]:
    return [layer.keys.shape[2] for layer in outputs.past_key_values.layers]


def test_an_encoder_method_end_to_end(dense, checkpoint, processor, plugin, tmp_path):
    assert plugins.load_plugin(plugin(ENCODER)) == ["every_nth"]
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    model = llava_sparse.sparsify(dense, "every_nth", budget=5, options={"start": 2})
    outputs = model(**batch, output_selection=True)
    assert outputs.selection[0].kept.tolist() == [[2, 3, 4, 5, 6]] * 3
    loaded = AutoModelForImageTextToText.from_pretrained(
        checkpoint, sparse_method="every_nth", sparse_budget=5, sparse_options={"start": 2}
    ).eval()
    assert torch.equal(loaded(**batch).logits, outputs.logits)
    ours = tiny.processor(SparseLlavaProcessor, sparse_method="every_nth", sparse_budget=5)
    short = tiny.inputs(ours, tiny.QUESTIONS)
    assert (short["input_ids"] == 4).sum(-1).tolist() == [5, 5, 5]
    torch.testing.assert_close(loaded(**short).logits[:, -1], outputs.logits[:, -1])
    alone = loaded(**tiny.inputs(processor, tiny.QUESTIONS[0]), use_cache=True)
    loaded.set_sparsity("every_nth+fastv", budgets=[[9], [4]], layers=[None, [1]])
    composed = loaded(**tiny.inputs(processor, tiny.QUESTIONS[0]), use_cache=True)
    text = lengths(alone)[0] - 5
    assert [n - text for n in lengths(composed)] == [9, 9, 4, 4, 4, 4]
    loaded.set_sparsity("every_nth", budget=0.5)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert again.config.sparse_budgets == [8]
    assert torch.equal(again.generate(**batch, max_new_tokens=3), loaded.generate(**batch, max_new_tokens=3))
    with pytest.raises(ValueError, match=r"every_nth has no option 'strat' \(did you mean 'start'\?\)"):
        loaded.set_sparsity("every_nth", budget=4, options={"strat": 1})


def test_a_decoder_method_end_to_end(dense, checkpoint, processor, plugin):
    assert plugins.load_plugin(plugin(DECODER)) == ["late"]
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    model = llava_sparse.sparsify(dense, "late", budget=4)
    outputs = model(**batch, use_cache=True, output_selection=True)
    assert [stage.kept.tolist() for stage in outputs.selection] == [[list(range(8, 16))], [list(range(12, 16))]]
    text = batch["input_ids"].shape[1] - tiny.PATCHES
    assert [n - text for n in lengths(outputs)] == [16, 16, 8, 8, 4, 4]
    loaded = AutoModelForImageTextToText.from_pretrained(checkpoint, sparse_method="late", sparse_budget=4).eval()
    both = tiny.inputs(processor, tiny.QUESTIONS)
    assert torch.equal(loaded(**both).logits, model(**both).logits)
    model.set_sparsity("divprune+late", budget=4)
    composed = model(**batch, use_cache=True)
    assert [n - text for n in lengths(composed)] == [8, 8, 8, 8, 4, 4]
    model.set_sparsity("late", layers=[2], budgets=[3], options={"positions": "compact"})
    assert model.generate(**both, max_new_tokens=2).shape[0] == 3


def test_the_evaluation_knows_it_and_its_file(checkpoint, plugin, tmp_path):
    path = plugin(ENCODER)
    plugins.load_plugin(path)
    runs = plan_runs(["every_nth:start=3", "every_nth"], [4, 5])
    assert [run.name for run in runs][:2] == ["every_nth:start=3@4", "every_nth:start=3@5"]
    with pytest.raises(ValueError, match="did you mean 'start'"):
        plan_runs(["every_nth:strat=3"], [4])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    used = {"plugins": [{"file": "mine.py", "sha256": digest}]}
    assert plugins.plugin_files(["visionzip", "every_nth+fastv"]) == plugins.plugin_files(["every_nth"]) == used
    assert plugins.plugin_files(["visionzip", "dense"]) == {}
    output = tmp_path / "run.json"
    call = {"model": checkpoint, "methods": ["every_nth"], "budget": 4, "limit": 1, "output": output}
    results = evaluate_pope(**call)
    assert results["settings"].items() >= used.items()
    assert results["methods"][0]["visual_tokens"] == 4
    # With another version of the method answers would be mixed.
    plugins.load_plugin(plugin(ENCODER + "\n"))
    with pytest.raises(ValueError, match="was begun with plugins="):
        evaluate_pope(**call)
    # Registered anew by other means: no file can be named.
    llava_sparse.register_method(encoder(base=METHODS["every_nth"], name="every_other"))
    assert plugins.plugin_files(["every_other"]) == {}


# Plugin files


def test_a_plugin_is_executed_once(plugin):
    path = plugin(ENCODER + "\nprint('executed')\n")
    assert plugins.load_plugin(path) == ["every_nth"]
    first = METHODS["every_nth"]
    assert first.__module__ == "llava_sparse_plugin_mine"
    assert plugins.load_plugin(str(path)) == ["every_nth"]
    assert METHODS["every_nth"] is first
    plugin(ENCODER.replace("the first patches", "patches"))
    plugins.load_plugin(path)
    assert METHODS["every_nth"].summary == "keeps patches from a place on"
    assert not list(path.parent.glob("__pycache__"))


def test_a_plugin_that_fails_leaves_nothing(plugin):
    path = plugin(ENCODER)
    plugins.load_plugin(path)
    first, module = METHODS["every_nth"], sys.modules["llava_sparse_plugin_mine"]
    plugin(ENCODER + DECODER + "\nraise KeyError('late')\n")
    with pytest.raises(ValueError, match=r"mine\.py, line \d+: KeyError: 'late'") as caught:
        plugins.load_plugin(path)
    assert isinstance(caught.value.__cause__, KeyError)
    assert METHODS["every_nth"] is first and "late" not in METHODS
    assert sys.modules["llava_sparse_plugin_mine"] is module
    with pytest.raises(ValueError, match="SyntaxError"):
        plugins.load_plugin(plugin("x = = 1", "other.py"))
    assert "llava_sparse_plugin_other" not in sys.modules


HEAD = "import llava_sparse\n"
BROKEN = {
    "registers nothing": ("x = 1\n", "it registers no method; put @llava_sparse.register_method above a class"),
    "raises": ("x = 1\ndef f():\n    return {}['here']\n\nf()\n", ", line 3: KeyError: 'here'"),
    "no Python": ("x = 1\nclass\n", ", line 2: SyntaxError: invalid syntax"),
    "zero bytes": ("x = '\0'\n", "null bytes"),
    "ends the program": ("import sys\nsys.exit(3)\n", ", line 2: SystemExit: 3"),
    "raises without words": ("assert 0\n", ", line 1: AssertionError\n"),
    "is refused": (HEAD + "llava_sparse.register_method(dict)\n", ", line 2: TypeError: register_method: dict is no"),
    "imports what is not there": ("import no_such_module\n", ", line 1: ModuleNotFoundError: No module named"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_plugins_are_one_line(run, plugin, case):
    text, message = BROKEN[case]
    path = plugin(text)
    code, out, err = run("methods", "--plugin", path)
    assert (code, out) == (1, "")
    assert err.startswith(f"llava-sparse: error: plugin {path}") and message in err
    assert len(err.splitlines()) == 1
    code, _, err = run("methods", "--plugin", path, "--debug")
    assert err.startswith("Traceback (most recent call last)")


@pytest.mark.parametrize("command", ["pope", "bench", "methods", "ask", "visualize"])
def test_every_command_reads_plugins(run, command, tmp_path):
    missing = tmp_path / "missing.py"
    asked = [PICTURE, "Is there a dog?"] if command in ("ask", "visualize") else []
    assert run(command, *asked, "--plugin", missing) == (
        1, "", f"llava-sparse: error: plugin {missing}: no such file; a Python file is allowed.\n"
    )  # fmt: skip


def test_files_that_are_no_plugins(run, plugin, tmp_path):
    assert "whose name ends in .py, is allowed" in run("methods", "--plugin", plugin("x", "mine.txt"))[2]
    assert "no such file" in run("methods", "--plugin", tmp_path)[2]
    plugins.load_plugin(plugin(ENCODER))
    other = plugin(DECODER, "deeper/mine.py")
    assert "is loaded under the same name; rename one of the two" in run("methods", "--plugin", other)[2]


def test_several_plugins(run, plugin):
    code, out, err = run("methods", "--plugin", plugin(ENCODER), "--plugin", plugin(DECODER, "late.py"))
    assert (code, err) == (0, "")
    assert re.search(r"every_nth +│ encoder │ no .* start=0 ", out)
    assert re.search(r"late +│ decoder │ no +│ original .* positions='original' ", out)


@pytest.mark.slow
def test_a_fresh_process_loads_a_model_with_its_plugin(dense, processor, plugin, tmp_path):
    """A saved model names its method; the plugin has to be there when it is loaded."""
    path = plugin(ENCODER)
    plugins.load_plugin(path)
    folder = tmp_path / "model"
    llava_sparse.sparsify(dense, "every_nth", budget=5).save_pretrained(folder)
    processor.save_pretrained(folder)
    output = tmp_path / "run.json"
    command = [sys.executable, "-m", "llava_sparse.cli", "pope", "--model", folder, "--methods", "every_nth:start=1"]
    command += ["--budget", "4", "--limit", "1", "--output", output]
    done = subprocess.run([*command, "--plugin", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(output.read_text())
    assert results["settings"]["plugins"][0]["file"] == "mine.py"
    entry = results["methods"][0]
    assert (entry["name"], entry["visual_tokens"], entry["options"]) == ("every_nth:start=1@4", 4, {"start": 1})
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("llava-sparse: error: ") and "'every_nth" in done.stderr


def test_the_example_is_a_plugin(run):
    question = "Is there a dog in the image?"
    assert run("ask", PICTURE, question, "--plugin", EXAMPLE, "--method", "norm", "--budget", 576)[:2] == (0, "Yes\n")


# The table of methods


def test_the_table_says_all_of_every_method(run):
    code, out, err = run("methods")
    assert (code, err) == (0, "")
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if len(cells) == len(method_table.COLUMNS):
            rows[cells[0]] = dict(zip(method_table.COLUMNS, cells, strict=True))
    assert list(rows) == sorted(METHODS)
    for name, method in METHODS.items():
        row = rows[name]
        assert (row["kind"], row["cost"], row["paper"]) == (method.kind, method.cost, method.paper)
        assert row["what it does"] == method.summary
        assert row["question"] == ("yes" if method.looks_at_question else "no")
        options = [f"{option}={value!r}" for option, value in option_defaults(method).items()]
        assert row["options"] == (", ".join(options) or "–")
    assert {name for name, row in rows.items() if row["question"] == "yes"} == {
        "cdpruner", "delegate", "eadp", "fastv", "pyramiddrop", "sparsevlm",
    }  # fmt: skip
    assert {name: rows[name]["positions"] for name in ("visionzip", "sparsevlm", "fastv", "pyramiddrop")} == {
        "visionzip": "compact: a shorter prompt",
        "sparsevlm": "compact (1.0, 1.5), original (2.0)",
        "fastv": "original",
        "pyramiddrop": "compact",
    }
    assert "divprune+sparsevlm" in out and "…" not in out


def test_the_table_fits_a_terminal():
    console = Console(width=80, force_terminal=True, record=True, file=io.StringIO())
    console.print(method_table.method_table(narrow=True))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for word in ("question: yes", "version='1.5'", "cost: N^2 C", "2412.04467"):
        assert word in text
