"""TorchScript and exported programs: as they were saved, and refused where they would run more than a model does."""

import contextlib
import io
import json
import re
import warnings
import zipfile

import fsspec
import pytest
import s3fs
import torch
from archives import torch_saved

from torch_s3 import errors, save_checkpoint
from torch_s3.artifacts import load_exported, load_torchscript
from torch_s3.artifacts.exported_check import _is_guard, _is_size

BATCH = torch.arange(24.0).reshape(8, 3)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)
        self.register_buffer("offset", torch.ones(2))
        self.constant = torch.tensor([1.0, 2.0])

    def forward(self, x):
        return self.linear(x) + self.offset * self.constant


class Sizes(torch.nn.Module):
    def forward(self, x, others):
        joined = torch.cat([x * 2, others["a"]]).reshape(-1)
        return joined[: x.shape[0] // 2 + max(1, x.shape[0] % 7)]


class Branches(torch.nn.Module):
    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))


def _exported(model=None, args=(BATCH,), **options):
    file = io.BytesIO()
    torch.export.save(torch.export.export(model or Model(), args, **options), file)
    return file.getvalue()


def _edited(content, **records):
    """With records replaced, by the end of their names, or added."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w") as new:
        names = old.namelist()
        for name in names:
            edit = next((records.pop(end) for end in list(records) if name.endswith(end)), None)
            read = old.read(name)
            new.writestr(name, read if edit is None else edit(read))
        for name, make in records.items():
            new.writestr(f"archive/{name}", make(b""))
    return file.getvalue()


def _with_json(change):
    def edit(content):
        said = json.loads(content)
        change(said)
        return json.dumps(said).encode()

    return edit


# ---------------------------------------------------------------------- TorchScript


def _script(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(model).save_to_buffer()


@pytest.mark.parametrize("reader", ["ours", "s3fs"])
def test_torchscript_computes_as_it_did_without_a_warning(put, s3, reader):
    model = Model()
    uri, where = put(_script(model))
    if reader == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    loaded = load_torchscript(uri, **where)

    assert torch.equal(loaded(BATCH), model(BATCH))


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "a checkpoint"])
def test_what_is_no_torchscript_is_an_error_that_names_it(put, damage, bucket, s3):
    checkpoint = io.BytesIO()
    torch.save({"a": torch.ones(1)}, checkpoint)
    content = {
        "empty": b"",
        "text": b"hello",
        "truncated": _script(Model())[:-300],
        "a checkpoint": checkpoint.getvalue(),
    }[damage]
    uri, where = put(content)

    with pytest.raises(errors.ArtifactError, match=f"^{uri}: (not a TorchScript file|truncated)") as caught:
        load_torchscript(uri, **where)

    assert damage != "a checkpoint" or "load_checkpoint" in str(caught.value)


@pytest.mark.parametrize("end", ["data.pkl", "constants.pkl", ".py", ".debug_pkl", "version"])
def test_damaged_members_of_a_torchscript_with_right_crcs_are_typed_errors(end):
    content, files = _script(Model()), fsspec.filesystem("memory")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        length = min(len(archive.read(name)) for name in archive.namelist() if name.endswith(end))
    for at in range(0, length, 1 + length // 50):
        damaged = _edited(content, **{end: lambda old, at=at: old[:at] + bytes([old[at] ^ 128]) + old[at + 1 :]})
        files.pipe_file("/programs/damaged", damaged)
        with contextlib.suppress(errors.ArtifactError, MemoryError):
            load_torchscript("memory://programs/damaged")


# ---------------------------------------------------------------------- exported programs


@pytest.mark.parametrize("load", [load_torchscript, load_exported])
def test_flipped_bits_are_typed_errors(load):
    """PyTorch compares no CRC: weights were others, and errors of all kinds."""
    content = _script(Model()) if load is load_torchscript else _exported()
    files = fsspec.filesystem("memory")
    for at in range(0, len(content), 23):
        files.pipe_file("/programs/flipped", content[:at] + bytes([content[at] ^ 128]) + content[at + 1 :])
        with contextlib.suppress(errors.S3Error):
            load("memory://programs/flipped")
    at = content.index(torch.ones(2).numpy().tobytes())  # a buffer
    files.pipe_file("/programs/flipped", content[:at] + b"x" + content[at + 1 :])
    with pytest.raises(errors.IntegrityError, match="CRC32"):
        load("memory://programs/flipped")


@pytest.mark.parametrize("reader", ["ours", "s3fs"])
def test_exported_program_computes_as_it_did(put, s3, reader):
    model = Model()
    uri, where = put(_exported(model, dynamic_shapes=({0: torch.export.Dim("batch")},)))
    if reader == "s3fs":
        where = {"filesystem": s3fs.S3FileSystem(**s3.storage_options, skip_instance_cache=True)}

    program = load_exported(uri, **where)

    for batch in (BATCH, BATCH[:5]):
        assert torch.equal(program.module()(batch), model(batch))


def test_exported_program_with_sizes_and_guards_computes_as_it_did(put):
    args = (BATCH, {"a": BATCH[:2]})
    shapes = ({0: torch.export.Dim("b", min=6, max=1000)}, {"a": {0: torch.export.Dim.AUTO}})
    uri, where = put(_exported(Sizes(), args, dynamic_shapes=shapes))

    assert torch.equal(load_exported(uri, **where).module()(*args), Sizes()(*args))


def test_exported_program_with_branches_computes_as_it_did(put):
    uri, where = put(_exported(Branches()))

    assert torch.equal(load_exported(uri, **where).module()(-BATCH), Branches()(-BATCH))


@pytest.mark.parametrize(
    "name",
    [
        "torch.os.system",
        "torch.load",
        "torch.ops.load_library",
        "torch.ops.aten.from_file.default",
        "torch.ops.aten.save.default",
        "torch.ops.aten.__class__.mro",
        "torch.ops.image.write_file.default",
        "_operator.attrgetter",
        "_operator.methodcaller",
        "_operator.call",
        "_operator.__class__",
        "#extension:name",
    ],
)
def test_program_that_calls_what_is_no_operation_is_refused(put, name):
    uri, where = put(_edited(_exported(), **{"models/model.json": _target(name)}))

    with pytest.raises(errors.UnsafeArtifact, match=f"the function {re.escape(name)} "):
        load_exported(uri, **where)


def test_program_that_hands_a_function_to_another_is_refused(put):
    argument = {"name": "f", "arg": {"as_operator": "torch.os.system"}, "kind": 1}
    edit = _with_json(lambda said: said["graph_module"]["graph"]["nodes"][0]["inputs"].append(argument))
    uri, where = put(_edited(_exported(), **{"models/model.json": edit}))

    with pytest.raises(errors.UnsafeArtifact, match=r"the function torch\.os\.system"):
        load_exported(uri, **where)


def test_program_that_imports_a_factory_is_refused(put):
    spec = json.dumps([1, {"context": {"default_factory_module": "os", "default_factory_name": "abort"}}])
    edit = _with_json(lambda said: said["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=spec))
    uri, where = put(_edited(_exported(), **{"models/model.json": edit}))

    with pytest.raises(errors.UnsafeArtifact, match="a defaultdict, whose factory would be imported"):
        load_exported(uri, **where)


class Marks:
    """Runs something where it is unpickled."""

    def __reduce__(self):
        return exec, ("import torch; torch.somebody_was_here = True",)


def _pickled(obj):
    return lambda _: torch_saved(obj)


def _target(name):
    return _with_json(lambda said: said["graph_module"]["graph"]["nodes"][0].update(target=name))


def _size(text):
    def change(said):
        said["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0] = {
            "as_expr": {"expr_str": text, "hint": {"as_int": 8}}
        }

    return _with_json(change)


def _payload(**values):
    return _with_json(lambda said: next(iter(said["config"].values())).update(values))


@pytest.mark.parametrize(
    ("record", "edit", "words"),
    [
        ("sample_inputs/model.pt", _pickled((Marks(),)), "a pickle of more than tensors"),
        ("data/weights/model.pt", _pickled({"linear.weight": Marks()}), "a pickle of more than tensors"),
        ("model_weights_config.json", _payload(use_pickle=True), "a pickled object"),
        ("model_constants_config.json", _payload(path_name="opaque_obj_0"), "a pickled object"),
        ("model_constants_config.json", _payload(path_name="custom_obj_0"), "a pickled object"),
        ("models/model.json", _size("exec('import torch; torch.somebody_was_here = True')"), 'the size "exec('),
        (
            "models/model.json",
            _with_json(lambda said: said.update(guards_code=["__import__('os').system('true')"])),
            "the guard",
        ),
        ("data/aotinductor/model/a.so", lambda _: b"\x7fELF", "compiled code"),
    ],
)
def test_program_that_would_run_more_than_a_model_is_refused(put, record, edit, words):
    uri, where = put(_edited(_exported(), **{record: edit}))

    with pytest.raises(errors.UnsafeArtifact, match=r"it would run more than a model does: .*trusted=True") as caught:
        load_exported(uri, **where)

    assert any(words in each for each in caught.value.asks_for)
    assert not hasattr(torch, "somebody_was_here")


def test_program_of_ones_own_is_loaded_whatever_it_has(put):
    weight = torch.nn.Parameter(torch.ones(2, 3))
    records = {"model_weights_config.json": _payload(use_pickle=True), "weights/weight_0": _pickled(weight)}
    uri, where = put(_edited(_exported(), **records))

    with pytest.raises(errors.UnsafeArtifact, match=r"a pickled object \(linear\.weight\)"):
        load_exported(uri, **where)

    assert torch.equal(load_exported(uri, trusted=True, **where).state_dict["linear.weight"], weight)


@pytest.mark.parametrize(
    "text",
    [
        "s77",
        "2*s0 + 1",
        "Symbol('s77', positive=True, integer=True)",
        "TruncToInt(Mul(Float('1.5', precision=53), ToFloat(Symbol('s20', positive=True, integer=True))))",
        "Add(FloorDiv(Symbol('s77'), Integer(2)), Max(Integer(1), Mod(Symbol('s77'), Integer(7))))",
        "Mul(Integer(-1), Pow(FloorDiv(Pow(Symbol('s77'), Integer(2)), Integer(-9223372036854775808)), Integer(3)))",
        "s77**2 + 1.5e-10",
        "Pow(Symbol('s77'), Rational(-1, 2))",
    ],
)
def test_size_as_sympy_writes_it_is_let_through(text):
    assert _is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "exit()",
        "__import__('os')",
        "Symbol('a b')",
        "Symbol(exit())",
        "Symbol('s', exit())",
        "Symbol()",
        "Float('exit()')",
        "Float('1.5', exit())",
        "Integer('1')",
        "FloorDiv('exit()', 2)",
        "().__class__",
        "s0.name",
        "[s0 for s0 in 9]",
        "lambda: 1",
        "s0; s1",
        "'exit()'",
        "(s0 := 1)",
        "",
        "(" * 500 + ")" * 500,
    ],
)
def test_size_that_is_more_than_arithmetic_is_not(text):
    assert not _is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "10**10**9",
        "9^9^9^9",
        "2**(9*9*9*9)",
        "((9**9 + 1)**9 + 1)**9",
        "Pow(10, 1000000000)",
        "Pow(Pow(Integer(10), Integer(40)) + 1, Integer(40))",
        "Pow(2, Rational(9, Rational(1, 1000000000)))",
        "Integer(2)**Integer(5000000000)",
        "PowByNatural(2, Integer(-5000000000))",
        "1 << 5000000000",
        "LShift(1, 5000000000)",
        "9223372036854775809",
        "1e-999999999",
        "1.E0_000_009",
        "Float('1e999999999')",
        "Float('0.1', precision=1000000000000)",
        "Float(1/3, 1000000000000)",
        "+".join(["s77"] * 10_000),
        "(s77 + s1 + s2 + s3 + s4 + s5 + s6 + s7 + s8 + s9)**64",
        "*".join(f"(s{i} + 1)" for i in range(20)),
        "Mul(" + ", ".join(f"Add(Symbol('s{i}'), Integer(1))" for i in range(20)) + ")",
    ],
)
def test_size_that_takes_long_to_compute_is_refused(put, text):
    uri, where = put(_edited(_exported(), **{"models/model.json": _size(text)}))

    with pytest.raises(errors.UnsafeArtifact, match="the size"):
        load_exported(uri, **where)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("(L['x'].size()[0] // 2) + torch.sym_max(1, L['x'].size()[0] % 7) <= 3*L['y']['a'].size()[0]", True),
        ("L['x'].shape.__class__", False),
        ("L['x'].__reduce__()", False),
        ("torch.load('x')", False),
        ("torch.os", False),
        ("exit()", False),
        ("(lambda: 1)()", False),
        ("L['\") or exit() or (\"'] == 1", False),
        ("L['x'].size()[exit()]", False),
        ("L['x'].size()[0] ** 2 < 9", True),
        ("L['x'].size()[0] < 9**9**9**9", False),
    ],
)
def test_guard_is_let_through_where_it_compares_sizes(text, allowed):
    assert _is_guard(text) is allowed


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "a checkpoint", "another version", "no model"])
def test_what_is_no_exported_program_is_an_error_that_names_it(put, damage):
    checkpoint = io.BytesIO()
    torch.save({"a": torch.ones(1)}, checkpoint)
    content = {
        "empty": b"",
        "text": b"hello",
        "truncated": _exported()[:-300],
        "a checkpoint": checkpoint.getvalue(),
        "another version": _edited(_exported(), archive_version=lambda _: b"99"),
        "no model": _edited(_exported(), **{"models/model.json": lambda _: b"{}"}),
    }[damage]
    uri, where = put(content)

    with pytest.raises(errors.ArtifactError, match=f"^{uri}: not an ExportedProgram") as caught:
        load_exported(uri, **where)

    assert type(caught.value) is errors.ArtifactError


def test_program_that_is_not_there_is_not_found(s3, bucket):
    for load in (load_exported, load_torchscript):
        with pytest.raises(errors.NotFound, match=f"^{bucket}/none: "):
            load(f"{bucket}/none", storage_options=s3.storage_options)


def test_other_kind_of_program_is_named_with_what_loads_it(put):
    script, where = put(_script(Model()), "script.pt")
    exported, _ = put(_exported(), "exported.pt2")

    with pytest.raises(errors.ArtifactError, match="not an ExportedProgram: load_torchscript loads such"):
        load_exported(script, **where)
    with pytest.raises(errors.ArtifactError, match="not a TorchScript file: load_exported loads such"):
        load_torchscript(exported, **where)


@pytest.mark.parametrize("trusted", ["mine::foo", ["mine::foo"], 1])
def test_program_is_trusted_as_a_whole_or_not(trusted):
    with pytest.raises(TypeError, match=r"trusted=.*: True or False"):
        load_exported("s3://bucket/none.pt2", trusted=trusted)


@pytest.mark.parametrize(("place", "error"), [("gpu", ValueError), ("cuda:99", ValueError), ({}, TypeError)])
def test_map_location_that_is_no_device_is_refused_before_anything_is_read(place, error):
    with pytest.raises(error, match=r"^s3://bucket/none: map_location="):
        load_torchscript("s3://bucket/none", map_location=place)


def test_checkpoint_is_no_program(s3, bucket):
    save_checkpoint({"a": torch.ones(1)}, f"{bucket}/a.pt", storage_options=s3.storage_options)

    with pytest.raises(errors.ArtifactError):
        load_exported(f"{bucket}/a.pt", storage_options=s3.storage_options)
