"""The `glalm` command, which runs a command by its name: `glalm train ...`. `python -m glalm` is the same."""

import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

# Each command's file in glalm/commands and function there, and what it does.
COMMANDS = {
    "prepare": ("prepare_data:prepare_or_inspect", "split text, tokenize it, and write token shards"),
    "deduplicate": ("deduplicate:list_duplicates", "list duplicate documents, which prepare then leaves out"),
    "tokenizer": ("prepare_data:train_tokenizer", "train a SentencePiece tokenizer"),
    "train": ("train_and_eval:train", "train a model; the same command again resumes"),
    "slurm": ("slurm:print_template", "print the Slurm template for several nodes"),
    "eval": ("train_and_eval:evaluate", "evaluate a checkpoint, an exported folder, or a model of the hub"),
    "report": ("results:report_runs", "print what runs reached, and write a page of it"),
    "plot": ("results:plot_results", "draw one figure of several models' results"),
    "export": ("checkpoints:export_checkpoint", "write a checkpoint as a folder that transformers loads"),
    "merge": ("checkpoints:average_checkpoints", "write the average of several checkpoints as such a folder"),
    "linearize": ("checkpoints:linearize_llama", "convert a Llama with softmax attention to GLA or ReGLA"),
    "ladder": ("studies:compare_models", "train and evaluate many models at one size and budget"),
    "scaling": ("studies:fit_scaling_law", "fit the loss against model size, and predict that of other runs"),
    "mqar": ("studies:measure_recall", "measure associative recall"),
}
TAKES_URLS = ("prepare", "deduplicate", "tokenizer")  # These commands refuse themselves what may not be a URL.


def main(name: str | None = None) -> NoReturn:
    """Run a command with the arguments of this process, and exit with its code.

    Args:
        name: The command; None if the first argument names it.
    """
    raises_interrupt = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if raises_interrupt:
        # Ctrl-C ends the process without a word while it imports: an exception in there would be shown, or be lost.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from glalm.progress import protect_output, run_command

    protect_output()
    if name is None:
        name = find_command(sys.argv.pop(1) if len(sys.argv) > 1 else "--help")
    # Help and usage lines take the program's name from here.
    sys.argv[0] = f"glalm {name}"
    command = load_command(name)
    if raises_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if name not in TAKES_URLS:
        refuse_urls(sys.argv[1:])
    run_command(command)


def load_command(name: str) -> Callable[[], int | None]:
    """Import the file of a command, and no other command's, and return its function, which reads sys.argv."""
    file, function = COMMANDS[name][0].split(":")
    return getattr(import_module(f"glalm.commands.{file}"), function)


def refuse_urls(args: list[str]) -> None:
    """Exit with a message if an argument, or the value of KEY=VALUE or --OPTION=VALUE, is a URL."""
    import re

    from glalm.config.strict import ConfigError, refuse_url

    for arg in args:
        key, separator, value = arg.partition("=") if re.match(r"[\w.+-]+=", arg) else ("", "", arg)
        if key.startswith("hydra."):
            continue  # Hydra's sweepers keep their results at a URL.
        try:
            refuse_url(f"{key}{separator}", value.strip("'\""))
        except ConfigError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)


def find_command(name: str) -> str:
    """Return `name` if it is a command. Otherwise print the help or the nearest command, and exit."""
    if name in ("-h", "--help"):
        print("glalm COMMAND [ARGUMENT ...]; `glalm COMMAND --help` describes a command\n")
        for command, (_, summary) in COMMANDS.items():
            print(f"  {command:<12}{summary}")
        sys.exit(0)
    if name not in COMMANDS:
        import difflib  # Only this error needs it.

        matches = difflib.get_close_matches(name, COMMANDS, n=1)
        suggestion = f"did you mean {matches[0]}? " if matches else ""
        print(f"glalm has no command {name}; {suggestion}commands: {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    return name


if __name__ == "__main__":
    main()
