"""Time diffusion training and sampling against diffusers on the same U-Net: equality first, then times side by side.

  python scripts/bench/diffusion.py runs/emoji_diffusion --out docs/benchmarks/diffusion_cpu.json

`step`: one training step from cached latents and token ids. The peer is the loop of diffusers' train_text_to_image.py,
written from its calls (DDPMScheduler, F.mse_loss, AdamW with foreach, clip_grad_norm_, EMAModel), the text encoder called in
each step, as there. `sampling`: prompts to pictures, DDIM; the peer is StableDiffusionPipeline; `sampling_compiled`: ours with
compile=true, after the compiler is done. `memory`: peak of a process that makes 8 and 64 samples, 4 at once.
`latent_or_pixel`: a step, a sample and their peak memory in latents and in pixels, 64 and 128 px. Arms are interleaved; ratios
are the peer's time over ours in the same round, by the clock and in processor time.

Measured on two shared cores of an Intel Xeon, one thread: a step 1.08 times as fast as the peer, sampling 1.08, compiled 1.42
(80 % of all is oneDNN's convolutions and matrix products, which both call); 1.02 GB for 8 and for 64 samples; a step in latents
7 times (64 px) and 30 times (128 px) faster than in pixels, in 1.1 and 1.2 GB in the place of 1.9 and 4.4.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkit.diffusion.pipeline_folder import FOLDER, Pipeline, load_pipeline, make_scheduler

TOLERANCE = 1e-5  # of losses, relative, and of pictures in [0, 1]: fp32 sums in another order
SCHEDULE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type", "rescale_betas_zero_snr")
SHAPE = ("block_out_channels", "down_block_types", "up_block_types", "layers_per_block", "attention_head_dim",
         "norm_num_groups")  # of a U-Net
PROMPTS = ["red apple", "grinning face", "dog face", "guitar", "rocket", "house", "bicycle", "fish"]


def peak_memory_gb() -> float:
    """The most that this process has held since its program was started (Linux; ru_maxrss would be the parent's, too)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def seconds_of(work: Callable[[], Any]) -> dict[str, float]:
    start, cpu_start = time.perf_counter(), time.process_time()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}


def race(ours: Callable[[], Any], peer: Callable[[], Any], *, rounds: int) -> dict[str, Any]:
    """Time both in turn, after one call each that does not count; the order changes from round to round."""
    ours()
    peer()
    rows = []
    for number in range(rounds):
        arms = [("ours", ours), ("peer", peer)]
        rows.append({name: seconds_of(work) for name, work in (arms if number % 2 else arms[::-1])})
    ratios = {clock: [row["peer"][clock] / row["ours"][clock] for row in rows] for clock in ("seconds", "cpu_seconds")}
    return {"rounds": rows, "ratio": {clock: {"median": statistics.median(found), "min": min(found), "max": max(found)}
                                      for clock, found in ratios.items()}}


