"""OpenAI's released dVAE, encoder.pkl and decoder.pkl, as ours; nothing in the files is executed.

The files are modules whole, as `torch.save` pickles them: programs that name classes and functions to call. Here no
name is looked up: each of those in the tables below stands for something inert, and any other is refused.

Knows the files and the names in them. Knows nothing of OpenAI's classes, which need not be installed.
"""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor

from lightning_dalle.errors import UserError
from lightning_dalle.models.dvae import DVAE, DVAEConfig

ENCODER, DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"
RECORDS = (
    ENCODER,
    "dall_e.encoder.EncoderBlock",
    DECODER,
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.device",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)
"""Classes whose objects are read as records of their state."""
STORAGES = {"torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16}
RENAMED = {"w": "weight", "b": "bias"}
"""Parameters of OpenAI's convolutions. The names of its groups and blocks are ours."""
OURS = {"Conv2d": "Conv", "EncoderBlock": "Block", "DecoderBlock": "Block"}
"""Classes of OpenAI's by our names; those of other layers are the same."""
SETTINGS: dict[str, dict[str, object]] = {
    "MaxPool2d": {"kernel_size": 2, "stride": 2, "padding": 0, "dilation": 1, "ceil_mode": False},
    "Upsample": {"size": None, "scale_factor": 2, "mode": "nearest"},
}
"""What layers without weights are made with."""


class Record:
    """An object of a file, without its class: what it was made of is dropped, its state are its attributes."""

    def __init__(self, *made_of: object) -> None:
        pass


class Unpickler(pickle.Unpickler):
    """Puts inert things where a file names classes and functions.

    They are made anew for each file: the instruction BUILD may write on whatever lies on the stack, be it a class or a
    function, and what it writes is gone with them.
    """

    def __init__(self, archive: ZipFile, path: Path) -> None:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        self.archive, self.path, self.folder = archive, path, name.removesuffix("data.pkl") + "data/"
        program = self._member(name)
        for operation, argument, _ in pickletools.genops(program):
            # The memo has room for the largest index, so a short program could ask for all memory there is.
            if operation.name.endswith("PUT") and int(argument or 0) > len(program):
                raise UserError(f"{path} asks for room for {argument} objects in a program of {len(program)} bytes")
        super().__init__(io.BytesIO(program))
        self.admitted: dict[str, Any] = {
            **{name: type(name, (Record,), {}) for name in RECORDS},
            **STORAGES,
            "torch._utils._rebuild_tensor_v2": lambda storage, start, size, stride, *_: storage.as_strided(
                size, stride, start
            ),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
        }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"  # Python 2's name, in the protocol of torch.save
        if full not in self.admitted:
            raise UserError(f"{self.path} names {full!r}, which is no part of OpenAI's dVAE: nothing in it was run")
        return self.admitted[full]

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of a storage: ("storage", type, name, device, length)."""
        kind, *rest = pid if isinstance(pid, tuple) else (pid,)
        if kind != "storage":
            raise UserError(f"{self.path} refers to something outside it as {kind!r}, which is no storage of a tensor")
        dtype, key, _, _ = rest
        return torch.frombuffer(bytearray(self._member(f"{self.folder}{key}")), dtype=dtype)

    def _member(self, name: str) -> bytes:
        """A part of the file, as large as it is there: torch.save compresses none, and a bomb has to."""
        if self.archive.getinfo(name).compress_type != ZIP_STORED:
            raise UserError(f"{self.path} has {name!r} compressed, which torch.save never does")
        return self.archive.read(name)


def load_openai_dvae(encoder: Path, decoder: Path, image_size: int = 256) -> DVAE:
    """OpenAI's dVAE in our modules, in eval mode on the CPU, in fp32.

    Args:
        encoder: encoder.pkl, a pickled dall_e.encoder.Encoder in torch's zip format.
        decoder: decoder.pkl, likewise a dall_e.decoder.Decoder.
        image_size: of the images that it will encode, in pixels, a multiple of 8: its layers take any.

    Raises:
        UserError: if a file is not there, is no such module, or names anything else than what such a module is made of.
    """
    modules: dict[str, Record] = {}
    for part, path, name in (("encoder", encoder, ENCODER), ("decoder", decoder, DECODER)):
        try:
            modules |= _modules(_read(path, name), part)
        except UserError:
            raise
        except Exception as error:  # of bytes that are no such module the unpickler raises anything
            raise UserError(f"{path} is not a pickled {name} that can be read: {error!r}") from error
    try:
        return _dvae(modules, image_size)
    except UserError:
        raise
    except Exception as error:  # and so does what expects such a module
        raise UserError(f"{encoder} and {decoder} are not the two halves of a dVAE of OpenAI's: {error}") from error


def _read(path: Path, name: str) -> Record:
    """The record of the module in a file, which should be of the class that is named."""
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    if not is_zipfile(path):
        raise UserError(f"{path} is not in the zip format of torch.save since 1.6, in which OpenAI's files are")
    with ZipFile(path) as archive:
        record = Unpickler(archive, path).load()
    if type(record).__name__ != name:
        raise UserError(f"{path} should hold a {name}, but holds a {type(record).__name__}")
    return record


def _modules(record: Record, place: str) -> Iterator[tuple[str, Record]]:
    """Each module and its place in the dVAE. One that is in two places, or within itself, is refused."""
    seen: set[int] = set()
    left = [(place, record)]
    while left:
        place, record = left.pop()
        if id(record) in seen:
            raise ValueError(f"{place} is a module that is elsewhere, too")
        seen.add(id(record))
        yield place, record
        left += [(f"{place}.{name}", child) for name, child in vars(record)["_modules"].items()]


def _dvae(modules: dict[str, Record], image_size: int) -> DVAE:
    """The dVAE of the shape that the modules' weights have."""
    weights: dict[str, Tensor] = {
        f"{place}.{RENAMED[key]}": value.float()
        for place, record in modules.items()
        for key, value in vars(record)["_parameters"].items()
    }
    gains = {float(vars(record)["post_gain"]) for record in modules.values() if "post_gain" in vars(record)}
    if len(gains) != 1:
        raise RuntimeError(f"the gain of their blocks is {gains or 'not given'}, not the same in all")
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
    _check(modules, dvae)
    dvae.load_state_dict(weights, assign=True)
    return dvae.eval()


def _check(modules: dict[str, Record], dvae: DVAE) -> None:
    """Raises a RuntimeError if a layer is another than ours in its place: some have no weights to tell."""
    ours = {place: type(module).__name__ for place, module in dvae.named_modules() if place}
    theirs = {place: type(record).__name__.rpartition(".")[2] for place, record in modules.items()}
    for place in sorted(ours.keys() | theirs.keys()):
        ours_there, theirs_there = ours.get(place, "nothing"), theirs.get(place, "nothing")
        if OURS.get(theirs_there, theirs_there) != ours_there:
            raise RuntimeError(f"{place} is {theirs_there}, but {ours_there} is expected")
        for name, value in SETTINGS.get(ours_there, {}).items():
            found = vars(modules[place]).get(name, value)
            if found != value:
                raise RuntimeError(f"{name} of {place} is {found}, but {value} is expected")
