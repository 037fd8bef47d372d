"""What a MODEL argument names, found without loading weights (and without importing torch).

MODEL is `demo`, a hub id, a folder, a `.gguf` file, a run directory, or an adapter folder. `resolve` looks at the
disk alone; `locate` also asks the hub, once and briefly, so that no later call waits for a network that is not there.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from longlora.errors import UserError, nearest

Kind = Literal["demo", "hub", "folder", "gguf", "run", "adapter"]

HUB_TIMEOUT = 10.0
"""Seconds to wait for the hub's first answer."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

OLD_WEIGHTS, TRAINED_PARTS = "adapter_model.bin", "trainable_params.bin"
"""An adapter as the original LongLoRA released it: pickles, read as tensors alone (`weights_only`)."""

_READ = (ADAPTER_WEIGHTS, OLD_WEIGHTS, TRAINED_PARTS)
_OF_TRAINING = ("optimizer.", "scheduler.", "scaler.", "training_args.", "rng_state", "random-")
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where a MODEL's weights and settings are."""

    name: str
    """MODEL as it was given."""

    kind: Kind

    location: str
    """Hub id, absolute folder (of a run: its `adapter/` or `model/`) or absolute `.gguf` file."""

    is_adapter: bool = False
    """The location holds an adapter, not whole weights."""

    base: str | None = None
    """MODEL that an adapter goes on, or that a run was trained from."""

    base_revision: str | None = None
    """Hub revision of `base`."""

    revision: str | None = None
    """Branch, tag or commit on the hub."""

    local_only: bool = False
    """The hub cannot be reached and the model is in its local cache."""

    def file(self, name: str) -> Path:
        """A file beside the weights of a local source."""
        return Path(self.location) / name


def resolve(model: str | Path, revision: str | None = None) -> ModelSource:
    """What `model` names, from the disk alone; a name that may be a hub id is taken for one.

    Raises:
        UserError: no such file or folder, a folder without a model, a run that has not finished, an adapter whose
            base is unknown, weights that are pickles, or a revision of something that is not on the hub.
    """
    name = str(model)
    source = _resolve(name, may_be_hub=isinstance(model, str))
    if revision is not None and source.kind != "hub":
        raise UserError(f"revision '{revision}' was given, but MODEL '{name}' is not on the hub: leave it out.")
    return replace(source, revision=revision)


def _resolve(name: str, may_be_hub: bool) -> ModelSource:
    if name == "demo":
        folder = str(files("longlora") / "assets" / "demo_model")
        return ModelSource(name=name, kind="demo", location=folder)
    path = Path(name).expanduser()
    if path.is_dir():
        return _folder(name, path.absolute())
    if path.is_file() and path.suffix == ".gguf":
        return ModelSource(name=name, kind="gguf", location=str(path.absolute()))
    if path.is_file():
        raise UserError(f"MODEL '{name}' is a file, but not a .gguf: give {_allowed()}.")
    local = name.startswith((".", "/", "~")) or name.endswith(".gguf") or ("/" in name and path.parent.is_dir())
    if may_be_hub and not local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        return ModelSource(name=name, kind="hub", location=name)
    raise UserError(f"MODEL '{name}' is not there: give {_allowed()}.{_nearest_local(name)}")


def _allowed() -> str:
    return "'demo', a hub id (name or owner/name), a model folder, a .gguf file, a run directory or an adapter folder"


def _nearest_local(name: str) -> str:
    """` Did you mean …?` out of `demo` and what lies beside the missing path, or nothing."""
    path = Path(name).expanduser()
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    prefix = name.removesuffix(path.name) if name.endswith(path.name) else ""
    names = [prefix + entry.name for entry in beside if entry.is_dir() or entry.suffix == ".gguf"]
    hint = nearest(name, ["demo", *names])
    return f" {hint}" if hint else ""


def _folder(name: str, folder: Path) -> ModelSource:
    settings = _run_settings(folder)
    if settings is not None:
        return _run(name, folder, settings)
    if (folder / ADAPTER_CONFIG).is_file():
        return _adapter(name, folder)
    if (folder / "config.json").is_file():
        _require_safetensors(name, folder)
        return ModelSource(name=name, kind="folder", location=str(folder))
    if gguf := sorted(folder.glob("*.gguf")):
        raise UserError(f"folder '{name}' holds GGUF files and no config.json: name the file, '{gguf[0]}'.")
    raise UserError(f"folder '{name}' holds no model (it has no config.json): give {_allowed()}.{_nearest_local(name)}")


def _require_safetensors(name: str, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
    if not pickles:
        raise UserError(f"folder '{name}' has a config.json but no weights: it needs model.safetensors.")
    raise UserError(
        f"folder '{name}' has its weights as pickles only ({pickles[0]}), which can run code when read: if you trust "
        f'them, convert them with `python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{name}').save_pretrained('{name}')\"`."
    )


def _run_settings(folder: Path) -> dict[str, Any] | None:
    """settings.yaml of a run directory, `None` where `folder` is not one."""
    path = folder / "settings.yaml"
    if not path.is_file():
        return None
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not valid YAML ({first_line(error)}): mend it or give another MODEL.") from error
    return settings if isinstance(settings, dict) and "model" in settings else None


def _run(name: str, folder: Path, settings: dict[str, Any]) -> ModelSource:
    if (folder / "adapter" / ADAPTER_WEIGHTS).is_file():
        return _adapter(name, folder / "adapter")
    if (folder / "model" / "config.json").is_file():
        _require_safetensors(f"{name}/model", folder / "model")
        base, revision = str(settings["model"]), settings.get("revision")
        return ModelSource(name=name, kind="run", location=str(folder / "model"), base=base, base_revision=revision)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: (len(path.name), path.name))
    have = f"its last checkpoint is {checkpoints[-1].name}" if checkpoints else "it has no checkpoint yet"
    raise UserError(
        f"run '{name}' has not finished, it has no adapter/ or model/ yet ({have}): "
        "give its command again with --resume."
    )


