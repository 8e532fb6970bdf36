"""Four captions, four colours: a small U-Net learns to draw what the text says, with clipkit's process alone."""

import pytest
import torch

from clipkit.diffusion.noise_schedule import make_schedule
from clipkit.diffusion.process import TARGETS, WEIGHTS, prediction_loss, q_sample
from clipkit.diffusion.sampling import guided, sample

CAPTIONS = ["a red square", "a green square", "a blue square", "a yellow square"]
STEPS, BATCH, SIZE = 250, 16, 8
CPU = torch.device("cpu")


def small_unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=SIZE, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=64, attention_head_dim=8)


def random_text_tower():
    """Hidden states (N, L, D) of texts, from a tower that never learned anything."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tower = CLIPTextModel(CLIPTextConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                                         max_position_embeddings=16, bos_token_id=49406, eos_token_id=49407)).eval()
    tokenize = SimpleTokenizer(context_length=16)

    @torch.no_grad()
    def hidden_states(texts):
        return tower(input_ids=tokenize(texts)).last_hidden_state

    return hidden_states


@pytest.mark.slow
@pytest.mark.parametrize(("name", "prediction", "weight", "sampler"), [("scaled_linear", "v", "uniform", "ddim"),
                                                                       ("scaled_linear", "v", "min_snr", "dpmpp_2m"),
                                                                       ("flow", "flow", "uniform", "euler")])
def test_a_small_network_learns_to_draw_what_the_text_says(name, prediction, weight, sampler):
    unet, hidden_states = small_unet(), random_text_tower()
    schedule, generator = make_schedule(name).to(CPU), torch.Generator().manual_seed(0)
    contexts, empty = hidden_states(CAPTIONS), hidden_states([""])  # (4, L, D), (1, L, D)
    colours = torch.randn(4, 4, generator=generator)  # (captions, latent channels)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)

    def network(x_t, timesteps, context):
        return unet(x_t, timesteps, context).sample

    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20)
        captions = torch.randint(4, (BATCH,), generator=generator)
        x0 = colours[captions][:, :, None, None] + 0.1 * torch.randn(BATCH, 4, SIZE, SIZE, generator=generator)
        dropped = torch.rand(BATCH, generator=generator) < 0.1
        context = torch.where(dropped[:, None, None], empty, contexts[captions])  # (B, L, D)
        index, noise = torch.randint(1000, (BATCH,), generator=generator), torch.randn(x0.shape, generator=generator)
        levels = schedule.at(index)
        output = network(q_sample(x0, noise, levels), schedule.timesteps[index], context)
        loss = prediction_loss(output, TARGETS[prediction](x0, noise, levels), WEIGHTS[weight](levels, prediction))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()

    asked = torch.arange(4).repeat(8)
    start = torch.randn(len(asked), 4, SIZE, SIZE, generator=generator)
    for guidance_scale in (1.0, 2.0):
        denoiser = guided(network, contexts[asked], empty, guidance_scale=guidance_scale)
        drawn = sample(denoiser, start, schedule, sampler=sampler, prediction=prediction, num_steps=15).mean(dim=(2, 3))
        nearest = torch.cdist(drawn, colours).argmin(dim=1)
        assert (nearest == asked).float().mean() >= 0.9, guidance_scale
