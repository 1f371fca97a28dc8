"""`convert`: write OpenAI's released dVAE as a safetensors file that this package loads."""

from pathlib import Path

from lightning_dalle.errors import UserError
from lightning_dalle.files import make_folder


def convert(encoder: Path, decoder: Path, out: Path = Path("openai_dvae.safetensors"), image_size: int = 256) -> None:
    """Write OpenAI's dVAE as one safetensors file, which can be used in place of any dVAE checkpoint.

    No code in OpenAI's files is run, and files that contain anything but a dVAE of OpenAI's classes are refused.

    Args:
        encoder: OpenAI's encoder.pkl.
        decoder: OpenAI's decoder.pkl.
        out: safetensors file to write; it must not exist.
        image_size: size in pixels of the images to encode, a multiple of 8.
    """
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out")
    if out.suffix != ".safetensors":
        raise UserError(f"--out is {out}, but must end in .safetensors")

    from safetensors import SafetensorError

    from lightning_dalle.checkpoints import dvae_metadata, write_safetensors
    from lightning_dalle.openai_dvae import load_openai_dvae

    dvae = load_openai_dvae(encoder, decoder, image_size)
    weights = {f"dvae.{name}": tensor for name, tensor in dvae.state_dict().items()}
    make_folder(out.parent)
    try:
        write_safetensors(out, {"state_dict": weights, **dvae_metadata(dvae)})
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {out}: {error}; choose another --out") from error
    config = dvae.config
    print(f"wrote {out}: a dVAE with {config.codebook_size} codes on a grid of {config.grid}x{config.grid}")
