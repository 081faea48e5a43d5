"""One Billion Words (Table 3): BERT-uncased tokens, a sentence a row of 128, batch 512, 1 M steps.

Longer sentences are cut off, shorter ones padded; loss, bound and attention leave the padding out.
Prepare it once with several processes (docs/reproduce.md) and name it in --config.data.records.
The paper has perplexity 32.79.
"""

from sedd_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.corpus = "lm1b"
    config.data.tokenizer = "bert"
    config.data.length = 128
    config.data.form = "padded"
    config.data.heldout_split = "test"
    config.train.steps = 1_000_000
    return config
