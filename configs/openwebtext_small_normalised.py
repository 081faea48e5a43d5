"""Normalised scores (MDLM, MD4, RADD's t-DCE) on OpenWebText, the network of SEDD small.

Not in the paper. MD4 reports zero-shot perplexity at this size: LAMBADA 48.43, WikiText2 34.94, PTB
102.26, WikiText103 35.90, 1BW 68.10.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    config = rivals.with_rival(openwebtext_small.get_config(hardware), "normalised")
    config.objective.times = "stratified"  # as theirs
    return config
