"""The command lines of the experiments are those of `qt_jax.command_line`."""

from qt_jax.command_line import Failed, command, exit_status, parse, print_rows, read_flags, text_console

__all__ = ["Failed", "command", "exit_status", "parse", "print_rows", "read_flags", "text_console"]
