"""The accuracy report, by its command line."""

import json

import pytest

from sagepp import __main__ as cli

SMALL = ["--seq-len", "128", "--heads", "1", "--rows", "128"]


def test_accuracy_is_reported_for_every_plan_and_part(tmp_path, capsys):
    file = tmp_path / "accuracy.json"
    arguments = ["--head-dim", "64", "--distributions", "normal", "--plans", "sm_89:mma", "sm_80:mma_fp16"]
    assert cli.main(["accuracy", *SMALL, *arguments, "--parts", "--json", str(file)]) == 0
    records = json.loads(file.read_text())
    assert [(r["kernel"], r["is_causal"]) for r in records] == [
        ("mma", False), ("mma_fp16", False), ("mma", True), ("mma_fp16", True)]
    for record in records:
        assert 0 < record["relative_l1"] < 0.05 and record["cosine"] > 0.998
        assert all(record[part] < 1.2 * record["relative_l1"] for part in ("Q and K", "P", "V", "accumulator"))
    assert "mma_fp16" in capsys.readouterr().out


def test_unknown_arguments_are_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["info", "--seq-len", "1"])
    assert "--seq-len" in capsys.readouterr().err
