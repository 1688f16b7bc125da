"""Convert GGUF backbones once and keep the result in the user's cache folder.

Reading a GGUF file means undoing its quantization, which is many times slower than reading
safetensors. The converted weights are stored in float32 and cast when they are loaded.
"""

import functools
import importlib
import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from grasp_lora.base.files import files_below, follow_umask, sync, sync_folder
from grasp_lora.base.owner import held, lock_beside
from grasp_lora.base.words import shown_path
from grasp_lora.models.sources import GgufSource

Notice = Callable[[str], None]
"""Receives a one-line message for the user."""


def cache_folder() -> Path:
    """Return this library's cache folder: `GRASP_LORA_CACHE`, or one in the system's cache."""
    chosen = os.environ.get("GRASP_LORA_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "grasp-lora"


def converted_backbone(source: GgufSource, notice: Notice) -> Path:
    """Return the cache folder with a GGUF source's model and tokenizer; convert it on first use.

    The folder is written under another name, synced and renamed, so a folder in the cache is
    complete.

    Raises:
        ValueError: the `gguf` package is missing, or transformers cannot read the file.
        OSError: the cache cannot be written.
    """
    target = cache_folder() / "backbones" / f"{source.label}-{source.digest}"
    if target.is_dir():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("reading .gguf files needs the package gguf; run: pip install gguf")
    if source.terms:
        notice(source.terms)
    with held(lock_beside(target), target, notice, wait=True):
        if not target.is_dir():  # another process may have converted it meanwhile
            notice(f"Converting {source.label} once (a minute for 100M parameters) to {target}")
            _convert_into(source, target)
    return target


def _convert_into(source: GgufSource, target: Path) -> None:
    for left in target.parent.glob(f".{target.name}.*.tmp"):
        shutil.rmtree(left, ignore_errors=True)  # by a killed process
    staging = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    staging.mkdir(parents=True)
    try:
        _convert(source, staging)
        follow_umask(staging, staging / "config.json")
        sync(staging, files_below(staging))
        try:
            staging.rename(target)
            sync_folder(target.parent)
        except OSError:
            if not target.is_dir():  # another process may have finished first
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _convert(source: GgufSource, staging: Path) -> None:
    scratch = staging / "scratch"
    scratch.mkdir()
    file = source.assemble(scratch)
    try:
        with progress_bars_hidden(), _one_map_of_names():
            tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
            model = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            shutil.rmtree(scratch)
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            _remove_indentation(staging / "tokenizer.json")
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the system, such as a full disk
        raise ValueError(
            f"transformers cannot read {shown_path(file)} ({error}); use a GGUF file of a "
            "supported architecture, or the model's original folder"
        ) from error


@contextmanager
def _one_map_of_names() -> Iterator[None]:
    """Let gguf make its map of tensor names once: transformers asks for it for every module.

    That is a third of the time it takes to convert a model of 135M parameters.
    """
    gguf: Any = importlib.import_module("gguf")
    made = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(made)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = made


def _remove_indentation(file: Path) -> None:
    """Rewrite a tokenizer's JSON without indentation; large vocabularies then load much faster."""
    if file.is_file():
        content = json.loads(file.read_text(encoding="utf-8"))
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        file.write_text(text, encoding="utf-8")


@contextmanager
def progress_bars_hidden() -> Iterator[None]:
    """Switch transformers' progress bars off for the body."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
