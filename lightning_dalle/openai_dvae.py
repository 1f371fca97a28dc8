"""OpenAI's released dVAE, encoder.pkl and decoder.pkl, loaded as a `DVAE` without running any code in the files.

Each file is a whole pickled module. `torch.load(weights_only=True)` reads it with inert stubs in place of the module
classes, so OpenAI's package need not be installed.
"""

import pickletools
import reprlib
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from torch import Tensor, nn

from lightning_dalle.errors import UserError
from lightning_dalle.models.dvae import DVAE, Conv, Decoder, DVAEConfig, Encoder, ResBlock

ENCODER, DECODER = "dall_e.encoder.Encoder", "dall_e.decoder.Decoder"
MODULES: dict[str, type[nn.Module]] = {
    ENCODER: Encoder,
    "dall_e.encoder.EncoderBlock": ResBlock,
    DECODER: Decoder,
    "dall_e.decoder.DecoderBlock": ResBlock,
    "dall_e.utils.Conv2d": Conv,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.container.Sequential": nn.Sequential,
    "torch.nn.modules.linear.Identity": nn.Identity,
    "torch.nn.modules.pooling.MaxPool2d": nn.MaxPool2d,
    "torch.nn.modules.upsampling.Upsample": nn.Upsample,
}
"""Class of this package or of torch for each class of module in OpenAI's files."""
OTHER_NAMES = {
    "builtins.set",
    "collections.OrderedDict",
    "torch.FloatStorage",
    "torch.HalfStorage",
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_tensor_v2",
    "torch.device",
}
"""Names in OpenAI's files besides the classes of modules; `torch.load(weights_only=True)` allows these and others."""
SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    ResBlock: ("post_gain",),
    nn.ReLU: ("inplace",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
}
"""Attributes, besides weights, that decide what a module of each class computes."""
WEIGHT_NAMES = {"w": "weight", "b": "bias"}
"""Name in this package of each parameter of OpenAI's convolutions."""


class Stub:
    """Inert object in place of a module: its constructor ignores all arguments, and its state becomes attributes."""

    def __init__(self, *arguments: object) -> None:
        pass


STUBS = [(type(name, (Stub,), {}), name) for name in MODULES]
"""Pairs of a stub class and the name of the class that it replaces."""


def load_openai_dvae(encoder: Path, decoder: Path, image_size: int = 256) -> DVAE:
    """Return OpenAI's dVAE in eval mode on the CPU, in fp32.

    Args:
        encoder: OpenAI's encoder.pkl, a pickled dall_e.encoder.Encoder in the zip format of torch.save.
        decoder: OpenAI's decoder.pkl, a pickled dall_e.decoder.Decoder in the same format.
        image_size: size in pixels of the images to encode; any multiple of 8.

    Raises:
        UserError: if a file is missing, is not such a module, or contains names that such a module does not have.
    """
    DVAEConfig(image_size=image_size)  # checks the image size before any file is read
    halves: list[Stub] = []
    for path, name in ((encoder, ENCODER), (decoder, DECODER)):
        try:
            halves.append(_read(path, name))
        except UserError:
            raise
        except Exception as error:  # torch.load raises any exception on bytes that are not such a module
            reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
            raise UserError(f"cannot read {path} as OpenAI's {name}, download it again: {reason:.200}") from error
    try:
        return _build(halves[0], halves[1], image_size)
    except Exception as error:  # a stub may have any object in place of a tensor or a number
        raise UserError(f"{encoder} and {decoder} are not OpenAI's dVAE, download both again: {error}") from error


def _read(path: Path, name: str) -> Stub:
    """Return the stub of the module in a file, whose class must be `name`."""
    half = "encoder" if name == ENCODER else "decoder"
    if not path.is_file():
        raise UserError(f"there is no file {path}, which should be OpenAI's {half}.pkl: correct the path in --{half}")
    if not is_zipfile(path):
        raise UserError(f"{path} is not in the zip format of torch.save: download OpenAI's {half}.pkl again")
    with ZipFile(path) as archive:
        members = archive.infolist()
        unpacked, size = sum(member.file_size for member in members), path.stat().st_size
        if unpacked > size or any(member.compress_type != ZIP_STORED for member in members):
            raise UserError(
                f"{path} is a compressed zip file ({size} bytes, {unpacked} unpacked), which torch.save never writes: "
                "download OpenAI's file again"
            )
        for member in members:
            if member.filename.endswith("/data.pkl"):
                _check_program(archive.read(member), path)
    with torch.serialization.safe_globals(STUBS):  # type: ignore[arg-type]
        module: Stub = torch.load(path, map_location="cpu", weights_only=True)
    if type(module).__name__ != name:
        raise UserError(f"{path} contains a {type(module).__name__}: give OpenAI's {half}.pkl, a {name}")
    return module