def _adapter(name: str, folder: Path) -> ModelSource:
    """An adapter folder, on its own or as `adapter/` or `checkpoint-N/` of a run directory."""
    run = _run_settings(folder.parent)
    if not any((folder / weights).is_file() for weights in (ADAPTER_WEIGHTS, OLD_WEIGHTS)):
        raise UserError(f"adapter '{name}' has no {ADAPTER_WEIGHTS}: save it again with PEFT's save_pretrained.")
    _refuse_unread_weights(name, [path.name for path in folder.iterdir()])
    if not (folder / "config.json").is_file():
        # The base would come up with a window of its own, and silently be a different model.
        raise UserError(
            f"adapter '{name}' has no config.json beside it, so nobody knows the window that it was trained for: save "
            f"there the config of the model that was trained (`model.config.save_pretrained('{name}')` after "
            "longlora.extend_positions); for an adapter that left the positions as they were that is its base's own."
        )
    try:
        recorded = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"'{folder / ADAPTER_CONFIG}' is not an adapter's JSON ({first_line(error)}).") from error
    # The run's own words first: `demo` holds on every machine, an absolute path only where it was written.
    # An adapter that went on training is recorded with the model it goes on, which is not the run it came from.
    went_on = run is not None and run.get("base") is not None
    given = run and run["base" if went_on else "model"]
    revision = run.get("base_revision" if went_on else "revision") if run else None
    # Beside `longlora merge --keep-lora`'s adapter is its base, wherever the folder was moved.
    around = (folder.parent / "config.json").is_file() and not (folder.parent / ADAPTER_CONFIG).is_file()
    candidates = [str(candidate) for candidate in (given, recorded, around and folder.parent) if candidate]
    if not candidates:
        raise UserError(f"adapter '{name}' does not say its base: set base_model_name_or_path in {ADAPTER_CONFIG}.")
    here = [base for base in candidates if base == "demo" or Path(base).expanduser().exists()]
    base = (here or candidates)[0]
    if Path(base).expanduser().absolute() in (folder, *([folder.parent] if run is not None else [])):
        raise UserError(f"adapter '{name}' names itself as its base: set base_model_name_or_path in {ADAPTER_CONFIG}.")
    return ModelSource(
        name=name,
        kind="run" if run is not None and Path(name).name != folder.name else "adapter",
        location=str(folder),
        is_adapter=True,
        base=base,
        base_revision=revision if base == given else None,
    )


def _refuse_unread_weights(name: str, files: Iterable[str]) -> None:
    """What lies beside an adapter may change its model: named, never passed over."""
    for file in sorted(files):
        if file.endswith(_WEIGHTS) and file not in _READ and "/" not in file and not file.startswith(_OF_TRAINING):
            raise UserError(
                f"adapter '{name}' has {file} beside it, which longlora does not read and which may be a part of the "
                "model: merge it with the tool that wrote it, or move the file away if it is none."
            )


def locate(model: str | Path, revision: str | None = None) -> ModelSource:
    """`resolve`, and for a hub id one question to the hub: is it there, is it an adapter, has it safe weights?

    An adapter's (small) files are downloaded, so that it is a local folder from here on.

    Raises:
        UserError: as `resolve`, or the hub does not have it, or cannot be reached and the cache does not either.
    """
    source = resolve(model, revision)
    return _ask_hub(source) if source.kind == "hub" else source


def base_of(source: ModelSource) -> ModelSource:
    """Where the model that an adapter goes on, or that a run was trained from, is."""
    assert source.base is not None, f"'{source.name}' has no base"
    on_hub = resolve(source.base).kind == "hub"
    return locate(source.base, source.base_revision if on_hub else None)


def _ask_hub(source: ModelSource) -> ModelSource:
    from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    name, revision = source.name, source.revision
    try:
        siblings = HfApi().model_info(name, revision=revision, timeout=HUB_TIMEOUT).siblings or []
        there = {sibling.rfilename for sibling in siblings}
    except GatedRepoError as error:
        raise UserError(f"hub model '{name}' is gated: accept its terms on the hub and run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"hub model '{name}' has no revision '{revision}': give a branch, tag or commit.") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"MODEL '{name}' is no file or folder here, and the hub has no such model (or it is private: run "
            f"`hf auth login`).{_nearest_local(name)}"
        ) from error
    except Exception as error:  # the HTTP client, and so its exceptions, differ between versions of the hub library
        wanted = ("config.json", ADAPTER_CONFIG)
        there = {file for file in wanted if isinstance(try_to_load_from_cache(name, file, revision=revision), str)}
        if not there:
            raise UserError(
                f"MODEL '{name}' is no file or folder here, and the hub cannot be reached for it "
                f"({first_line(error)}): check the name and the network.{_nearest_local(name)}"
            ) from error
        source = replace(source, local_only=True)
    if ADAPTER_CONFIG in there:
        _refuse_unread_weights(name, there)
        patterns = ["*.json", "*.jinja", "*.model", "*.txt", *_READ]
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=source.local_only)
        return replace(_adapter(name, Path(folder)), revision=revision)
    if not source.local_only and not any(file.endswith(".safetensors") for file in there):
        raise UserError(
            f"hub model '{name}' has no safetensors weights, and pickles can run code when read: choose a revision or "
            "a copy with safetensors, or download a .gguf and give the file."
        )
    return source


def first_line(error: BaseException) -> str:
    """The first line of a library's message, to quote in a sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".: ")
