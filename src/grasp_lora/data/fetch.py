"""One published split of a data set of the hub, fetched now or found where it was kept."""

import re
from pathlib import Path
from typing import Any

EXPORT = "refs/convert/parquet"
"""The branch on which the hub keeps its own Parquet copy of a data set, a folder a config."""

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

    The hub's own Parquet copy ("refs/convert/parquet") names no configs: `datasets` finds none of
    them there, and asked for none it gives the rows of all as one. So its files are fetched by
    their names, those of the folder "default" without a config; that also lets them be found
    again offline.

    Raises:
        FileNotFoundError: if the Parquet copy has no such split; and what `datasets` and
            `huggingface_hub` raise.
    """
    from datasets import config as settings
    from datasets import load_dataset

    kept = None if cache_dir is None else str(cache_dir)
    if revision != EXPORT:
        return load_dataset(repo, config, split=split, revision=revision, cache_dir=kept)
    from huggingface_hub import snapshot_download

    whole, config = split.partition("[")[0], config or "default"
    # A folder a split today, one file a split in older copies.
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
    # The commit is part of the path, as it is for other data sets of the hub.
    kept = Path(kept or settings.HF_DATASETS_CACHE) / repo.replace("/", "___") / folder.name
    files = {whole: paths}
    return load_dataset("parquet", data_files=files, split=split, cache_dir=str(kept))


def commit_of(dataset: Any) -> str | None:
    """Return the commit of the hub a data set was read at, None where it is not from the hub."""
    # `datasets` keeps a data set of the hub in a folder called as its commit.
    folders = (name for file in dataset.cache_files for name in Path(file["filename"]).parts)
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def source_errors() -> tuple[type[Exception], ...]:
    """Return the errors that mean "not from this place"; a fault of our own is none of them."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    # The hub's HTTP client raises errors of its own, and which client that is has changed; what
    # stays is that the hub's own error is built on them.
    client: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    return (RuntimeError, OSError, ValueError, DatasetsError, *client)
