"""SEDD medium on OpenWebText (Table 1): 424.5 M parameters, 1024 GPT-2 tokens, batch 512.

Zero-shot perplexity in the paper: LAMBADA 42.77, WikiText2 31.04, PTB 87.12, WikiText103 29.98,
1BW 61.19.
"""

from sedd_jax.configs import base, openwebtext_small


def get_config(hardware=""):
    config = openwebtext_small.get_config()
    config.model.hidden_size = 1024
    config.model.blocks = 24
    config.model.heads = 16
    return base.on_hardware(config, hardware)
