"""The house itself: quick help, imports that run one way, and a README, recipes, pins and wheel that tell the truth."""

import ast
import functools
import graphlib
import importlib.metadata
import io
import itertools
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "longlora"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def module_name(path: Path) -> str:
    """`longlora.attention.patterns` for its file; a package's `__init__.py` goes by the package's name."""
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@functools.cache
def imported_names(name: str) -> set[str]:
    """Every module that the module `name` imports, at its top or inside a function, but not for type checking alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [ast.parse(MODULES[name].read_text(encoding="utf-8"))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import; here modules are imported by their full name"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in MODULES else str(node.module))
        else:
            waiting += ast.iter_child_nodes(node)
    return found


def own_imports() -> dict[str, set[str]]:
    """For each module of the package, the modules of the package that it imports."""
    return {name: {other for other in imported_names(name) if other in MODULES} for name in MODULES}


# ---------------------------------------------------------------------------------------------------- quick help


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); {code}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)


def processor_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_answers_at_once():
    seconds = []
    for _ in range(3):  # the processor's seconds, and the least of three: the machine may be busy with something else
        before = processor_seconds_of_children()
        answer = run_python("from longlora.cli import main; sys.exit(main())", "--help")
        seconds.append(processor_seconds_of_children() - before)
        assert answer.returncode == 0, answer.stderr
        assert "extend" in answer.stdout
    assert 0 < min(seconds) < 1  # measured: 0.4, and 0.5 on a busy machine; PyTorch alone takes 3


@pytest.mark.parametrize("statement", ["import longlora", "import longlora.cli"])
def test_the_command_line_is_imported_without_the_heavy_libraries(statement):
    heavy = ["torch", "transformers", "peft", "accelerate", "datasets", "numpy", "tokenizers"]
    answer = run_python(f"{statement}; print(*[name for name in {heavy} if name in sys.modules])")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == []


# ------------------------------------------------------------------------------------------------- rooms and imports


def test_no_circle_of_imports_between_modules():
    assert len(MODULES) > 5
    graphlib.TopologicalSorter(own_imports()).prepare()  # raises CycleError, which names the circle


ROOMS = {
    room: floor
    for floor, rooms in enumerate(
        "errors|ranks whole_files|logs tables|settings|progress results run_directory help_page|corpus|model|"
        "attention evaluation|"
        "planner report longqa|training chat|bench|demo|reproduction".split("|")
    )
    for room in rooms.split()
}
"""The floor of each room, which imports from lower floors and from no other room of its own."""


def test_a_room_imports_only_from_lower_floors():
    """A room is a folder or a file that stands directly in src/longlora; the command line is free."""
    upward = {
        f"{name} imports {other}"
        for name, others in own_imports().items()
        for other in others
        if (room := name.split(".")[1:2]) and (target := other.split(".")[1:2]) and room != target
        if room[0] not in {"cli", "__main__"} and ROOMS[target[0]] >= ROOMS[room[0]]
    }
    assert upward == set()


def test_the_declared_dependencies_are_the_imported_libraries():
    extras = PROJECT.get("optional-dependencies", {})
    core = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    optional = {canonicalize_name(Requirement(line).name) for name in extras if name != "dev" for line in extras[name]}
    provided_by = importlib.metadata.packages_distributions()
    imported = set()
    for name in MODULES:
        for top in {other.partition(".")[0] for other in imported_names(name)} - {"longlora", *sys.stdlib_module_names}:
            distributions = {canonicalize_name(each) for each in provided_by.get(top, [top])}
            assert distributions & (core | optional), f"{name} imports {top}, which pyproject.toml does not declare"
            imported |= distributions
    imported |= {"gguf", "lxml-html-clean"}  # transformers reads .gguf files with the one, trafilatura wants the other
    assert core - imported == set(), "declared, but never imported"


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_short_enough_to_read(name):
    lines = len(MODULES[name].read_text(encoding="utf-8").splitlines())
    most = 450 if set(name.split(".")) & {"attention", "corpus", "evaluation", "model", "planner", "training"} else 350
    assert lines <= most, f"{name} has {lines} lines"


# --------------------------------------------------------------------------------------------- README and recipes


def fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """`(language, content)` of every fenced block of a Markdown text."""
    for match in re.finditer(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL):
        yield match[2], match[3]


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def mapped_paths(text: str) -> list[str]:
    r"""The paths that a file map names: those in backticks in the first column of a table, or those of a fenced tree.

    >>> mapped_paths("| file | what |\n|---|---|\n| `src/a.py`, `b/` | `c` |\n")
    ['src/a.py', 'b/']
    >>> mapped_paths("```\nsrc/\n  a.py  b.py   the two\n  rooms/\n    c.py\ndocs/ words\nLICENSE\n```\n")
    ['src/', 'src/a.py', 'src/b.py', 'src/rooms/', 'src/rooms/c.py', 'docs/', 'LICENSE']
    """
    paths = [
        path for cell in re.findall(r"^\|([^|\n]*)\|", text, re.MULTILINE) for path in re.findall("`([^`]+)`", cell)
    ]
    folders: list[tuple[int, str]] = []
    for line in (line for _, block in fenced_blocks(text) for line in block.splitlines()):
        words = line.split()
        more = itertools.takewhile(re.compile(r"\S+(/|\.(py|md|toml|txt|yaml|json|html))$").match, words[1:])
        names = [*words[:1], *more]
        indent = len(line) - len(line.lstrip())
        while folders and folders[-1][0] >= indent:
            folders.pop()
        parent = folders[-1][1] if folders else ""
        paths += [parent + each for each in names]
        if names and names[0].endswith("/"):
            folders.append((indent, parent + names[0]))
    return paths


@pytest.mark.parametrize(("document", "heading"), [("README.md", "Where things are"), ("CONTRIBUTING.md", "The map")])
def test_every_path_of_the_file_map_exists(document, heading):
    text = (ROOT / document).read_text(encoding="utf-8")
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert section, f"{document} has no heading '{heading}'"
    paths = mapped_paths(section[1])
    assert len(paths) >= 7
    assert [path for path in paths if not (ROOT / path).exists()] == []


def longlora_commands(text: str) -> list[list[str]]:
    r"""The arguments of each `longlora …` command of a Markdown text: in shell blocks, or in backticks with an option.

    >>> longlora_commands("```bash\n$ .venv/bin/longlora plan demo \\\n  --context 32768 | jq .  # why\nls\n```\n")
    [['plan', 'demo', '--context', '32768']]
    >>> longlora_commands("`longlora merge` and `longlora merge RUN --output DIR`, see `longlora COMMAND --help`")
    [['merge', 'RUN', '--output', 'DIR']]
    """
    blocks = [block for language, block in fenced_blocks(text) if language in ("", "bash", "sh", "shell", "console")]
    inline = re.findall(r"`(longlora [^`\n]* --[^`\n]+)`", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = []
    for line in [*lines, *(each for each in inline if not each.endswith("--help"))]:
        words = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="|&;<>")
        words.whitespace_split = True
        tokens: list[str] = []
        for token in [*words, ";"]:
            if not re.fullmatch("[|&;<>]+", token):
                tokens.append(token)
                continue
            if tokens and Path(tokens[0]).name == "longlora":
                commands.append(tokens[1:])
            tokens = []
    return commands


def check_command(arguments: list[str]) -> None:
    """Fails unless the command line of longlora understands `arguments`; nothing is run."""
    from longlora import cli

    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(said):
            assert cli.parse(arguments) is not None
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and error.code in (0, None) and "--help" in arguments:
            return
        pytest.fail(f"longlora {shlex.join(arguments)}: {error} {said.getvalue()}")


def indented_commands(text: str) -> list[list[str]]:
    """Arguments of each longlora command in a Markdown page's indented blocks."""
    lines = [line[4:] if line.startswith("    ") else "" for line in text.splitlines()]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if line.startswith("longlora ")]