def _check_program(program: bytes, path: Path) -> None:
    """Raise a UserError if a pickle names a foreign class or function, or repeats a tuple.

    `torch.load` refuses names too, but its error omits names of newer pickle protocols, and it allows unneeded ones.
    Tuples of repeated tuples grow exponentially when torch formats them into an error.
    """
    strings: list[str] = []
    tuples: set[object] = set()  # memo entries that hold tuples
    previous = ""
    for opcode, argument, _ in pickletools.genops(program):
        if opcode.name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            name = str(argument).replace(" ", ".", 1).replace("__builtin__", "builtins")
            name = ".".join(strings[-2:]) if opcode.name == "STACK_GLOBAL" else name
            if name not in MODULES and name not in OTHER_NAMES:
                raise UserError(f"{path} imports {name!r}, unlike OpenAI's file; no code was run: download it again")
        elif "PUT" in opcode.name:
            (tuples.add if previous.startswith("TUPLE") else tuples.discard)(argument)
        elif "GET" in opcode.name and argument in tuples:
            raise UserError(f"{path} repeats a tuple, unlike OpenAI's file; no code was run: download it again")
        elif isinstance(argument, str):
            strings.append(argument)
        previous = opcode.name


def _build(encoder: Stub, decoder: Stub, image_size: int) -> DVAE:
    """Return the dVAE whose shape is inferred from the weights of its two halves."""
    blocks = vars(_find(encoder, "blocks.group_1"))["_modules"]
    config = DVAEConfig(
        image_size=image_size,
        codebook_size=len(vars(_find(encoder, "blocks.output.conv"))["_parameters"]["b"]),
        n_block=sum(name.startswith("block_") for name in blocks),
        n_hid=len(vars(_find(encoder, "blocks.input"))["_parameters"]["b"]),
        n_init=len(vars(_find(decoder, "blocks.input"))["_parameters"]["b"]),
        block_gain=float(vars(_find(encoder, "blocks.group_1.block_1"))["post_gain"]),
    )
    with torch.device("meta"):
        dvae = DVAE(config)
    weights = dict([*_weights(encoder, dvae.encoder, "encoder"), *_weights(decoder, dvae.decoder, "decoder")])
    stored = {weight.untyped_storage().data_ptr(): weight.untyped_storage().nbytes() for weight in weights.values()}
    if (size := sum(weight.nbytes for weight in weights.values())) > sum(stored.values()):
        raise ValueError(f"their weights have {size} bytes, but are views of only {sum(stored.values())} bytes")
    # Copies, since weights may be views of one storage.
    copies = {name: weight.detach().to(torch.float32, copy=True) for name, weight in weights.items()}
    dvae.load_state_dict(copies, assign=True)
    return dvae.eval()


def _find(module: Stub, path: str) -> Stub:
    for name in path.split("."):
        module = vars(module)["_modules"].get(name)
        if not isinstance(module, Stub):
            raise ValueError(f"there is no module {path} in the encoder or decoder")
    return module


def _weights(stub: Stub, module: nn.Module, place: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a stub under our names.

    Raises:
        ValueError: if the stub or one below it has another class, other submodules or other settings than our module.
    """
    if MODULES.get(type(stub).__name__) is not type(module):
        raise ValueError(f"{place} is a {type(stub).__name__}, but a {type(module).__name__} in a dVAE")
    state, children = vars(stub), dict(module.named_children())
    if list(state["_modules"]) != list(children):  # their order decides what a Sequential computes
        raise ValueError(f"{place} consists of {reprlib.repr(list(state['_modules']))}, but {list(children)} in a dVAE")
    settings = {name: getattr(module, name) for name in SETTINGS.get(type(module), ())}
    if "group_count" in state:  # only if the instance differs from its class
        settings["group_count"] = DVAEConfig.n_group
    for name, value in settings.items():
        if state.get(name) != value:
            raise ValueError(f"{name} of {place} is {reprlib.repr(state.get(name))}, but {value!r} in a dVAE")
    for name, weight in state["_parameters"].items():
        if name not in WEIGHT_NAMES:
            raise ValueError(f"{place} has a parameter {reprlib.repr(name)}, which no dVAE has")
        yield f"{place}.{WEIGHT_NAMES[name]}", weight
    for name, child in children.items():
        yield from _weights(state["_modules"][name], child, f"{place}.{name}")
