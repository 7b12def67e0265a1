"""The probe network on its own: loading it, exporting it with its preprocessing, embedding images with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sst_fast import data
from sst_fast.train import backbones
from sst_fast.train.checkpoint import replacing


@dataclass(frozen=True)
class ProbeInfo:
    """What one must know to use a probe network: how it is built, and what its input is."""

    backbone: str
    dim: int
    width: float
    size: int
    channels: int

    def preprocessing(self) -> dict[str, Any]:
        """From an image file to the network's input, in words and numbers."""
        return {
            "crop": "centred square, resized bilinearly",
            "size": [self.size, self.size],
            "color": "RGB" if self.channels == 3 else "gray",
            "layout": "NCHW",
            "dtype": "float32",
            "mean": data.MEAN,
            "std": data.STD,
            "output": "unit embeddings",
        }

    def build(self) -> nn.Module:
        """The backbone, untrained."""
        return backbones.build(self.backbone, self.dim, self.size, self.width, self.channels)


class UnitEmbedding(nn.Module):
    """A probe network whose output is normalised: what is exported."""

    def __init__(self, probe: nn.Module) -> None:
        super().__init__()
        self.probe = probe

    def forward(self, image: Tensor) -> Tensor:
        """Unit embeddings [N, D] of preprocessed images [N, channels, size, size]."""
        return nn.functional.normalize(self.probe(image).float())


def load_probe(path: str | Path) -> tuple[nn.Module, ProbeInfo]:
    """The probe network of a run's folder, a checkpoint or an exported .safetensors, in evaluation mode.

    Raises:
        FileNotFoundError: there is none. ImportError: safetensors is not installed.
    """
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"run: {file} does not exist")
    if file.suffix == ".safetensors":
        safetensors = _safetensors()
        with safetensors.safe_open(file, "pt") as opened:
            info = ProbeInfo(**json.loads(opened.metadata()["probe"]))
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
    else:
        state = torch.load(file, map_location="cpu", weights_only=True)
        config = json.loads(state["config"])
        crops = {name: config["data"][name] for name in ("size", "channels")}
        info = ProbeInfo(**{name: config[name] for name in ("backbone", "dim", "width")}, **crops)
        weights = probe_weights(state["model"])
    network = info.build()
    network.load_state_dict(weights)
    return network.eval(), info


def probe_weights(model: Mapping[str, Any]) -> dict[str, Any]:
    """Of a whole model's state dict, the probe network's."""
    return {name.removeprefix("probe."): value for name, value in model.items() if name.startswith("probe.")}


def export(run: str | Path, out: str | Path) -> None:
    """Writes a run's probe network: weights (.safetensors), torch.export's program (.pt2) or ONNX (.onnx).

    Programs take preprocessed images [N, channels, size, size] (any N) and give unit embeddings [N, D]. All three record
    :meth:`ProbeInfo.preprocessing`, as JSON: 'preprocessing' in the metadata (safetensors, ONNX) or extra files (.pt2).

    Raises:
        ValueError: another suffix. ImportError: what the format needs is not installed.
    """
    out = Path(out)
    if out.suffix not in (".safetensors", ".pt2", ".onnx"):
        raise ValueError(f"out must end in .safetensors, .pt2 or .onnx, got {out}")
    network, info = load_probe(run)
    notes = {"probe": json.dumps(asdict(info)), "preprocessing": json.dumps(info.preprocessing())}
    with replacing(out) as temporary:
        if out.suffix == ".safetensors":
            _safetensors().torch.save_file(network.state_dict(), temporary, metadata=notes)
            return
        program, example = UnitEmbedding(network).eval(), torch.zeros(2, info.channels, info.size, info.size)
        batch = torch.export.Dim("batch")
        if out.suffix == ".pt2":
            exported = torch.export.export(program, (example,), dynamic_shapes=({0: batch},))
            torch.export.save(exported, temporary, extra_files=notes)
            return
        try:
            import onnx
            import onnxscript  # noqa: F401 (torch needs it)
        except ImportError as error:
            raise ImportError(f"ONNX needs the extra: pip install 'sst-fast[export]' ({error})") from error
        made = torch.onnx.export(
            program, (example,), input_names=["image"], output_names=["embedding"], dynamic_shapes=({0: batch},),
            dynamo=True, verbose=False,
        )  # fmt: skip
        assert made is not None
        proto = made.model_proto
        for name, value in notes.items():
            proto.metadata_props.append(onnx.StringStringEntryProto(key=name, value=value))
        onnx.save_model(proto, str(temporary))


def embed_folder(
    run: str | Path, root: str | Path, out: str | Path, *, device: str = "cpu", batch: int = 256, workers: int = 0
) -> int:
    """Writes the unit embeddings of all images below ``root``, in order of path; returns how many.

    ``out``: .npy, float32 [M, D], beside it .txt with the paths relative to ``root``, a line each; or .parquet with the
    columns path and embedding.

    Raises:
        FileNotFoundError: no run, no folder. ValueError: no image, an unreadable one, or another suffix. ImportError:
            Parquet without pyarrow.
    """
    root, out = Path(root), Path(out)
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"out must end in .npy or .parquet, got {out}")
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in data.EXTENSIONS)
    if not paths:
        raise ValueError(f"root: no image below {root}")
    network, info = load_probe(run)
    images = data.image_batches(paths, info.size, info.channels, batch=batch, workers=workers)
    embeddings = backbones.embed(network.to(device), images).cpu().numpy()
    names = [path.relative_to(root).as_posix() for path in paths]
    with replacing(out) as temporary:
        if out.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, embeddings)
        else:
            try:
                import pyarrow as pa
                import pyarrow.parquet as pq
            except ImportError as error:
                raise ImportError(f"Parquet needs the extra: pip install 'sst-fast[export]' ({error})") from error
            rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
            table = pa.table({"path": pa.array(names), "embedding": rows})
            pq.write_table(
                table.replace_schema_metadata({"preprocessing": json.dumps(info.preprocessing())}), temporary
            )
    if out.suffix == ".npy":
        with replacing(out.with_suffix(".txt")) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    return len(paths)


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f".safetensors needs the extra: pip install 'sst-fast[export]' ({error})") from error
    return safetensors
