"""Imports point downwards: folders import only from folders below them, no import is circular, and files stay short."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "justrl_trl"

# from top to ground; "" are the modules beside the folders, which import nothing but each other
FLOORS = [
    "runs",
    "preflight",
    "training",
    "evaluation",
    "weights",
    "rollouts",
    "policy",
    "reports",
    "data",
    "servers",
    "grading",
    "",
]
MOST_LINES = 300


def module_name(path: Path) -> str:
    """`weights.sync` for `justrl_trl/weights/sync.py`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(source: str, modules: set[str]) -> set[str]:
    """Modules of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError("relative imports hide where they point to: write justrl_trl.folder.module")
        else:
            continue
        found |= {name.removeprefix("justrl_trl.") for name in names if name.startswith("justrl_trl.")}
    return found & modules


def floor(module: str) -> int:
    return FLOORS.index(module.split(".")[0] if "." in module else "")


def upward(graph: dict[str, set[str]]) -> list[str]:
    return [f"{module} -> {other}" for module, below in graph.items() for other in below if floor(other) < floor(module)]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Modules from which one comes back to them."""

    def reached(module: str) -> set[str]:
        seen, todo = set(), list(graph[module])
        while todo:
            if (one := todo.pop()) not in seen:
                seen.add(one)
                todo += graph[one]
        return seen

    return [module for module in graph if module in reached(module)]


def package() -> dict[str, set[str]]:
    paths = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    return {module: imports_of(path.read_text(), set(paths)) for module, path in paths.items()}


def test_every_folder_has_a_floor():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == set(FLOORS) - {""}


def test_imports_point_downwards():
    assert upward(package()) == []


def test_no_import_goes_round_in_a_circle():
    assert circles(package()) == []


def test_a_planted_upward_import_is_found():
    graph = package()
    modules = set(graph)
    for line in (
        "from justrl_trl.runs.setup import load_data",
        "import justrl_trl.training.trainer",
        "from justrl_trl.runs import folder",
    ):
        planted = graph | {"policy.loss": graph["policy.loss"] | imports_of(line, modules)}
        assert len(upward(planted)) == 1, line
    assert upward(graph | {"errors": imports_of("def f():\n    from justrl_trl.policy.loss import policy_loss", modules)}) == [
        "errors -> policy.loss"
    ]


def test_a_planted_circle_is_found():
    graph = package()
    assert circles(graph | {"policy.packing": {"policy.micro_batches"}}) != []


def test_an_init_file_holds_a_docstring_and_nothing_else():
    for path in PACKAGE.glob("*/__init__.py"):
        body = ast.parse(path.read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), path


def test_no_module_is_above_300_lines():
    long = {module_name(p): n for p in PACKAGE.rglob("*.py") if (n := len(p.read_text().splitlines())) > MOST_LINES}
    assert long == {}


def loaded(modules: list[str], heavy: set[str]) -> set[str]:
    program = f"import sys, {', '.join(modules)}; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(ast.literal_eval(done.stdout.strip().splitlines()[-1]))


def modules_in(*folders: str, but: tuple[str, ...] = ()) -> list[str]:
    return [f"justrl_trl.{name}" for name in package() if name.split(".")[0] in folders and name not in but]


def test_graders_and_the_small_processes_load_neither_torch_nor_trl():
    heavy = {"torch", "transformers", "trl", "vllm", "deepspeed"}
    small = ["justrl_trl", "justrl_trl.servers.guard", "justrl_trl.servers.auth"]
    assert loaded([*small, *modules_in("grading", but=("grading.worker",))], heavy) == set()


PURE = ["policy.loss", "policy.packing", "policy.balance", "training.advantage", "training.metrics"]


def test_the_objective_in_plain_torch_loads_neither_vllm_nor_deepspeed_nor_trl():
    modules = [*(f"justrl_trl.{name}" for name in PURE), *modules_in("reports"), "justrl_trl.data.problems"]
    assert loaded(modules, {"vllm", "deepspeed", "trl"}) == set()


FILES = [*PACKAGE.rglob("*.py"), *(path for path in (ROOT / "recipes").iterdir() if path.is_file())]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_module_and_no_recipe_reads_what_lies_beside_the_checkout(path):
    text = path.read_text(errors="replace")
    assert "shared/" not in text and '"shared"' not in text and str(ROOT) not in text
