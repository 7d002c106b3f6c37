"""Up to the Hub and down again, by the real client against a server on the loopback interface."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import tiny_pipeline
from hub_server import Hub
from launch import PATIENCE_S
from PIL import Image


# The end point is read when huggingface_hub is imported, so all of the client runs in one process of its own. It says
# when it is done with the server and goes on once that is gone.
CLIENT = """
import sys

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi

from diffusers_dod import DoDPipeline
from diffusers_dod.training.train import main as train

local_folder, exported_folder, image_folder, trained_folder = sys.argv[1:]


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(["goldfish", 3], output_type="pt", generator=torch.Generator().manual_seed(0)).images


local = DoDPipeline.from_pretrained(local_folder)
expected = images(local)

api = HfApi()
api.create_repo("user/uploaded")
api.upload_folder(repo_id="user/uploaded", folder_path=local_folder)
local.push_to_hub("user/pushed")

for repo_id in ("user/uploaded", "user/pushed"):
    for cls in (DoDPipeline, DiffusionPipeline):
        pipe = cls.from_pretrained(repo_id)
        assert type(pipe) is DoDPipeline, type(pipe)
        torch.testing.assert_close(images(pipe), expected)
    assert dict(pipe.config.id2label) == dict(local.config.id2label)
    assert pipe.config.default_guidance_scale == local.config.default_guidance_scale
pipe.save_pretrained(exported_folder)

sizes = "--resolution 8 --train_batch_size 2 --max_train_steps 1"
where = ["--train_data_dir", image_folder, "--output_dir", trained_folder]
hub = ["--push_to_hub", "--hub_model_id", "user/trained", "--hub_token", "hf_dummy"]
train(["--preset", "DoD-Desk", *sizes.split(), *where, *hub])
pipe = DoDPipeline.from_pretrained("user/trained")
assert pipe.label2ids == {"ant": [0], "newt": [1]}, pipe.label2ids
assert pipe("newt", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 8)

print("online done", flush=True)
sys.stdin.readline()
for cls in (DoDPipeline, DiffusionPipeline):
    pipe = cls.from_pretrained("user/pushed", local_files_only=True)
    torch.testing.assert_close(images(pipe), expected)
print("offline done", flush=True)
"""


def run_client(folder: Path) -> Hub:
    """Runs the client in `folder`, where `local` is the pipeline to upload; returns the server, stopped by then."""
    with Hub() as hub, (folder / "errors").open("w") as errors:
        environment = {**hub.environment(folder / "home"), "HF_TOKEN": "hf_dummy"}
        client = subprocess.Popen(
            [sys.executable, "-c", CLIENT, *(folder / name for name in ("local", "exported", "images", "trained"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        online = client.stdout.readline()
    num_requests = len(hub.requests)
    output, _ = client.communicate("\n", timeout=PATIENCE_S)
    assert (online + output, client.returncode) == ("online done\noffline done\n", 0), (folder / "errors").read_text()
    assert len(hub.requests) == num_requests
    return hub


def json_files(folder: Path) -> dict[str, dict]:
    return {str(file.relative_to(folder)): json.loads(file.read_text()) for file in folder.rglob("*.json")}


# One test, so that the client runs once however the tests are spread over processes.
@pytest.mark.slow
def test_up_to_the_hub_and_down_again(tmp_path):
    local = tmp_path / "local"
    tiny_pipeline(default_guidance_scale=3.0).save_pretrained(local)
    for name in ("newt", "ant"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / name / "0.png")
    hub = run_client(tmp_path)  # asserts that the images are the same

    # The weights of every component came from the server.
    for repo_id in ("user/uploaded", "user/pushed"):
        downloads = [request for request in hub.requests if request.startswith(f"GET /{repo_id}/resolve/")]
        weights = {download.rsplit("/", 2)[-2] for download in downloads if download.endswith(".safetensors")}
        assert weights == {"transformer", "vae", "latent_embedder"}

    # Both ways put the same files there, byte for byte, and pushing adds a model card.
    uploaded, pushed = (hub.repos[repo_id].files for repo_id in ("user/uploaded", "user/pushed"))
    assert set(uploaded) == {str(file.relative_to(local)) for file in local.rglob("*") if file.is_file()}
    assert set(pushed) == set(uploaded) | {"README.md"}
    for path, file in uploaded.items():
        assert pushed[path].sha256 == file.sha256, path
        assert file.is_lfs == path.endswith(".safetensors")

    # Nothing names a folder of this machine, neither there nor in what is saved from the cache of downloads.
    for path, file in (*uploaded.items(), *pushed.items()):
        content = hub.contents[file.sha256]
        assert str(tmp_path).encode() not in content and b"_name_or_path" not in content, path
    assert json_files(tmp_path / "exported") == json_files(local)

    # A training run leaves its pipeline, card, recipe, metrics and samples there, and neither checkpoints nor secrets.
    trained = hub.repos["user/trained"].files
    assert {path.split("/")[0] for path in trained} == {
        *("README.md", "recipe.yaml", "curves.png", "metrics.jsonl", "model_index.json", "samples"),
        *("latent_embedder", "scheduler", "transformer"),
    }
    for path, file in trained.items():
        content = hub.contents[file.sha256]
        assert str(tmp_path).encode() not in content and b"hf_dummy" not in content, path
