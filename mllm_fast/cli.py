"""The `mllm-fast` command: one subcommand a function, listed in `COMMANDS`.

Errors are one line on stderr and exit status 2; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from . import __version__
from .information import collect_info, print_info

if TYPE_CHECKING:
    from .kernels.audit import Row
    from .pipeline import Pipeline

DEMO_MODULES = ("matplotlib", "skimage", "sklearn")


class CommandError(Exception):
    """A request that cannot be carried out, in one sentence for the person who typed it."""


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _info(args: argparse.Namespace) -> int:
    info = collect_info()
    if args.json:
        print(json.dumps(asdict(info), indent=2))  # noqa: T201
        return 0
    print_info(info)
    return 0


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo_output"), help="folder to write to (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="smaller models and fewer steps, to see that it runs")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="of the systems (openflamingo, llava, "
                        "...), or digits, the fine-tuning run")  # fmt: skip


def _demo(args: argparse.Namespace) -> int:
    if lacks := [name for name in DEMO_MODULES if importlib.util.find_spec(name) is None]:
        raise CommandError(f"the demo needs {', '.join(lacks)}: pip install 'mllm-fast[demo]'")
    from .demo import run

    return run(args.out, quick=args.quick, only=args.only)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a folder with a model, or its name on the Hugging Face hub")
    parser.add_argument("--llm", choices=("nf4", "fp4", "int8"), help="quantise the language model while it is loaded")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of what is not quantised "
                        "(default: bfloat16 where the device has it)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: the first GPU, or the CPU)")


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="image files; systems that read one image "
                        "a prompt answer once for each")  # fmt: skip
    parser.add_argument("--prompt", help="the question, or what the caption begins with")
    parser.add_argument("--max-new-tokens", type=_positive, default=32, metavar="N", help="(%(default)s)")
    parser.add_argument("--num-beams", type=_positive, default=1, metavar="N", help="(%(default)s)")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True, help="put the drop-ins in")
    parser.add_argument(
        "--cuda-graphs", action="store_true", help="replay the encoder side as CUDA graphs (needs a GPU)"
    )


def _generate(args: argparse.Namespace) -> int:
    for path in args.images:
        if not path.exists():
            raise CommandError(f"{path} does not exist")
    from .models.captioner import CONFIG_FILE, generate_captions

    if (Path(args.model) / CONFIG_FILE).is_file():
        given = {
            "--num-beams": args.num_beams > 1, "--no-fuse": not args.fuse, "--dtype": args.dtype, "--device": args.device,
            "--cuda-graphs": args.cuda_graphs,
        }  # fmt: skip
        if refused := [name for name, value in given.items() if value]:
            raise CommandError(
                f"{args.model} is a model that the demo made, which runs as it is, greedily, on the CPU; leave out "
                f"{', '.join(refused)}"
            )
        length = {"max_new_tokens": args.max_new_tokens}
        captions = generate_captions(args.model, args.images, prompt=args.prompt, llm=args.llm, **length)
        for image, caption in zip(args.images, captions, strict=True):
            print(f"{image}: {caption}")  # noqa: T201
        return 0
    from .pipeline import read_image

    images = [read_image(path) for path in args.images]
    pipeline = _pipeline(args, fuse=args.fuse, cuda_graphs=args.cuda_graphs)
    length = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams, "do_sample": False}
    answers = pipeline.generate(images, args.prompt, **length)
    if len(answers) == len(images):
        for image, answer in zip(args.images, answers, strict=True):
            print(f"{image}: {answer}")  # noqa: T201
    else:
        print(*answers, sep="\n")  # noqa: T201
    return 0


def _pipeline(args: argparse.Namespace, *, fuse: bool, cuda_graphs: bool = False) -> Pipeline:
    import torch
    from transformers.utils import logging

    from .hub import asking
    from .pipeline import load_pipeline

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    options = {"fuse": fuse, "cuda_graphs": cuda_graphs}
    with asking(args.model):
        return load_pipeline(args.model, llm=args.llm, dtype=dtype, device=args.device, **options)


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("images", type=Path, nargs="*", metavar="IMAGE", help="image files (default: a drawn one)")
    parser.add_argument("--prompt", default="a picture of", help="the question, or what the caption begins with "
                        "(%(default)s)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=_positive, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the report as JSON, to attach to a bug")


def _verify(args: argparse.Namespace) -> int:
    """Status 0: fusing changed nothing but rounding; 1: it did."""
    from .pipeline import drawn_image, read_image
    from .verification import verify

    images = [read_image(path) for path in args.images] or [drawn_image()]
    pipeline = _pipeline(args, fuse=False)
    report = verify(pipeline.model, pipeline.inputs(images, args.prompt), new_tokens=args.max_new_tokens)
    print(report, end="")  # noqa: T201
    if args.out is not None:
        print(f"written to {report.save(args.out)}")  # noqa: T201
    return int(not report.passed)


def _finetune_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.yaml", help="stage, model, data, output, settings"
    )
    what.add_argument(
        "--list", action="store_true", help="the stages: what they train, and where their settings are from"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    parser.add_argument("--dry-run", action="store_true", help="print what would be trained and what it costs, no more")


def _finetune(args: argparse.Namespace) -> int:
    from .finetune import command

    if args.list:
        return command.list_stages()
    return command.finetune(args.config, resume=args.resume, dry_run=args.dry_run)


def _audit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", metavar="ARCH", help="sm_80, sm_86, sm_89, sm_90, gfx942, or native: the "
                        "GPU at hand, on which the kernels are loaded too (default: sm_80 sm_90 gfx942)")  # fmt: skip
    parser.add_argument("--op", nargs="+", default=(), metavar="NAME", help="only the kernels of these ops")
    parser.add_argument("--processes", type=_positive, default=2, metavar="N", help="that compile (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _audit(args: argparse.Namespace) -> int:
    """Status 0: all passed; 1: some variant failed."""
    from rich.console import Console
    from rich.progress import Progress

    from .kernels import audit, launch

    native = args.arch == ["native"]
    try:
        architectures = (launch.device_architecture(),) if native else args.arch or audit.DEFAULT_ARCHITECTURES
        todo = audit.jobs(audit.find_variants(), architectures, args.op, load=native)
    except (audit.UnknownOpError, RuntimeError) as error:
        raise CommandError(str(error)) from error
    if not todo:
        raise CommandError("no op has Triton kernels that could be compiled")
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        running = audit.run(todo, args.processes)
        rows = list(progress.track(running, total=len(todo), description="compiling"))
    rows.sort(key=lambda row: (row.architecture, row.op, row.kernel, row.label))
    failed = sum(bool(row.failures) for row in rows)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=2))  # noqa: T201
    else:
        _print_audit(rows)
        verdict = f"{failed} of {len(rows)} variants failed" if failed else f"all {len(rows)} variants passed"
        print(f"{verdict} on {', '.join(architectures)}")  # noqa: T201
    return int(failed > 0)


def _print_audit(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=240)  # a file has no width, and the table must not be cut
    table = Table(title="Audit", title_justify="left")
    for name in ("arch", "kernel", "variant"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spilled", "shared KiB", "occupancy", "tensor cores", "instr / element"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for row in rows:
        numbers = [""] * 6
        if row.registers is not None and row.tensor_core is not None:
            scalar = f"{row.scalar_dots} scalar dots" if row.scalar_dots else ""
            per_element = row.instructions_per_element
            numbers = [
                str(row.registers),
                str(row.spilled_bytes),
                f"{(row.shared_bytes or 0) / 1024:.1f}",
                f"{row.occupancy:.0%}",
                " ".join(filter(None, (*(f"{count} {kind}" for kind, count in row.tensor_core.items()), scalar))),
                "" if per_element is None else f"{per_element:.3g}",
            ]
        verdict = f"[red]{escape('; '.join(row.failures))}[/]" if row.failures else "passed"
        table.add_row(row.architecture, row.kernel, escape(row.label), *numbers, verdict)
    console.print(table)


def _bench(args: argparse.Namespace) -> int:
    checkout = Path(__file__).parents[1]
    if (checkout / "bench" / "registry.py").is_file() and str(checkout) not in sys.path:
        # The installed command has the folder of commands on its path in place of the checkout.
        sys.path.insert(0, str(checkout))
    if importlib.util.find_spec("bench") is None or importlib.util.find_spec("bench.registry") is None:
        raise CommandError(
            "the benchmarks come with the sources and are not installed; run this in a checkout: python -m bench"
        )
    from bench.__main__ import main as bench

    return bench(args.rest, prog="mllm-fast bench")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Command:
    """A subcommand: its name, one line of help, what declares its arguments, and what runs it (returns the status).

    With `passes_on`, arguments that it does not declare, --help among them, are for another parser: `args.rest`.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    passes_on: bool = False


