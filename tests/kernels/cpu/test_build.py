"""How the compiled kernels are found, built and kept. A stand-in of a compiler copies a library, and counts."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lte_lightning.cli import main
from lte_lightning.files import hold_folder, read_json
from lte_lightning.kernels.cpu import build as cpu_build
from lte_lightning.kernels.cpu.build import BuildError, build, build_into, find, library
from lte_lightning.kernels.cpu.costs import _costs
from lte_lightning.kernels.cpu.instructions import instruction_set


@pytest.fixture(scope="session")
def portable(tmp_path_factory):
    """A library of portable kernels: that of the user's cache, which test_ffn.py runs and compiles if there is none."""
    folder = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CXX", "LTE_KERNELS"):
            patch.delenv(name, raising=False)
        found = Path(build("portable")._name)
        if found.exists():
            return Path(shutil.copy(found, folder))
        return build_into(folder, "portable")  # there is no cache that can be written to


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The user's cache, which is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    return tmp_path / "cache" / "lte-lightning"


@pytest.fixture
def compiler(tmp_path, portable):
    """A compiler by that name, which takes as long as $DELAY; its runs are lines of the file ``runs``."""
    folder = tmp_path / "compiler"
    folder.mkdir()
    script = folder / "c++"
    script.write_text(
        f'#!/bin/sh\necho run >> {folder}/runs\nsleep "${{DELAY:-0}}"\n'
        f'while [ "$1" != -o ]; do shift; done\ncp {portable} "$2"\n'
    )
    script.chmod(0o755)
    return folder


@pytest.fixture
def counted(compiler, monkeypatch):
    """Says how often that compiler ran, which is found by its usual name."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{compiler}:/bin:/usr/bin")
    return lambda: (compiler / "runs").read_text().count("run") if (compiler / "runs").exists() else 0


def in_own_process(code, **options):
    """A fresh process, for what a test must not do to this one."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, **options)


def test_compiles_once_and_the_library_appears_whole(cache, counted):
    assert build("portable").lte_ffn
    (kept,) = cache.iterdir()
    before = kept.stat().st_mtime_ns
    build("portable")
    assert counted() == 1
    assert kept.stat().st_mtime_ns == before
    assert list(Path(os.environ["TMPDIR"]).iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "another", "no library"])
def test_a_damaged_library_is_never_loaded_and_built_anew(damage, cache, counted, portable, caplog):
    build("portable")
    (kept,) = cache.iterdir()
    whole = kept.read_bytes()
    content = {
        "cut": whole[: len(whole) // 2],
        "zeros": bytes(len(whole)),
        "empty": b"",
        "another": whole[:-1] + bytes([whole[-1] ^ 1]),
        "no library": b"#!/bin/sh\n",
    }[damage]
    kept.unlink()  # what this process has loaded stays as it is
    kept.write_bytes(content)
    assert build("portable").lte_ffn
    assert kept.read_bytes() == whole
    assert counted() == 2
    assert f"{kept} is damaged" in caplog.text


def test_what_is_cut_while_another_process_uses_it_does_not_stay(cache, counted):
    """The process that a cut library would end is a third one."""
    build("portable")
    (kept,) = cache.iterdir()
    content = kept.read_bytes()
    kept.unlink()
    kept.write_bytes(content[:5000])
    code = "from lte_lightning.kernels.cpu.build import build; print(bool(build('portable').lte_ffn))"
    result = in_own_process(code)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr


@pytest.mark.parametrize("named", [None, "c++ -DLTE=1", "'c++' --of 'this kind'"])
def test_a_library_outlives_its_compiler(named, cache, counted, compiler, monkeypatch):
    if named:
        monkeypatch.setenv("CXX", named)
    build("portable")
    monkeypatch.setenv("PATH", str(cache))
    assert build("portable").lte_ffn
    monkeypatch.delenv("CXX", raising=False)
    assert build("portable").lte_ffn
    monkeypatch.setenv("CXX", "/no/such/c++")
    assert build("portable").lte_ffn
    assert counted() == 1


def test_what_cxx_names_is_taken_where_there_is_one(cache, counted, monkeypatch):
    build("portable")
    monkeypatch.setenv("CXX", "c++ -DLTE=1")
    build("portable")
    assert (counted(), len(list(cache.iterdir()))) == (2, 2)


READ_ONLY = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # root writes anywhere, unless CAP_DAC_OVERRIDE is taken from it
os.execv(sys.executable, [sys.executable, "-c", '''
import os
from lte_lightning.cache import cache_folder
from lte_lightning.kernels.cpu.build import build
assert cache_folder() is None
print(bool(build("portable").lte_ffn))
'''])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="takes the right to write anywhere from root")
@pytest.mark.parametrize("holds", [True, False])
def test_a_cache_that_can_only_be_read(holds, cache, counted, compiler):
    cache.mkdir(parents=True)
    if holds:
        build("portable")
    cache.chmod(0o555)
    try:
        result = in_own_process(READ_ONLY)
    finally:
        cache.chmod(0o755)
    assert result.stdout.strip() == "True", result.stderr
    assert counted() == 1
    assert list(Path(os.environ["TMPDIR"]).iterdir()) == []
    assert len(list(cache.iterdir())) == holds


