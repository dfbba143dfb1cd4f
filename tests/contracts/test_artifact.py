import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.artifact import Gate, Program, Signature, TensorEntry, TensorSpec, Text, WeightIndex, decode_index
from contracts.errors import InvalidArtifact, InvalidTensor

SIGNATURE = Signature(
    inputs=(TensorSpec("ids", "INT64", ("batch", "length")), TensorSpec("mask", "INT64", ("batch", "length"))),
    outputs=(TensorSpec("embedding", "FP32", ("batch", 384)), TensorSpec("tokens", "FP16", ("batch", "length", 2))),
)
INDEX = WeightIndex(
    digest="ab12",
    total_bytes=1280,
    tensors=(
        TensorEntry("embed.weight", "float32", (16, 8), 0, 512),
        TensorEntry("scale", "bfloat16", (), 512, 2),
        TensorEntry("head.weight", "float32", (8, 16), 768, 512),
    ),
    gates=(Gate("", 0), Gate("embed", 512), Gate("head", 1280)),
    program=Program("catalog", "mlp", '{"width": 8}'),
    signature=SIGNATURE,
    run_ns=1_000_000,
)


def changed(**values):
    return msgspec.json.encode(msgspec.structs.replace(INDEX, **values))


def entry(**values):
    return (msgspec.structs.replace(INDEX.tensors[0], **values), *INDEX.tensors[1:])


def outputs(*specs):
    return msgspec.structs.replace(SIGNATURE, outputs=specs)


def test_an_index_comes_back_as_it_was_written():
    assert decode_index(msgspec.json.encode(INDEX)) == INDEX


def test_models_that_differ_in_weights_alone_share_a_program():
    other = msgspec.structs.replace(INDEX, digest="cd34", run_ns=5)
    assert other.program_id == INDEX.program_id
    assert msgspec.structs.replace(INDEX, program=Program("catalog", "mlp")).program_id != INDEX.program_id


def padded(*pads, dims=("length",), **more):
    inputs = tuple(msgspec.structs.replace(spec, pad=pad, **more) for spec, pad in zip(SIGNATURE.inputs, pads, strict=True))
    return changed(signature=msgspec.structs.replace(SIGNATURE, inputs=inputs, padded=dims))


def text(**values):
    fields = {"tokenizer": f"{'0' * 64}.tokenizer", "max_tokens": 8} | values
    return changed(signature=msgspec.structs.replace(SIGNATURE, text=Text(**fields)))


@pytest.mark.parametrize("data", [padded(0, 0), padded(1 << 62, 0), padded(-5, 1), text(), text(max_tokens=1)])
def test_padding_and_text_are_part_of_a_signature(data):
    assert msgspec.json.encode(decode_index(data)) == data


@pytest.mark.parametrize(
    ("dtype", "right", "wrong"),
    [
        ("BOOL", 1, 2),
        ("UINT8", 255, 256),
        ("UINT8", 0, -1),
        ("INT8", -128, -129),
        ("INT32", 1 << 30, 1 << 31),
        ("FP16", 256, 257),
        ("BF16", -256, -257),
    ],
)
def test_what_pads_an_input_must_be_a_value_of_its_type(dtype, right, wrong):
    assert decode_index(padded(right, right, dtype=dtype)).signature.inputs[0].pad == right
    with pytest.raises(InvalidArtifact, match=rf"ids: must say with which {dtype} it is padded, got {wrong}"):
        decode_index(padded(wrong, right, dtype=dtype))


