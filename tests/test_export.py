"""The probe network on its own: exported, and embedding folders."""

import json
import os
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from runs import config, make_faces

from sst_fast import data
from sst_fast.train import backbones, export, loop
from sst_fast.train.cli import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    return make_faces(tmp_path_factory.mktemp("data") / "faces")


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    """A trained one; tests leave it as it is."""
    out = tmp_path_factory.mktemp("run") / "run"
    settings = config(faces, out, epochs=1, lr=0.001)
    loop.train(settings, *loop.split(settings))
    return out


def images_and_embeddings(run, faces):
    network, info = export.load_probe(run)
    images = data.all_images(data.folder(faces), info.size, info.channels)[0]
    return images, backbones.embed(network, [images])


def test_safetensors_load_again(run, faces, tmp_path):
    safetensors = pytest.importorskip("safetensors")
    before = os.umask(0o027)
    assert main(["export", str(run), str(tmp_path / "probe.safetensors")]) == 0
    os.umask(before)
    assert (tmp_path / "probe.safetensors").stat().st_mode & 0o777 == 0o640
    with safetensors.safe_open(tmp_path / "probe.safetensors", "pt") as opened:
        notes = json.loads(opened.metadata()["preprocessing"])
    assert (notes["mean"], notes["std"], notes["size"], notes["layout"]) == (127.5, 128.0, [32, 32], "NCHW")
    images, expected = images_and_embeddings(run, faces)
    network, _ = export.load_probe(tmp_path / "probe.safetensors")
    assert torch.equal(backbones.embed(network, [images]), expected)


def test_exported_program_takes_any_batch(run, faces, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["export", str(run), str(tmp_path / "probe.pt2")]) == 0
    assert not capfd.readouterr().err
    notes = {"preprocessing": ""}
    program = torch.export.load(tmp_path / "probe.pt2", extra_files=notes).module()
    assert json.loads(notes["preprocessing"])["layout"] == "NCHW"
    images, expected = images_and_embeddings(run, faces)
    for count in (1, 5, len(images)):
        torch.testing.assert_close(program(images[:count]), expected[:count])


def test_onnx_gives_the_same_embeddings(run, faces, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["export", str(run), str(tmp_path / "probe.onnx")]) == 0
    assert not capfd.readouterr().err
    session = onnxruntime.InferenceSession(tmp_path / "probe.onnx", providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])["dtype"] == "float32"
    images, expected = images_and_embeddings(run, faces)
    for count in (1, len(images)):
        (found,) = session.run(["embedding"], {"image": images[:count].numpy()})
        np.testing.assert_allclose(found, expected[:count].numpy(), atol=1e-5)


