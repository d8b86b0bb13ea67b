"""Generates the Python code of ``proto/`` into ``client/lessor/v1/``.

Three steps: compile to a descriptor set; drop the dependency on
``buf/validate/validate.proto`` (the rules stay in the options as bytes, where
protovalidate reads them), so that clients need no such module; generate code
and type stubs from what is left. Everything comes from the installed packages:
no step reaches the network. See docs/adr/0001-generated-code-without-validate.md.

    python proto/generate.py            # write client/lessor/v1
    python proto/generate.py --check    # exit 1 if client/lessor/v1 differs
"""

from __future__ import annotations

import argparse
import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2
from protovalidate._gen.buf.validate import validate_pb

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
OUTPUT = ROOT / "client" / "lessor" / "v1"
VALIDATE_PROTO = "buf/validate/validate.proto"


def validate_descriptors() -> descriptor_pb2.FileDescriptorSet:
    """Returns ``buf/validate/validate.proto`` and what it imports, compiled.

    protovalidate ships no proto file, but its generated code carries the
    descriptor of one. The lock pins its version, so this changes only with it.
    """
    compiled = descriptor_pb2.FileDescriptorSet()
    for module in (descriptor_pb2, duration_pb2, field_mask_pb2, timestamp_pb2):
        module.DESCRIPTOR.CopyToProto(compiled.file.add())
    compiled.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    return compiled


def protoc(*args: str) -> None:
    """Runs the pinned protoc.

    Raises:
        subprocess.CalledProcessError: protoc found an error and printed it.
    """
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *args], check=True)


def sources(proto: Path = PROTO) -> list[str]:
    """Returns the proto files below ``proto``, relative to it, sorted."""
    return sorted(path.relative_to(proto).as_posix() for path in proto.rglob("*.proto"))


def compile_image(proto: Path, image: Path) -> None:
    """Writes the descriptor set of all proto files below ``proto``, imports and comments included, to ``image``.

    Raises:
        subprocess.CalledProcessError: A proto file does not compile; protoc printed why.
    """
    with tempfile.TemporaryDirectory() as folder:
        imports = Path(folder) / "imports.binpb"
        imports.write_bytes(validate_descriptors().SerializeToString(deterministic=True))
        protoc(f"--descriptor_set_in={imports}", f"-I{proto}", f"--descriptor_set_out={image}",
               "--include_imports", "--include_source_info", *sources(proto))  # fmt: skip


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
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        compile_image(PROTO, image)
        image.write_bytes(without_validate(image.read_bytes()))
        protoc(f"--descriptor_set_in={image}", f"--python_out={output}", f"--grpc_python_out={output}",
               f"--mypy_out=quiet:{output}", f"--mypy_grpc_out=quiet:{output}", *sources())  # fmt: skip
    (output / "lessor" / "v1" / "__init__.py").write_text('"""Generated from proto/lessor/v1; never edited."""\n')


def differences(fresh: Path, committed: Path) -> list[str]:
    """Returns the names of generated files that differ, are missing or are left over in ``committed``."""
    names = sorted({path.name for folder in (fresh, committed) for path in folder.glob("*.py*")})
    _, different, absent = filecmp.cmpfiles(fresh, committed, names, shallow=False)
    return sorted(different + absent)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = Path(folder) / "lessor" / "v1"
        if check:
            changed = differences(fresh, OUTPUT)
            if changed:
                print("client/lessor/v1 is not what proto/ says; run `make generate`:", *changed, file=sys.stderr)
                return 1
            print("generated code: as proto/ says")
            return 0
        OUTPUT.mkdir(parents=True, exist_ok=True)
        for old in OUTPUT.glob("*.py*"):
            old.unlink()
        for new in fresh.iterdir():
            (OUTPUT / new.name).write_bytes(new.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
