"""Repositories of pruned models: folders that load without llava_sparse, repositories of settings alone, pushing."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.dynamic_module_utils import get_relative_import_files

from .families import FAMILIES, Family
from .model_card import eval_results, model_card
from .modeling.pruning_base import BASE, BASE_REVISION
from .modeling.pruning_head import PrunedHeadMixin

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def save_to_hub_folder(model: Any, processor: Any, folder: str | Path) -> Path:
    """Saves a pruned model and its processor with the code that loads them, and a model card if there is none.

    The folder loads with `trust_remote_code=True` through AutoConfig, AutoModel, AutoModelForImageTextToText and
    AutoProcessor where only transformers is installed.

    Args:
        model: a pruned model of any family, such as `SparseLlavaForConditionalGeneration`.
        processor: its sparse processor, or a stock one, which needs no code.
        folder: where to; made if it is not there.

    Returns:
        the folder.

    Raises:
        TypeError: if the model is not a pruned one; nothing is written then.
    """
    if not isinstance(model, PrunedHeadMixin):
        raise TypeError(
            f"save_to_hub_folder takes a pruned model, such as SparseLlavaForConditionalGeneration, not a "
            f"{type(model).__name__}: load it with sparse_method=... or use llava_sparse.sparsify."
        )
    folder = Path(folder)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_code(folder, _family(model.config))
    if not (folder / "README.md").exists():
        (folder / "README.md").write_text(model_card(model.config))
    return folder


def add_code(folder: Path, family: Family) -> None:
    """Puts the code that loads a saved folder beside it, and its name into the configurations."""
    autos = dict.fromkeys(("AutoModel", "AutoModelForImageTextToText"), family.sparse("ForConditionalGeneration"))
    _add_code(folder / "config.json", {"AutoConfig": family.sparse("Config")} | autos)
    processor, file = family.sparse("Processor"), folder / "processor_config.json"
    if file.exists() and json.loads(file.read_text()).get("processor_class") == processor.__name__:
        _add_code(file, {"AutoProcessor": processor})


def _add_code(file: Path, classes: dict[str, type]) -> None:
    """Names the classes in a configuration file, and copies their modules, with all that they import, beside it."""
    content = json.loads(file.read_text())
    named = {auto: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for auto, cls in classes.items()}
    content["auto_map"] = {**content.get("auto_map", {}), **named}
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for cls in classes.values():
        entry = str(sys.modules[cls.__module__].__file__)
        for source in [entry, *get_relative_import_files(entry)]:
            shutil.copyfile(source, file.parent / Path(source).name)


def _family(config: Any) -> Family:
    """The family of a sparse configuration.

    Raises:
        ValueError: for any other configuration.
    """
    family = FAMILIES.get(config.model_type.removeprefix("sparse_"))
    if family is None or config.model_type != family.sparse_type:
        raise ValueError(f"model_type {config.model_type!r} is no pruned model: load or save it with sparse_method=...")
    return family


# --- Pushing -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        repo: its id; files: names and sizes in bytes; url: of the commit, None for a dry run.
    """

    repo: str
    files: dict[str, int]
    url: str | None = None


def push(
    model: Any, repo: str, processor: Any = None, *, config_only: bool = False, private: bool = False,
    dry_run: bool = False, update: bool = False, base_model: str | None = None, license: str | None = None,
    results: str | Path | None = None, token: str | None = None, endpoint: str | None = None,
) -> Pushed:  # fmt: skip
    """Pushes a pruned model to the Hub, in one commit: all of it is there, or nothing.

    Args:
        model: a pruned model, or a folder that one was saved to; repo: `owner/name`.
        processor: of a model; a folder brings its own.
        config_only: settings alone, a few kB: whoever loads them loads the weights of `base_model`, and needs this
            package. Else weights, and code for `trust_remote_code=True`.
        private: whether others may not see it; dry_run: whether only to say what would be pushed.
        update: whether the repository may be there already.
        base_model: Hub id of what was pruned; by default what the model was loaded from.
        license: as the Hub names it; by default the card says that the base model's counts.
        results: a results file of `llava-sparse pope`, of questions on the Hub.
        token, endpoint: as of `huggingface_hub.HfApi`.

    Raises:
        ValueError: for what is no pruned model, a `config_only` whose base is no Hub id, a repository that is there,
            and what `eval_results` refuses; nothing has been pushed.
        PermissionError: without a token, and where it has no rights.
        OSError: if the network fails; nothing of the files is in the repository then, and the message says whether the
            repository has been made.
    """
    if repo.count("/") != 1:
        raise ValueError(f"repo {repo!r}: owner/name is allowed.")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _assemble(model, processor, folder, repo, config_only, base_model, license, results)
        files = {
            str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
        }
        if dry_run:
            return Pushed(repo, files)
        return Pushed(repo, files, _upload(folder, repo, private, update, token, endpoint, set(files)))


