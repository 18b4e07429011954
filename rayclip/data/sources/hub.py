"""Source of data sets on the Hugging Face hub, downloaded file by file on demand.

Files go to the hub library's own cache, where other programs find them. Interrupted downloads are resumed; complete
files are never downloaded again.
"""

import errno
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rayclip.data.labels import Reading, read_class_names
from rayclip.data.layout import SPLITS, by_config, choose_config, own_split
from rayclip.data.registry import Hub
from rayclip.data.sources.base import Shard, Source, choose_split
from rayclip.data.sources.parquet_files import ParquetSource
from rayclip.data.sources.webdataset import WebDatasetSource, counted_tars
from rayclip.types import UserError

_T = TypeVar("_T")


def open_hub(
    hub: Hub,
    *,
    revision: str | None = None,
    splits: Sequence[str] | None = None,
    captions: bool = False,
    reading: Reading = Reading(),
) -> Source:
    """Open a data set of the hub at one commit. For Parquet, the first file is downloaded now, for its class names.

    Args:
        revision: branch, tag or commit; None for the newest. The commit that it refers to now is in the description.
        splits: the splits wanted, by our names; None for all.

    Raises:
        UserError: no such repository, revision or split, no access, no network, or files of another form; also later.
    """
    chosen = {split: choose_split(hub.splits, split, hub.repo) for split in splits or hub.splits}
    repo = _resolve(hub.repo, revision)
    description = {"kind": "hub", "repo": hub.repo, "revision": repo.sha, "form": hub.form, **reading.decisive()}
    if hub.form == "parquet":
        files = {split: [repo.shard(f) for f in _parquet_files(repo, name)] for split, name in chosen.items()}
        return ParquetSource(files, hub.repo, captions, description, reading)
    tars = {split: [repo.shard(f) for f in _tar_files(repo, name)] for split, name in chosen.items()}
    class_names: tuple[str, ...] = ()
    if "classnames.txt" in repo.files and not captions:
        class_names = read_class_names(repo.fetch("classnames.txt"), plain=True)
    return WebDatasetSource(tars, class_names, description, reading)


def parse_hub(text: str, *, revision: str | None = None) -> Hub:
    """Describe a repository that is not in the registry, `ORG/NAME` or `ORG/NAME/CONFIG`, for `open_hub`. Raises
    `UserError` if it holds neither WebDataset nor Parquet, or see `open_hub`."""
    parts = text.split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise UserError(f"'{text}' is no data set of the hub: write ORG/NAME.")
    name = "/".join(parts[:2])
    repo = _resolve(name, revision)
    tars = {split: n for split, names in SPLITS.items() for n in names if f"{n}/nshards.txt" in repo.files}
    if tars and len(parts) == 2:
        return Hub(repo=name, form="webdataset", splits=tars)
    configs = by_config(repo.files)
    chosen = parts[2] if len(parts) > 2 else choose_config(configs)
    if configs and chosen is None:
        raise UserError(
            f"{name} has the configurations {', '.join(sorted(configs))}: give one as {name}/{min(configs)}."
        )
    if chosen not in configs:
        raise UserError(
            f"{text} has neither WebDataset (test/nshards.txt, test/0.tar) nor Parquet files (data/test-*.parquet): "
            "download and unpack it yourself, then give its folder."
        )
    below = f"{chosen}/" if chosen else ""
    return Hub(repo=name, form="parquet", splits={split: below + split for split in configs[chosen]})


@dataclass(frozen=True, kw_only=True)
class _Repo:
    """A repository at one commit."""

    name: str
    endpoint: str
    sha: str
    files: frozenset[str]

    def fetch(self, file: str) -> Path:
        """Return a file's local path, downloading it if it is not there yet. Raises `UserError`."""
        from huggingface_hub import hf_hub_download

        call = partial(hf_hub_download, repo_type="dataset", revision=self.sha, endpoint=self.endpoint)
        return Path(_ask(lambda: call(self.name, file), f"{self.name}/{file}", self.name, self.endpoint))

    def cached(self, file: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.name, file, revision=self.sha, repo_type="dataset")
        return Path(found) if isinstance(found, str) else None

    def shard(self, file: str) -> Shard:
        return Shard(name=file, fetch=lambda: self.fetch(file), cached=lambda: self.cached(file), remote=True)

    def no_split(self, split: str, have: Iterable[str]) -> UserError:
        there = ", ".join(sorted(set(have))) or "none that is known"
        return UserError(f"{self.name} has no split '{split}' at {self.sha[:12]}: it has {there}.")


