"""sedd-completion: a script for bash and zsh that completes flags, keys and names.

It holds the flags that each command's --help lists, so none is written twice.
"""

import contextlib
import io
import re
from collections.abc import Callable, Mapping

USAGE = """usage: python -m sedd_jax completion

Writes a script that completes the commands' flags, the keys and the names of configs.
bash: eval "$(python -m sedd_jax completion)"
zsh:  autoload -U bashcompinit && bashcompinit, then the same
For every terminal, write it to a file once and source that in ~/.bashrc or ~/.zshrc;
after an upgrade of the package write it anew."""

# In bash "=" ends a word of its own. Where nothing matches, the shell completes files.
SCRIPT = """_sedd_jax() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} words=
  local command=${{COMP_WORDS[0]##*/}}
  if [[ $current == "=" ]]; then
    current=
  elif [[ $before == "=" ]]; then
    before=${{COMP_WORDS[COMP_CWORD-2]}}
  fi
  if [[ $before == --config && $current != -* ]]; then
    words="{configs}"
  elif [[ $command == sedd-eval && $COMP_CWORD == 1 ]]; then
    words="{evaluations}"
  elif [[ $current == -* ]]; then
    [[ $command == sedd-eval ]] && command="$command ${{COMP_WORDS[1]}}"
    case $command in
{cases}
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _sedd_jax {commands}"""


def script(helps: Mapping[str, str], configs: list[str]) -> str:
    """The script: `helps` has what --help prints of "sedd-train", "sedd-eval likelihood", ..."""
    flags = {
        name: sorted({*re.findall(r"--[\w.]*\w", text)} - {"--config.KEY"})
        for name, text in helps.items()
    }
    names = [name.split(" ") for name in helps]
    return SCRIPT.format(
        configs=" ".join(configs),
        evaluations=" ".join(name[1] for name in names if len(name) > 1),
        cases="\n".join(f'      "{name}") words="{" ".join(flags[name])}" ;;' for name in flags),
        commands=" ".join(dict.fromkeys(name[0] for name in names)),
    )


def run(commands: Mapping[str, Callable[[list[str]], int]], name: str, argv: list[str]) -> None:
    """Prints the script for `commands`, by name; each takes its arguments."""
    from sedd_jax.cli.evaluate import EVALUATIONS
    from sedd_jax.cli.train import shipped_configs

    if {"-h", "--help"} & set(argv):
        print(USAGE)
        return
    if argv:
        raise ValueError(f"unknown argument {argv[0]!r}; {name} takes none")
    calls = [[one] for one in commands if one not in ("eval", "completion")]
    helps = {}
    for call in [*calls, *(["eval", one] for one in EVALUATIONS)]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            commands[call[0]]([*call[1:], "--help"])
        helps["sedd-" + " ".join(call)] = printed.getvalue()
    print(script(helps, sorted(shipped_configs())))
