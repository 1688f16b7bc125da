"""Load a published split of a data set from the Hugging Face hub or the local cache."""

import re
from pathlib import Path
from typing import Any

EXPORT = "refs/convert/parquet"
"""Branch on which the hub stores its Parquet copy of a data set, with one folder per config."""

_COMMIT = re.compile("[0-9a-f]{40}")


def load_published(
    repo: str,
    config: str | None = None,
    *,
    split: str,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
) -> Any:
    """Return a published split as a `datasets.Dataset`.

    The hub's Parquet copy ("refs/convert/parquet") does not declare its configs. `datasets` finds
    no config there, and without one it returns the rows of all configs together. So the files are
    fetched by their names, from the folder "default" if no config is given. This also makes them
    available offline later.

    Args:
        repo: id of the data set, owner/name.
        config: configuration of the data set, or None.
        split: published split, possibly a slice such as "train[:500]".
        revision: branch, tag or commit; None means the main branch.
        cache_dir: cache folder of `datasets`; None means its default.

    Raises:
        FileNotFoundError: the Parquet copy has no such split.
        Exception: any error of `datasets` and `huggingface_hub`; see `source_errors`.
    """
    from datasets import config as settings
    from datasets import load_dataset

    cache = None if cache_dir is None else str(cache_dir)
    if revision != EXPORT:
        return load_dataset(repo, config, split=split, revision=revision, cache_dir=cache)
    from huggingface_hub import snapshot_download

    whole, config = split.partition("[")[0], config or "default"
    # Current copies have one folder per split; older ones have one file per split.
    patterns = [f"{config}/{whole}/*.parquet", f"{config}/*-{whole}.parquet"]
    folder = Path(
        snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
    )
    paths = sorted(str(path) for pattern in patterns for path in folder.glob(pattern))
    if not paths:
        raise FileNotFoundError(
            f"no file of the split {whole} of {config} in the Parquet copy of {repo}; check config "
            "and split"
        )
    # The path contains the commit, as for other data sets of the hub; `commit_of` reads it.
    cache = Path(cache or settings.HF_DATASETS_CACHE) / repo.replace("/", "___") / folder.name
    files = {whole: paths}
    return load_dataset("parquet", data_files=files, split=split, cache_dir=str(cache))


def commit_of(dataset: Any) -> str | None:
    """Return the hub commit of a data set, or None if it is not from the hub."""
    # `datasets` caches a data set of the hub in a folder named by its commit.
    folders = (name for file in dataset.cache_files for name in Path(file["filename"]).parts)
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def source_errors() -> tuple[type[Exception], ...]:
    """Return the error types that mean that a source cannot provide a data set."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's HTTP client has its own error types and differs between versions. In all versions
    # they are the base classes of HfHubHTTPError.
    client: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    return (RuntimeError, OSError, ValueError, DatasetsError, *client)


def hub_access(timeout: float) -> str:
    """Return in words whether the hub answers, and whether a token is set; the token is not shown.

    Args:
        timeout: seconds to wait for an answer.
    """
    from huggingface_hub import constants, get_session, get_token

    token = "a token is set" if get_token() else "no token (private and gated models need one)"
    if constants.HF_HUB_OFFLINE:
        return f"{constants.ENDPOINT} is not asked: HF_HUB_OFFLINE is set; {token}"
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=timeout)
    except source_errors() as error:
        why = type(error).__name__
        return f"{constants.ENDPOINT} does not answer ({why}): use local models and files; {token}"
    return f"{constants.ENDPOINT} answers ({answer.status_code}); {token}"
