"""The command line: ``trady COMMAND``. Each command is a file in ``trady/cli/commands``."""

from __future__ import annotations

import sys
import traceback
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from trady.cli.commands.compare import compare
from trady.cli.commands.demo import demo
from trady.cli.commands.finetune import EXAMPLES as FINETUNE_EXAMPLES
from trady.cli.commands.finetune import finetune
from trady.cli.commands.fit import EXAMPLES as FIT_EXAMPLES
from trady.cli.commands.fit import fit
from trady.cli.commands.measure import measure
from trady.cli.commands.models import models
from trady.cli.commands.plan import plan
from trady.cli.commands.predict import EXAMPLES as PREDICT_EXAMPLES
from trady.cli.commands.predict import predict
from trady.cli.commands.rank import rank
from trady.cli.commands.report import EXAMPLES as REPORT_EXAMPLES
from trady.cli.commands.report import report
from trady.cli.commands.search import search
from trady.cli.commands.study import study
from trady.cli.messages import MESSAGES, Messages
from trady.cli.options import COMMAND_LINE
from trady.cli.wording import as_typed
from trady.errors import ResourceError
from trady.records.translated import in_our_words

DEBUG = "--debug"

#: Exit codes (docs/cli.md): what was asked for cannot be done; disk or memory ran out; Ctrl-C.
REFUSED, EXHAUSTED, INTERRUPTED = 2, 3, 130


class Commands(TyperGroup):
    """Turns errors about a person's files, data, disk and memory into one message and an exit code."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take ``--debug`` anywhere on the line."""
        ctx.meta[DEBUG] = DEBUG in args
        ctx.meta[COMMAND_LINE] = ("trady", *args)
        ctx.meta[MESSAGES] = Messages()
        rest: list[str] = super().parse_args(ctx, [arg for arg in args if arg != DEBUG])
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        messages: Messages = ctx.meta[MESSAGES]
        messages.wording = lambda text: as_typed(text, self._options_of(ctx))
        try:
            with messages.instead_of_warnings(everything=ctx.meta[DEBUG]):
                return super().invoke(ctx)
        except Exception as error:
            told = in_our_words(error)
            if told is None:
                raise
            if ctx.meta[DEBUG]:
                traceback.print_exc()
            text = f"error: {messages.wording(str(told))}".encode("utf-8", "backslashreplace").decode()
            messages.record(text)
            Console(stderr=True, soft_wrap=True).print(text, style="red", highlight=False, markup=False)
            raise typer.Exit(EXHAUSTED if isinstance(told, ResourceError) else REFUSED) from error
        except KeyboardInterrupt as interrupt:
            if ctx.meta[DEBUG]:
                traceback.print_exc()
            message = str(interrupt) or "stopped"
            print(message, file=sys.stderr)  # noqa: T201
            messages.record(message)
            raise typer.Exit(INTERRUPTED) from None
        finally:
            messages.close()

    def _options_of(self, ctx: Any) -> set[str]:
        """Names of the options of the command that was typed."""
        command = self.get_command(ctx, ctx.invoked_subcommand or "")
        return {str(each.name) for each in command.params if each.param_type_name == "option"} if command else set()


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Fine-tune any PyTorch model inside a memory budget.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from trady import __version__

        typer.echo(f"trady {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option(DEBUG, help="Show where an error came from.")] = False,
) -> None:
    pass


app.command(epilog="Example: trady demo --short")(demo)

app.command(epilog="Example: trady plan efficientnet-lite0 --image-size 64 --budget 'update:1 MiB'")(plan)

app.command(epilog=FIT_EXAMPLES)(fit)

app.command(epilog=FINETUNE_EXAMPLES)(finetune)

app.command(epilog=PREDICT_EXAMPLES)(predict)
app.command(epilog=REPORT_EXAMPLES)(report)

app.command(epilog="Example: trady rank efficientnet-lite0 fashion-mnist --image-size 64 --out ranking.json")(rank)

app.command(
    epilog="Example: trady study efficientnet-lite0 fashion-mnist photos/ --image-size 64 --limit 1000 --seeds 3 "
    "--epochs 3 --out runs/study"
)(study)

app.command(
    epilog="Example: trady search efficientnet-lite0 fashion-mnist --image-size 64 --limit 1000 --last 12 "
    "--budget elements:27946 --out scheme.json"
)(search)

app.command(epilog="Example: trady models transformers")(models)

app.command(epilog="Example: trady measure efficientnet-lite0 --image-size 64 --batch-size 32")(measure)

app.command(epilog="Example: trady compare matrix.toml --workers 2 --max-minutes 80")(compare)