def linked(page: Path) -> list[Path]:
    """The files of the repository that a Markdown page links to."""
    found = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    return [(page.parent / target).resolve() for target in found if "://" not in target]


def test_the_index_names_every_page_and_links_lead_somewhere():
    index = ROOT / "docs" / "README.md"
    pages = {page.resolve() for page in (ROOT / "docs").glob("*.md")} - {index}
    assert pages - set(linked(index)) == set()
    documents = [ROOT / "README.md", *PAGES]
    assert [(page.name, target) for page in documents for target in linked(page) if not target.exists()] == []


PAGES = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_every_command_in_the_readme_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)  # they name recipes
    commands = longlora_commands(readme())
    assert len(commands) >= 4
    for arguments in commands:
        check_command(arguments)


def test_every_command_that_a_page_sets_apart_is_understood(monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = [each for page in PAGES for each in indented_commands(page.read_text(encoding="utf-8"))]
    assert len(commands) >= 20
    for arguments in commands:
        check_command([word.replace("…", "data") for word in arguments])


def test_every_python_name_in_the_readme_exists():
    import longlora

    blocks = [block for language, block in fenced_blocks(readme()) if language == "python"]
    assert blocks
    names = {
        node.attr
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "longlora"
    }
    assert [name for name in sorted(names) if not hasattr(longlora, name)] == []


def test_a_recipe_with_an_unknown_key_is_refused(tmp_path):
    """Shows that the check above can fail."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("context: 8192\ngroup_sise: 2048\n", encoding="utf-8")
    with pytest.raises(pytest.fail.Exception, match="group_size"):
        check_command(["extend", "MODEL", "--config", str(recipe), "--output", "RUN"])


# ------------------------------------------------------------------------------------------------- pins and wheel


def test_the_pins_are_exact_and_lie_in_the_ranges():
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            pins[canonicalize_name(requirement.name)] = specifier.version
    extras = PROJECT.get("optional-dependencies", {})
    for line in [*PROJECT["dependencies"], *(each for lines in extras.values() for each in lines)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name == "longlora":  # an extra made of others
            continue
        assert name in pins, f"{name} has no pin in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{name}=={pins[name]} is outside {requirement.specifier}"


@pytest.mark.slow
def test_the_wheel_holds_everything_and_is_small(tmp_path):
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    wanted = {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    assert wanted - packed == set()
    assert "longlora/assets/demo_model/model.safetensors" in packed
    assert any(name.startswith("longlora/report/") and name.endswith((".html", ".j2")) for name in packed)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed)


@pytest.mark.parametrize(("reason", "status"), [("lm_eval is not installed", 1), ("no GPU here", 0)])
def test_a_skipped_test_fails_the_check_where_a_package_is_missing(tmp_path, reason, status):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it():\n    pytest.skip({reason!r})\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        str(tmp_path),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["LONGLORA_NOTHING_MISSING"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60)
    assert done.returncode == status, done.stdout
    assert ("nothing may be" in done.stdout) == bool(status)


# ---------------------------------------------------------------------------------------------------- what git holds

PRIVATE = re.compile(
    r"(?<![\w./-])/(?:work|root|opt)/|(?<![\w./-])/home/\w+|\.\./shared/"  # folders of one machine
    r"|\b(?:pypi\.org|pythonhosted\.org|download\.pytorch\.org|registry\.npmjs\.org|deb\.debian\.org)\b"
    r"|\b(?:this|an?|an earlier|another|previous|next|last) (?:helper|coding|working) session\b|^co-authored-by:",
    re.IGNORECASE | re.MULTILINE,
)


def test_the_pattern_finds_what_is_private():
    slash = "/"
    for text in (
        f"see {slash}work/x",
        f"'{slash}root/.cache'",
        f"at {slash}home/someone",
        "https://pypi" + ".org/simple",
    ):
        assert PRIVATE.search(text), text
    for text in ("src/work/x", "https://example.org/work/", "a/root/b", "the root of the folder"):
        assert not PRIVATE.search(text), text


def test_nothing_tracked_names_one_machine_or_one_index():
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    found = []
    for name in subprocess.run(listing, capture_output=True, check=True).stdout.decode().split("\0"):
        path = ROOT / name
        content = path.read_bytes() if name and path.is_file() else b""
        if b"\0" not in content and (match := PRIVATE.search(content.decode("utf-8", errors="replace"))):
            found.append(f"{name}: {match[0]}")
    assert found == []
