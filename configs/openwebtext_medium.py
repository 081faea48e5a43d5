"""SEDD medium on OpenWebText (Table 1): 424.5 M parameters, 1024 GPT-2 tokens, batch 512."""

from sedd_jax.configs import openwebtext_small


def get_config():
    config = openwebtext_small.get_config()
    config.model.hidden_size = 1024
    config.model.blocks = 24
    config.model.heads = 16
    return config
