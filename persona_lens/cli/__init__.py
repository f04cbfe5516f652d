"""The command line: one module per verb, each parses, calls the library and prints."""

from persona_lens.cli.entry import app, main

__all__ = ["app", "main"]
