"""The command `mellow`: ask a model, check this machine, convert and publish model folders, run a local cluster.

mellow ask clip.wav "which sounds are in the clip?"
mellow doctor
mellow convert v0.ckpt models/mellow-v0
mellow export models/mellow-v0 v0.ckpt
mellow card models/mellow-v0 --report evaluation/report.json
mellow push models/mellow-v0 owner/mellow
mellow cluster up --local
mellow cluster status --local
mellow cluster down --local

Each command imports its packages when it runs: torch takes seconds to import, and `--help` should be quick.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = 130  # exit status after Ctrl-C, by convention of shells
WINDOWS = ("first", "each", "pair")  # copy of `mellow_platform.inference.windows.RULES`, whose module imports numpy


def ask(arguments: argparse.Namespace) -> None:
    from mellow_platform.inference import ask

    options = ("max_new_tokens", "temperature", "seed", "window")
    question = ask.read_question(
        arguments.words, choices=tuple(arguments.choice), **{name: getattr(arguments, name) for name in options}
    )
    ask.print_answers(ask.ask(question, arguments.model), sys.stdout)


def examine(arguments: argparse.Namespace) -> None:
    from mellow_platform import doctor

    sections = doctor.run()
    print(doctor.as_json(sections) if arguments.json else doctor.as_text(sections), flush=True)
    if doctor.problems(sections):
        raise SystemExit(1)


def convert(arguments: argparse.Namespace) -> str:
    from mellow_platform.model import conversion

    conversion.convert(arguments.checkpoint, arguments.output, arguments.decoder, arguments.license)
    return arguments.output


def export(arguments: argparse.Namespace) -> str:
    from mellow_platform.model import conversion

    conversion.export(arguments.folder, arguments.checkpoint)
    return arguments.checkpoint


def card(arguments: argparse.Namespace) -> str:
    from mellow_platform import storage
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
    from mellow_platform import cluster

    running = cluster.up(
        arguments.definition or cluster.DEFINITION,
        arguments.folder or cluster.FOLDER,
        arguments.dashboard_port,
        arguments.object_store_memory,
    )
    # Variables that the shell has already are not printed: RAY_AUTH_TOKEN is secret.
    missing = {name: value for name, value in running.environment.items() if os.environ.get(name) != value}
    exports = " ".join(f"{name}={value}" for name, value in missing.items())
    return f"""{running.status()}

to submit jobs and deploy:
  export {exports}
  ray job submit --working-dir . --runtime-env infra/runtime_env.yaml -- python jobs/train.py --help
  serve deploy serve/config.yaml
