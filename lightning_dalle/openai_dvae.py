"""OpenAI's released dVAE, encoder.pkl and decoder.pkl, as ours; nothing in the files is executed.

The files are modules whole, as `torch.save` pickles them: programs that name classes and functions to call. Here no
name is looked up: each of those in the tables below stands for something inert, and any other is refused.

Knows the files and the names in them. Knows nothing of OpenAI's classes, which need not be installed.
"""

import io
import itertools
import pickle
import pickletools
import reprlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.models.dvae import DVAE, Block, Conv, Decoder, DVAEConfig, Encoder

ENCODER, DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"
RECORDS: dict[str, type[nn.Module] | None] = {
    ENCODER: Encoder,
    "dall_e.encoder.EncoderBlock": Block,
    DECODER: Decoder,
    "dall_e.decoder.DecoderBlock": Block,
    "dall_e.utils.Conv2d": Conv,
    "torch.device": None,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.container.Sequential": nn.Sequential,
    "torch.nn.modules.linear.Identity": nn.Identity,
    "torch.nn.modules.pooling.MaxPool2d": nn.MaxPool2d,
    "torch.nn.modules.upsampling.Upsample": nn.Upsample,
}
"""Classes whose objects are read as records of their state, and what they are in our dVAE."""
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.ReLU: ("inplace",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
}
"""What a layer without weights computes by."""
STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16}
RENAMED = {"w": "weight", "b": "bias"}
"""Parameters of OpenAI's convolutions. The names of its groups and blocks are ours."""
LONGEST_PLACE = 64
"""In characters; ours are shorter. A long name with many modules below it would be repeated in the place of each."""


class Record:
    """An object of a file, without its class: what it was made of is dropped, its state are its attributes."""

    def __init__(self, *made_of: object) -> None:
        pass


class Storage(NamedTuple):
    """The numbers of a storage. Like all tuples, it cannot be written on: BUILD on a tensor would give it any size."""

    numbers: Tensor


class Cut(NamedTuple):
    """What a tensor is made of. Whether it is what its names say is seen when it is made."""

    storage: Storage
    start: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def made(self) -> Tensor:
        return self.storage.numbers.as_strided(self.size, self.stride, self.start)


