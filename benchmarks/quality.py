"""Quality of both systems, trained from scratch on OpenMoji, on held-out captions at equal training time.

    python -m benchmarks.quality --run_dir runs/openmoji/quickstart --factors '[1, 4]'

Our side is the report of a finished quickstart. The peer trains here on the same split, at 32 pixels, with 8x8 codes
out of 512 and our token ids. The same functions measure it: 200 held-out compositions, one sample each, at three
temperatures, of which the best counts.

The peer gets 5 minutes for its dVAE and 9 for its transformer, times each factor. Ours took less on two cores of an
AMD EPYC, so run the quickstart on the same machine and compare the minutes. The peer's step rate, measured once on the
quiet machine with all threads and kept in .peer/quality/PROCESSOR/rates.json, turns its minutes into steps. Its
training may then run beside other work at any pace, for the same result:

    OMP_NUM_THREADS=1 python -c "from benchmarks.quality import *; peers_run(4, FOLDER, Data())"

The factors 1 and 4 take an hour and a quarter on two cores. The benchmark appends a line to
benchmarks/results/quality.jsonl, and saves quality.png and quality_samples.png beside it.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from benchmarks import peer
from benchmarks.peer_training import (
    TRANSFORMER,
    VAE,
    Step,
    as_peers_text,
    new_transformer,
    steps_per_second,
    train,
    transformer_training,
    vae_training,
)
from benchmarks.recording import RESULTS, record, run
from lightning_dalle.data.datamodule import CaptionedImageDataModule
from lightning_dalle.data.sources.openmoji import OpenMoji
from lightning_dalle.evaluation.openmoji import Emoji, measure_dvae
from lightning_dalle.evaluation.protocol import Captions
from lightning_dalle.files import write_json
from lightning_dalle.hardware import describe_hardware, has_native_bf16
from lightning_dalle.images import captioned_grid, read_png_texts, save_png, to_pil
from lightning_dalle.inference.config import SamplingConfig
from lightning_dalle.inference.pipeline import Request, TextToImage

MINUTES = {"dvae": 5.0, "dalle": 9.0}
TEMPERATURES = (0.2, 0.5, 1.0)
PROMPTS = 200
CALIBRATION_STEPS = 60
PROCESSOR = describe_hardware()["processor"] + (" with bf16" if has_native_bf16("cpu") else "")
FOLDER = peer.FOLDER / "quality" / PROCESSOR  # on another processor, the same minutes are other steps


class Data:
    """OpenMoji with the quickstart's settings, in memory."""

    def __init__(self) -> None:
        module = CaptionedImageDataModule(OpenMoji(), image_size=32, text_len=16, vocab_size=2048)
        module.setup("fit")
        self.tokenizer = module.tokenizer
        self.emoji = Emoji(module.image_size)
        train_split = self.emoji.indices("train")
        self.images: Float[Tensor, "n 3 h w"] = self.emoji.images[train_split]
        self.text = self.peers_text([self.emoji.captions[i] for i in train_split])

    @property
    def peers_vocab_size(self) -> int:
        """Number of our tokens, plus one for the peer's padding."""
        return self.tokenizer.vocab_size + 1

    def peers_text(self, captions: list[str]) -> Int[Tensor, "n t"]:
        ids = [self.tokenizer.pad(self.tokenizer.encode(caption))[0] for caption in captions]
        return as_peers_text(torch.tensor(ids), self.tokenizer.vocab_size)


class PeersPipeline(TextToImage):
    """The peer's sampling with our interface and its cache repaired; the first request's seed seeds all of them."""

    def __init__(self, dalle: Any, data: Data) -> None:
        self.peer, self.data = dalle, data

    def sample_images(self, requests: list[Request], sampling: SamplingConfig, **kwargs: Any) -> Iterator[Tensor]:  # type: ignore[override]
        torch.manual_seed(requests[0].seed)
        for text in self.data.peers_text([request.prompt for request in requests]).split(50):
            yield from peer.to_unit(peer.cached_images(self.peer, text, sampling.temperature))


