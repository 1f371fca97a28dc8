"""OpenAI's pickles: loaded as our dVAE with equal outputs; hostile and altered ones are refused and never executed."""

import builtins
import functools
import os
import re
import shlex
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import dall_e.decoder
import dall_e.encoder
import dall_e.utils
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from lightning_dalle.checkpoints import load_dvae
from lightning_dalle.cli import main
from lightning_dalle.errors import UserError
from lightning_dalle.openai_dvae import load_openai_dvae


def saved(folder: Path, **shape: int) -> tuple[nn.Module, nn.Module, Path, Path]:
    """Return OpenAI's modules, and the files that torch.save writes of them."""
    encoder, decoder = dall_e.encoder.Encoder(**shape), dall_e.decoder.Decoder(**shape)
    torch.save(encoder, folder / "encoder.pkl")
    torch.save(decoder, folder / "decoder.pkl")
    return encoder, decoder, folder / "encoder.pkl", folder / "decoder.pkl"


@pytest.mark.parametrize("shape", [{"n_hid": 64, "n_blk_per_group": 1, "vocab_size": 512}, {}], ids=["small", "full"])
def test_reconstructs_as_openais_modules(tmp_path: Path, shape: dict[str, int]) -> None:
    encoder, decoder, *files = saved(tmp_path, **shape)
    dvae = load_openai_dvae(*files, image_size=32)
    assert all(weight.dtype == torch.float32 for weight in dvae.parameters())
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        logits = encoder(dall_e.utils.map_pixels(images))
        z = one_hot(logits.argmax(1), encoder.vocab_size).permute(0, 3, 1, 2).float()
        theirs = dall_e.utils.unmap_pixels(torch.sigmoid(decoder(z)[:, :3]))  # as in OpenAI's notebook
        assert torch.equal(dvae.encoder_logits(images), logits)
        assert torch.equal(dvae.decode(dvae.encode(images)), theirs)


def test_a_converted_dvae_is_a_checkpoint_of_ours(tmp_path: Path) -> None:
    *_, encoder, decoder = saved(tmp_path, n_hid=4, vocab_size=8)
    out = tmp_path / "openai.safetensors"
    options = ["--encoder", str(encoder), "--decoder", str(decoder), "--out", str(out), "--image_size", "32"]
    main(["convert", *options])
    ours, images = load_openai_dvae(encoder, decoder, 32), torch.rand(2, 3, 32, 32)
    assert load_dvae(out).config == ours.config
    assert torch.equal(load_dvae(out).decode(ours.encode(images)), ours.decode(ours.encode(images)))
    with pytest.raises(SystemExit):  # the file exists
        main(["convert", *options])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--image_size", "0", "image_size (0) must be a "),
        ("--out", "encoder.pkl/dvae.safetensors", "cannot create the output folder encoder.pkl ("),
        ("--out", "/proc/dvae.safetensors", "cannot write /proc/dvae.safetensors: "),
    ],
)
def test_mistakes_are_sentences(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    option: str,
    value: str,
    words: str,
) -> None:
    saved(tmp_path, n_hid=4, vocab_size=8)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["convert", "--encoder", "encoder.pkl", "--decoder", "decoder.pkl", f"{option}={value}"])
    assert words in capsys.readouterr().err


