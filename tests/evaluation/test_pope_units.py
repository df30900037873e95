"""What could lose a question, mix answers or change them quietly: prompts, caches, logs, pictures."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import llava_sparse
from llava_sparse.evaluation import Asker, LoadedModel, ask, evaluate_pope, load_model, load_pope
from llava_sparse.evaluation import answer as answering
from llava_sparse.evaluation.answer_log import FORMAT, AnswerLog, log_path
from llava_sparse.evaluation.results import describe_model, timing_path
from llava_sparse.evaluation.units import Pictures, pictures_digest, plan_units, read_rows

ASKED = ["is it red", "what is there now", "No dog ?"]
# Of a method's name, its settings; dense is none.
MODELS = {
    "dense": None,
    "visionzip": {"budget": 5},
    "sparsevlm": {"budget": 5},
    "random_decoder": {"layers": [1, 3], "budgets": [6, 3]},
}


@pytest.fixture(scope="module")
def reference() -> LoadedModel:
    return load_model(dtype="float32")


@pytest.fixture
def pixels(processor) -> torch.Tensor:
    return tiny.inputs(processor, tiny.QUESTIONS)["pixel_values"][:2]


def pruned(model, method):
    return model if MODELS[method] is None else llava_sparse.sparsify(model, method, **MODELS[method])


def both(model, processor, pixels, prompt, mode="text", **settings):
    """Answers with grouping and without."""
    return [
        Asker(model, processor, prompt, mode, grouped, **settings).answer(pixels, [0, 1, 1], ASKED, 3)
        for grouped in (True, False)
    ]


def same(grouped, alone):
    assert [answer.text for answer in grouped] == [answer.text for answer in alone]
    if grouped[0].score is not None:
        assert [a.score for a in grouped] == pytest.approx([a.score for a in alone], abs=1e-4)


@pytest.mark.parametrize("method", MODELS)
@pytest.mark.parametrize("prompt", ["USER: <image> {question} ASSISTANT:", "{question} ? <image>"])
def test_likelihoods_are_those_of_losses(method, prompt, dense, processor, pixels):
    """Answers of one token have the score of logits mode; of several, that of a pass with the answers as labels."""
    model = pruned(dense, method)
    one, other = (both(model, processor, pixels, prompt, mode) for mode in ("likelihood", "logits"))
    assert [[(a.text, a.score) for a in way] for way in one] == [[(a.text, a.score) for a in way] for way in other]
    choices = ("Yes red car", "Yes small")
    with pytest.raises(ValueError, match="begin with the same token"):
        both(model, processor, pixels, prompt, "logits", choices=choices)
    scores = []
    for picture, question in zip([0, 1, 1], ASKED, strict=True):
        text, by_loss = prompt.replace("{question}", question), []
        for answer in choices:
            batch = tiny.inputs(processor, f"{text} {answer}")
            count = len(answer.split())
            labels = batch["input_ids"].clone()
            labels[:, :-count] = -100
            batch["pixel_values"] = pixels[picture][None]
            by_loss.append(-count * model(**batch, labels=labels).loss.item())
        scores.append(by_loss[0] - by_loss[1])
    for answers in both(model, processor, pixels, prompt, "likelihood", choices=choices):
        assert [answer.score for answer in answers] == pytest.approx(scores, abs=2e-4)
        assert [answer.text for answer in answers] == ["Yes red car" if x > 0 else "Yes small" for x in scores]


@pytest.mark.parametrize("method", MODELS)
@pytest.mark.parametrize("mode", ["text", "logits"])
@pytest.mark.parametrize(
    "prompt",
    [
        "What is it ? <image> {question} ASSISTANT:",
        "{question} <image> ASSISTANT:",
        "{question} <image>",
        "<image> {question}",
    ],
)
def test_prompts_of_any_order(method, mode, prompt, dense, processor, pixels):
    """Before the image the question is no part of a prefix that is shared."""
    model = pruned(dense, method)
    grouped, alone = both(model, processor, pixels, prompt, mode)
    same(grouped, alone)
    assert len({answer.score if mode == "logits" else answer.text for answer in grouped}) > 1
    stages = 0 if method == "dense" else len(model.model.sparsifier.layers)
    assert [len(answer.kept) for answer in grouped] == [stages] * 3


@pytest.mark.parametrize("method", MODELS)
@pytest.mark.parametrize("backbone", ["mistral", pytest.param("qwen2", marks=pytest.mark.slow)])
def test_windows_shorter_than_the_prompt(method, backbone, processor, pixels, monkeypatch):
    text = tiny.text_config(backbone).to_dict()
    windows = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None}
    config = type(tiny.text_config(backbone))(**{**text, **windows})
    monkeypatch.setattr(tiny, "text_config", lambda backbone: config)
    monkeypatch.setattr(tiny, "_made", tiny._make)  # Others' models are not made of this configuration.
    model = pruned(tiny.dense_model(backbone), method)
    for mode in ("text", "logits"):
        same(*both(model, processor, pixels, "<image> {question} ASSISTANT:", mode))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("repetition_penalty", 3.0), ("suppress_tokens", [20]), ("min_new_tokens", 3), ("begin_suppress_tokens", [20])],
)
def test_generation_that_is_not_greedy_is_that_of_generate(setting, value, dense, processor, pixels):
    """Whatever a generation config asks for: what the fast way does not know goes through `generate`."""
    prompt = "<image> {question}"
    plain, _ = both(dense, processor, pixels, prompt)
    setattr(dense.generation_config, setting, value)
    grouped, alone = both(dense, processor, pixels, prompt)
    same(grouped, alone)
    assert not any(answer.kept for answer in grouped)
    assert [answer.text for answer in grouped] != [answer.text for answer in plain] or "suppress" in setting
    scored, _ = both(dense, processor, pixels, prompt, "logits")
    assert all(answer.score is not None for answer in scored)


@pytest.mark.parametrize("ends", [None, 2, [2, 20, 25]])
def test_answers_end_at_any_of_the_tokens(ends, dense, processor, pixels):
    """20 and 25 are words, which decoding does not skip."""
    dense.generation_config.eos_token_id = ends
    grouped, alone = both(dense, processor, pixels, "<image> {question} ASSISTANT:")
    same(grouped, alone)
    stops = {processor.tokenizer.decode([end]) for end in ends or []} if isinstance(ends, list) else set()
    assert not stops & {word for answer in grouped for word in answer.text.split(" ")}


def test_class_token_is_no_patch(processor, pixels, monkeypatch):
    """With the strategy "full" it is the first visual token of the decoder."""
    stages, kept_of = [], answering.kept_patches
    monkeypatch.setattr(answering, "kept_patches", lambda stage, tokens: stages.append(stage) or kept_of(stage, tokens))
    dense = tiny.dense_model(vision_feature_select_strategy="full")
    model = llava_sparse.sparsify(dense, "random_decoder", layers=[1], budgets=[8])
    answers = Asker(model, processor, "<image> {question}").answer(pixels, [0, 1, 1], ASKED, 3)
    for answer, tokens in zip(answers, stages[0].kept.tolist(), strict=True):
        assert answer.kept[0].nonzero()[0].tolist() == [token - 1 for token in tokens if token > 0]


def byte_level(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like Qwen's: " Yes" and "Yes" are two tokens."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        corpus, trainers.BpeTrainer(special_tokens=["<image>"], initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<image>"])


def llama_like(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer like Llama's: a word's mark is at its beginning."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    inner.train_from_iterator(corpus, trainers.BpeTrainer(special_tokens=["<image>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=inner, additional_special_tokens=["<image>"])


CORPUS = ["USER: is it? ASSISTANT: Yes", "ASSISTANT: No", "Answer: Yes", "assistant\nYes", "assistant\nNo"] * 20


@pytest.mark.parametrize(("build", "space"), [(byte_level, "Ġ"), (llama_like, "▁")])
def test_tokens_of_yes_and_no(build, space, dense):
    tokenizer = build(CORPUS)
    names = {"tokenizer": tokenizer, "image_token": "<image>", "image_token_id": 0}

    def tokens(prompt):
        asker = Asker(dense, SimpleNamespace(**names), prompt, "logits")
        return [tokenizer.convert_ids_to_tokens(list(ids)) for ids in asker._answer_tokens()]

    assert tokens("<image>\n{question} ASSISTANT:") == [[f"{space}Yes"], [f"{space}No"]]
    if build is byte_level:
        assert tokens("<image>{question}\nassistant\n") == [["Yes"], ["No"]]
    with pytest.raises(ValueError, match="ends without a space is allowed"):
        tokens("<image>\n{question} Answer: ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize("grouped", [True, False])
def test_logits_that_are_no_numbers(value, calls, grouped, dense, processor, pixels):
    """As of float16 that overflowed: every answer would be the first token of the vocabulary. At any token."""
    seen = []

    def spoil(module, inputs, logits):
        seen.append(logits)
        return logits.index_fill(-1, torch.tensor([5]), value) if len(seen) > calls else logits

    dense.generation_config.eos_token_id = None
    dense.lm_head.register_forward_hook(spoil)
    for mode in ("text", "logits") if not calls else ("text",):
        seen.clear()
        with pytest.raises(ValueError, match="use another --dtype"):
            Asker(dense, processor, "<image> {question}", mode, grouped).answer(pixels, [0], ASKED[:1], 1)
    seen.clear()
    with pytest.raises(ValueError, match="use another --dtype"):
        ask(dense, processor, tiny.image(0), ASKED[0], "<image> {question}")


@pytest.mark.parametrize("grouped", [True, False])
def test_answers_that_the_limit_cut(grouped, dense, processor, pixels):
    dense.generation_config.eos_token_id = None
    answers = Asker(dense, processor, "<image> {question}", "text", grouped, 3).answer(pixels, [0, 1], ASKED[:2], 2)
    assert [answer.cut for answer in answers] == [True, True]
    assert all(len(answer.text.split()) <= 3 for answer in answers)
    dense.generation_config.eos_token_id = list(range(64))
    answers = Asker(dense, processor, "<image> {question}", "text", grouped, 3).answer(pixels, [0, 1], ASKED[:2], 2)
    assert [(answer.cut, answer.text) for answer in answers] == [(False, "")] * 2


def test_a_second_picture_in_a_question_is_refused(dense, processor, pixels, tmp_path):
    renamed = SimpleNamespace(
        tokenizer=processor.tokenizer, image_token="What", image_token_id=tiny.WORDS.index("What")
    )
    with pytest.raises(ValueError, match="What has to be in it once"):
        Asker(dense, renamed, "<image> {question}").answer(pixels, [0], ["What is it"], 1)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "images" / "a.png")
    row = {"question_id": 1, "image": "a.png", "text": "Is there a <image> in the image?", "label": "yes"}
    (tmp_path / "x_pope_random.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="row 1: question 'Is there a <image> in the image"):
        load_pope(tmp_path, split="random")


def test_out_of_memory_of_the_encoder(reference, monkeypatch):
    """Pictures are encoded with the questions of a batch, so that a smaller batch needs less."""
    encode, sizes = Asker._encode, []

    def small_memory(self, pixels, *rest):
        sizes.append(len(pixels))
        if len(pixels) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return encode(self, pixels, *rest)

    settings = {"methods": ["dense", "sparsevlm"], "limit": 3, "batch_size": 9}
    whole = evaluate_pope(reference, **settings)
    monkeypatch.setattr(Asker, "_encode", small_memory)
    halved = evaluate_pope(reference, **settings)
    assert max(sizes) > 1
    assert [e["answers"] for e in halved["methods"]] == [e["answers"] for e in whole["methods"]]


def test_names_beside_the_results(tmp_path):
    """Two outputs share no log because of a dot in their names."""
    for output, log in {
        "run.json": "run.answers.jsonl",
        "run": "run.answers.jsonl",
        "llava-1.5": "llava-1.5.answers.jsonl",
        "run.v2.json": "run.v2.answers.jsonl",
        "run.txt": "run.txt.answers.jsonl",
        "a.answers.jsonl": "a.answers.jsonl.answers.jsonl",
    }.items():
        assert log_path(tmp_path / output) == tmp_path / log
        assert timing_path(tmp_path / output) == tmp_path / f"{log.removesuffix('.answers.jsonl')}.timing.json"


def test_a_foreign_file_without_an_end_of_line_is_left_alone(tmp_path):
    log = tmp_path / "run.answers.jsonl"
    for text in ("my notes", '{"question_id": 1}', '{"format": "other"}'):
        log.write_text(text)
        with pytest.raises(ValueError, match="not a log of answers"):
            AnswerLog(log, {}, {})
        assert log.read_text() == text
    for begun in ('{"form', '{"format": "llava-sparse answers 1", "sett'):
        log.write_text(begun)
        AnswerLog(log, {}, {}).close()
        assert json.loads(log.read_text())["format"] == FORMAT


def test_lines_that_are_no_answers(tmp_path):
    path = tmp_path / "run.answers.jsonl"
    AnswerLog(path, {}, {}).close()
    path.write_bytes(path.read_bytes() + b"5\n")
    with pytest.raises(ValueError, match="line 2: int: not a log of answers"):
        AnswerLog(path, {}, {})


def test_a_full_disk_leaves_a_log_that_goes_on(tmp_path):
    path = tmp_path / "run.answers.jsonl"
    log = AnswerLog(path, {}, {})
    file = log._file

    class Full:
        def write(self, data):
            file.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        def close(self):
            file.close()
            raise OSError(errno.ENOSPC, "No space left on device")

    log._file = Full()
    with pytest.raises(OSError, match="No space"):
        log.add([{"run": "dense", "image": "a", "question": "b", "answer": "Yes"}])
    with pytest.raises(OSError, match="No space"):
        log.close()
    again = AnswerLog(path, {}, {})
    assert again.lines == {}
    again.close()
    assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().endswith(b"\n")


def test_exchanged_pictures_are_refused(reference, tmp_path):
    (tmp_path / "data" / "images").mkdir(parents=True)
    picture = tmp_path / "data" / "images" / "a.png"
    Image.new("RGB", (50, 50)).save(picture)
    row = {"question_id": 1, "image": "a.png", "text": "Is there a dog in the image?", "label": "yes"}
    (tmp_path / "data" / "x_pope_random.json").write_text(json.dumps(row))
    settings = {"methods": ["dense"], "subset": {"split": ["random"]}, "output": tmp_path / "run.json"}
    evaluate_pope(reference, tmp_path / "data", **settings)
    Image.new("RGB", (50, 50), "red").save(picture)
    with pytest.raises(ValueError, match="was begun with pictures_sha256="):
        evaluate_pope(reference, tmp_path / "data", **settings)


def test_digest_of_pictures_is_that_of_the_source():
    whole, streamed = load_pope(limit=4, split="random"), load_pope(limit=4, split="random", streaming=True)
    digests = {
        pictures_digest(dataset, read_rows(dataset)) for dataset in (whole, streamed, whole.select([3, 1, 0, 2]))
    }
    assert len(digests) == 1
    assert pictures_digest(whole.select([0]), read_rows(whole.select([0]))) not in digests


def test_digest_of_the_configuration(dense, processor):
    def digest(model=dense, used=processor):
        return describe_model(LoadedModel(model, used, "a", False))["configuration_sha256"]

    before = digest()
    processor.tokenizer(["is", "is it"], padding=True)
    assert digest(tiny.dense_model(), tiny.processor()) == digest() == before
    sparse = llava_sparse.sparsify(dense, "visionzip", budget=5)
    found = digest(sparse)
    sparse.set_sparsity("sparsevlm", 4)
    assert digest(sparse) == found
    assert digest(tiny.dense_model(vision_feature_layer=-1)) != before
    other = tiny.processor()
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert digest(used=other) != before
    dense.generation_config.eos_token_id = [2, 3]
    assert digest() != before


def test_output_in_no_folder_of_ours(reference, tmp_path):
    """A name that the log's is too long for is refused before anything is asked."""
    with pytest.raises(OSError, match="too long"):
        evaluate_pope(reference, methods=["dense"], limit=1, output=Path(tmp_path) / f"{'a' * 245}.json")
    assert not list(tmp_path.iterdir())


def test_undecodable_picture_is_named():
    dataset = load_pope(limit=2)
    rows = dataset.remove_columns("image").to_list()
    broken = type(dataset).from_list(
        [{**row, "image": {"path": None, "bytes": b"?"}} for row in rows], dataset.features
    )
    with pytest.raises(ValueError, match=r"image 'scene_000000.jpg' cannot be decoded"):
        Pictures(broken, rows).of([("scene_000000.jpg", "")])


def test_units_hold_whole_pictures():
    rows = [{"image_source": image, "question": str(n)} for n, image in enumerate("aabbbbbcaad")]
    units = plan_units(rows, 4)
    assert [[image for image, _ in unit] for unit in units] == [list("aaaa"), list("bbbbb"), list("cd")]
    streamed = plan_units(rows, 4, streamed=True)
    assert [[image for image, _ in unit] for unit in streamed] == [list("aa"), list("bbbbb"), list("caad")]
    assert [pair for unit in streamed for pair in unit] == [(row["image_source"], row["question"]) for row in rows]
    assert sum(map(len, plan_units(rows + rows, 4))) == len(rows)
