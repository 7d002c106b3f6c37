"""
Trains the autoencoder of a desk-size checkpoint on procedural images:

    python training/desk/train_autoencoder.py --mixed_precision bf16 --output_dir outputs/desk-autoencoder
    python training/desk/train_autoencoder.py --dataset_name scenes --train_batch_size 16 --max_train_steps 4000 \
        --learning_rate 3e-3 --output_dir outputs/scenes-autoencoder

Textures: an `AutoencoderKL`, 32x32x3 pixels <-> 8x8x4 latents, 0.9 M parameters. Scenes: an `AutoencoderDC`, 64x64x3
pixels <-> 8x8x16 latents, 2.3 M parameters, whose shortcuts let it learn faster. It writes the
autoencoder with what normalises its latents, an image of reconstructions, and `metrics.json`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_dod.data.labelled_images import PROCEDURAL


HELD_OUT_SEED = 1
KL_WEIGHT, MOMENTS_WEIGHT = 1e-4, 1e-2  # of what keeps latents near a normal distribution


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--dataset_name", choices=PROCEDURAL, default="textures")
    parser.add_argument(
        "--resolution", type=int, help="Side of the images in pixels; that of the data set by default."
    )
    parser.add_argument("--max_train_steps", type=int, default=3000)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no", help="bf16 where a CPU has it.")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak; falls to 0 along a cosine.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def to_pixels(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_autoencoder(dataset_name: str, resolution: int) -> AutoencoderKL | AutoencoderDC:
    """The autoencoder of images of a data set, with random weights."""
    if dataset_name == "textures":
        channels = (32, 64, 64)
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            up_block_types=("UpDecoderBlock2D",) * len(channels),
            block_out_channels=channels,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            mid_block_add_attention=False,
            sample_size=resolution,
            scaling_factor=1.0,
        )
    channels = (32, 32, 64, 128)  # the first level has no layers
    return AutoencoderDC(
        latent_channels=16,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(0, 1, 2, 2),
        decoder_layers_per_block=(0, 1, 3, 3),
        encoder_qkv_multiscales=((),) * len(channels),
        decoder_qkv_multiscales=((),) * len(channels),
    )


def encode(vae: AutoencoderKL | AutoencoderDC, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents to decode, and the loss that keeps them near a normal distribution."""
    if isinstance(vae, AutoencoderKL):
        posterior = vae.encode(pixels).latent_dist
        return posterior.sample(), KL_WEIGHT * posterior.kl().mean() / pixels[0, 0].numel()
    latents = vae.encode(pixels).latent
    # Its config has one scale for all channels, so that they must have the same.
    std, mean = torch.std_mean(latents.float(), dim=(0, 2, 3))
    return latents, MOMENTS_WEIGHT * (mean.square() + (std - 1).square()).mean()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    images = PROCEDURAL[args.dataset_name]
    resolution = images.default_size if args.resolution is None else args.resolution
    vae = build_autoencoder(args.dataset_name, resolution).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.max_train_steps, pct_start=0.05
    )

    # 1. Train. Every image is seen once; a worker renders while the model trains.
    dataset = images(args.max_train_steps * args.train_batch_size, size=resolution, seed=args.seed)
    loader = DataLoader(dataset, batch_size=args.train_batch_size, num_workers=1)
    start = time.perf_counter()
    progress = tqdm(loader, desc="autoencoder")
    for batch in progress:
        pixels = to_pixels(batch["image"]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.mixed_precision == "bf16"):
            latents, penalty = encode(vae, pixels)
            reconstruction = vae.decode(latents).sample
        l1 = F.l1_loss(reconstruction.float(), pixels)
        (l1 + penalty).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(l1=f"{l1.item():.4f}", penalty=f"{penalty.item():.4f}")
    seconds = time.perf_counter() - start

    # 2. Measure on held-out images, and the statistics that normalise the latents.
    vae.eval()
    held_out = images(2048, size=resolution, seed=HELD_OUT_SEED)
    pixels = torch.cat([to_pixels(batch["image"]) for batch in DataLoader(held_out, batch_size=256)])
    with torch.no_grad():
        encoded = [vae.encode(chunk) for chunk in pixels.split(256)]
        latents = torch.cat([e.latent_dist.mode() if "latent_dist" in e else e.latent for e in encoded])
        reconstruction = torch.cat([vae.decode(chunk).sample for chunk in latents.split(256)])
    std, mean = torch.std_mean(latents, dim=(0, 2, 3))
    if isinstance(vae, AutoencoderKL):
        vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    else:
        vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.output_dir)
    metrics = {
        "held_out_l1": F.l1_loss(reconstruction, pixels).item(),
        "held_out_mse": F.mse_loss(reconstruction, pixels).item(),
        "latents_mean": mean.tolist(),
        "latents_std": std.tolist(),
        "parameters": vae.num_parameters(),
        "steps": args.max_train_steps,
        "batch_size": args.train_batch_size,
        "train_seconds": round(seconds),
        "threads": torch.get_num_threads(),
    }
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))

    # 3. Originals above reconstructions, two rows per class.
    rows = []
    num_classes = len(images.class_names)
    for label in range(num_classes):
        index = list(range(label, num_classes * 16, num_classes))
        originals = np.concatenate([held_out[i]["image"] for i in index], axis=1)
        decoded = ((reconstruction[index].clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows += [originals, np.concatenate(list(decoded), axis=1)]
    sheet = Image.fromarray(np.concatenate(rows))
    factor = max(1, 64 // resolution)
    sheet.resize((sheet.width * factor, sheet.height * factor), Image.NEAREST).save(
        args.output_dir / "reconstructions.png"
    )


if __name__ == "__main__":
    main()
