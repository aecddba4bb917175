"""docker/: what the Dockerfile says, how the lock is laid over a base image, and that both READMEs say the same.

    .venv/bin/python -m pytest tests/unit/test_docker.py

Nothing here needs Docker. hadolint and shellcheck are run where they are installed.
"""

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
COMMIT = "21b00fa509c9028c33db5b6a3f1feda8f9e97645"
HASH = "    --hash=sha256:" + "0" * 64 + "\n"
SECRET = re.compile(r"(api_?key|token|password|passwd|secret|credential)", re.IGNORECASE)


def load_layer():
    spec = importlib.util.spec_from_file_location("docker_layer", DOCKER / "layer.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


layer = load_layer()


def instructions(text: str) -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined, comments out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


DOCKERFILE = instructions((DOCKER / "Dockerfile").read_text(encoding="utf-8"))


def arguments(instruction: str) -> list[str]:
    return [argument for name, argument in DOCKERFILE if name == instruction]


def locked_version(name: str, lock: str = "gpu") -> str:
    return re.search(rf"^{name}==([^ ]+)", (ROOT / f"requirements/{lock}.lock").read_text(), re.MULTILINE)[1]


def variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for argument in arguments("ENV") for pair in shlex.split(argument))


# --- the Dockerfile ---


def test_the_base_is_the_locked_vllm():
    assert arguments("FROM") == [f"vllm/vllm-openai:v{locked_version('vllm')}"]


def problems_of_copies(copies: list[str], ignore: str) -> list[str]:
    """What is wrong with the COPY lines, next to a .dockerignore that leaves everything out but its `!` lines."""
    let_through = [line[1:] for line in ignore.splitlines() if line.startswith("!")]
    problems = []
    for copy in copies:
        words = copy.split()
        if words[0].startswith("--"):
            problems.append(f"{copy}: a flag this test does not know")
        for source in words[:-1]:
            if not (ROOT / source).exists():
                problems.append(f"{source} is not there")
            if not any(source == path or source.startswith(f"{path}/") for path in let_through):
                problems.append(f"{source} is kept from the builder by .dockerignore")
    return problems


def test_copies_only_what_is_there_and_not_ignored():
    ignore = (ROOT / ".dockerignore").read_text()
    assert re.search(r"^\*$", ignore, re.MULTILINE), "everything is left out first"
    assert problems_of_copies(arguments("COPY"), ignore) == []
    # What is let through is what is copied, no more.
    copied = {source for copy in arguments("COPY") for source in copy.split()[:-1]}
    assert {line[1:] for line in ignore.splitlines() if line.startswith("!")} == copied
    # Controls.
    assert problems_of_copies(["nothing-of-the-kind ."], ignore)[0] == "nothing-of-the-kind is not there"
    assert problems_of_copies(["tests ."], ignore) == ["tests is kept from the builder by .dockerignore"]


def secrets_in(dockerfile: list[tuple[str, str]]) -> list[str]:
    """Instructions that bring a secret in, or a file over the network that nobody compares with a hash."""
    return [
        f"{name} {argument}"
        for name, argument in dockerfile
        if name in ("ADD", "ARG") or (name in ("ENV", "RUN", "LABEL") and SECRET.search(argument))
    ]


@pytest.mark.parametrize(
    "line", ["ARG WANDB_API_KEY", "ENV OPENAI_API_KEY=x", "ADD https://example.com/file .", "RUN echo $HF_TOKEN"]
)
def test_no_secrets_and_no_downloads_by_add(line):
    assert secrets_in(DOCKERFILE) == []
    assert secrets_in(instructions(line)) == [line]


def test_the_user_is_a_number_and_not_root():
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", arguments("USER")[-1])
    after = [name for name, _ in DOCKERFILE[[name for name, _ in DOCKERFILE].index("USER") :]]
    assert not {"RUN", "COPY"} & set(after), "what is installed is root's"
    assert variables()["HOME"] == "/home/qwen", "docker run --user gives a number without a home"
    assert variables()["PYTHONNOUSERSITE"] == "1"


def test_runs_what_it_is_given():
    assert json.loads(arguments("ENTRYPOINT")[-1]) == []
    assert json.loads(arguments("CMD")[-1]) == ["bash"]


