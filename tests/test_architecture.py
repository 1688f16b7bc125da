"""Which room may import which: read from the source, so that nothing has to be loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "grasp_lora"

# room -> (rooms of ours, third-party packages) it may import; the standard library is free
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "base": (set(), {"filelock"}),
    "core": ({"base"}, {"torch", "numpy", "scipy"}),
    "metrics": (
        {"base"},
        {"numpy", "scipy", "sacrebleu", "rouge_score", "regex", "bert_score"}
        | {"jieba", "nltk", "pythainlp", "transformers"},
    ),
    "tasks": ({"base"}, {"torch", "jinja2"}),
    "data": ({"base", "tasks"}, {"datasets", "pyarrow", "huggingface_hub", "numpy"}),
    "config": ({"base", "core"}, {"pydantic", "pydantic_core", "yaml"}),
    "models": ({"base"}, {"torch", "transformers", "peft", "safetensors"}),
    "adapters": (
        {"base", "core", "models"},
        {"torch", "transformers", "peft", "safetensors", "pydantic"},
    ),
    "training": (
        {"adapters", "base", "core", "models"},
        {"torch", "transformers", "peft", "safetensors", "accelerate"},
    ),
    "generation": ({"adapters", "models"}, {"torch", "transformers"}),
    "scoring": ({"base", "config", "metrics", "tasks"}, {"rich"}),
    "report": (
        {"base", "core", "metrics", "scoring", "tasks"},
        {"huggingface_hub", "jinja2", "markupsafe", "matplotlib", "rich", "safetensors"},
    ),
    "sharing": (
        {"adapters", "base", "config", "core", "models", "report"},
        {"torch", "transformers", "peft", "safetensors", "huggingface_hub"},
    ),
    "workbench": (
        {"adapters", "base", "config", "core", "data", "generation", "metrics", "models", "report"}
        | {"scoring", "tasks", "training"},
        {"torch", "transformers", "safetensors", "accelerate", "rich", "packaging", "psutil"},
    ),
    "stages": (
        {"adapters", "base", "config", "core", "generation", "metrics", "models", "scoring"}
        | {"tasks", "training", "workbench"},
        {"torch", "optuna", "nevergrad"},
    ),
    "plans": (
        {"adapters", "base", "config", "core", "metrics", "models", "report", "scoring"}
        | {"stages", "training", "workbench"},
        {"torch", "rich", "ray", "submitit"},
    ),
    "cli": (
        {
            "adapters",
            "base",
            "config",
            "metrics",
            "plans",
            "report",
            "scoring",
            "sharing",
            "workbench",
        },
        {"typer", "rich"},
    ),
    "__init__": ({"adapters", "config", "core", "plans", "sharing", "training"}, set()),
    "__main__": ({"cli"}, set()),
}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are written in full"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    room = room_of(path)
    ours, others = ALLOWED[room]
    for name in imported(path):
        top, _, rest = name.partition(".")
        if top == "grasp_lora":
            assert rest.split(".")[0] in ours | {room}, f"{room} must not import {name}"
        elif top not in sys.stdlib_module_names:
            assert top in others, f"{room} must not import {name}"


def test_the_table_names_the_rooms_there_are_and_what_they_use():
    used: dict[str, set[str]] = {}
    for path in SOURCES:
        names = (name.split(".") for name in imported(path))
        found = used.setdefault(room_of(path), set())
        found |= {parts[1] if parts[0] == "grasp_lora" else parts[0] for parts in names}
    assert ALLOWED.keys() == used.keys()
    for room, (ours, others) in ALLOWED.items():
        assert ours | others <= used[room], f"{room} needs less"


MOST_LINES, MOST_PARAMETERS = 60, 8


def functions_in(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    has_docstring = ast.get_docstring(function, clean=False) is not None
    body = function.body[1:] if has_docstring else function.body
    return 1 + (body[-1].end_lineno or 0) - body[0].lineno if body else 0


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return sum(one is not None and one.arg not in ("self", "cls") for one in named)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short_and_take_few_parameters(path):
    """No function body has more than 60 lines, and no function more than 8 parameters.

    The docstring, `self` and `cls` are not counted. The commands in `cli/` may have more
    parameters, because each of their options is one.
    """
    for function in functions_in(path):
        where = f"{path.relative_to(PACKAGE)}: {function.name}"
        assert body_lines(function) <= MOST_LINES, f"{where} is too long: split it"
        command = room_of(path) == "cli" and not function.name.startswith("_")
        if not command:
            assert parameters(function) <= MOST_PARAMETERS, f"{where} has too many parameters"


def test_long_functions_and_many_parameters_are_found(tmp_path):
    lines = "\n".join(f"    x{n} = {n}" for n in range(61))
    source = f'def long(self, a, /, b, *c, d, **e):\n    """Text."""\n{lines}\n'
    (tmp_path / "one.py").write_text(source, encoding="utf-8")
    (function,) = functions_in(tmp_path / "one.py")
    assert (body_lines(function), parameters(function)) == (61, 5)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("grasp_lora", ["torch", "transformers", "pydantic"]),
        ("grasp_lora.cli", ["torch", "transformers", "pydantic", "matplotlib"]),
        ("grasp_lora.config.run_config", ["torch", "transformers"]),
        ("grasp_lora.base.files", ["torch", "transformers"]),
        ("grasp_lora.core.lora", ["transformers", "peft"]),
        ("grasp_lora.plans.on_slurm", ["torch", "transformers", "pydantic", "submitit"]),
        ("grasp_lora.plans.on_ray", ["torch", "transformers", "pydantic", "ray"]),
        ("grasp_lora.scoring.sets", ["torch", "scipy"]),
        ("grasp_lora.metrics", ["torch", "scipy", "sacrebleu", "rouge_score", "bert_score"]),
    ],
)
def test_importing_stays_light(module, absent):
    code = f"import {module}, sys; print(sorted(set({absent!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_of_the_package_exist():
    import grasp_lora

    for name in grasp_lora.__all__:
        assert getattr(grasp_lora, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = grasp_lora.nonsense


def drawn_arrows() -> set[tuple[str, str]]:
    """Return the arrows of the picture in docs/development.md."""
    text = (PACKAGE.parents[1] / "docs" / "development.md").read_text(encoding="utf-8")
    picture = text.split("```mermaid")[1].split("```")[0]
    lines = (line.split("-->") for line in picture.splitlines() if "-->" in line)
    return {(above.strip(), below.strip()) for above, below in lines}


def reached(room: str, arrows: set[tuple[str, str]]) -> set[str]:
    """Return the rooms below a room; an arrow that leads back up would never end this."""
    below = {b for a, b in arrows if a == room}
    return below.union(*(reached(b, arrows) for b in below))


def test_the_picture_of_the_rooms_is_the_code():
    imports = {
        (room_of(path), name.split(".")[1])
        for path in SOURCES
        for name in imported(path)
        if name.startswith("grasp_lora.") and room_of(path) != name.split(".")[1]
    }
    rooms = {room for room in ALLOWED if not room.startswith("__")}
    arrows = drawn_arrows()
    assert arrows <= imports, "an arrow that no import has"
    assert {room for arrow in arrows for room in arrow} == rooms
    for above, below in imports:
        if above in rooms:
            assert below in reached(above, arrows), f"no way down from {above} to {below}"
