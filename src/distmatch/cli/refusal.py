"""Errors of the option parser in the form of all messages: what, got, expected, fix."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from distmatch.base.errors import UserError, near_names, unknown_name
from distmatch.methods.table import RENAMED

_BOX = " \t│╭╮╰╯|"
_KINDS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
}


_ELSEWHERE = {
    **dict.fromkeys(("--output", "--output-dir", "--outdir", "--save"), "--out"),
    **dict.fromkeys(("--num", "--num-samples", "--n-samples", "--samples", "--num-images"), "--n"),
    **dict.fromkeys(
        ("--epochs", "--iterations", "--iters", "--max-steps", "--num-inference-steps"), "--steps"
    ),
    "--nfe": "--num-steps",
    **dict.fromkeys(("--batch-size", "--bs"), "--batch"),
    **dict.fromkeys(("--learning-rate", "--rate"), "--lr"),
    **dict.fromkeys(("--guidance-scale", "--cfg", "--cfg-scale"), "--guidance"),
    **dict.fromkeys(("--dataset", "--train-data", "--data-dir"), "--data"),
    **dict.fromkeys(("--model", "--arch", "--network"), "--net"),
    "--sampler": "--solver",
    "--class": "--classes",
    "--teacher-model": "--teacher",
    "--checkpoint": "--resume",
}
"""Options as other programs call them, and what they are called here."""
_IN_METHODS = {
    "--method": "name all methods with --methods",
    "--divergence": "write it after its method: f-distill:js",
    "--preset": "write it after its method: NAME[preset={}]",
}
"""Options of `distill`, and how `compare` is told."""


def refusal(
    stop: BaseException,
    printed: str,
    verb: str,
    flags: Iterable[str],
    elsewhere: Callable[[str, str], UserError | None],
) -> UserError:
    """The error behind a parser that gave up.

    Args:
        stop: The exit that the parser raised. A distmatch error that was raised while options were built
            stands in its context, and is taken as it is.
        printed: What the parser wrote to stderr: boxes of lines, divided by rules.
        verb: The verb whose help is pointed to.
        flags: The options that the verb has.
        elsewhere: The error for an option of a name and a value, if it is one of other methods.
    """
    cause: BaseException | None = stop
    while cause is not None:
        if isinstance(cause, UserError):
            return cause
        cause = cause.__context__
    title, message, *_ = [*_sections(printed), "", ""]
    see = f"`distmatch {verb} --help-all` shows all options"
    if match := re.fullmatch(r"Error parsing (\S+): (.*)", message):
        flag, reason = match.groups()
        expected = next((text for start, text in _KINDS.items() if reason.startswith(start)), None)
        got = reason.split(":", 1)[-1].strip() if expected else reason
        if match := re.search(r"Could not find valid parse for arguments: \[(.*?)\]", reason):
            got = match[1]
            expected = f"{'whole ' * ('tuple[int' in reason)}numbers, separated by spaces"
        return UserError(f"{flag} cannot have this value", got=got, expected=expected, fix=see)
    if match := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", message):
        value, flag, choices = match.groups()
        return unknown_name(f"value of {flag}", value, re.findall(r"'([^']*)'", choices))
    if match := re.fullmatch(r"Unrecognized options: (.*)", message):
        flag, _, value = match[1].replace("=", " ").replace(",", " ").partition(" ")
        if verb == "compare" and flag in _IN_METHODS:
            return UserError(
                f"{flag} is not an option of compare", fix=_IN_METHODS[flag].format(value.strip())
            )
        if known := elsewhere(flag.removeprefix("--").replace("-", "_"), value.strip()):
            return known
        near = _meant(match[1].split(",")[0].strip(), list(flags))
        fix = f"did you mean {' or '.join(near)}? {see}" if near else see
        return UserError("unknown option", got=match[1], fix=fix)
    return UserError(f"{title.lower() or 'wrong options'}: {message}" if message else title, fix=see)


def _meant(option: str, flags: list[str]) -> list[str]:
    """Similar options, at most three."""
    name = option.partition("=")[0].lower().replace("_", "-")
    if _ELSEWHERE.get(name) in flags:
        return [_ELSEWHERE[name]]
    renamed = {_flag(old): _flag(new) for old, new in RENAMED.items() if _flag(new) in flags}
    return near_names(name, flags, renamed, 0.7)


def _flag(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def _sections(printed: str) -> list[str]:
    """The texts between the rules of a box, each on one line; the advice at the end is omitted."""
    sections: list[list[str]] = [[]]
    for line in printed.splitlines():
        text = line.strip(_BOX)
        if text and not text.strip("─-"):
            sections.append([])
        elif "─" in text:  # the title stands in the upper edge of the box
            sections[-1].append(text.strip("─ "))
            sections.append([])
        elif text:
            sections[-1].append(text)
    texts = [" ".join(lines) for lines in sections if lines]
    return [text for text in texts if not text.startswith("For full helptext")]