def test_a_cache_that_is_a_file_is_done_without(cache, counted):
    cache.parent.mkdir()
    cache.write_text("in the way")
    assert build("portable").lte_ffn
    assert list(Path(os.environ["TMPDIR"]).iterdir()) == []


def test_a_cache_that_is_full(cache, counted, caplog):
    cache.mkdir(parents=True)
    code = """
import resource
from lte_lightning.kernels.cpu import build
keep = build._keep
def on_a_full_disk(path, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    try:
        return keep(path, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
build._keep = on_a_full_disk
print(bool(build.build("portable").lte_ffn))
"""
    result = in_own_process(code)
    assert result.stdout.strip() == "True", result.stderr
    assert "for this process alone: cannot write" in result.stderr
    assert list(cache.iterdir()) == []


def test_a_user_without_a_home(cache, counted, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    code = """
import pwd
def nobody(number):
    raise KeyError(number)
pwd.getpwuid = nobody
from lte_lightning.kernels.cpu.build import build
print(bool(build("portable").lte_ffn))
"""
    result = in_own_process(code)
    assert result.stdout.strip() == "True", result.stderr


def test_processes_that_come_together_compile_once(cache, counted, monkeypatch):
    monkeypatch.setenv("DELAY", "3")
    code = "from lte_lightning.kernels.cpu.build import build; print(bool(build('portable').lte_ffn))"
    together = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = [process.communicate(timeout=100) for process in together]
    assert [out.strip() for out, _ in said] == ["True"] * 3, said
    assert all("are compiled now" in err for _, err in said)  # who waits is told, too
    assert counted() == 1


def test_a_compiler_that_hangs_is_ended_with_what_it_started(cache, counted, compiler, monkeypatch):
    monkeypatch.setenv("DELAY", "1000.25")
    monkeypatch.setattr(cpu_build, "COMPILER_SECONDS", 0.5)
    with pytest.raises(BuildError, match=r"c\+\+ took more than 0.5 s"):
        build("portable")
    deadline = time.monotonic() + 10
    while (left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_sleep(path)]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    assert left == []
    assert list(cache.iterdir()) == list(Path(os.environ["TMPDIR"]).iterdir()) == []


def is_sleep(path):
    try:
        return path.read_bytes() == b"sleep\x001000.25\x00"
    except OSError:  # it has ended
        return False


def test_another_process_that_never_ends_its_compilation_is_not_waited_for(cache, counted, monkeypatch):
    monkeypatch.setattr(cpu_build, "COMPILER_SECONDS", 2)  # a busy machine starts the compiler in one
    cache.mkdir(parents=True)
    with hold_folder(cache):
        began = time.monotonic()
        assert build("portable").lte_ffn
    assert 4 <= time.monotonic() - began < 30


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("g++ '-O2", r"^CXX is no command: \"g\+\+ '-O2\" \(No closing quotation\)$"),
        ("/no/such/c++ -O2", "^no C\\+\\+ compiler /no/such/c\\+\\+, which CXX names$"),
        ("no-such-compiler", "^no C\\+\\+ compiler no-such-compiler, which CXX names$"),
        ("/usr", "^no C\\+\\+ compiler /usr, which CXX names$"),
        ("/etc/passwd", "^no C\\+\\+ compiler /etc/passwd, which CXX names$"),
        ("true", "^.*true made no library$"),
        ("echo words", "^.*echo words made no library: words -std=c"),
        ("false", "^.*false failed: exit code 1$"),
        ("ls", "^.*ls failed: .*"),
        ("/usr/bin/env", "^/usr/bin/env failed: .*"),
        ("sh -c 'kill -9 $$'", "^.*sh failed: exit code -9$"),
        ("sh -c 'for last; do :; done; echo x > /dev/null; exit 0'", "^.*made no library$"),
    ],
)
def test_a_compiler_that_is_none_is_one_line(named, message, cache, monkeypatch):
    monkeypatch.setenv("CXX", named)
    with pytest.raises(BuildError, match=message) as raised:
        build("portable")
    assert "\n" not in str(raised.value)
    assert list(cache.iterdir()) == []


