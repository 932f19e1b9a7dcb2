"""assemblers.py: which ptxas is taken."""

from __future__ import annotations

from pathlib import Path

import assemblers


def test_the_newest_assembler_is_chosen_unless_it_is_tritons_own(monkeypatch):
    for found, expected in (
        ({"12.8.93": "own", "13.1.80": "b", "13.10.2": "c", "0": "broken"}, "c"),
        ({"13.1.80": "own", "12.8.93": "b"}, None),
        ({}, None),
    ):
        monkeypatch.setattr(assemblers, "assemblers", lambda found=found: found)
        assert assemblers.newer_ptxas() == expected


def test_versions_are_what_programs_say(tmp_path: Path):
    for text, version in (("release 13.5, V13.5.37", "13.5.37"), ("no version", "0")):
        program = tmp_path / "ptxas"
        program.write_text(f"#!/bin/sh\necho '{text}'\n")
        program.chmod(0o755)
        assert assemblers.ptxas_version(program) == version
    assert assemblers.ptxas_version(tmp_path / "absent") == "0"
