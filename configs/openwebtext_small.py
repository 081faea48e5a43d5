"""SEDD small on OpenWebText (Table 1): 169.6 M parameters, 1024 GPT-2 tokens, batch 512.

Prepare the corpus once with several processes (docs/reproduce.md) and name the records in
--config.data.records. The paper reports numbers after 400 k of the 1.3 M steps: zero-shot
perplexity LAMBADA 50.92, WikiText2 41.84, PTB 114.24, WikiText103 40.62, 1BW 79.29.
"""

from sedd_jax.configs import base


def get_config(hardware=""):
    config = base.get_config()
    config.data.corpus = "openwebtext"
    config.data.heldout_fraction = 0.0125  # of the pages; the corpus has no split of its own
    return base.on_hardware(config, hardware)
