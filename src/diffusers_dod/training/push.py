# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Pushes checkpoints to the Hugging Face Hub while the training goes on.

It pushes a snapshot: hard links to the files of the checkpoint, which the training may remove meanwhile, and copies of
other files. One thread uploads one snapshot at a time, in a process of its own (`hub_client.py`).
"""

import json
import logging
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint_manifest import CHECKPOINT_MANIFEST, STATE_FOLDER
from ..checks import check_at_least, check_number, check_type
from . import hub_client


logger = logging.getLogger(__name__)

SNAPSHOT = ".push-"  # how names of snapshots begin
CHECK_ATTEMPTS = 3  # few, as somebody waits for them
LONGEST_WAIT_S = 300
JITTER = random.SystemRandom()  # the generator of `random` belongs to the training

ADVICE = {
    401: "Log in with `hf auth login`, or give a valid token with write access by `hub_token`.",
    403: "Give a token with write access to it by `hub_token` or `hf auth login`, or another `hub_model_id`.",
    404: "Check `hub_model_id`, and that the token of `hub_token` or `hf auth login` may write there.",
    None: "Check `hub_model_id`, the network, and the environment variables HF_ENDPOINT and HF_HUB_OFFLINE.",
}


@dataclass(frozen=True)
class _Push:
    name: str
    snapshot: Path
    message: str


def remove_snapshots(output_dir: Path, keep: Path | None = None) -> None:
    """
    Removes what earlier pushes have left in the folder of a run.

    Args:
        output_dir (`Path`): The folder of the run.
        keep (`Path`, *optional*): A snapshot to keep.
    """
    for folder in output_dir.glob(f"{SNAPSHOT}*"):
        if folder != keep:
            shutil.rmtree(folder, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileExistsError:  # copying would write into the existing file, which may be a link itself
        raise
    except OSError:
        shutil.copy2(source, target)


class HubPusher:
    """
    Pushes checkpoints to a repository of the Hugging Face Hub, in the background.

    One process of a run has a pusher. The training never waits for it, and gets no errors but those of
    [`HubPusher.check`]. Errors that may pass (409, 429, 5xx, lost connections, no answer) lead to more attempts. The
    waiting times double, vary at random, and are never shorter than the Hub asks for. Large files that have arrived
    are not sent again. Other errors (401, 403, 404) end the push with a warning, and the next push tries anew.

    Args:
        repo_id (`str`): The repository, `name` or `owner/name`.
        output_dir (`Path`): Folder of the run. Snapshots that earlier runs left there (`.push-*`) are removed.
        token (`str`, *optional*): A token with write access. By default the Hub's own login, read for each attempt.
        timeout_s (`float`, defaults to `120.0`): Longest silence of the Hub within a request, in seconds.
        attempt_timeout_s (`float`, defaults to `3600.0`): Longest duration of an attempt, in seconds.
        max_attempts (`int`, defaults to `8`): Attempts per push.
        first_wait_s (`float`, defaults to `5.0`): The wait after the first failed attempt, in seconds. Later waits
            double, up to 300 s.

    Raises:
        `TypeError`: an argument is of another type.
        `ValueError`: a number is out of range, or the token has blanks in it.
    """

    def __init__(
        self,
        repo_id: str,
        output_dir: Path,
        token: str | None = None,
        timeout_s: float = 120.0,
        attempt_timeout_s: float = 3600.0,
        max_attempts: int = 8,
        first_wait_s: float = 5.0,
    ):
        check_type("repo_id", repo_id, str)
        # Neither message shows the token.
        if token is not None and not isinstance(token, str):
            raise TypeError(f"`token` must be of type str, got {type(token).__name__}.")
        if token is not None and (not token or token != "".join(token.split())):
            raise ValueError(f"`token` must be a text without blanks and line breaks, got {len(token)} characters.")
        check_number("timeout_s", timeout_s, 0, open_minimum=True)
        check_number("attempt_timeout_s", attempt_timeout_s, 0, open_minimum=True)
        check_at_least("max_attempts", max_attempts, 1)
        check_number("first_wait_s", first_wait_s, 0)
        self.repo_id = repo_id
        self.output_dir = Path(output_dir)
        self.attempt_timeout_s = attempt_timeout_s
        self.max_attempts = max_attempts
        self.first_wait_s = first_wait_s
        self._request = {"token": token, "timeout_s": timeout_s}
        self._changed = threading.Condition()  # guards what follows
        self._current: _Push | None = None  # while there is one, there is a thread
        self._waiting: _Push | None = None
        self._failed: _Push | None = None  # the newest that failed, unless a later one succeeded
        self._process: subprocess.Popen | None = None
        self._is_stopped = threading.Event()
        remove_snapshots(self.output_dir)

    def check(self, card: str, private: bool | None = None) -> str:
        """
        Checks by a first commit, before the training starts, that the repository exists and can be written to.

        The commit has the card alone. The log says whether the repository is private or public.

        Args:
            card (`str`): Model card (`README.md`) for a repository that has none. An existing card is kept.
            private (`bool`, *optional*): Whether the repository must be private; a new one is made so. By default the
                owner's setting holds for a new one.

        Returns:
            `str`: The repository with the name of its owner.

        Raises:
            `RuntimeError`: the Hub cannot be reached or refuses something. The message says what to do.
            `ValueError`: the repository must be private, exists, and is public. Nothing is committed.
        """
        attempts = min(CHECK_ATTEMPTS, self.max_attempts)
        reply = self._ask(attempts, "The check of the Hub", action="check", card=card, private=private)
        if "error" in reply:
            advice = ADVICE.get(reply["status"], "Try again later.")
            raise RuntimeError(f"Cannot push to {self.repo_id!r}: {reply['error']}. {advice}")
        self.repo_id = reply["repo_id"]
        if private and not reply["is_private"]:
            raise ValueError(
                f"`hub_private_repo` must be given for a new or a private repository, got it for {self.repo_id}, "
                "which is public: change that in its settings on the Hub, or give another `hub_model_id`."
            )
        if reply["is_private"]:
            logger.info(f"Checkpoints will be pushed to {self.repo_id}, which is private.")
        else:
            logger.warning(f"Checkpoints will be pushed to {self.repo_id}, which is PUBLIC.")
        return self.repo_id

    def push(self, checkpoint: Path, others: Iterable[Path], message: str, with_training_state: bool) -> None:
        """
        Starts the upload of a checkpoint in one commit, and returns at once.

        It replaces a push that still waits for its turn.

        Args:
            checkpoint (`Path`): The folder of the checkpoint. Its files go to the root of the repository.
            others (`Iterable[Path]`): Files and folders below `output_dir` to upload too, under the same relative
                names. They may change meanwhile. Missing ones are left out. A `README.md` replaces the model card.
            message (`str`): The commit's message.
            with_training_state (`bool`): Whether to upload `training_state/` and `manifest.json`, which a resumed run
                needs. If not, older ones are removed from the repository, as they do not fit the weights.
        """
        if self._is_stopped.is_set():
            logger.warning(f"{checkpoint.name} is not pushed to {self.repo_id}: `finish` has been called.")
            return
        try:
            snapshot = self._take_snapshot(checkpoint, others, with_training_state)
        except (OSError, ValueError) as error:
            logger.warning(f"{checkpoint.name} is not pushed to {self.repo_id}: no snapshot of it ({error}).")
            return
        new = _Push(checkpoint.name, snapshot, message)
        with self._changed:
            is_idle = self._current is None
            skipped, self._waiting = self._waiting, new
            if is_idle:
                self._current, self._waiting = new, None
                threading.Thread(target=self._work, name="HubPusher", daemon=True).start()
        if skipped is not None:
            logger.warning(f"The push of {skipped.name} is skipped: {new.name} is newer.")
            shutil.rmtree(skipped.snapshot, ignore_errors=True)

    def finish(self, timeout_s: float) -> bool:
        """
        Waits for the pushes that are left, then stops.

        Args:
            timeout_s (`float`): Longest wait, in seconds.

        Returns:
            `bool`: Whether the newest push has reached the repository. If not, a warning shows the command to upload
            it by hand, and its snapshot stays until the next run.

        Raises:
            `TypeError`: `timeout_s` is no number.
            `ValueError`: `timeout_s` is negative or not finite.
        """
        check_number("timeout_s", timeout_s, 0)
        with self._changed:
            self._changed.wait_for(lambda: self._current is None, timeout_s)
            missing = self._waiting or self._current or self._failed
            self._is_stopped.set()
            if self._process is not None:
                self._process.kill()
            self._changed.wait_for(lambda: self._current is None, 5)  # until the dead process is collected
        remove_snapshots(self.output_dir, keep=None if missing is None else missing.snapshot)
        if missing is not None:
            command = ["hf", "upload", self.repo_id, str(missing.snapshot), ".", "--commit-message", missing.message]
            logger.warning(
                f"{missing.name} was not pushed to {self.repo_id}. To do so by hand, before the next run: "
                f"{shlex.join(command)}"
            )
        return missing is None

    def _take_snapshot(self, checkpoint: Path, others: Iterable[Path], with_training_state: bool) -> Path:
        step = checkpoint.name.removeprefix("checkpoint-")
        folder = Path(tempfile.mkdtemp(prefix=f"{SNAPSHOT}{step}-", dir=self.output_dir))
        try:
            for path in map(Path, others):
                target = folder / path.relative_to(self.output_dir)
                target.parent.mkdir(parents=True, exist_ok=True)
                if path.is_dir():
                    shutil.copytree(path, target)
                elif path.exists():
                    shutil.copy2(path, target)
            for path in checkpoint.rglob("*"):
                name = path.relative_to(checkpoint)
                is_state = name.parts[0] in (STATE_FOLDER, CHECKPOINT_MANIFEST)
                if path.is_file() and (with_training_state or not is_state):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    _link(path, folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def _work(self) -> None:
        push = self._current
        while push is not None:
            reply = self._ask(
                self.max_attempts,
                f"The push of {push.name} to {self.repo_id}",
                action="upload",
                folder=str(push.snapshot),
                message=push.message,
                removed=[STATE_FOLDER, CHECKPOINT_MANIFEST, hub_client.MARKER],
            )
            with self._changed:
                done = [] if self._failed is None else [self._failed]
                if self._is_stopped.is_set():  # `finish` reports and removes the rest
                    done, self._waiting = [], None
                elif "error" in reply:
                    self._failed = push
                    logger.warning(f"{push.name} is not pushed to {self.repo_id}: {reply['error']}.")
                else:
                    self._failed = None
                    done.append(push)
                    logger.info(f"Pushed {push.name} to {self.repo_id}.")
                push = self._current = self._waiting
                self._waiting = None
                self._changed.notify_all()
            for old in done:
                shutil.rmtree(old.snapshot, ignore_errors=True)

    def _ask(self, attempts: int, what: str, **request) -> dict:
        """Sends a request, in at most `attempts` attempts, and returns the last reply."""
        for attempt in range(1, attempts + 1):
            reply = self._exchange({"repo_id": self.repo_id} | self._request | request)
            is_over = "error" not in reply or not reply["is_transient"] or attempt == attempts
            if is_over or self._is_stopped.is_set():
                break
            wait_s = min(LONGEST_WAIT_S, self.first_wait_s * 2 ** (attempt - 1)) * JITTER.uniform(0.5, 1)
            wait_s = max(wait_s, reply["retry_after"])
            logger.warning(
                f"{what} failed (attempt {attempt} of {attempts}), the next one is in {wait_s:.0f} s: "
                f"{reply['error']}."
            )
            if self._is_stopped.wait(min(wait_s, threading.TIMEOUT_MAX)):
                break
        return reply

    def _exchange(self, request: dict) -> dict:
        """Sends one request through a process of its own."""
        command = [sys.executable, "-P", hub_client.__file__]  # -P: modules beside the file must not hide others
        environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        errors = ""
        try:
            with self._changed:
                process = self._process = subprocess.Popen(command, **pipes, text=True, env=environment)
                if self._is_stopped.is_set():
                    process.kill()
            try:
                output, errors = process.communicate(
                    json.dumps(request | {"parent": os.getpid()}), timeout=self.attempt_timeout_s
                )
            finally:
                process.kill()
                process.wait()
            return json.loads(output)
        except subprocess.TimeoutExpired:
            error = f"it took more than {self.attempt_timeout_s} s"
        except OSError as problem:  # of starting the process
            error = str(problem)
        except ValueError:
            last_line = "".join(errors.strip().splitlines()[-1:]).partition("?")[0]  # no query: it may be signed
            error = f"its process ended with status {process.returncode}, saying: {last_line}"
        return {"error": error, "status": None, "is_transient": True, "retry_after": 0}
