"""`lora push`: publish an adapter, a model or an export on the hub, after checks, and compare what arrived. No torch.

All files are one commit: others see all of them or none. An upload that was interrupted is repeated without the files
that arrived, by the hub's client. Nothing on the hub is deleted.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils.tqdm import disable_progress_bars

from lora_cli.errors import LoraError
from lora_cli.model.gguf_header import read_gguf_header
from lora_cli.model.safetensors_header import read_headers
from lora_cli.run import console, json_output
from lora_cli.run.console import format_bytes
from lora_cli.run.hub import ask_hub
from lora_cli.run.hub_account import TRY_AGAIN, Account, hub_errors, read_account, why_no_upload
from lora_cli.run.hub_limits import Limits, limited_upload
from lora_cli.run.shell import shell_path
from lora_cli.setup.leaks import Leak, find_leaks
from lora_cli.setup.publishable import Publishable, PublishedFile, raise_problems, read_published

OF_THE_HUB = (".gitattributes",)  # files that the hub itself writes into a new repository
MAX_NAMED = 8  # files in a line
ASK_S = 10.0  # that the hub may take to say what it has, after an upload has failed


class PushRequest(NamedTuple):
    """The options of the command line."""

    private: bool = False
    dry_run: bool = False
    force: bool = False


class Remote(NamedTuple):
    """What the hub has under the name of the repository."""

    exists: bool
    private: bool
    commit: str | None
    files: dict[str, RepoFile]


NOTHING = Remote(False, False, None, {})


class Changes(NamedTuple):
    """What the upload does to the files of the repository."""

    new: list[str]
    replaced: list[str]
    unchanged: list[str]
    others: list[str]  # files of the repository that are no part of the result; they stay


def push(result: Publishable, repository: str, *, request: PushRequest) -> dict[str, Any]:
    """Check a result, print what goes where, upload it and compare what the hub has with the files of this machine.

    Raises:
        LoraError: the result is damaged, or has secrets or paths of this machine; the hub does not answer or does not
            allow it; the repository has other files and `force` is False; or the hub has other contents afterwards.

    Returns:
        The document of --json.
    """
    files = read_published(result, info=console.info)
    _check_contents(result)
    leaks = find_leaks(files, token=get_token())
    raise_problems(
        result.target,
        [leak.describe() for leak in leaks],
        hint=_leak_hint(result, leaks),
    )
    _note_local_base(result)
    _print_files(result, files, repository)
    if (refused := why_no_upload()) is not None:
        if not request.dry_run:
            raise refused
        return _finish(repository, files, result, NOTHING, _changes(files, NOTHING), request, note=refused.message)
    if (problem := ask_hub(console.info)) is not None:
        raise LoraError(f"the hub does not answer (asked twice): {problem}", hint="check the network and HF_ENDPOINT")
    if json_output.is_reserved() or not console.err.is_terminal:
        disable_progress_bars()
    api = HfApi(library_name="lora-cli")
    with limited_upload(repository, sum(file.size for file in files)) as limits:
        account = read_account(api)
        with hub_errors(repository, account=account):
            remote = _read_remote(api, repository)
            changes = _changes(files, remote)
            _check_allowed(repository, remote, changes, request)
            if request.dry_run or not (changes.new or changes.replaced):
                return _finish(repository, files, result, remote, changes, request)
            if not remote.exists:
                api.create_repo(repository, private=True if request.private else None)
                remote = _read_remote(api, repository)
                console.info(f"created {repository} ({'private' if remote.private else 'public'})")
                _check_private(repository, remote, request)
        going = [file for file in files if file.name not in changes.unchanged]
        limits.details = (_not_there(repository, going),)
        try:
            with hub_errors(repository, account=account):
                commit = _upload(api, repository, going, remote, what=result.kind)
        except LoraError as error:
            commit = _commit_in_spite_of(error, api, repository, going, remote, limits)
        with hub_errors(repository, account=account):
            arrived = _files_of(api, repository, commit)
    _compare(repository, files, arrived, account)
    return _finish(repository, files, result, remote._replace(commit=commit), changes, request)


def _check_contents(result: Publishable) -> None:
    """Raise if a file of the result is damaged in a way that the checksums, where there are any, do not show.

    Raises:
        LoraError: a header is damaged, a shard is missing, or a value of an adapter is not finite.
    """
    if result.kind == "adapter":
        with console.loading_libraries():
            from lora_cli.model.adapter_files import open_adapter  # imports torch, which no other kind needs

        open_adapter(result.folder)
    elif result.kind == "model" and not read_headers(result.folder):
        raise LoraError(f"{result.folder} has no weights", hint="give a model with its .safetensors files")
    for name in result.names:
        if name.endswith(".gguf"):
            read_gguf_header(result.folder / name)


def _leak_hint(result: Publishable, leaks: Sequence[Leak]) -> str:
    hints = []
    if any(not leak.is_path for leak in leaks):
        hints.append("remove the secret, and revoke it if anybody else could read the file")
    if any(leak.is_path and leak.file == "adapter_config.json" for leak in leaks):
        hints.append(
            f"write the base's hub id: lora export {shell_path(result.folder)} --to peft --base ORG/NAME --out FOLDER"
        )
    elif any(leak.is_path for leak in leaks):
        hints.append("write a hub id or a file name in place of the path")
    return "; ".join(hints)


def _note_local_base(result: Publishable) -> None:
    """Tell that nobody else will find the base of an adapter that names a folder."""
    if result.kind != "adapter":
        return
    base = json.loads((result.folder / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
    if not base or "/" not in base:
        console.info(
            f"note: adapter_config.json names the base {base or 'not at all'}, which is no hub id: others will not "
            f"find it; lora export {shell_path(result.folder)} --to peft --base ORG/NAME --out FOLDER writes it"
        )


def _print_files(result: Publishable, files: Sequence[PublishedFile], repository: str) -> None:
    console.out.print(f"{result.kind} {result.target} to {repository}:")
    for line in _file_lines(files):
        console.out.print(line)
    for name, reason in result.left_out.items():
        console.out.print(f"  left out: {name} ({reason})")


def _file_lines(files: Sequence[PublishedFile]) -> Iterator[str]:
    sizes = {file.name: format_bytes(file.size) for file in files}
    width, total = max(map(len, sizes)), format_bytes(sum(file.size for file in files))
    space = max(len(total), *map(len, sizes.values()))
    for name, size in sizes.items():
        yield f"  {name:<{width}}  {size:>{space}}"
    yield f"  {f'{len(files)} files':<{width}}  {total:>{space}}"


def _read_remote(api: HfApi, repository: str) -> Remote:
    try:
        info = api.model_info(repository)
    except RepositoryNotFoundError:
        return NOTHING
    return Remote(True, bool(info.private), info.sha, _files_of(api, repository, info.sha))


def _files_of(api: HfApi, repository: str, commit: str | None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repository, recursive=True, revision=commit)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _changes(files: Sequence[PublishedFile], remote: Remote) -> Changes:
    ours = {file.name for file in files}
    present = [file for file in files if file.name in remote.files]
    same = [file.name for file in present if _difference(file, remote.files[file.name]) is None]
    return Changes(
        new=[file.name for file in files if file.name not in remote.files],
        replaced=[file.name for file in present if file.name not in same],
        unchanged=same,
        others=[name for name in remote.files if name not in ours],
    )


def _difference(file: PublishedFile, entry: RepoFile) -> str | None:
    """Return how a file of the hub differs from the one of this machine; None if it is the same.

    The hub knows large files by their SHA-256, and small ones by git's id of their content.
    """
    if entry.lfs is not None:
        same = entry.lfs.sha256 == file.sha256
        size = entry.lfs.size
    else:
        same = entry.blob_id == _git_id(file)
        size = entry.size
    if size != file.size:
        return f"has {size:,} bytes there, and {file.size:,} here"
    return None if same else "has other contents there than here"


def _git_id(file: PublishedFile) -> str:
    """Return git's id of a file: the SHA-1 of a header with its size, and its content."""
    digest = hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    digest.update(file.path.read_bytes() if file.content is None else file.content)
    return digest.hexdigest()


