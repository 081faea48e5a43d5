"""D3PM with absorbing noise on OpenWebText (Table 1), the network of SEDD small.

Zero-shot perplexity in the paper: LAMBADA 93.47, WikiText2 77.28, PTB 200.82, WikiText103 75.16,
1BW 138.92.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    return rivals.with_rival(openwebtext_small.get_config(hardware), "d3pm_absorb")
