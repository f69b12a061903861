"""`best_model.pt`: one file with everything the service and the trainer need.

Keys: `epoch`, `step`, `model_state_dict`, `optimizer_state_dict`, `scheduler_state_dict`, `loss`, `config`
(`{"model": ..., "training": ...}`) and `tokenizer` (the tokenizer's JSON). A resumable checkpoint adds `progress`:
the best loss and what it was measured on, the running average, and which checkpoints the run keeps. Everything random
follows from the step and the run's seed. A release drops `progress` and the states of optimizer and scheduler.

Files are read with `weights_only=True`: a pickle that would run code is refused, never executed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import reprlib
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import init
from torch.overrides import TorchFunctionMode

from rdt_core.config import REQUEST_DEFAULTS, ModelConfig
from rdt_core.model import RDT
from rdt_core.tokenizer import Tokenizer

REQUIRED_KEYS = ("model_state_dict", "config", "tokenizer")

NAME_CHARACTERS = 255  # as many as a folder's name may have
PROBLEM_CHARACTERS = 1000


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message names the file and what is wrong with it.

    It may quote anything from the file, so the message is cut short and lone surrogates are escaped.
    """

    def __init__(self, path: str | Path, problem: str) -> None:
        message = f"{path}: {problem[:PROBLEM_CHARACTERS]}"
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))


@dataclass
class Checkpoint:
    """The contents of one file. `config["model"]` holds the fields of `ModelConfig`."""

    model_state_dict: dict[str, Tensor]
    config: dict[str, Any]
    tokenizer: str
    epoch: int = 0
    step: int = 0
    loss: float | None = None
    optimizer_state_dict: dict[str, Any] | None = None
    scheduler_state_dict: dict[str, Any] | None = None
    progress: dict[str, Any] | None = None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to restore text, and where it came from."""

    model: RDT
    tokenizer: Tokenizer
    name: str
    digest: str
    checkpoint: Checkpoint


def save(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write atomically: the file at `path` is the old one or the whole new one, never a part.

    A link stays and its target is replaced, with the mode it had. Raises `OSError`.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: cannot be written: it is no regular file")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(vars(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    except (RuntimeError, OSError) as error:
        told = error if isinstance(error, OSError) else error.__context__  # torch hides the OSError of a full disk
        reason = told if isinstance(told, OSError) else error
        raise OSError(f"{path}: cannot be written: {_first_line(reason)}") from error
    finally:
        partial.unlink(missing_ok=True)


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint's contents onto the CPU. Raises `CheckpointError`; executes nothing."""
    if not Path(path).is_file():
        raise CheckpointError(path, "no regular file" if Path(path).exists() else "no such file")
    try:
        with open(path, "rb") as file:
            archived = zipfile.is_zipfile(file)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if not archived:
        raise CheckpointError(path, "not a checkpoint, or cut short: a checkpoint is a zip archive")
    try:
        with zipfile.ZipFile(path) as archive:
            _check_size(path, archive)
            values = torch.load(path, map_location="cpu", weights_only=True)
            broken = archive.testzip()  # torch does not check the checksums of tensors
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(path, f"refused: it holds more than tensors and plain values{_refused(error)}") from error
    except Exception as error:  # a damaged archive surfaces as RuntimeError, EOFError, KeyError, ...
        raise CheckpointError(path, f"damaged: {_first_line(error)}") from error
    if broken is not None:
        raise CheckpointError(path, f"damaged: {broken} does not match its checksum")
    if not isinstance(values, dict):
        raise CheckpointError(path, f"holds a {type(values).__name__}, not a checkpoint's dictionary")
    missing = [key for key in REQUIRED_KEYS if key not in values]
    if missing:
        raise CheckpointError(path, f"has no {', '.join(missing)}")
    weights = values["model_state_dict"]
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    ):
        raise CheckpointError(path, "model_state_dict is not a dictionary of tensors")
    known = {name: values[name] for name in Checkpoint.__dataclass_fields__ if name in values}
    return Checkpoint(**known)


def load(path: str | Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Build the model a checkpoint describes, in float32 and in evaluation mode, on `device`.

    Raises `CheckpointError` when the file, its configuration, weights and vocabulary do not fit together.
    """
    before = _version(path)
    checkpoint, read_digest = read(path), digest(path)
    if _version(path) != before:
        raise CheckpointError(path, "was replaced while it was being read: try again")
    model, tokenizer = _described(path, checkpoint)
    name = _name(path, checkpoint.config)
    weights = {name: tensor.to(torch.float32) for name, tensor in checkpoint.model_state_dict.items()}
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(False)
    return LoadedModel(model.to(device).eval(), tokenizer, name, read_digest, checkpoint)


def export_release(
    source: str | Path,
    target: str | Path,
    *,
    name: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the weights alone, as `dtype`: what is served, without what training needs.

    `defaults` replaces fields of the model's configuration (`halting`, `max_steps`, `threshold`).
    Raises `CheckpointError` for the source, `ValueError` for a default out of range and for a target that is the
    source. What was at the target stays unless the release can be loaded.
    """
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"{target} is the checkpoint itself: a release would overwrite what training needs")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype is {dtype}: want a floating point format")
    if unknown := sorted(set(defaults or {}) - set(REQUEST_DEFAULTS)):
        raise ValueError(f"{unknown[0]} is no default of requests: want {', '.join(REQUEST_DEFAULTS)}")
    checkpoint = read(source)
    model, _ = _described(source, checkpoint)
    config = {**_without_folders(checkpoint.config), "name": name or checkpoint.config.get("name")}
    config["model"] = model.config.with_changes(**(defaults or {})).to_mapping()
    _name(target, config)
    weights = {key: tensor.to(dtype) for key, tensor in checkpoint.model_state_dict.items()}
    check_weights(source, model, weights, f"as {str(dtype).removeprefix('torch.')} ")
    save(target, Checkpoint(weights, config, checkpoint.tokenizer, checkpoint.epoch, checkpoint.step, checkpoint.loss))


