# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
One exchange with the Hugging Face Hub, in a process of its own.

The request comes on standard input, the reply goes to standard output, both in JSON. A process can be ended whatever
it waits for (sockets, the threads of an upload, the Xet library); a thread cannot. This one imports `huggingface_hub`
only, so it starts in less than a second.
"""

import ctypes
import json
import os
import signal
import sys
import uuid
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import parse_ratelimit_headers


CARD = "README.md"
MARKER = ".push-check"

CONNECT_TIMEOUT_S = 10.0

# Errors that another attempt cannot help. Among the Hub's answers these are all 4xx but the transient ones.
PERMANENT_ERRORS = (LocalTokenNotFoundError, OfflineModeIsEnabled, FileNotFoundError, PermissionError, ValueError)
TRANSIENT_CLIENT_ERRORS = (408, 409, 425, 429)


def end_with(parent: int) -> None:
    """Makes this process end at once with the process `parent`, which has started it; Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            sys.exit(1)


def limit_requests(timeout_s: float) -> None:
    """Makes every request of this process fail when the Hub stays silent for `timeout_s` seconds."""
    client = get_session()  # a client of httpx or httpx2, whichever the installed version uses
    hooks, redirects = client.event_hooks, client.follow_redirects
    limits = (min(timeout_s, CONNECT_TIMEOUT_S), timeout_s, timeout_s, timeout_s)  # connect, read, write, pool
    set_client_factory(lambda: type(client)(event_hooks=hooks, follow_redirects=redirects, timeout=limits))


def check(api: HfApi, repo_id: str, private: bool | None, card: str) -> dict:
    """
    Creates the repository unless it exists, and commits to it. Only a commit proves that the token may write.

    It commits nothing if the repository must be private and is not.

    Args:
        api (`HfApi`): The client.
        repo_id (`str`): The repository, with or without the name of its owner.
        private (`bool` or `None`): Whether a new repository is private. `None` is the owner's setting.
        card (`str`): Model card for a repository that has none. A repository with a card keeps it, and gets a small
            file `.push-check` instead. The next upload removes that file.

    Returns:
        `dict`: `repo_id`, the repository with the name of its owner, and `is_private`.
    """
    api.whoami()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    answer = {"repo_id": repo_id, "is_private": bool(api.model_info(repo_id).private)}
    if private and not answer["is_private"]:
        return answer
    has_card = api.file_exists(repo_id, CARD)
    # The content must be new, else the Hub makes no commit.
    name, content = (MARKER, f"{uuid.uuid4()}\n") if has_card else (CARD, card)
    operation = CommitOperationAdd(name, content.encode())
    api.create_commit(repo_id, [operation], commit_message="Start of training")
    return answer


def upload(api: HfApi, repo_id: str, folder: str, message: str, removed: list[str]) -> dict:
    """
    Commits a folder to the root of a repository, in one commit.

    Args:
        api (`HfApi`): The client.
        repo_id (`str`): The repository with the name of its owner.
        folder (`str`): The folder.
        message (`str`): The commit's message.
        removed (`list[str]`): Files and folders at the root to remove, except for files that `folder` has too.

    Returns:
        `dict`: `repo_id`, the repository.
    """
    files = {path.relative_to(folder).as_posix(): path for path in Path(folder).rglob("*") if path.is_file()}
    stale = [name for name in api.list_repo_files(repo_id) if name.split("/")[0] in removed and name not in files]
    operations = [CommitOperationDelete(name, is_folder=False) for name in stale]
    operations += [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
    api.create_commit(repo_id, operations, commit_message=message)  # `upload_folder` would make several commits
    return {"repo_id": repo_id}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields `error` and its causes, outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def describe(error: Exception, secrets: list[str]) -> dict:
    """
    Turns an error into a reply.

    Args:
        error (`Exception`): The error.
        secrets (`list[str]`): Texts that the reply must not contain.

    Returns:
        `dict` with `error`, `status` (of HTTP, or `None`), `is_transient` and `retry_after` (seconds, 0 if not given).
    """
    response = next((cause.response for cause in chain(error) if getattr(cause, "response", None) is not None), None)
    if response is None:
        if type(error) is RuntimeError and error.__cause__ is not None:  # names the file only
            error = error.__cause__
        status = 401 if isinstance(error, LocalTokenNotFoundError) else None
        # A body that is not JSON, such as a proxy's page, is the server's fault.
        is_transient = isinstance(error, json.JSONDecodeError) or not isinstance(error, PERMANENT_ERRORS)
        text, retry_after = f"{type(error).__name__}: {error}", 0
    else:
        status, request = response.status_code, response.request
        is_storage = not str(request.url).startswith(constants.ENDPOINT)  # storage refuses addresses that are too old
        is_transient = is_storage or status >= 500 or status in TRANSIENT_CLIENT_ERRORS
        said = next((cause.server_message for cause in chain(error) if getattr(cause, "server_message", None)), None)
        # The query of an address may hold a signature, so only the path is reported.
        text = f"{status} {response.reason_phrase} to {request.method} {request.url.path}"
        text += f" ({said})" if said else ""
        after = response.headers.get("Retry-After", "")
        limit = parse_ratelimit_headers(response.headers)
        retry_after = int(after) if after.isdigit() else limit.reset_in_seconds if limit and status == 429 else 0
    for secret in secrets:
        text = text.replace(secret, "<token>")
    return {"error": text, "status": status, "is_transient": is_transient, "retry_after": retry_after}


def reply(action: str, token: str | None, timeout_s: float, **arguments) -> dict:
    """
    Carries out a request.

    Args:
        action (`str`): `check` or `upload`.
        token (`str` or `None`): The token. `None` uses the Hub's own login.
        timeout_s (`float`): Longest silence of the Hub, in seconds.
        arguments: Arguments of the action.

    Returns:
        `dict`: What the action returns, or the description of an error by [`describe`].
    """
    limit_requests(timeout_s)
    try:
        api = HfApi(token=token, library_name="diffusers_dod")
        return {"check": check, "upload": upload}[action](api, **arguments)
    except Exception as error:
        return describe(error, [secret for secret in (token, get_token()) if secret])


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # nothing but the reply goes to the output
        request = json.load(sys.stdin)
        end_with(request.pop("parent"))
        answer = reply(**request)
    print(json.dumps(answer))