def test_the_steps_are_those_of_install_sh_and_the_last_one_verifies():
    steps = [step for run in arguments("RUN") for step in re.findall(r"docker/install\.sh (\w+)", run)]
    assert steps == ["environment", "vlmevalkit", "package"]
    script = (DOCKER / "install.sh").read_text()
    body = re.search(r"^package\(\) \{\n(.*?)^\}", script, re.MULTILINE | re.DOTALL)[1]
    assert body.rstrip().splitlines()[-1].strip() == "overlay verify $VERIFY"


def test_vlmevalkit_is_at_the_whole_commit():
    script = (DOCKER / "install.sh").read_text()
    assert re.search(r"^VLMEVALKIT_COMMIT=\$\{VLMEVALKIT_COMMIT:-([0-9a-f]+)\}$", script, re.MULTILINE)[1] == COMMIT
    assert 'fetch -q --depth 1 "$VLMEVALKIT_URL" "$VLMEVALKIT_COMMIT"' in script


def test_version_and_paths_agree():
    version = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f'org.opencontainers.image.version="{version}"' in arguments("LABEL")[0]
    for readme in ("README.md", "README-CN.md"):
        assert set(re.findall(r"qwen-merge:(\d[\w.]*)", (DOCKER / readme).read_text())) == {version}
    found = variables()
    assert found["VENV"] == found["VIRTUAL_ENV"] == f"{arguments('WORKDIR')[0]}/.venv", "scripts/*.sh look for .venv"
    assert found["PATH"].startswith(f"{found['VENV']}/bin:")