def digest(path: str | Path) -> str:
    """SHA-256 of the file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_config(path: str | Path, checkpoint: Checkpoint) -> ModelConfig:
    """The shape a checkpoint describes. Raises `CheckpointError`."""
    config = checkpoint.config
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError(path, "config has no 'model' section")
    try:
        return ModelConfig.from_mapping(config["model"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"config: {error}") from error


def tokenizer_of(path: str | Path, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer a checkpoint carries. Raises `CheckpointError`."""
    try:
        return Tokenizer(checkpoint.tokenizer)
    except (ValueError, TypeError) as error:
        raise CheckpointError(path, f"tokenizer: {error}") from error


def checked_name(name: object) -> str:
    """What a model may be called. Raises `ValueError`."""
    if not isinstance(name, str) or len(name) > NAME_CHARACTERS or not name.isprintable():
        raise ValueError(f"name is {reprlib.repr(name)}: want at most {NAME_CHARACTERS} printable characters")
    return name


def _name(path: str | Path, config: Mapping[str, Any]) -> str:
    """What a model is called: what its configuration says, or else the folder it is in. Raises `CheckpointError`."""
    name = config.get("name")
    try:
        return checked_name(Path(path).resolve().parent.name if name is None or name == "" else name)
    except ValueError as error:
        raise CheckpointError(path, f"its {error}") from error


def _described(path: str | Path, checkpoint: Checkpoint) -> tuple[RDT, Tokenizer]:
    """The model that a checkpoint describes, without weights, and its tokenizer.

    Raises `CheckpointError` unless these and the weights fit together.
    """
    config, tokenizer = model_config(path, checkpoint), tokenizer_of(path, checkpoint)
    if tokenizer.vocab_size != config.vocab_size:
        raise CheckpointError(
            path, f"the tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size is {config.vocab_size}"
        )
    model = _without_weights(path, config)
    check_weights(path, model, checkpoint.model_state_dict)
    _check_apart(path, checkpoint.model_state_dict)
    return model, tokenizer


class _WithoutRandomInit(TorchFunctionMode):
    """Leaves out random initialisation: on `meta` there are no values, and torch would import its compiler for it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (init.uniform_, init.normal_, init.kaiming_uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _without_weights(path: str | Path, config: ModelConfig) -> RDT:
    """The model on the device `meta`: names and shapes of its weights, without their values."""
    try:
        with torch.device("meta"), _WithoutRandomInit():
            return RDT(config)
    except (RuntimeError, TypeError, OverflowError) as error:  # sizes that no tensor can have
        raise CheckpointError(path, f"config: no such model can be made: {_first_line(error)}") from error


def check_weights(path: str | Path, model: RDT, weights: Mapping[str, Tensor], how: str = "") -> None:
    """Raise `CheckpointError` unless the weights are finite, as float32, and exactly the model's, by name and shape."""
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise CheckpointError(path, f"model_state_dict has no {name}")
        if name not in expected:
            raise CheckpointError(path, f"model_state_dict has {name}, which the configuration does not")
        if not _is_dense(weights[name]):  # others may have no shape
            raise CheckpointError(path, f"{name} is no dense tensor")
        if expected[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, want {tuple(expected[name].shape)}"
            raise CheckpointError(path, f"{name} has shape {shapes}")
        if not weights[name].is_floating_point():
            raise CheckpointError(path, f"{name} holds {weights[name].dtype}: want a floating point format")
        if not torch.isfinite(weights[name].to(torch.float32)).all():
            raise CheckpointError(path, f"{name} holds values that are not finite numbers {how}".rstrip())


def _check_apart(path: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` for weights that share values: loaded, each gets its own, and a small file any number."""
    held = {(storage := tensor.untyped_storage()).data_ptr(): storage.nbytes() for tensor in weights.values()}
    if sum(held.values()) < sum(tensor.nbytes for tensor in weights.values()):
        raise CheckpointError(path, "model_state_dict has weights that share their values: want each its own")


def _is_dense(tensor: Tensor) -> bool:
    """Whether it has a value of its own at each place: a file of a few bytes may hold an expanded one of any size."""
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def _check_size(path: str | Path, archive: zipfile.ZipFile) -> None:
    """Raise `CheckpointError` for an archive that unpacks to more bytes than it has, as a small one may to any number.
    torch compresses nothing.
    """
    if sum(entry.file_size for entry in archive.infolist()) > os.path.getsize(path):
        raise CheckpointError(path, "refused: it unpacks to more than the file has: a checkpoint is not compressed")


def _version(path: str | Path) -> tuple[int, ...]:
    """Changes when the file is written again or replaced; empty if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _without_folders(value: Any) -> Any:
    """The same settings with absolute paths cut to file names: where a run kept its files is not published."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, str):
        return ",".join(Path(part).name if Path(part).is_absolute() else part for part in value.split(","))
    return value


def _refused(error: Exception) -> str:
    """The type that torch refused, for the end of a message; empty if torch does not say which."""
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f": {found[1]}" if found else ""


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
