"""The model card of an export: the one it was made from, with the format and the way to load it replaced.

A card that this project did not write says nothing that could be kept line by line; a short one takes its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from awq_core.version import __version__

ROW = '| format | AWQ "gemm": 4-bit codes, zero points'
SHORT = """\
---
library_name: transformers
tags: []
---

#

Converted from `{name}` with awq-core {version}, code for code.

| | |
|---|---|
| format | AWQ "gemm": 4-bit codes, zero points |

## Use
"""


@dataclass(frozen=True, slots=True)
class Card:
    """What a format says of itself.

    Attributes:
        title: after the model's name.
        tags: for the hub.
        format: one line.
        use: how to load it, markdown, in which "NAME" stands for the folder.
    """

    title: str
    tags: tuple[str, ...]
    format: str
    use: str

    def text(self, original: str, name: str) -> str:
        """The README.md of an export.

        Args:
            original: the README.md of the folder it was made from; empty where there is none.
            name: of that folder.
        """
        ours = f"\n{ROW}" in original and "\n## Use\n" in original
        text = original if ours else SHORT.format(name=name, version=__version__)
        base = re.search(r"^base_model: (.+)$", text, re.MULTILINE)
        model = base[1] if base else name
        text = text.partition("\n## Use\n")[0] + "\n## Use\n\n" + self.use.replace("NAME", model) + "\n"
        text = re.sub(r"^\| size \|.*\n", "", text, flags=re.MULTILINE)
        if not self.format.startswith("AWQ"):  # it says who reads the head in AWQ's layout
            text = re.sub(r"^## The output head is quantized\n.*?(?=^## )", "", text, flags=re.MULTILINE | re.DOTALL)
        for pattern, line in (
            (r"^tags: .*$", f"tags: [{', '.join(self.tags)}]"),
            (r"^#(?: .*)?$", f"# {model}, {self.title}"),
            (rf"^{re.escape(ROW)}", f"| format | {self.format}"),
        ):
            text = re.sub(pattern, line.replace("\\", r"\\"), text, count=1, flags=re.MULTILINE)
        return text
