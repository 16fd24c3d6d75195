"""The command line of the scripts: TRL's parser, with help in groups and the nearest name for an unknown option."""

import argparse
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn

from trl import TrlParser

from justrl_trl.errors import ConfigError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each option, and no default where that is None."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=36, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = next((option for option in action.option_strings if option.startswith("--")), action.dest)
        if action.nargs in (0, "?"):
            return name
        return f"{name} {{{','.join(map(str, action.choices))}}}" if action.choices else f"{name} VALUE"

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help or "" if action.default in (None, argparse.SUPPRESS) else super()._get_help_string(action)


class OptionParser(TrlParser):
    """Arguments from dataclasses, a YAML file given as `--config FILE`, and the command line, which wins.

    Args:
        dataclass_types: one or several classes of arguments.
        groups: title of a help section -> names of its options, in the order of `--help`. Options in no group are shown by
            `--help_all` only.
        kwargs: as in `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types, groups: Mapping[str, Sequence[str]], **kwargs):
        super().__init__(dataclass_types, formatter_class=_Formatter, allow_abbrev=False, **kwargs)
        self._groups = groups
        self.add_argument("--help_all", action=_HelpAll, help="Show every option, with those that TRL and transformers have.")

    def parse_args_and_config(self, args: Iterable[str], **kwargs) -> tuple:
        """See `TrlParser.parse_args_and_config`.

        Raises:
            ConfigError: unknown options or keys, with the nearest known name; or a rule of one of the dataclasses is broken.
        """
        try:
            return super().parse_args_and_config(args=args, **kwargs)
        except ConfigError:
            raise
        except ValueError as error:  # TrlParser's and the dataclasses' own
            message = str(error).replace("Some specified arguments are not used by the HfArgumentParser", "unknown options")
            raise ConfigError(f"{message}{self._suggestions(message)}") from error

    def error(self, message: str) -> NoReturn:
        """argparse's error, without its usage of a thousand lines."""
        raise ConfigError(f"{message[0].upper()}{message[1:]}.{self._suggestions(message)} --help lists the options.")

    def _suggestions(self, message: str) -> str:
        known = [option for action in self._actions for option in action.option_strings if option.startswith("--")]
        found = []
        for word in re.findall(r"--\w+", message):
            if word not in known and (near := difflib.get_close_matches(word, known, n=1)):
                found.append(f" {word}: did you mean {near[0]}?")
        return "".join(found)

    def format_help(self, everything: bool = False) -> str:
        """Help in groups; with `everything`, the options of TRL and transformers follow."""
        by_name = {action.dest: action for action in self._actions if action.option_strings}
        formatter = self._get_formatter()
        formatter.add_text(f"usage: {self.prog} [--config FILE] [--OPTION VALUE ...]")
        formatter.add_text(self.description)
        shown = {"help", "help_all"}
        for title, names in self._groups.items():
            formatter.start_section(title)
            formatter.add_arguments([by_name[name] for name in names])
            formatter.end_section()
            shown |= set(names)
        rest = [action for name, action in by_name.items() if name not in shown]
        if everything:
            formatter.start_section("options of TRL and transformers")
            formatter.add_arguments(rest)
            formatter.end_section()
        elif rest:
            formatter.add_text(f"--help_all shows {len(rest)} more options, which TRL and transformers have.")
        return formatter.format_help()


class _HelpAll(argparse.Action):
    def __init__(self, option_strings, dest, **kwargs):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=kwargs.get("help"))

    def __call__(self, parser, namespace, values, option_string=None):
        print(parser.format_help(everything=True))
        parser.exit()
