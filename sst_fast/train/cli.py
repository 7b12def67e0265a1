"""The command ``sst-fast``: train, eval, embed, export, demo, info. Settings come from a YAML or TOML file plus overrides."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; one line on stderr and status 1 for what the user can mend."""
    try:
        from jsonargparse import ArgumentParser
    except ImportError:
        print("sst-fast: the command line needs the extra: pip install 'sst-fast[train]'", file=sys.stderr)
        return 1
    from sst_fast.data import commands as data_commands
    from sst_fast.train import export as probes
    from sst_fast.train.config import Config
    from sst_fast.train.demo import DemoConfig
    from sst_fast.train.loop import Stopped

    argv = list(sys.argv[1:] if arguments is None else arguments)
    # A TOML file is read as TOML; YAML (and JSON) otherwise.
    mode = "toml" if any(a.endswith(".toml") for a in argv) else "yaml"
    parser = ArgumentParser(prog="sst-fast", parser_mode=mode, description=__doc__)
    commands = parser.add_subcommands(required=True, dest="command")

    def command(name: str, config: type | None, help: str) -> ArgumentParser:
        sub = ArgumentParser(parser_mode=mode, description=help)
        if config is not None:
            sub.add_argument("--config", action="config", help="a YAML or TOML file with these settings")
            sub.add_class_arguments(config)
        commands.add_subcommand(name, sub, help=help)
        return sub

    command("train", Config, "train on a folder of one sub-folder per identity")
    evaluate = command("eval", None, "evaluate a trained run on a folder of one sub-folder per identity")
    evaluate.add_argument("run", type=str, help="the run's folder, a checkpoint or an exported .safetensors")
    evaluate.add_argument("root", type=str, help="folder of identities, a list file, or 'orl'")
    embed = command("embed", None, "write the embeddings of all images below a folder")
    embed.add_argument("run", type=str, help="the run's folder, a checkpoint or an exported .safetensors")
    embed.add_argument("root", type=str, help="folder of images, searched to the bottom")
    embed.add_argument("out", type=str, help="a .npy (paths beside it as .txt) or .parquet file")
    embed.add_argument("--device", type=str, default="cpu", help="where the network runs")
    embed.add_argument("--workers", type=int, default=0, help="processes that read images")
    export = command("export", None, "write the probe network alone, its preprocessing recorded")
    export.add_argument("run", type=str, help="the run's folder, a checkpoint or an exported .safetensors")
    export.add_argument("out", type=str, help="a .safetensors (weights), .pt2 (torch.export) or .onnx file")
    data_commands.add(command("data", None, "what is in a data set; its shallow subsets; other formats"))
    command("demo", DemoConfig, "compare Semi-Siamese with conventional training on the embedded faces")
    command("info", None, "versions, device, backends")

    settings = parser.parse_args(argv)
    try:
        chosen = settings[settings.command]
        if settings.command == "info":
            info()
        elif settings.command == "data":
            data_commands.run(chosen)
        elif settings.command == "eval":
            evaluate_run(chosen.run, chosen.root)
        elif settings.command == "embed":
            count = probes.embed_folder(
                chosen.run, chosen.root, chosen.out, device=chosen.device, workers=chosen.workers
            )
            print(f"{count} embeddings in {chosen.out}")
        elif settings.command == "export":
            probes.export(chosen.run, chosen.out)
            print(f"{chosen.out}")
        else:
            chosen.pop("config", None)
            kind = Config if settings.command == "train" else DemoConfig
            run(commands.choices[settings.command].instantiate(chosen), kind)
    except Stopped as stopped:
        print(f"sst-fast {settings.command}: {stopped}", file=sys.stderr)
        return 128 + signal.SIGTERM
    except (ValueError, OSError, ImportError) as error:
        print(f"sst-fast {settings.command}: {error}", file=sys.stderr)
        return 1
    return 0


def run(values: object, kind: type) -> None:
    """Trains, or runs the demo."""
    from sst_fast.train import config, demo, loop

    fields = {name: value for name, value in vars(values).items() if not name.startswith("_")}
    if kind is demo.DemoConfig:
        demo.run(demo.DemoConfig(**fields))
        return
    settings = config.Config(**fields)
    done = loop.train(settings, *loop.split(settings))
    if done.history and done.rank == 0:
        print(", ".join(f"{name} {value:.4g}" for name, value in done.history[-1].items()))
    if done.scores:
        _print_scores(done.scores)


def evaluate_run(run: str, root: str) -> None:
    """Verification and identification of a folder's identities by a run's probe network."""
    from sst_fast import data
    from sst_fast.train import export, loop

    network, info = export.load_probe(run)
    _print_scores(loop.verify(network, data.faces(root), info.size, info.channels))


def info() -> None:
    """Prints versions, device and, for each operation, the implementations there are and the one that is chosen."""
    import sst_fast
    from sst_fast.train.report import versions

    for name, value in versions().items():
        print(f"{name:<10} {value}")
    for choice in sst_fast.backends().values():
        print(choice)


def _print_scores(scores: object) -> None:
    from sst_fast.evaluation import Scores
    from sst_fast.train.report import figures_of

    assert isinstance(scores, Scores)
    print(", ".join(f"{name} {value:.2f}" for name, value in figures_of(scores).items()))


if __name__ == "__main__":
    sys.exit(main())
