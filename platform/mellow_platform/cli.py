"""The command `mellow`: model folders (conversion, cards, the way to a model hub), and the cluster of this machine.

mellow convert v0.ckpt models/mellow-v0
mellow export models/mellow-v0 v0.ckpt
mellow card models/mellow-v0 --report evaluation/report.json
mellow push models/mellow-v0 owner/mellow
mellow cluster up --local
mellow cluster status --local
mellow cluster down --local

A command imports what it needs when it runs: torch takes seconds, and a cluster is started without it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mellow_platform import cluster, storage


def convert(arguments: argparse.Namespace) -> str:
    from mellow_platform.model import conversion

    conversion.convert(arguments.checkpoint, arguments.output, arguments.decoder, arguments.license)
    return arguments.output


def export(arguments: argparse.Namespace) -> str:
    from mellow_platform.model import conversion

    conversion.export(arguments.folder, arguments.checkpoint)
    return arguments.checkpoint


def card(arguments: argparse.Namespace) -> str:
    from mellow_platform.model.card import CARD, model_card
    from mellow_platform.model.folder import load_model

    text = model_card(
        *load_model(arguments.folder),
        license=arguments.license,
        training_data=arguments.training_data,
        report=storage.read_json(arguments.report) if arguments.report else None,
    )
    uri = storage.join(arguments.folder, CARD)
    storage.write_bytes(uri, str(text).encode())
    return uri


def upload(arguments: argparse.Namespace) -> str:
    from mellow_platform.model.card import push

    return push(arguments.folder, arguments.repository, arguments.private)


def cluster_up(arguments: argparse.Namespace) -> str:
    started = cluster.up(
        arguments.definition, arguments.folder, arguments.dashboard_port, arguments.object_store_memory
    )
    exports = " ".join(f"{name}={value}" for name, value in started.environment.items())
    return f"""{started.status()}

to submit jobs and deploy:
  export {exports}
  ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- python jobs/train.py --help
  serve deploy serve/config.yaml
to stop: mellow cluster down --local"""


def cluster_status(arguments: argparse.Namespace) -> str:
    return cluster.Cluster.load(arguments.folder).status()


def cluster_down(arguments: argparse.Namespace) -> str:
    running = cluster.Cluster.load(arguments.folder)
    running.down()
    return f"{len(running.nodes)} nodes ended; their logs are in {running.folder}"


def parser() -> argparse.ArgumentParser:
    """Return the command line; every command's `run` does it and returns what it made."""
    top = argparse.ArgumentParser(prog="mellow", description="Model folders of Mellow. Every path may be an s3:// URI.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    licence = "of the weights, for the model card (default: %(default)s)"

    command = commands.add_parser("convert", help="reference checkpoint (v0.ckpt, v0_s.ckpt) to model folder")
    command.add_argument("checkpoint", help="file that the reference implementation saved")
    command.add_argument("output", help="folder to write")
    command.add_argument(
        "--decoder",
        default="HuggingFaceTB/SmolLM2-135M",
        help="hub name, folder or GGUF file with the tokenizer (default: %(default)s)",
    )
    command.add_argument("--license", default="unknown", help=licence)
    command.set_defaults(run=convert)

    command = commands.add_parser("export", help="model folder to reference checkpoint")
    command.add_argument("folder", help="folder of the model")
    command.add_argument("checkpoint", help="file to write")
    command.set_defaults(run=export)

    command = commands.add_parser("card", help="write the model card of a folder anew, with what is known of it")
    command.add_argument("folder", help="folder of the model")
    command.add_argument("--report", help="report.json that jobs/evaluate.py wrote")
    command.add_argument("--training-data", help="what the model was trained on, in Markdown")
    command.add_argument("--license", default="apache-2.0", help=licence)
    command.set_defaults(run=card)

    command = commands.add_parser("push", help="upload a model folder to the Hugging Face hub")
    command.add_argument("folder", help="folder of the model")
    command.add_argument("repository", help="owner/name, created where it does not exist")
    command.add_argument("--private", action="store_true", help="create it as a private one")
    command.set_defaults(run=upload)

    command = commands.add_parser("cluster", help="the node groups of infra/ as Ray nodes of this machine")
    add_cluster_commands(command)
    return top


def add_cluster_commands(command: argparse.ArgumentParser) -> None:
    """Add `up`, `status` and `down` to the command `cluster`."""
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    up = commands.add_parser("up", help="start the nodes and wait until all have joined")
    up.add_argument(
        "--definition",
        type=Path,
        default=cluster.DEFINITION,
        help="folder that `kubectl kustomize` renders (default: %(default)s)",
    )
    up.add_argument("--dashboard-port", type=int, default=8265, help="of Ray's dashboard (default: %(default)s)")
    up.add_argument(
        "--object-store-memory", type=int, default=512 << 20, help="bytes of each node (default: %(default)s)"
    )
    up.set_defaults(run=cluster_up)
    status = commands.add_parser("status", help="show the groups, their nodes that are alive, and what these have")
    status.set_defaults(run=cluster_status)
    down = commands.add_parser("down", help="end every process of the cluster")
    down.set_defaults(run=cluster_down)
    for each in (up, status, down):
        each.add_argument(
            "--local",
            action="store_true",
            required=True,
            help="on this machine, said aloud: on Kubernetes it is `kubectl apply -k infra/overlays/gpu`",
        )
        each.add_argument(
            "--folder", type=Path, default=cluster.FOLDER, help="for the state and the logs (default: %(default)s)"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments` (default: the program's own); a known fault ends it with status 1."""
    top = parser()
    chosen = top.parse_args(arguments)
    try:
        print(chosen.run(chosen))
    except (ValueError, OSError) as error:
        top.exit(1, f"mellow: {error}\n")


if __name__ == "__main__":
    main()
