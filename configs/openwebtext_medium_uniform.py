"""SEDD medium with uniform noise on OpenWebText (Table 1).

Zero-shot perplexity in the paper: LAMBADA 51.28, WikiText2 38.93, PTB 102.28, WikiText103 36.81,
1BW 79.12.
"""

from sedd_jax.configs import base, openwebtext_medium


def get_config(hardware=""):
    return base.with_uniform_noise(openwebtext_medium.get_config(hardware))
