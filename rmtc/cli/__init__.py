"""The command line ``rmtc``: ``schedule``, ``explain``, ``study``, ``verify``, ``bench`` and other commands."""

from rmtc.cli.app import app, main

__all__ = ["app", "main"]
