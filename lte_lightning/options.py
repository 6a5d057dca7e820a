"""Commands that are one typed function: its signature is their options, its docstring their help."""

import inspect
import re
import sys
from argparse import ONE_OR_MORE, OPTIONAL, ZERO_OR_MORE, Action
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli

from lte_lightning.errors import meant


class ShortErrors(ArgumentParser):
    """A parser whose errors name the cause and the nearest name, without the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the cause, and exits with code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        program = parser.prog.replace(" [options]", "")
        print(f"error: {self.explain(message, parser._option_string_actions)}", file=sys.stderr)
        print(f"see {program} --help", file=sys.stderr)
        sys.exit(2)

    def explain(self, message: str, options: Iterable[str]) -> str:
        """Returns the cause of an error, from jsonargparse's message and the parser's options."""
        return cause(message, options)


class FunctionParser(ShortErrors):
    """The parser of a command that is one function.

    Attributes:
        positional: The parameters that words without an option are for, and how the help calls such a word.
        required_names: The parameters without a default.
    """

    positional: Mapping[str, str] = {}
    required_names: Sequence[str] = ()

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Returns the help, with positional arguments as such, and options spelled with dashes, as errors name them."""
        shown = copy(self)
        shown._action_groups = [copy(group) for group in self._action_groups]
        for group in shown._action_groups:
            group._group_actions = [self._shown(action) for action in group._group_actions]
        actions = [action for group in shown._action_groups for action in group._group_actions]
        words = [next(action for action in actions if action.dest == name) for name in self.positional]
        for group in shown._action_groups:  # the first one is that of positional arguments
            rest = [action for action in group._group_actions if action not in words]
            group._group_actions = words if group is shown._action_groups[0] else rest
        required = [action for action in actions if action.required and action not in words]
        several: dict[Any, str] = {
            ONE_OR_MORE: "{0} [{0} ...]",
            ZERO_OR_MORE: "[{0} ...]",
            OPTIONAL: "[{0}]",
            None: "{0}",
        }
        usage = [several[action.nargs].format(action.metavar) for action in words]
        usage += [f"{action.option_strings[0]} {action.metavar or action.dest.upper()}" for action in required]
        shown.usage = " ".join(["%(prog)s", *usage, "[options]"])
        return super(FunctionParser, shown).format_help(*args, **kwargs)

    def explain(self, message: str, options: Iterable[str]) -> str:
        """Returns the cause of an error, with the nearest option as the help spells it."""
        return cause(message, [option.replace("_", "-") for option in options])

    def _shown(self, action: Action) -> Action:
        """Returns an option as the help shows it."""
        shown, is_list = copy(action), getattr(action, "_typehint", None) == list[str]
        shown.required = action.dest in self.required_names
        if action.dest in self.positional:
            shown.option_strings, shown.metavar = [], self.positional[action.dest]
            shown.nargs = (ONE_OR_MORE if shown.required else ZERO_OR_MORE) if is_list else None
            if not shown.required and not is_list:
                shown.nargs = OPTIONAL
        else:
            shown.option_strings = [name.replace("_", "-") for name in action.option_strings if not name.endswith("+")]
            if is_list:
                shown.metavar = f"{action.dest.upper()} [...]"
        return shown


def cause(message: str, options: Iterable[str] = ()) -> str:
    """Cuts jsonargparse's account of an error down to its cause, and names the option that was probably meant.

    Args:
        message: Of jsonargparse.
        options: The parser's options, ``--trainer.devices`` and the like.
    """
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        option = match[1].split("=")[0]
        return f"unknown option {option}{meant(option, options, '; did you mean {}?')}"
    lines = [line.strip() for line in message.splitlines()]
    # What a union of types says of its last member, None, explains nothing; nor does its list of types
    noise = ("Expected a <class 'NoneType'>", "Does not validate against any", "Subtypes:", "Errors:", "Given value")
    causes = [line.removeprefix("- ") for line in lines if line and not line.removeprefix("- ").startswith(noise)]
    shown = [line for line in lines if line.startswith("Given value:")]
    return "\n  ".join(causes + shown[:1])


def call(
    function: Callable[..., Any],
    program: str,
    args: Sequence[str],
    positional: str | Sequence[str] | Mapping[str, str] = (),
) -> Any:
    """Calls a function with the options of a command line, and returns its result.

    Args:
        function: Its parameters are the options. It should import what is slow only when it runs, so that a help text
            does not wait for that.
        program: Name of the command in its help, such as ``lte bench``.
        args: The command line without the command. ``--batch-size`` is ``--batch_size``, an option of type ``bool``
            may stand alone, and one of type ``list`` takes all the words after it, or a single one as long as the
            positional word is to come.
        positional: The parameter that words without an option are for, or several, one word each in their order. The
            last may be of type ``list``, and takes the rest. The help names them as arguments, in capitals or as a
            mapping says; the option's name may be given, too.
    """
    names = [positional] if isinstance(positional, str) else positional
    shown = names if isinstance(names, Mapping) else {name: name.upper() for name in names}
    parameters = inspect.signature(function).parameters.values()
    required = [each.name for each in parameters if each.default is each.empty]
    parser_class = type("Parser", (FunctionParser,), {"positional": shown, "required_names": required})
    words = list(_plain(function, args, list(shown)))
    return auto_cli(function, words, as_positional=False, prog=program, parser_class=parser_class, allow_abbrev=False)


def _plain(function: Callable[..., Any], args: Sequence[str], positional: Sequence[str]) -> Iterator[str]:
    """Yields the command line as jsonargparse takes it: every option with one value."""
    types = {f"--{name}": parameter.annotation for name, parameter in inspect.signature(function).parameters.items()}
    rest, several = list(args), {name for name in positional if types[f"--{name}"] == list[str]}
    named = {word.partition("=")[0] for word in rest}
    # a stray word does not replace what an option names
    places = [name for name in positional if name in several or f"--{name}" not in named]
    while rest:
        word = rest.pop(0)
        if places and not word.startswith("--") and word != "-h":
            yield f"--{places[0]}{'+' * (places[0] in several)}={word}"
            if places[0] not in several:
                places.pop(0)  # a word for which there is no place is one too many, and refused as such
            continue
        option, equals, value = word.partition("=")
        if option.startswith("--"):
            option = option.replace("-", "_").replace("__", "--", 1)
        values = [] if equals else [*_until_option(rest)]
        wanted = types.get(option)
        if wanted is bool and not equals and not (values and values[0] in ("true", "false")):
            yield f"{option}=true"
        elif wanted == list[str] and not equals and values:
            values = values[:1] if places and places[0] not in several else values  # the next is the positional word
            yield from (f"{option}+={value}" for value in values)
            del rest[: len(values)]
        elif positional and values and not equals:  # or its value would be taken for such a word
            yield f"{option}={rest.pop(0)}"
        else:
            yield f"{option}{equals}{value}"


def _until_option(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("--"):
            return
        yield word
