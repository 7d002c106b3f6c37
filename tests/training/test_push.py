"""Pushing in the background: the real client, in its own processes, against a server on the loopback interface."""

import errno
import hashlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import contents, says
from hub_server import Hub, Repo
from launch import PATIENCE_S, started, wait_until

from diffusers_dod.training.checkpoints import save_checkpoint
from diffusers_dod.training.push import HubPusher


TOKEN = "hf_secretOfThisTest"
REPO = "user/run"
COMMIT = f"POST /api/models/{REPO}/commit/"


@pytest.fixture
def hub(monkeypatch, tmp_path, caplog):
    """A server that the client's processes take for the Hub; no token gets into a log or a file."""
    caplog.set_level(logging.INFO)
    tokens = {TOKEN: "write", f"{TOKEN}ToRead": "read"}
    with Hub(tokens=tokens) as hub:
        hub.set_environment(monkeypatch, tmp_path / "home")
        yield hub
    assert TOKEN not in caplog.text
    assert not any(TOKEN.encode() in content for content in hub.contents.values())


@pytest.fixture
def run(tmp_path):
    """The folder of a run with three checkpoints."""
    folder = tmp_path / "run"
    for step in (10, 20, 30):
        save_checkpoint(folder, step, lambda unfinished, step=step: write(unfinished, step))
    (folder / "samples").mkdir()
    (folder / "samples" / "step-10.png").write_bytes(b"\x89PNG")
    (folder / "metrics.jsonl").write_text('{"step": 10}\n')
    (folder / "README.md").write_text("# The card\n")
    return folder


def write(folder: Path, step: int) -> None:
    for name in ("transformer", "latent_embedder", "training_state"):
        (folder / name).mkdir()
        (folder / name / "weights.safetensors").write_bytes(f"{name} {step}".encode() * 100)
    (folder / "model_index.json").write_text(f'{{"step": {step}}}')


def pusher_of(run: Path, token: str | None = TOKEN, repo_id: str = REPO, **arguments) -> HubPusher:
    return HubPusher(repo_id, run, token, **{"first_wait_s": 0.05, **arguments})


def push(pusher: HubPusher, step: int = 10, with_training_state: bool = False) -> None:
    run = pusher.output_dir
    others = [run / name for name in ("metrics.jsonl", "samples", "README.md", "not there yet")]
    pusher.push(run / f"checkpoint-{step}", others, f"Step {step}", with_training_state)


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def expected(run: Path, step: int, with_training_state: bool = False) -> dict[str, str]:
    """Path -> SHA-256 of what a push of this checkpoint puts into the repository."""
    files = contents(run)
    others = {name: content for name, content in files.items() if not name.startswith(("checkpoint-", ".push-"))}
    state = ("training_state/", "manifest.json")
    checkpoint = contents(run / f"checkpoint-{step}")
    kept = {name: content for name, content in checkpoint.items() if with_training_state or not name.startswith(state)}
    return hashes(others | kept)


def remote(hub: Hub) -> dict[str, str]:
    return {path: file.sha256 for path, file in hub.repos[REPO].files.items()}


def snapshots(run: Path) -> list[Path]:
    return sorted(run.glob(".push-*"))


# ---------------------------------------------------------------------------------------------------------------------
# What arrives


def test_the_newest_checkpoint_is_at_the_root(hub, run, monkeypatch, caplog):
    before = contents(run)
    pusher = pusher_of(run, repo_id="run")
    assert pusher.check("# Training\n") == REPO == pusher.repo_id
    assert remote(hub) == hashes({"README.md": b"# Training\n"})

    push(pusher, 10, with_training_state=True)
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == expected(run, 10, with_training_state=True)
    # The state of training of another step would not fit the weights: it goes.
    monkeypatch.setenv("HF_TOKEN", TOKEN)  # the Hub's own login
    pusher = pusher_of(run, token=None)
    push(pusher, 20)
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == expected(run, 20)
    assert hub.repos[REPO].messages == ["Start of training", "Step 10", "Step 20"]
    assert contents(run) == before and snapshots(run) == []
    assert "Pushed checkpoint-20 to user/run." in caplog.messages


def test_a_push_is_of_its_moment(hub, run):
    """Retention may remove a checkpoint while it is uploaded, and the metrics go on growing."""
    hub.repos[REPO] = Repo()
    wanted = expected(run, 10)
    held = hub.fail("preupload", "hold")
    pusher = pusher_of(run)
    push(pusher)
    assert held.arrived.wait(PATIENCE_S)
    checkpoint = run / "checkpoint-10" / "model_index.json"
    assert any(os.path.samefile(checkpoint, snapshot / checkpoint.name) for snapshot in snapshots(run))
    shutil.rmtree(checkpoint.parent)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11}\n')
    held.release.set()
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == wanted
    assert (run / "metrics.jsonl").read_text() == '{"step": 10}\n{"step": 11}\n'


