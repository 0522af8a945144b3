"""A terminal in memory: what a person sees after a program has moved its cursor about."""

from __future__ import annotations

import io
import re

TOKEN = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")


class Terminal(io.StringIO):
    """Takes what is written as a terminal would: text, line ends, and the codes that rich moves the cursor by."""

    def isatty(self) -> bool:
        return True

    def screen(self, width: int) -> list[str]:
        """Return the lines that are seen, those that scrolled away included, without trailing spaces."""
        lines, row, column = [""], 0, 0
        for token in TOKEN.finditer(self.getvalue()):
            number, code = token[1], token[2]
            if code == "A":
                row = max(0, row - int(number or 1))
            elif code == "K":
                assert number == "2"
                lines[row] = ""
            elif code is not None:
                assert code in "mhl", f"{token[0]!r} is not understood"
            elif token[0] == "\r":
                column = 0
            elif token[0] == "\n":
                row, column = row + 1, 0
            else:
                for letter in token[0]:
                    if column == width:
                        row, column = row + 1, 0
                    lines += [""] * (row + 1 - len(lines))
                    line = lines[row].ljust(column)
                    lines[row] = line[:column] + letter + line[column + 1 :]
                    column += 1
            lines += [""] * (row + 1 - len(lines))
        return [line.rstrip() for line in lines]