WHOLE = msgspec.json.encode(INDEX)
BROKEN = {
    "nothing": b"",
    "half of it": WHOLE[: len(WHOLE) // 2],
    "a byte that is no text": WHOLE.replace(b"ab12", b"ab\xff2"),
    "another document": b'{"format": "pt"}',
    "a list": b"[]",
    "deeply nested": b"[" * 100_000,
    "another version": changed(version=2),
    "a digest that leads out of the store": changed(digest="../../etc/passwd"),
    "a digest that is empty": changed(digest=""),
    "a digest that is the folder above": changed(digest=".."),
    "a program file that leads out of the store": changed(program=Program("torch-export", "../evil")),
    "a tensor that is not aligned": changed(tensors=entry(offset=4)),
    "a tensor before the start": changed(tensors=entry(offset=-256)),
    "a tensor with fewer bytes than its shape": changed(tensors=entry(nbytes=508)),
    "a tensor with a negative size": changed(tensors=entry(shape=(-16, -8))),
    "a tensor of an unknown dtype": changed(tensors=entry(dtype="object")),
    "tensors that overlap": changed(tensors=(INDEX.tensors[0], msgspec.structs.replace(INDEX.tensors[2], offset=256))),
    "a tensor beyond the end": changed(total_bytes=1279),
    "a negative total": changed(total_bytes=-1, tensors=()),
    "no gates": changed(gates=()),
    "gates that fall": changed(gates=(Gate("", 512), Gate("head", 0))),
    "a gate before the start": changed(gates=(Gate("", -1),)),
    "a gate beyond the end": changed(gates=(Gate("", 1281),)),
    "an output of an unknown dtype": changed(signature=outputs(TensorSpec("y", "FP8", ("batch",)))),
    "an output of negative size": changed(signature=outputs(TensorSpec("y", "FP32", ("batch", -1)))),
    "a padded dimension that no input has": padded(0, 0, dims=("beams",)),
    "padded rows": padded(0, 0, dims=("batch",)),
    "an input that does not say what pads it": padded(0, None),
    "a padded model that takes no batches": changed(signature=msgspec.structs.replace(SIGNATURE, padded=("length",), batchable=False)),
    "a tokenizer that leads out of the store": text(tokenizer="../" + "0" * 61 + ".tokenizer"),
    "a tokenizer without a digest": text(tokenizer="words.tokenizer"),
    "no tokens": text(max_tokens=0),
    "fewer tokens than the fewest": text(min_tokens=9),
    "a text by the name of another input": text(name="mask"),
    "an output whose size follows from no input": changed(signature=outputs(TensorSpec("y", "FP32", ("batch", "beams")))),
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_a_broken_index_is_refused(data):
    with pytest.raises(InvalidArtifact, match="index"):
        decode_index(data)


@given(st.integers(0, len(WHOLE) - 1), st.integers(0, 255))
def test_one_wrong_byte_gives_a_sound_index_or_an_error_of_ours(at, byte):
    try:
        index = decode_index(WHOLE[:at] + bytes([byte]) + WHOLE[at + 1 :])
    except InvalidArtifact:
        return
    assert max(tensor.offset + tensor.nbytes for tensor in index.tensors) <= index.total_bytes


def shapes(ids=("INT64", (3, 7)), mask=("INT64", (3, 7)), **more):
    return {"ids": ids, "mask": mask} | more


def test_binding_finds_the_named_sizes_and_with_them_the_outputs():
    sizes = SIGNATURE.bind(shapes())
    assert sizes == {"batch": 3, "length": 7}
    found = [(spec.name, shape, nbytes) for spec, shape, nbytes in SIGNATURE.output_shapes(sizes)]
    assert found == [("embedding", (3, 384), 3 * 384 * 4), ("tokens", (3, 7, 2), 3 * 7 * 2 * 2)]


MISFITS = {
    "another dtype": (shapes(ids=("INT32", (3, 7))), "ids", "INT32"),
    "a dimension too few": (shapes(ids=("INT64", (3,))), "ids", [3]),
    "a dimension too many": (shapes(mask=("INT64", (3, 7, 1))), "mask", [3, 7, 1]),
    "one name with two sizes": (shapes(mask=("INT64", (3, 8))), "mask", [3, 8]),
    "no rows": (shapes(ids=("INT64", (0, 7))), "ids", [0, 7]),
    "negative rows": (shapes(ids=("INT64", (-1, 7))), "ids", [-1, 7]),
    "an input that there is not": (shapes(pixels=("FP32", (1,))), "inputs", "pixels"),
    "an input that is missing": ({"ids": ("INT64", (3, 7))}, "inputs", "mask"),
    "nothing": ({}, "inputs", "ids"),
}


@pytest.mark.parametrize(("given_", "key", "value"), MISFITS.values(), ids=MISFITS)
def test_inputs_that_do_not_fit_are_named(given_, key, value):
    with pytest.raises(InvalidTensor) as caught:
        SIGNATURE.bind(given_)
    assert (caught.value.key, caught.value.value) == (key, value)


def test_a_fixed_dimension_takes_its_own_size_alone():
    fixed = Signature(inputs=(TensorSpec("x", "FP32", ("batch", 3)),), outputs=(TensorSpec("y", "BOOL", ("batch",)),))
    assert fixed.bind({"x": ("FP32", [5, 3])}) == {"batch": 5}
    with pytest.raises(InvalidTensor, match="must fit"):
        fixed.bind({"x": ("FP32", [5, 4])})


def test_text_is_one_more_input_of_one_text_a_row():
    index = decode_index(text())
    assert index.signature.accepts == (*SIGNATURE.inputs, TensorSpec("text", "BYTES", ("batch", 1)))
    assert SIGNATURE.accepts == SIGNATURE.inputs
