"""The judges of the study that were not trained on the labels of the textures."""

import base64
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusers_dod.metrics.inception import Convolution


sys.path[:0] = [str(Path(__file__).parents[1] / "training" / name) for name in ("desk", "study")]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The module of the ImageNet judge, as a command: its weights may be missing."""
    import runpy
    import types

    path = Path(__file__).parents[1] / "training" / "desk" / "imagenet_features.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("empty"))
        with pytest.raises(FileNotFoundError, match="run python training/desk/imagenet_features.py"):
            runpy.run_path(str(path), run_name="imported")
    source = path.read_text().split('\nif __name__ == "__main__":')[0]
    module = types.ModuleType("imagenet_features")
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def package(arrays: dict[str, np.ndarray], scale: float, minimum: float, imagenet) -> bytes:
    """An npm package like the published one, of 8-bit arrays."""
    entries = ",".join(
        f'{{name:"{name}",shape:{json.dumps(list(array.shape), separators=(",", ":"))},dtype:"float32",'
        f'quantization:{{min:{minimum},scale:{scale},dtype:"uint8"}}}}'
        for name, array in arrays.items()
    )
    content = b"".join(array.tobytes() for array in arrays.values())
    size = -(-len(content) // imagenet.NUM_SHARDS)
    files = {"model.min.js": f"!function(a){{}}({{weights:[{entries}]}})"}
    for i in range(imagenet.NUM_SHARDS):
        text = base64.b64encode(content[i * size : (i + 1) * size]).decode()
        files[f"group1-shard{i + 1}of{imagenet.NUM_SHARDS}.min.js"] = f'module.exports="{text}"'
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
            for name, text in files.items():
                member = tarfile.TarInfo(f"{imagenet.FOLDER}/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        return buffer.getvalue()


def test_arrays_of_the_package(imagenet):
    arrays = {"conv2d_1/kernel": np.arange(24, dtype=np.uint8).reshape(2, 3, 4), "b": np.uint8([0, 255])}
    found = imagenet.read_arrays(package(arrays, 0.5, -1.0, imagenet))
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array * 0.5 - 1)


def test_weights_go_to_the_convolutions_in_their_order(imagenet):
    trunk = imagenet.ImageNetTrunk()
    convolutions = {name: layer for name, layer in trunk.named_modules() if isinstance(layer, Convolution)}
    arrays = {}
    for number, layer in enumerate(convolutions.values(), 1):
        out_channels, in_channels, height, width = layer.conv.weight.shape
        arrays[f"conv2d_{number}/kernel"] = np.full((height, width, in_channels, out_channels), number, np.float32)
        for name in ("beta", "moving_mean", "moving_variance"):
            arrays[f"batch_normalization_{number}/{name}"] = np.full(out_channels, number + 0.5, np.float32)
    state = imagenet.to_state(arrays)
    trunk.load_state_dict(state, assign=True)
    # 5 of the stem, 7 of each of three blocks, 4 of the reduction and 10 of each of two blocks.
    assert len(convolutions) == 50
    names = list(convolutions)
    assert names[5] == "network.Mixed_5b.branch1x1" and names[-1] == "network.Mixed_6c.branch_pool"
    assert float(state["network.Mixed_6c.branch_pool.conv.weight"].mean()) == 50
    features = trunk.eval()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert features.shape == (2, 288 + 768)


def test_the_spectrum_sees_contrast_size_and_colour():
    from spectrum_features import extractor

    x = torch.arange(32)
    wave = torch.cos(2 * torch.pi * 4 * x / 32).expand(3, 32, 32)  # grey, four periods
    images = [
        (127.5 + 40 * wave),
        (127.5 + 80 * wave),
        (127.5 + 40 * wave * torch.tensor([1.0, 0, -1])[:, None, None]),
    ]
    weak, strong, coloured = extractor(torch.stack(images).round().to(torch.uint8)).unflatten(1, (3, 18))
    assert weak[0].argmax() == 0 and weak[0, 1:].argmax() + 1 == 4
    assert strong[0, 4] - weak[0, 4] == pytest.approx(np.log(4), abs=0.05)
    assert (weak[1:, 4] < -13).all() and (coloured[1:, 4] > -9).all()


def test_the_judge_without_labels_knows_how_textures_were_made():
    from attribute_features import extractor

    from diffusers_dod.data.textures import TextureDataset

    samples = list(TextureDataset(120, seed=103))
    images = torch.from_numpy(np.stack([sample["image"] for sample in samples])).permute(0, 3, 1, 2)
    attributes = torch.from_numpy(np.stack([sample["attributes"] for sample in samples]))
    features = extractor(images).features
    assert features.shape == (120, 64)
    found = extractor.judge.to_attributes(features)
    assert (found - attributes).square().mean() < 0.06 < 0.5 * attributes.var()


def test_whose_priors_are_bounds(monkeypatch):
    import judge_priors
    import study

    monkeypatch.setattr(study, "load_study", lambda: {"data": {"num_train_samples": 1200}})
    for labels, others in (("classes", 11), ("kinds", 8), ("hues", 11)):
        of_image = judge_priors.label_images(labels, 144)
        if labels in study.LABELS:
            assert of_image.tolist() == study.LABELS[labels](144, judge_priors.IMAGE_SEED)[1].tolist()
        sources = [judge_priors.find_source(of_image, index, of_another=True) for index in range(144)]
        assert (of_image[sources] != of_image).all() and (np.array(sources) // 12 == np.arange(144) // 12).all()
        shifts = {(source - index) % 12 for index, source in enumerate(sources) if index % 12 == 0}
        assert len(shifts) == others  # each in turn
        assert [judge_priors.find_source(of_image, index, of_another=False) for index in (0, 7, 143)] == [0, 7, 143]


def test_sets_that_are_judged():
    import judge_priors

    argv = ["--pipeline", "pipeline", "--output_file", "judges.json"]
    assert judge_priors.find_sets(judge_priors.parse_args(argv)) == judge_priors.SETS
    other = judge_priors.find_sets(judge_priors.parse_args([*argv, "--guidance_scale", "4"]))
    assert [call["guidance_scale"] for call in other.values()] == [[1.0], [3.0], [1.0, 4.0], [3.0, 4.0], 4.0, 4.0, 4.0]
    bounds = judge_priors.find_sets(judge_priors.parse_args([*argv, "--bounds"]))
    assert list(bounds) == [judge_priors.REAL, judge_priors.WRONG] and judge_priors.find_pairs(bounds) == []
    assert list(judge_priors.find_sets(judge_priors.parse_args([*argv, "--bounds", "--labels", "none"]))) == [
        judge_priors.REAL
    ]
    with pytest.raises(SystemExit):
        judge_priors.parse_args([*argv, "--num_samples", "13"])


@pytest.mark.slow
def test_sources_of_priors_by_several_judges(tmp_path, monkeypatch, capsys):
    import judge_priors

    from diffusers_dod import DoDPipeline
    from diffusers_dod.data.textures import TextureDataset
    from diffusers_dod.results import read_results

    kept = [name for name in judge_priors.SETS if "tokens" not in name]  # the repository's checkpoint draws none
    monkeypatch.setattr(
        judge_priors, "SETS", {name: {**judge_priors.SETS[name], "num_inference_steps": 1} for name in kept}
    )
    monkeypatch.setattr(judge_priors, "JUDGES", {name: judge_priors.JUDGES[name] for name in ("classes", "spectrum")})
    calls, call = [], DoDPipeline.__call__

    def record(pipeline, labels, **options):
        calls.append((labels, options.get("image")))
        return call(pipeline, labels, **options)

    monkeypatch.setattr(DoDPipeline, "__call__", record)
    argv = ["judge_priors.py", "--pipeline", "checkpoints/dod-desk", "--num_samples", 36, "--num_reference", 48]
    argv += ["--batch_size", 18, "--samples_dir", tmp_path / "samples", "--output_file", tmp_path / "judges.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    judge_priors.main()
    metrics = read_results(tmp_path / "judges.json")["metrics"]
    assert len(calls) == 2 * len(kept) and all(labels == [i % 12 for i in range(18)] for labels, _ in calls[:1])
    sources = TextureDataset(36, seed=judge_priors.IMAGE_SEED)
    of_image = {sources[i]["image"].transpose(2, 0, 1).tobytes(): sources[i]["label"] for i in range(36)}
    own, other = calls[-4:-2], calls[-2:]  # the last two sets
    shifts = [
        {
            (of_image[image.numpy().tobytes()] - label) % 12
            for labels, images in found
            for image, label in zip(images, labels, strict=True)
        }
        for found in (own, other)
    ]
    assert shifts == [{0}, {1, 2, 3}]
    tables = capsys.readouterr().out.split("\n\n")
    for number, key in enumerate(("fid_corrected", "kid")):
        digits = judge_priors.SHOWN[key]
        assert f"{metrics[f'{key}/spectrum/{kept[0]}']['value']:.{digits}f} ±" in tables[number]
    pair = " - ".join(judge_priors.PAIRS[0])
    difference = metrics[f"kid/classes/{pair}"]
    assert difference["value"] == pytest.approx(difference["first"] - difference["second"], abs=1e-9)
    monkeypatch.setattr(DoDPipeline, "__call__", None)  # the samples are there
    judge_priors.main()
    assert read_results(tmp_path / "judges.json")["metrics"] == metrics
