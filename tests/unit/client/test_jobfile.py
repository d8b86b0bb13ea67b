"""Job files."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from lessor.errors import InvalidJobFile
from lessor.jobfile import parse_job_file, read_job_file


def test_one_job() -> None:
    [spec] = parse_job_file(
        """
name: train
command: [python, train.py, --epochs, 3, --rate, 1.10]
gpus: 1
memory: 4GiB
env: {SEED: 42, DEBUG: yes}
labels:
  team: 007
selectors: ["zone in (a,b)"]
timeout: 2h
ttl: 90
"""
    )
    assert spec.argv == ("python", "train.py", "--epochs", "3", "--rate", "1.10")
    assert spec.env == {"SEED": "42", "DEBUG": "yes"}
    assert spec.labels == {"team": "007"}
    assert spec.timeout == timedelta(hours=2)
    assert spec.ttl == timedelta(seconds=90)


def test_several_jobs() -> None:
    lists = parse_job_file("- command: a\n- command: b --x 1\n")
    documents = parse_job_file("command: a\n---\n- command: [b, --x, '1']\n---\n")
    assert [spec.argv for spec in lists] == [("a",), ("b", "--x", "1")]
    assert documents == lists
    assert parse_job_file('[{"command": ["a"]}, {"command": ["b", "--x", "1"]}]') == lists
    assert parse_job_file('{\n\t"command": "a"\n}') == lists[:1]
    assert parse_job_file("{command: a}") == lists[:1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("command: [a\ngpus: 1", r"f.yaml:2:\d+: is not valid YAML: .*check indentation"),
        ("a: b: c", r"f.yaml:1:5: is not valid YAML: mapping values are not allowed here"),
        ("command: a\ngpus: -1\n", r"f.yaml:2: gpus: -1 is negative; give 0 or more"),
        ("command: a\n\ngpu: 1\n", r"f.yaml:3: gpu: unknown field; did you mean 'gpus'\?"),
        ("command: a\nmemory: 4gib\n", r"f.yaml:2: memory: '4gib' has the unknown unit .*did you mean \"4GiB\""),
        ("command: a\nmemory: 4gib\ngpus: x\n", r"f.yaml:2: memory: .*; f.yaml:3: gpus: 'x' is a str"),
        ("command: a\nenv: {A: }\n", r"f.yaml:2: env.A: None is a NoneType; give a text"),
        ("command: a\nenv: {A: [1]}\n", r"f.yaml:2: env.A: "),
        ("command: a\ncommand: b\n", r"f.yaml:2: command: is given twice \(first in line 1\)"),
        ("command: a | b", r"f.yaml:1: command: .*needs a shell"),
        ("name: x", r"f.yaml:1: command: is missing"),
        ("- command: a\n- name: x", r"f.yaml:2: command: is missing"),
        ("", r"f.yaml: holds no job"),
        ("- 3", r"f.yaml:1: a job is a int, not a mapping"),
        ('[{"command": ["a"]}, {"gpus": 1}]', r"f.yaml: job 2: command: is missing"),
        ('{"command": ["a"], "env": {"A": 1}}', r"f.yaml: env.A: 1 is a int"),
        ("command: a\nx: !!python/object:os.system {}\n", r"f.yaml:2:4: is not valid YAML: could not determine"),
        ("command: a\nselectors: ['(']\n", r"f.yaml:2: selectors\[0\]: '\(' is not a label selector"),
        ("a: \x07", r"f.yaml: is not valid YAML"),
        ("? [a, b]\n: 1\n", r"f.yaml:1: .*unknown field"),
    ],
)
def test_each_mistake_is_one_line_that_says_where(text: str, message: str) -> None:
    with pytest.raises(InvalidJobFile, match=message) as error:
        parse_job_file(text, name="f.yaml")
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidJobFile, match=r"nope.yaml: cannot be read: No such file"):
        read_job_file(tmp_path / "nope.yaml")
    with pytest.raises(InvalidJobFile, match="cannot be read: Is a directory"):
        read_job_file(tmp_path)
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"command: \xe9")
    with pytest.raises(InvalidJobFile, match=r"is not UTF-8 \(byte 9\)"):
        read_job_file(file)
    file.write_bytes(b"\xef\xbb\xbfcommand: a")
    assert read_job_file(file)[0].argv == ("a",)