@pytest.mark.parametrize("suffix", ["npy", "parquet"])
def test_embed_writes_every_image_of_a_folder(run, faces, tmp_path, suffix, capsys):
    out = tmp_path / f"embeddings.{suffix}"
    assert main(["embed", str(run), str(faces), str(out)]) == 0
    assert "36 embeddings" in capsys.readouterr().out
    if suffix == "npy":
        found, names = np.load(out), out.with_suffix(".txt").read_text().splitlines()
    else:
        table = pytest.importorskip("pyarrow.parquet").read_table(out)
        names = table["path"].to_pylist()
        found = np.array(table["embedding"].to_pylist(), np.float32)
    assert names[:4] == ["p0/0.png", "p0/1.png", "p0/2.png", "p1/0.png"]
    np.testing.assert_allclose(found, images_and_embeddings(run, faces)[1].numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["embed", "{run}", "{faces}", "{out}/none/e.npy"], "out: {out}/none is not a folder"),
        (["export", "{run}", "{out}/none/probe.pt2"], "out: {out}/none is not a folder"),
        (["embed", "{run}", "{faces}", "{out}/e.npy", "--device", "gpu"], "device must be 'auto', 'cpu', 'cuda'"),
        (["eval", "{run}", "{faces}", "--device", "cuda:99"], "device: 'cuda:99' was asked for, but PyTorch finds"),
        (["eval", "{run}", "nofolder"], "target: nofolder does not exist"),
        (["eval", "{run}", "{faces}", "--backbone", "mobilefacenet"], "the configuration asks for"),
        (["export", "{run}", "{out}/probe.h5"], "out must end in .safetensors, .pt2 or .onnx"),
        (["embed", "{run}", "{faces}", "{out}/e.csv"], "out must end in .npy or .parquet"),
        (["embed", "{run}", "{out}/none", "{out}/e.npy"], "none is not a folder"),
        (["embed", "{out}/none", "{faces}", "{out}/e.npy"], "none does not exist"),
        (["embed", "{run}", "{run}/tensorboard", "{out}/e.npy"], "no image below"),
    ],
)
def test_bad_arguments_are_named(run, faces, tmp_path, capsys, arguments, message):
    assert main([a.format(run=run, faces=faces, out=tmp_path) for a in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(out=tmp_path) in line
    assert not list(tmp_path.glob("e.*"))


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "probe.", "state_dict"])
def test_plain_weights_load_where_the_architecture_is_given(run, faces, tmp_path, prefix, capsys):
    """Those of eval are as good as the run's own; a training may start from them."""
    network, _ = export.load_probe(run)
    weights = network.state_dict()
    if prefix == "state_dict":
        content = {"state_dict": {f"module.{name}": value for name, value in weights.items()}, "epoch": 3}
    else:
        content = {f"{prefix}{name}": value for name, value in weights.items()}
    if prefix == "probe.":
        content["galleries.0.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "weights.pth")
    built = ["--backbone", "mobilefacenet", "--dim", "16", "--width", "0.125", "--size", "32", "--channels", "1"]
    built += ["--json", str(tmp_path / "evaluation.json")]
    assert main(["eval", str(run), str(faces), *built[-2:]]) == 0
    expected = capsys.readouterr().out
    assert main(["eval", str(tmp_path / "weights.pth"), str(faces), *built]) == 0
    assert capsys.readouterr().out == expected
    begin = loop.start(config(faces, tmp_path, init=str(tmp_path / "weights.pth")), range(9), torch.device("cpu"))
    for name, value in begin.model.probe.state_dict().items():
        assert torch.equal(value, weights[name])
    built[3] = "8"
    assert main(["eval", str(tmp_path / "weights.pth"), str(faces), *built]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "run: " in line
    assert "weights.pth does not fit ProbeInfo(backbone='mobilefacenet', dim=8" in line


def test_a_broken_image_stops_or_is_skipped(run, tmp_path, capsys):
    faces = make_faces(tmp_path / "faces", people=2)
    (faces / "p0/1.png").write_bytes(b"no picture")
    assert main(["embed", str(run), str(faces), str(tmp_path / "e.npy")]) == 1
    assert "1.png cannot be read as an image" in capsys.readouterr().err
    assert main(["embed", str(run), str(faces), str(tmp_path / "e.npy"), "--on_error", "skip"]) == 0
    captured = capsys.readouterr()
    assert f"1 images could not be read and were skipped: {tmp_path / 'e.npy.unreadable.txt'}" in captured.err
    assert (
        (tmp_path / "e.npy.unreadable.txt").read_text().startswith(f"{faces / 'p0/1.png'} cannot be read as an image")
    )
    assert "5 embeddings" in captured.out
    assert (tmp_path / "e.txt").read_text().split() == ["p0/0.png", "p0/2.png", "p1/0.png", "p1/1.png", "p1/2.png"]
    assert len(np.load(tmp_path / "e.npy")) == 5
    for image in faces.rglob("*.png"):
        image.write_bytes(b"no picture")
    assert main(["embed", str(run), str(faces), str(tmp_path / "f.npy"), "--on_error", "skip"]) == 1
    assert "none of 6 images could be read: " in capsys.readouterr().err


def test_names_of_any_bytes(run, tmp_path, capsys):
    """A name that is no UTF-8 is kept byte for byte in .txt; Parquet says before the work that it cannot."""
    faces = make_faces(tmp_path / "faces", people=1)
    odd = os.fsencode(faces / "p0") + b"/\xe4.png"
    os.rename(faces / "p0/0.png", odd)
    assert main(["embed", str(run), str(faces), str(tmp_path / "e.npy")]) == 0
    assert sorted((tmp_path / "e.txt").read_bytes().split(b"\n")[:-1]) == [b"p0/1.png", b"p0/2.png", b"p0/\xe4.png"]
    pytest.importorskip("pyarrow")
    assert main(["embed", str(run), str(faces), str(tmp_path / "e.parquet")]) == 1
    assert "is no UTF-8, which Parquet cannot hold: write .npy" in capsys.readouterr().err
    os.rename(odd, faces / "p0/a\nb.png")
    assert main(["embed", str(run), str(faces), str(tmp_path / "f.npy")]) == 1
    assert "has a line break in its name" in capsys.readouterr().err


@pytest.mark.parametrize("channels", [1, 3])
def test_recorded_preprocessing_is_enough_to_repeat_it(channels, tmp_path):
    """Written out in numpy from the notes alone, for an odd and a wide image, smaller and larger than the input."""
    notes = export.ProbeInfo("mobilefacenet", 16, 0.125, 48, channels).preprocessing()
    rng = np.random.default_rng(0)
    for width, height in ((131, 90), (60, 75), (33, 40)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "x.png")
        expected = data.to_tensor(data.read(tmp_path / "x.png", 48, channels)).numpy()
        image = pixels.astype(np.int64)
        if channels == 1:
            image = ((image @ [19595, 38470, 7471] + 32768) // 65536)[..., None]
        side = min(width, height)
        found = image.astype(np.float64)
        for axis, length in ((1, width), (0, height)):
            left, ratio = (length - side) / 2, side / 48
            x = np.arange(length)
            weights = np.stack([
                np.maximum(0, 1 - np.abs(x + 0.5 - left - (i + 0.5) * ratio) / max(1, ratio)) for i in range(48)
            ])  # fmt: skip
            weights /= weights.sum(1, keepdims=True)
            found = np.round(np.moveaxis(np.tensordot(weights, found, (1, axis)), 0, axis))
        found = (found.transpose(2, 0, 1) - notes["mean"]) / notes["std"]
        assert np.abs(found - expected).max() * notes["std"] <= 1
