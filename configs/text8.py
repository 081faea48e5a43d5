"""text8 (Table 2): 12 blocks, hidden 768, length 256, batch 512, 1 M steps; the paper has 1.39 BPC.

Needs the text8 file's 100 M characters: --config.data.path=FOLDER holding train/ and heldout/.
"""

from sedd_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.tokenizer = "text8"
    config.data.length = 256
    config.train.steps = 1_000_000
    return config
