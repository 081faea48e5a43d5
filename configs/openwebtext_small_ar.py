"""An autoregressive transformer on OpenWebText: SEDD small's network with causal attention.

Its likelihood is exact. The paper's own row of Table 1 is GPT-2 small: zero-shot perplexity LAMBADA
45.04, WikiText2 42.43, PTB 138.43, WikiText103 41.60, 1BW 75.20.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    return rivals.with_rival(openwebtext_small.get_config(hardware), "ar")