def test_a_file_system_without_hard_links(hub, run, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "Operation not permitted")

    hub.repos[REPO] = Repo()
    monkeypatch.setattr(os, "link", refuse)
    pusher = pusher_of(run)
    push(pusher)
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == expected(run, 10)


def test_the_newest_one_waits(hub, run, caplog):
    hub.repos[REPO] = Repo()
    held = hub.fail(COMMIT, "hold")
    pusher = pusher_of(run)
    push(pusher, 10)
    assert held.arrived.wait(PATIENCE_S)
    push(pusher, 20)
    push(pusher, 30)
    assert len(snapshots(run)) == 2  # that of 20 has gone
    held.release.set()
    assert pusher.finish(PATIENCE_S)
    assert hub.repos[REPO].messages == ["Step 10", "Step 30"]
    assert remote(hub) == expected(run, 30)
    assert "The push of checkpoint-20 is skipped: checkpoint-30 is newer." in caplog.messages
    assert snapshots(run) == []


# ---------------------------------------------------------------------------------------------------------------------
# What may pass


@pytest.mark.slow
def test_errors_that_may_pass(hub, run, caplog):
    hub.repos[REPO] = Repo()
    failures = {
        409: "409 Conflict",
        429: "429 Too Many Requests",
        503: "503 Service Unavailable",
        "drop": "Server disconnected",
        "drop the answer": "Server disconnected",
    }
    for kind in failures:
        hub.fail(COMMIT, kind, **({"Retry_After": "1"} if kind == 429 else {}))
    pusher = pusher_of(run)
    push(pusher, with_training_state=True)
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == expected(run, 10, with_training_state=True)
    assert hub.repos[REPO].messages == ["Step 10"]  # one commit, although only the answer of it was lost
    assert hub.count("PUT /lfs/") == 3  # the weights of two components and those of the training, once
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    for attempt, (warning, reason) in enumerate(zip(warnings, failures.values(), strict=True), start=1):
        assert f"failed (attempt {attempt} of 8)" in warning and reason in warning
    times = [record.created for record in caplog.records if record.levelname == "WARNING"]
    assert "the next one is in 1 s" in warnings[1] and times[2] - times[1] > 1  # as the Hub wants it


@pytest.mark.slow
def test_an_answer_that_never_comes(hub, run, caplog):
    hub.repos[REPO] = Repo()
    hub.fail(COMMIT, "hold")
    pusher = pusher_of(run, timeout_s=1.0, max_attempts=1000)  # answers of a busy machine may take longer as well
    push(pusher)
    assert pusher.finish(PATIENCE_S)
    assert "failed (attempt 1 of 1000)" in caplog.text and "ReadTimeout" in caplog.text
    assert remote(hub) == expected(run, 10) and hub.repos[REPO].messages == ["Step 10"]


def test_an_attempt_that_never_ends(hub, run, caplog):
    """Not even when the Hub has all the time that it wants for a request."""
    hub.repos[REPO] = Repo()
    hub.fail(COMMIT, "hold")
    pusher = pusher_of(run, attempt_timeout_s=1.0, max_attempts=1)
    push(pusher)
    assert not pusher.finish(PATIENCE_S)
    assert "checkpoint-10 is not pushed to user/run: it took more than 1.0 s." in caplog.messages


def test_an_upload_of_weights_that_fails(hub, run):
    """The client itself tries these again, after a second."""
    hub.repos[REPO] = Repo()
    hub.fail("PUT /lfs/", 503)
    pusher = pusher_of(run)
    push(pusher)
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == expected(run, 10) and hub.count("PUT /lfs/") == 3


def test_a_storage_whose_address_has_expired(hub, run, caplog):
    """The storage refuses with a status that would be final if it were the Hub's."""
    hub.repos[REPO] = Repo()
    hub.storage_url = hub.url.replace("127.0.0.1", "localhost")
    hub.fail("PUT /lfs/", 403)
    pusher = pusher_of(run)
    push(pusher)
    assert pusher.finish(PATIENCE_S)
    assert "403 Forbidden to PUT /lfs/" in caplog.text and remote(hub) == expected(run, 10)


def test_attempts_end(hub, run, caplog):
    hub.repos[REPO] = Repo()
    hub.fail(COMMIT, 503, times=2)
    pusher = pusher_of(run, max_attempts=2)
    push(pusher, 10)
    assert not pusher.finish(PATIENCE_S)
    assert hub.count(COMMIT) == 2
    assert "checkpoint-10 is not pushed to user/run: 503 Service Unavailable" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# What does not pass


