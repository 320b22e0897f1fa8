"""The house keeps its plan: imports point down, importing is light, the README's code runs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# a room may import from rooms of a lower floor, and from itself
FLOORS = {
    "sae": 0, "data": 0, "model": 1, "acts": 2, "store": 3, "concepts": 4, "space": 4, "features": 5, "report": 6,
    "serve": 7, "demo": 8, "doctor": 8, "cli": 9,
}  # fmt: skip


def room_of(module: str) -> str | None:
    """Return the room of a dotted module name, None for other people's packages and for the lazy top level."""
    parts = module.split(".")
    if parts[0] == "sae":
        return "sae"
    return parts[1] if parts[0] == "interp" and len(parts) > 1 else None


def imported(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def sources() -> list[Path]:
    return sorted(p for package in ("interp", "sae") for p in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    relative = path.relative_to(ROOT).with_suffix("")
    if relative.parts == ("interp", "__init__"):
        return  # names only, loaded when asked for
    here = room_of(".".join(relative.parts))
    for name in imported(ast.parse(path.read_text(encoding="utf8"))):
        room = room_of(name)
        if room is None or room == here:
            assert not (here == "sae" and name.split(".")[0] in {"interp", "transformers", "tokenizers"}), name
            continue
        assert FLOORS[room] < FLOORS[here], f"{here} imports {name}"


def test_the_layer_check_knows_every_room():
    rooms = {p.stem for p in (ROOT / "interp").iterdir() if p.is_dir() or p.suffix == ".py"}
    assert rooms - {"__init__", "__pycache__", "py"} <= set(FLOORS)


def run(*code: str) -> str:
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_is_light():
    heavy = ("torch", "transformers", "transformer_lens", "sklearn", "plotly", "numpy")
    code = f"import interp, sae, sys; print([m for m in {heavy} if m in sys.modules])"
    assert run("-c", code).strip() == "[]"


def test_every_public_name_loads():
    for package in ("interp", "sae"):
        code = f"import {package}; print([n for n in {package}.__all__ if getattr({package}, n).__doc__ is None])"
        out = run("-c", code).strip()
        assert out in ("[]", "['ARCHS']"), f"{package}: without a docstring: {out}"


def test_an_unknown_public_name_says_what_there_is():
    import interp

    with pytest.raises(AttributeError, match="load_model"):
        interp.load_modell  # noqa: B018


def readme_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf8"), re.DOTALL)


def test_the_readme_has_code():
    assert len(readme_blocks()) >= 2


@pytest.mark.parametrize("number", range(len(readme_blocks())))
def test_readme_code_runs(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(readme_blocks()[number], f"README block {number}", "exec"), {"__name__": "readme"})


def test_the_project_speaks_of_itself_alone():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout")
    machine = re.compile(r"(^|[\s\"'(=])/(work|root|home|tmp/dev)\b")
    for name in listed.stdout.split():
        if Path(name).suffix in {".py", ".md", ".toml", ".sh", ".css", ".js", ".j2"}:
            for number, line in enumerate((ROOT / name).read_text(encoding="utf8").splitlines(), 1):
                assert not machine.search(line) or "re.compile" in line, f"{name}:{number}: a path of one machine"
