"""PLAID on OpenWebText between embeddings of 16 dimensions, the network of SEDD small.

The paper retrains it at this size. Zero-shot perplexity there, an upper bound: LAMBADA 57.28,
WikiText2 51.80, PTB 142.60, WikiText103 50.86, 1BW 91.12.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    config = rivals.with_rival(openwebtext_small.get_config(hardware), "plaid")
    config.objective.times = "stratified"  # as theirs
    return config
