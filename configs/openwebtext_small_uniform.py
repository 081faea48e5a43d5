"""SEDD small with uniform noise on OpenWebText (Table 1).

Zero-shot perplexity in the paper: LAMBADA 65.40, WikiText2 50.27, PTB 140.12, WikiText103 49.60,
1BW 101.37.
"""

from sedd_jax.configs import base, openwebtext_small


def get_config(hardware=""):
    return base.with_uniform_noise(openwebtext_small.get_config(hardware))
