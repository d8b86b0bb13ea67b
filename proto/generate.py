"""Generates the Python code of ``proto/`` into ``client/lessor/v1/``.

Three steps: compile to a descriptor set; drop the dependency on
``buf/validate/validate.proto`` (the rules stay in the options as bytes, where
protovalidate reads them), so that clients need no such module; generate code
and type stubs from what is left.

    python proto/generate.py            # write client/lessor/v1
    python proto/generate.py --check    # exit 1 if client/lessor/v1 differs
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path

from google.protobuf import descriptor_pb2

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
DEPS = ROOT / ".proto-deps"
OUTPUT = ROOT / "client" / "lessor" / "v1"
VALIDATE_PROTO = "buf/validate/validate.proto"
# The sdist of protovalidate carries the proto file; its wheels do not.
VALIDATE_SDIST = "protovalidate==2.1.0"


def fetch_dependencies() -> None:
    """Puts ``buf/validate/validate.proto`` below ``.proto-deps``, once."""
    target = DEPS / VALIDATE_PROTO
    if target.exists():
        return
    requirements = ROOT / "requirements" / "proto-deps.txt"
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
             "--require-hashes", "--requirement", str(requirements), "--dest", folder],
            check=True,
        )  # fmt: skip
        (archive,) = Path(folder).glob("protovalidate-*.tar.gz")
        with tarfile.open(archive) as tar:
            member = next(m for m in tar if m.name.endswith("/proto/" + VALIDATE_PROTO))
            source = tar.extractfile(member)
            assert source is not None
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())


def protoc(*args: str) -> None:
    """Runs the pinned protoc.

    Raises:
        subprocess.CalledProcessError: protoc found an error and printed it.
    """
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *args], check=True)


def without_validate(data: bytes) -> bytes:
    """Returns a descriptor set with the validation file and imports of it removed."""
    compiled = descriptor_pb2.FileDescriptorSet.FromString(data)
    kept = descriptor_pb2.FileDescriptorSet()
    for file in compiled.file:
        if file.name == VALIDATE_PROTO:
            continue
        dependencies = [name for name in file.dependency if name != VALIDATE_PROTO]
        del file.dependency[:]
        file.dependency.extend(dependencies)
        kept.file.append(file)
    return kept.SerializeToString(deterministic=True)


def generate(output: Path) -> None:
    """Writes ``lessor/v1`` below ``output``."""
    fetch_dependencies()
    sources = sorted(str(p.relative_to(PROTO)) for p in PROTO.glob("lessor/v1/*.proto"))
    well_known = str(files("grpc_tools") / "_proto")
    with tempfile.TemporaryDirectory() as folder:
        compiled = Path(folder) / "all.binpb"
        protoc(f"-I{PROTO}", f"-I{DEPS}", f"-I{well_known}", f"--descriptor_set_out={compiled}",
               "--include_imports", "--include_source_info", *sources)  # fmt: skip
        compiled.write_bytes(without_validate(compiled.read_bytes()))
        protoc(f"--descriptor_set_in={compiled}", f"--python_out={output}", f"--grpc_python_out={output}",
               f"--mypy_out=quiet:{output}", f"--mypy_grpc_out=quiet:{output}", *sources)  # fmt: skip
    (output / "lessor" / "v1" / "__init__.py").write_text('"""Generated from proto/lessor/v1; never edited."""\n')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / "lessor" / "v1"
        if check:
            names = sorted({p.name for p in fresh.iterdir()} | {p.name for p in OUTPUT.glob("*.py*")})
            _, different, missing = filecmp.cmpfiles(fresh, OUTPUT, names, shallow=False)
            if different or missing:
                print("generated code differs from proto/: run `make generate`:", *different, *missing, file=sys.stderr)
                return 1
            return 0
        OUTPUT.mkdir(parents=True, exist_ok=True)
        for old in OUTPUT.glob("*.py*"):
            old.unlink()
        for new in fresh.iterdir():
            (OUTPUT / new.name).write_bytes(new.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