def _check_allowed(repository: str, remote: Remote, changes: Changes, request: PushRequest) -> None:
    """Raise if the upload would change or join files of somebody, or show them to everybody, without being told to.

    Raises:
        LoraError: the repository has other files and `force` is False, or is public and `private` is True.
    """
    _check_private(repository, remote, request)
    others = [name for name in changes.others if name not in OF_THE_HUB]
    details = []
    if changes.replaced:
        details.append(f"would be replaced: {_names(changes.replaced)}")
    if others:
        details.append(f"would stay beside the new files: {_names(others)}")
    if not details or not (changes.new or changes.replaced):
        return
    if not request.force:
        raise LoraError(
            f"{repository} has other files already",
            hint="give another name; or --force, which replaces the files of the same name, and deletes none",
            details=details,
        )
    for line in details:
        console.info(f"--force: {line.removeprefix('would be ').removeprefix('would ')}")


def _check_private(repository: str, remote: Remote, request: PushRequest) -> None:
    if request.private and remote.exists and not remote.private:
        raise LoraError(
            f"{repository} is public: --private is for a repository that does not exist yet",
            hint="make it private in its settings on the hub, give another name, or leave out --private",
        )


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + more


def _upload(api: HfApi, repository: str, going: Sequence[PublishedFile], remote: Remote, *, what: str) -> str:
    """Upload files as one commit after the one that was looked at, and return its id."""
    console.info(f"uploading {len(going)} files, {format_bytes(sum(file.size for file in going))}")
    operations = [CommitOperationAdd(file.name, file.path if file.content is None else file.content) for file in going]
    commit = api.create_commit(
        repository,
        operations,
        commit_message=f"Upload {what} with lora push",
        parent_commit=remote.commit,
    )
    return commit.oid


