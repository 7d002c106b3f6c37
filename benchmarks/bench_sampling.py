"""
Measures the cost of one stage and of one guided evaluation, and the saving by splitting the modulation by sample.

    make bench

It runs on one thread of a CPU, with interleaved repetitions and medians of process time. Ratios carry over to other
machines better than times. It takes about a minute.
"""

import argparse
import statistics
import time

import torch

from diffusers_dod import DoDTransformer2DModel, LatentEmbeddingModule
from diffusers_dod.guidance import GuidedVelocity
from diffusers_dod.presets import PRESETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", default="DoD-S", choices=[n for n, p in PRESETS.items() if p.latent_embedder_config]
    )
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    preset = PRESETS[args.preset]
    transformer = DoDTransformer2DModel(**preset.transformer_config).eval()
    embedder = LatentEmbeddingModule(**preset.latent_embedder_config).eval()
    config = transformer.config
    latents = torch.randn(args.batch_size, config.in_channels, config.sample_size, config.sample_size)
    labels = torch.zeros(args.batch_size, dtype=torch.int64)
    prior_embeds = torch.randn(args.batch_size, (config.sample_size // config.patch_size) ** 2, config.prior_embed_dim)

    guided = GuidedVelocity(transformer, args.batch_size)

    # The form that is avoided: every sample gets a row per token, also the unconditional half.
    null_prior = torch.cat([prior_embeds, torch.zeros_like(prior_embeds)])
    both, both_labels = torch.cat([latents, latents]), torch.cat([labels, labels + config.num_classes])

    cases = {
        "stage 1, no guidance": lambda: guided(latents, 500.0, labels, None, 1.0),
        "stage 1, guided": lambda: guided(latents, 500.0, labels, None, 4.0),
        "stage 2, no guidance": lambda: guided(latents, 500.0, labels, prior_embeds, 1.0),
        "stage 2, guided": lambda: guided(latents, 500.0, labels, prior_embeds, 4.0),
        "stage 2, guided, broadcast": lambda: transformer(both, 500.0, both_labels, prior_embeds=null_prior),
        "latent embedder (once a stage)": lambda: embedder(latents),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    with torch.no_grad():
        for repetition in range(args.repetitions + 1):
            for name, run in cases.items():
                start = time.process_time()
                run()
                if repetition > 0:  # the first is a warm-up
                    times[name].append(time.process_time() - start)
    baseline = statistics.median(times["stage 1, no guidance"])
    print(f"{args.preset}, batch {args.batch_size}, torch {torch.__version__}, fp32, one thread")
    print(f"{'one evaluation':32s} {'ms':>8s} {'ratio':>6s}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:32s} {median * 1000:8.1f} {median / baseline:6.2f}")


if __name__ == "__main__":
    main()
