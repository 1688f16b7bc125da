"""The page of the public names: signatures and docstrings, as they stand in the source.

`make pages` writes it.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator

import grasp_lora

HEAD = """# From Python

These names are what `grasp_lora` offers to Python; everything else may change. Each is imported
when it is first used, and typed (`py.typed`). [your-trainer.md](your-trainer.md) shows the ratio
search in a training script of your own; `ControllerConfig` has the settings of `controller` in
[settings.md](settings.md), `RunConfig` all of them.
"""


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name in grasp_lora.__all__:
        if not name.startswith("__"):
            parts += [f"## `{name}`\n", *_about(getattr(grasp_lora, name), name)]
    return "\n".join(parts)


def _about(found: type | object, name: str) -> Iterator[str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(found))).body  # type: ignore[arg-type]
    if isinstance(tree, ast.FunctionDef):
        yield from _block(f"{name}{_arguments(tree)}", ast.get_docstring(tree))
        return
    assert isinstance(tree, ast.ClassDef)
    methods = {one.name: one for one in tree.body if isinstance(one, ast.FunctionDef)}
    begun = _arguments(methods["__init__"]) if "__init__" in methods else ""
    yield from _block(f"{name}{begun}", ast.get_docstring(tree))
    for method in methods.values():
        if method.name.startswith(("_", "on_")):
            continue
        shown = "" if _is_property(method) else _arguments(method)
        yield from _block(f"{name}.{method.name}{shown}", ast.get_docstring(method))


def _is_property(method: ast.FunctionDef) -> bool:
    return any(isinstance(one, ast.Name) and one.id == "property" for one in method.decorator_list)


def _arguments(function: ast.FunctionDef) -> str:
    """Return the arguments, without `self`, and what is returned."""
    given = function.args
    given.args = [one for one in given.args if one.arg != "self"]
    returned = "" if function.returns is None else f" -> {ast.unparse(function.returns)}"
    return f"({ast.unparse(given)}){returned}"


def _block(signature: str, text: str | None) -> Iterator[str]:
    lines = textwrap.wrap(signature, 96, subsequent_indent="    ")
    yield "\n".join(["```text", *lines, "", text or "", "```", ""])


if __name__ == "__main__":
    print(page(), end="")
