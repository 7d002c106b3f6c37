# Copyright 2026 The diffusers_dod authors. Licensed under the Apache License, Version 2.0.
"""
Measures images per second and bytes per image of encoding, for autoencoders of published sizes with random weights.

    python benchmarks/bench_encoding.py --num_images 16 --device cpu

Weights make no difference to either number. Reading and decoding of files is not included: images are made beforehand.
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import torch
from diffusers import AutoencoderDC, AutoencoderKL

from diffusers_dod.data.encoding import EncodingOptions, encode_latents
from diffusers_dod.data.labelled_images import LabelledImages
from diffusers_dod.data.textures import TEXTURE_CLASSES, TextureDataset


# The configs of stabilityai/sd-vae-ft-ema, of FLUX's autoencoder and of SANA's.
KL = dict(
    block_out_channels=[128, 256, 512, 512],
    down_block_types=["DownEncoderBlock2D"] * 4,
    up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2,
)
AUTOENCODERS = {
    "AutoencoderKL, 4 channels": lambda: AutoencoderKL(**KL, latent_channels=4, scaling_factor=0.18215),
    "AutoencoderKL, 16 channels": lambda: AutoencoderKL(
        **KL, latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False
    ),
    "AutoencoderDC, 32 channels": lambda: AutoencoderDC(
        latent_channels=32,
        encoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        encoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
        encoder_layers_per_block=[2, 2, 2, 3, 3, 3],
        encoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
        decoder_block_types=["ResBlock"] * 3 + ["EfficientViTBlock"] * 3,
        decoder_block_out_channels=[128, 256, 512, 512, 1024, 1024],
        decoder_layers_per_block=[3, 3, 3, 3, 3, 3],
        decoder_qkv_multiscales=[[], [], [], [5], [5], [5]],
        scaling_factor=0.41407,
    ),
    "pixels": lambda: None,
}


class InMemory(TextureDataset):
    """Images that are made once."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.samples = [super(InMemory, self).__getitem__(index) for index in range(len(self))]

    def __getitem__(self, index: int) -> dict:
        return self.samples[index]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_images", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    dataset = InMemory(args.num_images, size=args.resolution, seed=0)
    images = LabelledImages(dataset, TEXTURE_CLASSES, "benchmark", args.resolution)
    print(f"{args.num_images} images of {args.resolution} x {args.resolution} with their mirror images, ", end="")
    print(f"{args.device}, {torch.get_num_threads()} thread(s)\n")
    print("| autoencoder | images/s | KiB per image in float16 |\n| --- | ---: | ---: |")
    options = EncodingOptions(random_flip=True, encoding_batch_size=args.batch_size, latents_dtype="float16")
    for name, build in AUTOENCODERS.items():
        torch.manual_seed(0)
        vae = build()
        vae = vae if vae is None else vae.requires_grad_(False).eval().to(args.device)
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            encode_latents(images, vae, Path(folder), options)
            seconds = time.perf_counter() - start
            size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"| {name} | {args.num_images / seconds:.2f} | {size / args.num_images / 1024:.1f} |", flush=True)


if __name__ == "__main__":
    main()