COMMANDS = (
    Command("info", "devices, versions, and which implementation runs each op here", _info_arguments, _info),
    Command("demo", "every supported system on real photographs, then a real fine-tuning run", _demo_arguments, _demo),
    Command("audit", "compile every kernel for other GPUs, and look for what makes one slow", _audit_arguments, _audit),
    Command("bench", "measure every block against its peers, side by side", lambda parser: None, _bench, True),
    Command("generate", "answer a prompt about images with any supported model", _generate_arguments, _generate),
    Command("finetune", "train a bridge or LoRA through a frozen language model", _finetune_arguments, _finetune),
    Command("verify", "run a model before and after fusing, and compare the errors", _verify_arguments, _verify),
)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command, with one subparser for each of `COMMANDS`."""
    parser = _Parser(prog="mllm-fast", description="Fused kernels and drop-in modules for multimodal language models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = subparsers.add_parser(
            command.name, help=command.help, description=command.help, add_help=not command.passes_on
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run, passes_on=command.passes_on)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (the process's own by default) and return its exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not args.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split()) or "failed without a message"
        # The type says nothing new where the message was written for this command.
        kind = "" if isinstance(error, CommandError) else f"{type(error).__name__}: "
        print(f"mllm-fast: error: {kind}{message}", file=sys.stderr)  # noqa: T201
        return 2


if __name__ == "__main__":
    sys.exit(main())
