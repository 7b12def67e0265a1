"""The command ``sst-fast``: train, eval, embed, export, data, demo, info, check, tune. Settings come from a YAML or TOML file plus overrides.

A command is a function in COMMANDS: its parameters and their description in its docstring are its options, but for
``train`` and ``demo``, whose options are the fields of a dataclass.
"""

from __future__ import annotations

import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sst_fast

if TYPE_CHECKING:
    from sst_fast.data.pairs import OnError
    from sst_fast.evaluation.targets import Options
    from sst_fast.train.config import Config
    from sst_fast.train.demo import DemoConfig
    from sst_fast.train.export import ProbeInfo


def train(config: Config) -> None:
    """Train a network on a data set; the same command continues an interrupted run."""
    from sst_fast.train import loop

    done = loop.train(config, *loop.split(config))
    if done.rank == 0 and done.history:
        print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in done.history[-1].items()))
    if done.scores:
        print(loop.told(done.scores))


def evaluate(
    run: str, targets: Sequence[str], options: Options, backbone: str = "", dim: int = 512, width: float = 1.0,
    channels: int = 3,
) -> None:  # fmt: skip
    """Evaluate a trained network on test sets; the kind of each file decides how.

    Args:
        run: the run's folder, a checkpoint, an exported .safetensors or a file of plain weights
        targets: data sets of identities, 'orl', .bin files, lists of pairs, BLUFR's .mat, IJB's folder
        options: how targets are evaluated
        backbone: of plain weights: 'mobilefacenet' or 'timm:NAME'; --size is then the side of the input, 112 if not given
        dim: of plain weights: size of the embedding
        width: of plain weights: factor on MobileFaceNet's channel counts
        channels: of plain weights: 1 (gray) or 3 (RGB)
    """
    from sst_fast.evaluation.targets import as_json, evaluate_targets
    from sst_fast.train import checkpoint, config, evaluation_report, export, pages

    path = Path(run)
    out = Path(options.json) if options.json else (path if path.is_dir() else path.parent) / "evaluation.json"
    export.target(out, ".json", option="json")
    wanted = _wanted(backbone, dim, width, options.size or 112, channels)
    options = replace(options, device=str(config.device_named(options.device)), size=0 if backbone else options.size)
    network, info = export.load_probe(run, wanted)
    results = evaluate_targets(network, info.size, info.channels, targets, options)
    print("\n\n".join(result.table() for result in results))
    content = as_json(run, results, options) | {"versions": pages.versions(), "date": date.today().isoformat()}
    page = out.with_suffix(".html")
    with checkpoint.replacing(out) as temporary:
        temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    evaluation_report.write(page, content)
    print(f"\n{out}\n{page}")


def embed(
    run: str, root: str, out: str, device: str = "auto", workers: int = 0, on_error: OnError = "stop", backbone: str = "",
    dim: int = 512, width: float = 1.0, size: int = 112, channels: int = 3,
) -> None:  # fmt: skip
    """Write the embeddings of all images below a folder.

    Args:
        run: the run's folder, a checkpoint, an exported .safetensors or a file of plain weights
        root: folder of images; sub-folders are searched too
        out: a .npy (paths beside it as .txt) or .parquet file
        device: where the network runs: 'cpu', 'cuda', 'cuda:N' or 'auto' (a GPU if there is one)
        workers: processes that read images
        on_error: what happens if an image cannot be read: 'stop', or 'skip' it and note it in OUT.unreadable.txt
        backbone: of plain weights: 'mobilefacenet' or 'timm:NAME'
        dim: of plain weights: size of the embedding
        width: of plain weights: factor on MobileFaceNet's channel counts
        size: of plain weights: side of the square input in pixels
        channels: of plain weights: 1 (gray) or 3 (RGB)
    """
    from sst_fast.train import export

    wanted = _wanted(backbone, dim, width, size, channels)
    count, skipped = export.embed_folder(
        run, root, out, device=device, workers=workers, on_error=on_error, wanted=wanted
    )
    if skipped:
        print(f"{len(skipped)} images could not be read and were skipped: {skipped.path}", file=sys.stderr)
    print(f"{count} embeddings in {out}")


def export(
    run: str, out: str, backbone: str = "", dim: int = 512, width: float = 1.0, size: int = 112, channels: int = 3
) -> None:
    """Write the probe network alone, with a record of its preprocessing.

    Args:
        run: the run's folder, a checkpoint, an exported .safetensors or a file of plain weights
        out: a .safetensors (weights), .pt2 (torch.export) or .onnx file
        backbone: of plain weights: 'mobilefacenet' or 'timm:NAME'
        dim: of plain weights: size of the embedding
        width: of plain weights: factor on MobileFaceNet's channel counts
        size: of plain weights: side of the square input in pixels
        channels: of plain weights: 1 (gray) or 3 (RGB)
    """
    from sst_fast.train import export

    export.export(run, out, _wanted(backbone, dim, width, size, channels))
    print(out)


def demo(config: DemoConfig) -> None:
    """Compare Semi-Siamese with conventional training on the ORL faces (400 photos of 40 people)."""
    from sst_fast.train import demo

    demo.run(config)