def _assemble(
    model: Any, processor: Any, folder: Path, repo: str, config_only: bool, base: str | None, license: str | None,
    results: str | Path | None,
) -> None:  # fmt: skip
    """Writes what is to be pushed into an empty folder."""
    saved = isinstance(model, str | Path)
    config = AutoConfig.from_pretrained(model) if saved else model.config
    family = _family(config)
    own = _loaded_from(config)
    revision = getattr(config, "_commit_hash", None) if base in (None, own) else None
    base = base or own
    if saved:
        ignored = shutil.ignore_patterns(*WEIGHTS) if config_only else None
        shutil.copytree(model, folder, dirs_exist_ok=True, ignore=ignored)
    elif config_only:
        config.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    else:
        model.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)
    if config_only:
        _point_at(folder, base, revision, family)
    else:
        add_code(folder, family)
    said = ""
    if results is not None:
        text, said = eval_results(results, config)
        (folder / ".eval_results").mkdir()
        (folder / ".eval_results" / "pope.yaml").write_text(text)
    (folder / "README.md").write_text(model_card(config, repo, base, license, said, config_only))


def _loaded_from(config: Any) -> str | None:
    """The Hub id that a configuration was loaded from; None where it was a folder."""
    name = str(getattr(config, "_name_or_path", "") or "")
    return name if name.count("/") == 1 and not Path(name).exists() and name[0] not in "./~" else None


def _point_at(folder: Path, base: str | None, revision: str | None, family: Family) -> None:
    """Makes a saved folder one of settings alone."""
    if base is None or base.count("/") != 1 or Path(base).exists():
        raise ValueError(f"config_only: base_model={base!r}: the Hub id (owner/name) of the weights is needed.")
    kept = {"config.json", "processor_config.json", "preprocessor_config.json", "chat_template.jinja"}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in kept:
            path.unlink()
    for name in ("config.json", "processor_config.json"):
        file = folder / name
        content = json.loads(file.read_text()) if file.exists() else None
        if content is None:
            continue
        content.pop("auto_map", None)
        content |= {BASE: base} if revision is None else {BASE: base, BASE_REVISION: revision}
        if name == "config.json":
            content["architectures"] = [family.sparse("ForConditionalGeneration").__name__]
        else:  # The class that fetches the tokenizer of the base.
            content["processor_class"] = family.sparse("Processor").__name__
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _upload(
    folder: Path, repo: str, private: bool, update: bool, token: str | None, endpoint: str | None, files: set[str]
) -> str:
    """Makes the repository, pushes the folder in one commit, and looks whether all of it is there."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with _explained(repo, "nothing was pushed"):
        api.whoami()
        if not update and api.repo_exists(repo):
            raise ValueError(f"{repo} is there already; with update (--update) the files are committed to it.")
        api.create_repo(repo, private=private, exist_ok=update)
    state = "nothing was pushed" if update else "the repository was made and is empty; go on with update (--update)"
    with _explained(repo, state):
        commit = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Push a pruned model")
        missing = files - set(api.list_repo_files(repo, revision=commit.oid))
        if missing:
            raise OSError(f"{repo}: {', '.join(sorted(missing))} did not arrive; push again with update (--update).")
    return str(commit.commit_url)


@contextmanager
def _explained(repo: str, state: str) -> Iterator[None]:
    """Errors of the Hub as what they mean, with what has come of the push."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as error:
        raise PermissionError(f"{repo}: no token; `hf auth login`, or HF_TOKEN. {state.capitalize()}.") from error
    except HfHubHTTPError as error:
        status = None if error.response is None else error.response.status_code
        if status in (401, 403):
            raise PermissionError(f"{repo}: the token has no right to write there. {state.capitalize()}.") from error
        raise OSError(f"{repo}: the Hub answered {status}. {state.capitalize()}.") from error
    except ValueError:
        raise
    except Exception as error:  # What the HTTP client raises has no common base that its releases share.
        raise OSError(
            f"{repo}: {' '.join(str(error).split()) or type(error).__name__}. {state.capitalize()}."
        ) from error


def push_stock(model: str, repo: str, settings: dict[str, Any], **options: Any) -> Pushed:
    """As `push`, of a stock checkpoint with settings; with `config_only` its weights are never loaded.

    Args:
        model: Hub id or folder; settings: `sparse_*` keywords; options: of `push`.
    """
    config = AutoConfig.from_pretrained(model, **settings)
    family = _family(config)
    processor = family.sparse("Processor").from_pretrained(model, **settings)
    if options.get("config_only"):
        return push(Settings(config), repo, processor, **options)
    return push(
        family.sparse("ForConditionalGeneration").from_pretrained(model, config=config), repo, processor, **options
    )


@dataclass(frozen=True)
class Settings:
    """What `push` needs of a model for a repository of settings alone."""

    config: Any
