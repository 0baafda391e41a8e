"""The commands of `glalm`. COMMANDS in glalm/__main__.py has the function of each."""

import argparse
import inspect
from collections.abc import Callable


def create_parser(command: Callable, **options) -> argparse.ArgumentParser:
    """Return a parser with the `options` of argparse, whose help is the docstring of the command, line by line."""
    return argparse.ArgumentParser(
        description=inspect.getdoc(command), formatter_class=argparse.RawDescriptionHelpFormatter, **options
    )
