"""One Billion Words (Table 3): BERT-uncased tokens, length 128, batch 512, 1 M steps.

Needs --config.data.path and --config.data.tokenizer_path (BERT's vocab.txt). The paper has
perplexity 32.79. Sentences are packed (wrapped) into blocks, which changes the number.
"""

from sedd_jax.configs import base


def get_config():
    config = base.get_config()
    config.data.tokenizer = "bert"
    config.data.length = 128
    config.train.steps = 1_000_000
    return config