def info(
    device: str = "", dtype: str = "float32", queue_dtype: str = "", dim: int = 512, window: bool = False,
    positive: bool = False, trains_prototypes: bool = False, normalize: bool = False, smooths: bool = False,
) -> None:  # fmt: skip
    """Print versions, device and, for each operation, which backend would run a problem and why not the others.

    Args:
        device: device of the tensors, 'cpu' or 'cuda'; by default a GPU if there is one
        dtype: dtype of the embeddings
        queue_dtype: dtype of the queue or the prototypes; by default that of the embeddings
        dim: number of features
        window: whether there is a batch window, as in Semi-Siamese Training
        positive: whether targets are given explicitly, not as rows of the prototypes
        trains_prototypes: whether the prototypes get a gradient
        normalize: whether the loss normalises the prototypes
        smooths: whether there is label smoothing
    """
    import torch

    from sst_fast.arguments import QUEUE_DTYPES
    from sst_fast.train.pages import versions

    names = {str(known).removeprefix("torch."): known for known in QUEUE_DTYPES}
    for option, name in (("dtype", dtype), ("queue_dtype", queue_dtype or dtype)):
        if name not in names:
            raise ValueError(f"{option} must be one of {', '.join(names)}, got {name!r}")
    if device and torch.device(device).type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or 'cuda', got {device!r}")
    for name, value in versions().items():
        print(f"{name:<10} {value}")
    problem = {
        "dtype": names[dtype], "queue_dtype": names[queue_dtype or dtype], "dim": dim, "window": window, "positive": positive,
        "trains_prototypes": trains_prototypes, "normalize": normalize, "smooths": smooths,
    }  # fmt: skip
    for choice in sst_fast.backends(device or None, **problem).values():
        print(choice)


def check(device: str = "auto", json: str = "") -> int:
    """Compare every backend of this machine with the reference, and its time with that of bare matrix products.

    Args:
        device: 'cpu', 'cuda', 'cuda:N' or 'auto' (a GPU if there is one)
        json: a file to which the results are also written
    """
    from sst_fast import check
    from sst_fast.train.config import device_named

    rows = check.check(device_named(device), sys.stdout, Path(json) if json else None)
    return int(check.wrong(rows))


def tune(
    n: int, k: int, d: int = 512, dtype: str = "bfloat16", prototypes: bool = False, float8_products: bool = False,
    device: str = "auto",
) -> None:  # fmt: skip
    """Measure every backend that can compute a loss of your size, and store the fastest right one as the choice.

    Args:
        n: probes of a batch; in Semi-Siamese Training both images of each identity count
        k: slots of the queue, or classes
        d: features of an embedding
        dtype: dtype of the queue or the prototypes
        prototypes: whether the prototypes are trained too (learned class weights)
        float8_products: allow products over a float8 queue to be rounded to float8
        device: 'cpu', 'cuda', 'cuda:N' or 'auto' (a GPU if there is one)
    """
    from sst_fast import tune
    from sst_fast.train.config import device_named

    tune.run(tune.timed_from(n, k, d, dtype, prototypes), device_named(device), float8_products)


def data(chosen: Any) -> None:
    """Inspect data sets, make shallow subsets, convert, or draw new ones."""
    from sst_fast.data import commands

    commands.run(chosen)


UNREAD = 141  # the status of what a broken pipe ends: 128 and the number of its signal, which Windows lacks

