"""`convert`: OpenAI's released dVAE as a file of ours.

Knows files.
"""

from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.files import make_folder


def convert(encoder: Path, decoder: Path, out: Path = Path("openai_dvae.safetensors"), image_size: int = 256) -> None:
    """Write OpenAI's dVAE as one safetensors file, which goes wherever the checkpoint of a dVAE goes.

    Nothing in OpenAI's files is executed, and they are refused if they hold anything but a dVAE of its classes.

    Args:
        encoder: OpenAI's encoder.pkl.
        decoder: OpenAI's decoder.pkl.
        out: the file to write; it must not be there yet.
        image_size: of the images that it will encode, in pixels, a multiple of 8.
    """
    if out.exists():
        raise UserError(f"{out} is there already; choose another --out")
    if out.suffix != ".safetensors":
        raise UserError(f"a safetensors file is written, but --out is {out}")

    from safetensors import SafetensorError

    from lightning_dalle.checkpoints import dvae_record, write_safetensors
    from lightning_dalle.openai_dvae import load_openai_dvae

    dvae = load_openai_dvae(encoder, decoder, image_size)
    weights = {f"dvae.{name}": tensor for name, tensor in dvae.state_dict().items()}
    make_folder(out.parent)
    try:
        write_safetensors(out, {"state_dict": weights, **dvae_record(dvae)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    print(f"{out} holds a dVAE of {dvae.config.codebook_size} codes on a grid of {dvae.config.grid}x{dvae.config.grid}")