def tool(name: str) -> str:
    """The program, from the environment of the tests or from the path; skips the test where there is none."""
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_hadolint(tmp_path):
    command = [tool("hadolint"), "--no-color"]
    result = subprocess.run([*command, DOCKER / "Dockerfile"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM vllm/vllm-openai\nRUN cd /tmp && sudo ls\n")
    assert subprocess.run([*command, bad], capture_output=True, check=False).returncode != 0


def test_the_shell_script_is_sound():
    subprocess.run(["bash", "-n", DOCKER / "install.sh"], check=True)
    result = subprocess.run([tool("shellcheck"), DOCKER / "install.sh"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


# --- install.sh: what it refuses ---


@pytest.mark.parametrize(
    ("step", "changed", "message"),
    [
        ("environment", {"LOCK": "tpu"}, "requirements/tpu.lock; choose cpu or gpu"),
        ("environment", {"PYTHON": "/bin/false"}, "PYTHON=/bin/false is not a Python 3.10, 3.11 or 3.12"),
        ("environment", {"BASE": "vm"}, "BASE=vm is not none or image"),
        ("environment", {"VENV": "{tmp}"}, "exists; remove it, or name another VENV"),
        ("vlmevalkit", {"VLMEVALKIT": "{tmp}"}, "exists; remove it, or name another VLMEVALKIT"),
        ("everything", {}, "usage: docker/install.sh environment|vlmevalkit|package|all"),
    ],
)
def test_install_refuses(tmp_path, step, changed, message):
    base = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "LOCK": "cpu", "VENV": str(tmp_path / "venv")}
    changed = {name: value.format(tmp=tmp_path) for name, value in changed.items()}
    result = subprocess.run(
        [DOCKER / "install.sh", step], env=base | changed, capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "venv").exists()


# --- install.sh: its last two steps, with stand-ins for what takes long ---

STAND_IN = """#!/usr/bin/env bash
echo "$(basename "$0") $* HOME=$HOME" >> "$CALLS"
[[ "$*" != "${FAIL_AT:-nothing}"* ]]
"""


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """The variables of install.sh for an environment that sees the packages of this test, and nothing else."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    (site / "test.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    (tmp_path / "bin").mkdir()
    for program in (venv / "bin/qwen-merge", tmp_path / "bin/uv"):
        program.write_text(STAND_IN)
        program.chmod(0o755)
    return {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "HOME": "/nowhere",
        "CALLS": str(tmp_path / "calls"),
        "VENV": str(venv),
        "VLMEVALKIT": str(tmp_path / "VLMEvalKit"),
    }


def install(step: str, environment: dict[str, str]) -> subprocess.CompletedProcess:
    command = [DOCKER / "install.sh", step]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def test_package_applies_and_verifies_in_a_home_of_its_own(environment):
    result = install("package", environment)
    assert result.returncode == 0, result.stderr
    called = Path(environment["CALLS"]).read_text().splitlines()
    assert [re.sub(r" HOME=.*", "", line) for line in called[1:]] == [
        f"qwen-merge overlay apply vlmevalkit --root {environment['VLMEVALKIT']}",
        "qwen-merge overlay apply transformers llamafactory",
        f"qwen-merge overlay verify vlmevalkit --root {environment['VLMEVALKIT']}",
        "qwen-merge overlay verify transformers llamafactory vllm",
    ]
    assert re.fullmatch(rf"uv pip install .* -e {re.escape(str(ROOT))} HOME=.*", called[0])
    assert not any(line.endswith("HOME=/nowhere") for line in called[1:])


@pytest.mark.parametrize("failing", ["overlay verify vlmevalkit", "overlay verify transformers", "overlay apply"])
def test_a_check_that_fails_stops_the_build(environment, failing):
    assert install("package", environment | {"FAIL_AT": failing}).returncode == 1
    assert failing in Path(environment["CALLS"]).read_text().splitlines()[-1]


@pytest.fixture
def repository(tmp_path, environment) -> Path:
    """A VLMEvalKit of two commits, of which the first one is wanted."""
    folder = tmp_path / "upstream"
    (folder / "vlmeval").mkdir(parents=True)
    git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "init", "-q", folder], check=True)
    for content in ("pytest\n", "pytest\nno-such-package\n"):
        (folder / "requirements.txt").write_text(content)
        (folder / "vlmeval/__init__.py").write_text("")
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    environment["VLMEVALKIT_URL"] = f"file://{folder}"
    return folder


def commit(repository: Path, name: str) -> str:
    command = ["git", "-C", repository, "rev-parse", name]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_vlmevalkit_is_fetched_alone_and_importable(environment, repository):
    result = install("vlmevalkit", environment | {"VLMEVALKIT_COMMIT": commit(repository, "HEAD~1")})
    assert result.returncode == 0, result.stderr
    checkout = Path(environment["VLMEVALKIT"])
    assert commit(checkout, "HEAD") == commit(repository, "HEAD~1")
    history = ["git", "-C", checkout, "rev-list", "--all", "HEAD"]
    assert len(subprocess.run(history, capture_output=True, text=True, check=True).stdout.split()) == 1
    code = "import os, vlmeval; print(os.path.realpath(vlmeval.__file__))"
    found = subprocess.run(
        [f"{environment['VENV']}/bin/python", "-c", code], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == str((checkout / "vlmeval/__init__.py").resolve())


def test_requirements_of_vlmevalkit_that_the_lock_does_not_meet_stop_the_build(environment, repository):
    result = install("vlmevalkit", environment | {"VLMEVALKIT_COMMIT": commit(repository, "HEAD")})
    assert result.returncode == 2
    assert "requirements.txt is not met: no-such-package (installed: none)" in result.stderr


# --- layer.py: which pins are there already ---


def pin(line: str) -> str:
    return f"{line} \\\n{HASH}    # via something\n"


def distribution(site: Path, name: str, version: str, requires=(), entry_points: str = "") -> None:
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")
    if entry_points:
        (folder / "entry_points.txt").write_text(entry_points)


@pytest.fixture
def sites(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The site-packages of an environment, and of the base behind it."""
    monkeypatch.setattr(layer.sys, "prefix", str(tmp_path / "venv"))
    own, base = tmp_path / "venv/lib/site-packages", tmp_path / "base/lib/site-packages"
    own.mkdir(parents=True)
    base.mkdir(parents=True)
    return own, base


def plan(sites, lock: str, **options):
    return layer.make_plan(layer.read_lock(lock), layer.installed([str(site) for site in sites]), **options)


def names(pins) -> list[str]:
    return [each.name for each in pins]


def test_only_the_exact_version_is_kept(sites):
    _, base = sites
    distribution(base, "vllm", "0.9.1")
    distribution(base, "numpy", "2.2.6")
    distribution(base, "Flask_Cors", "5.0.0")  # spelt as pip may spell it
    distribution(base, "later", "1.0.post1")
    lock = "".join(map(pin, ("vllm==0.9.1", "numpy==1.26.4", "flask-cors==5.0.0", "later==1.0", "new==3")))
    found = plan(sites, lock)
    assert names(found.keep) == ["vllm", "flask-cors"]
    assert names(found.install) == ["numpy", "later", "new"]
    assert "".join(each.block for each in found.install) == "".join(map(pin, ("numpy==1.26.4", "later==1.0", "new==3")))


def test_the_first_on_the_path_counts(sites):
    own, base = sites
    distribution(own, "numpy", "1.26.4")
    distribution(base, "numpy", "2.2.6")
    assert names(plan(sites, pin("numpy==1.26.4")).keep) == ["numpy"]
    assert names(plan(sites[::-1], pin("numpy==1.26.4")).install) == ["numpy"]


def test_markers_choose_the_pin():
    lock = pin("scipy==1.0 ; python_version < '3'") + pin("scipy==1.17.1 ; python_version >= '3'")
    assert [(each.name, each.version) for each in layer.read_lock(lock)] == [("scipy", "1.17.1")]
    with pytest.raises(layer.LayerError, match=r"pins scipy twice for this Python: 1.0, 1.17.1"):
        layer.read_lock(pin("scipy==1.0") + pin("scipy==1.17.1"))


@pytest.mark.parametrize("block", ["numpy>=1\n" + HASH, "numpy==1\n", "-r other.txt\n", "numpy==1,<2 \\\n" + HASH])
def test_a_lock_holds_pins_with_hashes_only(block):
    with pytest.raises(layer.LayerError, match="expected 'name==version' with at least one --hash"):
        layer.read_lock(block)


def test_what_an_overlay_changes_lies_in_the_environment(sites):
    own, base = sites
    distribution(base, "transformers", "4.52.3")
    lock = pin("transformers==4.52.3")
    assert names(plan(sites, lock).keep) == ["transformers"]
    assert names(plan(sites, lock, own=["transformers"]).install) == ["transformers"]
    distribution(own, "transformers", "4.52.3")
    assert names(plan(sites, lock, own=["transformers"]).keep) == ["transformers"]
    assert plan(sites, lock, without=["transformers"]) == layer.Plan([], [], {})


CUDA = "".join(map(pin, ("torch==2.7.0", "nvidia-cublas-cu12==12.6.4.1", "triton==3.3.0", "pynvml==12", "numpy==1")))
NEEDS = (
    "nvidia-cublas-cu12==12.8.3.14; platform_system == 'Linux'",
    "triton==3.3.0",
    "pynvml>=11",
    "opt==1; extra=='x'",
)


def test_another_build_keeps_the_libraries_it_was_built_for(sites):
    _, base = sites
    distribution(base, "torch", "2.7.0+cu128", NEEDS)
    distribution(base, "nvidia-cublas-cu12", "12.8.3.14")
    distribution(base, "triton", "3.3.0")
    distribution(base, "pynvml", "11.5")
    found = plan(sites, CUDA)
    assert names(found.keep) == ["torch", "triton"]
    assert found.builds == {
        "nvidia-cublas-cu12": "12.8.3.14 (lock: 12.6.4.1; torch 2.7.0+cu128 needs nvidia-cublas-cu12==12.8.3.14)"
    }
    assert names(found.install) == ["pynvml", "numpy"], "no '==', or an extra: the lock decides"


def test_the_locks_own_build_leaves_the_lock_in_force(sites):
    _, base = sites
    distribution(base, "torch", "2.7.0", NEEDS)
    distribution(base, "nvidia-cublas-cu12", "12.8.3.14")
    found = plan(sites, CUDA)
    assert found.builds == {}
    assert names(found.install) == ["nvidia-cublas-cu12", "triton", "pynvml", "numpy"]


def test_a_build_whose_libraries_are_missing_is_an_error(sites):
    distribution(sites[1], "torch", "2.7.0+cu128", NEEDS)
    with pytest.raises(
        layer.LayerError, match=r"needs nvidia-cublas-cu12==12.8.3.14; the base has none, the lock 12.6"
    ):
        plan(sites, CUDA)


def run_layer(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, DOCKER / "layer.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_missing_prints_what_can_be_installed_as_it_stands(tmp_path):
    torch = f"torch=={layer.installed()['torch'].version.split('+')[0]}"
    lock = tmp_path / "some.lock"
    lock.write_text("# made by hand\n" + pin(torch) + pin("no-such-package==1"))
    result = run_layer("missing", lock, "--keep", "torch")
    assert (result.returncode, result.stdout) == (0, pin("no-such-package==1"))
    assert result.stderr == "layer: 2 pins: 1 are there, 1 to install\n"
    lost = run_layer("missing", lock, "--keep", "no-such-package")
    assert (lost.returncode, lost.stdout) == (2, "")
    assert "the base image was to bring no-such-package 1 (the base has none)" in lost.stderr
    typo = run_layer("missing", lock, "--own", "tranformers")
    assert (typo.returncode, typo.stderr) == (2, f"layer: not in {lock}: tranformers\n")


@pytest.mark.parametrize("flavour", ["cpu", "gpu"])
def test_the_locks_are_read(flavour):
    text = (ROOT / f"requirements/{flavour}.lock").read_text()
    pins = {each.name: each for each in layer.read_lock(text)}
    assert pins["torch"].version == locked_version("torch", flavour)
    mentioned = {line.split("==")[0] for line in text.splitlines() if re.match(r"[a-z0-9]", line)}
    assert pins.keys() <= mentioned
    assert len(mentioned - pins.keys()) < 30, "most packages are for every Python"
    script = (DOCKER / "install.sh").read_text()
    for option, name in re.findall(r"--(own|without|keep) ([a-z-]+)", script):
        if (option, name, flavour) != ("keep", "vllm", "cpu"):
            assert name in pins


def test_launchers_run_in_the_environment(sites, monkeypatch, tmp_path):
    own, base = sites
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setattr(layer.sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(base))
    (base / "server.py").write_text(
        "import sys\nclass Main:\n    run = staticmethod(lambda: print(sys.orig_argv[0]))\n"
    )
    distribution(base, "server", "1", entry_points="[console_scripts]\nserve = server:Main.run\nkept = server:none\n")
    distribution(own, "mine", "1", entry_points="[console_scripts]\nmine = server:none\n")
    (python.parent / "kept").write_text("as it was")
    assert layer.write_launchers(python.parent, layer.installed([str(own), str(base)])) == ["serve"]
    result = subprocess.run([python.parent / "serve"], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(python)
    assert (python.parent / "kept").read_text() == "as it was"


def test_requirements_are_compared_with_what_is_installed(sites):
    distribution(sites[1], "opencv-python", "4.11.0.86")
    found = layer.installed([str(sites[1])])
    text = "# a comment\nopencv_python>=4.7.0.72\n\nopencv-python>=5\ndotenv\nnone; python_version < '3'\n"
    assert layer.unsatisfied(text, found) == ["opencv-python>=5 (installed: 4.11.0.86)", "dotenv (installed: none)"]


# --- the READMEs ---


def shape(text: str) -> tuple[list[int], list[str]]:
    """The levels of the headings, and the code blocks."""
    blocks = re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [len(level) for level in re.findall(r"^(#+) ", prose, re.MULTILINE)], blocks


def test_both_readmes_have_the_same_headings_and_commands():
    english, chinese = (shape((DOCKER / name).read_text(encoding="utf-8")) for name in ("README.md", "README-CN.md"))
    assert english == chinese
    assert english[0][0] == 1
    assert len(english[1]) >= 6


def test_every_command_of_the_readme_is_sound_shell():
    for block in shape((DOCKER / "README.md").read_text(encoding="utf-8"))[1]:
        code = block.removeprefix("```shell\n").removesuffix("```")
        subprocess.run(["bash", "-n", "-c", code], check=True)


def test_the_scripts_and_recipes_named_in_the_readme_are_there():
    text = (DOCKER / "README.md").read_text(encoding="utf-8")
    for path in set(re.findall(r"\b(?:scripts|examples|src)/[\w./]+\.(?:sh|yaml|py)\b", text)):
        assert (ROOT / path).exists(), path
