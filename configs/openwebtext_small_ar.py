"""An autoregressive transformer on OpenWebText, the network of SEDD small with causal attention.

The paper's tables have GPT-2's own weights in its place. Zero-shot perplexity there: LAMBADA 45.04,
WikiText2 42.43, PTB 138.43, WikiText103 41.60, 1BW 75.20.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    return rivals.with_rival(openwebtext_small.get_config(hardware), "ar")
