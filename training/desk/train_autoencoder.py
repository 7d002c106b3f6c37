"""
Trains the autoencoder of the desk-size checkpoint on procedural textures: 32x32x3 pixels <-> 8x8x4 latents.

    python training/desk/train_autoencoder.py --output_dir outputs/desk-autoencoder

It writes a Diffusers `AutoencoderKL` (0.9 M parameters) with `latents_mean` and `latents_std` in its config, an image
of reconstructions, and `metrics.json`.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from diffusers_dod.data.textures import TextureDataset


HELD_OUT_SEED = 1


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resolution", type=int, default=32, help="Side of the images in pixels.")
    parser.add_argument("--max_train_steps", type=int, default=2500)
    parser.add_argument("--train_batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="Peak; falls to 0 along a cosine.")
    parser.add_argument("--kl_weight", type=float, default=1e-4, help="Weight of the KL divergence per pixel.")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def to_pixels(images: torch.Tensor | np.ndarray) -> torch.Tensor:
    """uint8 (B, H, W, 3) -> (B, 3, H, W) in [-1, 1]."""
    return torch.as_tensor(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=args.resolution,
        scaling_factor=1.0,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.learning_rate, total_steps=args.max_train_steps, pct_start=0.05
    )

    # 1. Train: L1 + KL. Every image is seen once; a worker renders while the model trains.
    dataset = TextureDataset(args.max_train_steps * args.train_batch_size, size=args.resolution, seed=args.seed)
    loader = DataLoader(dataset, batch_size=args.train_batch_size, num_workers=1)
    start = time.perf_counter()
    progress = tqdm(loader, desc="autoencoder")
    for batch in progress:
        pixels = to_pixels(batch["image"]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            reconstruction = vae.decode(posterior.sample()).sample
        l1 = F.l1_loss(reconstruction.float(), pixels)
        kl = posterior.kl().mean() / (args.resolution**2)
        loss = l1 + args.kl_weight * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.set_postfix(l1=f"{l1.item():.4f}", kl=f"{kl.item():.3f}")
    seconds = time.perf_counter() - start

    # 2. Measure on held-out images, and the statistics that normalise the latents.
    vae.eval()
    held_out = TextureDataset(2048, size=args.resolution, seed=HELD_OUT_SEED)
    pixels = torch.cat([to_pixels(batch["image"]) for batch in DataLoader(held_out, batch_size=256)])
    with torch.no_grad():
        posteriors = [vae.encode(chunk).latent_dist for chunk in pixels.split(256)]
        latents = torch.cat([posterior.mode() for posterior in posteriors])
        reconstruction = torch.cat([vae.decode(chunk).sample for chunk in latents.split(256)])
    vae.register_to_config(
        latents_mean=latents.mean(dim=(0, 2, 3)).tolist(), latents_std=latents.std(dim=(0, 2, 3)).tolist()
    )
    vae.to(memory_format=torch.contiguous_format).save_pretrained(args.output_dir)
    metrics = {
        "held_out_l1": F.l1_loss(reconstruction, pixels).item(),
        "held_out_mse": F.mse_loss(reconstruction, pixels).item(),
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
    for label in range(12):
        index = list(range(label, 12 * 16, 12))
        originals = np.concatenate([held_out[i]["image"] for i in index], axis=1)
        decoded = ((reconstruction[index].clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        rows += [originals, np.concatenate(list(decoded), axis=1)]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.NEAREST).save(args.output_dir / "reconstructions.png")


if __name__ == "__main__":
    main()
