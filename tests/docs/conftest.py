"""The documents' commands run in the same clean child processes as the other command-line tests."""

from tests.repro.conftest import command, sample

__all__ = ["command", "sample"]