def _resolve(name: str, revision: str | None) -> _Repo:
    from huggingface_hub import HfApi

    # The library reads the variable only at import; we, and tests, need its current value.
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    api = HfApi(endpoint=endpoint)
    what = f"the list of {name}'s files"
    sha = _ask(lambda: api.dataset_info(name, revision=revision, timeout=30).sha, what, name, endpoint, revision)
    if sha is None:
        raise UserError(f"{endpoint} did not tell the commit of {name}: check HF_ENDPOINT.")
    files = _ask(lambda: api.list_repo_files(name, revision=sha, repo_type="dataset"), what, name, endpoint, revision)
    return _Repo(name=name, endpoint=endpoint, sha=sha, files=frozenset(files))


def _tar_files(repo: _Repo, split: str) -> list[str]:
    listed = f"{split}/nshards.txt"
    if listed not in repo.files:
        raise repo.no_split(split, (f.rpartition("/")[0] for f in repo.files if f.endswith("/nshards.txt")))
    there = {file.removeprefix(f"{split}/") for file in repo.files}
    return [f"{split}/{name}" for name in counted_tars(repo.fetch(listed), f"{repo.name}/{listed}", there)]


def _parquet_files(repo: _Repo, split: str) -> list[str]:
    config, _, name = split.rpartition("/")
    split = own_split(name)
    configs = {config: files[split] for config, files in by_config(repo.files).items() if split in files}
    if not configs:
        parquet = (f.rpartition("/")[2] for f in repo.files if f.endswith(".parquet"))
        raise repo.no_split(name, (base.partition("-")[0] for base in parquet))
    chosen = config or choose_config(configs)
    if chosen not in configs:
        raise UserError(
            f"{repo.name} has '{name}' in the configurations {', '.join(sorted(configs))}: name one of them."
        )
    return configs[chosen]


def _ask(call: Callable[[], _T], what: str, name: str, endpoint: str, revision: str | None = None) -> _T:
    """Make one request to the hub and return its answer. Raises `UserError`."""
    try:
        return call()
    # The library passes on errors of its HTTP client, and has had three different ones: only this base class is common.
    except Exception as error:
        raise UserError(_explain(error, what, name, endpoint, revision)) from error


def _explain(error: BaseException, what: str, name: str, endpoint: str, revision: str | None) -> str:
    from huggingface_hub import errors

    # The library reports that a file is not in the cache and gives the reason why it could not fetch it as the cause.
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    page = f"{endpoint}/datasets/{name}"
    gated = f"{name} is gated or private: ask for access at {page}, then log in with `hf auth login` or set HF_TOKEN."
    match error:
        case errors.OfflineModeIsEnabled():
            return f"could not fetch {what}: HF_HUB_OFFLINE forbids it; unset it, or give a folder with the files."
        case errors.HFValidationError():
            return f"'{name}' is no data set of the hub: write ORG/NAME."
        case errors.RevisionNotFoundError() if revision:
            return f"{name} has no revision '{revision}': look at {page}."
        case errors.RevisionNotFoundError():
            return f"the revision of {name} that was being read is gone from {endpoint}: run again with another one."
        case errors.EntryNotFoundError():
            return f"{endpoint} has no file {what}: try another revision."
        case errors.GatedRepoError():
            return gated
        # Without a token the hub gives the same answer for private repositories as for those that do not exist.
        case errors.RepositoryNotFoundError():
            return (
                f"there is no data set {name} on {endpoint}, or it is private: check its name, or log in with "
                "`hf auth login` or HF_TOKEN."
            )
        case errors.HfHubHTTPError():
            status = error.response.status_code
            if status in (401, 403):
                return gated
            if status == 429:
                return f"{endpoint} allows no more requests for now while fetching {what}: wait, then run again."
            return f"{endpoint} answered {status} while fetching {what}: run again later to go on."
        case PermissionError():
            where = f"the hub's cache ({error.filename})"
            return f"could not write {what} into {where}: set HF_HUB_CACHE to a folder of yours."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"no space left for {what}: free some or set HF_HUB_CACHE to a larger disk, then run again to go on."
    reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return f"could not fetch {what} from {endpoint} ({reason}): check the network and run again to go on."
