import ast
import sys
from pathlib import Path

import pytest

import contracts

MODULES = sorted(Path(contracts.__file__).parent.glob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or ".").partition(".")[0]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_contracts_import_the_standard_library_and_msgspec_alone(path):
    assert set(imported(path)) <= set(sys.stdlib_module_names) | {"contracts", "msgspec"}