# What a command returns, if anything, is its exit status.
COMMANDS: dict[str, Callable[..., int | None]] = {
    "train": train, "eval": evaluate, "embed": embed, "export": export, "data": data, "demo": demo, "info": info,
    "check": check, "tune": tune,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; one line on stderr for what the user can mend: status 2 for the command line itself, 1 for the
    rest."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    if argv == ["--version"]:  # needs no extra
        print(f"sst-fast {sst_fast.__version__}")
        return 0
    try:
        import jsonargparse
    except ImportError:
        print("sst-fast: the command line needs the extra: pip install 'sst-fast[train]'", file=sys.stderr)
        return 1
    from sst_fast.evaluation.targets import Options
    from sst_fast.train.loop import Stopped

    who = f"sst-fast {argv[0]}" if argv and argv[0] in COMMANDS else "sst-fast"

    def fail(message: object, status: int) -> int:
        print(f"{who}: {' '.join(str(message).split())}", file=sys.stderr)
        return status

    try:
        parser, configs = _parser("toml" if any(a.endswith(".toml") for a in argv) else "yaml")
        try:
            settings = parser.parse_args(_with_margin_spelled_out(argv))
            chosen = parser.instantiate(settings)[settings.command]
            values = {"chosen": chosen} if settings.command == "data" else vars(chosen)
            values = {option: value for option, value in values.items() if option != "config"}
            if settings.command == "eval":
                values["options"] = Options(**{field.name: values.pop(field.name) for field in fields(Options)})
            if settings.command in configs:
                values = {"config": configs[settings.command](**values)}
        except (jsonargparse.ArgumentError, ValueError, TypeError) as error:
            told = re.sub(r'Parser key "([^"]+)":', r"\1:", str(error))  # the parser's words for an option and a type
            told = re.sub(r"<class '([\w.]+)'>", r"\1", told).removesuffix(".")
            return fail(f"{told} ('{who} --help' explains the options)", 2)
        status = COMMANDS[settings.command](**values) or 0
        sys.stdout.flush()
        return status
    except Stopped as stopped:
        return fail(stopped, 128 + stopped.signal)
    except KeyboardInterrupt:
        return fail("interrupted", 128 + signal.SIGINT)
    except (ValueError, OSError, ImportError) as error:
        return UNREAD if output_unread(error) else fail(error, 1)


def output_unread(error: Exception) -> bool:
    """Whether ``error`` came since what read standard output has gone, as ``head`` does; from then on it leads nowhere."""
    if not isinstance(error, BrokenPipeError) or not hasattr(select, "poll"):  # Windows has none
        return False
    output = sys.stdout.fileno()
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _parser(mode: str) -> tuple[Any, dict[str, type]]:
    """The parser of all commands, and the dataclass of those that have one."""
    import jsonargparse
    import yaml
    from torch import Tensor

    from sst_fast.data import commands as data_commands
    from sst_fast.evaluation.targets import Options
    from sst_fast.margins import Margin
    from sst_fast.train.config import Config
    from sst_fast.train.demo import DemoConfig

    jsonargparse.set_parsing_settings(subclasses_enabled=[Margin], subclasses_disabled=[Tensor])

    def load(text: str) -> Any:
        try:
            content = jsonargparse.get_loader(mode)(text)
        except Exception:  # single values are as in YAML, whatever the file is
            content = jsonargparse.get_loader("yaml")(text)
        if isinstance(content, dict) and "margin" in content:
            content = content | {"margin": _spelled_out(content["margin"])}
        return content

    own = f"sst-fast-{mode}"  # so that a program around us keeps its own
    jsonargparse.set_loader(own, load, exceptions=(ValueError, yaml.YAMLError))
    parser = jsonargparse.ArgumentParser(
        prog="sst-fast", description="Semi-Siamese Training.", parser_mode=own, exit_on_error=False,
        allow_abbrev=False, version=sst_fast.__version__,
    )  # fmt: skip
    commands = parser.add_subcommands(required=True, dest="command")
    configs: dict[str, type] = {"train": Config, "demo": DemoConfig}

    def parser_of(summary: str) -> Any:
        return jsonargparse.ArgumentParser(
            parser_mode=own, exit_on_error=False, allow_abbrev=False, description=summary
        )

    for name, function in COMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        sub = parser_of(summary)
        if name in configs:
            sub.add_argument("--config", action="config", help="a YAML or TOML file with these settings")
            sub.add_class_arguments(configs[name])
        elif name == "eval":
            sub.add_function_arguments(function, as_positional=True, skip={"targets", "options"})
            sub.add_argument(
                "targets",
                nargs="+",
                help="data sets of identities, 'orl', .bin files, lists of pairs, BLUFR's .mat, IJB's folder",
            )
            sub.add_class_arguments(Options)
        elif name != "data":
            sub.add_function_arguments(function, as_positional=name != "tune")
        commands.add_subcommand(name, sub, help=summary)
        if name == "data":  # a parser's own sub-commands come after it has become one
            data_commands.add(sub, parser_of)
    return parser, configs


def _with_margin_spelled_out(argv: Sequence[str]) -> list[str]:
    """``--margin arc`` or ``--margin ArcSoftmax`` replaced by what :func:`_spelled_out` makes of it."""
    out: list[str] = []
    for argument in argv:
        option, equals, value = argument.partition("=")
        if out and out[-1] == "--margin":
            argument = json.dumps(_spelled_out(argument))
        elif option == "--margin" and equals:
            argument = f"{option}={json.dumps(_spelled_out(value))}"
        out.append(argument)
    return out


def _spelled_out(margin: Any) -> dict[str, Any]:
    """A margin by its short name, its class or as a mapping with 'class_path', with every field of it.

    The parser would carry fields of the same name over from the margin chosen before: ArcFace's radians from AM-softmax's
    cosine.
    """
    from sst_fast.margins import MARGINS

    if isinstance(margin, str) and margin.startswith("{"):
        margin = json.loads(margin)
    given = margin if isinstance(margin, dict) else {"class_path": margin}
    name = str(given.get("class_path")).rpartition(".")[2]
    kind = next((kind for short, kind in MARGINS.items() if name in (short, kind.__name__)), None)
    if kind is None:
        known = ", ".join(f"{kind.__name__} ({short})" for short, kind in MARGINS.items())
        raise ValueError(f"margin must be one of {known}, got {name!r}")
    return {"class_path": f"sst_fast.{kind.__name__}", "init_args": asdict(kind()) | given.get("init_args", {})}


def _wanted(backbone: str, dim: int, width: float, size: int, channels: int) -> ProbeInfo | None:
    """How the user says that a network is built, if so."""
    from sst_fast.train.export import ProbeInfo

    return ProbeInfo(backbone, dim, width, size, channels) if backbone else None


if __name__ == "__main__":
    sys.exit(main())
