"""text8 (Table 2): 12 blocks, hidden 768, length 256, batch 512, 1 M steps; the paper has 1.39 BPC.

Trained on random windows of the first 90 M characters, held out on the next 5 M, tested on the
last 5 M. Downloads text8.zip unless --config.data.path names a folder that holds it.
"""

from sedd_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.corpus = "text8"
    config.data.tokenizer = "text8"
    config.data.length = 256
    config.data.windows = "random"
    config.train.steps = 1_000_000
    return config