def rates(folder: Path, data: Data, steps: int = CALIBRATION_STEPS) -> dict[str, float]:
    """Return the median steps per second of the peer's two trainings; measured once and kept in the folder."""
    file = folder / "rates.json"
    if not file.exists():
        vae, vae_step = vae_training(data.images)
        _, transformer_step = transformer_training(vae, data.text, data.images, data.peers_vocab_size)
        vae.requires_grad_(True)  # the transformer froze it
        folder.mkdir(parents=True, exist_ok=True)
        found = {"dvae": steps_per_second(vae_step, steps), "dalle": steps_per_second(transformer_step, steps)}
        write_json(file, {"steps_per_second": found, "threads": torch.get_num_threads()})
    measured: dict[str, float] = json.loads(file.read_text())["steps_per_second"]
    return measured


def peers_run(factor: float, folder: Path, data: Data, prompts: int = PROMPTS) -> dict[str, Any]:
    """Train and measure the peer for `factor` times our minutes, unless a report exists; return its figures.

    The folder {factor}x holds its weights and the samples of its best temperature.
    """
    of_run = folder / f"{factor:g}x"
    report = of_run / "report.json"
    if not report.exists():
        rate = rates(folder, data)
        minutes = {stage: factor * of_stage for stage, of_stage in MINUTES.items()}
        steps = {stage: round(60 * minutes[stage] * rate[stage]) for stage in minutes}
        vae, vae_step = vae_training(data.images)
        _trained(vae, vae_step, steps["dvae"], of_run / "dvae.pt")
        dalle, transformer_step = transformer_training(vae, data.text, data.images, data.peers_vocab_size)
        _trained(dalle, transformer_step, steps["dalle"], of_run / "dalle.pt")
        write_json(report, {"minutes": minutes, "steps": steps, **peers_figures(vae, dalle, data, of_run, prompts)})
    figures: dict[str, Any] = json.loads(report.read_text())
    return figures


def _trained(model: Any, step: Step, steps: int, file: Path) -> None:
    """Train a model unless its file exists, and print the progress every 500 steps."""

    def say(done: int) -> None:
        if done % 500 == 0:
            print(f"{time.strftime('%H:%M:%S')} {file}: {done} of {steps}", flush=True)

    if not file.exists():
        train(step, steps, say)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    model.load_state_dict(torch.load(file))
    model.eval()


def peers_figures(vae: Any, dalle: Any, data: Data, of_run: Path, prompts: int) -> dict[str, Any]:
    """Return the figures of our report, measured by the same functions; save samples of the best temperature."""
    quick = new_transformer(vae, data.text.shape[1], data.peers_vocab_size, optimize_for_inference=True)
    quick.load_state_dict(dalle.state_dict())
    pipeline = PeersPipeline(quick.eval(), data)
    by_temperature: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[Image.Image]] = {}
    prompted = data.emoji.choose("compositions", Captions(one_per_image=True, count=prompts))
    requests = [Request(data.emoji.captions[i], seed) for seed, i in enumerate(prompted)]
    for temperature in TEMPERATURES:
        name = str(temperature)
        images = torch.stack(list(pipeline.sample_images(requests, SamplingConfig(temperature=temperature)))).cpu()
        protocol = {"prompts": prompts, "samples_per_caption": 1, "temperature": temperature}
        by_temperature[name] = {"protocol": protocol, **data.emoji.accuracy(images, prompted)}
        samples[name] = [to_pil(image) for image in images]
    best = max(by_temperature, key=lambda name: by_temperature[name]["right_emoji"]["hits"])
    (of_run / "samples").mkdir(parents=True, exist_ok=True)
    for number, (i, sample) in enumerate(zip(prompted, samples[best], strict=True)):
        caption = {"caption": data.emoji.captions[i]}
        save_png(sample, of_run / "samples" / f"{number:06d}.png", OpenMoji.attribution, caption)
    return {
        "reconstruction": measure_dvae(peer.PeersDVAE(vae), data.emoji),
        "composition": by_temperature[best],
        "by_temperature": by_temperature,
    }