def test_errors_that_stay(hub, run, caplog):
    """No other attempt, but a later push tries again: somebody may have put it right."""
    token = f"{TOKEN}Renewed"
    pusher = pusher_of(run, token)
    for step, status in enumerate((404, 401, 403), start=1):
        hub.repos = {} if status == 404 else {REPO: Repo()}
        hub.tokens = {401: {}, 403: {token: "read"}, 404: {token: "write"}}[status]
        save_checkpoint(run, step, lambda unfinished, step=step: write(unfinished, step))
        push(pusher, step)
        wait_until(lambda step=step: f"checkpoint-{step} is not pushed" in caplog.text)
        assert f"{REPO}: {status} " in caplog.messages[-1]
    wait_until(lambda: len(snapshots(run)) == 1)  # the others have been replaced
    assert "attempt " not in caplog.text
    hub.tokens[token] = "write"
    push(pusher, 20)
    assert pusher.finish(PATIENCE_S)
    assert remote(hub) == expected(run, 20) and snapshots(run) == []


def test_the_end_does_not_wait_for_the_hub(hub, run, caplog):
    hub.repos[REPO] = Repo()
    held = hub.fail(COMMIT, "hold")
    pusher = pusher_of(run, attempt_timeout_s=PATIENCE_S)
    push(pusher, 10)
    assert held.arrived.wait(PATIENCE_S)
    push(pusher, 20)
    process = pusher._process
    assert not pusher.finish(0.1)  # though the Hub goes on holding its answer
    assert process.wait(PATIENCE_S) != 0  # and nothing goes on behind it
    assert "attempt" not in caplog.text and "took more than" not in caplog.text

    # What is left is the newest, as a whole, and the command that uploads it.
    [snapshot] = snapshots(run)
    assert f"hf upload user/run {snapshot} . --commit-message 'Step 20'" in caplog.text
    assert hashes(contents(snapshot)) == expected(run, 20)

    push(pusher, 30)
    assert caplog.messages[-1] == "checkpoint-30 is not pushed to user/run: `finish` has been called."

    # The next run clears what is left.
    pusher_of(run)
    assert snapshots(run) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel ends the uploader")
def test_a_killed_run_leaves_no_uploader(hub, run):
    hub.repos[REPO] = Repo()
    held = hub.fail(COMMIT, "hold")
    code = "import sys; from pathlib import Path; from diffusers_dod.training.push import HubPusher\n"
    code += "run = Path(sys.argv[1]); pusher = HubPusher('user/run', run, sys.argv[2], timeout_s=1e6)\n"
    code += "pusher.push(run / 'checkpoint-10', [], 'Step 10', False); pusher.finish(1e6)"
    command, online = [sys.executable, "-c", code, run, TOKEN], {"HF_HUB_OFFLINE": "0"}
    with started(command, run.parent / "output", online) as process:
        wait_until(held.arrived.is_set, process)
        (uploader,) = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(PATIENCE_S)
        wait_until(lambda: not is_running(uploader))
    assert len(snapshots(run)) == 1
    pusher_of(run)
    assert snapshots(run) == []


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_end_of_a_wait(hub, run, caplog):
    """The waits between attempts end with the run."""
    hub.repos[REPO] = Repo()
    hub.fail(COMMIT, 429, Retry_After="3600")
    pusher = pusher_of(run)
    push(pusher)
    wait_until(lambda: "the next one is in 3600 s" in caplog.text)
    assert not pusher.finish(0)
    wait_until(lambda: all(thread.name != "HubPusher" for thread in threading.enumerate()))
    assert hub.count(COMMIT) == 1


