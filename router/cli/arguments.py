"""The arguments of every command."""

from __future__ import annotations

import argparse
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

EPILOG = """exit status: 0 done; 1 the call or the work failed; 2 wrong usage or settings; 130 interrupted"""


class _Parser(argparse.ArgumentParser):
    """Refuses text that no message can hold."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", None, _text)


def build_parser() -> argparse.ArgumentParser:
    """The parser; `command` in its result names the command."""
    parser = argparse.ArgumentParser(
        prog="mtp-router", description="Routes text generation to the backend that fits the model.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('mtp-router')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    settings, server, lines = _settings(), _server(), _json()

    serve = commands.add_parser("serve", help="run the server until SIGTERM or Ctrl-C", parents=[settings, lines])
    serve.add_argument("--listen", metavar="HOST:PORT", help="where to listen, instead of the settings' server.listen")
    serve.add_argument(
        "--supervise",
        action="store_true",
        help="start the server again where it ends abnormally, from a second process",
    )
    serve.add_argument("--lifeline", type=int, help=argparse.SUPPRESS)  # a pipe whose end ends the server

    generate = commands.add_parser("generate", help="answer one prompt", parents=[settings, server, lines])
    generate.add_argument("--model", required=True, help="name or alias")
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt, one user message; - reads standard input")
    prompt.add_argument("--file", metavar="PATH", help="read the prompt from a file; - reads standard input")
    generate.add_argument("--raw", action="store_true", help="give the text to the model without its chat template")
    generate.add_argument("--progress", action="store_true", help="with --json: also events before the first token")
    _generation(generate)

    chat = commands.add_parser("chat", help="talk with a model", parents=[settings, server])
    chat.add_argument("--model", required=True, help="name or alias")
    _generation(chat)

    models = commands.add_parser("models", help="list the server's models", parents=[settings, server, lines])
    models.add_argument("name", nargs="?", help="only this model")
    models.add_argument("--evidence", action="store_true", help="say how each capability is known")

    commands.add_parser("refresh", help="have the server look for models again", parents=[settings, server, lines])

    explain = commands.add_parser(
        "explain", help="say what would answer for a model, and why", parents=[settings, server, lines]
    )
    explain.add_argument("name", help="name or alias")

    top = commands.add_parser("top", help="show what the server is doing", parents=[settings, server])
    top.add_argument("--metrics", metavar="HOST:PORT", help="its metrics page; default: the settings' metrics_listen")
    top.add_argument("--interval", type=_seconds, default=1.0, metavar="SECONDS", help="time between looks (1)")
    top.add_argument("--once", action="store_true", help="look once")

    inspect = commands.add_parser("inspect", help="say what a model's files show of themselves", parents=[lines])
    inspect.add_argument("path", type=Path, help="GGUF file or checkpoint folder")
    inspect.add_argument("--head", type=Path, metavar="PATH", help="where else a checkpoint's head may lie")

    commands.add_parser(
        "doctor", help="look at this machine, and say what is wrong and what to do", parents=[settings, server, lines]
    )

    verify = commands.add_parser(
        "verify", help="run a checkpoint here and say whether it keeps the promises", parents=[lines]
    )
    verify.add_argument("path", type=Path, help="checkpoint folder")
    verify.add_argument("--head", type=Path, metavar="PATH", help="where else its head may lie")
    verify.add_argument("--tokens", type=_tokens, default=128, metavar="COUNT", help="new tokens a reply (128)")
    verify.add_argument("--openblas", action="store_true", help="on a Linux CPU, with OpenBLAS in MLX's place")

    tune = commands.add_parser(
        "tune", help="on a Mac, measure a checkpoint through the Metal kernels; use them if they win", parents=[lines]
    )
    tune.add_argument("path", type=Path, help="checkpoint folder")
    tune.add_argument("--head", type=Path, metavar="PATH", help="where else its head may lie")

    pull = commands.add_parser("pull", help="fetch a small model", parents=[lines])
    pull.add_argument("name", help="what to fetch, such as smollm2")

    commands.add_parser("config", help="print the settings in force", parents=[settings, lines])
    return parser


def _settings() -> _Parser:
    part = _Parser(add_help=False)
    part.add_argument("--config", type=Path, metavar="PATH", help="settings file")
    return part


def _server() -> _Parser:
    part = _Parser(add_help=False)
    part.add_argument("--target", metavar="HOST:PORT", help="the server; default: the settings' server.listen")
    part.add_argument("--deadline", type=_seconds, metavar="SECONDS", help="longest time a call may take (600)")
    return part


def _json() -> _Parser:
    part = _Parser(add_help=False)
    part.add_argument("--json", action="store_true", help="print JSON, one object a line")
    return part


def _generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message")
    sampling = parser.add_argument_group("sampling")
    for name in ("temperature", "top-p", "min-p", "repetition-penalty", "presence-penalty", "frequency-penalty"):
        sampling.add_argument(f"--{name}", type=float, metavar="NUMBER")
    sampling.add_argument("--top-k", type=_count, metavar="COUNT")
    sampling.add_argument("--seed", type=_count, metavar="NUMBER")

    stop = parser.add_argument_group("stopping")
    stop.add_argument("--max-tokens", type=_count, dest="max_output_tokens", metavar="COUNT")
    stop.add_argument("--min-tokens", type=_count, dest="min_output_tokens", metavar="COUNT")
    stop.add_argument("--stop", action="append", metavar="TEXT", help="text that ends the answer; may be repeated")
    stop.add_argument("--time-budget", type=_seconds, metavar="SECONDS", help="end with the text so far after this")

    shape = parser.add_argument_group("shape of the answer").add_mutually_exclusive_group()
    shape.add_argument("--schema", type=Path, metavar="FILE", help="JSON that this JSON Schema accepts")
    shape.add_argument("--json-object", action="store_const", const=True, help="any JSON object")
    shape.add_argument("--regex", metavar="EXPRESSION", help="text that matches this whole")

    how = parser.add_argument_group("how it is made")
    how.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="think first; default: as the model does"
    )
    how.add_argument("--thinking-budget", type=_count, dest="reasoning_budget_tokens", metavar="TOKENS")
    how.add_argument("--speculation", choices=("auto", "off", "required"), help="whether drafts may be used")
    how.add_argument("--draft-depth", type=_count, metavar="TOKENS", help="draft this many tokens a round")
    alternatives = "log-probabilities, and this many alternatives a token"
    how.add_argument("--logprobs", type=_count, dest="top_logprobs", metavar="COUNT", help=alternatives)
    how.add_argument("--priority", choices=("interactive", "batch"))
    how.add_argument("--correlation-id", metavar="ID", help="an id of your own for the server's logs")
    how.add_argument("--label", action="append", metavar="KEY=VALUE", help="a fact for the logs; may be repeated")


def _tokens(text: str) -> int:
    return _whole(text, 8, 4096)


def _count(text: str) -> int:
    """What the contract's whole numbers hold."""
    return _whole(text, 0, 2**32 - 1)


def _whole(text: str, least: int, most: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not least <= value <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} to {most}")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def _text(text: str) -> str:
    """Bytes of the command line that are not UTF-8 arrive as lone surrogates, which no message can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not UTF-8 text") from None
    return text
