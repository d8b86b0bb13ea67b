"""Job files: YAML or JSON that says what to run.

A file holds one job, a list of jobs, or several YAML documents of either. A job
is a mapping of the fields of :meth:`lessor.JobSpec.from_dict`::

    name: train
    command: [python, train.py, --epochs, 3]
    gpus: 1
    memory: 4GiB
    env:
      SEED: 42
    timeout: 2h

Where a text is wanted (``command``, ``env``, ``labels``), a bare YAML scalar is
taken as it is written: ``42`` is "42" and ``1.10`` stays "1.10".
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lessor.errors import InvalidArgument, InvalidJobFile
from lessor.sdk.specs import JobSpec

MAX_FILE_BYTES = 64 * 1024 * 1024
"""The longest job file read."""

STANDARD_INPUT = "-"

_TEXT_LISTS = frozenset({"command"})
_TEXT_MAPPINGS = frozenset({"env", "labels"})
_TEXTS = frozenset(
    {"name", "queue", "runtime", "working_dir", "user", "gpu_model", "dedupe_key", "cpu", "memory", "gpu_memory"}
    | {"backoff", "backoff_max", "timeout", "queue_timeout", "start_timeout", "ttl", "grace", "on_lease_lost"}
)
"""Fields whose scalar is read as written: a name may be 007, a memory 1_0 must not become 10."""


def read_job_file(path: str | Path) -> list[JobSpec]:
    """Returns the jobs of the file at ``path``, or of standard input for ``"-"``.

    Raises:
        InvalidJobFile: It cannot be read, is no YAML or JSON, or a job in it is
            wrong; the message names file, line, field, value and what to do.
    """
    # A name need not be Unicode: what messages show of it has to be.
    name = str(path).encode(errors="backslashreplace").decode()
    try:
        if name == STANDARD_INPUT:
            name = "standard input"
            raw = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with open(path, "rb") as file:
                raw = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidJobFile(
            f"{name}: cannot be read: {error.strerror or error}", remedy="give -f a job file"
        ) from None
    if len(raw) > MAX_FILE_BYTES:
        raise InvalidJobFile(f"{name}: is longer than {MAX_FILE_BYTES} bytes", remedy="split it")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJobFile(f"{name}: is not UTF-8 (byte {error.start})", remedy="save it as UTF-8") from None
    return parse_job_file(text, name=name)


def parse_job_file(text: str, *, name: str = "job file") -> list[JobSpec]:
    """Returns the jobs that ``text`` holds; at least one.

    Args:
        text: YAML or JSON.
        name: What errors call it.

    Raises:
        InvalidJobFile: As :func:`read_job_file`.
    """
    if text.lstrip()[:1] in ("{", "[") and (parsed := _from_json(text)) is not None:
        entries = [_Entry(value, None, {}) for value in parsed]
    else:
        entries = list(_from_yaml(text, name))
    if not entries:
        raise InvalidJobFile(f"{name}: holds no job", remedy='a job needs at least command: ["program", "argument"]')
    jobs = []
    for number, entry in enumerate(entries, 1):
        label = name if len(entries) == 1 else f"{name}: job {number}"
        jobs.append(entry.to_spec(name, label))
    return jobs


@dataclass(frozen=True, slots=True)
class _Entry:
    """One job of a file, not yet checked."""

    value: Any
    line: int | None
    """Where it begins, from 1; None in JSON."""
    lines: dict[str, int]
    """Field → where it stands."""

    def to_spec(self, name: str, label: str) -> JobSpec:
        if not isinstance(self.value, dict):
            where = f"{name}:{self.line}" if self.line else label
            raise InvalidJobFile(
                f"{where}: a job is a {type(self.value).__name__}, not a mapping of fields",
                remedy='write fields such as command: ["python", "train.py"]',
            )
        try:
            return JobSpec.from_dict(self.value)
        except InvalidArgument as error:
            parts = []
            for field, text in error.violations.items():
                line = self.lines.get(field.partition(".")[0].partition("[")[0], self.line)
                parts.append(f"{f'{name}:{line}' if line else label}: {field}: {text}")
            raise InvalidJobFile("; ".join(parts), violations=error.violations, remedy=error.remedy) from None


def _from_json(text: str) -> list[Any] | None:
    """Returns the jobs of a JSON text; None when it is no JSON (it may be YAML's flow style)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) else [value]


def _from_yaml(text: str, name: str) -> Iterator[_Entry]:
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        raise InvalidJobFile(
            f"{name}: is not valid YAML: character {error.position + 1} (#x{error.character:04x}) is not allowed",
            remedy="save it as plain text",
        ) from None
    try:
        while loader.check_node():
            node = loader.get_node()
            if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
                continue
            if node is None:
                return
            for job in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                yield _entry(loader, job, name)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = " ".join(part for part in (error.problem, error.context) if part)
        raise InvalidJobFile(f"{where}: is not valid YAML: {problem}", remedy="check indentation and quotes") from None
    except yaml.YAMLError as error:
        raise InvalidJobFile(f"{name}: is not valid YAML: {error}", remedy="check indentation and quotes") from None
    except RecursionError:
        raise InvalidJobFile(f"{name}: is nested too deeply", remedy="a job is a flat mapping of fields") from None
    finally:
        loader.dispose()


def _entry(loader: yaml.SafeLoader, node: yaml.Node, name: str) -> _Entry:
    line = node.start_mark.line + 1
    if not isinstance(node, yaml.MappingNode):
        return _Entry(loader.construct_object(node, deep=True), line, {})
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        key = str(loader.construct_object(key_node, deep=True))
        at = key_node.start_mark.line + 1
        if key in lines:
            raise InvalidJobFile(
                f"{name}:{at}: {key}: is given twice (first in line {lines[key]})", remedy="keep one of them"
            )
        lines[key] = at
        values[key] = _value(loader, key, value_node)
    return _Entry(values, line, lines)


def _value(loader: yaml.SafeLoader, key: str, node: yaml.Node) -> Any:
    if key in _TEXT_LISTS and isinstance(node, yaml.SequenceNode):
        return [_as_written(loader, item) for item in node.value]
    if key in _TEXT_MAPPINGS and isinstance(node, yaml.MappingNode):
        return {_as_written(loader, name): _as_written(loader, item) for name, item in node.value}
    if key in _TEXTS or key in _TEXT_LISTS:
        return _as_written(loader, node)
    return loader.construct_object(node, deep=True)


def _as_written(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Returns a scalar as its text, null and anything that is no scalar as what it is."""
    if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
        return str(node.value)
    value = loader.construct_object(node, deep=True)
    return tuple(value) if isinstance(value, list) else value
