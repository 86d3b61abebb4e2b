"""`rlhf3d completion`: what a shell needs to complete a command line.

Invariant: the scripts know no command, option or key: they ask the program, which answers with a
line for each candidate, its help behind a tab. Where it has none, the shell offers files.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer

PROGRAM = "rlhf3d"
_ASKED = "_RLHF3D_COMPLETE"
"""Typer answers a shell, and does nothing else, where this variable is set."""
# The words up to the cursor; of Typer's forms of an answer this one has both value and help.
_ASK = f"{_ASKED}=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS"

_BASH = f"""\
# bash takes = as the end of a word, the program does not: it gets the line, and what stands before
# the = is not given to bash again.
_rlhf3d() {{
    local line=${{COMP_LINE:0:COMP_POINT}} candidate
    local word=${{line##*[[:space:]]}}
    COMPREPLY=()
    while IFS=$'\\t' read -r candidate _; do
        [[ -n $candidate ]] || continue
        [[ $candidate != *[=.] ]] || compopt -o nospace
        [[ $word != *=* || $COMP_WORDBREAKS != *=* ]] || candidate=${{candidate#*=}}
        COMPREPLY+=("$candidate")
    done < <({_ASK}="$line" "$1" 2>/dev/null)
}}
complete -o default -F _rlhf3d {PROGRAM}
"""

_ZSH = f"""\
#compdef {PROGRAM}
_rlhf3d() {{
    local line candidate
    local -a closed open
    for line in "${{(@f)$({_ASK}="${{words[1,CURRENT]}}" $words[1] 2>/dev/null)}}"; do
        candidate=${{line%%$'\\t'*}}
        [[ -n $candidate ]] || continue
        [[ $words[CURRENT] != *=* ]] || candidate=${{candidate#*=}}
        line=${{candidate//:/\\\\:}}:${{line#*$'\\t'}}
        if [[ $candidate == *[=.] ]]; then open+=("$line"); else closed+=("$line"); fi
    done
    [[ $words[CURRENT] != *=* ]] || compset -P '*='
    if (( $#open + $#closed )); then
        (( ! $#closed )) || _describe {PROGRAM} closed
        (( ! $#open )) || _describe {PROGRAM} open -S ''
    else
        _files
    fi
}}
if [[ $funcstack[1] == _rlhf3d ]]; then _rlhf3d; else compdef _rlhf3d {PROGRAM}; fi
"""

_FISH = f"""\
function __rlhf3d_complete
    set -l line (commandline -cp | string collect)
    set -l word (commandline -ct)
    set -l found (env {_ASK}="$line" {PROGRAM} 2>/dev/null)
    if string length -q -- $found
        printf '%s\\n' $found
    else
        set -l begun (string match -r '^[^=]*=' -- $word)
        for path in (__fish_complete_path (string replace -r '^[^=]*=' '' -- $word))
            printf '%s\\n' "$begun$path"
        end
    end
end
complete --command {PROGRAM} --no-files --arguments '(__rlhf3d_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(help="Your shell.")],
) -> None:
    """Print the script with which a shell completes commands, options, keys and their choices.

    For every session: docs/start.md.

    Example: rlhf3d completion bash > completion.bash
    """
    typer.echo(_SCRIPTS[shell], nl=False)


def be_ready_to_complete() -> None:
    """Have Typer answer, if a shell asks."""
    if _ASKED in os.environ:
        from typer.completion import completion_init

        # Typer has rich write the help, which would break a line at the edge of the screen.
        os.environ["COLUMNS"] = "1000"
        completion_init()
