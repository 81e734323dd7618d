"""The command line: ``rmtc schedule``, ``rmtc explain``, ``rmtc dump``, ``rmtc passes``."""

from rmtc.cli.app import app, main

__all__ = ["app", "main"]