@pytest.mark.slow
def test_the_process_of_a_run_can_end(hub, run):
    """Also one that forgets to finish."""
    hub.repos[REPO] = Repo()
    held = hub.fail(COMMIT, "hold")
    code = (
        "import sys; from pathlib import Path; from diffusers_dod.training.push import HubPusher\n"
        f"pusher = HubPusher({REPO!r}, Path(sys.argv[1]), {TOKEN!r})\n"
        "pusher.push(pusher.output_dir / 'checkpoint-10', [], 'Step 10', False)\n"
        "print(flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    assert held.arrived.wait(PATIENCE_S)
    process.communicate("\n", timeout=PATIENCE_S)  # raises if the process waits for the Hub
    assert process.returncode == 0


def test_no_snapshot_no_push(hub, run, caplog):
    """Whatever is wrong with the files, the training goes on, and nothing is written into a checkpoint."""
    (run / "model_index.json").write_text("of the run itself")
    before = contents(run)
    pusher = pusher_of(run)
    pusher.push(run / "checkpoint-10", [run / "model_index.json"], "Step 10", False)
    pusher.push(run / "checkpoint-10", [run.parent], "Step 10", False)
    assert sum("checkpoint-10 is not pushed to user/run: no snapshot" in message for message in caplog.messages) == 2
    assert contents(run) == before and snapshots(run) == [] and pusher.finish(0)


# ---------------------------------------------------------------------------------------------------------------------
# Before the training


@pytest.mark.parametrize(
    ("token", "repo_id", "fragments"),
    [
        (None, REPO, ("hf auth login", "hub_token")),
        (f"{TOKEN}Typo", REPO, ("401", "hf auth login", "hub_token")),
        (f"{TOKEN}ToRead", "user/new", ("403", "write access", "hub_token")),
        (f"{TOKEN}ToRead", REPO, ("403", "write access", "hub_token")),
        (TOKEN, "somebody/run", ("403", "write access", "hub_model_id")),
        (TOKEN, "somebody/new", ("403", "write access", "hub_model_id")),
    ],
    ids=["no login", "wrong token", "to create", "to write", "repository of another", "name of another"],
)
def test_a_refusal_is_known_before_the_training(hub, run, token, repo_id, fragments):
    hub.repos |= {REPO: Repo(), "somebody/run": Repo()}
    with pytest.raises(RuntimeError, match=says(f"Cannot push to {repo_id!r}", *fragments)) as error:
        pusher_of(run, token, repo_id).check("# Card\n")
    assert TOKEN not in str(error.value) and error.value.__cause__ is None and error.value.__context__ is None
    assert hub.repos[REPO].messages == hub.repos["somebody/run"].messages == []


@pytest.mark.parametrize("private", [True, None])
def test_a_new_repository_is_private_if_that_is_wanted_and_the_log_says_so(hub, run, caplog, private):
    pusher_of(run).check("# Card\n", private=private)
    assert hub.repos[REPO].private is bool(private)
    assert f"will be pushed to {REPO}, which is {'private' if private else 'PUBLIC'}." in caplog.text
    pusher_of(run).check("# Card\n", private=private)  # of a run that is resumed
    assert hub.repos[REPO].messages == ["Start of training"] * 2


def test_a_public_repository_gets_nothing_that_must_be_private(hub, run):
    hub.repos[REPO] = Repo()
    with pytest.raises(ValueError, match=says("`hub_private_repo`", REPO, "which is public")):
        pusher_of(run).check("# Card\n", private=True)
    assert hub.repos[REPO].messages == [] and not hub.repos[REPO].files


def test_no_hub_at_all(hub, run, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
    with pytest.raises(RuntimeError, match=says("ConnectError", "network", "HF_ENDPOINT")):
        pusher_of(run, max_attempts=1).check("# Card\n")
    with pytest.raises(RuntimeError, match=says("'no/such/name'", "hub_model_id")):
        pusher_of(run, repo_id="no/such/name").check("# Card\n")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RuntimeError, match=says("OfflineModeIsEnabled", "HF_HUB_OFFLINE")):
        pusher_of(run).check("# Card\n")


def test_a_check_tries_again(hub, run):
    hub.fail("GET /api/whoami", 503)
    hub.fail("POST /api/repos/create", "drop")
    assert pusher_of(run).check("# Card\n") == REPO
    assert hub.repos[REPO].messages == ["Start of training"] and hub.count("whoami") == 3


def test_a_check_keeps_the_card_of_a_repository(hub, run):
    """A run that is resumed finds the card of what was pushed; its token is tested by a commit all the same."""
    card = hub.store(b"# What has been trained so far\n")
    hub.repos[REPO] = Repo(files={"README.md": card})
    for _ in range(2):  # also where the first one left its marker
        pusher_of(run).check("# Card\n")
    assert hub.repos[REPO].messages == ["Start of training"] * 2
    assert hub.repos[REPO].files["README.md"] is card
    pusher = pusher_of(run)
    push(pusher)
    assert pusher.finish(PATIENCE_S) and remote(hub) == expected(run, 10)


@pytest.mark.parametrize("token", [f"{TOKEN}\n", f"{TOKEN} {TOKEN}", "", TOKEN.encode()])
def test_what_cannot_be_a_token(tmp_path, token):
    with pytest.raises((TypeError, ValueError), match="`token` must be") as error:
        HubPusher(REPO, tmp_path, token)
    assert TOKEN not in str(error.value)


def test_numbers_out_of_range(tmp_path):
    for name, value in {"timeout_s": 0, "attempt_timeout_s": -1, "max_attempts": 0, "first_wait_s": -0.1}.items():
        with pytest.raises(ValueError, match=f"`{name}` must be .* got {value}"):
            HubPusher(REPO, tmp_path, **{name: value})
    with pytest.raises(ValueError, match="`timeout_s` must be .* got -1"):
        HubPusher(REPO, tmp_path).finish(-1)
    assert TOKEN not in repr(HubPusher(REPO, tmp_path, TOKEN))
