# SPDX-License-Identifier: Apache-2.0
"""What the pages for contributors name is there."""

import re

import pytest
from conftest import ROOT


PACKAGE = ROOT / "optimum_chatglm_ov"
NAMED = re.compile(r"`([\w/]+\.(?:py|cpp|hpp|txt|md))(?:: ([\w., ]+))?`")


@pytest.mark.parametrize("page", [ROOT / "CONTRIBUTING.md", PACKAGE / "ARCHITECTURE.md"], ids=lambda page: page.name)
def test_files_and_functions_exist(page):
    """`file` or `file: name, Class.name`, the file as the package or the project has it."""
    named = [found for found in NAMED.findall(page.read_text(encoding="utf-8")) if "NAME" not in found[0]]
    assert len(named) > 10
    missing = []
    for file, names in named:
        path = next((folder / file for folder in (PACKAGE, ROOT) if (folder / file).is_file()), None)
        if path is None:
            missing.append(file)
            continue
        text = path.read_text(encoding="utf-8")
        last_names = [name.rpartition(".")[2] for name in filter(None, names.split(", "))]
        missing += [f"{file}: {name}" for name in last_names if not re.search(rf"\b{name}\b", text)]
    assert not missing


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "README.zh.md", ROOT / "CONTRIBUTING.md"])
def test_links_to_files(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (ROOT / link).exists(), link
