"""Builds hwprune._cpp, and hwprune._cuda where nvcc is found, through ninja. Needs neither torch nor a GPU.

Objects, build.ninja and compile_commands.json stay in build/, so that a second build compiles only what has changed.

HWPRUNE_CUDA=0|1|auto         never, always, or only where nvcc is found (default: auto)
HWPRUNE_CUDA_ARCHS=80;90;100  chips to compile for; the last is also kept as PTX
CUDA_HOME                     the toolkit, if nvcc is not on PATH
CXX, CXXFLAGS, LDFLAGS        the compiler and what to add to its command lines
MAX_JOBS                      compilations at a time
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

import ninja
import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"


def cuda_home():
    """The CUDA toolkit's folder, or None. nvcc on PATH may be a script that lies elsewhere, so headers decide."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    return next((Path(home) for home in homes if home and Path(home, "include", "cuda_runtime.h").exists()), None)


def extensions():
    yield Extension("hwprune._cpp", sorted(glob("csrc/cpu/*.cpp")), libraries=["dl", "pthread"])
    want, home = os.environ.get("HWPRUNE_CUDA", "auto"), cuda_home()
    if want not in ("0", "1", "auto"):
        raise SystemExit(f"HWPRUNE_CUDA={want} is not one of 0, 1, auto.")
    if want == "1" and home is None:
        raise SystemExit("HWPRUNE_CUDA=1, but no CUDA toolkit was found: set CUDA_HOME, or put nvcc on PATH.")
    if want != "0" and home is not None:
        sources = sorted(glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu"))
        yield Extension(
            "hwprune._cuda",
            sources,
            include_dirs=[str(home / "include")],
            library_dirs=[str(home / "lib64")],
            libraries=["cudart_static", "dl", "pthread", "rt"],
        )


def pybind11_headers():
    """A copy of pybind11's headers under build/: pip's isolated environment is a new folder each time, and a new
    include path would compile everything again."""
    copy = BUILD / f"pybind11-{pybind11.__version__}"
    if not copy.exists():
        partial = copy.with_suffix(f".{os.getpid()}")
        shutil.copytree(pybind11.get_include(), partial)
        partial.rename(copy)
    return copy


class NinjaBuild(build_ext):
    """build_ext that describes all extensions to ninja, runs it, and hands over what it linked."""

    def build_extensions(self):
        folder = BUILD / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "build.ninja").open("w") as file:
            writer = Writer(file, width=120)
            writer.variable("builddir", str(folder))  # where ninja keeps its own log
            self.write_rules(writer)
            libraries = [self.write_extension(writer, extension, folder) for extension in self.extensions]
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-f", str(folder / "build.ninja")]
        database = subprocess.run([*command, "-t", "compdb"], cwd=ROOT, check=True, capture_output=True).stdout
        (BUILD / "compile_commands.json").write_bytes(database)
        jobs = os.environ.get("MAX_JOBS")
        if subprocess.run([*command, *(["-j", jobs] if jobs else [])], cwd=ROOT).returncode:
            raise SystemExit("The native code did not compile: see the compiler's message above.")
        for extension, library in zip(self.extensions, libraries, strict=True):
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, target)

    @staticmethod
    def write_rules(writer):
        home = cuda_home()
        archs = os.environ.get("HWPRUNE_CUDA_ARCHS", "80;90;100").split(";")
        gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        gencode.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        writer.variable("cxx", os.environ.get("CXX", "c++"))
        # Nobody reads errno or the floating-point traps, and some loops become vector code only without them.
        vectors = "-fopenmp-simd -fno-math-errno -fno-trapping-math"
        writer.variable("cxxflags", f"-std=c++17 -O3 -fPIC -fvisibility=hidden {vectors} -Wall -Wextra")
        writer.variable("nvccflags", ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", *gencode])
        writer.variable("extra_cxxflags", os.environ.get("CXXFLAGS", ""))
        writer.variable("extra_ldflags", os.environ.get("LDFLAGS", ""))
        compile_cxx = "$cxx $cxxflags $extra_cxxflags $includes -MMD -MF $out.d -c $in -o $out"
        writer.rule("cxx", compile_cxx, description="CXX $in", depfile="$out.d", deps="gcc")
        if home is not None:
            compile_cuda = f"{home / 'bin' / 'nvcc'} $nvccflags $includes -MD -MF $out.d -c $in -o $out"
            writer.rule("nvcc", compile_cuda, description="NVCC $in", depfile="$out.d", deps="gcc")
        link = ["$cxx", *shared, "$in", "-o", "$out", "$extra_ldflags", "$libraries"]
        writer.rule("link", " ".join(link), description="LINK $out")

    @staticmethod
    def write_extension(writer, extension, folder):
        ours = ["-Icsrc", "-Icsrc/include", *(f"-isystem {path}" for path in extension.include_dirs)]
        python = [f"-isystem {pybind11_headers()}", f"-isystem {sysconfig.get_path('include')}"]
        objects = []
        for source in map(Path, extension.sources):
            target = folder / source.with_suffix(source.suffix + ".o")
            includes = ours + python if source.stem.endswith("bindings") else ours
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            objects += writer.build(str(target), rule, str(source), variables={"includes": " ".join(includes)})
        library = folder / f"{extension.name}.so"
        libraries = [f"-L{path}" for path in extension.library_dirs] + [f"-l{name}" for name in extension.libraries]
        writer.build(str(library), "link", objects, variables={"libraries": " ".join(libraries)})
        return library


setup(
    packages=[*find_packages(include=["hwprune", "hwprune.*"]), "hwprune.kernels", "hwprune.latency_tables"],
    package_dir={"hwprune.kernels": "kernels", "hwprune.latency_tables": "latency_tables"},
    package_data={"hwprune": ["py.typed"], "hwprune.ops": ["*.json"], "hwprune.latency_tables": ["*.jsonl"]},
    ext_modules=list(extensions()),
    cmdclass={"build_ext": NinjaBuild},
)
