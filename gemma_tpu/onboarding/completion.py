"""Completion for bash and zsh, made from the command line's own parser: commands, options, names, config keys."""

import argparse
import shlex
from collections.abc import Mapping

from gemma_tpu.config import KEYS
from gemma_tpu.onboarding import catalogue

SHELLS = ("bash", "zsh")
CONFIGURED = ("train", "validate", "plan", "data")  # their first word is a config, the others key=value


def script(commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """What a shell evaluates: eval "$(gemma-tpu completion bash)"."""
    options = {name: _options(one) for name, one in commands.items()}
    nested = {name: _subcommands(one) for name, one in commands.items()}
    lines = [
        "# gemma-tpu: completion for bash, and for zsh by its bashcompinit",
        *(["autoload -Uz bashcompinit && bashcompinit"] if shell == "zsh" else []),
        "_gemma_tpu() {",
        '  local word="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" words=""',
        '  if [ "$COMP_CWORD" -eq 1 ]; then',
        f"    words={_quoted([*commands, '--help', '--version'])}",
        "  else",
        '    case "$command" in',
    ]
    for name in commands:
        lines.append(f"      {name}) words={_quoted([*options[name], *nested[name], *_names(name)])} ;;")
    inner = [option for name in nested if nested[name] for option in _nested_options(commands[name])]
    lines += [
        "    esac",
        '    if [ "$command" = eval ] && [ "$COMP_CWORD" -gt 2 ]; then',
        f"      words={_quoted(list(dict.fromkeys(inner)))}",
        "    fi",
        "  fi",
        '  COMPREPLY=($(compgen -W "$words" -- "$word"))',
        "  # a key wants its value behind it; anything else may be a file",
        '  case "${COMPREPLY[*]}" in *=) compopt -o nospace 2>/dev/null ;; esac',
        '  if [ "$COMP_CWORD" -gt 1 ] && [ "${word#-}" = "$word" ]; then',
        '    COMPREPLY+=($(compgen -f -- "$word"))',
        "  fi",
        "}",
        "complete -o filenames -F _gemma_tpu gemma-tpu",
    ]
    return "\n".join(lines)


def _quoted(words: list[str]) -> str:
    return shlex.quote(" ".join(words))


def _options(one: argparse.ArgumentParser) -> list[str]:
    return [name for action in one._actions for name in action.option_strings if name.startswith("--")]


def _subcommands(one: argparse.ArgumentParser) -> list[str]:
    inner = (action.choices for action in one._actions if isinstance(action, argparse._SubParsersAction))
    return [name for choices in inner for name in choices]


def _nested_options(one: argparse.ArgumentParser) -> list[str]:
    inner = (action.choices.values() for action in one._actions if isinstance(action, argparse._SubParsersAction))
    return [option for parsers in inner for parser in parsers for option in _options(parser)]


def _names(command: str) -> list[str]:
    if command == "cp":
        return [path.name for folder in catalogue.FOLDERS for path in catalogue.shipped(folder)]
    if command == "completion":
        return list(SHELLS)
    if command in CONFIGURED:
        configs = [f"configs/{path.name}" for path in catalogue.shipped("configs")]
        return configs + [f"{key}=" for key in KEYS]
    return []