class Reduced:
    """Object whose pickle calls a function with arguments when pickle loads it."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return self.reduced


class Stateful:
    """Object that runs its state as a command when pickle loads it."""

    def __init__(self, state: str) -> None:
        self.state = state

    def __getstate__(self) -> str:
        return self.state

    def __setstate__(self, state: str) -> None:
        os.system(state)


def module_with(poison: object) -> nn.Module:
    encoder = dall_e.encoder.Encoder(n_hid=4, vocab_size=8)
    encoder.poison = poison
    return encoder


def hooked(command: str) -> nn.Module:
    encoder = dall_e.encoder.Encoder(n_hid=4, vocab_size=8)
    encoder.register_forward_hook(functools.partial(os.system, command))
    return encoder


def inner(command: str) -> str:
    """Write another poisoned file and return its path."""
    path = Path(shlex.split(command)[1]).with_suffix(".inner")
    torch.save(Reduced(os.system, command), path)
    return str(path)


def text(command: str) -> bytes:
    """Return the pickle instruction that pushes a string."""
    return b"X" + len(command).to_bytes(4, "little") + command.encode()


ENCODER = b"cdall_e.encoder\nEncoder\n"
RUN: dict[str, tuple[str, Callable[[str], object]]] = {
    "os.system": ("posix.system", lambda c: module_with(Reduced(os.system, c))),
    "eval": ("builtins.eval", lambda c: Reduced(builtins.eval, f"__import__('os').system({c!r})")),
    "nested reduces": (
        "posix.system",
        lambda c: module_with(Reduced(OrderedDict, [("a", Reduced(OrderedDict, [("b", Reduced(os.system, c))]))])),
    ),
    "a partial": ("functools.partial", lambda c: Reduced(functools.partial(os.system, c))),
    "__setstate__ of another class": ("test_openai_dvae.Stateful", lambda c: module_with(Stateful(c))),
    "a chain of getattr": (
        "builtins.getattr",
        lambda c: (
            b"cbuiltins\ngetattr\n(cimportlib\nimport_module\n(X\x02\x00\x00\x00ostRX\x06\x00\x00\x00systemtR("
            + text(c)
            + b"tR."
        ),
    ),
    "a dotted name": (
        "torch.serialization.os.system",
        lambda c: b"\x80\x04\x8c\x13torch.serialization\x8c\x09os.system\x93(" + text(c) + b"tR.",
    ),
    "protocol 0": ("os.system", lambda c: b"(S" + repr(c).encode() + b"\nios\nsystem\n."),
    "the memo": ("posix.system", lambda c: b"cposix\nsystem\nq\x070" + ENCODER + b"0h\x07(" + text(c) + b"tR."),
}
"""Files that run a command when pickle loads them, each with the name it is refused for."""
REFUSED: dict[str, tuple[str, Callable[[str], object]]] = {
    **RUN,
    "a module with a hook": ("functools.partial", hooked),
    "torch.load": ("torch.serialization.load", lambda c: Reduced(torch.load, inner(c), "cpu", None)),
    "copyreg": (
        "copy_reg._reconstructor",
        lambda c: b"ccopy_reg\n_reconstructor\n(csubprocess\nPopen\ncsubprocess\nPopen\n]" + text(c) + b"atR.",
    ),
    "an attribute of an admitted name": (
        "collections.OrderedDict.fromkeys",
        lambda c: b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93(" + text(c) + b"tR.",
    ),
    "BUILD on a class": (
        "posix.system",
        lambda c: ENCODER + b"q\x01N}X\x0c\x00\x00\x00__setstate__cposix\nsystem\ns\x86b0h\x01)\x81" + text(c) + b"b.",
    ),
    "escapes of a terminal": ("os\\x1b[31m.x", lambda _: b"\x80\x04\x8c\x07os\x1b[31m\x8c\x01x\x93."),
}


def write(path: Path, made: object) -> None:
    """Write an object with torch.save, or a pickle in the same kind of archive."""
    if not isinstance(made, bytes):
        return torch.save(made, path)
    with ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", made)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return None


@pytest.mark.parametrize("poison", REFUSED)
def test_a_poisoned_file_is_refused_by_name_and_runs_nothing(tmp_path: Path, poison: str) -> None:
    name, make = REFUSED[poison]
    canary, path = tmp_path / "canary", tmp_path / "encoder.pkl"
    write(path, make(shlex.join(["touch", str(canary)])))
    with pytest.raises(
        UserError, match=rf"encoder\.pkl imports '{re.escape(name)}', unlike OpenAI's file; .*: download it"
    ):
        load_openai_dvae(path, tmp_path / "decoder.pkl")
    assert not canary.exists()
    if poison in RUN:  # shows that the file is a real attack
        torch.load(path, weights_only=False)
        assert canary.exists()


def test_a_file_cannot_change_the_stubs_of_the_next(tmp_path: Path) -> None:
    *_, encoder, decoder = saved(tmp_path, n_hid=4, vocab_size=8)
    path = tmp_path / "odd.pkl"
    write(path, ENCODER + b"q\x01N}X\x0c\x00\x00\x00__setstate__ccollections\nOrderedDict\ns\x86b0h\x01)\x81}b.")
    message = r"cannot read .*odd\.pkl as OpenAI's dall_e\.encoder\.Encoder, download it again: Can only build"
    with pytest.raises(UserError, match=message):
        load_openai_dvae(path, decoder)
    assert load_openai_dvae(encoder, decoder).config.n_hid == 4


def test_a_module_within_itself_is_refused(tmp_path: Path) -> None:
    encoder, _, path, decoder = saved(tmp_path, n_hid=4, vocab_size=8)
    encoder.blocks._modules["group_5"] = encoder
    torch.save(encoder, path)
    with pytest.raises(
        UserError,
        match=r"encoder\.blocks consists of \['input', 'group_1', .*\], but \['input', 'group_1', .*\] in a dVAE",
    ):
        load_openai_dvae(path, decoder)


def test_other_files_are_refused(tmp_path: Path) -> None:
    encoder, _, *files = saved(tmp_path, n_hid=4, vocab_size=8)
    message = r"decoder\.pkl contains a dall_e\.decoder\.Decoder: give OpenAI's encoder.pkl, a dall_e\.encoder\.Encoder"
    with pytest.raises(UserError, match=message):
        load_openai_dvae(files[1], files[0])
    message = r"there is no file .*nowhere\.pkl, which should be OpenAI's encoder\.pkl: correct the path in --encoder"
    with pytest.raises(UserError, match=message):
        load_openai_dvae(tmp_path / "nowhere.pkl", files[1])
    torch.save(encoder, tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"old\.pkl is not in the zip format of torch\.save: download OpenAI's encoder"):
        load_openai_dvae(tmp_path / "old.pkl", files[1])
    torch.save(dall_e.encoder.Encoder(n_hid=8, vocab_size=8), files[0])
    with pytest.raises(UserError, match="are not OpenAI's dVAE, download both again"):
        load_openai_dvae(*files)


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00%b\x85K\x00\x85\x89ccollections\nOrderedDict\n)RtR"
NESTED = b"N" + b"q\x05h\x05\x86" * 60  # a pair of pairs of pairs, 2^60 in all


def encoder_of(parameters: bytes, modules: bytes = b"") -> bytes:
    """Return a pickle of an encoder whose parameters and modules are the names and values that two programs push."""
    entries = text("_parameters") + b"}(" + parameters + b"u" + text("_modules") + b"}(" + modules + b"u"
    return b"\x80\x02" + ENCODER + b")R}(" + entries + b"ub."


HUGE = b"J\xff\xff\xff\x7f"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (STORAGE + b".", "encoder.pkl is a compressed zip file .*, which torch.save never writes: download"),
        (b"Nr\xff\xff\xff\x07.", "encoder.pkl contains a NoneType: give OpenAI's encoder.pkl, a dall_e.encoder"),
        (encoder_of(text("w") + TENSOR % HUGE), "there is no module blocks.group_1 in the encoder or decoder"),
        (
            encoder_of(
                text("w") + TENSOR % b"K\x01" + b"(" + STORAGE + b"K\x00" + HUGE + b"\x85K\x01\x85tb"
            ),
            "Trying to resize storage that is not resizable",
        ),
        (TENSOR.replace(b"K\x00\x85", b"K\x01\x85") % HUGE + b".", "Trying to resize storage that is not resizable"),
        (STORAGE.replace(b"K\x01", HUGE) + b".", r"record size \(4 bytes\) does not match expected size \(8\d{9} b"),
        (b"(" + NESTED + b"tQ.", "encoder.pkl repeats a tuple"),
        (b"(" + text("url") + b"K\x07tQ.", r"Only persistent_load of storage is allowed, but got <class 'str'>$"),
        (encoder_of(NESTED + b"N"), "encoder.pkl repeats a tuple"),
        (encoder_of(b"", text("n" * 1000) + b"N"), "there is no module blocks.group_1 in the encoder or decoder"),
    ],
    ids=[
        "compressed", "memo", "repeated", "resized", "view beyond its storage", "size beyond the file",
        "nested reference", "unknown kind of reference", "nested name", "long name",
    ],
)  # fmt: skip
def test_a_small_file_that_would_fill_the_memory_is_refused(tmp_path: Path, program: bytes, message: str) -> None:
    *_, path, decoder = saved(tmp_path, n_hid=4, vocab_size=8)
    with ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program.removeprefix(b"\x80\x02"))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        if "compressed" in message:
            archive.writestr("archive/data/0", bytes(1_000_000), ZIP_DEFLATED)
        else:
            archive.writestr("archive/data/0", bytes(4))
    with pytest.raises(UserError, match=message) as refused:
        load_openai_dvae(path, decoder)
    assert len(str(refused.value)) < 1000


SHARED = nn.Parameter(torch.zeros(1))
PATH = "blocks.group_1.block_1.res_path"
RELU = f"{PATH}.relu_1"
ALTERED: dict[str, tuple[str, dict[str, object]]] = {
    "a bias without an axis": ("len\\(\\) of a 0-d tensor", {"blocks.output.conv.b": nn.Parameter(torch.zeros(()))}),
    "no channels": ("", {"blocks.input.b": nn.Parameter(torch.zeros(1)[:0])}),
    "a ReLU less": ("encoder.*relu_1 is a torch.*Identity, but a ReLU in a dVAE", {RELU: nn.Identity()}),
    "a weight that repeats one number": (
        "weights have 8\\d{9} bytes, but are views of only",
        {"blocks.input.w": nn.Parameter(torch.zeros(1).expand(2**31 - 1))},
    ),
    "two weights in one storage": (
        "weights have \\d+ bytes, but are views of only",
        {f"{PATH}.conv_1.b": SHARED, f"{PATH}.conv_2.b": SHARED},
    ),
    "a tuple as the name of a parameter": (
        r"encoder has a parameter \(\(1, 2\), 3\), which no dVAE has",
        {"_parameters": {((1, 2), 3): None}},
    ),
    "a long name of a module": (
        "encoder.blocks consists of .{1,200}, but",
        {"blocks." + "n" * 10_000: nn.Identity()},
    ),
    "a ReLU in place": ("inplace of .*relu_1 is True, but False", {RELU: nn.ReLU(inplace=True)}),
    "a wider pool": ("kernel_size of .*pool is 4, but 2", {"blocks.group_1.pool": nn.MaxPool2d(4)}),
    "no pool": (
        "encoder.*pool is a torch.*Identity, but a MaxPool2d in a dVAE",
        {"blocks.group_1.pool": nn.Identity()},
    ),
    "7 groups": ("group_count of encoder is 7, but 4", {"group_count": 7}),
    "a module more": ("encoder consists of \\['blocks', 'extra'\\], but \\['blocks'\\] in", {"extra": nn.Identity()}),
    "a layer out of order": (
        "output consists of \\['conv', 'relu'\\], but \\['relu', 'conv'\\] in a dVAE",
        {"blocks.output._modules": {"conv": dall_e.utils.Conv2d(32, 8, 1, use_float16=False), "relu": nn.ReLU()}},
    ),
}
"""Changed attributes of an encoder, each with a part of the error message."""


@pytest.mark.parametrize("what", ALTERED)
def test_an_altered_dvae_is_refused_by_name(tmp_path: Path, what: str) -> None:
    encoder, _, *files = saved(tmp_path, n_hid=4, vocab_size=8)
    said, changes = ALTERED[what]
    for place, value in changes.items():
        parent, _, name = place.rpartition(".")
        setattr(encoder.get_submodule(parent), name, value)
    torch.save(encoder, files[0])
    with pytest.raises(UserError, match=f"encoder.pkl and .* are not OpenAI's dVAE, download both again: .*{said}"):
        load_openai_dvae(*files)