def bench_step(pipeline: Pipeline, *, batch_size: int, rounds: int) -> dict[str, Any]:
    """Race whole training steps, after the losses were found equal at the same noise."""
    import copy

    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    from clipkit.diffusion.conditioning import mix_conditions
    from clipkit.diffusion.draws import draw_rows
    from clipkit.diffusion.objective import Latents, diffusion_loss
    from clipkit.diffusion.unet import Denoise
    from clipkit.training.average import WeightAverage
    from clipkit.training.optim import clip_gradient, make_optimizer, optimizer_step

    device, process = pipeline.schedule.alpha.device, pipeline.process
    conditioning: Any = pipeline.conditioning
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(batch_size, *pipeline.latent_shape, generator=generator).to(device)
    latents = Latents(mean, torch.zeros_like(mean))
    tokens = conditioning.tokenize([PROMPTS[row % len(PROMPTS)] for row in range(batch_size)]).to(device)
    networks: list[Any] = [copy.deepcopy(pipeline.denoise.unet).train().requires_grad_(True) for _ in range(2)]
    unet, theirs = networks[0], networks[1].to(memory_format=torch.contiguous_format)  # as the example has it
    denoise = Denoise(unet)
    optimizer = make_optimizer(list(unet.named_parameters()), name="adamw", recipe="clipkit", lr=1e-4, weight_decay=0.01,
                               beta1=0.9, beta2=0.999, eps=1e-8)
    average = WeightAverage(unet, 0.999)
    peer_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, weight_decay=0.01, foreach=True)
    peer_average = EMAModel(theirs.parameters(), decay=0.999, foreach=True)
    scheduler = DDPMScheduler(**{name: value for name, value in make_scheduler(process).config.items() if name in SCHEDULE})
    steps = iter(range(10**6))

    def our_loss(step: int) -> Tensor:
        draws = draw_rows(tuple(mean.shape), num_levels=process.num_timesteps, drop=0.1, seed=0, step=step)
        draws = type(draws)(*(tensor.to(device) for tensor in draws))
        condition = mix_conditions(conditioning(tokens), conditioning.empty, draws.dropped)
        return diffusion_loss(denoise, latents, condition, draws, pipeline.schedule, scale=1.0, process=process)

    def peer_loss(noise: Tensor, timesteps: Tensor) -> Tensor:
        noisy = scheduler.add_noise(mean, noise, timesteps)  # pyright: ignore[reportArgumentType]
        context = conditioning.text_encoder(tokens, return_dict=False)[0]
        output = theirs(noisy, timesteps, context, return_dict=False)[0]
        return F.mse_loss(output.float(), scheduler.get_velocity(mean, noise, timesteps).float())  # pyright: ignore

    def ours() -> None:
        loss = our_loss(next(steps))
        loss.backward()
        optimizer_step(optimizer, clip_gradient(list(unet.parameters()), 1.0))
        average.update(10**6)

    def peer() -> None:
        loss = peer_loss(torch.randn_like(mean), torch.randint(0, process.num_timesteps, (batch_size,), device=device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        peer_optimizer.step()
        peer_optimizer.zero_grad()
        peer_average.step(theirs.parameters())

    draws = draw_rows(tuple(mean.shape), num_levels=process.num_timesteps, drop=0.0, seed=0, step=0)
    with torch.no_grad():
        found = diffusion_loss(denoise, latents, conditioning(tokens), type(draws)(*(one.to(device) for one in draws)),
                               pipeline.schedule, scale=1.0, process=process).item()
        wanted = peer_loss(draws.noise.to(device), draws.level.to(device)).item()
    if abs(found - wanted) > 10 * TOLERANCE * wanted:  # diffusers' levels are fp32 products
        raise ValueError(f"losses at the same noise are {found} and {wanted}: the times are not comparable")
    return {"losses": [found, wanted], "batch_size": batch_size, **race(ours, peer, rounds=rounds)}


def bench_sampling(pipeline: Pipeline, folder: Path, *, steps: int, rounds: int) -> dict[str, Any]:
    """Race prompts to pictures, after these were found equal; `first_call_seconds` has our compiler's time, if there is one."""
    from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    from clipkit.diffusion.generate import Sampling, generate

    theirs: Any = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    theirs = theirs.to(pipeline.schedule.alpha.device)
    theirs.set_progress_bar_config(disable=True)
    conditioning: Any = pipeline.conditioning
    seeds = range(len(PROMPTS))

    def ours() -> Tensor:
        return generate(pipeline, conditioning.from_texts(PROMPTS), seeds, Sampling(steps=steps))

    def peer() -> Tensor:
        return theirs(PROMPTS, num_inference_steps=steps, guidance_scale=3.0, output_type="pt",
                      generator=[torch.Generator().manual_seed(seed) for seed in seeds]).images

    first = seconds_of(ours)
    difference = (ours() - peer()).abs().max().item()
    if difference > TOLERANCE:
        raise ValueError(f"pictures of the same seeds differ by {difference}: the times are not comparable")
    return {"difference": difference, "steps": steps, "samples": len(PROMPTS), "first_call_seconds": first["seconds"],
            **race(ours, peer, rounds=rounds)}


def bench_memory(run: str) -> dict[str, float]:
    """Peak memory (GB) of processes that make 8 and 64 samples, 4 at once."""
    found = {}
    for count in (8, 64):
        code = ("import tempfile; from clipkit.commands.diffusion.sample import main; "
                "from scripts.bench.diffusion import peak_memory_gb; "
                f"main(['model={run}', 'prompts=red apple', 'n_samples={count}', 'batch_size=4', 'steps=5', "
                "'out=' + tempfile.mkdtemp() + '/samples']); print(peak_memory_gb())")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                              env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])})
        found[str(count)] = float(done.stdout.split()[-1])
    return found


