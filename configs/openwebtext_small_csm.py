"""Concrete score matching on OpenWebText, the network of SEDD small: the paper's ablation.

The paper's Appendix D finds that it diverges or does worse at scale.
"""

from sedd_jax.configs import openwebtext_small, rivals


def get_config(hardware=""):
    return rivals.with_rival(openwebtext_small.get_config(hardware), "csm")