def our_run(run_dir: Path) -> dict[str, Any]:
    """Return the figures of a quickstart's report that are compared."""
    report = json.loads((run_dir / "report.json").read_text())
    stages = report["recipe"]["stages"]
    return {
        "minutes": {stage: round(stages[stage]["seconds"] / 60, 1) for stage in MINUTES},
        "reconstruction": report["reconstruction"],
        "composition": {name: report["composition"][name] for name in ("protocol", *SHARES)},
        "commit": report["commit"],
        "machine": report["machine"],
    }


SHARES = {"right_emoji": "right emoji", "right_skin_tone": "right skin tone"}


def chart(figures: dict[str, dict[str, Any]]) -> Figure:
    """Plot accuracy on held-out compositions, with 95 % intervals, and PSNR of the dVAE, for each system."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    shares_axis, psnr_axis = figure.subplots(1, 2, width_ratios=(2, 1))
    width = 0.8 / len(figures)
    for place, (name, of_one) in enumerate(figures.items()):
        values = [of_one["composition"][measure] for measure in SHARES]
        middle = [100 * value["value"] for value in values]
        around = [
            [m - 100 * value["ci95"][0] for m, value in zip(middle, values, strict=True)],
            [100 * value["ci95"][1] - m for m, value in zip(middle, values, strict=True)],
        ]
        at = [group + (place - (len(figures) - 1) / 2) * width for group in range(len(SHARES))]
        bars = shares_axis.bar(at, middle, width, yerr=around, capsize=3, label=name)
        shares_axis.bar_label(bars, [f"{m:.0f}" for m in middle], label_type="center", color="white")
        dvae = of_one["reconstruction"]["dvae"]
        psnr = psnr_axis.bar([name], dvae["psnr_db"]["value"])
        psnr_axis.bar_label(psnr, [f"{dvae['psnr_db']['value']:.1f}\n{dvae['codes_used']} codes"])
    shares_axis.set(title="held-out compositions, %", ylim=(0, 100))
    shares_axis.set_xticks(range(len(SHARES)), SHARES.values())
    psnr_axis.margins(y=0.15)  # room for the labels
    psnr_axis.set(title="PSNR on val, dB", ylim=(15, None), xticks=[])
    figure.legend(*shares_axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def side_by_side(folders: list[Path], emoji: Emoji, count: int = 24) -> Image.Image:
    """Return an image grid of captions, with each system's sample from left to right and the real emoji last."""
    files = [file.name for file in sorted(folders[0].glob("*.png"))[:count]]
    captions = [read_png_texts(folders[0] / file)["caption"] for file in files]
    rows = [
        [*(Image.open(folder / file) for folder in folders), to_pil(emoji.images[emoji.captions.index(caption)])]
        for file, caption in zip(files, captions, strict=True)
    ]
    return captioned_grid(rows, captions, columns=4, side=64)


def main(run_dir: Path, factors: tuple[float, ...] = (1, 4), folder: Path = FOLDER, results: Path = RESULTS) -> None:
    """Train and measure the peer beside a finished quickstart.

    Args:
        run_dir: folder of the finished quickstart.
        factors: multiples of our training time that the peer gets.
        folder: folder of the peer's weights and reports.
        results: folder of the recorded results.
    """
    data = Data()
    peers = [peers_run(factor, folder, data) for factor in factors]
    runs = [("lightning_dalle", our_run(run_dir)), *(("dalle-pytorch", run) for run in peers)]
    figures = {f"{name}, {' + '.join(f'{m:g}' for m in run['minutes'].values())} min": run for name, run in runs}
    result = {
        **figures,
        "peer_rates": json.loads((folder / "rates.json").read_text()),
        "peer_settings": {"dvae": VAE, "dalle": TRANSFORMER},
        "peer_versions": peer.PACKAGES,
    }
    record("quality", result, results)
    chart(figures).savefig(results / "quality.png", dpi=150)
    folders = [run_dir / "samples", *(folder / f"{factor:g}x" / "samples" for factor in factors)]
    save_png(side_by_side(folders, data.emoji), results / "quality_samples.png", OpenMoji.attribution)


if __name__ == "__main__":
    run(main)
