"""Sampling with our U-ViT and loop against denoising_diffusion_pytorch's `simple_diffusion` at equal size and steps.

    pip install denoising-diffusion-pytorch
    python benchmarks/sampling.py                                                # a small pair, CPU
    python benchmarks/sampling.py --image-size 128 --dim 128 --batch 16 --bf16 --compile     # one GPU

The whole way from seeds to images with the ancestral sampler (posterior variance, clipped to [-1, 1], v-prediction,
cosine schedule), which is the only one of theirs; both alternate in one run. The last line is the number to quote:
theirs over ours, seconds per image.
"""

import os

os.environ.setdefault("TQDM_DISABLE", "1")  # before tqdm: theirs draws a bar, which costs time and ours does not

import torch
from pair import arguments, autocast, both, images_per_second

from diffzoo.process import GaussianProcess
from diffzoo.sampling import Ancestral, Denoiser, sample


def main() -> None:
    """Measure and print."""
    from denoising_diffusion_pytorch.simple_diffusion import GaussianDiffusion

    args = arguments(__doc__.splitlines()[0])
    networks, gflops = both(args)
    denoiser = Denoiser(networks["ours"].eval(), GaussianProcess())
    sampler = Ancestral(steps=args.steps, gamma=0.0, clip=1.0)
    rival = GaussianDiffusion(networks["theirs"].eval(), image_size=args.image_size, num_sample_steps=args.steps)
    rival.to(args.device)
    shape = (3, args.image_size, args.image_size)

    def run_ours() -> None:
        for _ in range(args.repeats):
            precision = "bf16" if args.bf16 else None
            sample(denoiser, sampler, shape, range(args.batch), device=args.device, precision=precision)

    def run_theirs() -> None:
        with torch.inference_mode(), autocast(args):
            for _ in range(args.repeats):
                rival.sample(batch_size=args.batch).cpu()

    drawn = {name: args.steps * forward for name, forward in gflops.items()}
    images_per_second({"ours": run_ours, "theirs": run_theirs}, args.batch * args.repeats, drawn, args)


if __name__ == "__main__":
    main()