def latent_or_pixel(pipeline: Pipeline, *, image_size: int, in_pixels: bool) -> dict[str, float]:
    """Seconds and peak memory of a training step (8 pictures, the latents made on the way) and of a sample (DDIM, 25 steps)."""
    from clipkit.diffusion.unet import make_unet

    autoencoder = pipeline.autoencoder
    conditioning: Any = pipeline.conditioning
    assert autoencoder is not None
    settings: Any = pipeline.denoise.unet.config
    channels, side = (3, image_size) if in_pixels else (pipeline.latent_shape[0], image_size // 4)
    unet = make_unet({name: settings[name] for name in SHAPE}, side=side, channels=channels, conditioning=conditioning)
    made = pipeline._replace(denoise=type(pipeline.denoise)(unet), autoencoder=None if in_pixels else autoencoder)
    images = torch.rand(8, 3, image_size, image_size) * 2 - 1
    context = conditioning.from_texts(PROMPTS)

    def step() -> None:
        with torch.no_grad():
            x0 = images if in_pixels else autoencoder.encode(images).latent_dist.mean  # pyright: ignore
        made.denoise(x0, torch.full((8,), 500), context).square().mean().backward()

    def sample() -> None:
        from clipkit.diffusion.generate import Sampling, generate

        generate(made, context[:1], [0], Sampling(steps=25))

    step()
    times = {"step_seconds": min(seconds_of(step)["seconds"] for _ in range(3)),
             "sample_seconds": min(seconds_of(sample)["seconds"] for _ in range(2))}
    return times | {"peak_memory_gb": peak_memory_gb()}


def bench_spaces(run: str, threads: int) -> list[dict[str, Any]]:
    """Each space and size in a process of its own, so that peaks do not add up."""
    rows = []
    for image_size in (64, 128):
        for space in ("latents", "pixels"):
            done = subprocess.run([sys.executable, __file__, run, "--space", space, "--size", str(image_size), "--threads",
                                   str(threads)], capture_output=True, text=True, check=True)
            rows.append({"space": space, "image_size": image_size, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    pipeline = load_pipeline(options.run, device=options.device)
    if options.space:
        print(json.dumps(latent_or_pixel(pipeline, image_size=options.size, in_pixels=options.space == "pixels")))
        return
    report: dict[str, Any] = {"machine": platform.processor() or platform.machine(), "device": options.device,
                              "threads": options.threads, "load": os.getloadavg()[0], "torch": torch.__version__}
    report["step"] = bench_step(pipeline, batch_size=options.batch_size, rounds=options.rounds)
    print("step     ", report["step"]["ratio"], flush=True)
    report["sampling"] = bench_sampling(pipeline, Path(options.run) / FOLDER, steps=25, rounds=options.rounds)
    print("sampling ", report["sampling"]["ratio"], flush=True)
    compiled: Any = torch.compile(pipeline.denoise)
    report["sampling_compiled"] = bench_sampling(pipeline._replace(denoise=compiled), Path(options.run) / FOLDER, steps=25,
                                                 rounds=options.rounds)
    print("compiled ", report["sampling_compiled"]["ratio"], flush=True)
    report["memory_gb"] = bench_memory(options.run)
    print("memory   ", report["memory_gb"], flush=True)
    report["latent_or_pixel"] = bench_spaces(options.run, options.threads)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run of clipkit diffusion train, conditioned by text")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a JSON file for all figures")
    parser.add_argument("--space", choices=("latents", "pixels"), help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, default=64, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
