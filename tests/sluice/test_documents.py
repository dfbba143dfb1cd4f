from __future__ import annotations

from pathlib import Path

import pytest

from contracts.errors import InvalidFunction
from contracts.functions import FunctionClass, ModelFormat
from sluice.documents import read_functions

EXAMPLES = Path(__file__).parents[2] / "examples" / "functions.yaml"


def document(name: str = "a", *, namespace: str = "", notes: str = "sluice.dev/catalog: mlp", kind: str = "InferenceService") -> str:
    place = f"\n  namespace: {namespace}" if namespace else ""
    return (
        f"apiVersion: serving.kserve.io/v1beta1\nkind: {kind}\nmetadata:\n  name: {name}{place}\n  annotations:\n    {notes}\n"
        "spec:\n  predictor:\n    model:\n      modelFormat:\n        name: sluice-catalog\n"
    )


def test_documents_of_several_files_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(f"{document('a')}---\n---\n{document('b', namespace='team')}")
    (tmp_path / "two.yaml").write_text(document("c"))

    functions = read_functions([tmp_path / "one.yaml", tmp_path / "two.yaml"])

    assert [function.key for function in functions] == ["default/a", "team/b", "default/c"]


WRONG = {
    "an empty file": ("", ["f.yaml", "no document"]),
    "only empty documents": ("---\n---\n", ["f.yaml", "no document"]),
    "a foreign kind": (document(kind="Deployment"), ["document 1", "kind", "Deployment"]),
    "text instead of a mapping": ("hello", ["document 1", "mapping", "hello"]),
    "a list": ("- a\n- b\n", ["document 1", "mapping"]),
    "no YAML": ("a: [1,\n", ["document 1", "YAML", "line"]),
    "no YAML after a good document": (f"{document()}---\na: {{\n", ["document 2", "YAML"]),
    "a Python object": ("!!python/object/apply:os.system ['true']\n", ["document 1", "YAML"]),
    "a key written twice": (document().replace("  name: a\n", "  name: a\n  name: b\n"), ["document 1", "'name'", "twice"]),
    "a name used twice": (f"{document()}---\n{document()}", ["document 2", "default/a", "document 1"]),
    "a name used in two namespaces": (f"{document()}---\n{document(namespace='team')}", ["document 2", "team/a", "default/a"]),
    "a bad value": (document(notes='sluice.dev/catalog: mlp\n    sluice.dev/sm-percent: "101"'), ["document 1", "sm-percent", "101"]),
    "an unknown annotation": (document(notes='sluice.dev/sm-precent: "10"'), ["document 1", "sm-precent"]),
    "a name that is a path": (document("../a"), ["document 1", "metadata.name", "../a"]),
}


@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG)
def test_an_error_says_where_and_what(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)

    with pytest.raises(InvalidFunction) as caught:
        read_functions([path])

    assert str(path) in caught.value.message
    assert [word for word in words if word not in caught.value.message] == []


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff")

    with pytest.raises(InvalidFunction, match=r"missing\.yaml: cannot be read: No such file"):
        read_functions([tmp_path / "missing.yaml"])
    with pytest.raises(InvalidFunction, match=r"latin\.yaml: cannot be read: it is not UTF-8"):
        read_functions([tmp_path / "latin.yaml"])


def test_the_example_holds_real_and_best_effort_functions_whose_shares_one_device_can_guarantee() -> None:
    functions = {function.name: function for function in read_functions([EXAMPLES])}

    assert {"minilm", "silero-vad", "resnet50", "bert-base"} <= functions.keys()
    assert functions["bert-base"].cls is FunctionClass.BEST_EFFORT
    assert all(function.model.format is ModelFormat.CATALOG for function in functions.values())
    assert sum(function.share.area_ppm for function in functions.values()) <= 1_000_000
