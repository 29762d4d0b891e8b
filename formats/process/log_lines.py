"""Log lines on a terminal: a record may quote a file, and comes out escaped."""

from __future__ import annotations

import logging

from krasis.formats.printable import printable_lines


class PrintableFormatter(logging.Formatter):
    """A formatter whose lines are safe on a terminal, tracebacks and all."""

    def format(self, record: logging.LogRecord) -> str:
        """The record's text."""
        return printable_lines(super().format(record))