class Unpickler(pickle.Unpickler):
    """Puts inert things where a file names classes and functions.

    They are made anew for each file: the instruction BUILD may write on whatever lies on the stack, be it a class or a
    function, and what it writes is gone with them.
    """

    def __init__(self, archive: ZipFile, path: Path) -> None:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        program = archive.read(name)
        _check_memo(program)
        super().__init__(io.BytesIO(program))
        self.archive, self.path, self.folder = archive, path, name.removesuffix("data.pkl") + "data/"
        self.storages: dict[tuple[str, torch.dtype], Storage] = {}
        self.admitted: dict[str, Any] = {
            **{name: type(name, (Record,), {}) for name in RECORDS},
            **STORAGES,
            "torch._utils._rebuild_tensor_v2": lambda *made_of: Cut(*made_of[:4]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"  # Python 2's name, in the protocol of torch.save
        if full not in self.admitted:
            raise UserError(f"{self.path} names {full!r}, which is no part of OpenAI's dVAE: nothing in it was run")
        return self.admitted[full]

    def persistent_load(self, pid: Any) -> Storage:
        """The numbers of a storage: ("storage", type, name, device, length)."""
        kind, *rest = pid if isinstance(pid, tuple) else (pid,)
        if kind != "storage":
            raise UserError(f"{self.path} refers to something outside it as {reprlib.repr(kind)}, which is no storage")
        dtype, key, _, _ = rest
        if (key, dtype) not in self.storages:  # once, however often it is named
            content = bytearray(self.archive.read(self.folder + key))
            self.storages[key, dtype] = Storage(torch.frombuffer(content, dtype=dtype))
        return self.storages[key, dtype]


def _check_memo(program: bytes) -> None:
    """Raises a ValueError if the memo is written beyond as many entries as the program has bytes: pickle makes room up
    to the entry that is named."""
    for instruction, argument, _ in pickletools.genops(program):
        if "PUT" in instruction.name and int(argument or 0) > len(program):  # PUT, BINPUT and LONG_BINPUT
            raise ValueError(f"entry {argument} of the memo is written by a program of {len(program)} bytes")


def load_openai_dvae(encoder: Path, decoder: Path, image_size: int = 256) -> DVAE:
    """OpenAI's dVAE in our modules, in eval mode on the CPU, in fp32.

    Args:
        encoder: encoder.pkl, a pickled dall_e.encoder.Encoder in torch's zip format.
        decoder: decoder.pkl, likewise a dall_e.decoder.Decoder.
        image_size: of the images that it will encode, in pixels, a multiple of 8: its layers take any.

    Raises:
        UserError: if a file is not there, is no such module, or names anything else than what such a module is made of.
    """
    DVAEConfig(image_size=image_size)  # of what is refused from here on the files are the reason
    modules: list[tuple[str, Record]] = []
    for part, path, name in (("encoder", encoder, ENCODER), ("decoder", decoder, DECODER)):
        try:
            modules += _modules(_read(path, name), part)
        except UserError:
            raise
        except Exception as error:  # of bytes that are no such module the unpickler raises anything
            raise UserError(f"{path} is not a pickled {name} that can be read: {error!r}") from error
    try:
        return _dvae(modules, image_size)
    except Exception as error:  # a record may hold anything in place of a tensor or a number
        raise UserError(f"{encoder} and {decoder} are not the two halves of a dVAE of OpenAI's: {error}") from error


def _read(path: Path, name: str) -> Record:
    """The record of the module in a file, which should be of the class that is named."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not is_zipfile(path):
        raise UserError(f"{path} is not in the zip format of torch.save since 1.6, in which OpenAI's files are")
    with ZipFile(path) as archive:
        parts = archive.infolist()
        size, whole = sum(part.file_size for part in parts), path.stat().st_size
        if size > whole or any(part.compress_type != ZIP_STORED for part in parts):
            raise UserError(f"{path} is packed, {size} bytes in {whole}, but torch.save stores all parts as they are")
        record = Unpickler(archive, path).load()
    if type(record).__name__ != name:
        raise UserError(f"{path} should hold a {name}, but holds a {type(record).__name__}")
    return record


def _modules(record: Record, place: str) -> Iterator[tuple[str, Record]]:
    """Each module with its place in the dVAE, in order. One that is in two places, or within itself, is refused."""
    seen: set[int] = set()
    left = [(place, record)]
    while left:
        place, record = left.pop()
        if id(record) in seen:
            raise ValueError(f"{place} is a module that is elsewhere, too")
        seen.add(id(record))
        if len(place) > LONGEST_PLACE:
            raise ValueError(f"a module is at {place[:LONGEST_PLACE]!r}..., deeper than any of a dVAE")
        yield place, record
        left += [(place + "." + name, child) for name, child in reversed(vars(record)["_modules"].items())]


def _dvae(modules: list[tuple[str, Record]], image_size: int) -> DVAE:
    """The dVAE of the shape that the weights have."""
    weights: dict[str, Tensor] = {}
    gains: set[float] = set()
    for place, record in modules:
        for key, cut in vars(record)["_parameters"].items():
            if key not in RENAMED:
                raise ValueError(f"{place} has a parameter {reprlib.repr(key)}, which is none of a dVAE")
            weights[f"{place}.{RENAMED[key]}"] = cut.made()
        if _ours(record) is Block:
            gains.add(float(vars(record)["post_gain"]))
    held = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    if (claimed := sum(weight.nbytes for weight in weights.values())) > sum(held.values()):
        raise ValueError(f"their weights are {claimed} bytes, but cut from storages of {sum(held.values())}")
    if len(gains) != 1:
        raise ValueError(f"the gain of their blocks is {gains or 'not given'}, not the same in all")
    first = "encoder.blocks.group_1.block_"
    config = DVAEConfig(
        image_size=image_size,
        codebook_size=len(weights["encoder.blocks.output.conv.bias"]),
        n_block=sum(name.startswith(first) and name.endswith("conv_1.bias") for name in weights),
        n_hid=len(weights["encoder.blocks.input.bias"]),
        n_init=len(weights["decoder.blocks.input.bias"]),
        block_gain=gains.pop(),
    )
    with torch.device("meta"):
        dvae = DVAE(config)
    _check_structure(modules, dvae)
    owned = {name: weight.to(torch.float32, copy=True) for name, weight in weights.items()}  # two may share a storage
    dvae.load_state_dict(owned, assign=True)
    return dvae.eval()


def _ours(record: Record) -> type[nn.Module] | None:
    return RECORDS.get(type(record).__name__)


def _check_structure(modules: list[tuple[str, Record]], dvae: DVAE) -> None:
    """Raises a ValueError if the modules are others, or in another order, than those of our dVAE: weights alone do not
    tell, since layers without any compute, too."""
    _, *expected = dvae.named_modules()  # the first is the whole
    for theirs, ours in itertools.zip_longest(modules, expected):
        if theirs is None or ours is None or (theirs[0], _ours(theirs[1])) != (ours[0], type(ours[1])):
            found, due = (
                "nothing" if each is None else f"{type(each[1]).__name__} at {each[0]!r}" for each in (theirs, ours)
            )
            raise ValueError(f"they hold {found} where a dVAE has {due}")
        place, module = ours
        state = vars(theirs[1])
        due_values = {name: getattr(module, name) for name in SETTINGS.get(type(module), ())}
        if isinstance(module, Encoder | Decoder) and "group_count" in state:  # of the class, unless a file has its own
            due_values["group_count"] = dvae.config.n_group
        for name, value in due_values.items():
            if state.get(name) != value:
                raise ValueError(f"{name} of {place} is {reprlib.repr(state.get(name))}, but {value!r} in a dVAE")
