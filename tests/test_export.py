"""The probe network on its own: exported, and embedding folders."""

import json

import numpy as np
import pytest
import torch
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
    assert main(["export", str(run), str(tmp_path / "probe.safetensors")]) == 0
    with safetensors.safe_open(tmp_path / "probe.safetensors", "pt") as opened:
        notes = json.loads(opened.metadata()["preprocessing"])
    assert (notes["mean"], notes["std"], notes["size"], notes["layout"]) == (127.5, 128.0, [32, 32], "NCHW")
    images, expected = images_and_embeddings(run, faces)
    network, _ = export.load_probe(tmp_path / "probe.safetensors")
    assert torch.equal(backbones.embed(network, [images]), expected)


def test_exported_program_takes_any_batch(run, faces, tmp_path):
    assert main(["export", str(run), str(tmp_path / "probe.pt2")]) == 0
    notes = {"preprocessing": ""}
    program = torch.export.load(tmp_path / "probe.pt2", extra_files=notes).module()
    assert json.loads(notes["preprocessing"])["layout"] == "NCHW"
    images, expected = images_and_embeddings(run, faces)
    for count in (1, 5, len(images)):
        torch.testing.assert_close(program(images[:count]), expected[:count])


def test_onnx_gives_the_same_embeddings(run, faces, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert main(["export", str(run), str(tmp_path / "probe.onnx")]) == 0
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
        (["export", "{run}", "{out}/probe.h5"], "out must end in .safetensors, .pt2 or .onnx"),
        (["embed", "{run}", "{faces}", "{out}/e.csv"], "out must end in .npy or .parquet"),
        (["embed", "{run}", "{out}/none", "{out}/e.npy"], "none is not a folder"),
        (["embed", "{out}/none", "{faces}", "{out}/e.npy"], "none does not exist"),
        (["embed", "{run}", "{run}/tensorboard", "{out}/e.npy"], "no image below"),
    ],
)
def test_bad_arguments_are_named(run, faces, tmp_path, capsys, arguments, message):
    assert main([a.format(run=run, faces=faces, out=tmp_path) for a in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("e.*"))
