"""`dod download`, offline and by the real client against a server on the loopback interface."""

import sys

import pytest
from helpers import says, tiny_pipeline
from hub_server import Hub
from launch import run_command

from diffusers_dod.download import download


# The end point is read when huggingface_hub is imported, so all of the client runs in one process of its own.
CLIENT = """
import contextlib, sys
from huggingface_hub import HfApi
from diffusers_dod.command_line import run_main
from diffusers_dod.download import main
from diffusers_dod.evaluation.info import describe

api = HfApi()
api.create_repo("user/name")
api.upload_folder(repo_id="user/name", folder_path=sys.argv[1])
print(describe("user/name"))  # without weights
api.repo_exists("user/mark")
sys.argv[1:] = ["user/name", "--output_dir", sys.argv[2]]
run_main(main)
api.create_repo("user/weights")
api.upload_file(repo_id="user/weights", path_or_fileobj=b"weights", path_in_repo="model.safetensors")
sys.argv[1:] = ["user/weights"]
with contextlib.suppress(SystemExit):
    run_main(main)
sys.argv[1:] = ["user/none"]
run_main(main)
"""


def test_offline_is_one_line():
    with pytest.raises(OSError, match=says("`repo_id` must be a repository on the Hub", "'user/name@v1'")) as error:
        download("user/name", "v1")
    assert "\n" not in str(error.value)


def test_files_of_the_user_are_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ValueError, match=says("`output_dir`", "empty", str(tmp_path))):
        download("user/name", output_dir=tmp_path)


@pytest.mark.slow
def test_files_that_cannot_run_come(tmp_path):
    local, output = tmp_path / "local", tmp_path / "output"
    tiny_pipeline().save_pretrained(local)
    (local / "code.py").touch()
    (local / "weights.bin").touch()
    with Hub() as hub:
        environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": "hf_dummy", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-c", CLIENT, local, output]
        text = run_command(command, tmp_path / "log", environment, succeeds=False)
        gets = [request for request in hub.requests if request.startswith("GET")]
    mark = next(number for number, request in enumerate(gets) if "user/mark" in request)
    described, downloaded = (
        [name for name in part if name.endswith(".safetensors")] for part in (gets[:mark], gets[mark:])
    )
    assert "`repo_id` must hold a pipeline, with a model_index.json, got 'user/weights' with " in text
    assert "model.safetensors.\n" in text and not hub.count("user/weights/resolve")  # nothing came
    assert "Pipeline\n" in text and "LatentEmbeddingModule\n" in text and downloaded and not described
    assert str(output) in text and "error: `repo_id` must be a repository on the Hub" in text.splitlines()[-1]
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if ".cache" not in path.parts}
    wanted = {path.relative_to(local).as_posix() for path in local.rglob("*")}
    assert found == wanted - {"code.py", "weights.bin"}
