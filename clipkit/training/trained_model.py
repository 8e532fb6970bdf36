"""The model that a run trains, from its settings."""

import torch
from torch import nn

from clipkit.config.pretrain import PretrainConfig
from clipkit.model.attention import fuse_attention
from clipkit.model.build import build_model, lock_towers
from clipkit.model.image_text import ImageTextModel, has_batch_statistics
from clipkit.model.resolution import at_image_size
from clipkit.training.finetune import freeze_norms, levels_below_top, load_start
from clipkit.training.lora import add_lora


def make_model(config: PretrainConfig) -> ImageTextModel:
    """Build the towers, or load those that training starts from, and lock what is to be locked.

    Raises:
      ValueError: settings that do not fit the model; those of `build_model`, `load_start` and `add_lora`.
    """
    settings = config.model
    if settings.start:
        model = load_start(settings.start, settings.pretrained, loss=config.loss.name)
        model = at_image_size(model, settings.image_size or model.image_size)
    else:
        model = build_model(settings.name, config=settings.config, pretrained=settings.pretrained,
                            image_weights=settings.image_weights, image_size=settings.image_size,
                            patch_dropout=settings.patch_dropout, loss=config.loss.name)
    lock_towers(model, image=settings.lock_image, unlocked_image_groups=settings.unlocked_image_groups,
                text=settings.lock_text, unlocked_text_layers=settings.unlocked_text_layers)
    if config.optim.frozen_norms or settings.lora_rank:
        freeze_norms(model.towers)
    check_vocabulary(model)
    if config.loss.name == "clip" and model.towers.logit_bias is not None:
        model.towers.logit_bias.requires_grad_(False)  # cancels in the softmax
    if config.train.fused_attention:
        fuse_attention(model.towers, causal_text=model.trims_text)
    if config.train.activation_checkpointing:
        model.towers.set_grad_checkpointing(True)
    if config.train.channels_last:  # before the optimizer is made or taken up: its state has the weights' layout
        model.towers.visual.to(memory_format=torch.channels_last)
    if settings.lora_rank:  # after all that tells blocks by their classes, which a parametrization changes
        add_lora(model.towers, levels_below_top(model.towers), rank=settings.lora_rank, alpha=settings.lora_alpha,
                 seed=config.seed)
    if config.train.micro_batch_size and has_batch_statistics(model) and not config.train.micro_batch_norm:
        raise ValueError(f"train.micro_batch_size is {config.train.micro_batch_size}, and the model has BatchNorm, whose "
                         "statistics would be those of a micro-batch; choose a tower without, lock it, or allow it with "
                         "train.micro_batch_norm=true")
    return model


def check_vocabulary(model: ImageTextModel) -> None:
    """Raise ValueError if the tokenizer has ids that the text tower has no embedding of."""
    tables = [module.num_embeddings for name, module in model.towers.named_modules() if isinstance(module, nn.Embedding)
              and name.endswith(("token_embedding", "word_embeddings", "embed_tokens", "shared"))]
    if tables and model.tokenize.num_ids > max(tables):
        num_ids = model.tokenize.num_ids
        raise ValueError(f"the text tower has embeddings of {max(tables):,} tokens, and its tokenizer {num_ids:,} ids; give "
                         f"text_cfg.vocab_size={num_ids}, or the tokenizer that the tower was made for "
                         "(text_cfg.hf_tokenizer_name)")