to stop: mellow cluster down --local"""


def cluster_status(arguments: argparse.Namespace) -> str:
    from mellow_platform import cluster

    return cluster.Cluster.load(arguments.folder or cluster.FOLDER).status()


def cluster_down(arguments: argparse.Namespace) -> str:
    from mellow_platform import cluster

    running = cluster.Cluster.load(arguments.folder or cluster.FOLDER)
    running.down()
    return f"{len(running.nodes)} nodes ended; their logs are in {running.folder}"


def parser() -> argparse.ArgumentParser:
    """Return the parser; each command sets `run`, a function that returns text to print, or None."""
    top = argparse.ArgumentParser(
        prog="mellow",
        description="Ask Mellow about sounds, check this machine, convert and publish models, run a local cluster.",
        epilog="If something does not work, start with `mellow doctor`. Every path may be an s3:// URI.",
    )
    commands = top.add_subparsers(required=True, metavar="COMMAND", title="commands")
    add_ask_command(commands.add_parser("ask", help="answer a question about one or two audio clips"))
    doctor = "check this machine, the installation and the services, and print a remedy for each problem"
    command = commands.add_parser(
        "doctor",
        help=doctor,
        description=f"{doctor[0].upper()}{doctor[1:]}. Exits with status 1 if there is a problem.",
    )
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=examine)

    licence = "license of the weights, for the model card (default: %(default)s)"
    command = commands.add_parser(
        "convert", help="convert a reference checkpoint (v0.ckpt, v0_s.ckpt) to a model folder"
    )
    command.add_argument("checkpoint", help="checkpoint of the reference implementation")
    command.add_argument("output", help="model folder to write")
    command.add_argument(
        "--decoder",
        default="HuggingFaceTB/SmolLM2-135M",
        help="hub name, folder or GGUF file with the decoder's tokenizer (default: %(default)s)",
    )
    command.add_argument("--license", default="unknown", help=licence)
    command.set_defaults(run=convert)

    command = commands.add_parser("export", help="convert a model folder to a reference checkpoint")
    command.add_argument("folder", help="model folder to read")
    command.add_argument("checkpoint", help="checkpoint to write")
    command.set_defaults(run=export)

    command = commands.add_parser("card", help="write the model card (README.md) of a model folder")
    command.add_argument("folder", help="model folder")
    command.add_argument("--report", help="report.json of jobs/evaluate.py, for the card's table of scores")
    command.add_argument("--training-data", help="description of the training data, in Markdown")
    command.add_argument("--license", default="apache-2.0", help=licence)
    command.set_defaults(run=card)

    command = commands.add_parser("push", help="upload a model folder to the Hugging Face hub")
    command.add_argument("folder", help="model folder")
    command.add_argument("repository", help="hub repository, as owner/name; created if it does not exist")
    command.add_argument("--private", action="store_true", help="create the repository as a private one")
    command.set_defaults(run=upload)

    command = commands.add_parser("cluster", help="run the node groups of infra/ as Ray nodes on this machine")
    add_cluster_commands(command)
    return top


def add_ask_command(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `ask`."""
    command.description = (
        "Answer a question about one or two audio clips. The answer is written to stdout token by token; several "
        "answers are written one per line, each after the seconds of its part of the clips."
    )
    command.epilog = (
        "environment: OPENAI_API_KEY is the API key of the endpoint (not needed on this machine); OPENAI_MODEL is the "
        "name of the model at the endpoint (default: the first model that the endpoint lists)"
    )
    command.usage = '%(prog)s CLIP [CLIP] "QUESTION" [options]'
    command.add_argument(
        "words", nargs="+", metavar="CLIP [CLIP] QUESTION", help="paths or s3:// URIs of the clips, then the question"
    )
    command.add_argument(
        "--model",
        metavar="FOLDER_OR_URL",
        help="model folder, or URL of an OpenAI-compatible endpoint (default: runs/demo/model if it exists, else "
        "http://127.0.0.1:8000/v1)",
    )
    command.add_argument(
        "--choice",
        action="append",
        default=[],
        metavar="TEXT",
        help="answer to score; repeat the option for each answer. Prints one answer per line with its probability, the "
        "likeliest first",
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="longest answer, in tokens (default: %(default)s)"
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="sampling temperature; 0 always takes the most likely token (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, metavar="N", help="seed of sampling (default: a new one each time)")
    command.add_argument(
        "--window",
        choices=WINDOWS,
        default="first",
        help="part of a clip longer than 10 s: first (the first 10 s), each (every 10 s, with one answer each), or "
        "pair (the first and the last 10 s as two clips) (default: %(default)s)",
    )
    command.set_defaults(run=ask)


def add_cluster_commands(command: argparse.ArgumentParser) -> None:
    """Add `up`, `status` and `down` to the command `cluster`."""
    commands = command.add_subparsers(required=True, metavar="COMMAND", title="commands")
    up = commands.add_parser("up", help="start the nodes and wait until all have joined")
    up.add_argument(
        "--definition", type=Path, help="folder to render with `kubectl kustomize` (default: infra/overlays/local)"
    )
    up.add_argument("--dashboard-port", type=int, default=8265, help="port of Ray's dashboard (default: %(default)s)")
    up.add_argument(
        "--object-store-memory",
        type=int,
        default=512 << 20,
        help="size of each node's object store, in bytes (default: %(default)s)",
    )
    up.set_defaults(run=cluster_up)
    status = commands.add_parser("status", help="print the node groups with their live nodes and resources")
    status.set_defaults(run=cluster_status)
    down = commands.add_parser("down", help="end every process of the cluster")
    down.set_defaults(run=cluster_down)
    for each in (up, status, down):
        each.add_argument(
            "--local",
            action="store_true",
            required=True,
            help="required; confirms that the cluster runs on this machine (on Kubernetes: kubectl apply -k "
            "infra/overlays/gpu)",
        )
        each.add_argument("--folder", type=Path, help="folder of the cluster's state and logs (default: runs/cluster)")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line `arguments` (default: `sys.argv`).

    A known error ends the program with status 1 and a message, Ctrl-C with status 130.
    """
    top = parser()
    command, rest = top.parse_known_args(arguments)
    if rest:
        # argparse returns the question as unrecognized if an option precedes it: CLIP --seed 1 QUESTION.
        if command.run is not ask or any(word.startswith("-") for word in rest):
            top.error(f"unrecognized arguments: {' '.join(rest)}")
        command.words += rest
    try:
        result = command.run(command)
        if result:
            print(result, flush=True)
    except BrokenPipeError:
        # The reader of stdout (`| head`) is closed: without this, Python reports the error again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        top.exit(1)
    except (ValueError, OSError) as error:
        top.exit(1, f"mellow: {error}\n")
    except KeyboardInterrupt:
        top.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