def test_what_is_no_library_is_not_loaded(cache, compiler, monkeypatch):
    script = compiler / "c++"
    script.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho text > "$2"\n')
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match="that was compiled for portable cannot be loaded"):
        build("portable")


def test_old_libraries_are_removed(cache, counted):
    cache.mkdir(parents=True)
    for age in range(12):
        old = cache / f"cpu_ffn-avx2-{age:016x}.so"  # as they were named before
        old.write_text("old")
        os.utime(old, (1e9 - age, 2e9))
    (cache / "cpu_ffn-avx2-x-y-z.so.tmp").write_text("left by a kill")
    (cache / "help-fit.txt").write_text("not a library")
    build("portable")
    left = sorted(path.name for path in cache.iterdir())
    new = [name for name in left if "portable" in name]
    assert left == sorted([*(f"cpu_ffn-avx2-{age:016x}.so" for age in range(7)), *new, "help-fit.txt"])
    assert len(left) == 9


def test_a_folder_that_was_filled_ahead_of_time(cache, counted, tmp_path, monkeypatch, capsys, compiler):
    main(["build-kernels", "--out", str(tmp_path / "image"), "--instructions", "portable"])
    said = capsys.readouterr().out
    (built,) = (tmp_path / "image").iterdir()
    assert said.splitlines() == [
        f"{built}  {built.stat().st_size // 1024} KiB",
        f"LTE_KERNELS={tmp_path / 'image'} finds them",
    ]
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        build("portable")
    monkeypatch.setenv("LTE_KERNELS", str(tmp_path / "image"))
    assert build("portable").lte_ffn
    monkeypatch.delenv("LTE_KERNELS")
    monkeypatch.setattr(cpu_build, "SHIPPED", tmp_path / "image")  # as in a wheel
    assert build("portable").lte_ffn
    built.chmod(0o644)
    content = built.read_bytes()
    built.unlink()
    built.write_bytes(content[:-1])
    with pytest.raises(BuildError, match="no C\\+\\+ compiler found"):
        build("portable")
    assert built.exists()  # a folder that is not the cache is left as it is


