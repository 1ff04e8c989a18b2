"""What an import costs and brings, what an installation holds, what the README promises."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command, **options):
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_quick_and_brings_numpy_alone():
    script = ("import sys, time, numpy; start = time.perf_counter(); import sagepp; "
              "print(time.perf_counter() - start); "
              "print(*{'cupy', 'cupy_backends', 'torch', 'jax', 'numba', 'sagepp.jit', 'sagepp.reference'}"
              " & set(sys.modules))")
    results = [run("-c", script, cwd=ROOT).splitlines() for _ in range(3)]
    assert min(float(seconds) for seconds, _ in results) < 0.25
    assert all(eager == "" for _, eager in results)


def test_the_package_needs_neither_cupy_nor_a_driver():
    run("-c", "import sys; sys.modules['cupy'] = sys.modules['cupy_backends'] = None\n"
        "import sagepp, sagepp.jit, sagepp.plan, sagepp.__main__", cwd=ROOT)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The files that an installation puts into site-packages, in a folder of their own."""
    pytest.importorskip("setuptools", minversion="77")
    copy, site = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("site")
    for name in ("sagepp", "reference", "kernels_src"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    run("-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", site, cwd=copy)
    return site


def test_everything_is_installed_inside_sagepp(installed):
    assert [path.name for path in installed.iterdir()] == ["sagepp"]
    for folder, target in (("sagepp", "."), ("reference", "reference"), ("kernels_src", "kernels_src")):
        for file in (ROOT / folder).iterdir():
            if file.suffix in (".py", ".cu", ".cuh", ".npz"):
                assert (installed / "sagepp" / target / file.name).is_file(), file


def test_an_installation_finds_its_kernels_and_its_reference(installed, tmp_path):
    script = ("import sagepp, sagepp.reference, sagepp.kernels_src; from sagepp import jit; "
              "print(len(sagepp.__path__), sagepp.reference.__file__, jit.source_dir())")
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    count, reference, sources = run("-c", script, cwd=tmp_path, env=environment).split()
    assert (count, reference, sources) == (
        "1", str(installed / "sagepp/reference/__init__.py"), str(installed / "sagepp/kernels_src"))


def test_a_checkout_works_where_it_stands():
    script = "import sagepp.reference, sagepp.kernels_src; print(sagepp.reference.__file__)"
    assert run("-c", script, cwd=ROOT).strip() == str(ROOT / "reference/__init__.py")


def test_the_readme_has_two_commands_and_ci_runs_the_second():
    readme = (ROOT / "README.md").read_text()
    commands = re.findall(r"^python3 -m venv .*$", readme, re.MULTILINE)
    assert [command.split("&&")[-1].strip() for command in commands] == [
        ".venv/bin/python -m sagepp demo", ".venv/bin/python -m pytest"]
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK) and "grep -E '^python3 -m venv .* -m pytest$' README.md" in ci.read_text()


def test_the_version_is_in_the_changelog_or_ahead_of_it():
    import sagepp

    assert re.fullmatch(r"\d+\.\d+\.\d+", sagepp.__version__)
    newest = re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert newest == "Unreleased" or newest.startswith(sagepp.__version__)
