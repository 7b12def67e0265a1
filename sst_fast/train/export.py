"""The probe network on its own: loading it, exporting it with its preprocessing, embedding images with it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sst_fast import data
from sst_fast.data.pairs import OnError
from sst_fast.train import backbones, checkpoint
from sst_fast.train.checkpoint import replacing
from sst_fast.train.config import device_named


@dataclass(frozen=True)
class ProbeInfo:
    """What one must know to use a probe network: how it is built, and what its input is."""

    backbone: str
    dim: int
    width: float
    size: int
    channels: int

    def preprocessing(self) -> dict[str, Any]:
        """From an image file to the network's input, in words and numbers: enough to repeat it in another language."""
        gray = "gray, 8 bits: (19595 R + 38470 G + 7471 B + 32768) / 65536, rounded down"
        return {
            "orientation": "upright, as EXIF says",
            "color": "RGB, 8 bits" if self.channels == 3 else gray,
            "crop": "centred square of side s = min(width, height); its left edge (width - s) / 2 and its upper edge "
            "(height - s) / 2 are not rounded to whole pixels",
            "size": [self.size, self.size],
            "resize": "bilinear with antialiasing: output pixel i is the mean of the image's pixels x (beyond the crop too) with "
            "weights max(0, 1 - |x + 0.5 - left - (i + 0.5) s / size| / max(1, s / size)); along each axis in turn, rounded to 8 "
            "bits each time, which is right to 1 of 255",
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


def load_probe(
    path: str | Path, wanted: ProbeInfo | None = None, *, option: str = "run"
) -> tuple[nn.Module, ProbeInfo]:
    """The probe network of a run's folder, a checkpoint, an exported .safetensors or a file of plain weights.

    Args:
        path: plain weights are a state dict (.pt, .pth, .safetensors), or one under 'state_dict', of the backbone or of a
            model that holds it as ``probe``; the prefixes of DistributedDataParallel and torch.compile are taken off.
        wanted: how the network is built; needed for plain weights, which do not know it.
        option: what the user calls ``path``, for errors.

    Returns:
        The network in evaluation mode, and how it is built.

    Raises:
        OSError: there is none. ValueError: it is another kind of file, cut short or damaged, does not fit the network, or is
            not what is ``wanted``. ImportError: safetensors is not installed.
    """
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{option}: {file} does not exist")
    info: ProbeInfo | None = None
    if file.suffix == ".safetensors":
        safetensors = _safetensors()
        try:
            with safetensors.safe_open(file, "pt") as opened:
                notes = opened.metadata() or {}
                weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dict)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{option}: {file} is no whole .safetensors file: {error}") from None
        if "probe" in notes:
            info = ProbeInfo(**json.loads(notes["probe"]))
    else:
        try:
            weights = checkpoint.read(file)
        except ValueError as error:
            raise ValueError(f"{option}: {error}") from None
        if isinstance(weights, dict) and "config" in weights and "model" in weights:
            config = json.loads(weights["config"])
            crops = {name: config["data"][name] for name in ("size", "channels")}
            info = ProbeInfo(**{name: config[name] for name in ("backbone", "dim", "width")}, **crops)
            weights = weights["model"]
    if info is None and wanted is None:
        raise ValueError(
            f"{option}: {file} holds weights alone; say what network they belong to (--backbone, --dim, --width, --size, --channels)"
        )
    if info is not None and wanted is not None and info != wanted:
        raise ValueError(f"{option}: {file} holds {info}, the configuration asks for {wanted}")
    info = info or wanted
    assert info is not None
    network = info.build()
    try:
        network.load_state_dict(probe_weights(weights))
    except (RuntimeError, TypeError, AttributeError) as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{option}: {file} does not fit {info}: {told[:300]}{' ...' * (len(told) > 300)}") from None
    return network.eval(), info


def probe_weights(model: Any) -> Any:
    """Of a state dict, the probe network's part under the backbone's own names."""
    if isinstance(model, Mapping) and isinstance(model.get("state_dict"), Mapping):
        model = model["state_dict"]
    while isinstance(model, Mapping) and model:
        for prefix in ("module.", "_orig_mod.", "probe."):
            if prefix == "probe." and any(name.startswith(prefix) for name in model):
                model = {name: value for name, value in model.items() if name.startswith(prefix)}
            if all(name.startswith(prefix) for name in model):
                model = {name.removeprefix(prefix): value for name, value in model.items()}
                break
        else:
            break
    return model


