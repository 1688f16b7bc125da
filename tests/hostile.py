"""Texts from outside that a terminal, Markdown, a page or a formula could obey."""

HOSTILE = [
    "<script>alert(1)</script>",
    "![x](http://example.org/a.png)",
    "[click](http://example.org)",
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://example.org\x1b\\link\x1b]8;;\x1b\\",
    "\u202egnp.exe",
    "a | b",
    "[bold red]x[/bold red]",
    "[/nothing]",
    "$\\frac{1}$",
    "$a$ $b",
    "`code` **bold** _it_ ~~gone~~",
    "a\nb\r\n# c",
    "&lt;b&gt;",
    "\\[x](y)",
]
HALF = "half \ud800"
"""It cannot stand in a file, and no id or name has it, but a message may."""
