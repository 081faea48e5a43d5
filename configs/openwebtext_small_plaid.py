"""PLAID on OpenWebText (Table 1), the network of SEDD small: Gaussian diffusion of embeddings.

Zero-shot perplexity in the paper: LAMBADA 57.28, WikiText2 51.80, PTB 142.60, WikiText103 50.86,
1BW 91.12.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    return rivals.with_rival(openwebtext_small.get_config(hardware), "plaid")