def export(run: str | Path, out: str | Path, wanted: ProbeInfo | None = None) -> None:
    """Writes a run's probe network: weights (.safetensors), torch.export's program (.pt2) or ONNX (.onnx).

    Programs take preprocessed images [N, channels, size, size] (any N) and give unit embeddings [N, D]. All three record
    :meth:`ProbeInfo.preprocessing`, as JSON: 'preprocessing' in the metadata (safetensors, ONNX) or extra files (.pt2).

    Raises:
        ValueError: another suffix. ImportError: what the format needs is not installed.
    """
    out = target(out, ".safetensors", ".pt2", ".onnx")
    if out.suffix == ".safetensors":
        safetensors = _safetensors()
    if out.suffix == ".onnx":
        try:
            import onnx
            import onnxscript  # noqa: F401 (torch needs it)
        except ImportError as error:
            raise ImportError(f"ONNX needs the extra: pip install 'sst-fast[export]' ({error})") from error
    network, info = load_probe(run, wanted)
    notes = {"probe": json.dumps(asdict(info)), "preprocessing": json.dumps(info.preprocessing())}
    with replacing(out) as temporary:
        if out.suffix == ".safetensors":
            # Written by us, with the mode that the user's umask gives; its own save_file lets nobody else read it.
            temporary.write_bytes(safetensors.torch.save(network.state_dict(), metadata=notes))
            return
        program, example = UnitEmbedding(network).eval(), torch.zeros(2, info.channels, info.size, info.size)
        batch = torch.export.Dim("batch")
        if out.suffix == ".pt2":
            exported = torch.export.export(program, (example,), dynamic_shapes=({0: batch},))
            buffer = io.BytesIO()  # it warns of a path that does not end in .pt2
            torch.export.save(exported, buffer, extra_files=notes)
            temporary.write_bytes(buffer.getbuffer())
            return
        with _quiet_onnx():
            made = torch.onnx.export(
                program, (example,), input_names=["image"], output_names=["embedding"], dynamic_shapes=({0: batch},),
                dynamo=True, verbose=False,
            )  # fmt: skip
        assert made is not None
        proto = made.model_proto
        for name, value in notes.items():
            proto.metadata_props.append(onnx.StringStringEntryProto(key=name, value=value))
        onnx.save_model(proto, str(temporary))


@contextlib.contextmanager
def _quiet_onnx() -> Iterator[None]:
    """Keeps back what PyTorch's exporter says of itself: that there is no torchvision, that it calls what it deprecates."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def embed_folder(
    run: str | Path, root: str | Path, out: str | Path, *, device: str = "auto", batch: int = 256, workers: int = 0,
    on_error: OnError = "stop", wanted: ProbeInfo | None = None,
) -> tuple[int, data.Unreadable | None]:  # fmt: skip
    """Writes the unit embeddings of all images below ``root``, in order of path.

    ``out``: .npy, float32 [M, D], beside it .txt with the paths relative to ``root``, a line each, in the file system's own
    bytes; or .parquet with the columns path and embedding.

    Returns:
        How many were written, and with ``on_error`` 'skip' the others, which OUT.unreadable.txt names with the reason.

    Raises:
        FileNotFoundError: no run, no folder. ValueError: no image, another suffix, an image that cannot be read or a name
            that the output cannot hold. ImportError: Parquet without pyarrow.
    """
    place = device_named(device)
    root, out = Path(root), target(out, ".npy", ".parquet")
    if not root.is_dir():
        raise FileNotFoundError(f"root: {root} is not a folder")
    if out.suffix == ".parquet":
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ImportError as error:
            raise ImportError(f"Parquet needs the extra: pip install 'sst-fast[export]' ({error})") from error
    found = data.images_below(root)
    if not found:
        raise ValueError(f"root: no image below {root}")
    network, info = load_probe(run, wanted)
    network.to(place)
    skipped = data.Unreadable(f"{out}.unreadable.txt") if on_error == "skip" else None
    if skipped:
        skipped.path.unlink(missing_ok=True)  # of another time
    paths: list[Path] = []
    kept: list[int] = []
    for path in found:
        if not (reason := _unfit_name(path.relative_to(root).as_posix(), out.suffix)):
            paths.append(path)
        elif skipped:
            skipped.add(data.DataError(reason))
        else:
            raise ValueError(f"root: {reason}")
    batches = data.image_batches(
        paths, info.size, info.channels, batch=batch, workers=workers, skipped=skipped, kept=kept
    )
    embeddings = backbones.embed(network, batches).cpu().numpy()
    if not np.isfinite(embeddings).all():
        raise ValueError(f"run: {run} gives embeddings that are not finite: the network has diverged")
    names = [paths[number].relative_to(root).as_posix() for number in kept]
    with replacing(out) as temporary:
        if out.suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, embeddings)
        else:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), embeddings.shape[1])
            table = pa.table({"path": pa.array(names), "embedding": rows})
            pq.write_table(
                table.replace_schema_metadata({"preprocessing": json.dumps(info.preprocessing())}), temporary
            )
    if out.suffix == ".npy":
        with replacing(out.with_suffix(".txt")) as temporary:
            temporary.write_bytes(b"".join(os.fsencode(name) + b"\n" for name in names))
    return len(names), skipped


def _unfit_name(name: str, suffix: str) -> str:
    """Why a file of this kind cannot hold the name; '' if it can."""
    if suffix == ".npy":
        return f"{name!r} has a line break in its name, which .txt cannot hold: write .parquet" if "\n" in name else ""
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"{name!r} is no UTF-8, which Parquet cannot hold: write .npy"
    return ""


def target(out: str | Path, *suffixes: str, option: str = "out") -> Path:
    """``out`` as a path that can be written, as far as can be said before the work."""
    out = Path(out)
    if out.suffix not in suffixes:
        raise ValueError(
            f"{option} must end in {' or '.join(filter(None, (', '.join(suffixes[:-1]), suffixes[-1])))}, got {out}"
        )
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{option}: {out.parent} is not a folder")
    return out


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f".safetensors needs the extra: pip install 'sst-fast[export]' ({error})") from error
    return safetensors