def _commit_in_spite_of(
    error: LoraError, api: HfApi, repository: str, going: Sequence[PublishedFile], remote: Remote, limits: Limits
) -> str:
    """Return the commit if the files have arrived although the upload has failed: the answer can be what was lost.

    Raises:
        LoraError: they have not: `error`, with the files.
    """
    limits.answer_s = ASK_S
    state = "perhaps not"
    with suppress(LoraError), hub_errors(repository, account=None):
        now = _read_remote(api, repository)
        if now.commit is not None and _changes(going, now).unchanged == [file.name for file in going]:
            console.info(f"note: {error.message}; but {repository} has all files")
            return now.commit
        state = "not"
    error.details = (*error.details, _not_there(repository, going, state=state))
    raise error


def _not_there(repository: str, going: Sequence[PublishedFile], *, state: str = "perhaps not") -> str:
    """Return a line on files that an upload which has failed did not bring; `perhaps` if the hub could not be asked."""
    names, size = _names([file.name for file in going]), format_bytes(sum(file.size for file in going))
    return f"{state} in {repository}: {names} ({size}); all files are one commit at the end"


def _compare(repository: str, files: Sequence[PublishedFile], arrived: dict[str, RepoFile], account: Account) -> None:
    """Raise if the hub has other contents than this machine.

    Raises:
        LoraError: a file is missing on the hub, or differs.
    """
    problems = []
    for file in files:
        entry = arrived.get(file.name)
        difference = "is missing there" if entry is None else _difference(file, entry)
        if difference is not None:
            problems.append(f"{file.name} {difference}")
    if problems:
        raise LoraError(
            f"{repository} does not have the files of this machine: {_names(problems)}",
            hint=f"do not use it; {TRY_AGAIN.partition(':')[0]} with --force, and report it if it happens again",
            exit_code=1,
        )


def _finish(
    repository: str,
    files: Sequence[PublishedFile],
    result: Publishable,
    remote: Remote,
    changes: Changes,
    request: PushRequest,
    *,
    note: str | None = None,
) -> dict[str, Any]:
    """Print the result, and return the document of --json."""
    from huggingface_hub import constants

    url = f"{constants.ENDPOINT}/{repository}"
    uploaded = not request.dry_run and bool(changes.new or changes.replaced)
    for line in _last_lines(repository, url, len(files), remote, changes, request, note):
        console.out.print(line)
    states = {"new": changes.new, "replaced": changes.replaced, "unchanged": changes.unchanged}
    state = {name: key for key, names in states.items() for name in names}
    return {
        "repository": repository,
        "url": url,
        "kind": result.kind,
        "dry_run": request.dry_run,
        "uploaded": uploaded,
        "exists": remote.exists if note is None else None,
        "private": remote.private if remote.exists else request.private,
        "commit": remote.commit,
        "bytes": sum(file.size for file in files),
        "files": [
            {"name": f.name, "bytes": f.size, "sha256": f.sha256, "state": state[f.name] if note is None else None}
            for f in files
        ],
        "left_out": result.left_out,
        "others": changes.others,
        "note": note,
    }


def _last_lines(
    repository: str, url: str, count: int, remote: Remote, changes: Changes, request: PushRequest, note: str | None
) -> Iterator[str]:
    if note is not None:
        yield f"dry run: nothing was uploaded, and the hub was not asked: {note}"
        return
    if request.dry_run:
        place = f"{repository} exists ({'private' if remote.private else 'public'})"
        if not remote.exists:
            place = f"{repository} would be created ({'private' if request.private else 'public'})"
        parts = {"new": changes.new, "replaced": changes.replaced, "unchanged": changes.unchanged}
        counts = ", ".join(f"{len(names)} {name}" for name, names in parts.items() if names)
        yield f"dry run: nothing was uploaded; {place}; files: {counts}"
        return
    if not (changes.new or changes.replaced):
        yield f"the hub has all {count} files already, with the same contents: nothing was uploaded"
    else:
        yield f"verified: the hub has the contents of all {count} files, by their SHA-256 or git's id"
    yield f"{url} ({'private' if remote.private else 'public'}), commit {remote.commit}"
