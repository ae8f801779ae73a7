"""The command `mellow`: reference checkpoints to model folders and back, model cards, and the way to a model hub.

mellow convert v0.ckpt models/mellow-v0
mellow export models/mellow-v0 v0.ckpt
mellow card models/mellow-v0 --report evaluation/report.json
mellow push models/mellow-v0 owner/mellow
"""

import argparse
from collections.abc import Sequence

from mellow_platform import storage
from mellow_platform.model import conversion
from mellow_platform.model.card import CARD, model_card, push
from mellow_platform.model.folder import load_model


def convert(arguments: argparse.Namespace) -> str:
    conversion.convert(arguments.checkpoint, arguments.output, arguments.decoder, arguments.license)
    return arguments.output


def export(arguments: argparse.Namespace) -> str:
    conversion.export(arguments.folder, arguments.checkpoint)
    return arguments.checkpoint


def card(arguments: argparse.Namespace) -> str:
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
    return push(arguments.folder, arguments.repository, arguments.private)


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
    return top


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
