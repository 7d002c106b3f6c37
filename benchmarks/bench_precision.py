"""
Measures lower precision: the memory of a pipeline's two models, and how far its samples move.

    python benchmarks/bench_precision.py

The same seed is sampled in two stages with weights in fp32, bf16, fp8 (layerwise casting) and, where torchao is
installed, int8 (weights only). All but fp32 compute in bf16. It takes about a minute on a CPU.
"""

import argparse
import importlib.util
import logging

import torch
from diffusers import PipelineQuantizationConfig, TorchAoConfig

from diffusers_dod import DoDPipeline


MODELS = ("transformer", "latent_embedder")


def load(path: str, precision: str) -> DoDPipeline:
    if precision == "fp32":
        return DoDPipeline.from_pretrained(path)
    dtype = dict.fromkeys(MODELS, torch.bfloat16) | {"default": torch.float32}
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        quantization = {name: TorchAoConfig(Int8WeightOnlyConfig()) for name in MODELS}
        return DoDPipeline.from_pretrained(
            path, dtype=dtype, quantization_config=PipelineQuantizationConfig(quant_mapping=quantization)
        )
    pipe = DoDPipeline.from_pretrained(path, dtype=dtype)
    if precision == "fp8":
        for name in MODELS:
            getattr(pipe, name).enable_layerwise_casting(torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return pipe


def num_bytes(model: torch.nn.Module) -> int:
    """Bytes of the parameters, those inside quantized tensors included."""
    total = 0
    for parameter in model.parameters():
        names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else []
        parts = [getattr(parameter, name) for name in names] or [parameter]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrained_model_name_or_path", default="checkpoints/dod-desk")
    parser.add_argument("--images_per_class", type=int, default=4)
    args = parser.parse_args()
    logging.getLogger("torchao").setLevel(logging.ERROR)
    print(f"{args.pretrained_model_name_or_path}, torch {torch.__version__}, two stages, seed 0")
    print(f"{'weights':8s} {'bytes':>10s} {'of fp32':>8s} {'error of the latents':>21s} {'grey levels':>12s}")
    reference = None
    precisions = ["fp32", "bf16", "fp8"]
    if importlib.util.find_spec("torchao") is None:
        print("int8 is left out: it needs `pip install 'diffusers-dod[quantization]'`.")
    else:
        precisions.append("int8")
    for precision in precisions:
        pipe = load(args.pretrained_model_name_or_path, precision)
        pipe.set_progress_bar_config(disable=True)
        labels = list(range(pipe.transformer.config.num_classes)) * args.images_per_class
        settings = {"class_labels": labels, "num_stages": 2}
        latents = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="latent").images.float()
        pixels = pipe(**settings, generator=torch.Generator().manual_seed(0), output_type="pt").images.float()
        size = sum(num_bytes(getattr(pipe, name)) for name in MODELS)
        reference = reference or (size, latents, pixels)
        error = (latents - reference[1]).norm() / reference[1].norm()
        levels = 255 * (pixels - reference[2]).abs().mean()
        print(f"{precision:8s} {size:10,d} {size / reference[0]:8.2f} {error:21.4f} {levels:12.2f}")


if __name__ == "__main__":
    main()