def test_kernels_for_less_than_the_machine_has_are_better_than_none(cache, counted, portable, monkeypatch, caplog):
    if instruction_set() == "portable":
        pytest.skip("this machine has portable kernels alone, and there are none for less")
    monkeypatch.setenv("LTE_KERNELS", str(portable.parent))
    monkeypatch.setenv("PATH", str(cache))
    library.cache_clear()
    try:
        assert library().lte_ffn
    finally:
        library.cache_clear()
    assert f"runs kernels for portable, not for {instruction_set()}: no C++ compiler found" in caplog.text


def test_build_kernels_fills_the_cache_by_default(cache, counted, capsys, monkeypatch):
    main(["build-kernels", "--instructions", "portable,avx2"])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == sorted(
        map(str, cache.iterdir()), reverse=True
    )
    monkeypatch.setenv("PATH", str(cache))
    assert build("portable").lte_ffn


def test_build_kernels_measures_which_way_is_faster(cache, counted, capsys):
    library.cache_clear()
    _costs.cache_clear()
    try:
        main(["build-kernels"])
        _, said = capsys.readouterr().out.splitlines()
        (types,) = read_json(cache / "cpu_costs.json").values()
    finally:
        library.cache_clear()
        _costs.cache_clear()
    threads = torch.get_num_threads()
    assert said == f"measured with {threads} threads: which way is faster in float32, bfloat16, float16"
    assert list(types) == ["float32", "bfloat16", "float16"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--instructions", "avx3"], "there is no instruction set 'avx3' (do you mean 'avx2'?); there are portable,"),
        (["--out", "FILE"], "cannot make FILE: File exists"),
        (["--out", "FILE/within"], "cannot make FILE/within: Not a directory"),
        ([], "no C++ compiler none, which CXX names"),
    ],
)
def test_build_kernels_says_what_is_wrong(words, message, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as stop:
        main(["build-kernels", *(word.replace("FILE", str(tmp_path / "file")) for word in words)])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith(f"error: {message.replace('FILE', str(tmp_path / 'file'))}")


def test_find_looks_for_the_sources_of_this_version(cache, counted, tmp_path, monkeypatch):
    build("portable")
    assert find("portable") is not None
    other = shutil.copytree(cpu_build.SOURCES, tmp_path / "sources")
    (other / "new.h").write_text("// a kernel that was added\n")
    monkeypatch.setattr(cpu_build, "SOURCES", Path(other))
    assert find("portable") is None


@pytest.mark.skipif(sys.platform != "linux", reason="asks the compiler to trap")
def test_no_vector_claims_an_alignment_that_it_lacks(tmp_path):
    """Rows of an odd number of bfloat16 begin at addresses that four does not divide."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("reads such rows with vectors only")
    code = """
import torch
from lte_lightning.kernels.cpu.build import build
from lte_lightning.kernels.cpu.instructions import instruction_set
from lte_lightning.kernels.cpu.ffn import run_compiled
from lte_lightning.kernels.layout import ExpertWeights
lib = build(instruction_set())
for D, S in ((71, 33), (72, 33), (71, 32)):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for offset in (0, 1):
            def make(*shape):
                count = torch.Size(shape).numel()
                return torch.randn(count + offset).to(dtype)[offset:].view(shape)
            biases = make(2, S), make(2, S), make(D)
            weights = ExpertWeights(make(2, S, D), make(2, S, D), "silu", make(2, S, D), *biases)
            for way in ("few", "many"):
                run_compiled(lib, make(40, D), torch.ones(40, 2, dtype=torch.bool), weights, way)
print("aligned")
"""
    trap = tmp_path / "trap"  # it checks what the sources claim, however they are optimised: -O0 compiles in a quarter
    trap.write_text('#!/bin/sh\nexec c++ "$@" -O0 -fsanitize=alignment -fsanitize-undefined-trap-on-error\n')
    trap.chmod(0o755)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(trap)}
    environment.pop("LTE_KERNELS", None)
    result = in_own_process(code, env=environment)
    assert result.stdout.strip() == "aligned", (result.returncode, result.stderr)
