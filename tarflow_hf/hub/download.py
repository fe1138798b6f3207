"""Fetching a pipeline from the Hub or its cache, and saying in words why one cannot be had."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tarflow_hf.hub.checkpoint_files import CONFIG, INDEX, INVERSE_CONFIG, VAE_CONFIG, VAE_STEM, weight_names
from tarflow_hf.hub.pipeline_index import check_index


@dataclass(frozen=True)
class DownloadOptions:
    """Which version of a repository is wanted, and where it may come from.

    Args:
        revision: Branch, tag, commit or "refs/pr/1"; None for main.
        token: Access token, True for the stored one, False for none.
        cache_dir: Where downloads are kept, in place of the usual cache.
        local_files_only: Whether to use the cache alone; `HF_HUB_OFFLINE=1` does the same.
        force_download: Whether to download again what is in the cache.

    Example:
        >>> arguments = {"revision": "v1", "dtype": torch.bfloat16}
        >>> DownloadOptions.taken_from(arguments).revision, arguments
        ('v1', {'dtype': torch.bfloat16})
    """

    revision: str | None = None
    token: bool | str | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> Self:
        """Those of a call's keyword arguments that are options of a download, which are removed there."""
        return cls(**{item.name: arguments.pop(item.name) for item in fields(cls) if item.name in arguments})


def download(repo_id: str, *, variant: str | None = None, options: DownloadOptions | None = None) -> Path:
    """Fetches what a pipeline needs from the Hub, or finds it in the cache, after a look whether it is a TarFlow.

    Args:
        repo_id: "user/model".
        variant: Weights to fetch, as in [`repositories.HubPipeline.from_pretrained`].
        options: Which version, and from where; None for the newest of main.

    Returns:
        The folder of the snapshot in the cache.

    Raises:
        OSError: If the repository cannot be loaded; the message says why.

    Example:
        >>> folder = download("user/digits", variant="fp16")  # doctest: +SKIP
        >>> download("no/such/name")
        Traceback (most recent call last):
            ...
        OSError: 'no/such/name' is neither a folder nor the name of a Hub repository (user/model)
    """
    patterns = [INDEX, CONFIG, *(f"transformer/{name}" for name in weight_names(variant))]
    patterns += [INVERSE_CONFIG, *(f"inverse/{name}" for name in weight_names(variant))]
    patterns += [VAE_CONFIG, *(f"vae/{name}" for name in weight_names(variant, VAE_STEM))]
    return _snapshot(repo_id, INDEX, patterns, options, lambda folder: check_index(folder, repo_id))


def download_model(
    repo_id: str,
    *,
    subfolder: str = "",
    variant: str | None = None,
    options: DownloadOptions | None = None,
    stem: str = "model",
) -> Path:
    """Fetches configuration and weights of a model from the Hub, or finds them in the cache.

    Args:
        repo_id: "user/model".
        subfolder: Folder of the model in the repository, "transformer" of a pipeline's.
        variant: Weights to fetch.
        options: Which version, and from where; None for the newest of main.
        stem: How the names of its weights begin, see [`checkpoint_files.weight_names`].

    Returns:
        The folder of the snapshot in the cache, above `subfolder`.

    Raises:
        OSError: If the repository cannot be loaded; the message says why.

    Example:
        >>> download_model("no/such/name")
        Traceback (most recent call last):
            ...
        OSError: 'no/such/name' is neither a folder nor the name of a Hub repository (user/model)
    """
    inside = f"{subfolder}/" if subfolder else ""
    patterns = [f"{inside}{name}" for name in ("config.json", *weight_names(variant, stem))]
    return _snapshot(repo_id, patterns[0], patterns, options)


def _snapshot(
    repo_id: str,
    first: str,
    patterns: list[str],
    options: DownloadOptions | None,
    check: Callable[[Path], object] = lambda folder: None,
) -> Path:
    """The folder of the files of one commit; the others are fetched after the first one has been checked."""
    where = {**asdict(options or DownloadOptions()), "library_name": "tarflow_hf"}
    revision = where.pop("revision")
    try:
        found = Path(hf_hub_download(repo_id, first, revision=revision, **where))
        folder = found.parents[first.count("/")]
        check(folder)
        return Path(snapshot_download(repo_id, revision=folder.name, allow_patterns=patterns, **where))
    except HFValidationError as error:
        raise OSError(f"{repo_id!r} is neither a folder nor the name of a Hub repository (user/model)") from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        raise OSError(_explain(error, repo_id, revision, first)) from error


def _explain(error: Exception, repo_id: str, revision: str | None, first: str) -> str:
    """Why a repository cannot be loaded, in words."""
    name = repr(repo_id) if revision is None else f"{repo_id!r} at {revision!r}"
    if isinstance(error, GatedRepoError):
        return f"{repo_id!r} is gated: accept its conditions on the Hub, and pass the token of that account"
    if isinstance(error, RepositoryNotFoundError):
        with_token = "authorization" in error.response.request.headers
        sent = "the token that was sent has no access to it" if with_token else "no token was sent"
        return (
            f"there is no folder and no Hub repository {repo_id!r}, or it is private and {sent}: "
            "pass token=... or log in with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no branch, tag or commit {revision!r}"
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{name} is not a TarFlow {'pipeline' if first == INDEX else 'model'}: it has no {first}"
    if isinstance(error, LocalEntryNotFoundError):
        return f"{name} is not, or not completely, in the cache, and the Hub was not asked or not reached: {error}"
    return f"the Hub does not give {name}: {error.__cause__ or error}"


__all__ = ["DownloadOptions", "download", "download_model"]
